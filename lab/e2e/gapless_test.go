package e2e

import (
	"fmt"
	"maps"
	"math"
	"math/rand/v2"
	"net/netip"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/ravel-lb/ravel"
	"github.com/ravel-lb/ravel/lab/stage"
	"github.com/ravel-lb/ravel/lab/traffic"
)

// The VIPs of a service whose pods are all in the rack, so that it may be forwarded to directly.
var (
	rackVIP4 = netip.MustParseAddr("198.51.100.21")
	rackVIP6 = netip.MustParseAddr("2001:db8:77::21")
)

const (
	pace      = 250 * time.Millisecond  // from round to round, at least
	patience  = 1500 * time.Millisecond // for a round to take effect
	rate      = 5                       // requests a second, of each of two clients to each of four VIPs
	mostPods  = 5                       // of one service on one node
	goingTime = 8                       // rounds for which a pod that left is still there, terminating
)

// place is a port of a pod, a pod of its own to Ravel.
type place struct {
	pod  stage.Pod
	port int
}

// name is what the process at the place calls itself.
func (p place) name() string {
	if p.port == stage.PodPort {
		return p.pod.String()
	}
	return fmt.Sprintf("%s-%d", p.pod, p.port)
}

// backing is what stands behind one service while it changes.
type backing struct {
	service    string
	vips       []netip.Addr
	nodes      []string
	places     map[string][]place // by node: all there are
	ready      map[string][]place // by node
	going      []going
	scheduler  string
	forwarding string
	methods    [2]string
}

// going is a pod that terminates: it takes no new flows and is gone after the round of that number.
type going struct {
	place
	until int
}

func (b *backing) isGoing(p place) bool {
	return slices.ContainsFunc(b.going, func(g going) bool { return g.place == p })
}

// free lists the places of a node that are neither ready nor going.
func (b *backing) free(node string) []place {
	return slices.DeleteFunc(slices.Clone(b.places[node]), func(p place) bool {
		return slices.Contains(b.ready[node], p) || b.isGoing(p)
	})
}

// add makes n more pods of a node ready: some that are going come back if no others are left.
func (b *backing) add(rng *rand.Rand, node string, n int) {
	for range n {
		free := b.free(node)
		if len(free) == 0 {
			for _, g := range b.going {
				if g.pod.Node == node {
					free = append(free, g.place)
				}
			}
		}
		if len(free) == 0 {
			return
		}
		p := free[rng.IntN(len(free))]
		b.going = slices.DeleteFunc(b.going, func(g going) bool { return g.place == p })
		b.ready[node] = append(b.ready[node], p)
	}
}

// remove lets n pods of a node terminate.
func (b *backing) remove(rng *rand.Rand, node string, n, now int) {
	for range min(n, len(b.ready[node])) {
		i := rng.IntN(len(b.ready[node]))
		b.going = append(b.going, going{b.ready[node][i], now + goingTime})
		b.ready[node] = slices.Delete(b.ready[node], i, i+1)
	}
}

// expire takes away the pods whose time is over. One pod of each node stays, so that the VIPs are claimed on all nodes.
func (b *backing) expire(now int) {
	b.going = slices.DeleteFunc(b.going, func(g going) bool {
		return now >= g.until && len(b.ready[g.pod.Node]) > 0
	})
}

func (b *backing) total() (n int) {
	for _, ready := range b.ready {
		n += len(ready)
	}
	return n
}

// write puts the service into a document.
func (b *backing) write(d *stage.Document) {
	d.Services = slices.DeleteFunc(d.Services, func(s stage.Service) bool { return s.Name == b.service })
	d.Endpoints = slices.DeleteFunc(d.Endpoints, func(e stage.Endpoint) bool { return e.Service == b.service })
	for _, vip := range b.vips {
		d.Services = append(d.Services, stage.Service{
			VIP: vip, Port: 80, Name: b.service, TCP: true, UDP: true, Scheduler: b.scheduler, Forwarding: b.forwarding,
		})
	}
	back := func(p place, terminating bool) {
		for _, a := range []netip.Addr{p.pod.V4, p.pod.V6} {
			d.Endpoints = append(d.Endpoints, stage.Endpoint{Service: b.service, Addr: a, Port: p.port, Node: p.pod.Node, Terminating: terminating})
		}
	}
	for _, node := range b.nodes {
		for _, p := range b.ready[node] {
			back(p, false)
		}
	}
	for _, g := range b.going {
		back(g.place, true)
	}
}

