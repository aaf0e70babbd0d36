package realserver

import (
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"slices"

	"github.com/ravel-lb/ravel"
)

// tunnelAddr stands on tunl0 where no other IPv4 address does: a device without one drops every packet as soon as its
// rp_filter is not 0 (fib_validate_source in net/ipv4/fib_frontend.c). Nobody sends to it or from it.
var tunnelAddr = netip.MustParsePrefix("169.254.77.2/32")

// tunnelAlias is the alias of a tunnel device that we brought up, so that cleanup knows.
const tunnelAlias = "ravel: brought up for directors' tunnels"

// liberalSetting is the setting that liberal is about.
const liberalSetting = "net/netfilter/nf_conntrack_tcp_be_liberal"

// reversePath is the setting by which a device judges where packets come from (RFC 3704).
func reversePath(device string) string { return "net/ipv4/conf/" + device + "/rp_filter" }

// network is what a Realserver needs of the kernel beside iptables and sysctls.
type network interface {
	// route says how packets to an address leave.
	route(to netip.Addr) (route, error)
	// prepareTunnel makes the device unless it is there and sees to it that it has an IPv4 address, if it is for IPv4.
	prepareTunnel(device string, v6 bool) error
	// tunnelShared reports whether somebody else uses the device: it was up before we were, or is not named as ours, or
	// has addresses of others. One that is not there is nobody's.
	tunnelShared(device string) (bool, error)
	// startTunnel brings the device up unless it is.
	startTunnel(device string) error
	// stopTunnel undoes what prepareTunnel and startTunnel did, and says what that was in the words of ip. It leaves
	// alone what another program uses.
	stopTunnel(device string, dryRun bool) ([]string, error)
	// deleteFlows removes UDP entries from conntrack by what the client sent to and which server answers it.
	deleteFlows(v6 bool, match func(key ravel.ServiceKey, server netip.AddrPort) bool) (int, error)
}

// route is how packets to an address leave.
type route struct {
	link   string
	mtu    int
	onLink bool
	local  bool // the address is this host's
}

// route says how packets to a director leave. The kernel is asked once between resyncs, not at each change of a pod.
func (r *Realserver) route(to netip.Addr) (route, error) {
	if way, known := r.ways[to]; known {
		return way, nil
	}
	way, err := r.net.route(to)
	if err == nil {
		r.ways[to] = way
	}
	return way, err
}

// sharedTunnel finds out whether somebody else's packets come by the tunnel device, so that strangers cannot be kept from
// it. What cannot be found out is as it was.
func (r *Realserver) sharedTunnel(w wanted) (bool, []ravel.Problem) {
	device := w.device()
	shared, err := r.net.tunnelShared(device)
	if err != nil {
		have := w.keep["mangle"][w.names.decap]
		return len(have) > 0 && have[0] != "-g "+w.names.known, []ravel.Problem{{
			Where: "link " + device, What: err.Error() + "; whether an overlay uses it is not known",
		}}
	}
	if !shared {
		return false, nil
	}
	return true, []ravel.Problem{{
		Where: "link " + device,
		What: "serves somebody else too, such as an overlay of the CNI, so only what is for our VIPs is refused from strangers: " +
			"whoever reaches this node can have it unwrap and forward any other packet, under any source address",
		Fix: map[bool]string{
			false: "let only the overlay's nodes and the directors send IP protocol 4 to this node",
			true:  "let only the overlay's nodes and the directors send IP protocol 41 to this node",
		}[w.v6],
	}}
}

// ensureTunnel makes the family's tunnel device ready to take packets from directors. The rules that keep strangers out
// are in place when it comes up.
func (r *Realserver) ensureTunnel(w wanted) []ravel.Problem {
	device := w.device()
	problem := func(err error, fix string) []ravel.Problem {
		return []ravel.Problem{{Where: "link " + device, What: err.Error() + "; directors cannot reach this node by a tunnel", Fix: fix}}
	}
	if err := r.net.prepareTunnel(device, w.v6); err != nil {
		return problem(err, map[bool]string{false: "modprobe ipip", true: "modprobe ip6_tunnel"}[w.v6])
	}
	if !w.v6 {
		// Packets come in here that are answered by another link. The kernel takes the higher of this and "all".
		if err := r.sysctl.Set(reversePath(device), "2"); err != nil {
			return problem(err, "sysctl -w net.ipv4.conf."+device+".rp_filter=2")
		}
	}
	if err := r.net.startTunnel(device); err != nil {
		return problem(err, "ip link set "+device+" up")
	}
	return nil
}

