// Package check looks over a host before Ravel runs on it, or while it does: what the kernel, its settings, the rules
// and links of other programs, and the process's own rights mean for a director or a realserver.
//
// It guarantees that looking changes nothing: no module is loaded, no table, link, rule or socket is made. Every check
// stands by itself: what it cannot read is a line that says so, never an error of the whole, and never taken for good.
// Every line that is not ok carries the command, or the change, that mends it.
package check

import (
	"context"
	"fmt"
	"net/netip"
	"slices"
	"strings"

	"github.com/ravel-lb/ravel"
)

// Status is how a line came out.
type Status string

// The three of them. What warns may do harm or cannot be known; what fails keeps Ravel from working as asked.
const (
	OK   Status = "ok"
	Warn Status = "warn"
	Fail Status = "fail"
)

// Line is the result of one check, or of one part of it: a check of many things has a line for each that is not ok.
type Line struct {
	Status Status `json:"status"`
	Name   string `json:"name"`          // one of Names
	Detail string `json:"detail"`        // what was found
	Fix    string `json:"fix,omitempty"` // the command or change that mends it; never empty unless Status is OK
}

// String returns the line as text.
func (l Line) String() string {
	s := fmt.Sprintf("%-4s %s: %s", l.Status, l.Name, l.Detail)
	if l.Fix != "" {
		s += "\n     fix: " + l.Fix
	}
	return s
}

// Host says what is to be looked at: which part of Ravel is to run here, and what it will work with. All but Role may
// be left out; what is not given is not checked.
type Host struct {
	Role string // "director" or "realserver"; any other is both
	Root string // where the files of the host are, "/" unless set; netlink and programs are always the process's own

	VIPs      []netip.Addr
	Nodes     []netip.Addr     // real servers that a director sends to
	Directors []netip.Addr     // directors that a realserver gets packets from
	Peers     []ravel.Peer     // BGP sessions of a director
	Listen    []netip.AddrPort // TCP addresses that Ravel is to listen on; an unspecified or zero Addr is all of them
	Socket    string           // path of the admin socket
	Tunnel    bool             // forwarding is by tunnel, or may be
	IPTables  string           // the variant asked for: "nft" or "legacy"; any other lets Ravel choose
	Link      string           // the name of the link that holds VIPs, ravel0 unless set

	kernel kernel // nil asks the kernel
}

func (h Host) director() bool   { return h.Role != "realserver" }
func (h Host) realserver() bool { return h.Role != "director" }

// check is one look at the host. Its lines have no name yet.
type check struct {
	name string
	run  func(*facts) []Line
	only string // the only role that it is for; "" is both
}

// checks returns all checks in the order of their lines.
func checks() []check {
	return []check{
		{"kernel", checkKernel, ""},
		{"machine", checkMachine, "director"},
		{"capabilities", checkCapabilities, ""},
		{"user-namespace", checkUserNamespace, ""},
		{"proc-sys", checkProcSys, ""},

		{"ipvs", checkIPVS, "director"},
		{"ipvs-ipv6", checkIPVSv6, "director"},
		{"scheduler-mh", checkMH, "director"},
		{"mh-table", checkMHTable, "director"},
		{"conn-tab-bits", checkConnTabBits, "director"},
		{"ipvs-sysctls", checkIPVSSysctls, "director"},

		{"ipv6", checkIPv6, ""},
		{"arp", checkARP, ""},
		{"forwarding", checkForwarding, "realserver"},
		{"rp-filter", checkRPFilter, ""},
		{"conntrack", checkConntrack, ""},

		{"iptables", checkPrograms, ""},
		{"iptables-variant", checkVariant, ""},
		{"iptables-modules", checkRuleModules, ""},
		{"ipset", checkIPSet, ""},
		{"policies", checkPolicies, ""},
		{"untracked", checkUntracked, "director"},
		{"neighbours", checkNeighbours, ""},
		{"kube-proxy", checkKubeProxy, ""},
		{"cni", checkCNI, ""},

		{"tunnel", checkTunnel, "realserver"},
		{"tunnel-others", checkTunnelOthers, "realserver"},
		{"mtu", checkMTU, ""},
		{"nodes", checkNodes, "director"},
		{"directors", checkDirectors, "realserver"},
		{"peers", checkPeers, "director"},

		{"ports", checkPorts, ""},
		{"socket", checkSocket, ""},

		{"link", checkLink, ""},
		{"vip-address", checkVIPAddress, ""},
		{"vip-subnet", checkVIPSubnet, "director"},
		{"vip-route", checkVIPRoute, ""},
		{"vip-ipvs", checkVIPServices, ""},
	}
}

// Names returns the names that lines can have, in the order of their lines.
func Names() []string {
	var names []string
	for _, c := range checks() {
		names = append(names, c.name)
	}
	return names
}

// Run looks at the host and returns what it saw, in the order of Names. What does not concern the role, or what was not
// given, has no line. It runs in the goroutine of the caller alone, so that a caller bound to a thread in another
// network namespace sees that. When ctx ends, what was not looked at yet is a warning.
func (h Host) Run(ctx context.Context) []Line {
	lines, _ := h.run(ctx, checks())
	return lines
}

