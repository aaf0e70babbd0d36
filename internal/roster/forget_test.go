package roster

import (
	"math/rand/v2"
	"testing"
	"time"

	"github.com/ravel-lb/ravel"
)

// Of a service that came with many real servers and went, one tombstone is left.
func TestAServiceThatWentIsForgotten(t *testing.T) {
	w := newWorld(2)
	r := rand.New(rand.NewPCG(1, 1))
	many := wishes(1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1)
	for _, wish := range many {
		w.ready[wish.Node] = true
	}
	for _, d := range w.directors {
		d.wish = many
	}
	w.settle(r)
	for _, d := range w.directors {
		d.wish = nil
	}
	for range 3 {
		w.settle(r)
		w.now = w.now.Add(100 * time.Hour)
	}
	for _, d := range w.directors {
		if len(d.roster) != 1 || d.roster[0].State != ravel.Gone {
			t.Errorf("%s: %d entries are left: %v", d.name, len(d.roster), d.roster)
		}
	}
}
