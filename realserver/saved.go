package realserver

import (
	"net/netip"
	"strconv"
	"strings"

	"github.com/ravel-lb/ravel"
	"github.com/ravel-lb/ravel/internal/iptables"
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

// hasServiceChains reports whether the lines of iptables-save for nat hold kube-proxy's chains as its mode iptables makes
// them. Its mode ipvs has the first of them too, with rules that match sets and accept what they do.
func hasServiceChains(lines []string) bool {
	there := false
	for _, line := range lines {
		there = there || strings.HasPrefix(line, ":"+kubeServices+" ")
		if strings.Contains(line, "-A "+kubeServices+" ") && strings.Contains(line, " --match-set KUBE-") {
			return false
		}
	}
	return there
}

// normal returns a rule in the words that we write: other versions of iptables, or a host without /etc/protocols, print
// the tunnel's protocols in other ones.
func normal(rule string) string {
	w := iptables.Words(rule)
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
		w := iptables.Words(rule)
		p, err := netip.ParsePrefix(argument(w, "-d"))
		if err != nil || !p.IsSingleIP() {
			continue
		}
		for _, rule := range nat[argument(w, "-j")] {
			w := iptables.Words(rule)
			key := ravel.ServiceKey{VIP: p.Addr()}
			port, err := strconv.ParseUint(argument(w, "--dport"), 10, 16)
			if err != nil || key.Proto.UnmarshalText([]byte(argument(w, "-p"))) != nil {
				continue
			}
			key.Port = uint16(port)
			found[key] = nil
			for _, rule := range nat[argument(w, "-j")] {
				if pod, err := netip.ParseAddrPort(argument(iptables.Words(rule), "--to-destination")); err == nil {
					found[key] = append(found[key], pod)
				}
			}
		}
	}
	return found
}