// kinds are the changes of the walk.
var kinds = []string{"scale", "weight", "move", "port", "scheduler", "forwarding"}

// change does one change of a kind and returns it in words, with the real servers whose pods it changes.
func (b *backing) change(rng *rand.Rand, kind string, now int) (what string, nodes []string) {
	node := b.nodes[rng.IntN(len(b.nodes))]
	nodes = []string{node}
	switch kind {
	case "scale": // 1 to 5, or 5 to 1
		if have := len(b.ready[node]); have < mostPods {
			b.add(rng, node, mostPods-have)
		} else {
			b.remove(rng, node, have-1, now)
		}
	case "weight":
		want, have := 1+rng.IntN(mostPods), len(b.ready[node])
		b.add(rng, node, max(0, want-have))
		b.remove(rng, node, max(0, have-want), now)
	case "move":
		other := b.nodes[rng.IntN(len(b.nodes))]
		if len(b.ready[other]) < mostPods && other != node && len(b.ready[node]) > 0 {
			b.add(rng, other, 1)
			b.remove(rng, node, 1, now)
			kind += " to " + other
			nodes = append(nodes, other)
		} else if len(b.ready[node]) == 0 {
			b.add(rng, node, 1)
		}
	case "port": // of a pod: the process listens elsewhere
		if len(b.ready[node]) == 0 || len(b.free(node)) == 0 {
			b.add(rng, node, 1)
			break
		}
		b.add(rng, node, 1)
		i := rng.IntN(len(b.ready[node]) - 1)
		b.going = append(b.going, going{b.ready[node][i], now + goingTime})
		b.ready[node] = slices.Delete(b.ready[node], i, i+1)
	case "scheduler":
		if b.scheduler == "mh" {
			b.scheduler = "wrr"
		} else {
			b.scheduler = "mh"
		}
		return b.service + ": scheduler " + b.scheduler, nil
	case "forwarding":
		if b.forwarding == b.methods[0] {
			b.forwarding = b.methods[1]
		} else {
			b.forwarding = b.methods[0]
		}
		return b.service + ": forwarding " + b.forwarding, nil
	}
	if b.total() == 0 {
		b.add(rng, node, 1)
	}
	return fmt.Sprintf("%s: %s on %s, %d ready there", b.service, kind, node, len(b.ready[node])), nodes
}

// morePods runs a process on more ports of each pod, so that each node has enough places, and returns all by node.
func morePods(t *testing.T, s *stage.Stage) map[string][]place {
	t.Helper()
	places := map[string][]place{}
	onNode := map[string]int{}
	for _, p := range s.Pods {
		onNode[p.Node]++
	}
	for _, p := range s.Pods {
		places[p.Node] = append(places[p.Node], place{p, stage.PodPort})
		for port := stage.PodPort + 1; (port-stage.PodPort)*onNode[p.Node] < mostPods+1; port++ {
			at := place{p, port}
			where, err := s.Fleet.Node(p.Node).Pod(p.Name)
			must(t, err)
			process, err := where.Spawn("pod-"+at.name(), filepath.Join("build", "traffic"), "pod", at.name(), fmt.Sprint(port))
			must(t, err)
			t.Cleanup(func() {
				if err := process.Kill(); err != nil {
					t.Error(err)
				}
			})
			places[p.Node] = append(places[p.Node], at)
		}
	}
	return places
}

