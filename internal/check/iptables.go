package check

import (
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strings"
)

// readChains returns the chains of both engines. Beside an error, it returns what could be read.
func (f *facts) readChains() ([]chain, error) {
	var all []chain
	var errs []error
	switch f.have("nf_tables", "NF_TABLES") {
	case present:
		chains, err := f.kernel.nft()
		all, errs = append(all, chains...), append(errs, err)
	case unknown:
		errs = append(errs, errors.New("cannot tell whether nf_tables is loaded, and asking would load it"))
	}
	for _, family := range []string{"ip", "ip6"} {
		tables, err := f.read(f.net() + "/" + family + "_tables_names")
		if missing(err) {
			continue // not loaded
		}
		if err != nil {
			errs = append(errs, fmt.Errorf("reading which tables ip_tables holds: %w", err))
			continue
		}
		for _, table := range strings.Fields(tables) {
			saved, err := f.kernel.legacy(f.ctx, family == "ip6", table)
			if err != nil {
				errs = append(errs, err)
				continue
			}
			all = append(all, parseSaved(family, saved)...)
		}
	}
	return all, errors.Join(errs...)
}

// parseSaved reads what iptables-save prints.
func parseSaved(family, saved string) []chain {
	var all []chain
	index := map[string]int{}
	table := ""
	for line := range strings.Lines(saved) {
		line = strings.TrimSpace(line)
		switch {
		case strings.HasPrefix(line, "*"):
			table = line[1:]
			clear(index)
		case strings.HasPrefix(line, ":"):
			name, rest, _ := strings.Cut(line[1:], " ")
			policy, _, _ := strings.Cut(rest, " ")
			if name == "" {
				continue
			}
			c := chain{variant: "legacy", family: family, table: table, name: name}
			if policy != "-" && policy != "" {
				c.hook, c.drops = strings.ToLower(name), policy == "DROP"
			}
			index[name] = len(all)
			all = append(all, c)
		case strings.HasPrefix(line, "-A "):
			name, rule, _ := strings.Cut(line[3:], " ")
			jump := !strings.HasPrefix(name, "RAVEL") && strings.Contains(rule, "-j RAVEL")
			if i, known := index[name]; known && !jump {
				all[i].rules++
			}
		}
	}
	return all
}

// variants are iptables' two, in the order in which Ravel looks for them.
var variants = []string{"nft", "legacy"}

// programs returns which variants' programs are here, for both families.
func (f *facts) programs() (found map[string]bool, why error) {
	found = map[string]bool{}
	var errs []error
	for _, variant := range variants {
		good := true
		for _, name := range []string{"iptables", "ip6tables"} {
			for _, part := range []string{"", "-save", "-restore"} {
				if err := f.hasProgram(name, variant, part); err != nil {
					good = false
					errs = append(errs, err)
				}
			}
		}
		found[variant] = good
	}
	return found, errors.Join(errs...)
}

// hasProgram looks for iptables-nft-save and its likes, or a plain one that is of the variant.
func (f *facts) hasProgram(name, variant, part string) error {
	_, err := f.kernel.program(name + "-" + variant + part)
	if err == nil {
		return nil
	}
	path, plainErr := f.kernel.program(name + part)
	if plainErr != nil {
		return err
	}
	version, versionErr := f.kernel.version(f.ctx, path)
	if versionErr != nil {
		return versionErr
	}
	if strings.Contains(version, "nf_tables") != (variant == "nft") {
		return err
	}
	return nil
}

const installIPTables = "apt-get install iptables || dnf install iptables-nft iptables-legacy || apk add iptables iptables-legacy"

func checkPrograms(f *facts) []Line {
	found, err := f.programs()
	var names []string
	for _, v := range variants {
		if found[v] {
			names = append(names, "iptables-"+v)
		}
	}
	switch {
	case len(names) == 0:
		return []Line{fail(installIPTables, "no complete set of programs: %s", short(firstLine(err)))}
	case f.asked() != "" && !found[f.asked()]:
		return []Line{fail(installIPTables, "iptables-%s is asked for and not here; %s is", f.asked(), strings.Join(names, ", "))}
	}
	return []Line{ok("%s", strings.Join(names, ", "))}
}

func firstLine(err error) string {
	if err == nil {
		return ""
	}
	first, _, _ := strings.Cut(err.Error(), "\n")
	return first
}

// asked returns the variant asked for, "" for the one that the node uses.
func (f *facts) asked() string {
	if slices.Contains(variants, f.IPTables) {
		return f.IPTables
	}
	return ""
}

// use is what one variant's tables hold of other programs.
type use struct{ hints, rules int }

