package gossip

import (
	"fmt"
	"maps"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"
	"time"
)

// dump is all that a store holds, as text.
func (s *store) dump() string {
	var lines []string
	for _, c := range s.cells {
		lines = append(lines, fmt.Sprintf("%d %q %q %d.%d %q %q", c.topic, c.author, c.name, c.hi, c.lo, c.value, c.unknown))
	}
	slices.Sort(lines)
	return strings.Join(lines, "\n")
}

// check looks whether all that a store keeps beside its cells is as if it were made anew.
func (s *store) check(t *testing.T) {
	t.Helper()
	fresh := newStore(s.limit, s.tree != nil)
	for name, a := range s.authors {
		fresh.setPresent(name, a.present)
	}
	for _, c := range s.cells {
		fresh.put(c)
	}
	if s.dump() != fresh.dump() {
		t.Fatalf("cells of an older life are still there:\n%s\nwant\n%s", s.dump(), fresh.dump())
	}
	for name, a := range fresh.authors {
		if got := s.authors[name].tombstones; got != a.tombstones {
			t.Fatalf("%s has %d tombstones, want %d", name, got, a.tombstones)
		}
	}
	if s.tree == nil {
		return
	}
	if s.tree.root != fresh.tree.root || s.tree.group != fresh.tree.group || s.tree.n != fresh.tree.n {
		t.Fatal("the tree's sums are wrong")
	}
	n := 0
	s.tree.each(span{}, func(*cell) { n++ })
	m := 0
	fresh.tree.each(span{}, func(*cell) { m++ })
	if n != m {
		t.Fatalf("%d cells in the tree, want %d", n, m)
	}
}

// randomCells are versions of few keys, so that they meet.
func randomCells(r *rand.Rand, n int) []*cell {
	var all []*cell
	for range n {
		k := key{topic: topicRoster, name: serviceName(service(r.IntN(3))) + addrName(at(r.IntN(3)).Addr())}
		switch r.IntN(5) {
		case 0:
			k = key{topic: topicRegister, name: fmt.Sprint(r.IntN(2))}
		case 1, 2:
			k = key{topicService, fmt.Sprint("a", r.IntN(3)), serviceName(service(r.IntN(3)))}
		case 3:
			k = key{topicRedirect + uint32(r.IntN(3)), fmt.Sprint("a", r.IntN(3)), serviceName(service(r.IntN(3)))}
		}
		value := []string{"", "a", "b", "\x08\x01"}[r.IntN(4)]
		unknown := []string{"", "", "\x4a\x01x"}[r.IntN(3)]
		all = append(all, newCell(k, rank{uint64(1 + r.IntN(4)), uint64(r.IntN(4))}, value, unknown))
	}
	return all
}

// Merging commutes, associates and is idempotent: stores that saw the same cells, in whatever order and however often,
// by themselves or by way of other stores, hold the same.
func TestMergeIsALattice(t *testing.T) {
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	r := rand.New(rand.NewPCG(seed, 0))
	for range 300 {
		cells := randomCells(r, 60)
		var stores []*store
		for range 4 {
			s := newStore(1000, true)
			for n := range 3 {
				s.setPresent(fmt.Sprint("a", n), true)
			}
			stores = append(stores, s)
		}
		// One gets all in order; two get half each, and double, and then each other's; one gets them from these.
		for i, c := range cells {
			stores[0].merge(c)
			stores[1+i%2].merge(c)
		}
		for _, i := range r.Perm(2 * len(cells)) {
			stores[1+i%len(cells)%2].merge(cells[i%len(cells)])
		}
		pour := func(from, to *store) {
			held := slices.Collect(maps.Values(from.cells))
			r.Shuffle(len(held), func(i, j int) { held[i], held[j] = held[j], held[i] })
			for _, c := range held {
				to.merge(c)
			}
		}
		pour(stores[1], stores[2])
		pour(stores[2], stores[1])
		pour(stores[1], stores[3])
		for i, s := range stores {
			s.check(t)
			if s.dump() != stores[0].dump() || s.tree.root != stores[0].tree.root {
				t.Fatalf("store %d holds\n%s\nstore 0\n%s", i, s.dump(), stores[0].dump())
			}
			for _, c := range cells {
				if o := s.merge(c); o != same && o != stale {
					t.Fatalf("merging again did something: %d", o)
				}
			}
		}
	}
}

// Presence, removal and forgetting keep the store whole too.
func TestStoreWalk(t *testing.T) {
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	r := rand.New(rand.NewPCG(seed, 0))
	for range 50 {
		s := newStore(1000, true)
		for n := range 200 {
			author := fmt.Sprint("a", r.IntN(3))
			switch r.IntN(8) {
			case 0:
				s.setPresent(author, r.IntN(2) == 0)
			case 1:
				s.forgetAuthor(author)
			case 2:
				for _, c := range s.cells {
					if c.author == "" {
						s.bury(c, time.Now())
						if o := s.merge(c); o != buried {
							t.Fatalf("a forgotten cell came back: %d", o)
						}
					}
					break
				}
			default:
				s.merge(randomCells(r, 1)[0])
			}
			if n%10 == 0 {
				s.check(t)
			}
		}
	}
}