// Through 150 changes, or RAVEL_TEST_CHANGES, of what stands behind two services not one request fails, and neither a
// director nor a real server is for a moment without a way for what a VIP claims. In the end each pod gets its share.
func TestNoIntervalWithoutRules(t *testing.T) {
	s := fleet(t)
	changes := number(t, "RAVEL_TEST_CHANGES", 150) // two in each round, one of each service
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	rng := rand.New(rand.NewPCG(seed, 0))
	places := morePods(t, s)
	web := &backing{service: "web", vips: vips, nodes: s.Realservers(), methods: [2]string{"auto", "tunnel"}}
	rack := &backing{service: "rack", vips: []netip.Addr{rackVIP4, rackVIP6}, nodes: []string{"r1", "r2", "r3"}, methods: [2]string{"direct", "tunnel"}}
	both := []*backing{web, rack}
	for _, b := range both {
		b.places, b.ready, b.scheduler, b.forwarding = places, map[string][]place{}, "mh", b.methods[0]
		for _, node := range b.nodes {
			b.add(rng, node, 1)
		}
	}
	write := func() {
		t.Helper()
		must(t, s.Change(func(d *stage.Document) { d.HoldTime = "30s"; web.write(d); rack.write(d) }))
	}
	patientSessions(t, s, write)
	allVIPs := append(slices.Clone(vips), rack.vips...)
	must(t, s.WaitHops(within(t, 30*time.Second), stage.Routers(), allVIPs, len(s.Directors())))
	watchDirectors := map[string]*poller{}
	for _, node := range s.Directors() {
		watchDirectors[node] = pollDirector(t, s, node, allVIPs)
	}
	watchServers := map[string]*poller{}
	for _, node := range s.Realservers() {
		claimed := vips
		if slices.Contains(rack.nodes, node) {
			claimed = allVIPs
		}
		watchServers[node] = pollServer(t, s, node, claimed)
	}
	for node, p := range both2(watchDirectors, watchServers) {
		eventually(t, 90*time.Second, func() error {
			if now := p.last(); strings.HasPrefix(now, "gap: ") || now == "" {
				return fmt.Errorf("%s: %s", node, now)
			}
			return nil
		})
		p.forget()
	}
	wire := captureAt(t, s, "c1", "eth1", allVIPs)
	clients := loadOn(t, s, "gapless", allVIPs, rate)

	var deck []string
	for len(deck) < changes {
		deck = append(deck, kinds...)
	}
	rng.Shuffle(len(deck), func(i, j int) { deck[i], deck[j] = deck[j], deck[i] })
	begun := time.Now()
	var done []string
	for round := range changes / len(both) {
		var seen map[string]string
		if round%4 != 0 { // every fourth meets the next on its way
			seen = map[string]string{}
			for node, p := range both2(watchDirectors, watchServers) {
				seen[node] = p.last()
			}
		}
		next := time.Now().Add(pace)
		awaited := map[string]*poller{}
		for i, b := range both { // one change of each
			b.expire(round)
			what, nodes := b.change(rng, deck[round*len(both)+i], round)
			done = append(done, fmt.Sprintf("%6.2f s %s", time.Since(begun).Seconds(), what))
			for _, node := range nodes {
				awaited[node] = watchServers[node]
			}
			if len(nodes) == 0 {
				maps.Copy(awaited, watchDirectors)
			}
		}
		write()
		time.Sleep(time.Until(next))
		// A machine that is slow gets the time that it needs, or else there would be fewer changes than asked for.
		for deadline := next.Add(patience); time.Now().Before(deadline) && seen != nil; time.Sleep(20 * time.Millisecond) {
			waits := false
			for node, p := range awaited {
				waits = waits || p.last() == seen[node]
			}
			if !waits {
				break
			}
		}
		if round%25 == 24 {
			report, err := stage.Report(within(t, 30*time.Second), clients...)
			must(t, err)
			if failures(report) > 0 {
				break
			}
		}
	}
	t.Logf("%d changes in %s", len(done), time.Since(begun).Round(time.Second))
	report, err := stage.Reset(within(t, 30*time.Second), clients...)
	must(t, err)
	slowest := time.Duration(0)
	for _, q := range report.Requests {
		slowest = max(slowest, q.Slowest)
		if q.Failures() > 0 || q.Answered == 0 {
			t.Errorf("%s: %d requests, %d answered, %v failed: %q", q.Name, q.Begun, q.Answered, q.Failed, q.Examples)
		}
	}
	t.Logf("the slowest answer took %s", slowest.Round(time.Millisecond))
	for node, p := range both2(watchDirectors, watchServers) {
		history, polls := p.history(t)
		for _, c := range history {
			if strings.HasPrefix(c.answer, "gap: ") {
				t.Errorf("%s at %6.2f s: %s", node, c.at.Sub(begun).Seconds(), c.answer)
			}
		}
		t.Logf("%s: %d looks, %d different tables", node, polls, len(history))
		if len(done) == changes && (polls < changes || len(history) < changes/15) {
			t.Errorf("%s: %d looks, %d different tables: the test shows too little", node, polls, len(history))
		}
	}
	wire.end()
	for _, f := range wire.frames() {
		if !f.out && (f.about != flow{} || f.rst) && t.Failed() {
			t.Logf("%6.2f s: %s, about %s", f.at.Sub(begun).Seconds(), f, f.about)
		}
	}
	if t.Failed() {
		t.Logf("the changes:\n%s", strings.Join(done, "\n"))
		return
	}
	for _, c := range clients {
		must(t, c.Stop())
	}
	for _, p := range both2(watchDirectors, watchServers) {
		p.end()
	}

	// A state that rests.
	for _, b := range both {
		b.scheduler, b.forwarding, b.going = "mh", b.methods[0], nil
		for i, node := range b.nodes {
			b.ready[node] = slices.Clone(b.places[node][:[]int{5, 3, 2, 1}[i]])
		}
	}
	write()
	checkShares(t, s, both)
}