func uses(chains []chain) map[string]use {
	all := map[string]use{}
	for _, c := range chains {
		if !c.iptables() {
			continue
		}
		u := all[c.variant]
		if c.name == "KUBE-IPTABLES-HINT" || c.name == "KUBE-KUBELET-CANARY" {
			u.hints++
		}
		if !strings.HasPrefix(c.name, "RAVEL") {
			u.rules += c.rules
		}
		all[c.variant] = u
	}
	return all
}

// inUse returns the variant that others use here, by the same rule as Ravel does: the kubelet's hints, then the number
// of rules; "" if there are neither.
func inUse(chains []chain) string {
	u := uses(chains)
	nft, legacy := u["nft"], u["legacy"]
	switch {
	case nft.hints > 0 && legacy.hints == 0, (nft.hints > 0) == (legacy.hints > 0) && nft.rules > legacy.rules:
		return "nft"
	case legacy.hints > 0 && nft.hints == 0, (nft.hints > 0) == (legacy.hints > 0) && legacy.rules > nft.rules:
		return "legacy"
	}
	return ""
}

func checkVariant(f *facts) []Line {
	chains, err := f.chains()
	var lines []Line
	if err != nil {
		lines = append(lines, warn("ravel check --host as root of the host", "not all rules can be read: %s", firstLine(err)))
	}
	u, used := uses(chains), inUse(chains)
	if u["nft"].rules > 0 && u["legacy"].rules > 0 {
		other := "legacy"
		if used == "legacy" {
			other = "nft"
		}
		lines = append(lines, warn("iptables-"+other+"-save; ip6tables-"+other+"-save, and move what matters to the other",
			"other programs use both: %d rules of iptables-nft, %d of iptables-legacy; packets pass both", u["nft"].rules, u["legacy"].rules))
	}
	if asked := f.asked(); asked != "" && used != "" && asked != used {
		lines = append(lines, warn("leave iptables at auto, or set it to "+used, "%s is asked for, and this node uses %s", asked, used))
	}
	switch {
	case len(lines) > 0:
		return lines
	case used != "":
		return []Line{ok("%s, as the other programs of this node", used)}
	}
	return []Line{ok("no other program has rules here")}
}

// extension is a match or target of iptables: what /proc/net/ip_tables_matches or _targets calls it, its module and the
// symbol of the kernel's configuration.
type extension struct{ match, target, module, symbol string }

// director and realserver use these; without the first group no VIP is guarded.
var guardExtensions = []extension{
	{"set", "", "xt_set", "NETFILTER_XT_SET"},
	{"", "REJECT", "ipt_REJECT", "IP_NF_TARGET_REJECT"},
}

var guardExtensions6 = []extension{{"", "", "ip6t_REJECT", "IP6_NF_TARGET_REJECT"}}

var redirectExtensions = []extension{
	{"statistic", "", "xt_statistic", "NETFILTER_XT_MATCH_STATISTIC"},
	{"conntrack", "", "xt_conntrack", "NETFILTER_XT_MATCH_CONNTRACK"},
	{"connmark", "", "xt_connmark", "NETFILTER_XT_CONNMARK"},
	{"", "CONNMARK", "xt_connmark", "NETFILTER_XT_CONNMARK"},
	{"mark", "", "xt_mark", "NETFILTER_XT_MARK"},
	{"comment", "", "xt_comment", "NETFILTER_XT_MATCH_COMMENT"},
	{"", "DNAT", "xt_nat", "NETFILTER_XT_NAT"},
	{"", "MASQUERADE", "xt_MASQUERADE", "NETFILTER_XT_TARGET_MASQUERADE"},
}

var clampExtensions = []extension{
	{"tcpmss", "", "xt_tcpmss", "NETFILTER_XT_MATCH_TCPMSS"},
	{"", "TCPMSS", "xt_TCPMSS", "NETFILTER_XT_TARGET_TCPMSS"},
}

