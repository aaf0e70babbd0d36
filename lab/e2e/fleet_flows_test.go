package e2e

import (
	"cmp"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/ravel-lb/ravel"
	"github.com/ravel-lb/ravel/lab/stage"
	"github.com/ravel-lb/ravel/lab/traffic"
)

// longFlows are TCP flows of both clients to both VIPs that stay open.
type longFlows struct {
	t       *testing.T
	s       *stage.Stage
	clients []*stage.Client
	count   int
	name    string        // of groups, unique while they run
	every   time.Duration // between two requests of a flow: 1 s unless set
	why     []string      // a few flows broke for these reasons
}

// open begins count more flows, a multiple of four, and waits until each was answered.
func (l *longFlows) open(count int) {
	l.t.Helper()
	name := fmt.Sprintf("flows%s%d", l.name, l.count)
	for _, node := range []string{"c1", "c2"} {
		var load traffic.Load
		for _, vip := range vips {
			load.Flows = append(load.Flows, traffic.Flows{
				Name: vip.String(), Target: netip.AddrPortFrom(vip, 80), Count: count / 4, Every: cmp.Or(l.every, time.Second),
			})
		}
		c, err := l.s.StartClient(within(l.t, 20*time.Second), node, name, load)
		must(l.t, err)
		l.t.Cleanup(func() {
			if err := c.Stop(); err != nil {
				l.t.Error(err)
			}
		})
		l.clients = append(l.clients, c)
	}
	l.count += count
	eventually(l.t, 30*time.Second, func() error {
		open, broken, _ := l.report()
		n := 0
		for _, on := range open {
			n += on
		}
		if n+broken < l.count {
			return fmt.Errorf("%d of %d flows are open, %d broken", n, l.count, broken)
		}
		return nil
	})
}

// stop ends all of them.
func (l *longFlows) stop() {
	l.t.Helper()
	for _, c := range l.clients {
		must(l.t, c.Stop())
	}
}

// report says how many flows are open on each node, how many broke, and how many wait for an answer.
func (l *longFlows) report() (open map[string]int, broken, silent int) {
	l.t.Helper()
	r, err := stage.Report(within(l.t, 20*time.Second), l.clients...)
	must(l.t, err)
	open, l.why = map[string]int{}, nil
	for _, f := range r.Flows {
		l.why = append(l.why, f.Examples...)
		for pod, n := range f.Pods {
			node, _, _ := strings.Cut(pod, "-")
			open[node] += n
		}
		for _, n := range f.Broken {
			broken += n
		}
		silent += f.Silent
		if f.OtherPod > 0 {
			l.t.Errorf("%d answers to %s came from another pod than the flow's: %q", f.OtherPod, f.Name, f.Examples)
		}
	}
	return open, broken, silent
}

// calm waits until each flow was answered or broke since the call.
func (l *longFlows) calm() (open map[string]int, broken int) {
	l.t.Helper()
	time.Sleep(2 * cmp.Or(l.every, time.Second))
	eventually(l.t, 40*time.Second, func() error {
		var silent int
		if open, broken, silent = l.report(); silent > 0 {
			return fmt.Errorf("%d flows wait for their answer", silent)
		}
		return nil
	})
	return open, broken
}

// lost returns how many flows fewer each node has than before; those with more are flows that were opened meanwhile.
func lostFlows(before, after map[string]int) map[string]int {
	gone := map[string]int{}
	for node, n := range before {
		if n > after[node] {
			gone[node] = n - after[node]
		}
	}
	return gone
}

// powerOff takes a node from the fleet without a goodbye: the cable first, then the process.
func powerOff(t *testing.T, s *stage.Stage, node string) {
	t.Helper()
	must(t, s.Fleet.CutLink(node, "eth1"))
	must(t, s.Process(node).Kill())
	t.Cleanup(func() { must(t, s.Fleet.RestoreLink(node, "eth1")) })
}

