package agree

import (
	"math/rand/v2"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/ravel-lb/ravel"
	"github.com/ravel-lb/ravel/internal/roster"
)

var timing = roster.Timing{
	Batch: time.Second, Drain: time.Minute, Rise: 10 * time.Second, Skew: 2 * time.Second,
	Majority: 10 * time.Second, Tombstone: time.Hour,
}

func (w *world) startAll() {
	for _, h := range w.directors {
		h.start(timing)
	}
}

func (w *world) readAll() {
	for _, h := range w.directors {
		h.read()
	}
}

func TestAFleetComesUp(t *testing.T) {
	w := newWorld(t, 3, 3)
	w.pods(1, 2)
	w.startAll()
	w.pass(5 * time.Second)
	w.same("10.0.0.12=2/2 10.0.0.11=1/1")
	w.pods(1, 0, 3)
	w.readAll()
	w.pass(5 * time.Second)
	w.same("10.0.0.13=3/3 10.0.0.12=0/2 10.0.0.11=1/1")
	w.pass(70 * time.Second)
	w.same("10.0.0.13=3/3 10.0.0.11=1/1")
}

// A new real server owns no slot, on no director, before its node says that the redirect is in place.
func TestNobodyTakesFlowsBeforeItsNodeIsReady(t *testing.T) {
	w := newWorld(t, 3, 2)
	w.pods(1)
	w.startAll()
	w.pass(5 * time.Second)
	w.nodes["r2"].report.Redirects = map[ravel.ServiceKey]bool{}
	w.pods(1, 1)
	w.readAll()
	w.pass(20 * time.Second)
	w.same("10.0.0.12=0/0 10.0.0.11=1/1")
	w.nodes["r2"].report.Redirects = map[ravel.ServiceKey]bool{web: true}
	w.pass(2 * time.Second)
	w.same("10.0.0.12=1/1 10.0.0.11=1/1")
	// Agents that go and come move nothing.
	for _, n := range w.nodes {
		n.member.State, n.report = ravel.Restarting, ravel.Report{}
	}
	w.pass(20 * time.Second)
	w.same("10.0.0.12=1/1 10.0.0.11=1/1")
}

// A node without an agent of ours is waited for, and then not.
func TestANodeThatDoesNotReport(t *testing.T) {
	w := newWorld(t, 2, 2)
	delete(w.nodes, "r2")
	w.pods(1, 1)
	w.startAll()
	w.pass(8 * time.Second)
	w.same("10.0.0.12=0/0 10.0.0.11=1/1")
	w.pass(5 * time.Second)
	w.same("10.0.0.12=1/1 10.0.0.11=1/1")
	r, _ := w.directors["d1"].agreed.Results().Latest()
	if !slices.ContainsFunc(r.Problems, func(p ravel.Problem) bool { return p.Where == "nodes.r2" && strings.Contains(p.What, "did not say") }) {
		t.Errorf("no problem says so: %v", r.Problems)
	}
}

// A director that starts gets a drained real server's slots from the fleet, and changes nothing before.
func TestARestartInTheMiddleOfADrain(t *testing.T) {
	w := newWorld(t, 3, 3)
	w.pods(3, 2, 1)
	w.startAll()
	w.pass(5 * time.Second)
	w.pods(3, 0, 1)
	w.readAll()
	w.pass(5 * time.Second)
	const drained = "10.0.0.13=1/1 10.0.0.12=0/2 10.0.0.11=3/3"
	w.same(drained)
	d1 := w.directors["d1"]
	for _, kept := range []bool{true, false} {
		d1.stop()
		if !kept {
			d1.kernel = nil // a reboot
		}
		d1.start(timing)
		d1.step()
		if kept && d1.list() != drained {
			t.Errorf("before it has settled the kernel holds %s", d1.list())
		}
		if !kept && len(d1.kernel) > 0 {
			t.Errorf("a service came before the fleet was heard: %s", d1.list())
		}
		w.pass(3 * time.Second)
		w.same(drained)
	}
	w.pass(3 * time.Minute)
	w.same("10.0.0.13=1/1 10.0.0.11=3/3")
}

