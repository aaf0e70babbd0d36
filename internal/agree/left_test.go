package agree

import (
	"net/netip"
	"slices"
	"testing"
	"time"

	"github.com/ravel-lb/ravel"
)

// three is a fleet of three directors that agree.
func three(t *testing.T) *world {
	w := newWorld(t, 3, 3)
	w.pods(1, 1, 1)
	w.startAll()
	w.pass(5 * time.Second)
	return w
}

// spoil lets time pass in which a director's kernel has another order than the fleet's.
func (w *world) spoil(h *host, d time.Duration) {
	for end := w.now.Add(d); w.now.Before(end); {
		w.pass(500 * time.Millisecond)
		slices.SortFunc(h.kernel[0].RealServers, func(a, b ravel.RealServer) int { return a.Addr.Compare(b.Addr) })
	}
}

// earlier starts a director anew, with the inputs of an earlier process and no source.
func (w *world) earlier(h *host, revision uint64) {
	h.stop()
	w.pass(2 * time.Second)
	h.unheard, h.earlier = revision, true
	h.start(timing)
}

// withdraws reports whether a director announces nothing though it could.
func (h *host) withdraws() bool {
	r, _ := h.agreed.Results().Latest()
	return r.Inputs.Agreed.Withdraw4
}

func (w *world) set(name, value string) {
	w.t.Helper()
	if err := w.directors["d1"].SetRegister(name, value); err != nil {
		w.t.Fatal(err)
	}
}

// A director that left it to others to announce comes back when they do not: they are drained, or lost their sessions.
func TestWhoLeftComesBackWhenNobodyElseAnnounces(t *testing.T) {
	for name, silence := range map[string]func(w *world, director string){
		"drained": func(w *world, director string) { w.set(ravel.DrainRegisterPrefix+director, "on") },
		"without a session": func(w *world, director string) {
			w.directors[director].agreed.o.Sessions = func() map[netip.Addr]bool {
				return map[netip.Addr]bool{netip.MustParseAddr("10.9.9.9"): false}
			}
		},
	} {
		t.Run("other tables, the others "+name, func(t *testing.T) {
			w := three(t)
			d2 := w.directors["d2"]
			w.spoil(d2, 50*time.Second)
			if !d2.withdraws() {
				t.Fatal("a director with tables of its own announces: the test shows nothing")
			}
			silence(w, "d1")
			silence(w, "d3")
			w.spoil(d2, 2*time.Second)
			if d2.withdraws() {
				t.Error("nobody announces")
			}
		})
		t.Run("older inputs, the others "+name, func(t *testing.T) {
			w := three(t)
			d2 := w.directors["d2"]
			w.earlier(d2, 7)
			w.pods(1, 1, 2)
			w.directors["d1"].read()
			w.directors["d3"].read()
			w.pass(20 * time.Second)
			if !d2.withdraws() {
				t.Fatal("a director with older inputs announces: the test shows nothing")
			}
			silence(w, "d1")
			w.pass(2 * time.Second)
			if d2.withdraws() {
				t.Error("one of three announces, and one withdraws")
			}
		})
	}
}

// Directors that are not to attract packets count for nobody.
func TestDarkDirectorsDoNotCount(t *testing.T) {
	w := three(t)
	for _, name := range []string{"d1", "d3"} {
		in, _ := w.directors[name].inputs.Latest()
		in.AttractNone = true
		w.directors[name].inputs.Set(in)
	}
	d2 := w.directors["d2"]
	w.spoil(d2, 60*time.Second)
	if d2.withdraws() {
		t.Error("the only director that is to announce withdraws")
	}
	if r := w.directors["d1"].voice.report; !r.Dark || r.Withdrawn4 {
		t.Errorf("a dark director says %+v", r)
	}
}

// Two that leave at one moment do not both come back at one moment, again and again.
func TestTwoThatLeaveTogether(t *testing.T) {
	now := time.Unix(1e9, 0)
	fleet := ravel.Fleet{Reports: map[string]ravel.Report{}}
	up := map[netip.Addr]bool{netip.MustParseAddr("10.9.9.9"): true}
	states := map[string]*left{"d1": {}, "d2": {}}
	for _, name := range []string{"d1", "d2", "d3"} {
		fleet.Members = append(fleet.Members, ravel.Member{Name: name, Role: ravel.Director, State: ravel.Alive})
		fleet.Reports[name] = ravel.Report{Sessions: up}
	}
	changes := 0
	for range 100 {
		is := map[string]bool{}
		for name, l := range states { // both see what both said before
			before := l.is
			l.look(now, name, fleet, true, true, 10*time.Second)
			if is[name] = l.is; l.is != before {
				changes++
			}
		}
		for name, is := range is {
			fleet.Reports[name] = ravel.Report{Sessions: up, Withdrawn4: is}
		}
		now = now.Add(500 * time.Millisecond)
	}
	if changes != 3 || states["d1"].is || !states["d2"].is {
		t.Errorf("%d changes, d1 left: %t, d2 left: %t; want both to leave once and d1 to come back", changes, states["d1"].is, states["d2"].is)
	}
	// The first cannot announce, as it turns out: the next comes back.
	fleet.Reports["d3"] = ravel.Report{Sessions: map[netip.Addr]bool{}}
	states["d1"].is = true
	fleet.Reports["d1"] = ravel.Report{Sessions: up, Withdrawn4: true}
	for range 30 {
		states["d2"].look(now, "d2", fleet, true, true, 10*time.Second)
		now = now.Add(500 * time.Millisecond)
	}
	if states["d2"].is {
		t.Error("the first by name does not come back, and the next waits for ever")
	}
}

// A director that starts without its source while the fleet is frozen announces what it holds, if others want the same.
func TestAFrozenStartWithoutTheSource(t *testing.T) {
	for _, settlesFirst := range []bool{true, false} {
		w := three(t)
		w.set(ravel.DrainRegisterPrefix+"r1", "on")
		w.pass(20 * time.Second)
		w.set(ravel.FreezeRegister, "on")
		w.pass(2 * time.Second)
		d3 := w.directors["d3"]
		w.earlier(d3, 7)
		if !settlesFirst {
			d3.step()
			d3.step()
		}
		w.pass(30 * time.Second)
		if d3.withdraws() {
			t.Errorf("gossip settles first %t: it wants what others want, and announces nothing", settlesFirst)
		}
	}
}

// Whose inputs are the newest of all announces, though others are still there that heard the source in this life of theirs.
func TestTheNewestInputsAreNotOlder(t *testing.T) {
	w := newWorld(t, 2, 3)
	w.pods(1, 1, 1)
	w.startAll()
	w.pass(5 * time.Second)
	d1, d2 := w.directors["d1"], w.directors["d2"]
	d1.unheard = 7 // it lost the source before the change
	w.pods(1, 1, 2)
	d2.read()
	w.pass(20 * time.Second)
	w.earlier(d2, 1000)
	w.pass(time.Minute)
	if d2.withdraws() {
		t.Error("the director with the newest inputs withdraws")
	}
}