func TestRefused(t *testing.T) {
	s := newStore(3, true)
	for _, test := range []struct {
		cell *cell
		want outcome
	}{
		{newCell(key{topicRegister, "", "a"}, rank{utmost + 1, 0}, "x", ""), tooWild},
		{newCell(key{topicRegister, "", "a"}, rank{1, utmost + 1}, "x", ""), tooWild},
		{newCell(key{topicRegister, "", "a"}, rank{wild, 0}, "x", ""), taken}, // nothing was known of it
		{newCell(key{topicRegister, "", "a"}, rank{2*wild + 1, 0}, "x", ""), tooWild},
		{newCell(key{topicRegister, "", "a"}, rank{wild, wild + 1}, "x", ""), tooWild},
		{newCell(key{topicRegister, "", "a"}, rank{2 * wild, wild}, "x", ""), taken},
		{newCell(key{topicRegister, "", "a"}, rank{1, 1}, "x", ""), stale},
		{newCell(key{topicSelf, "a", ""}, rank{utmost + 1, 0}, "x", ""), tooWild},
		{newCell(key{topicRegister, "", strings.Repeat("x", maxKey+1)}, rank{1, 0}, "x", ""), tooBig},
		{newCell(key{topicRegister, "", "b"}, rank{1, 0}, strings.Repeat("x", maxValue), "y"), tooBig},
		{newCell(key{topicRegister, "", "b"}, rank{1, 0}, strings.Repeat("x", maxValue), ""), taken},
		{newCell(key{topicSelf, "a", ""}, rank{1, 0}, "x", ""), taken},
		{newCell(key{topicRegister, "", "c"}, rank{1, 0}, "x", ""), full},
		{newCell(key{topicSelf, "a", "n"}, rank{1, 0}, "x", ""), full},
		{newCell(key{topicSelf, "a", "n"}, rank{2, 0}, "x", ""), taken}, // a new life makes room
		{newCell(key{topicSelf, "a", ""}, rank{1, 9}, "x", ""), stale},
	} {
		if got := s.merge(test.cell); got != test.want {
			t.Errorf("%d %q %q %v: outcome %d, want %d", test.cell.topic, test.cell.author, test.cell.name, test.cell.rank, got, test.want)
		}
	}
	s.check(t)
}

func FuzzMerge(f *testing.F) {
	f.Add([]byte("\x01\x00\x00\x01\x01a\x12\x01\x00\x02\x01b\x12\x01\x00\x01\x02c"))
	f.Fuzz(func(t *testing.T, b []byte) {
		var cells []*cell
		for len(b) >= 6 && len(cells) < 64 {
			author := ""
			if b[1]%4 != 0 {
				author = string('a' + rune(b[1]%4))
			}
			cells = append(cells, newCell(key{uint32(b[0]%32) + 1, author, string(b[2:3])},
				rank{uint64(b[3]) + 1, uint64(b[4])}, string(b[5:6]), ""))
			b = b[6:]
		}
		one, two := newStore(1000, true), newStore(1000, true)
		for _, c := range cells {
			one.merge(c)
		}
		for _, c := range slices.Backward(cells) {
			two.merge(c)
			two.merge(c)
		}
		if one.dump() != two.dump() {
			t.Fatalf("forwards\n%s\nbackwards\n%s", one.dump(), two.dump())
		}
		for _, c := range two.cells {
			if o := one.merge(c); o != same {
				t.Fatalf("not idempotent: %d", o)
			}
		}
		one.check(t)
	})
}

// A digest of any span, from the tree and from a list, says the same.
func TestTreeIsAList(t *testing.T) {
	s := newStore(10000, true)
	var all list
	for n := range 3000 {
		c := newCell(key{topicRegister, "", fmt.Sprint(n)}, rank{1, 0}, "x", "")
		s.put(c)
		all = append(all, c)
	}
	all = newList(all)
	if s.tree.sum() != all.sum() {
		t.Fatal("sums differ")
	}
	for _, p := range []span{{}, {1, 0}, {1, 63}, {2, 4095}, {2, 1}, {3, 77}, {3, 200000}} {
		sums, counts := s.tree.children(p)
		sums2, counts2 := all.children(p)
		if sums != sums2 || counts != counts2 {
			t.Errorf("%v: children differ", p)
		}
		var a, b uint64
		s.tree.each(p, func(c *cell) { a ^= c.hash })
		all.each(p, func(c *cell) { b ^= c.hash })
		if a != b {
			t.Errorf("%v: cells differ", p)
		}
	}
}

// There is room for so many graves; the oldest go first, more or less.
func TestGraves(t *testing.T) {
	s := newStore(1000, true)
	s.maxGraves = 1000
	now := time.Now()
	for n := range 3000 {
		c := newCell(key{topicRegister, "", fmt.Sprint(n)}, rank{1, 0}, "x", "")
		s.put(c)
		s.bury(c, now.Add(time.Duration(n)))
	}
	if len(s.graves) != s.maxGraves || len(s.cells) != 0 {
		t.Errorf("%d graves, %d cells", len(s.graves), len(s.cells))
	}
	if s.openGraves(now.Add(time.Hour)); len(s.graves) != 0 {
		t.Error("graves are never opened")
	}
}
