package e2e

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/ravel-lb/ravel"
	"github.com/ravel-lb/ravel/lab/stage"
	"github.com/ravel-lb/ravel/lab/traffic"
)

// The VIPs that come and go beside those of the stage.
var (
	briefVIP4 = netip.MustParseAddr("198.51.100.30")
	briefVIP6 = netip.MustParseAddr("2001:db8:77::30")
	brief     = []netip.Addr{briefVIP4, briefVIP6}
)

const (
	linger    = 2 * time.Second // the director's default
	blackhole = 5 * time.Second // a setting of some nodes below
	// redirectLinger is the realserver's default.
	redirectLinger = 5 * time.Second
)

// setBrief adds the brief VIPs to the document, or takes them away.
func setBrief(t *testing.T, s *stage.Stage, there bool) {
	t.Helper()
	must(t, s.Change(func(d *stage.Document) {
		d.Services = slices.DeleteFunc(d.Services, func(v stage.Service) bool { return v.Name == "brief" })
		d.Endpoints = slices.DeleteFunc(d.Endpoints, func(e stage.Endpoint) bool { return e.Service == "brief" })
		if !there {
			return
		}
		for _, vip := range brief {
			d.Services = append(d.Services, stage.Service{VIP: vip, Port: 80, Name: "brief", TCP: true, UDP: true})
		}
		d.Back("brief", s.Pods...)
	}))
}

// netlinkOf opens a netlink socket on a node, for one goroutine.
func netlinkOf(t *testing.T, s *stage.Stage, node string) *netlink.Handle {
	t.Helper()
	var h *netlink.Handle
	must(t, s.Fleet.Node(node).Do(func() (err error) {
		h, err = netlink.NewHandle(unix.NETLINK_ROUTE)
		return err
	}))
	t.Cleanup(h.Close)
	return h
}

// holdsAddr reports whether any link of a node has the address.
func holdsAddr(h *netlink.Handle, vip netip.Addr) (bool, error) {
	addrs, err := dumped(func() ([]netlink.Addr, error) { return h.AddrList(nil, netlinkFamily(vip)) })
	return slices.ContainsFunc(addrs, func(a netlink.Addr) bool { return a.IP.Equal(vip.AsSlice()) }), err
}

// routeTo returns a node's routes to exactly the VIP in its main table.
func routeTo(h *netlink.Handle, vip netip.Addr) ([]netlink.Route, error) {
	filter := &netlink.Route{Dst: &net.IPNet{IP: vip.AsSlice(), Mask: net.CIDRMask(vip.BitLen(), vip.BitLen())}, Table: unix.RT_TABLE_MAIN}
	return dumped(func() ([]netlink.Route, error) {
		return h.RouteListFiltered(netlinkFamily(vip), filter, netlink.RT_FILTER_DST|netlink.RT_FILTER_TABLE)
	})
}

// nextHops lists the gateways of routes.
func nextHops(routes []netlink.Route) []string {
	var hops []string
	add := func(ip net.IP, via netlink.Destination) {
		if v, ok := via.(*netlink.Via); ok {
			ip = v.Addr
		}
		if a, ok := netip.AddrFromSlice(ip); ok {
			hops = append(hops, a.Unmap().String())
		}
	}
	for _, r := range routes {
		add(r.Gw, r.Via)
		for _, h := range r.MultiPath {
			add(h.Gw, h.Via)
		}
	}
	slices.Sort(hops)
	return hops
}

// directorAddr is a director's address of the VIP's family.
func directorAddr(node string, vip netip.Addr) string {
	if vip.Is4() {
		return "10.1.0.1" + strings.TrimPrefix(node, "d")
	}
	return "fd00:1::1" + strings.TrimPrefix(node, "d")
}

// dumped asks again while the kernel changes the list under the reader.
func dumped[T any](ask func() ([]T, error)) ([]T, error) {
	for {
		list, err := ask()
		if !errors.Is(err, netlink.ErrDumpInterrupted) {
			return list, err
		}
	}
}

func netlinkFamily(a netip.Addr) int {
	if a.Is4() {
		return netlink.FAMILY_V4
	}
	return netlink.FAMILY_V6
}