// All processes start at once on kernels that hold what they held: nothing moves, also where a file is lost.
func TestTheWholeFleetRestarts(t *testing.T) {
	w := newWorld(t, 3, 4)
	w.pods(1, 1)
	w.startAll()
	w.pass(5 * time.Second)
	w.pods(1, 1, 2, 3)
	w.readAll()
	w.pass(5 * time.Second)
	w.pods(0, 1, 2, 3)
	w.readAll()
	w.pass(5 * time.Second)
	const want = "10.0.0.14=3/3 10.0.0.13=2/2 10.0.0.12=1/1 10.0.0.11=0/1"
	w.same(want)
	for lost := range 3 {
		for _, h := range w.directors {
			h.stop()
		}
		for i, name := range []string{"d1", "d2", "d3"}[:lost] {
			if err := os.Remove(w.directors[name].file()); err != nil {
				t.Fatal(i, err)
			}
		}
		w.startAll()
		w.pass(2 * time.Second)
		w.same(want)
	}
}

func (h *host) file() string { return h.w.dir + "/" + h.voice.member.Name + ".json" }

// Frozen, the fleet holds its last state, whatever the documents say; a director that comes new takes part.
func TestFreeze(t *testing.T) {
	w := newWorld(t, 3, 3)
	w.pods(1, 1)
	w.startAll()
	w.pass(5 * time.Second)
	if err := w.directors["d2"].SetRegister(ravel.FreezeRegister, "on"); err != nil {
		t.Fatal(err)
	}
	w.pass(time.Second)
	w.pods(0, 5, 5)
	w.readAll()
	d3 := w.directors["d3"]
	d3.stop()
	d3.kernel = nil
	d3.start(timing)
	w.pass(30 * time.Second)
	for _, name := range []string{"d1", "d2"} {
		if got := w.directors[name].list(); got != "10.0.0.12=1/1 10.0.0.11=1/1" {
			t.Errorf("%s holds %s", name, got)
		}
	}
	if got := d3.list(); !strings.HasPrefix(got, "10.0.0.12=1/1 10.0.0.11=") {
		t.Errorf("a director that came new holds %s", got)
	}
	r, _ := w.directors["d1"].agreed.Results().Latest()
	if !slices.ContainsFunc(r.Problems, func(p ravel.Problem) bool { return strings.Contains(p.What, "frozen by d2") }) {
		t.Errorf("no problem says so: %v", r.Problems)
	}
	if err := w.directors["d1"].SetRegister(ravel.FreezeRegister, ""); err != nil {
		t.Fatal(err)
	}
	w.pass(3 * time.Second)
	w.same("10.0.0.13=5/5 10.0.0.12=5/5 10.0.0.11=0/1")
}

// A director whose documents are in doubt leaves its kernel as it is, and has no say in what the others do.
func TestDocumentsInDoubt(t *testing.T) {
	w := newWorld(t, 3, 3)
	w.pods(1, 1)
	w.startAll()
	w.pass(5 * time.Second)
	const before = "10.0.0.12=1/1 10.0.0.11=1/1"
	w.same(before)
	d3, doubt := w.directors["d3"], true
	d3.stop()
	whole := w.document
	w.document.Cluster.Services, w.document.Cluster.Endpoints = nil, nil
	d3.start(timing)
	d3.agreed.o.Unconfirmed = func() bool { return doubt }
	w.document = whole
	w.pass(time.Minute)
	w.same(before)
	if r, _ := d3.agreed.Results().Latest(); r.Fleet.Settled || d3.voice.report.Services != nil {
		t.Errorf("it takes part: %+v", d3.voice.report)
	}
	// The others go on without its word.
	w.pods(1, 2)
	for _, name := range []string{"d1", "d2"} {
		w.directors[name].read()
	}
	w.pass(3 * time.Second)
	for _, name := range []string{"d1", "d2"} {
		if got := w.directors[name].list(); got != "10.0.0.12=2/2 10.0.0.11=1/1" {
			t.Errorf("%s holds %s", name, got)
		}
	}
	doubt = false
	d3.read()
	w.pass(3 * time.Second)
	w.same("10.0.0.12=2/2 10.0.0.11=1/1")
}

