package agree

import (
	"net/netip"
	"slices"
	"testing"
	"time"

	"github.com/ravel-lb/ravel"
	"github.com/ravel-lb/ravel/internal/desired"
)

// routes are how many VIPs a director announces.
func (h *host) routes() int {
	r, _ := h.agreed.Results().Latest()
	return len(r.State.Routes)
}

// A service that comes, or comes back, takes nothing from a VIP that wants all of its services.
func TestANewServiceDoesNotWithdrawItsVIP(t *testing.T) {
	w := newWorld(t, 2, 2)
	w.document.Fleet.Policy.Announce = desired.AnnounceAll
	w.pods(1, 1)
	w.startAll()
	w.pass(5 * time.Second)
	second := w.document.Cluster.Services[0]
	second.Key.Port, second.Where = 81, "web2"
	w.document.Cluster.Services = append(slices.Clone(w.document.Cluster.Services), second)
	w.directors["d1"].read()
	for range 30 {
		w.pass(500 * time.Millisecond)
		if n := w.directors["d1"].routes(); n != 1 {
			t.Fatalf("%d routes while a service comes that the other director has not heard of", n)
		}
	}
}

// A director that restarts in a frozen fleet leaves its kernel as it is, also where the documents have become empty, and
// where it is the only one that knows.
func TestAFreezeOutlivesARestart(t *testing.T) {
	for _, directors := range []int{1, 3} {
		w := newWorld(t, directors, 3)
		w.pods(1, 1)
		w.startAll()
		w.pass(5 * time.Second)
		d1 := w.directors["d1"]
		d1.registers[ravel.FreezeRegister] = ravel.Register{Stamp: 1, Value: "on", By: "d1"}
		w.pass(5 * time.Second)
		w.document.Cluster.Services, w.document.Cluster.Endpoints = nil, nil
		w.readAll()
		for _, h := range w.directors {
			h.stop()
		}
		w.startAll()
		w.pass(20 * time.Second)
		w.same("10.0.0.12=1/1 10.0.0.11=1/1")
		if n := d1.routes(); n != 1 {
			t.Errorf("%d directors: %d routes in a frozen fleet, want 1", directors, n)
		}
	}
}

// What an operator undid does not come back with a director that was down meanwhile.
func TestAnUndoneDrainDoesNotComeBack(t *testing.T) {
	w := newWorld(t, 2, 3)
	w.pods(1, 1, 1)
	w.startAll()
	w.pass(5 * time.Second)
	set := func(h *host, value string) {
		name := ravel.DrainRegisterPrefix + "r1"
		h.registers[name] = ravel.Register{Stamp: h.registers[name].Stamp + 1, Value: value, By: h.voice.member.Name}
	}
	d1, d2 := w.directors["d1"], w.directors["d2"]
	set(d1, "on")
	w.pass(5 * time.Second)
	d1.stop()
	set(d2, "")
	w.pass(5 * time.Second)
	d2.stop()
	w.startAll()
	w.pass(5 * time.Second)
	w.same("10.0.0.13=1/1 10.0.0.12=1/1 10.0.0.11=1/1")
}

// A drain ends though the director that began it has come to want something else.
func TestADrainOfOneThatDissentsEnds(t *testing.T) {
	w := newWorld(t, 3, 3)
	w.pods(1, 1, 1)
	w.startAll()
	w.pass(5 * time.Second)
	w.pods(0, 1, 1)
	for _, name := range []string{"d3", "d2", "d1"} {
		w.directors[name].read()
	}
	w.pass(5 * time.Second)
	by, _ := w.directors["d1"].rosters[web].Find(nodeAddr(1))
	w.pods(0, 1, 5)
	w.directors[by.By].read()
	w.pass(3 * time.Minute)
	if e, _ := w.directors["d1"].rosters[web].Find(nodeAddr(1)); e.State != ravel.Gone {
		t.Errorf("begun by %s, which wants something else now, the drain goes on: %+v", by.By, e)
	}
}

// A death changes the weight of nobody else.
func TestADeathChangesNoOtherWeight(t *testing.T) {
	w := newWorld(t, 1, 40)
	counts := make([]int, 40)
	for i := range counts {
		counts[i] = 30
	}
	w.pods(counts...)
	in := w.document
	in.Agreed = &desired.Agreed{Floor: 50}
	before := desired.Wishes(in)[web]
	in.Agreed = &desired.Agreed{Floor: 50, Dead: map[netip.Addr]bool{nodeAddr(7): true}, Drained: map[string]bool{"r9": true}}
	after := desired.Wishes(in)[web]
	if len(before) != 40 || len(after) != 38 {
		t.Fatalf("%d and %d real servers", len(before), len(after))
	}
	for _, a := range after {
		if !slices.Contains(before, a) {
			t.Errorf("%+v was not there before", a)
		}
	}
}

// Of three directors each of which holds another table in one service, not all withdraw; and one does not that is the
// only one to attract anything.
func TestNotAllWithdraw(t *testing.T) {
	w := newWorld(t, 3, 3)
	for i := range 2 {
		more := w.document.Cluster.Services[0]
		more.Key.Port = uint16(81 + i)
		w.document.Cluster.Services = append(w.document.Cluster.Services, more)
	}
	w.pods(1, 1, 1)
	w.startAll()
	w.pass(5 * time.Second)
	for end := w.now.Add(50 * time.Second); w.now.Before(end); w.now = w.now.Add(500 * time.Millisecond) {
		w.spread()
		for i, name := range []string{"d1", "d2", "d3"} {
			h := w.directors[name]
			h.step()
			slices.SortFunc(h.kernel[i].RealServers, func(a, b ravel.RealServer) int { return a.Addr.Compare(b.Addr) })
		}
	}
	away := 0
	for _, h := range w.directors {
		if r, _ := h.agreed.Results().Latest(); r.Inputs.Agreed.Withdraw4 {
			away++
		}
	}
	if away != 1 {
		t.Errorf("%d of 3 directors withdrew, want 1", away)
	}
}