// forget empties the IPVS of a director that is off, with all its connections, as a reboot does.
func forget(t *testing.T, s *stage.Stage, node string) {
	t.Helper()
	shell(t, s, node, `set -e
		was=$(sysctl -n net.ipv4.vs.expire_nodest_conn)
		sysctl -qw net.ipv4.vs.expire_nodest_conn=1
		ipvsadm -C
		for i in $(seq 100); do [ $(wc -l </proc/net/ip_vs_conn) -gt 1 ] || break; sleep 0.1; done
		sysctl -qw net.ipv4.vs.expire_nodest_conn=$was
		[ $(wc -l </proc/net/ip_vs_conn) -le 1 ]`)
}

// powerOn brings it back.
func powerOn(t *testing.T, s *stage.Stage, node string) {
	t.Helper()
	must(t, s.Fleet.RestoreLink(node, "eth1"))
	must(t, s.Start(node))
}

// Promise P3 with history: while a real server drains, a director is replaced by one that knows nothing, and then another
// one is lost. No flow breaks whose real server lives on.
func TestFlowsSurviveAfterARestartInADrain(t *testing.T) {
	const leaving, flows, drain = "r3", 600, 25 * time.Second
	s := fleetWith(t, []string{"--drain", drain.String()}, nil)
	ready(t, s)
	agree(t, s, 30*time.Second)
	l := &longFlows{t: t, s: s}
	l.open(flows / 3)

	must(t, s.Change(func(d *stage.Document) {
		d.Endpoints = slices.DeleteFunc(d.Endpoints, func(e stage.Endpoint) bool { return e.Node == leaving })
	}))
	began := time.Now()
	idle := func(d string) error {
		table, err := proc(s, d)
		if err != nil {
			return err
		}
		for key, text := range table {
			if !strings.Contains(text, nodeAddr(leaving, key.VIP).String()+"=0") {
				return fmt.Errorf("%s: %s does not drain in %s", d, leaving, text)
			}
		}
		return nil
	}
	for _, d := range s.Directors() {
		eventually(t, 10*time.Second, func() error { return idle(d) })
	}
	l.open(flows / 3)
	before, broken := l.calm()
	if broken > 0 {
		t.Fatalf("%d flows broke though no director was lost", broken)
	}

	must(t, s.Process("d1").Kill())
	shell(t, s, "d1", "ipvsadm -C")
	must(t, s.Start("d1"))
	must(t, s.WaitHops(within(t, 30*time.Second), stage.Routers(), vips, 3))
	eventually(t, 10*time.Second, func() error { return idle("d1") })
	agree(t, s, 15*time.Second)
	after, _ := l.calm()
	check := func(when string, before, after map[string]int) {
		t.Helper()
		gone := lostFlows(before, after)
		t.Logf("%s: open %v before, %v after; of those on %s, which drains, %d of %d broke", when, before, after, leaving, gone[leaving], before[leaving])
		if delete(gone, leaving); len(gone) > 0 {
			t.Errorf("%s: flows broke whose real server lives: %v: %q", when, gone, l.why)
		}
	}
	check("a director lost its kernel's table during the drain", before, after)

	l.open(flows / 3)
	before, _ = l.calm()
	if over := time.Since(began); over > drain {
		t.Logf("the drain is %s old: this machine is slow", over)
	}
	powerOff(t, s, "d2")
	must(t, s.WaitHops(within(t, 20*time.Second), stage.Routers(), vips, 2))
	after, _ = l.calm()
	check("then another director was lost", before, after)

	powerOn(t, s, "d2")
	must(t, s.WaitHops(within(t, 30*time.Second), stage.Routers(), vips, 3))
	eventually(t, drain+30*time.Second, func() error {
		table, _, err := alike(t.Context(), s, s.Directors()...)
		if err != nil {
			return err
		}
		for key, text := range table {
			if strings.Contains(text, nodeAddr(leaving, key.VIP).String()) {
				return fmt.Errorf("%s still drains: %s", leaving, text)
			}
		}
		return nil
	})
	t.Logf("the drain was over on all directors after %s", time.Since(began).Round(time.Second))
	end, _ := l.calm()
	t.Logf("open in the end: %v", end)
	gone := lostFlows(after, end)
	delete(gone, leaving) // whose drain is over
	if len(gone) > 0 {
		t.Errorf("flows broke at the end of the drain: %v: %q", gone, l.why)
	}
}