// A drain by hand outlives every process, and its end brings the real server back.
func TestDrainByHand(t *testing.T) {
	w := newWorld(t, 2, 3)
	w.pods(1, 1, 1)
	w.startAll()
	w.pass(5 * time.Second)
	if err := w.directors["d1"].SetRegister(ravel.DrainRegisterPrefix+"r1", "on"); err != nil {
		t.Fatal(err)
	}
	w.pass(5 * time.Second)
	w.same("10.0.0.13=1/1 10.0.0.12=1/1 10.0.0.11=0/1")
	for _, h := range w.directors {
		h.stop()
	}
	w.startAll()
	w.pass(5 * time.Second)
	w.same("10.0.0.13=1/1 10.0.0.12=1/1 10.0.0.11=0/1")
	if err := w.directors["d2"].SetRegister(ravel.DrainRegisterPrefix+"r1", ""); err != nil {
		t.Fatal(err)
	}
	w.pass(5 * time.Second)
	w.same("10.0.0.13=1/1 10.0.0.12=1/1 10.0.0.11=1/1")
	if err := w.directors["d2"].SetRegister(ravel.DrainRegisterPrefix+"d1", "on"); err != nil {
		t.Fatal(err)
	}
	w.pass(time.Second)
	for name, want := range map[string]bool{"d1": true, "d2": false} {
		r, _ := w.directors[name].agreed.Results().Latest()
		if got := r.Inputs.Agreed.Withdraw4 && r.Inputs.Agreed.Withdraw6; got != want {
			t.Errorf("%s withdraws: %v, want %v", name, got, want)
		}
	}
}

// A director that hears nobody serves on and sends nobody away; when it hears again, all are alike.
func TestADirectorIsCutOff(t *testing.T) {
	w := newWorld(t, 3, 4)
	w.pods(1, 1, 1)
	w.startAll()
	w.pass(5 * time.Second)
	w.cut["d3"] = true
	w.pass(time.Minute)
	w.same("10.0.0.13=1/1 10.0.0.12=1/1 10.0.0.11=1/1")
	w.pods(1, 0, 1, 2)
	for _, name := range []string{"d1", "d2"} {
		w.directors[name].read()
	}
	w.pass(3 * time.Minute)
	if got := w.directors["d3"].list(); got != "10.0.0.13=1/1 10.0.0.12=1/1 10.0.0.11=1/1" {
		t.Errorf("the one that is cut off holds %s", got)
	}
	w.cut["d3"] = false
	w.directors["d3"].read()
	w.pass(3 * time.Minute)
	w.same(w.directors["d1"].list())
	if got := w.directors["d1"].list(); got != "10.0.0.14=2/2 10.0.0.13=1/1 10.0.0.11=1/1" {
		t.Errorf("in the end all hold %s", got)
	}
}

// Promise P2 in one process: whatever the history, all kernels hold one list in the end, and it is what is wished.
func TestTablesAgreeWhateverTheHistory(t *testing.T) {
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	for round := range 6 {
		r := rand.New(rand.NewPCG(seed, uint64(round)))
		w := newWorld(t, 3, 5)
		w.pods(1, 1, 1)
		w.startAll()
		names := []string{"d1", "d2", "d3"}
		for range 40 {
			h := w.directors[names[r.IntN(3)]]
			switch r.IntN(7) {
			case 0, 1:
				w.pods(r.IntN(4), r.IntN(4), r.IntN(4), r.IntN(4), r.IntN(4))
				h.read()
			case 2:
				w.readAll()
			case 3:
				h.stop()
				if r.IntN(3) == 0 {
					h.kernel = nil
				}
			case 4:
				if h.agreed == nil {
					h.start(timing)
				}
			case 5:
				w.cut[h.voice.member.Name] = r.IntN(2) == 0
			case 6:
				node := w.nodes["r"+string(rune('1'+r.IntN(5)))]
				node.report.Redirects = map[ravel.ServiceKey]bool{web: r.IntN(3) > 0}
			}
			w.pass(time.Duration(r.IntN(12)) * 500 * time.Millisecond)
		}
		w.pods(1+r.IntN(3), r.IntN(3), r.IntN(3), r.IntN(3), r.IntN(3))
		for name, h := range w.directors {
			w.cut[name] = false
			if h.agreed == nil {
				h.start(timing)
			}
		}
		for _, n := range w.nodes {
			n.report.Redirects = map[ravel.ServiceKey]bool{web: true}
		}
		w.readAll()
		w.pass(200 * time.Second)
		want := w.directors["d1"].list()
		w.same(want)
		total := 0
		for _, s := range w.directors["d1"].kernel {
			for _, rs := range s.RealServers {
				if rs.Weight == 0 {
					t.Errorf("%s is still there without a weight: %s", rs.Addr, want)
				}
				total += rs.Weight
			}
		}
		if total != len(w.document.Cluster.Endpoints) {
			t.Errorf("weights sum to %d, pods are %d: %s", total, len(w.document.Cluster.Endpoints), want)
		}
		if r, _ := w.directors["d1"].agreed.Results().Latest(); len(r.Differs) > 0 {
			t.Errorf("the digests say that tables differ: %v", r.Differs)
		}
		if t.Failed() {
			t.Fatalf("seed %d round %d", seed, round)
		}
	}
}

