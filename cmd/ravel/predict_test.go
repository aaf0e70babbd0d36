package main

import (
	"fmt"
	"math/rand/v2"
	"net/netip"
	"os"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"github.com/ravel-lb/ravel"
	"github.com/ravel-lb/ravel/internal/desired"
	"github.com/ravel-lb/ravel/internal/maglev"
	"github.com/ravel-lb/ravel/internal/roster"
)

func seedOf(t *testing.T) uint64 {
	t.Helper()
	seed := uint64(time.Now().UnixNano())
	if text := os.Getenv("RAVEL_TEST_SEED"); text != "" {
		var err error
		if seed, err = strconv.ParseUint(text, 10, 64); err != nil {
			t.Fatal(err)
		}
	}
	t.Logf("RAVEL_TEST_SEED=%d", seed)
	return seed
}

// scene is a fleet at some moment of its history: inputs, rosters, and what is open.
type scene struct {
	*rand.Rand
	in      desired.Inputs
	rosters map[ravel.ServiceKey]ravel.Roster
	open    []connection
}

func sceneNode(i int) desired.Node {
	return desired.Node{Name: fmt.Sprintf("r%d", i), Ready: true, Addrs: []netip.Addr{
		netip.AddrFrom4([4]byte{10, 0, 0, byte(i)}), netip.AddrFrom16([16]byte{0x20, 1, 0xd, 0xb8, 15: byte(i)}),
	}}
}

// newScene makes documents, and a history of them that led to the rosters.
func newScene(random *rand.Rand) *scene {
	s := &scene{Rand: random, rosters: map[ravel.ServiceKey]ravel.Roster{}}
	s.in = desired.Inputs{Node: "d1", Agreed: &desired.Agreed{Dead: map[netip.Addr]bool{}, Drained: map[string]bool{}}}
	for i := range 1 + s.IntN(4) {
		key := ravel.ServiceKey{VIP: netip.AddrFrom4([4]byte{192, 0, 2, byte(i)}), Proto: ravel.TCP, Port: uint16(1 + s.IntN(65535))}
		if s.IntN(2) == 0 {
			key.VIP = netip.AddrFrom16([16]byte{0x20, 1, 0xd, 0xb8, 1, 15: byte(i)})
		}
		service := desired.Service{Key: key, Namespace: "n", Service: fmt.Sprint(i), Scheduler: ravel.MH, Flags: ravel.SchedulerFlags(s.IntN(4)) << 3}
		if s.IntN(4) == 0 {
			service.Key.Proto = ravel.UDP
			service.OnePacket = s.IntN(2) == 0
		}
		s.in.Cluster.Services = append(s.in.Cluster.Services, service)
	}
	for range 1 + s.IntN(4) {
		s.shuffle()
		s.apply(s.IntN(3) > 0, s.IntN(2) == 0)
	}
	return s
}

// shuffle makes other documents: nodes come and go, and have other numbers of pods.
func (s *scene) shuffle() {
	most := []int{1, 3, 90}[s.IntN(3)]
	s.in.Cluster.Nodes, s.in.Cluster.Endpoints = nil, nil
	for i := range 12 {
		if s.IntN(3) == 0 {
			continue
		}
		node := sceneNode(i + 1)
		node.Ready = s.IntN(10) > 0
		s.in.Cluster.Nodes = append(s.in.Cluster.Nodes, node)
		for _, service := range s.in.Cluster.Services {
			if s.IntN(4) == 0 {
				continue
			}
			addr := node.Addrs[0]
			if service.Key.VIP.Is6() {
				addr = node.Addrs[1]
			}
			for range 1 + s.IntN(most) {
				e := desired.Endpoint{Namespace: "n", Service: service.Service, Proto: service.Key.Proto, Addr: addr, Port: 1, Node: node.Name}
				e.Ready = s.IntN(10) > 0
				e.Terminating = !e.Ready && s.IntN(2) == 0
				s.in.Cluster.Endpoints = append(s.in.Cluster.Endpoints, e)
			}
		}
	}
	dead, drained := map[netip.Addr]bool{}, map[string]bool{}
	for i := range 12 {
		for _, a := range sceneNode(i + 1).Addrs {
			if s.IntN(10) == 0 {
				dead[a] = true
			}
		}
		if s.IntN(10) == 0 {
			drained[fmt.Sprintf("r%d", i+1)] = true
		}
	}
	s.in.Agreed = &desired.Agreed{Dead: dead, Drained: drained, Floor: 50}
}

