package roster

import (
	"math/rand/v2"
	"os"
	"slices"
	"strconv"
	"testing"
	"time"

	"github.com/ravel-lb/ravel"
)

func wishes(weights ...int) []Wish {
	var list []Wish
	for i, w := range weights {
		if w >= 0 {
			list = append(list, Wish{Addr: addr(i + 1), Node: "r" + strconv.Itoa(i+1), Weight: w})
		}
	}
	return list
}

// after is the entry of real server i as a story goes on.
func entry(i int, birth uint64, state ravel.RosterState, weight int) ravel.RosterEntry {
	e := ravel.RosterEntry{Addr: addr(i), Birth: birth, State: state, Weight: weight}
	if state == ravel.Draining {
		e.By = "d1"
	}
	return e
}

// Each case is a row of the table in docs/fleet.md.
func TestRules(t *testing.T) {
	yes := Facts{Ready: func(Wish, ravel.RosterState) bool { return true }, DrainOver: func(ravel.RosterEntry) bool { return true }}
	no := Facts{Ready: func(Wish, ravel.RosterState) bool { return false }, DrainOver: func(ravel.RosterEntry) bool { return false }}
	for _, tt := range []struct {
		name   string
		roster ravel.Roster
		wishes []Wish
		may    Powers
		facts  Facts
		want   string
	}{
		{"a newcomer gets a place and no slots", nil, wishes(3), Full, no, "10.0.0.1 joining 0\n"},
		{"a newcomer whose node is ready takes flows at once", nil, wishes(3), Full, yes, "10.0.0.1 active 3\n"},
		{"newcomers come while others wish differently", nil, wishes(3), Add, no, "10.0.0.1 joining 0\n"},
		{"nothing is written without a say", nil, wishes(3), None, yes, ""},
		{"the newest is first, and of one birth the highest address", ravel.Roster{entry(1, 4, ravel.Active, 1)}, wishes(1, 1, 1), Full, yes,
			"10.0.0.3 active 1\n10.0.0.2 active 1\n10.0.0.1 active 1\n"},
		{"it rises when its node is ready", ravel.Roster{entry(1, 1, ravel.Joining, 0)}, wishes(5), Add, yes, "10.0.0.1 active 5\n"},
		{"it waits while its node is not", ravel.Roster{entry(1, 1, ravel.Joining, 0)}, wishes(5), Full, no, "10.0.0.1 joining 0\n"},
		{"one that never rose is gone at once", ravel.Roster{entry(1, 1, ravel.Joining, 0)}, nil, Full, no, ""},
		{"weights follow when all agree", ravel.Roster{entry(1, 1, ravel.Active, 5)}, wishes(6), Full, no, "10.0.0.1 active 6\n"},
		{"weights stay while they do not", ravel.Roster{entry(1, 1, ravel.Active, 5)}, wishes(6), Add, no, "10.0.0.1 active 5\n"},
		{"one that nobody wants drains and keeps its slots", ravel.Roster{entry(1, 1, ravel.Active, 5), entry(2, 1, ravel.Active, 1)}, wishes(-1, 1), Full, no,
			"10.0.0.2 active 1\n10.0.0.1 draining 5\n"},
		{"it stays while others wish differently", ravel.Roster{entry(1, 1, ravel.Active, 5), entry(2, 1, ravel.Active, 1)}, wishes(-1, 1), Add, yes,
			"10.0.0.2 active 1\n10.0.0.1 active 5\n"},
		{"not before another takes its flows", ravel.Roster{entry(1, 1, ravel.Active, 5), entry(2, 2, ravel.Joining, 0)}, wishes(-1, 1), Full, no,
			"10.0.0.2 joining 0\n10.0.0.1 active 5\n"},
		{"the last one drains when none is wanted", ravel.Roster{entry(1, 1, ravel.Active, 5)}, nil, Full, no, "10.0.0.1 draining 5\n"},
		{"a drain ends", ravel.Roster{entry(1, 1, ravel.Draining, 5)}, nil, Full, yes, ""},
		{"not while it has pods that go", ravel.Roster{entry(1, 1, ravel.Draining, 5)}, wishes(0), Full, yes, "10.0.0.1 draining 5\n"},
		{"one that drains comes back to its old place", ravel.Roster{entry(2, 2, ravel.Active, 1), entry(1, 1, ravel.Draining, 5)}, wishes(4, 1), Full, yes,
			"10.0.0.2 active 1\n10.0.0.1 active 4\n"},
		{"but not before its node is ready", ravel.Roster{entry(1, 1, ravel.Draining, 5)}, wishes(4), Full, no, "10.0.0.1 draining 5\n"},
		{"one that was gone comes back to a new place", ravel.Roster{entry(2, 2, ravel.Active, 1), entry(1, 1, ravel.Gone, 0)}, wishes(4, 1), Full, yes,
			"10.0.0.1 active 4\n10.0.0.2 active 1\n"},
		{"not while others wish differently", ravel.Roster{entry(2, 2, ravel.Active, 1), entry(1, 1, ravel.Gone, 0)}, wishes(4, 1), Add, yes,
			"10.0.0.2 active 1\n"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			slices.SortFunc(tt.roster, ravel.RosterEntry.Compare)
			got := Merge(tt.roster, next("d1", tt.roster, tt.wishes, tt.may, tt.facts)...)
			if words(got) != tt.want {
				t.Errorf("the roster becomes\n%swant\n%s", words(got), tt.want)
			}
		})
	}
}