// at is a node and a VIP that a poller watches.
type at struct {
	node string
	vip  netip.Addr
}

// watchRemoval polls what every node has of the brief VIPs, in words: "route" and the next hops on routers; "addr", "hole" (the blackhole
// route), "ipvs" and "rule" on the others.
//
// The address is read first. So a look that finds no address, but IPVS, or no blackhole, proves an order that is wrong:
// those are asked later than a moment at which the address was gone.
func watchRemoval(t *testing.T, s *stage.Stage) map[at]*poller {
	watchers := map[at]*poller{}
	for _, vip := range brief {
		for _, router := range append(stage.Routers(), "spine") {
			h := netlinkOf(t, s, router)
			watchers[at{router, vip}] = poll(t, 100*time.Millisecond, func() (string, error) {
				routes, err := routeTo(h, vip)
				if hops := nextHops(routes); len(hops) > 0 {
					return "route " + strings.Join(hops, " "), err
				}
				return "", err
			})
		}
		key := ravel.ServiceKey{VIP: vip, Proto: ravel.TCP, Port: 80}
		for _, node := range append(s.Directors(), s.Realservers()...) {
			h := netlinkOf(t, s, node)
			nat := openNAT(t, s, node, vip.Is6())
			isDirector := slices.Contains(s.Directors(), node)
			watchers[at{node, vip}] = poll(t, 100*time.Millisecond, func() (string, error) {
				var words []string
				held, err := holdsAddr(h, vip)
				if err != nil {
					return "", err
				}
				if held {
					words = append(words, "addr")
				}
				routes, err := routeTo(h, vip)
				if err != nil {
					return "", err
				}
				if len(routes) > 0 && routes[0].Type == unix.RTN_BLACKHOLE {
					words = append(words, "hole")
				}
				if isDirector {
					table, err := readIPVS(s, node)
					if err != nil {
						return "", err
					}
					if table[key].takesNewFlows() {
						words = append(words, "ipvs")
					}
					return strings.Join(words, " "), nil
				}
				rules, err := nat.redirects()
				if len(rules[key]) > 0 {
					words = append(words, "rule")
				}
				return strings.Join(words, " "), err
			})
		}
	}
	return watchers
}

// waitBrief waits until each node has all that it should have of the brief VIPs, and begins the histories there. A
// director may announce a VIP before a slow real server has its redirects.
func waitBrief(t *testing.T, s *stage.Stage, watchers map[at]*poller) {
	t.Helper()
	must(t, s.WaitTaking(within(t, 30*time.Second)))
	for where, p := range watchers {
		eventually(t, 90*time.Second, func() error {
			last := p.last()
			hops := len(strings.Fields(last)) - 1
			switch {
			case slices.Contains(stage.Routers(), where.node) && hops == 3:
			case where.node == "spine" && hops == 2:
			case last == "addr ipvs" || last == "addr rule":
			default:
				return fmt.Errorf("%s has of %s: %q", where.node, where.vip, last)
			}
			return nil
		})
		p.forget()
	}
}

// event is a moment that lies between two looks.
type event struct{ after, before time.Time }

// lost returns when a watcher first missed the word, having seen it until then.
func lost(t *testing.T, p *poller, word string) (event, bool) {
	t.Helper()
	history, _ := p.history(t)
	had := false
	for _, c := range history {
		has := slices.Contains(strings.Fields(c.answer), word)
		if had && !has {
			return event{c.before, c.at}, true
		}
		had = had || has
	}
	return event{}, false
}

// gained returns when a watcher first saw the word.
func gained(t *testing.T, p *poller, word string) (event, bool) {
	t.Helper()
	history, _ := p.history(t)
	for _, c := range history {
		if slices.Contains(strings.Fields(c.answer), word) {
			return event{c.before, c.at}, true
		}
	}
	return event{}, false
}

// fastBlackhole are the nodes that keep the blackhole for 5 s; the others keep it for the default minute.
var fastBlackhole = []string{"d1", "r1"}