// Real servers come and go at random under load, 40 times, or RAVEL_TEST_SCALES times. No request fails, and no packet
// of a client reaches a real server that has no redirect for it yet, or any more.
func TestScaleUpsAndDowns(t *testing.T) {
	s := fleetWith(t, []string{"--drain", "3s", "--batch", "300ms"}, nil)
	ready(t, s)
	scales := number(t, "RAVEL_TEST_SCALES", 40)
	rng, seed := random(t)
	web := &backing{service: "web", vips: vips, nodes: s.Realservers()}
	rack := &backing{service: "rack", vips: []netip.Addr{rackVIP4, rackVIP6}, nodes: []string{"r1", "r2", "r3"}}
	both := []*backing{web, rack}
	all := slices.Concat(web.vips, rack.vips)
	for _, b := range both {
		b.places, b.ready, b.scheduler, b.forwarding = map[string][]place{}, map[string][]place{}, "mh", "auto"
		for _, p := range s.Pods {
			b.places[p.Node] = append(b.places[p.Node], place{p, stage.PodPort})
		}
		for _, node := range b.nodes[:2] {
			b.add(rng, node, 1)
		}
	}
	write := func() {
		t.Helper()
		must(t, s.Change(func(d *stage.Document) { web.write(d); rack.write(d) }))
	}
	write()
	must(t, s.WaitHops(within(t, 30*time.Second), stage.Routers(), all, len(s.Directors())))
	must(t, s.WaitHops(within(t, 30*time.Second), []string{"spine"}, all, len(stage.Routers())))
	agree(t, s, 30*time.Second)
	for _, node := range s.Realservers() {
		countStrays(t, s, node, all)
	}
	clients := loadOn(t, s, "scale", all, 6)

	var done []string
	began := time.Now()
	const gone = 8 // rounds for which a pod that leaves is still there
	ups, downs := 0, 0
	for round := 0; ups+downs < scales; round++ {
		for _, b := range both {
			b.going = slices.DeleteFunc(b.going, func(g going) bool { return round >= g.until-goingTime+gone })
			node := b.nodes[rng.IntN(len(b.nodes))]
			if n := len(b.ready[node]); n == 0 {
				b.add(rng, node, 1+rng.IntN(3))
				ups++
			} else if b.total() > n {
				b.remove(rng, node, n, round)
				downs++
			}
			done = append(done, fmt.Sprintf("%6.2f s %s: %d pods on %s", time.Since(began).Seconds(), b.service, len(b.ready[node]), node))
		}
		write()
		time.Sleep(time.Duration(400+rng.IntN(600)) * time.Millisecond)
	}
	t.Logf("%d scale-ups and %d scale-downs in %s", ups, downs, time.Since(began).Round(time.Second))
	time.Sleep(time.Second)
	agree(t, s, 30*time.Second)
	report, err := stage.Report(within(t, 30*time.Second), clients...)
	must(t, err)
	answered := 0
	for _, q := range report.Requests {
		answered += q.Answered
		if q.Failures() > 0 || q.Answered == 0 {
			t.Errorf("%s: %d requests, %d answered, %v failed: %q", q.Name, q.Begun, q.Answered, q.Failed, q.Examples)
		}
	}
	for _, c := range clients {
		must(t, c.Stop())
	}
	redirected := 0
	for _, node := range s.Realservers() {
		c := strays(t, s, node)
		if redirected += c["lab-pod"]; c["lab-came"] != c["lab-pod"]+c["lab-late"] || c["lab-host"] > 0 {
			t.Errorf("%s: of %d packets for the VIPs %d went to a pod, %d met the host, and %d were of flows that are closed",
				node, c["lab-came"], c["lab-pod"], c["lab-host"], c["lab-late"])
		}
	}
	t.Logf("%d requests answered; all of %d packets at real servers met a redirect", answered, redirected)
	if redirected < 4*answered {
		t.Errorf("%d packets for %d requests: the counters see too little", redirected, answered)
	}
	if t.Failed() {
		t.Logf("seed %d\n%s", seed, strings.Join(done, "\n"))
	}
}

