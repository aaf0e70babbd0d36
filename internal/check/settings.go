package check

import (
	"bufio"
	"fmt"
	"io"
	"net/netip"
	"os"
	"slices"
	"strconv"
	"strings"
)

func checkIPv6(f *facts) []Line {
	_, v6 := split(f.VIPs)
	bad := warn
	if len(v6) > 0 {
		bad = fail
	}
	const name = "proc/sys/net/ipv6/conf/all/disable_ipv6"
	value, err := f.read(name)
	switch {
	case missing(err) && len(f.VIPs) > 0 && len(v6) == 0:
		return []Line{ok("this kernel does not do it, and no VIP needs it")}
	case missing(err):
		return []Line{bad("boot without ipv6.disable=1, with a kernel that does IPv6", "this kernel does not do IPv6")}
	case err != nil:
		return []Line{warn("sysctl net.ipv6.conf.all.disable_ipv6", "cannot be read: %v", err)}
	case value == "0":
		return []Line{ok("enabled")}
	case len(f.VIPs) > 0 && len(v6) == 0:
		return []Line{ok("disabled, and no VIP needs it")}
	}
	return []Line{bad("sysctl -w net.ipv6.conf.all.disable_ipv6=0", "disabled: no link can hold an IPv6 VIP")}
}

// checkARP looks at what Ravel raises so that no host answers ARP for a VIP that another link of it holds.
func checkARP(f *facts) []Line {
	var lines []Line
	var will []string
	for _, s := range []struct {
		name  string
		least int
	}{{"arp_ignore", 1}, {"arp_announce", 2}} {
		name := "net/ipv4/conf/all/" + s.name
		fix := fmt.Sprintf("sysctl -w net.ipv4.conf.all.%s=%d", s.name, s.least)
		value, err := f.number("proc/sys/" + name)
		switch {
		case err != nil:
			lines = append(lines, warn(fix, "all.%s cannot be read: %v", s.name, err))
		case value >= s.least:
		default:
			if err := f.kernel.writable(f.path("proc/sys/" + name)); err != nil {
				lines = append(lines, fail(fix, "all.%s is %d and cannot be raised: %v; this host answers ARP for VIPs", s.name, value, err))
				continue
			}
			will = append(will, fmt.Sprintf("all.%s from %d to %d", s.name, value, s.least))
		}
	}
	switch {
	case len(lines) > 0:
		return lines
	case len(will) > 0:
		return []Line{ok("ravel raises %s", strings.Join(will, " and "))}
	}
	return []Line{ok("ARP for VIPs is not answered")}
}

func checkForwarding(f *facts) []Line {
	v4, v6 := split(f.VIPs)
	var lines []Line
	for _, family := range []struct {
		name   string
		path   string
		dotted string
		vips   int
	}{
		{"IPv4", "proc/sys/net/ipv4/ip_forward", "net.ipv4.ip_forward", len(v4)},
		{"IPv6", "proc/sys/net/ipv6/conf/all/forwarding", "net.ipv6.conf.all.forwarding", len(v6)},
	} {
		if family.vips == 0 && len(f.VIPs) > 0 {
			continue
		}
		bad := fail
		if len(f.VIPs) == 0 && family.name == "IPv6" {
			bad = warn
		}
		value, err := f.read(family.path)
		fix := "sysctl -w " + family.dotted + "=1"
		switch {
		case err != nil:
			lines = append(lines, warn(fix, "%s cannot be read: %v", family.dotted, err))
		case value != "1" && value != "2":
			lines = append(lines, bad(fix, "%s is %s: the node forwards no %s to its pods", family.dotted, short(value), family.name))
		}
	}
	if len(lines) == 0 {
		return []Line{ok("on")}
	}
	return lines
}

// checkRPFilter looks at the links that packets come in by. The kernel takes the larger of "all" and the link's own.
func checkRPFilter(f *facts) []Line {
	const dir = "proc/sys/net/ipv4/conf/"
	all, err := f.number(dir + "all/rp_filter")
	if err != nil {
		return []Line{warn("sysctl net.ipv4.conf.all.rp_filter", "cannot be read: %v", err)}
	}
	var lines []Line
	if all == 1 {
		lines = append(lines, warn("sysctl -w net.ipv4.conf.all.rp_filter=0",
			"all.rp_filter is 1: every link without a 2 of its own drops packets whose way back leads through another link, "+
				"as those of a tunnel do and those of a host with several uplinks may"))
	}
	var strict []string
	for _, link := range f.incoming() {
		own, err := f.number(dir + link + "/rp_filter")
		if err != nil {
			if !missing(err) {
				lines = append(lines, warn("sysctl "+word("net/ipv4/conf/"+link+"/rp_filter"), "%s cannot be read: %v", link, err))
			}
			continue
		}
		// ravel realserver gives the tunnel's device a 2.
		if max(own, all) == 1 && link != "tunl0" {
			strict = append(strict, link)
		}
	}
	for _, link := range strict {
		lines = append(lines, warn("sysctl -w "+word("net/ipv4/conf/"+link+"/rp_filter=2"),
			"%s is strict: it drops packets of clients whose way back leads through another link", link))
	}
	if len(lines) == 0 {
		return []Line{ok("no link is strict")}
	}
	return lines
}