// A removed VIP goes in order, and its clients are never refused while routers still send.
func TestRemovedVIP(t *testing.T) {
	s := fleet(t)
	for _, node := range fastBlackhole {
		restart(t, s, node, "--blackhole", blackhole.String())
	}
	must(t, s.WaitHops(within(t, 30*time.Second), stage.Routers(), vips, len(s.Directors())))
	setBrief(t, s, true)
	must(t, s.WaitHops(within(t, 30*time.Second), stage.Routers(), brief, len(s.Directors())))
	must(t, s.WaitHops(within(t, 30*time.Second), []string{"spine"}, brief, len(stage.Routers())))

	watchers := watchRemoval(t, s)
	waitBrief(t, s, watchers)
	seen := captureAt(t, s, "c1", "eth1", brief)
	foreign := loadOn(t, s, "foreign", vips, 8)
	client := briefLoad(t, s, "brief", 8)

	removed := time.Now()
	setBrief(t, s, false)
	// All is over when the short blackholes are.
	eventually(t, 30*time.Second, func() error {
		for _, vip := range brief {
			for _, node := range fastBlackhole {
				if _, over := lost(t, watchers[at{node, vip}], "hole"); !over {
					return fmt.Errorf("%s: the blackhole of %s is not over", node, vip)
				}
			}
			for _, node := range append(s.Directors(), s.Realservers()...) {
				if _, gone := lost(t, watchers[at{node, vip}], "addr"); !gone {
					return fmt.Errorf("%s still has %s", node, vip)
				}
			}
		}
		return nil
	})
	report, err := client.Report(within(t, 20*time.Second))
	must(t, err)
	must(t, client.Stop())
	seen.end()
	for _, p := range watchers {
		p.end()
	}
	for _, vip := range brief {
		t.Run(vip.String(), func(t *testing.T) { checkRemoval(t, s, vip, watchers, seen.frames(), removed) })
	}
	for _, f := range report.Flows {
		if f.Broken["refused"]+f.Broken["reset"]+f.Broken["closed"] > 0 || f.OtherPod > 0 {
			t.Errorf("the flows to %s: broken %v, %d answers of other pods: %q", f.Name, f.Broken, f.OtherPod, f.Examples)
		}
	}
	for _, q := range report.Requests {
		if q.Failed["refused"]+q.Failed["reset"]+q.Failed["closed"] > 0 || q.Answered == 0 {
			t.Errorf("the requests to %s: %d answered, failed %v: %q", q.Name, q.Answered, q.Failed, q.Examples)
		}
	}
	// The other VIPs have not noticed.
	others, err := stage.Report(within(t, 20*time.Second), foreign...)
	must(t, err)
	for _, q := range others.Requests {
		if q.Failures() > 0 || q.Answered < 30 {
			t.Errorf("%s, which stayed: %d of %d answered, failed %v: %q", q.Name, q.Answered, q.Begun, q.Failed, q.Examples)
		}
	}
	silence(t, s)
}

