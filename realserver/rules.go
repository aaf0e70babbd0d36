package realserver

import (
	"cmp"
	"errors"
	"fmt"
	"maps"
	"math"
	"math/bits"
	"net/netip"
	"slices"
	"strconv"
	"strings"

	"github.com/ravel-lb/ravel"
)

// ruleset is what one family's tables hold of ours: by table and chain, the rules in order, each as iptables-save
// prints it without "-A CHAIN ".
type ruleset map[string]map[string][]string

// tableOrder is the order of the tables in a change: what lets packets pass stands before what redirects them.
var tableOrder = []string{"mangle", "filter", "nat"}

// marks are the bits that rules set and match.
type marks struct{ flow, tunnel, masquerade uint32 }

func (m *marks) setDefaults() {
	m.flow = cmp.Or(m.flow, DefaultMark)
	m.tunnel = cmp.Or(m.tunnel, DefaultTunnelMark)
	m.masquerade = cmp.Or(m.masquerade, DefaultMasqueradeMark)
}

func (m marks) check() error {
	for _, bit := range []uint32{m.flow, m.tunnel, m.masquerade} {
		if bits.OnesCount32(bit) != 1 {
			return fmt.Errorf("mark %#x: want one bit", bit)
		}
	}
	if m.flow == m.tunnel || m.flow == m.masquerade || m.tunnel == m.masquerade {
		return errors.New("marks: want three different bits")
	}
	return nil
}

// wanted is what one family's rules are made from.
type wanted struct {
	v6        bool
	redirects []ravel.Redirect // of the family, sorted by key
	directors []netip.Addr     // of the family, sorted
	noMasq    []netip.Prefix   // of the family, sorted
	mtu       int              // of the path from the directors; 0 if no director reaches us by a tunnel
	shared    bool             // somebody else uses the tunnel device too
	through   bool             // kube-proxy's chains are asked first
	names     names
	marks     marks
	// keep is what the kernel holds: flows that live on need the rules outside of nat that they began with, so these
	// stay until cleanup even if nothing new needs them.
	keep ruleset
}

// tunnels reports whether a director may reach this node by a tunnel, or might before.
func (w wanted) tunnels() bool {
	_, before := w.keep["mangle"][w.names.tunnel]
	return before || slices.ContainsFunc(w.redirects, func(r ravel.Redirect) bool { return r.Tunnelled })
}

// masquerades reports whether a redirect asks for it, or one did before.
func (w wanted) masquerades() bool {
	_, before := w.keep["nat"][w.names.post]
	return before || slices.ContainsFunc(w.redirects, func(r ravel.Redirect) bool { return r.Masquerade })
}

// clamps reports whether a VIP has an MTU, or one had before.
func (w wanted) clamps() bool {
	_, before := w.keep["mangle"][w.names.syn]
	return before || slices.ContainsFunc(w.redirects, func(r ravel.Redirect) bool { return r.MTU > 0 })
}

// device is the kernel's own tunnel device of the family.
func (w wanted) device() string {
	if w.v6 {
		return "ip6tnl0"
	}
	return "tunl0"
}

// outer is the protocol of the tunnel's packets as iptables-save prints it: 4 (RFC 2003) or 41 (RFC 2473).
func (w wanted) outer() string {
	if w.v6 {
		return "ipv6"
	}
	return "ipencap"
}

// built is a ruleset and what it was made of, so that the next one is made in proportion to what changed.
type built struct {
	rules   ruleset
	list    []one // one for each redirect that has pods, sorted by key
	through bool  // wanted.through
}

// one is what one redirect became.
type one struct {
	redirect ravel.Redirect
	chain    string   // its chain
	rules    []string // that chain's rules
	vipChain string   // the chain of its VIP
	jump     string   // the rule there that leads to its chain
}

// find returns what the redirect of a key became.
func (b *built) find(key ravel.ServiceKey) (one, bool) {
	i, found := slices.BinarySearchFunc(b.list, key, func(o one, key ravel.ServiceKey) int { return o.redirect.Key.Compare(key) })
	if !found {
		return one{}, false
	}
	return b.list[i], true
}