func checkRuleModules(f *facts) []Line {
	need := slices.Clone(guardExtensions)
	_, v6 := split(f.VIPs)
	if len(v6) > 0 || len(f.VIPs) == 0 {
		need = append(need, guardExtensions6...)
	}
	if f.realserver() {
		need = append(need, redirectExtensions...)
		need = append(need, clampExtensions...)
	}
	registered := map[string]bool{}
	for _, kind := range []string{"matches", "targets"} {
		if text, err := f.read(f.net() + "/ip_tables_" + kind); err == nil {
			for _, name := range strings.Fields(text) {
				registered[kind+" "+name] = true
			}
		}
	}
	worst := map[presence][]string{}
	if engine, p := f.engine(); p != present {
		worst[p] = append(worst[p], engine)
	}
	for _, e := range need {
		if registered["matches "+e.match] || registered["targets "+e.target] {
			continue
		}
		p := f.have(e.module, e.symbol)
		if !slices.Contains(worst[p], e.module) {
			worst[p] = append(worst[p], e.module)
		}
	}
	var lines []Line
	for _, p := range []presence{never, absent, barred} {
		for _, module := range worst[p] {
			lines = append(lines, p.line(module, module, true))
		}
	}
	if list := worst[unknown]; len(list) > 0 {
		lines = append(lines, warn("modprobe -a "+strings.Join(list, " "), "cannot tell whether this kernel has %s", strings.Join(list, ", ")))
	}
	if len(lines) > 0 {
		return lines
	}
	if list := worst[loadable]; len(list) > 0 {
		return []Line{ok("all there; %d of them are loaded when a rule needs them", len(list))}
	}
	return []Line{ok("all there")}
}

// engines are what the kernel needs for each variant beside single extensions, of IPv4; IPv6 comes with them.
var engines = map[string][]extension{
	"nft":    {{"", "", "nf_tables", "NF_TABLES"}, {"", "", "nft_compat", "NFT_COMPAT"}},
	"legacy": {{"", "", "iptable_filter", "IP_NF_FILTER"}},
}

var natEngines = map[string]extension{
	"nft":    {"", "", "nft_chain_nat", "NFT_NAT"},
	"legacy": {"", "", "iptable_nat", "IP_NF_NAT"},
}

// engine returns the module that the kernel is worst off with, of the variant that Ravel would use, or of the better
// one if it is free to choose.
func (f *facts) engine() (module string, best presence) {
	chains, _ := f.chains()
	candidates := variants
	if asked := f.asked(); asked != "" {
		candidates = []string{asked}
	} else if used := inUse(chains); used != "" {
		candidates = []string{used}
	}
	order := []presence{never, absent, barred, unknown, loadable, present}
	for _, v := range candidates {
		need := slices.Clone(engines[v])
		if f.realserver() {
			need = append(need, natEngines[v])
		}
		worst, name := present, ""
		for _, e := range need {
			if p := f.have(e.module, e.symbol); slices.Index(order, p) < slices.Index(order, worst) {
				worst, name = p, e.module
			}
		}
		if module == "" && best == unknown || slices.Index(order, worst) > slices.Index(order, best) {
			module, best = name, worst
		}
	}
	return module, best
}

func checkIPSet(f *facts) []Line {
	var lines []Line
	for _, m := range []struct{ module, symbol string }{
		{"ip_set", "IP_SET"}, {"ip_set_hash_ip", "IP_SET_HASH_IP"}, {"ip_set_hash_ipport", "IP_SET_HASH_IPPORT"},
	} {
		if l := f.have(m.module, m.symbol).line(m.module, m.module, true); l.Status != OK {
			lines = append(lines, l)
		}
	}
	if len(lines) == 0 {
		return []Line{ok("the sets that guard VIPs can be made")}
	}
	return lines
}

// checkPolicies looks for chains that drop what no rule decides, where packets for VIPs pass.
func checkPolicies(f *facts) []Line {
	chains, err := f.chains()
	var lines []Line
	if err != nil {
		lines = append(lines, warn("ravel check --host as root of the host", "not all rules can be read: %s", firstLine(err)))
	}
	variant := f.asked()
	if variant == "" {
		variant = inUse(chains)
	}
	v4, v6 := split(f.VIPs)
	var fine []string
	for _, c := range chains {
		if !c.drops || c.table == "nat" {
			continue
		}
		vips := slices.Concat(v4, v6)
		switch c.family {
		case "ip":
			vips = v4
		case "ip6":
			vips = v6
		case "inet":
		default:
			continue
		}
		if len(f.VIPs) > 0 && len(vips) == 0 {
			continue
		}
		switch {
		case f.director() && c.hook == "input":
			lines = append(lines, warn(c.acceptVIPs(vips),
				"%s drops by policy: packets for a VIP pass it before IPVS takes them, and as UNTRACKED, which rules for NEW or ESTABLISHED do not accept", c))
		case f.realserver() && c.hook == "forward" && c.iptables() && (c.variant == variant || variant == ""):
			fine = append(fine, c.String())
		case f.realserver() && c.hook == "forward":
			lines = append(lines, warn(c.accept("ct mark and 0x1000 == 0x1000", "-m connmark --mark 0x1000/0x1000"),
				"%s (%s) drops by policy, and what Ravel accepts elsewhere must pass it too", c, c.variant))
		}
	}
	switch {
	case len(lines) > 0:
		return lines
	case len(fine) > 0:
		return []Line{ok("%s drops by policy; Ravel's rule, which accepts its own flows, stands before", strings.Join(fine, ", "))}
	}
	return []Line{ok("none drops packets for VIPs")}
}