// countStrays has the kernel of a real server count, for the VIPs' port 80 by TCP: the packets that came, those of them
// that went to a pod, those that met the host itself, and those that belong to no flow: on a slow machine, a last reset
// after both ends have closed, which no redirect is asked for.
func countStrays(t *testing.T, s *stage.Stage, node string, vips []netip.Addr) {
	t.Helper()
	rules := func(way string) string {
		var b strings.Builder
		for _, vip := range vips {
			command := "iptables"
			if vip.Is6() {
				command = "ip6tables"
			}
			one := func(chain, match, name string) {
				fmt.Fprintf(&b, "%s -w -t mangle %s %s -p tcp %s -m comment --comment %s\n", command, way, chain, match, name)
			}
			one("PREROUTING", fmt.Sprintf("-d %s --dport 80", vip), "lab-came")
			one("FORWARD", fmt.Sprintf("-m conntrack --ctstate DNAT --ctdir ORIGINAL --ctorigdst %s", vip), "lab-pod")
			one("INPUT", fmt.Sprintf("-d %s --dport 80 -m conntrack ! --ctstate INVALID", vip), "lab-host")
			one("INPUT", fmt.Sprintf("-d %s --dport 80 -m conntrack --ctstate INVALID", vip), "lab-late")
		}
		return b.String()
	}
	shell(t, s, node, "set -e\n"+rules("-I"))
	t.Cleanup(func() { shell(t, s, node, "set -e\n"+rules("-D")) })
}

// strays reads what countStrays counts.
func strays(t *testing.T, s *stage.Stage, node string) map[string]int {
	t.Helper()
	counts := map[string]int{}
	out := shell(t, s, node, "for c in iptables ip6tables; do $c -w -t mangle -nvxL; done")
	for line := range strings.Lines(out) {
		words := strings.Fields(line)
		for _, name := range []string{"lab-came", "lab-pod", "lab-host", "lab-late"} {
			if len(words) > 1 && slices.Contains(words, name) {
				var n int
				if _, err := fmt.Sscan(words[0], &n); err != nil {
					t.Fatalf("%s: %q: %v", node, line, err)
				}
				counts[name] += n
			}
		}
	}
	return counts
}

// unchanged polls what the kernels of all directors hold, in order; the returned function ends that, and fails the test
// if anything changed.
func unchanged(t *testing.T, s *stage.Stage) (end func(when string)) {
	t.Helper()
	pollers := map[string]*poller{}
	for _, d := range s.Directors() {
		pollers[d] = poll(t, 50*time.Millisecond, func() (string, error) {
			table, err := proc(s, d)
			return lines(table), err
		})
	}
	return func(when string) {
		t.Helper()
		for _, d := range slices.Sorted(maps.Keys(pollers)) {
			pollers[d].end()
			history, polls := pollers[d].history(t)
			for i, c := range history[1:] {
				t.Errorf("%s: %s, at %s, its table changed:\n%s", d, when, c.at.Format("15:04:05.000"), diff(history[i].answer, c.answer))
			}
			if polls < 20 {
				t.Errorf("%s: %d looks: the test shows too little", d, polls)
			}
		}
	}
}

// tcpKey is the TCP service of a VIP of the stage.
func tcpKey(vip netip.Addr) ravel.ServiceKey {
	return ravel.ServiceKey{VIP: vip, Proto: ravel.TCP, Port: 80}
}