// apply has the documents take effect through a Keeper, as a director does, and returns the services when all is calm
// before any drain is over, and when all drains are. Without ready nothing rises; without over no drain ends.
func (s *scene) apply(ready, over bool) (begin, end []ravel.VirtualService) {
	timing := roster.Timing{Batch: time.Second, Drain: time.Hour, Rise: 24 * time.Hour, Skew: time.Second, Majority: time.Second, Tombstone: 240 * time.Hour}
	keeper, now := roster.NewKeeper("d1", timing), time.Unix(1e9, 0)
	wishes := desired.Wishes(s.in)
	fleet := ravel.Fleet{Settled: true, Reports: map[string]ravel.Report{}}
	redirects, said, hashes := map[ravel.ServiceKey]bool{}, map[ravel.ServiceKey]ravel.ServiceReport{}, map[ravel.ServiceKey]uint64{}
	for _, service := range s.in.Cluster.Services {
		redirects[service.Key] = ready
		hashes[service.Key] = roster.Hash(wishes[service.Key])
		said[service.Key] = ravel.ServiceReport{Wish: hashes[service.Key]}
	}
	for _, name := range []string{"d1", "d2"} {
		fleet.Members = append(fleet.Members, ravel.Member{Name: name})
		fleet.Reports[name] = ravel.Report{Services: said}
	}
	for i := range 13 {
		name := fmt.Sprintf("r%d", i)
		if i == 0 {
			name = "10.0.0.77" // that only a plan has
		}
		fleet.Members = append(fleet.Members, ravel.Member{Name: name, Role: ravel.Realserver})
		fleet.Reports[name] = ravel.Report{Redirects: redirects}
	}
	slices.SortFunc(fleet.Members, func(a, b ravel.Member) int { return strings.Compare(a.Name, b.Name) })
	run := func(until time.Time) []ravel.VirtualService {
		for ; now.Before(until); now = now.Add(5 * time.Minute) {
			fleet.Rosters = s.rosters
			for key, entries := range keeper.Advance(roster.In{At: now, Fleet: fleet, Wishes: wishes, Hashes: hashes}).Write {
				s.rosters[key] = roster.Merge(s.rosters[key], entries...)
			}
		}
		return s.services()
	}
	begin = run(now.Add(30 * time.Minute))
	if over {
		end = run(now.Add(3 * time.Hour))
	}
	return begin, end
}

// services are those that directors program now.
func (s *scene) services() []ravel.VirtualService {
	agreed := *s.in.Agreed
	agreed.Rosters = s.rosters
	in := s.in
	in.Agreed = &agreed
	state, _ := desired.Compute(in)
	return state.Services
}

// connect opens flows: most of them where the table has them, some where an earlier one had.
func (s *scene) connect(kernel []ravel.VirtualService, n int) {
	for range n {
		v := kernel[s.IntN(len(kernel))]
		addr := netip.AddrFrom4([4]byte{198, 51, byte(s.IntN(256)), byte(s.IntN(256))})
		if v.Key.VIP.Is6() {
			addr = netip.AddrFrom16([16]byte{0x20, 1, 0xd, 0xb8, 9, 14: byte(s.IntN(256)), 15: byte(s.IntN(256))})
		}
		c := connection{service: v.Key, client: netip.AddrPortFrom(addr, uint16(s.IntN(65536))), live: s.IntN(10) > 0}
		if i, ok := maglev.Build(maglev.DefaultSize, v).Pick(c.client); ok && s.IntN(5) > 0 {
			c.real = v.RealServers[i].Addr
		} else {
			c.real = sceneNode(1 + s.IntN(12)).Addrs[0]
		}
		s.open = append(s.open, c)
	}
}

// outcome is what a plan tells of one service, found out by looking.
type outcome struct {
	Live, On int
	Exposed  [3]int
	Moved    [2]int
}