// accept is the command that makes the chain let something pass.
func (c chain) accept(nft, iptables string) string {
	if c.iptables() {
		program := map[string]string{"ip": "iptables", "ip6": "ip6tables"}[c.family]
		return program + "-" + c.variant + " -t " + c.table + " -A " + word(c.name) + " " + iptables + " -j ACCEPT"
	}
	return "nft insert rule " + c.family + " " + word(c.table) + " " + word(c.name) + " " + nft + " accept"
}

// acceptVIPs is the command that makes the chain let packets for VIPs pass.
func (c chain) acceptVIPs(vips []netip.Addr) string {
	v4, v6 := split(vips)
	var commands []string
	for _, family := range []struct {
		name string
		vips []netip.Addr
		may  bool
	}{
		{"ip", v4, c.family != "ip6" && (len(v4) > 0 || len(v6) == 0)},
		{"ip6", v6, c.family != "ip" && (len(v6) > 0 || c.family == "ip6")},
	} {
		if family.may {
			commands = append(commands, each(family.vips, func(vip string) string {
				return c.accept(family.name+" daddr "+vip, "-d "+vip)
			}))
		}
	}
	return strings.Join(commands, "; ")
}

// owners are programs by the chains, tables, links and processes that show them.
var owners = []struct {
	name             string
	chains, tables   []string
	links, processes []string
}{
	{"kube-proxy", []string{"KUBE-SERVICES"}, []string{"kube-proxy"}, []string{"kube-ipvs0"}, []string{"kube-proxy"}},
	{"Calico", []string{"cali-FORWARD"}, []string{"calico"}, []string{"vxlan.calico"}, []string{"calico-node"}},
	{"Cilium", []string{"CILIUM_FORWARD", "CILIUM_PRE_nat"}, nil, []string{"cilium_host"}, []string{"cilium-agent"}},
	{"Flannel", []string{"FLANNEL-FWD", "FLANNEL-POSTRTG"}, nil, []string{"flannel.1"}, []string{"flanneld"}},
	{"Docker", []string{"DOCKER", "DOCKER-USER"}, nil, []string{"docker0"}, []string{"dockerd"}},
	{"firewalld", nil, []string{"firewalld"}, nil, []string{"firewalld"}},
	{"ufw", []string{"ufw-before-input"}, nil, nil, nil},
	{"keepalived", nil, nil, nil, []string{"keepalived"}},
	{"ldirectord", nil, nil, nil, []string{"ldirectord"}},
	{"MetalLB or another speaker", nil, nil, nil, []string{"speaker"}},
	{"kube-vip", nil, nil, nil, []string{"kube-vip"}},
}

// checkNeighbours names other programs that work with packets here.
func checkNeighbours(f *facts) []Line {
	chains, chainsErr := f.chains()
	links, linksErr := f.links()
	comms := f.comms()
	found := map[string]bool{}
	for _, o := range owners {
		has := slices.ContainsFunc(chains, func(c chain) bool {
			return slices.Contains(o.chains, c.name) || slices.Contains(o.tables, c.table)
		})
		has = has || slices.ContainsFunc(links, func(l link) bool { return slices.Contains(o.links, l.name) })
		for _, process := range o.processes {
			has = has || comms[process] != 0
		}
		if has {
			found[o.name] = true
		}
	}
	var lines []Line
	for process, owner := range map[string]string{
		"keepalived": "keepalived", "ldirectord": "ldirectord", "speaker": "MetalLB or another speaker", "kube-vip": "kube-vip",
	} {
		if pid := comms[process]; pid != 0 {
			lines = append(lines, warn(fmt.Sprintf("tr '\\0' ' ' < /proc/%d/cmdline; see that it holds none of Ravel's VIPs", pid),
				"%s runs here (process %d): it may hold or announce VIPs", owner, pid))
		}
	}
	slices.SortFunc(lines, func(a, b Line) int { return strings.Compare(a.Detail, b.Detail) })
	if err := errors.Join(chainsErr, linksErr); err != nil {
		lines = append(lines, warn("ravel check --host as root of the host", "not all that shows other programs can be read: %s", firstLine(err)))
	}
	if len(lines) > 0 {
		return lines
	}
	if len(found) == 0 {
		return []Line{ok("none known")}
	}
	return []Line{ok("%s: Ravel's rules live beside theirs", strings.Join(slices.Sorted(maps.Keys(found)), ", "))}
}