func seeds(t *testing.T) []uint64 {
	list := []uint64{1, 2, 3, 4, 5, rand.Uint64()}
	if text := os.Getenv("RAVEL_TEST_SEED"); text != "" {
		seed, err := strconv.ParseUint(text, 10, 64)
		if err != nil {
			t.Fatal(err)
		}
		list = []uint64{seed}
	}
	return list
}

// Random histories: inputs that reach the directors at different times, nodes that are slow or silent, directors that
// crash between any two steps and come back empty, partitions. Afterwards all rosters are equal and are what is wished;
// and who stayed all the time kept its place.
func TestRandomHistoriesConverge(t *testing.T) {
	for _, seed := range seeds(t) {
		for round := range 6 {
			r := rand.New(rand.NewPCG(seed, uint64(round)))
			w := newWorld(1 + r.IntN(4))
			current := wishes(1, 1, 1)
			for _, d := range w.directors {
				d.wish = current
			}
			for range 60 {
				switch d := w.directors[r.IntN(len(w.directors))]; r.IntN(9) {
				case 0: // the inputs change
					weights := make([]int, 6)
					for i := range weights {
						weights[i] = r.IntN(5) - 1
					}
					current = wishes(weights...)
					d.wish = current
				case 1, 2:
					d.wish = current
				case 3:
					w.ready["r"+strconv.Itoa(1+r.IntN(6))] = true
				case 4:
					delete(w.ready, "r"+strconv.Itoa(1+r.IntN(6)))
				case 5:
					d.down = true
					for _, o := range w.directors {
						o.alive[d.name] = false
					}
				case 6:
					if d.down {
						d.restart(w)
						for _, o := range w.directors {
							o.alive[d.name] = true
						}
					}
				case 7: // a partition, or the end of one
					o := w.directors[r.IntN(len(w.directors))]
					cut := r.IntN(2) == 0
					if o != d && !o.down && !d.down {
						d.alive[o.name], o.alive[d.name] = !cut, !cut
					}
				case 8:
					w.spread(r)
				}
				for _, i := range r.Perm(len(w.directors)) {
					if r.IntN(2) == 0 {
						w.directors[i].act(w)
					}
				}
				w.now = w.now.Add(time.Duration(r.IntN(3000)) * time.Millisecond)
			}
			for _, d := range w.directors {
				if d.down {
					d.restart(w)
				}
			}
			for _, d := range w.directors {
				d.wish = current
				for _, o := range w.directors {
					d.alive[o.name] = true
				}
			}
			w.settle(r)
			want := map[string]int{}
			for _, wish := range current {
				if wish.Weight > 0 {
					want[wish.Addr.String()] = wish.Weight
				}
			}
			for _, d := range w.directors {
				if words(d.roster) != words(w.directors[0].roster) {
					t.Fatalf("seed %d round %d: %s has\n%s%s has\n%s", seed, round, w.directors[0].name, words(w.directors[0].roster), d.name, words(d.roster))
				}
			}
			got := map[string]int{}
			for _, e := range live(w.directors[0].roster) {
				if e.State == ravel.Active {
					got[e.Addr.String()] = e.Weight
				} else if at := slices.IndexFunc(current, func(x Wish) bool { return x.Addr == e.Addr && x.Weight == 0 }); at < 0 {
					t.Fatalf("seed %d round %d: %s is %s still", seed, round, e.Addr, e.State)
				}
			}
			if len(got) != len(want) {
				t.Fatalf("seed %d round %d: active are %v, want %v", seed, round, got, want)
			}
			for a, weight := range want {
				if got[a] != weight {
					t.Fatalf("seed %d round %d: active are %v, want %v", seed, round, got, want)
				}
			}
			before := w.directors[0].roster
			if n := w.settle(r); n != 0 {
				t.Fatalf("seed %d round %d: %d writes after all was calm", seed, round, n)
			}
			if words(before) != words(w.directors[0].roster) {
				t.Fatalf("seed %d round %d: a calm roster changed", seed, round)
			}
		}
	}
}

