package hold

import (
	"fmt"
	"maps"
	"math/rand/v2"
	"net/netip"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"github.com/ravel-lb/ravel"
	"github.com/ravel-lb/ravel/internal/desired"
)

// fleet is directors and realservers that hear each other at once.
type fleet struct {
	ravel.Fleet
	now time.Time
}

func fleetOf(directors ...string) *fleet {
	f := &fleet{now: time.Now()}
	f.Settled, f.Registers = true, map[string]ravel.Register{}
	for _, name := range directors {
		f.Members = append(f.Members, ravel.Member{Name: name, Role: ravel.Director})
	}
	return f
}

func (f *fleet) set(registers map[string]string) {
	f.Registers = maps.Clone(f.Registers)
	for name, value := range registers {
		f.Registers[name] = ravel.Register{Stamp: f.Registers[name].Stamp + 1, Value: value, By: "somebody"}
	}
}

func (f *fleet) accept(d Documents) { f.set(map[string]string{AcceptPrefix + d.Name(): "on"}) }

// decide has a gate decide, and the fleet hear of it.
func (f *fleet) decide(g *Gate, d Documents) Decision {
	decision := g.Decide(f.now, d, f.Fleet)
	f.set(decision.Tell)
	return decision
}

func gate(self string) *Gate {
	return New(Options{Share: 50, Self: self, Fleet: "ravel", Boot: "one"})
}

// inForce fails the test unless the documents are in force, and held says whether a change waits.
func inForce(t *testing.T, what string, got Decision, want Documents, held bool) {
	t.Helper()
	if got.Unconfirmed || !got.InForce.Same(want) || (got.Held != nil) != held {
		t.Fatalf("%s: unconfirmed %t, held %+v; in force are\n%+v\nwant\n%+v", what, got.Unconfirmed, got.Held, got.InForce, want)
	}
}

func TestALifeOfAChange(t *testing.T) {
	f := fleetOf("d1", "d2")
	d1, d2, r1 := gate("d1"), gate("d2"), gate("")
	all := func(what string, d, want Documents, held bool) {
		t.Helper()
		for _, g := range []*Gate{d1, d2, r1} {
			inForce(t, what, f.decide(g, d), want, held)
		}
	}
	a := documents(8, 4)
	bad := a.edit(drop(6))
	all("the first", a, a, false)
	all("a change", bad, a, true)
	all("nothing new", bad, a, true)
	if in, held := Says(f.Fleet, "d2"); in != a.Name() || held != bad.Name() {
		t.Errorf("d2 says %q, %q", in, held)
	}
	all("undone", a, a, false)
	all("again", bad, a, true)
	worse := a.edit(drop(7))
	all("another one", worse, a, true)
	f.accept(bad)
	all("another one, and that accepted which is no more", worse, a, true)
	all("the accepted one", bad, bad, false)
	all("back", a, a, false)
	if Accepted(f.Fleet, bad.Name()) {
		t.Error("the accept outlives its documents")
	}
	all("it waits again", bad, a, true)
	f.accept(bad)
	all("accepted", bad, bad, false)
	all("twice", bad, bad, false)
	// In small steps.
	all("back again", a, a, false)
	for _, n := range []int{4, 6} {
		step := a.edit(drop(n))
		all(fmt.Sprintf("without %d", n), step, step, false)
	}
}

// An accept that comes where the documents are not yet waits for them there.
func TestAnAcceptWaitsForWhoLagsBehind(t *testing.T) {
	f := fleetOf("d1", "d2")
	d1, d2 := gate("d1"), gate("d2")
	a := documents(8, 4)
	bad := a.edit(drop(6))
	f.decide(d1, a)
	f.decide(d2, a)
	f.decide(d1, bad)
	f.accept(bad)
	inForce(t, "accepted", f.decide(d1, bad), bad, false)
	inForce(t, "still the first", f.decide(d2, a), a, false)
	inForce(t, "it comes to d2", f.decide(d2, bad), bad, false)
}