// checkRemoval holds the order in which one VIP went against the promise.
func checkRemoval(t *testing.T, s *stage.Stage, vip netip.Addr, watchers map[at]*poller, frames []frame, removed time.Time) {
	var withdrawn event // when the first router lost its last route
	for _, router := range append(stage.Routers(), "spine") {
		e, gone := lost(t, watchers[at{router, vip}], "route")
		if !gone {
			t.Fatalf("%s never lost its route", router)
		}
		t.Logf("%s lost its route %s after the removal", router, e.before.Sub(removed).Round(time.Millisecond))
		if withdrawn.after.IsZero() || e.after.Before(withdrawn.after) {
			withdrawn = e
		}
	}
	var lastIPVS time.Time
	for _, d := range s.Directors() {
		ipvs, gone := lost(t, watchers[at{d, vip}], "ipvs")
		if !gone {
			t.Fatalf("%s: IPVS still has it", d)
		}
		addr, _ := lost(t, watchers[at{d, vip}], "addr")
		t.Logf("%s: gone from IPVS after %s, the address after %s", d,
			ipvs.before.Sub(removed).Round(time.Millisecond), addr.before.Sub(removed).Round(time.Millisecond))
		for _, router := range stage.Routers() {
			e, gone := lost(t, watchers[at{router, vip}], directorAddr(d, vip))
			if !gone || !e.before.Before(ipvs.after) || !e.before.Before(addr.after) {
				t.Errorf("%s forgot it before %s lost it as a next hop", d, router)
			}
		}
		if ipvs.before.Sub(removed) < linger {
			t.Errorf("%s served it for %s after the removal, want %s at least", d, ipvs.before.Sub(removed), linger)
		}
		if ipvs.before.After(lastIPVS) {
			lastIPVS = ipvs.before
		}
	}
	for _, r := range s.Realservers() {
		rule, gone := lost(t, watchers[at{r, vip}], "rule")
		if !gone {
			t.Fatalf("%s: a redirect is left", r)
		}
		addr, _ := lost(t, watchers[at{r, vip}], "addr")
		t.Logf("%s: the redirect gone after %s, the address after %s", r,
			rule.before.Sub(removed).Round(time.Millisecond), addr.before.Sub(removed).Round(time.Millisecond))
		// A director that hears of the removal seconds later than the real server is on a machine that is too slow.
		timely := lastIPVS.Sub(removed) < redirectLinger
		if timely && (!lastIPVS.Before(rule.after) || !lastIPVS.Before(addr.after)) ||
			rule.before.Sub(removed) < redirectLinger || addr.before.Sub(removed) < redirectLinger {
			t.Errorf("%s forgot it while a director might still send", r)
		}
	}
	for _, node := range append(s.Directors(), s.Realservers()...) {
		history, polls := watchers[at{node, vip}].history(t)
		if polls < 30 {
			t.Errorf("%s: %d looks in all: the test shows too little", node, polls)
		}
		had := false
		for _, c := range history {
			words := strings.Fields(c.answer)
			addr, hole, ipvs := slices.Contains(words, "addr"), slices.Contains(words, "hole"), slices.Contains(words, "ipvs")
			had = had || addr
			early := c.at.Before(removed.Add(blackhole))
			if had && !addr && (!hole && early || ipvs) {
				t.Errorf("%s, %s after the removal, has %q and not the address", node, c.at.Sub(removed).Round(time.Millisecond), c.answer)
			}
		}
		began, _ := gained(t, watchers[at{node, vip}], "hole")
		ended, over := lost(t, watchers[at{node, vip}], "hole")
		if began.before.IsZero() {
			t.Errorf("%s: no blackhole", node)
		}
		switch slices.Contains(fastBlackhole, node) {
		case true:
			if !over || ended.before.Sub(began.after) < blackhole || ended.after.Sub(began.before) > blackhole+2*time.Second {
				t.Errorf("%s: the blackhole stood for %s, want %s", node, ended.before.Sub(began.before), blackhole)
			}
		case false:
			if over {
				t.Errorf("%s: the blackhole was gone after %s, want a minute", node, ended.before.Sub(began.before))
			}
		}
	}

	// What the client saw: never a reset, no error before a router had no route, and an answer to each SYN before that.
	asked, answered := map[flow]time.Time{}, map[flow]bool{}
	for _, f := range frames {
		switch {
		case f.out && f.dst.Addr() == vip && f.syn:
			if _, again := asked[f.flow()]; !again {
				asked[f.flow()] = f.at
			}
		case !f.out && f.src.Addr() == vip && f.rst:
			t.Errorf("%s after the removal, the client got a reset: %s", f.at.Sub(removed).Round(time.Millisecond), f)
		case !f.out && f.src.Addr() == vip && f.syn && f.ack:
			answered[f.flow().back()] = true
		case !f.out && f.about.dst.Addr() == vip && f.at.Before(withdrawn.after):
			t.Errorf("%s after the removal, and before a router had no route, the client got an ICMP error: %s",
				f.at.Sub(removed).Round(time.Millisecond), f)
		}
	}
	early := 0
	for flow, sent := range asked {
		if sent.After(withdrawn.after.Add(-100 * time.Millisecond)) {
			continue
		}
		early++
		if !answered[flow] {
			t.Errorf("%s, sent %s before the withdrawal, was not answered", flow, withdrawn.after.Sub(sent).Round(time.Millisecond))
		}
	}
	if early == 0 {
		t.Error("no SYN before the withdrawal: the test shows too little")
	}
}