// pathMTU returns the MTU of the path from the directors: the smallest of the links that lead to them.
func (r *Realserver) pathMTU(w wanted) (int, []ravel.Problem) {
	if r.mtu != 0 {
		return r.mtu, nil
	}
	mtu := 0
	for _, d := range w.directors {
		if way, err := r.route(d); err == nil && !way.local && way.mtu > 0 && (mtu == 0 || way.mtu < mtu) {
			mtu = way.mtu
		}
	}
	if mtu == 0 && len(w.directors) > 0 {
		return 0, []ravel.Problem{{Where: "redirects", What: "no link leads to a director of " + familyName(w.v6) +
			"; what a tunnel leaves for segments is not known and they are not clamped", Fix: "set the MTU of the path, or a route"}}
	}
	return mtu, nil
}

// liberal lets conntrack take packets that it finds out of a flow's window for part of it. They would be INVALID, so nat
// would leave them with the VIP as their destination, and the node itself would reset the flow. kube-proxy has the same
// as a setting (conntrack.tcpBeLiberal).
func (r *Realserver) liberal(w wanted) []ravel.Problem {
	if !slices.ContainsFunc(w.redirects, func(x ravel.Redirect) bool { return x.Key.Proto == ravel.TCP && len(x.Pods) > 0 }) {
		return nil
	}
	if err := r.sysctl.Set(liberalSetting, "1"); err != nil {
		return []ravel.Problem{{
			Where: "sysctl net.netfilter.nf_conntrack_tcp_be_liberal",
			What:  fmt.Sprintf("cannot be set, so a packet out of its window resets its flow: %v", err),
			Fix:   "ravel check --host --fix --role realserver, as root of the host before this starts",
		}}
	}
	return nil
}

// Prepare makes the settings that Apply makes of packets and tunnels, for a process that will not have the right to. It
// brings no device up: a tunnel that is not there, because its module is not, has none.
func (r *Realserver) Prepare() error {
	var errs []error
	for _, s := range []struct{ name, value string }{
		{liberalSetting, "1"},
		{reversePath(wanted{}.device()), "2"},
	} {
		if err := r.sysctl.Set(s.name, s.value); err != nil && !errors.Is(err, fs.ErrNotExist) {
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}

// checkHost says what of the host keeps redirected packets from passing. It changes none of it: forwarding makes a node
// a router between all its links, for IPv6 it also ends router advertisements and with them perhaps the default route.
// That is the node's policy; one that runs pods has it.
func (r *Realserver) checkHost(w wanted) []ravel.Problem {
	if len(w.redirects) == 0 {
		return nil
	}
	var problems []ravel.Problem
	name, dotted := "net/ipv4/ip_forward", "net.ipv4.ip_forward"
	if w.v6 {
		name, dotted = "net/ipv6/conf/all/forwarding", "net.ipv6.conf.all.forwarding"
	}
	value, err := r.sysctl.Get(name)
	switch {
	case err != nil:
		problems = append(problems, ravel.Problem{Where: "sysctl " + dotted, What: err.Error()})
	case value == "0":
		problems = append(problems, ravel.Problem{Where: "sysctl " + dotted, What: "is 0: the node forwards nothing to its pods",
			Fix: "sysctl -w " + dotted + "=1"})
	}
	direct := slices.IndexFunc(w.redirects, func(x ravel.Redirect) bool { return !x.Tunnelled && len(x.Pods) > 0 })
	if direct < 0 {
		return problems
	}
	for _, d := range w.directors {
		way, err := r.route(d)
		switch {
		case err != nil:
			problems = append(problems, ravel.Problem{Where: "director " + d.String(), What: err.Error()})
		case !way.onLink && !way.local:
			problems = append(problems, ravel.Problem{
				Where: "director " + d.String(),
				What: fmt.Sprintf("is not on-link (it is reached by a router, through %s), so it cannot forward directly to this node, as %s wants it to",
					way.link, w.redirects[direct].Key),
				Fix: "forwarding: tunnel or auto",
			})
		}
	}
	return problems
}

func familyName(v6 bool) string {
	if v6 {
		return "ipv6"
	}
	return "ipv4"
}