// A process saves what is in force and goes by it in its next life.
func TestARestartWhileAChangeIsHeld(t *testing.T) {
	a := documents(8, 4)
	bad := a.edit(drop(6))
	for _, reported := range []bool{false, true} {
		a.Reported, bad.Reported = reported, reported
		for _, boot := range []string{"one", "two"} {
			for _, self := range []string{"d1", ""} {
				what := fmt.Sprintf("reported %t, boot %s, director %q", reported, boot, self)
				f := fleetOf("d1")
				g := gate(self)
				f.decide(g, a)
				f.decide(g, bad)
				path := filepath.Join(t.TempDir(), "in-force.json")
				saved, due := g.Save()
				if !due {
					t.Fatalf("%s: nothing to save", what)
				}
				if err := saved.Store(path); err != nil {
					t.Fatal(err)
				}
				g.Kept()
				if _, due := g.Save(); due {
					t.Errorf("%s: what is kept is due again", what)
				}
				again := New(Options{Share: 50, Self: self, Fleet: "ravel", Boot: boot})
				loaded, any, err := Load(path)
				if err != nil || !any {
					t.Fatal(err)
				}
				again.Restore(loaded)
				f.Settled = false
				d := f.decide(again, bad)
				if d.Held == nil || d.Unconfirmed || len(d.InForce.Cluster.Services) != 8 || len(d.InForce.Cluster.Endpoints) != 4 || len(d.InForce.Cluster.Nodes) != 4 {
					t.Errorf("%s: unconfirmed %t, held %+v, in force %+v", what, d.Unconfirmed, d.Held, d.InForce)
				}
				f.Settled = true
				f.accept(bad)
				inForce(t, what, f.decide(again, bad), bad, false)
			}
		}
	}
}

// What was in force in another life of the kernel does not count for a change that nobody holds; nor what was in another
// fleet.
func TestASavedFileThatDoesNotCount(t *testing.T) {
	a := documents(8, 4)
	bad := a.edit(drop(6))
	for name, saved := range map[string]Saved{
		"another boot":  {Fleet: "ravel", Boot: "old", Name: a.Name(), Documents: a},
		"no boot":       {Fleet: "ravel", Name: a.Name(), Documents: a},
		"another fleet": {Fleet: "other", Boot: "one", Name: a.Name(), Pending: bad.Name(), Documents: a},
	} {
		f := fleetOf("d1", "d2")
		g := gate("d1")
		g.Restore(saved)
		inForce(t, name, f.decide(g, bad), bad, false)
	}
	// But where others hold it before the same documents, it does.
	f := fleetOf("d1", "d2")
	f.set(map[string]string{"document/d2": a.Name() + " holds " + bad.Name()})
	g := gate("d1")
	g.Restore(Saved{Fleet: "ravel", Boot: "old", Name: a.Name(), Documents: a})
	inForce(t, "others hold it", f.decide(g, bad), a, true)
}

// Who knows of nothing before does not go by what others hold.
func TestANewcomerWhileAChangeIsHeld(t *testing.T) {
	a := documents(8, 4)
	bad := a.edit(drop(6))
	f := fleetOf("d1", "d2", "d3")
	d1, d2, d3 := gate("d1"), gate("d2"), gate("d3")
	for _, g := range []*Gate{d1, d2} {
		f.decide(g, a)
		f.decide(g, bad)
	}
	f.Settled = false
	if d := f.decide(d3, bad); !d.Unconfirmed || d.Held != nil {
		t.Errorf("before it heard the fleet: %+v", d)
	}
	f.Settled = true
	check := func(what string) {
		t.Helper()
		d := f.decide(d3, bad)
		if !d.Unconfirmed || d.Held == nil || d.Held.Name != bad.Name() || d.Held.Problem().Fix == "" {
			t.Errorf("%s: unconfirmed %t, held %+v", what, d.Unconfirmed, d.Held)
		}
		if in, held := Says(f.Fleet, "d3"); in != "" || held != "" {
			t.Errorf("%s: d3 says %q, %q", what, in, held)
		}
		if _, due := d3.Save(); due {
			t.Errorf("%s: it saves what it does not know", what)
		}
	}
	check("others hold it")
	f.Members[0].State, f.Members[1].State = ravel.Dead, ravel.Dead
	check("those that held it are gone")
	f.Members[0].State, f.Members[1].State = ravel.Alive, ravel.Alive
	again := *d3
	inForce(t, "the documents are changed back", f.decide(&again, a), a, false)
	f.accept(bad)
	for _, g := range []*Gate{d1, d2, d3} {
		inForce(t, "accepted", f.decide(g, bad), bad, false)
	}

	// The same of the only director, whose files were lost.
	f = fleetOf("d1")
	f.decide(gate("d1"), a)
	f.set(map[string]string{"document/d1": a.Name() + " holds " + bad.Name()})
	if d := f.decide(gate("d1"), bad); !d.Unconfirmed {
		t.Errorf("it goes by what it held in an earlier life: %+v", d)
	}
	// One that others have in force is not held, whoever did once.
	f.Members = append(f.Members, ravel.Member{Name: "d2", Role: ravel.Director})
	f.set(map[string]string{"document/d2": bad.Name()})
	inForce(t, "d2 has it in force", f.decide(gate("d1"), bad), bad, false)
}