// One kernel that is not as it should be is found, read again and repaired, and told of; while it stays so, the one
// that stands alone withdraws.
func TestATableThatDiffersIsFound(t *testing.T) {
	w := newWorld(t, 3, 3)
	w.pods(1, 1, 1)
	w.startAll()
	w.pass(5 * time.Second)
	d2 := w.directors["d2"]
	spoil := func(d time.Duration) {
		for end := w.now.Add(d); w.now.Before(end); w.now = w.now.Add(500 * time.Millisecond) {
			w.spread()
			for _, h := range w.directors {
				h.step()
			}
			slices.Reverse(d2.kernel[0].RealServers) // what is written is right, and what is read is not
			slices.SortFunc(d2.kernel[0].RealServers, func(a, b ravel.RealServer) int { return a.Addr.Compare(b.Addr) })
		}
	}
	spoil(15 * time.Second)
	r, _ := d2.agreed.Results().Latest()
	if len(r.Differs) != 1 || !slices.Equal(r.Differs[0].Directors, []string{"d1", "d3"}) || !r.Differs[0].Table || d2.resyncs == 0 {
		t.Errorf("differs: %+v after %d resyncs", r.Differs, d2.resyncs)
	}
	if r.Inputs.Agreed.Withdraw4 {
		t.Error("it withdrew at once")
	}
	spoil(30 * time.Second)
	for name, want := range map[string]bool{"d1": false, "d2": true, "d3": false} {
		r, _ := w.directors[name].agreed.Results().Latest()
		if r.Inputs.Agreed.Withdraw4 != want {
			t.Errorf("%s withdraws: %v, want %v", name, r.Inputs.Agreed.Withdraw4, want)
		}
	}
	w.pass(10 * time.Second)
	r, _ = d2.agreed.Results().Latest()
	if len(r.Differs) != 0 || r.Inputs.Agreed.Withdraw4 {
		t.Errorf("repaired, and yet %+v, withdrawn %v", r.Differs, r.Inputs.Agreed.Withdraw4)
	}
}

// A director that starts with the inputs of an earlier process announces nothing while others have newer ones that differ.
func TestInputsOfAnEarlierProcess(t *testing.T) {
	w := newWorld(t, 3, 3)
	w.pods(1, 1, 1)
	w.startAll()
	w.pass(5 * time.Second)
	d3 := w.directors["d3"]
	restart := func(cached uint64, pods ...int) {
		d3.stop()
		w.pass(2 * time.Second)
		now := w.document.Cluster.Endpoints
		w.pods(pods...)
		d3.unheard, d3.earlier = cached, true
		d3.start(timing)
		w.document.Cluster.Endpoints = now
	}
	announces := func(what string, want bool) {
		t.Helper()
		r, _ := d3.agreed.Results().Latest()
		said := slices.ContainsFunc(r.Problems, func(p ravel.Problem) bool { return p.Where == "inputs" && strings.Contains(p.What, "earlier process") })
		if a := r.Inputs.Agreed; a.Withdraw4 == want || (d3.voice.report.Withdrawn4 && d3.voice.report.Withdrawn6) == want || said == want {
			t.Errorf("%s: withdraws %t, says so %t, a problem %t; want it to announce: %t", what, a.Withdraw4, d3.voice.report.Withdrawn4, said, want)
		}
	}
	restart(7, 1, 1, 1)
	w.pass(20 * time.Second)
	announces("old inputs that ask for the same", true)
	w.pods(1, 1, 2)
	w.directors["d1"].read()
	w.pass(2 * time.Second)
	announces("others hear of a change, which may reach this one any moment", true)
	w.pass(20 * time.Second)
	announces("and it does not", false)
	d3.unheard, d3.earlier = 0, false
	d3.read()
	w.directors["d2"].read()
	w.pass(time.Second)
	announces("it hears the source", true)
	restart(7, 1, 1, 1)
	w.pass(2 * time.Second)
	announces("old inputs that differ", false)
	// Where the others have no more than was kept, newer counts.
	for name, revision := range map[string]uint64{"d1": 6, "d2": 7} {
		w.directors[name].unheard = revision
	}
	w.pass(2 * time.Second)
	announces("nobody has newer ones", true)
	w.directors["d1"].unheard = 8
	w.pass(20 * time.Second)
	announces("one has kept newer ones, and another who announces", false)
}
