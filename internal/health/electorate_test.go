package health

import (
	"cmp"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/ravel-lb/ravel"
)

var start = time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)

// membersOf reads "d1 d2:suspect r1:dead"; d are directors, r realservers, and who has no state is alive.
func membersOf(text string) []ravel.Member {
	var members []ravel.Member
	for _, word := range strings.Fields(text) {
		name, state, _ := strings.Cut(word, ":")
		m := ravel.Member{Name: name}
		if name[0] == 'r' {
			m.Role = ravel.Realserver
		}
		if state != "" {
			if err := m.State.UnmarshalText([]byte(state)); err != nil {
				panic(err)
			}
		}
		members = append(members, m)
	}
	slices.SortFunc(members, func(a, b ravel.Member) int { return cmp.Compare(a.Name, b.Name) })
	return members
}

func TestMajority(t *testing.T) {
	for _, c := range []struct {
		seen, voters int
		want         bool
	}{
		{0, 0, false}, {1, 0, true}, {1, 1, true}, {1, 2, false}, {2, 2, true}, {1, 3, false}, {2, 3, true}, {2, 4, false},
		{3, 4, true}, {51, 101, true}, {50, 101, false}, {0, 3, false},
	} {
		if got := Majority(c.seen, c.voters); got != c.want {
			t.Errorf("Majority(%d, %d) = %v", c.seen, c.voters, got)
		}
	}
}

// The table of docs/health.md, and each rule of Electorate.
func TestElectorate(t *testing.T) {
	type look struct {
		after   time.Duration
		members string
		want    string // seen of size, and + for a majority, ! for a sound one
	}
	for name, c := range map[string]struct {
		fixed int
		looks []look
	}{
		"one director": {looks: []look{{0, "d1", "1 of 1 +!"}}},
		"two directors, one dies": {looks: []look{
			{0, "d1 d2", "2 of 2 +!"},
			{time.Second, "d1 d2:suspect", "2 of 2 +"},
			{time.Second, "d1 d2:dead", "1 of 2"},
			{1000 * time.Hour, "d1 d2:dead", "1 of 2"},
			{time.Hour, "d1", "1 of 2"},
			{time.Hour, "d1 d2", "2 of 2 +!"},
		}},
		"two directors, one says goodbye": {looks: []look{
			{0, "d1 d2", "2 of 2 +!"},
			{time.Second, "d1 d2:left", "1 of 1 +!"},
			{time.Second, "d1 d2:left", "1 of 1 +!"},
			{time.Second, "d1", "1 of 1 +!"},
			{time.Second, "d1 d2", "2 of 2 +!"},
			{time.Second, "d1 d2:dead", "1 of 2"},
		}},
		"two directors, one restarts": {looks: []look{
			{0, "d1 d2", "2 of 2 +!"},
			{time.Second, "d1 d2:restarting", "1 of 1 +!"},
			{59 * time.Second, "d1 d2:restarting", "1 of 1 +!"},
			{time.Second, "d1 d2:restarting", "1 of 2"},
			{time.Second, "d1 d2", "2 of 2 +!"},
			{time.Second, "d1 d2:restarting", "1 of 1 +!"},
			{time.Second, "d1 d2:dead", "1 of 2"},
		}},
		"two directors and a witness lose a director": {looks: []look{
			{0, "d1 d2 r1", "3 of 3 +!"},
			{time.Second, "d1 d2:dead r1", "2 of 3 +!"},
			{time.Second, "d1 d2:dead r1:suspect", "2 of 3 +"},
			{time.Second, "d1 d2:dead r1:dead", "1 of 3"},
		}},
		"two directors and a witness lose the witness": {looks: []look{
			{0, "d1 d2 r1", "3 of 3 +!"},
			{time.Second, "d1 d2 r1:dead", "2 of 3 +!"},
			{time.Hour, "d1 d2 r1:dead", "2 of 2 +!"},
		}},
		"three directors, cut off": {looks: []look{
			{0, "d1 d2 d3", "3 of 3 +!"},
			{time.Second, "d1 d2:suspect d3", "3 of 3 +!"},
			{time.Second, "d1 d2:dead d3:suspect", "2 of 3 +"},
			{time.Second, "d1 d2:dead d3:dead", "1 of 3"},
			{100 * time.Hour, "d1 d2:dead d3:dead", "1 of 3"},
		}},
		"one an hour is forgotten while there is a majority": {looks: []look{
			{0, "d1 d2 r1 r2 r3 r4 r5", "7 of 7 +!"},
			{time.Second, "d1 d2 r1 r2 r3:dead r4:dead r5:dead", "4 of 7 +!"},
			{time.Hour - 1, "d1 d2 r1 r2 r3:dead r4:dead r5:dead", "4 of 7 +!"},
			{1, "d1 d2 r1 r2 r3:dead r4:dead r5:dead", "4 of 6 +!"},
			{time.Hour, "d1 d2 r1 r2 r4:dead r5:dead", "4 of 5 +!"},
			{time.Second, "d1 d2 r1 r2 r3", "5 of 5 +!"},
			{time.Hour, "d1 d2 r1 r2 r3", "5 of 5 +!"},
		}},
		"the hour starts anew with the majority": {looks: []look{
			{0, "d1 d2 d3", "3 of 3 +!"},
			{time.Second, "d1 d2 d3:dead", "2 of 3 +!"},
			{time.Hour - 1, "d1 d2:dead d3:dead", "1 of 3"},
			{time.Second, "d1 d2 d3:dead", "2 of 3 +!"},
			{time.Hour - 2*time.Second, "d1 d2 d3:dead", "2 of 3 +!"},
			{2 * time.Second, "d1 d2 d3:dead", "2 of 2 +!"},
		}},
		"whom it never saw alive does not count": {looks: []look{
			{0, "d1 d2:dead r1:left r2:restarting", "1 of 1 +!"},
			{time.Second, "d1 d2:left r1:dead r2:dead", "1 of 1 +!"},
		}},
		"names change": {looks: []look{
			{0, "d1 r1 r2", "3 of 3 +!"},
			{time.Second, "d1 r1:dead r2 r3", "3 of 3 +!"},
			{time.Second, "d1 r1:dead r2:dead r3 r4", "3 of 3 +!"},
			{time.Second, "d1 r1:dead r2:dead r3 r4 r5", "4 of 4 +!"},
		}},
		"a minority that leaves and returns one by one stays one": {looks: []look{
			{0, "d1 d2 r1 r2 r3 r4 r5", "7 of 7 +!"},
			{time.Second, "d1 d2:dead r1 r2 r3:dead r4:dead r5:dead", "3 of 7"},
			{time.Second, "d1 d2:dead r1:left r2 r3:dead r4:dead r5:dead", "2 of 6"},
			{time.Second, "d1 d2:dead r1 r2 r3:dead r4:dead r5:dead", "3 of 7"},
			{time.Second, "d1 d2:dead r1 r2:left r3:dead r4:dead r5:dead", "2 of 6"},
			{time.Second, "d1 d2:dead r1 r2 r3:dead r4:dead r5:dead", "3 of 7"},
		}},
		"all agents restart at once": {looks: []look{
			{0, "d1 d2 r1 r2 r3 r4 r5", "7 of 7 +!"},
			{time.Second, "d1 d2 r1:restarting r2:restarting r3:restarting r4:restarting r5:restarting", "2 of 2 +!"},
			{time.Second, "d1 d2 r1 r2:restarting r3:restarting r4:restarting r5", "4 of 4 +!"},
			{time.Minute, "d1 d2 r1 r2:restarting r3:restarting r4:restarting r5", "4 of 7 +!"},
		}},
		"a new one comes while one restarts": {looks: []look{
			{0, "d1 d2", "2 of 2 +!"},
			{time.Second, "d1 d2:restarting d3", "2 of 2 +!"},
			{time.Second, "d1 d2 d3", "3 of 3 +!"},
		}},
		"many are suspected": {looks: []look{
			{0, "d1 r1 r2 r3 r4 r5 r6 r7", "8 of 8 +!"},
			{time.Second, "d1 r1:suspect r2:suspect r3 r4 r5 r6 r7", "8 of 8 +!"},
			{time.Second, "d1 r1:suspect r2:suspect r3:suspect r4 r5 r6 r7", "8 of 8 +"},
		}},
		"a set size": {fixed: 3, looks: []look{
			{0, "d1", "1 of 3"},
			{time.Second, "d1 d2", "2 of 3 +!"},
			{time.Second, "d1 d2 r1", "3 of 3 +!"},
			{time.Second, "d1 d2:left r1", "2 of 3 +!"},
			{time.Second, "d1 d2:left r1:left", "1 of 3"},
			{100 * time.Hour, "d1 d2:left r1:left", "1 of 3"},
			{time.Second, "d1 d2 r1", "3 of 3 +!"},
			{time.Second, "d1 d2:dead r1:restarting", "1 of 2"},
			{time.Second, "d1 d2 r1 r2", "4 of 4 +!"},
			{time.Second, "d1 d2:dead r1 r2:dead", "2 of 3 +!"},
		}},
	} {
		t.Run(name, func(t *testing.T) {
			var e Electorate
			now := start
			for i, l := range c.looks {
				now = now.Add(l.after)
				e, _ = e.Next(now, membersOf(l.members), c.fixed, time.Minute)
				got := strings.TrimSpace(fmt.Sprintf("%d of %d %s%s", e.Seen, e.Size,
					map[bool]string{true: "+"}[e.Majority()], map[bool]string{true: "!"}[e.Sound()]))
				if got != l.want {
					t.Errorf("look %d, %s: %s, want %s", i, l.members, got, l.want)
				}
			}
		})
	}
}