// briefLoad begins flows and requests to the brief VIPs on c1 and waits until all flows were answered.
func briefLoad(t *testing.T, s *stage.Stage, name string, rate float64) *stage.Client {
	t.Helper()
	var load traffic.Load
	for _, vip := range brief {
		target := netip.AddrPortFrom(vip, 80)
		load.Flows = append(load.Flows, traffic.Flows{Name: vip.String(), Target: target, Count: 15, Every: 200 * time.Millisecond})
		if rate > 0 {
			load.Requests = append(load.Requests, traffic.Requests{Name: vip.String(), Target: target, Rate: rate})
		}
	}
	client, err := s.StartClient(within(t, 20*time.Second), "c1", name, load)
	must(t, err)
	t.Cleanup(func() {
		if err := client.Stop(); err != nil {
			t.Error(err)
		}
	})
	eventually(t, 20*time.Second, func() error { return allAnswer(t, client) })
	return client
}

// allAnswer is nil when every flow is open and was answered lately.
func allAnswer(t *testing.T, client *stage.Client) error {
	r, err := client.Report(t.Context())
	if err != nil {
		return err
	}
	for _, f := range r.Flows {
		if f.Open != f.Count || f.Silent > 0 {
			return fmt.Errorf("of %d flows to %s %d are open, %d of them silent; broken: %v %q", f.Count, f.Name, f.Open, f.Silent, f.Broken, f.Examples)
		}
	}
	return nil
}

// silence sends to the removed VIPs, by nodes whose blackhole still stands: nothing comes back.
func silence(t *testing.T, s *stage.Stage) {
	t.Helper()
	for _, route := range []struct {
		vip      netip.Addr
		node, by string
	}{{briefVIP4, "d2", "10.1.0.12"}, {briefVIP6, "d2", "fd00:1::12"}, {briefVIP4, "r2", "10.1.0.22"}, {briefVIP6, "r2", "fd00:1::22"}} {
		on(t, s, "tor1", "ip", "route", "add", route.vip.String(), "via", route.by)
		var err error
		_ = s.Fleet.Node("tor1").Do(func() error {
			var conn net.Conn
			conn, err = net.DialTimeout("tcp", netip.AddrPortFrom(route.vip, 80).String(), time.Second)
			if err == nil {
				_ = conn.Close()
			}
			return nil
		})
		on(t, s, "tor1", "ip", "route", "del", route.vip.String(), "via", route.by)
		if timeout, ok := errors.AsType[net.Error](err); !ok || !timeout.Timeout() {
			t.Errorf("a flow to %s, removed, by %s: %v, want silence", route.vip, route.node, err)
		}
	}
}

