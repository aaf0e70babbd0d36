package roster

import (
	"fmt"
	"maps"
	"math/rand/v2"
	"net/netip"
	"slices"
	"strings"
	"time"

	"github.com/ravel-lb/ravel"
)

var key = ravel.ServiceKey{VIP: netip.MustParseAddr("192.0.2.1"), Proto: ravel.TCP, Port: 80}

func addr(i int) netip.Addr { return netip.AddrFrom4([4]byte{10, 0, 0, byte(i)}) }

// world is a fleet of directors that only simulate time and gossip: each has its own copy of one roster, which reaches
// the others when the test says so.
type world struct {
	now       time.Time
	directors []*director
	ready     map[string]bool // what nodes say of their redirect; the others say nothing
	writes    int
	log       []string
}

type director struct {
	name   string
	keeper *Keeper
	wish   []Wish
	roster ravel.Roster
	hears  map[string]ravel.Report // of the others, as it last heard
	alive  map[string]bool         // whom it believes to be there
	down   bool
}

var timing = Timing{
	Batch: time.Second, Drain: time.Minute, Rise: 10 * time.Second, Skew: 2 * time.Second,
	Majority: 10 * time.Second, Tombstone: time.Hour,
}

func newWorld(n int) *world {
	w := &world{now: time.Unix(1e9, 0), ready: map[string]bool{}}
	for i := range n {
		w.directors = append(w.directors, &director{name: fmt.Sprintf("d%d", i+1)})
	}
	for _, d := range w.directors {
		d.restart(w)
	}
	return w
}

// restart starts a director anew: it knows nothing but what the fleet tells it.
func (d *director) restart(w *world) {
	d.keeper, d.roster, d.down = NewKeeper(d.name, timing), nil, false
	d.hears, d.alive = map[string]ravel.Report{}, map[string]bool{}
	for _, o := range w.directors {
		d.alive[o.name] = !o.down
		if o != d && !o.down {
			d.hear(o)
		}
	}
}

func (d *director) report() ravel.Report {
	var live strings.Builder
	for _, e := range d.roster {
		if e.State != ravel.Gone {
			fmt.Fprint(&live, e.Addr, e.State, e.Weight, " ")
		}
	}
	table := uint64(0)
	for _, b := range []byte(live.String()) {
		table = table*31 + uint64(b)
	}
	return ravel.Report{Services: map[ravel.ServiceKey]ravel.ServiceReport{key: {Wish: Hash(d.wish), Table: table}}}
}

func (d *director) fleet(w *world) ravel.Fleet {
	f := ravel.Fleet{Settled: true, Rosters: map[ravel.ServiceKey]ravel.Roster{key: d.roster}, Reports: map[string]ravel.Report{}}
	maps.Copy(f.Reports, d.hears)
	f.Reports[d.name] = d.report()
	for _, o := range w.directors {
		state := ravel.Alive
		if !d.alive[o.name] {
			state = ravel.Dead
		}
		f.Members = append(f.Members, ravel.Member{Name: o.name, Role: ravel.Director, State: state})
	}
	for node, ready := range w.ready {
		f.Members = append(f.Members, ravel.Member{Name: node, Role: ravel.Realserver})
		f.Reports[node] = ravel.Report{Redirects: map[ravel.ServiceKey]bool{key: ready}}
	}
	slices.SortFunc(f.Members, func(a, b ravel.Member) int { return strings.Compare(a.Name, b.Name) })
	return f
}

// act has a director decide, and returns whether it wrote anything.
func (d *director) act(w *world) bool {
	if d.down {
		return false
	}
	out := d.keeper.Advance(In{At: w.now, Fleet: d.fleet(w), Wishes: map[ravel.ServiceKey][]Wish{key: d.wish},
		Hashes: map[ravel.ServiceKey]uint64{key: Hash(d.wish)}})
	if changes := out.Write[key]; len(changes) > 0 {
		w.log = append(w.log, fmt.Sprintf("%s %s writes %+v", w.now.Sub(time.Unix(1e9, 0)), d.name, changes))
		d.roster = Merge(d.roster, changes...)
		w.writes++
		return true
	}
	for _, gone := range out.Forget[key] {
		d.roster = slices.DeleteFunc(slices.Clone(d.roster), func(e ravel.RosterEntry) bool { return e.Addr == gone && e.State == ravel.Gone })
	}
	return false
}

// hear merges all that another one knows.
func (d *director) hear(o *director) {
	d.roster = Merge(d.roster, o.roster...)
	d.hears[o.name] = o.report()
}

// spread lets everybody hear everybody in an order by chance.
func (w *world) spread(r *rand.Rand) {
	for _, i := range r.Perm(len(w.directors)) {
		for _, j := range r.Perm(len(w.directors)) {
			d, o := w.directors[i], w.directors[j]
			if i != j && !d.down && !o.down && d.alive[o.name] && o.alive[d.name] {
				d.hear(o)
			}
		}
	}
}

// settle lets time pass until nobody has anything to say for two minutes, and returns how many writes it took.
func (w *world) settle(r *rand.Rand) int {
	before := w.writes
	for calm := 0; calm < 240; calm++ {
		for _, i := range r.Perm(len(w.directors)) {
			if w.directors[i].act(w) {
				calm = 0
			}
		}
		w.spread(r)
		w.now = w.now.Add(500 * time.Millisecond)
	}
	return w.writes - before
}

func live(r ravel.Roster) ravel.Roster {
	return slices.DeleteFunc(slices.Clone(r), func(e ravel.RosterEntry) bool { return e.State == ravel.Gone })
}

func words(r ravel.Roster) string {
	var b strings.Builder
	for _, e := range live(r) {
		fmt.Fprintf(&b, "%s %s %d\n", e.Addr, e.State, e.Weight)
	}
	return b.String()
}