// A director with other inputs than the rest, for ever: the rosters come to rest all the same.
func TestDirectorsThatDifferDoNotFight(t *testing.T) {
	for _, n := range []int{2, 3, 4} {
		r := rand.New(rand.NewPCG(1, uint64(n)))
		w := newWorld(n)
		for _, d := range w.directors {
			d.wish = wishes(2, 2, 2, -1)
		}
		w.settle(r)
		w.directors[0].wish = wishes(2, -1, 3, 2)
		if writes := w.settle(r); writes > 6 {
			t.Errorf("%d directors, one of which differs: %d writes until they rest:\n%s", n, writes, w.log)
		}
		if writes := w.settle(r); writes != 0 {
			t.Errorf("%d directors, one of which differs: they never rest", n)
		}
		for _, d := range w.directors {
			if words(d.roster) != words(w.directors[0].roster) {
				t.Errorf("%d directors: %s has\n%s%s has\n%s", n, w.directors[0].name, words(w.directors[0].roster), d.name, words(d.roster))
			}
		}
	}
}

// A rolling update: the weights change twenty times a second for ten seconds, and one director after the other looks.
func TestChangesAreBatched(t *testing.T) {
	w := newWorld(3)
	for i := range 6 {
		w.ready["r"+strconv.Itoa(i+1)] = true
	}
	r := rand.New(rand.NewPCG(1, 1))
	for i := range 200 {
		wish := wishes(1+i%7, 1+i%5, 1+i%3)
		for _, d := range w.directors {
			d.wish = wish
		}
		w.spread(r)
		w.directors[i%3].act(w)
		w.now = w.now.Add(50 * time.Millisecond)
	}
	if w.writes < 5 || w.writes > 11 {
		t.Errorf("the roster was written %d times in 10 s", w.writes)
	}
}

// A service that is taken away and given back at once, as by an edit that is undone, takes flows again without a wait
// when all of its real servers can; while one's agent has not yet heard of it, for a batch all wait for that one.
func TestAServiceComesBackAtOnce(t *testing.T) {
	w := newWorld(3)
	r := rand.New(rand.NewPCG(1, 1))
	say := func(wish []Wish) {
		for _, d := range w.directors {
			d.wish = wish
		}
		for range 3 {
			w.spread(r)
			for _, d := range w.directors {
				d.act(w)
			}
		}
		w.now = w.now.Add(50 * time.Millisecond)
	}
	w.ready["r1"], w.ready["r2"] = true, true
	say(wishes(3, 2))
	w.now = w.now.Add(time.Minute)
	const draining, active = "10.0.0.2 draining 2\n10.0.0.1 draining 3\n", "10.0.0.2 active 2\n10.0.0.1 active 3\n"
	for _, step := range []struct {
		wish  []Wish
		deaf  bool          // r2 has not heard of it
		after time.Duration // the step before
		want  string
	}{
		{nil, false, 0, draining},
		{wishes(3, 2), false, 0, active},
		{nil, true, time.Minute, draining},
		{wishes(3, 2), true, 0, draining},
		{wishes(3, 2), false, 500 * time.Millisecond, active},
		{nil, true, time.Minute, draining},
		{wishes(3, 2), true, 0, draining},
		{wishes(3, 2), true, time.Second, "10.0.0.2 draining 2\n10.0.0.1 active 3\n"},
	} {
		w.now = w.now.Add(step.after)
		w.ready["r2"] = !step.deaf
		say(step.wish)
		for _, d := range w.directors {
			if got := words(d.roster); got != step.want {
				t.Errorf("%s after %v:\n%swant\n%s", d.name, step.wish, got, step.want)
			}
		}
	}
}