// A prediction equals what then happens, to the flow: whatever the history, whatever the change.
func TestWhatIsPredictedHappens(t *testing.T) {
	seed := seedOf(t)
	for round := range 120 {
		s := newScene(rand.New(rand.NewPCG(seed, uint64(round))))
		today := s.services()
		s.connect(today, 60)
		agreed := *s.in.Agreed
		agreed.Rosters = map[ravel.ServiceKey]ravel.Roster{}
		for key, r := range s.rosters {
			agreed.Rosters[key] = slices.Clone(r)
		}
		before := s.in
		before.Agreed = &agreed
		fleet := ravel.Fleet{Settled: true}
		what := fmt.Sprintf("round %d: ", round)
		w := planWords{}
		node := fmt.Sprintf("r%d", 1+s.IntN(12))
		switch choice := s.IntN(4); choice {
		case 0:
			w = planWords{Verb: planDrain, Nodes: []planNode{{Name: node}}}
		case 1:
			w = planWords{Verb: planRemove, Nodes: []planNode{{Name: node}}}
		case 2:
			w = planWords{Verb: planAdd, Nodes: []planNode{{Name: "10.0.0.77", Weight: s.IntN(3)}, {Name: node}}}
		}
		var changed desired.Inputs
		if w.Verb != "" {
			var err error
			if changed, _, err = w.apply(before, fleet, nil); err != nil {
				if !before.Cluster.HasNode(node) {
					continue // a name that nobody has
				}
				t.Fatal(what, err)
			}
		} else { // another document
			dead, drained := s.in.Agreed.Dead, s.in.Agreed.Drained
			s.shuffle()
			changed = s.in
			changed.Agreed = &desired.Agreed{Dead: dead, Drained: drained, Floor: 50, Rosters: agreed.Rosters}
		}
		what += w.Verb + " " + node
		forecast := predict("d1", maglev.DefaultSize, today, before, changed)
		for _, c := range s.open {
			forecast.count(c)
		}

		// And now it is really made.
		s.in = changed
		begin, end := s.apply(true, true)
		ignore := cmpopts.IgnoreFields(ravel.VirtualService{}, "Name")
		addrs := cmp.Comparer(func(a, b netip.Addr) bool { return a == b })
		b, e, _ := advance("d1", changed)
		if !changed.Agreed.Hold {
			for which, pair := range map[string][2][]ravel.VirtualService{"begin": {b, begin}, "end": {e, end}} {
				if diff := cmp.Diff(pair[0], pair[1], ignore, addrs); diff != "" {
					t.Fatalf("%s, at the %s (-predicted +happened):\n%s", what, which, diff)
				}
			}
		}
		for _, p := range forecast.services {
			var want outcome
			size := maglev.DefaultSize
			layouts := []*layout{layoutOf(size, today, p.key), layoutOf(size, begin, p.key), layoutOf(size, end, p.key)}
			for _, c := range s.open {
				if c.service != p.key || !c.live {
					continue
				}
				want.Live++
				if layouts[0].takes(c.real) && !layouts[1].takes(c.real) {
					want.On++
				}
				for i, l := range layouts {
					if l.pick(c.client) != c.real && (i < 2 || l.has(c.real)) {
						want.Exposed[i]++
					}
					if i > 0 && layouts[i-1].pick(c.client) != l.pick(c.client) {
						want.Moved[i-1]++
					}
				}
			}
			got := outcome{p.live, p.on, p.exposed, p.moved}
			if p.today == nil {
				got.Exposed, got.Moved, want.Exposed, want.Moved = [3]int{}, [2]int{}, [3]int{}, [2]int{}
			}
			if got != want {
				t.Errorf("%s, %s: predicted %+v, and it came to %+v", what, p.key, got, want)
			}
			// Slots, counted one by one where a slot goes to one real server in both tables.
			slots, _ := moved(layouts[0], layouts[1])
			if predicted, _ := moved(p.today, p.begin); predicted != slots {
				t.Errorf("%s, %s: %d slots predicted, %d moved", what, p.key, predicted, slots)
			}
		}
		for _, v := range begin { // nothing else changed
			if _, told := forecast.by[v.Key]; !told {
				else1, _, _ := advance("d1", before)
				if !alike(maglev.DefaultSize, v.Key, begin, else1) {
					t.Errorf("%s: %s changed, and was not predicted to", what, v.Key)
				}
			}
		}
	}
}

// A plan changes nothing of what it is made from.
func TestAPlanChangesNothing(t *testing.T) {
	r := newRig(t, ravel.Director)
	text := fmt.Sprintf("%+v", r.in) + fmt.Sprintf("%+v", *r.in.Agreed) + fmt.Sprintf("%+v", r.kernel)
	for _, w := range []planWords{
		{Verb: planDrain, Nodes: []planNode{{Name: "r1"}}}, {Verb: planRemove, Nodes: []planNode{{Name: "r2"}}},
		{Verb: planAdd, Nodes: []planNode{{Name: "r1", Weight: 9}, {Name: "10.0.0.9"}}},
	} {
		changed, _, err := w.apply(r.in, r.fleet, nil)
		if err != nil {
			t.Fatal(err)
		}
		if p := predict("d1", maglev.DefaultSize, r.kernel, r.in, changed); len(p.services) == 0 {
			t.Errorf("%s makes no difference", w.Verb)
		}
	}
	if now := fmt.Sprintf("%+v", r.in) + fmt.Sprintf("%+v", *r.in.Agreed) + fmt.Sprintf("%+v", r.kernel); now != text {
		t.Errorf("before\n%s\nafter\n%s", text, now)
	}
}