// Documents may reach a newcomer before they reach those who can tell whether they are to be held.
func TestANewcomerWithDocumentsThatNobodyElseHas(t *testing.T) {
	a := documents(8, 4)
	bad, other := a.edit(drop(6)), a.edit(fence("lb", "yes"))
	begin := func() (*fleet, *Gate, *Gate) {
		f := fleetOf("d1", "d2")
		d1, d2 := gate("d1"), gate("d2")
		f.decide(d1, a)
		return f, d1, d2
	}
	f, d1, d2 := begin()
	if d := f.decide(d2, bad); !d.Unconfirmed || d.Held != nil || d.Wake != f.now.Add(patience) {
		t.Errorf("d1 has other documents: %+v", d)
	}
	f.decide(d1, bad)
	if d := f.decide(d2, bad); !d.Unconfirmed || d.Held == nil || !d.Wake.IsZero() {
		t.Errorf("d1 holds them: %+v", d)
	}
	if d := f.decide(d2, other); !d.Unconfirmed {
		t.Errorf("other documents, that d1 does not have yet: %+v", d)
	}
	f.decide(d1, other)
	inForce(t, "d1 has them, too", f.decide(d2, other), other, false)

	f, _, d2 = begin()
	f.decide(d2, bad)
	f.now = f.now.Add(patience)
	inForce(t, "d1 never has them", f.decide(d2, bad), bad, false)

	// Who knows what it had in another life, and loses little by the new ones, need not wait.
	f, _, d2 = begin()
	d2.Restore(Saved{Fleet: "ravel", Boot: "old", Name: other.Name(), Documents: other})
	less := other.edit(drop(1))
	inForce(t, "it loses little", f.decide(d2, less), less, false)
}

// Documents without a VIP are too little to go by for who knows of nothing before, also alone.
func TestFirstDocumentsThatAreEmpty(t *testing.T) {
	a, empty := documents(2, 2), documents(0, 2)
	f := fleetOf("d1")
	d1 := gate("d1")
	d := f.decide(d1, empty)
	if !d.Unconfirmed || d.Held == nil || !d.Held.Empty || d.Held.Problem().Where == Where {
		t.Errorf("%+v", d)
	}
	again := *d1
	inForce(t, "there are VIPs", f.decide(d1, a), a, false)
	f.accept(empty)
	inForce(t, "accepted", f.decide(&again, empty), empty, false)
	f = fleetOf("d1", "d2")
	f.set(map[string]string{"document/d2": empty.Name()})
	inForce(t, "another director has them", f.decide(gate("d1"), empty), empty, false)
	inForce(t, "switched off", New(Options{Share: 100}).Decide(f.now, empty, fleetOf().Fleet), empty, false)
}

// Who missed a step follows more than half of the directors.
func TestWhoMissedAStepFollowsTheOthers(t *testing.T) {
	a := documents(8, 4)
	step, end := a.edit(drop(4)), a.edit(drop(6))
	f := fleetOf("d1", "d2", "d3")
	d1, d2, d3, r1 := gate("d1"), gate("d2"), gate("d3"), gate("")
	for _, g := range []*Gate{d1, d2, d3, r1} {
		f.decide(g, a)
	}
	inForce(t, "d1 takes a step", f.decide(d1, step), step, false)
	inForce(t, "d1 takes two", f.decide(d1, end), end, false)
	inForce(t, "d3 missed one", f.decide(d3, end), a, true)
	inForce(t, "r1 missed one", f.decide(r1, end), a, true)
	f.decide(d2, step)
	inForce(t, "d2 takes two", f.decide(d2, end), end, false)
	inForce(t, "d3 follows", f.decide(d3, end), end, false)
	inForce(t, "r1 follows", f.decide(r1, end), end, false)
}

// documentsAt are random documents.
func documentsAt(random *rand.Rand, reported bool) Documents {
	d := documents(random.IntN(10), random.IntN(10))
	d.Reported = reported
	if random.IntN(4) == 0 {
		d.Cluster.Labels = map[string]string{"lb": []string{"yes", "no"}[random.IntN(2)]}
	}
	for i := range d.Cluster.Nodes {
		d.Cluster.Nodes[i].Ready = random.IntN(3) > 0
		if random.IntN(8) == 0 {
			d.Cluster.Nodes[i].Labels = nil
		}
	}
	d.Cluster.Endpoints = slices.DeleteFunc(d.Cluster.Endpoints, func(desired.Endpoint) bool { return random.IntN(5) == 0 })
	for i := range d.Cluster.Services {
		if random.IntN(12) == 0 {
			d.Cluster.Services[i].Service = "other"
		}
	}
	if random.IntN(10) == 0 {
		d.Fleet.Peers = nil
	}
	return d
}