// Modules returns the modules that Ravel would use here, that are not loaded, and that can be: those that it needs, and
// those that it can do without. Of iptables they are those of the variant that IPTables names, or of all that may be
// chosen. It changes nothing, either.
func (h Host) Modules(ctx context.Context) (needed, wished []string) {
	loadable := func(names []string) []string {
		_, f := h.run(ctx, slices.DeleteFunc(checks(), func(c check) bool { return !slices.Contains(names, c.name) }))
		return f.loadable
	}
	need, wish := slices.Clone(ofNeeded), slices.Clone(ofWished)
	if h.Tunnel {
		need, wish = slices.Concat(need, wish), nil
	}
	needed = loadable(need)
	if h.realserver() {
		// Conntrack's settings are there when it is. Rules load it, but later than a setting may be wanted.
		f := newFacts(ctx, h.complete())
		f.have("nf_conntrack", "NF_CONNTRACK")
		needed = append(needed, f.loadable...)
	}
	for _, m := range loadable(wish) {
		if !slices.Contains(needed, m) {
			wished = append(wished, m)
		}
	}
	return needed, wished
}

// The checks that look for modules: those without which a role does not work, and for tunnels and what packets had better
// not meet.
var (
	ofNeeded = []string{"ipvs", "scheduler-mh", "iptables-modules", "ipset", "link"}
	ofWished = []string{"untracked", "tunnel"}
)

// complete fills in what is not given.
func (h Host) complete() Host {
	if h.Root == "" {
		h.Root = "/"
	}
	if h.Link == "" {
		h.Link = "ravel0"
	}
	if h.kernel == nil {
		h.kernel = live{}
	}
	h.VIPs, h.Nodes, h.Directors = tidy(h.VIPs), tidy(h.Nodes), tidy(h.Directors)
	return h
}

func (h Host) run(ctx context.Context, checks []check) ([]Line, *facts) {
	h = h.complete()
	f := newFacts(ctx, h)
	var lines []Line
	for _, c := range checks {
		if c.only == "director" && !h.director() || c.only == "realserver" && !h.realserver() {
			continue
		}
		lines = append(lines, f.run(c)...)
	}
	return lines, f
}

// run does one check and keeps the others safe from it.
func (f *facts) run(c check) (lines []Line) {
	defer func() {
		if p := recover(); p != nil {
			lines = []Line{fail("report this as a bug of Ravel, with this line", "the check itself broke: %v", p)}
		}
		for i := range lines {
			lines[i].Name = c.name
			lines[i].Detail = printable(lines[i].Detail)
			lines[i].Fix = printable(lines[i].Fix)
		}
	}()
	if err := f.ctx.Err(); err != nil {
		return []Line{warn("ravel check --host", "not looked at: %v", err)}
	}
	return c.run(f)
}

// Worst returns the worst status of the lines, OK if there is none.
func Worst(lines []Line) Status {
	worst := OK
	for _, l := range lines {
		if l.Status == Fail || l.Status == Warn && worst == OK {
			worst = l.Status
		}
	}
	return worst
}

func ok(format string, args ...any) Line {
	return Line{Status: OK, Detail: fmt.Sprintf(format, args...)}
}

func warn(fix, format string, args ...any) Line {
	return Line{Status: Warn, Detail: fmt.Sprintf(format, args...), Fix: fix}
}

func fail(fix, format string, args ...any) Line {
	return Line{Status: Fail, Detail: fmt.Sprintf(format, args...), Fix: fix}
}

// tidy sorts addresses, without doubles, zones and what is none.
func tidy(list []netip.Addr) []netip.Addr {
	var all []netip.Addr
	for _, a := range list {
		if a.IsValid() {
			all = append(all, a.Unmap().WithZone(""))
		}
	}
	slices.SortFunc(all, netip.Addr.Compare)
	return slices.Compact(all)
}

// printable replaces what would play tricks with a terminal or break a line: names of links, processes and modules are
// foreign words.
func printable(s string) string {
	return strings.Map(func(r rune) rune {
		if r < ' ' || r == 0x7f || r >= 0x80 && r < 0xa0 || r >= 0x202a && r <= 0x202e || r >= 0x2066 && r <= 0x2069 {
			return '?'
		}
		return r
	}, strings.ToValidUTF8(s, "?"))
}

// word quotes a foreign word so that it can be pasted into a shell.
func word(s string) string {
	plain := func(r rune) bool {
		return r >= 'a' && r <= 'z' || r >= 'A' && r <= 'Z' || r >= '0' && r <= '9' || strings.ContainsRune("-_./:@+=,", r)
	}
	if s != "" && s[0] != '-' && strings.IndexFunc(s, func(r rune) bool { return !plain(r) }) < 0 {
		return s
	}
	return "'" + strings.ReplaceAll(s, "'", `'\''`) + "'"
}

// some joins up to five of the words, and says how many more there are.
func some[T any](list []T) string {
	const most = 5
	var words []string
	for i, x := range list {
		if i == most {
			return strings.Join(words, ", ") + fmt.Sprintf(" and %d more", len(list)-most)
		}
		words = append(words, fmt.Sprint(x))
	}
	return strings.Join(words, ", ")
}

// each makes one command do for all addresses.
func each(list []netip.Addr, command func(arg string) string) string {
	switch len(list) {
	case 0:
		return command("VIP")
	case 1:
		return command(list[0].String())
	}
	var words []string
	for _, a := range list {
		words = append(words, a.String())
	}
	return "for a in " + strings.Join(words, " ") + "; do " + command("$a") + "; done"
}

func split(list []netip.Addr) (v4, v6 []netip.Addr) {
	for _, a := range list {
		if a.Is4() {
			v4 = append(v4, a)
		} else {
			v6 = append(v6, a)
		}
	}
	return v4, v6
}