// incoming returns the links that packets for VIPs come in by: those that lead to the addresses we know of, or all that
// are neither ours nor a pod's if we know of none.
func (f *facts) incoming() []string {
	known := slices.Concat(f.Nodes, f.Directors)
	for _, p := range f.Peers {
		known = append(known, p.Addr)
	}
	var names []string
	for _, a := range known {
		if !a.IsValid() {
			continue
		}
		if r, err := f.kernel.route(a); err == nil && !r.local && r.link != "" {
			names = append(names, r.link)
		}
	}
	if len(names) == 0 {
		entries, err := os.ReadDir(f.path("proc/sys/net/ipv4/conf"))
		if err != nil {
			return nil
		}
		kinds := map[string]string{}
		if links, err := f.links(); err == nil {
			for _, l := range links {
				kinds[l.name] = l.kind
			}
		}
		for _, e := range entries {
			name := e.Name()
			switch kind := kinds[name]; {
			case name == "all", name == "default", name == "lo", name == f.Link, kind == "veth", kind == "dummy":
			default:
				names = append(names, name)
			}
		}
	}
	slices.Sort(names)
	return slices.Compact(names)
}

func checkConntrack(f *facts) []Line {
	const dir = "proc/sys/net/netfilter/"
	count, err := f.number(dir + "nf_conntrack_count")
	if missing(err) && f.exists("proc/sys/net") {
		if f.realserver() {
			return []Line{ok("not loaded yet; the rules of ravel realserver load it")}
		}
		return []Line{ok("not loaded; a director needs none")}
	}
	if err != nil {
		return []Line{warn("sysctl net.netfilter.nf_conntrack_count", "cannot be read: %v", err)}
	}
	var lines []Line
	if f.realserver() {
		lines = append(lines, f.conntrackRoom(count)...)
	}
	if f.director() {
		if tracked, sure := f.trackedVIPs(); sure {
			count = tracked
		}
		if count > 0 {
			lines = append(lines, ok("%d connections are tracked; a director needs none of that, and keeps packets for its services out of it", count))
		} else {
			lines = append(lines, ok("no connection to a VIP is tracked"))
		}
	}
	return lines
}

// conntrackRoom says how full the table of a realserver is.
func (f *facts) conntrackRoom(count int) []Line {
	most, err := f.number("proc/sys/net/netfilter/nf_conntrack_max")
	fix := "sysctl -w net.netfilter.nf_conntrack_max=" + strconv.Itoa(2*max(most, 1<<17))
	switch {
	case err != nil:
		return []Line{warn("sysctl net.netfilter.nf_conntrack_max", "cannot be read: %v", err)}
	case most <= 0:
		return []Line{ok("%d entries, without a limit", count)}
	case count > most/100*95:
		return []Line{fail(fix, "%d of %d entries are taken: new connections are dropped", count, most)}
	case count > most/100*75:
		return []Line{warn(fix, "%d of %d entries are taken", count, most)}
	}
	return []Line{ok("%d of %d entries are taken", count, most)}
}

// trackedVIPs counts the tracked connections to VIPs, where the kernel lists them.
func (f *facts) trackedVIPs() (n int, sure bool) {
	file, err := os.Open(f.path(f.net() + "/nf_conntrack"))
	if err != nil || len(f.VIPs) == 0 {
		return 0, false
	}
	defer file.Close()
	n, err = parseTracked(file, f.VIPs)
	return n, err == nil
}

// parseTracked reads /proc/net/nf_conntrack: of each line the first dst= is where the client sent to.
func parseTracked(r io.Reader, vips []netip.Addr) (n int, err error) {
	scanner := bufio.NewScanner(r)
	for scanner.Scan() {
		_, rest, _ := strings.Cut(scanner.Text(), " dst=")
		text, _, _ := strings.Cut(rest, " ")
		if a, err := netip.ParseAddr(text); err == nil && slices.Contains(vips, a) {
			n++
		}
	}
	return n, scanner.Err()
}
