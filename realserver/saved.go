package realserver

import (
	"net/netip"
	"strconv"
	"strings"

	"github.com/ravel-lb/ravel"
)

// parseSaved reads the lines of iptables-save for one table and returns the chains that ours holds for, their rules in
// the words that we write.
func parseSaved(lines []string, ours func(chain string) bool) map[string][]string {
	chains := map[string][]string{}
	for _, line := range lines {
		if rest, ok := strings.CutPrefix(line, ":"); ok {
			if chain, _, _ := strings.Cut(rest, " "); ours(chain) {
				if _, there := chains[chain]; !there {
					chains[chain] = nil
				}
			}
			continue
		}
		_, rest, counted := strings.Cut(line, "] ")
		if !counted || !strings.HasPrefix(line, "[") {
			rest = line
		}
		rest, ok := strings.CutPrefix(rest, "-A ")
		if !ok {
			continue
		}
		if chain, rule, _ := strings.Cut(rest, " "); ours(chain) {
			chains[chain] = append(chains[chain], normal(rule))
		}
	}
	return chains
}

// normal returns a rule in the words that we write: other versions of iptables, or a host without /etc/protocols, print
// the tunnel's protocols in other ones.
func normal(rule string) string {
	w := words(rule)
	for i := range w {
		if i > 0 && w[i-1] == "-p" {
			switch w[i] {
			case "4", "ipip", "ipv4":
				w[i] = "ipencap"
			case "41":
				w[i] = "ipv6"
			case "6":
				w[i] = "tcp"
			case "17":
				w[i] = "udp"
			}
		}
		if i > 0 && w[i-1] == "--comment" {
			w[i] = quote(w[i])
		}
	}
	return strings.Join(w, " ")
}

// words splits a rule as the iptables programs print it: at blanks, with double quotes around what holds some and a
// backslash before what is to be taken as it is.
func words(rule string) []string {
	var all []string
	var word strings.Builder
	inWord, quoted := false, false
	for i := 0; i < len(rule); i++ {
		switch c := rule[i]; {
		case quoted && c == '\\' && i+1 < len(rule):
			i++
			word.WriteByte(rule[i])
		case c == '"':
			quoted, inWord = !quoted, true
		case !quoted && c == ' ':
			if inWord {
				all = append(all, word.String())
				word.Reset()
				inWord = false
			}
		default:
			word.WriteByte(c)
			inWord = true
		}
	}
	if inWord {
		all = append(all, word.String())
	}
	return all
}

// argument returns the word after option in a rule, "" if there is none. The text of a comment is no option.
func argument(rule []string, option string) string {
	for i := 0; i+1 < len(rule); i++ {
		if rule[i] == option {
			return rule[i+1]
		}
		if rule[i] == "--comment" {
			i++
		}
	}
	return ""
}

// redirectsIn reads back which keys the chains of nat redirect, and where to. What it does not understand it leaves
// out.
func redirectsIn(nat map[string][]string, n names) map[ravel.ServiceKey][]netip.AddrPort {
	found := map[ravel.ServiceKey][]netip.AddrPort{}
	for _, rule := range nat[n.base] {
		w := words(rule)
		p, err := netip.ParsePrefix(argument(w, "-d"))
		if err != nil || !p.IsSingleIP() {
			continue
		}
		for _, rule := range nat[argument(w, "-j")] {
			w := words(rule)
			key := ravel.ServiceKey{VIP: p.Addr()}
			port, err := strconv.ParseUint(argument(w, "--dport"), 10, 16)
			if err != nil || key.Proto.UnmarshalText([]byte(argument(w, "-p"))) != nil {
				continue
			}
			key.Port = uint16(port)
			found[key] = nil
			for _, rule := range nat[argument(w, "-j")] {
				if pod, err := netip.ParseAddrPort(argument(words(rule), "--to-destination")); err == nil {
					found[key] = append(found[key], pod)
				}
			}
		}
	}
	return found
}