// patientSessions has the BGP sessions last through 30 s of silence: they are not what this test is about, and the lab
// on a busy machine may be slower than the usual 3 s.
func patientSessions(t *testing.T, s *stage.Stage, write func()) {
	t.Helper()
	vtysh := func(router string, commands ...string) (string, error) {
		args := []string{"vtysh", "--vty_socket", "/run/frr"}
		for _, c := range commands {
			args = append(args, "-c", c)
		}
		return s.Output(within(t, time.Minute), router, args...)
	}
	for router, asn := range map[string]string{"tor1": "65001", "tor2": "65002"} {
		_, err := vtysh(router, "configure terminal", "router bgp "+asn, "neighbor directors timers 3 30")
		must(t, err)
	}
	write()
	for _, router := range stage.Routers() {
		eventually(t, time.Minute, func() error {
			out, err := vtysh(router, "show bgp neighbors")
			if n := strings.Count(strings.ToLower(out), "hold time is 30"); err == nil && n < 3 {
				err = fmt.Errorf("%s has %d patient sessions, want 3", router, n)
			}
			return err
		})
	}
}

// both2 iterates over two maps.
func both2(a, b map[string]*poller) func(yield func(string, *poller) bool) {
	return func(yield func(string, *poller) bool) {
		for _, m := range []map[string]*poller{a, b} {
			for name, p := range m {
				if !yield(name, p) {
					return
				}
			}
		}
	}
}

func failures(r traffic.Report) (n int) {
	for _, q := range r.Requests {
		n += q.Failures()
	}
	return n
}

// pollDirector looks at IPVS all the time: each VIP's services must be there with a real server that takes new flows.
func pollDirector(t *testing.T, s *stage.Stage, node string, claimed []netip.Addr) *poller {
	return poll(t, 50*time.Millisecond, func() (string, error) {
		table, err := readIPVS(s, node)
		if err != nil {
			return "", err
		}
		for _, vip := range claimed {
			for _, proto := range []ravel.Proto{ravel.TCP, ravel.UDP} {
				key := ravel.ServiceKey{VIP: vip, Proto: proto, Port: 80}
				if v, found := table[key]; !found || !v.takesNewFlows() {
					return fmt.Sprintf("gap: %s: %+v", key, v), nil
				}
			}
		}
		return wordsOf(table), nil
	})
}

// pollServer looks at the nat tables all the time: what each VIP claims must lead to a pod.
func pollServer(t *testing.T, s *stage.Stage, node string, claimed []netip.Addr) *poller {
	families := map[bool]natTable{true: openNAT(t, s, node, false), false: openNAT(t, s, node, true)}
	return poll(t, 50*time.Millisecond, func() (string, error) {
		var all []string
		for is4, nat := range families {
			table, err := nat.redirects()
			if err != nil {
				return "", err
			}
			for _, vip := range claimed {
				if vip.Is4() != is4 {
					continue
				}
				for _, proto := range []ravel.Proto{ravel.TCP, ravel.UDP} {
					key := ravel.ServiceKey{VIP: vip, Proto: proto, Port: 80}
					if len(table[key]) == 0 {
						return fmt.Sprintf("gap: %s: no pod", key), nil
					}
					all = append(all, fmt.Sprint(key, table[key]))
				}
			}
		}
		slices.Sort(all)
		return strings.Join(all, "; "), nil
	})
}