// kubeServices is where kube-proxy in mode iptables finds the chain of a Service by its address and port. It is never
// deleted while kube-proxy runs, other than the chains of Services: the kernel refuses to delete a chain that is jumped
// to, and kube-proxy deletes chains in the transaction that makes all else.
const kubeServices = "KUBE-SERVICES"

// build makes the rules. It takes over from before, which may be nil, what is the same; that stays as it is.
func build(w wanted, before *built) *built {
	b := &built{rules: ruleset{}, through: w.through, list: make([]one, 0, len(w.redirects))}
	var old []one
	nat := map[string][]string{}
	if before != nil && before.through == w.through {
		old = before.list
		nat = maps.Clone(before.rules["nat"])
	}
	gone := func(o one) {
		delete(nat, o.chain)
		delete(nat, o.vipChain) // made again below if another redirect of the VIP is left
	}
	for _, r := range w.redirects {
		if len(r.Pods) == 0 {
			continue
		}
		for len(old) > 0 && old[0].redirect.Key.Compare(r.Key) < 0 {
			gone(old[0])
			old = old[1:]
		}
		var o one
		switch there := len(old) > 0 && old[0].redirect.Key == r.Key; {
		case there && sameRedirect(old[0].redirect, r):
			o = old[0]
			old = old[1:]
		case there:
			old = old[1:]
			fallthrough
		default:
			o = w.one(r)
			nat[o.chain] = o.rules
		}
		b.list = append(b.list, o)
	}
	for _, o := range old {
		gone(o)
	}
	var dispatch []string
	for rest := b.list; len(rest) > 0; {
		vip, chain := rest[0].redirect.Key.VIP, rest[0].vipChain
		jumps := make([]string, 0, 8)
		for len(rest) > 0 && rest[0].redirect.Key.VIP == vip {
			jumps = append(jumps, rest[0].jump)
			rest = rest[1:]
		}
		jumps = append(jumps, "-j "+w.names.rest)
		if !slices.Equal(nat[chain], jumps) {
			nat[chain] = jumps
		}
		dispatch = append(dispatch, "-d "+host(vip)+" -j "+chain)
	}
	nat[w.names.base] = dispatch
	delete(nat, w.names.rest)
	if len(dispatch) > 0 {
		nat[w.names.rest] = w.rest()
	}
	w.addMasquerade(nat)
	b.rules["nat"] = nat
	b.rules["filter"] = w.filter()
	if mangle := w.mangle(); len(mangle) > 0 {
		b.rules["mangle"] = mangle
	}
	return b
}

// rest makes the rules for packets to a VIP that are for none of its redirects. Node ports and published ports of
// containers are rules for every address of the host, so also for a VIP that it holds: such a packet skips the rest of
// nat and goes on to the guard. What a pod of the cluster sends goes on to kube-proxy, which may know the service by the
// same address and have pods of it on other nodes.
func (w wanted) rest() []string {
	var rules []string
	for _, p := range w.noMasq {
		rules = append(rules, "-s "+p.String()+" -j RETURN")
	}
	return append(rules, "-j ACCEPT")
}

// byVIP iterates over the redirects of each VIP; they are sorted by key.
func byVIP(redirects []ravel.Redirect) func(yield func([]ravel.Redirect) bool) {
	return func(yield func([]ravel.Redirect) bool) {
		for len(redirects) > 0 {
			n := 1
			for n < len(redirects) && redirects[n].Key.VIP == redirects[0].Key.VIP {
				n++
			}
			if !yield(redirects[:n]) {
				return
			}
			redirects = redirects[n:]
		}
	}
}

func sameRedirect(a, b ravel.Redirect) bool {
	return a.Key == b.Key && a.Name == b.Name && a.Masquerade == b.Masquerade && slices.Equal(a.Pods, b.Pods)
}