// Whatever documents come: without an accept never is more than the share lost in one step; who is given the same decides
// the same, whatever the order of lists; and an accept counts once.
func TestRandomDocuments(t *testing.T) {
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	random := rand.New(rand.NewPCG(seed, 1))
	for walk := range 20 {
		reported := walk%2 == 0
		f := fleetOf("d1", "d2")
		d1, d2 := gate("d1"), gate("d2")
		var last Documents
		for step := range 60 {
			newest := documentsAt(random, reported)
			accepted := random.IntN(4) == 0
			if accepted {
				f.accept(newest)
				if random.IntN(2) == 0 {
					f.accept(newest)
				}
			}
			one := f.decide(d1, newest)
			two := f.decide(d2, newest.edit(func(d *Documents) {
				for _, shuffle := range []func(){
					func() { mix(random, d.Cluster.Services) }, func() { mix(random, d.Cluster.Nodes) }, func() { mix(random, d.Cluster.Endpoints) },
				} {
					shuffle()
				}
			}))
			if one.InForce.Name() != two.InForce.Name() || !sameHeld(one.Held, two.Held) {
				t.Fatalf("walk %d, step %d: %s, held %+v; and elsewhere %s, held %+v", walk, step,
					one.InForce.Name(), one.Held, two.InForce.Name(), two.Held)
			}
			if lost := Weigh(last, one.InForce, 50); step > 0 && !accepted && len(lost) > 0 {
				t.Fatalf("walk %d, step %d: lost without an accept: %v", walk, step, lost)
			}
			if accepted && (one.Held != nil || !one.InForce.Same(newest)) {
				t.Fatalf("walk %d, step %d: accepted, and held is %+v", walk, step, one.Held)
			}
			if again := f.decide(d1, newest); !again.InForce.Same(one.InForce) || !sameHeld(again.Held, one.Held) || len(again.Tell) > 0 {
				t.Fatalf("walk %d, step %d: the same documents again: %+v", walk, step, again)
			}
			last = one.InForce
		}
	}
}

func mix[T any](random *rand.Rand, list []T) {
	random.Shuffle(len(list), func(i, j int) { list[i], list[j] = list[j], list[i] })
}

func sameHeld(a, b *Change) bool {
	return cmp.Equal(a, b, cmpopts.EquateEmpty())
}

// A change of anything is a change, also where no list is another.
func TestSame(t *testing.T) {
	med := uint32(1)
	d := documents(2, 2)
	for name, change := range map[string]func(*Documents){
		"labels": fence("lb", "yes"), "services": drop(1), "MTU": func(d *Documents) { d.Cluster.MTU = map[netip.Addr]int{{}: 1400} },
		"AS": func(d *Documents) { d.Fleet.ASN = 1 }, "MED": func(d *Documents) { d.Fleet.Policy.MED = &med }, "reported": func(d *Documents) { d.Reported = true },
		"endpoints": func(d *Documents) { d.Cluster.Endpoints = d.Cluster.Endpoints[1:] },
	} {
		other := d
		change(&other)
		if d.Same(other) || d.sameWishes(other) != (name == "endpoints") {
			t.Errorf("%s: same %t, same wishes %t", name, d.Same(other), d.sameWishes(other))
		}
	}
	if again := d; !d.Same(again) || !d.sameWishes(again) {
		t.Error("it is not the same as itself")
	}
}