func TestMergeIsAJoin(t *testing.T) {
	r := rand.New(rand.NewPCG(rand.Uint64(), 1))
	random := func() ravel.Roster {
		var roster ravel.Roster
		for i := range 4 {
			roster = Merge(roster, ravel.RosterEntry{
				Addr: addr(1 + i), Birth: uint64(r.IntN(3)), Rev: uint64(r.IntN(3)), State: ravel.RosterState(r.IntN(4)), Weight: r.IntN(3),
			})
		}
		return roster
	}
	for range 2000 {
		a, b, c := random(), random(), random()
		if !slices.Equal(Merge(a, b...), Merge(b, a...)) {
			t.Fatalf("%v and %v do not commute", a, b)
		}
		if !slices.Equal(Merge(Merge(a, b...), c...), Merge(a, Merge(b, c...)...)) {
			t.Fatalf("%v, %v and %v do not associate", a, b, c)
		}
		if !slices.Equal(Merge(a, a...), a) {
			t.Fatalf("%v merged with itself is %v", a, Merge(a, a...))
		}
	}
}

func TestSeed(t *testing.T) {
	list := []ravel.RealServer{{Addr: addr(2), Weight: 3, LastWeight: 3}, {Addr: addr(1)}, {Addr: addr(3), Weight: 1, LastWeight: 1}}
	saved := ravel.Roster{entry(2, 9, ravel.Active, 3), entry(1, 7, ravel.Draining, 4), entry(7, 6, ravel.Gone, 0), entry(3, 5, ravel.Active, 1)}
	if !Fits(saved, list) {
		t.Error("a saved roster that made the list does not fit it")
	}
	for name, other := range map[string]ravel.Roster{
		"another order": {saved[1], saved[0], saved[3]}, "one less": {saved[0], saved[1]},
		"one more": {saved[0], saved[1], saved[3], entry(8, 1, ravel.Active, 1)}, "another weight": {entry(2, 9, ravel.Active, 2), saved[1], saved[3]},
	} {
		if Fits(other, list) {
			t.Errorf("%s fits", name)
		}
	}
	want := "10.0.0.2 active 3\n10.0.0.1 draining 4\n10.0.0.3 active 1\n"
	if got := Seed("d1", list, nil, saved); words(got) != want || !slices.IsSortedFunc(got, ravel.RosterEntry.Compare) {
		t.Errorf("the seed is\n%swant\n%s", words(got), want)
	}
	want = "10.0.0.2 active 3\n10.0.0.1 draining 6\n10.0.0.3 active 1\n"
	if got := Seed("d1", list, wishes(6), nil); words(got) != want {
		t.Errorf("the seed is\n%swant\n%s", words(got), want)
	}
}

func TestHash(t *testing.T) {
	a := wishes(1, 2, 3)
	b := slices.Clone(a)
	slices.Reverse(b)
	if Hash(a) != Hash(b) || Hash(a) == Hash(wishes(1, 2)) || Hash(a) == Hash(wishes(1, 2, 4)) || Hash(nil) != 0 {
		t.Error("hashes are not equal just for equal wishes")
	}
	if got := Hash(a); got != 0x3c8cebc15607b901 {
		t.Errorf("the hash is %#x: other releases of a fleet compute another", got)
	}
}