// one makes the chain of one redirect, which picks each of its pods with the same probability.
func (w wanted) one(r ravel.Redirect) one {
	proto := r.Key.Proto.String()
	o := one{redirect: r, chain: w.names.service(r.Key), vipChain: w.names.vip(r.Key.VIP)}
	o.jump = fmt.Sprintf("-p %s -m %s --dport %d ", proto, proto, r.Key.Port)
	if c := comment(r.Name); c != "" {
		o.jump += "-m comment --comment " + quote(c) + " "
	}
	o.jump += "-j " + o.chain
	o.rules = make([]string, 0, len(r.Pods)+2)
	o.rules = append(o.rules, "-j CONNMARK --set-xmark "+bit(w.marks.flow))
	if r.Masquerade {
		o.rules = append(o.rules, "-j "+w.names.masq)
	}
	if w.through {
		o.rules = append(o.rules, "-j "+kubeServices)
	}
	for i, pod := range r.Pods {
		rule := "-p " + proto + " "
		if left := len(r.Pods) - i; left > 1 {
			rule += "-m statistic --mode random --probability " + probability(left) + " "
		}
		o.rules = append(o.rules, rule+"-j DNAT --to-destination "+pod.String())
	}
	return o
}

// probability returns 1/n as the kernel keeps it, in 31 bits, and as iptables-save prints that.
func probability(n int) string {
	const unit = 1 << 31
	return strconv.FormatFloat(math.Round(unit/float64(n))/unit, 'f', 11, 64)
}

// addMasquerade adds the chains that mark flows and masquerade those that are marked. kube-proxy's own rule does so too,
// where it runs.
func (w wanted) addMasquerade(nat map[string][]string) {
	if !w.masquerades() {
		return
	}
	var mark []string
	for _, p := range w.noMasq {
		mark = append(mark, "-s "+p.String()+" -j RETURN")
	}
	nat[w.names.masq] = append(mark, "-j MARK --set-xmark "+bit(w.marks.masquerade))
	nat[w.names.post] = []string{
		"-m mark --mark " + bit(w.marks.masquerade) + " -m connmark --mark " + bit(w.marks.flow) + " -j MASQUERADE",
	}
}

// filter makes the rules that let redirected flows pass, and the tunnel's packets in.
func (w wanted) filter() map[string][]string {
	chains := map[string][]string{
		w.names.forward: {"-m connmark --mark " + bit(w.marks.flow) + " -j ACCEPT"},
	}
	if w.tunnels() {
		input := []string{}
		for _, d := range w.directors {
			input = append(input, "-s "+host(d)+" -p "+w.outer()+" -j ACCEPT")
		}
		chains[w.names.input] = input
	}
	return chains
}

// mangle makes the rules for tunnelled packets and for the size of segments.
func (w wanted) mangle() map[string][]string {
	chains := map[string][]string{}
	if w.tunnels() {
		w.addTunnel(chains)
	}
	if w.tunnels() || w.clamps() {
		w.addClamps(chains)
	}
	return chains
}

// addTunnel adds the rules for tunnelled packets. A director's outer packet is marked, and the mark stays on what the
// device takes out of it. What comes out without it is a stranger's: dropped, or whoever reaches the node could send
// packets through it under any address. Where the device serves somebody else too, such as a CNI's overlay, only what is
// for our VIPs is dropped and all else goes on.
//
// What came out of the device never meets the rules that mark: a stranger could wrap what looks like a director's.
func (w wanted) addTunnel(chains map[string][]string) {
	outer := []string{"-i " + w.device() + " -g " + w.names.decap}
	for _, d := range w.directors {
		outer = append(outer, "-s "+host(d)+" -p "+w.outer()+" -j MARK --set-xmark "+bit(w.marks.tunnel))
	}
	unmark := "-j MARK --set-xmark 0x0/" + hex(w.marks.tunnel)
	decap := []string{"-g " + w.names.known}
	if w.shared {
		var vips []netip.Prefix
		for group := range byVIP(w.redirects) {
			vips = append(vips, netip.PrefixFrom(group[0].Key.VIP, group[0].Key.VIP.BitLen()))
		}
		decap = nil
		for _, p := range merge(vips) {
			decap = append(decap, "-d "+p.String()+" -g "+w.names.known)
		}
		decap = append(decap, unmark)
	}
	chains[w.names.tunnel] = outer
	chains[w.names.decap] = decap
	chains[w.names.known] = []string{
		"-m mark ! --mark " + bit(w.marks.tunnel) + " -j DROP",
		"-p tcp -j CONNMARK --set-xmark " + bit(w.marks.tunnel),
		unmark,
	}
}