// What is saved comes back as it was.
func TestSavedDocumentsComeBack(t *testing.T) {
	med, tunnel := uint32(0), ravel.Tunnel
	d := documents(2, 2)
	d.Cluster.Labels = map[string]string{"lb": "yes"}
	d.Cluster.Services[0].Forwarding, d.Cluster.Services[0].Flags = &tunnel, ravel.Fallback|ravel.HashPort
	d.Cluster.Services[1].Key = ravel.ServiceKey{VIP: netip.MustParseAddr("2001:db8::1"), Proto: ravel.UDP, Port: 53}
	d.Cluster.Services[1].OnePacket = true
	d.Cluster.MTU = map[netip.Addr]int{d.Cluster.Services[0].Key.VIP: 1400}
	d.Cluster.Pool = []desired.PoolVIP{{VIP: netip.MustParseAddr("192.0.2.99"), Where: "cluster.vipPool[0]"}}
	d.Cluster.Default = &desired.DefaultService{Namespace: "ops", Service: "page", PortName: "www", Port: 70}
	policy := desired.Policy{
		Announce: desired.AnnounceAll, Communities: []ravel.Community{65100<<16 | 1, 0xffffff01},
		LargeCommunities: []ravel.LargeCommunity{{Global: 4200000000, Local1: 1, Local2: 2}}, MED: &med,
	}
	d.Fleet.ASN, d.Fleet.Forwarding, d.Fleet.Masquerade, d.Fleet.Policy = 65100, ravel.Direct, true, policy
	d.Fleet.Pools = []desired.Pool{{Name: "dns", Prefixes: []netip.Prefix{netip.MustParsePrefix("192.0.2.0/24")}, Policy: policy}}
	d.Fleet.Directors[0].RouterID, d.Fleet.Directors[0].Labels = netip.MustParseAddr("10.9.0.1"), map[string]string{"rack": "a"}
	d.Fleet.Peers[0].Peer.HoldTime, d.Fleet.Peers[0].Directors = desired.DefaultHoldTime, []string{"d1"}
	saved := Saved{Fleet: "ravel", Boot: "b", Name: d.Name(), Pending: "x", Documents: d}
	path := filepath.Join(t.TempDir(), "in-force.json")
	if err := saved.Store(path); err != nil {
		t.Fatal(err)
	}
	got, any, err := Load(path)
	if err != nil || !any {
		t.Fatal(err)
	}
	if diff := cmp.Diff(saved, got, cmp.Comparer(func(a, b netip.Addr) bool { return a == b }),
		cmp.Comparer(func(a, b netip.Prefix) bool { return a == b })); diff != "" {
		t.Errorf("-want +got:\n%s", diff)
	}
	if got.Documents.Name() != d.Name() {
		t.Error("it came back under another name")
	}
	if _, any, err := Load(path + ".none"); any || err != nil {
		t.Errorf("no file: %t, %v", any, err)
	}
}

// While a change is held whose documents name no service, a cluster tells of the pods of those in force too: who comes and
// goes is followed to the last one, also by a later process.
func TestPodsOfWhatIsInForceAreFollowed(t *testing.T) {
	a := documents(8, 4)
	a.Reported = true
	bad := a.edit(func(d *Documents) { d.Cluster.Services, d.Cluster.Endpoints = nil, nil })
	f := fleetOf("d1")
	g := gate("d1")
	pods := func(what string, d Decision, want int) {
		t.Helper()
		if d.Held == nil || d.Unconfirmed || len(d.InForce.Cluster.Services) != 8 || len(d.InForce.Cluster.Endpoints) != want {
			t.Errorf("%s: unconfirmed %t, held %v, %d services and %d endpoints in force, want %d endpoints", what, d.Unconfirmed, d.Held,
				len(d.InForce.Cluster.Services), len(d.InForce.Cluster.Endpoints), want)
		}
	}
	f.decide(g, a)
	pods("nothing is told of them yet", f.decide(g, bad), 4)
	told := func(n int) Documents {
		return bad.edit(func(d *Documents) {
			d.Also, d.Cluster.Endpoints = a.Cluster.Services, slices.Clone(a.Cluster.Endpoints[:n])
		})
	}
	for _, n := range []int{4, 3, 0, 2} {
		pods("they are told of", f.decide(g, told(n)), n)
	}
	saved, due := g.Save()
	if !due || len(saved.Documents.Cluster.Endpoints) != 2 {
		t.Fatalf("due %t, %+v", due, saved)
	}
	again := gate("d1")
	again.Restore(saved)
	pods("a later process, before they are told of", f.decide(again, bad), 2)
	pods("a later process", f.decide(again, told(1)), 1)
}

// A change that was held because new services had no pods yet takes effect when they have.
func TestPodsThatComeEndAHold(t *testing.T) {
	a := documents(8, 4)
	a.Reported = true
	renamed := a.edit(func(d *Documents) {
		for i := range d.Cluster.Services {
			d.Cluster.Services[i].Service = "new"
		}
	})
	f := fleetOf("d1")
	g := gate("d1")
	f.decide(g, a)
	if d := f.decide(g, renamed); d.Held == nil {
		t.Fatal("services without a pod take effect: the test shows nothing")
	}
	grown := renamed.edit(func(d *Documents) {
		for i := range d.Cluster.Endpoints {
			d.Cluster.Endpoints[i].Service = "new"
		}
	})
	grown.Also = a.Cluster.Services
	inForce(t, "the new pods are there", f.decide(g, grown), grown, false)
}