// A fleet that falls into two parts never has a majority in both, however long it lasts, as long as nobody new comes,
// says goodbye for good or restarts meanwhile.
func TestTwoPartsNeverBothHaveAMajority(t *testing.T) {
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	rnd := rand.New(rand.NewPCG(seed, 0))
	for range runs(50) {
		n := 2 + rnd.IntN(9)
		var sides [2]Electorate
		dead := make([]bool, n)
		part := make([]int, n)
		for i := range part {
			part[i] = rnd.IntN(2)
		}
		// Before the cut all see all.
		now := start
		look := func(cut bool) {
			for side := range sides {
				var members []ravel.Member
				for i := range n {
					m := ravel.Member{Name: fmt.Sprintf("d%d", i)}
					if dead[i] || cut && part[i] != side {
						m.State = ravel.Dead
					}
					members = append(members, m)
				}
				sides[side], _ = sides[side].Next(now, members, 0, time.Minute)
			}
		}
		look(false)
		for range 50 {
			now = now.Add(time.Duration(rnd.Int64N(int64(90 * time.Minute))))
			if i := rnd.IntN(n); rnd.IntN(3) == 0 {
				dead[i] = !dead[i]
			}
			look(true)
			if sides[0].Majority() && sides[1].Majority() {
				t.Fatalf("%d of %d and %d of %d", sides[0].Seen, sides[0].Size, sides[1].Seen, sides[1].Size)
			}
		}
	}
}