// checkShares waits until both tables are as the backings say everywhere, makes requests, and holds each node's and each
// pod's part of them against its probability.
func checkShares(t *testing.T, s *stage.Stage, all []*backing) {
	t.Helper()
	for _, b := range all {
		for _, vip := range b.vips {
			key := ravel.ServiceKey{VIP: vip, Proto: ravel.TCP, Port: 80}
			for _, node := range s.Directors() {
				eventually(t, 30*time.Second, func() error {
					table, err := readIPVS(s, node)
					if err != nil {
						return err
					}
					got := map[int]int{}
					for _, server := range table[key].servers {
						got[server.weight]++
					}
					delete(got, 0)
					want := map[int]int{}
					for _, n := range b.nodes {
						want[len(b.ready[n])]++
					}
					if !maps.Equal(got, want) || table[key].scheduler != b.scheduler {
						return fmt.Errorf("%s: %s: %+v", node, key, table[key])
					}
					return nil
				})
			}
			for _, node := range b.nodes {
				nat := openNAT(t, s, node, vip.Is6())
				var want []netip.AddrPort
				for _, p := range b.ready[node] {
					a := p.pod.V4
					if vip.Is6() {
						a = p.pod.V6
					}
					want = append(want, netip.AddrPortFrom(a, uint16(p.port)))
				}
				slices.SortFunc(want, netip.AddrPort.Compare)
				eventually(t, 30*time.Second, func() error {
					table, err := nat.redirects()
					if err == nil && !slices.Equal(table[key], want) {
						err = fmt.Errorf("%s: %s leads to %v, want %v", node, key, table[key], want)
					}
					return err
				})
			}
		}
	}
	var targets []netip.Addr
	for _, b := range all {
		targets = append(targets, b.vips...)
	}
	const wanted = 2500
	clients := loadOn(t, s, "shares", targets, 25)
	var report traffic.Report
	eventually(t, time.Minute, func() (err error) {
		report, err = stage.Report(t.Context(), clients...)
		answered := 0
		for _, q := range report.Requests {
			answered += q.Answered
		}
		if err == nil && answered < wanted {
			err = fmt.Errorf("%d answers, waiting for %d", answered, wanted)
		}
		return err
	})
	for _, c := range clients {
		must(t, c.Stop())
	}
	for _, b := range all {
		pods := map[string]int{}
		sum := 0
		for _, q := range report.Requests {
			if !slices.ContainsFunc(b.vips, func(a netip.Addr) bool { return a.String() == q.Name }) {
				continue
			}
			if q.Failures() > 0 {
				t.Errorf("%s: %v failed: %q", q.Name, q.Failed, q.Examples)
			}
			for pod, n := range q.Pods {
				pods[pod] += n
				sum += n
			}
		}
		counted := 0
		for _, node := range b.nodes {
			onNode := 0
			for _, p := range b.ready[node] {
				onNode += pods[p.name()]
			}
			counted += onNode
			// Half a percent for the slots of the Maglev table, which are whole numbers.
			share(t, b.service+" on "+node, onNode, sum, float64(len(b.ready[node]))/float64(b.total()), 0.005)
			for _, p := range b.ready[node] {
				share(t, b.service+" to "+p.name(), pods[p.name()], onNode, 1/float64(len(b.ready[node])), 0)
			}
		}
		if counted != sum {
			t.Errorf("%s: %d of %d answers came from pods that are not behind it: %v", b.service, sum-counted, sum, pods)
		}
	}
}

// share fails the test if n of all is further from the probability than four standard deviations and the slack.
func share(t *testing.T, what string, n, all int, probability, slack float64) {
	t.Helper()
	sigma := math.Sqrt(float64(all) * probability * (1 - probability))
	off := math.Abs(float64(n) - float64(all)*probability)
	if off > 4*sigma+slack*float64(all) {
		t.Errorf("%s: %d of %d, want %.0f: %.1f sigma off", what, n, all, float64(all)*probability, off/sigma)
	}
}