// A VIP that is removed and comes back within the linger has lost nothing: no packet that reached a director, no
// connection entry, no flow.
func TestReAddWithinLinger(t *testing.T) {
	s := fleet(t)
	setBrief(t, s, true)
	must(t, s.WaitHops(within(t, 30*time.Second), stage.Routers(), brief, len(s.Directors())))
	watchers := watchRemoval(t, s)
	waitBrief(t, s, watchers)
	client := briefLoad(t, s, "again", 0)
	captures := map[string]*capture{}
	for _, d := range s.Directors() {
		captures[d] = captureAt(t, s, d, "eth1", brief)
	}
	before := map[string][]string{}
	entries := 0
	open := client1Ports(t, s)
	for _, d := range s.Directors() {
		before[d] = connections(t, s, d, open)
		entries += len(before[d])
	}
	if entries < 30 {
		t.Fatalf("%d connection entries, want one for each of 30 flows at least", entries)
	}
	_, err := client.Reset(within(t, 10*time.Second))
	must(t, err)

	removed := time.Now()
	setBrief(t, s, false)
	must(t, s.WaitHops(within(t, linger), stage.Routers(), brief, 0))
	setBrief(t, s, true)
	if away := time.Since(removed); away > linger-200*time.Millisecond {
		t.Fatalf("the routers took %s to lose the route: the test shows nothing", away)
	}
	t.Logf("removed for %s", time.Since(removed).Round(time.Millisecond))
	must(t, s.WaitHops(within(t, 10*time.Second), stage.Routers(), brief, len(s.Directors())))
	eventually(t, 20*time.Second, func() error { return allAnswer(t, client) })
	// Past the time at which the linger would have ended, and the realservers' too.
	eventually(t, 20*time.Second, func() error {
		if left := 8*time.Second - time.Since(removed); left > 0 {
			return fmt.Errorf("%s left", left)
		}
		return allAnswer(t, client)
	})
	report, err := client.Report(within(t, 10*time.Second))
	must(t, err)
	for _, f := range report.Flows {
		if f.Open != f.Count || f.OtherPod > 0 || len(f.Broken) > 0 {
			t.Errorf("the flows to %s: %d of %d open, broken %v, %d answers of other pods: %q", f.Name, f.Open, f.Count, f.Broken, f.OtherPod, f.Examples)
		}
	}
	for where, p := range watchers {
		p.end()
		if slices.Contains(append(stage.Routers(), "spine"), where.node) {
			continue
		}
		if history, _ := p.history(t); len(history) != 1 {
			var answers []string
			for _, c := range history {
				answers = append(answers, fmt.Sprintf("%q", c.answer))
			}
			t.Errorf("%s had of %s one after the other: %s", where.node, where.vip, strings.Join(answers, ", "))
		}
	}
	for d, c := range captures {
		after := connections(t, s, d, nil)
		for _, entry := range before[d] {
			if !slices.Contains(after, entry) {
				t.Errorf("%s lost the connection entry %s", d, entry)
			}
		}
		ended := time.Now()
		c.end()
		waiting := map[flow][]frame{}
		for _, f := range c.frames() {
			switch flow := f.flow(); {
			case !slices.Contains(brief, f.dst.Addr()):
			case f.rst: // of a flow that the client knows no more, as of an earlier test
			case f.out:
				waiting[flow] = waiting[flow][min(1, len(waiting[flow])):]
			case f.dstMAC == c.mac:
				waiting[flow] = append(waiting[flow], f)
			}
		}
		for _, frames := range waiting {
			for _, f := range frames {
				if f.at.After(ended) {
					continue // it may still be on its way
				}
				t.Errorf("%s, %s after the removal, did not pass on: %s", d, f.at.Sub(removed).Round(time.Millisecond), f)
			}
		}
	}
}

// client1Ports returns the ports of the flows to the brief VIPs that are open on c1. Earlier tests left entries on the
// directors too.
func client1Ports(t *testing.T, s *stage.Stage) map[string]bool {
	t.Helper()
	ports := map[string]bool{}
	for line := range strings.Lines(on(t, s, "c1", "ss", "-Htn", "state", "established")) {
		words := strings.Fields(line)
		to, err := netip.ParseAddrPort(words[3])
		must(t, err)
		if slices.Contains(brief, to.Addr()) {
			from, err := netip.ParseAddrPort(words[2])
			must(t, err)
			ports[fmt.Sprintf("%04X", from.Port())] = true
		}
	}
	return ports
}

// connections lists the connection entries of the brief VIPs on a director: client, VIP, real server. Those of some
// ports of the client, or all if ports is nil.
func connections(t *testing.T, s *stage.Stage, node string, ports map[string]bool) []string {
	t.Helper()
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/net/ip_vs_conn", s.Fleet.Node(node).PID()))
	must(t, err)
	var entries []string
	for line := range strings.Lines(string(text)) {
		words := strings.Fields(line)
		if len(words) < 8 || words[0] != "TCP" {
			continue
		}
		a, ok := procAddr(words[3])
		if ok && slices.Contains(brief, a) && (ports == nil || ports[words[2]]) {
			entries = append(entries, strings.Join(words[:7], " "))
		}
	}
	return entries
}