// addClamps adds the rules that make the segment size smaller which an end of a flow announces, and with it what the other
// end sends. Replies announce what a director's tunnel leaves, if the flow came by one, and what the VIP's MTU leaves; the
// pods read in the clients' SYNs what the VIP's MTU leaves. Each rule only lowers, so the smallest counts. A SYN is looked
// at by what it was sent to first, which conntrack knows on either side of the redirect.
func (w wanted) addClamps(chains map[string][]string) {
	const syn = "-p tcp -m tcp --tcp-flags SYN,RST SYN "
	clamp := func(mss int) string {
		return fmt.Sprintf("-m tcpmss --mss %d:65535 -j TCPMSS --set-mss %d", mss+1, mss)
	}
	reply := func(mark uint32) string {
		return syn + "-m connmark --mark " + bit(mark) + " -m conntrack --ctdir REPLY "
	}
	replies := []string{}
	if mss := w.mss(); mss > 0 && w.tunnels() {
		replies = append(replies, reply(w.marks.flow|w.marks.tunnel)+clamp(mss))
	}
	if w.clamps() {
		replies = append(replies, reply(w.marks.flow)+"-j "+w.names.mtu)
		chains[w.names.syn] = []string{"-p tcp -m tcp --tcp-flags SYN,RST,ACK SYN -j " + w.names.mtu}
		headers := 20 + 20
		if w.v6 {
			headers = 40 + 20
		}
		vips := map[int][]netip.Prefix{} // by MTU
		for group := range byVIP(w.redirects) {
			mtu := 0
			for _, r := range group {
				if r.MTU > 0 && r.Key.Proto == ravel.TCP && (mtu == 0 || r.MTU < mtu) {
					mtu = r.MTU
				}
			}
			if vip := group[0].Key.VIP; mtu > 0 {
				vips[mtu] = append(vips[mtu], netip.PrefixFrom(vip, vip.BitLen()))
			}
		}
		byMTU := []string{}
		for _, mtu := range slices.Sorted(maps.Keys(vips)) {
			for _, p := range merge(vips[mtu]) {
				to := p.String()
				if p.IsSingleIP() {
					to = p.Addr().String() // as iptables-save prints it here
				}
				byMTU = append(byMTU, syn+"-m conntrack --ctorigdst "+to+" "+clamp(mtu-headers))
			}
		}
		chains[w.names.mtu] = byMTU
	}
	chains[w.names.mss] = replies
}

// mss is the longest segment that a client may send through the tunnel: the path's MTU less the outer IP header and the
// inner IP and TCP headers.
func (w wanted) mss() int {
	headers := 20 + 20 + 20
	if w.v6 {
		headers = 40 + 40 + 20
	}
	return max(0, w.mtu-headers)
}

// merge returns the fewest prefixes that hold exactly the same addresses, sorted. The prefixes in the list are sorted
// and do not overlap.
func merge(list []netip.Prefix) []netip.Prefix {
	var merged []netip.Prefix
	for _, p := range list {
		merged = append(merged, p)
		for n := len(merged); n > 1; n = len(merged) {
			a, b := merged[n-2], merged[n-1]
			if a.Bits() != b.Bits() || a.Bits() == 0 {
				break
			}
			parent := netip.PrefixFrom(a.Addr(), a.Bits()-1).Masked()
			if parent.Addr() != a.Addr() || !parent.Contains(b.Addr()) {
				break
			}
			merged = append(merged[:n-2], parent)
		}
	}
	return merged
}

func comparePrefixes(a, b netip.Prefix) int {
	return cmp.Or(a.Addr().Compare(b.Addr()), cmp.Compare(a.Bits(), b.Bits()))
}

// host returns an address as a prefix of one.
func host(a netip.Addr) string { return netip.PrefixFrom(a, a.BitLen()).String() }

func hex(n uint32) string { return fmt.Sprintf("%#x", n) }

// bit returns a mark bit as value and mask.
func bit(n uint32) string { return hex(n) + "/" + hex(n) }

// quote writes an argument as iptables-save does: in quotes unless it is of letters, digits, "-" and "_" alone.
func quote(s string) string {
	plain := s != "" && strings.IndexFunc(s, func(c rune) bool {
		return !(c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z' || c >= '0' && c <= '9' || c == '-' || c == '_')
	}) < 0
	if plain {
		return s
	}
	return `"` + strings.NewReplacer(`\`, `\\`, `"`, `\"`, `'`, `\'`).Replace(s) + `"`
}
