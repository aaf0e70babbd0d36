package check

import (
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/ravel-lb/ravel/internal/cni"
)

// untrackExtensions are what keeps packets of services from conntrack; with iptables-legacy a table too.
var untrackExtensions = map[string][]extension{
	"nft":    {{"", "CT", "xt_CT", "NETFILTER_XT_TARGET_CT"}},
	"legacy": {{"", "CT", "xt_CT", "NETFILTER_XT_TARGET_CT"}, {"", "", "iptable_raw", "IP_NF_RAW"}},
}

// checkUntracked says whether a director can keep packets from rules of nat.
func checkUntracked(f *facts) []Line {
	chains, _ := f.chains()
	variant := f.asked()
	if variant == "" {
		variant = inUse(chains)
	}
	if variant == "" {
		variant = "nft"
	}
	if slices.ContainsFunc(chains, func(c chain) bool { return c.table == "raw" && c.name == "RAVEL-UNTRACKED" }) {
		return []Line{ok("packets for services are not tracked, so no rule of nat takes them before IPVS")}
	}
	var lines []Line
	for _, e := range untrackExtensions[variant] {
		if l := f.have(e.module, e.symbol).line(e.module, e.module, false); l.Status != OK {
			l.Detail += ": packets for VIPs are tracked, and kube-proxy takes those for a VIP that it knows before IPVS"
			lines = append(lines, l)
		}
	}
	if len(lines) == 0 {
		return []Line{ok("can be: ravel director keeps packets for services out of conntrack, and so from every rule of nat")}
	}
	return lines
}

// proxyMode is how kube-proxy works here, by what it leaves in the kernel: "ipvs", "nftables", "iptables" or "".
func (f *facts) proxyMode() string {
	chains, _ := f.chains()
	links, _ := f.links()
	switch {
	case slices.ContainsFunc(links, func(l link) bool { return l.name == "kube-ipvs0" }):
		return "ipvs"
	case slices.ContainsFunc(chains, func(c chain) bool {
		return c.table == "kube-proxy" && (c.family == "ip" || c.family == "ip6" || c.family == "inet")
	}):
		return "nftables"
	case slices.ContainsFunc(chains, func(c chain) bool { return c.table == "nat" && c.name == "KUBE-SERVICES" }):
		return "iptables"
	}
	return ""
}

// checkKubeProxy says what kube-proxy's mode means for the role: it takes packets for VIPs that it knows by externalIPs
// or by the status of a Service (unless that says ipMode: Proxy).
func checkKubeProxy(f *facts) []Line {
	mode := f.proxyMode()
	var lines []Line
	_, chainsErr := f.chains()
	_, linksErr := f.links()
	if err := errors.Join(chainsErr, linksErr); err != nil {
		lines = append(lines, warn("ravel check --host as root of the host", "not all that shows kube-proxy can be read: %s", firstLine(err)))
	}
	if f.director() && mode == "ipvs" {
		var ranges []string
		for _, vip := range f.VIPs {
			ranges = append(ranges, fmt.Sprintf("%s/%d", vip, vip.BitLen()))
		}
		if len(ranges) == 0 {
			ranges = []string{"VIP/32"}
		}
		lines = append(lines, warn("kube-proxy --proxy-mode=iptables or nftables on directors; or --ipvs-exclude-cidrs="+
			strings.Join(ranges, ",")+", and no VIP in externalIPs or in a status without ipMode: Proxy",
			"kube-proxy runs in IPVS mode here (kube-ipvs0): it removes services of IPVS that are not its own, and takes over those of VIPs that it knows, which are then not announced from here"))
	}
	switch {
	case len(lines) > 0:
		return lines
	case mode == "":
		return []Line{ok("none seen")}
	case f.realserver() && !f.director():
		return []Line{ok("%s mode: Ravel's redirects come before it", mode)}
	}
	return []Line{ok("%s mode: packets for Ravel's services do not meet its rules", mode)}
}

// checkCNI looks for network plugins that carry packets past netfilter.
func checkCNI(f *facts) []Line {
	links, err := f.links()
	if err != nil {
		return []Line{warn("ip link", "links cannot be read: %v", err)}
	}
	host := cni.Host{Root: f.Root}
	for _, l := range links {
		host.Links = append(host.Links, l.name)
	}
	var lines []Line
	for _, found := range cni.Find(f.ctx, host) {
		if found.Bypass && f.realserver() {
			lines = append(lines, fail(found.Fix, "%s", found.What))
		} else {
			lines = append(lines, warn(found.Fix, "%s", found.What))
		}
	}
	if len(lines) == 0 {
		return []Line{ok("no network plugin carries packets past netfilter here")}
	}
	return lines
}
