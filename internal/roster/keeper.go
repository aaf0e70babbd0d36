package roster

import (
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"time"

	"github.com/ravel-lb/ravel"
	"github.com/ravel-lb/ravel/internal/setdiff"
)

// Timing is how long a Keeper waits for what.
type Timing struct {
	// Batch is the least time between two changes of one service's roster, whichever director writes them, so that a
	// rolling update is not a hundred tables, and newcomers that are ready at about the same time rise together. The
	// first change after a calm comes at once. So does the return of a service that nobody takes flows for, when all of
	// it can return: without some, flows that they have and that come to another director would find another place.
	Batch time.Duration
	// Drain is how long a real server keeps its slots and flows after it takes no new ones.
	Drain time.Duration
	// Rise is how long a newcomer waits whose node does not say whether the redirect is there.
	Rise time.Duration
	// Skew is how long directors may wish differently before newcomers come all the same: inputs do not reach all at
	// the same moment.
	Skew time.Duration
	// Majority is how long directors may wish differently before the majority of them decides.
	Majority time.Duration
	// Tombstone is how long one that is gone is remembered at least.
	Tombstone time.Duration
}

// In is what a Keeper looks at. Nothing of it is changed.
type In struct {
	At     time.Time
	Fleet  ravel.Fleet
	Wishes map[ravel.ServiceKey][]Wish // of every service of the inputs, also of those without a real server
	Hashes map[ravel.ServiceKey]uint64 // of Wishes
}

// Out is what a Keeper says.
type Out struct {
	Write    map[ravel.ServiceKey][]ravel.RosterEntry // to be merged into the fleet's rosters
	Forget   map[ravel.ServiceKey][]netip.Addr        // entries that are gone, and may be forgotten
	Problems []ravel.Problem
	Wake     time.Time // when time alone changes something; zero is never
}

// Keeper decides what one director writes into the rosters, and when. Its methods are for one goroutine.
type Keeper struct {
	self   string
	timing Timing

	services map[ravel.ServiceKey]*clocks
}

// clocks are since when things are so, of one service, as this director saw them.
type clocks struct {
	changed   time.Time                // the roster, by whomever
	disagrees time.Time                // zero while the directors agree
	joining   map[netip.Addr]time.Time // waits to rise
	draining  map[netip.Addr]time.Time
	gone      map[netip.Addr]time.Time
	unsaid    map[netip.Addr]string // took flows though their node did not say that it is ready: the node

	// With calm, nothing was to be done, and nothing waited, while the roster and the wishes were these.
	calm   bool
	roster ravel.Roster
	wishes []Wish
}

// NewKeeper returns the keeper of a director.
func NewKeeper(self string, timing Timing) *Keeper {
	return &Keeper{self: self, timing: timing, services: map[ravel.ServiceKey]*clocks{}}
}

// Advance returns what to write now. It may be called as often as is liked; when nothing changed it says the same.
func (k *Keeper) Advance(in In) Out {
	a := advance{Keeper: k, In: in, deciders: deciders(in.Fleet, k.self), out: Out{
		Write: map[ravel.ServiceKey][]ravel.RosterEntry{}, Forget: map[ravel.ServiceKey][]netip.Addr{},
	}}
	for key, wishes := range in.Wishes {
		a.service(key, wishes)
	}
	for key := range in.Fleet.Rosters {
		if _, wished := in.Wishes[key]; !wished {
			a.service(key, nil)
		}
	}
	for key := range k.services {
		if _, wished := in.Wishes[key]; !wished && len(in.Fleet.Rosters[key]) == 0 {
			delete(k.services, key)
		}
	}
	slices.SortFunc(a.out.Problems, ravel.Problem.Compare)
	return a.out
}

// deciders are the live directors that say what they wish. One that has just started, or does not speak of it, does
// not count.
func deciders(fleet ravel.Fleet, self string) []string {
	names := []string{self}
	for _, m := range fleet.Live(ravel.Director) {
		if m.Name != self && fleet.Reports[m.Name].Services != nil {
			names = append(names, m.Name)
		}
	}
	return names
}

// advance is one Advance under way.
type advance struct {
	*Keeper
	In
	deciders []string
	out      Out
}

func (a *advance) wake(at time.Time) {
	if a.out.Wake.IsZero() || at.Before(a.out.Wake) {
		a.out.Wake = at
	}
}

// after reports whether a time is over that began at since, and sees to it that it is asked again when it is.
func (a *advance) after(since time.Time, wait time.Duration) bool {
	end := since.Add(wait)
	if a.At.Before(end) {
		a.wake(end)
		return false
	}
	return true
}

func (a *advance) service(key ravel.ServiceKey, wishes []Wish) {
	c, known := a.services[key]
	if !known {
		c = &clocks{
			joining: map[netip.Addr]time.Time{}, draining: map[netip.Addr]time.Time{}, gone: map[netip.Addr]time.Time{},
			unsaid: map[netip.Addr]string{},
		}
		a.services[key] = c
	}
	roster := a.Fleet.Rosters[key]
	may := a.powers(key, c)
	if c.calm && may == Full && setdiff.Same(c.roster, roster) && setdiff.Same(c.wishes, wishes) {
		return
	}
	if known && !setdiff.Same(c.roster, roster) && !slices.Equal(c.roster, roster) {
		c.changed = a.At
	}
	c.note(roster, wishes, a.At)
	facts := Facts{
		Ready:     func(w Wish, was ravel.RosterState) bool { return a.ready(key, w, was, c) },
		DrainOver: func(e ravel.RosterEntry) bool { return a.mine(key, e) && a.after(c.draining[e.Addr], a.timing.Drain) },
	}
	maps.DeleteFunc(c.unsaid, func(addr netip.Addr, node string) bool {
		return a.Fleet.Reports[node].Redirects[key] || !slices.ContainsFunc(wishes, func(w Wish) bool { return w.Addr == addr && w.Weight > 0 })
	})
	changes := next(a.self, roster, wishes, may, facts)
	if len(changes) > 0 && (c.changed.IsZero() || resumes(roster, changes, wishes) || a.after(c.changed, a.timing.Batch)) {
		c.changed = a.At
		a.out.Write[key] = changes
	}
	for _, node := range c.unsaid {
		a.out.Problems = append(a.out.Problems, ravel.Problem{
			Where: "nodes." + node,
			What:  fmt.Sprintf("did not say within %s that its redirect of %s is in place, and takes flows all the same", a.timing.Rise, key),
			Fix:   "run ravel realserver there, in this fleet",
		})
	}
	if may == Full && len(c.gone) > 0 {
		a.forget(key, roster, c)
	}
	c.roster, c.wishes = roster, wishes
	c.calm = may == Full && len(changes) == 0 && len(c.joining)+len(c.draining)+len(c.gone)+len(c.unsaid) == 0
}

// resumes reports whether nobody of a roster takes new flows, and by the changes all take them that are wished to.
func resumes(r ravel.Roster, changes []ravel.RosterEntry, wishes []Wish) bool {
	if slices.ContainsFunc(r, func(e ravel.RosterEntry) bool { return e.State == ravel.Active }) {
		return false
	}
	returns := false
	for _, w := range wishes {
		at := slices.IndexFunc(changes, func(e ravel.RosterEntry) bool { return e.Addr == w.Addr && e.State == ravel.Active })
		if w.Weight > 0 && at < 0 {
			return false
		}
		returns = returns || w.Weight > 0
	}
	return returns
}

// note starts and stops the clocks of a service's entries.
func (c *clocks) note(roster ravel.Roster, wishes []Wish, now time.Time) {
	keep := func(clocks map[netip.Addr]time.Time, runs func(ravel.RosterEntry) bool) {
		running := map[netip.Addr]bool{}
		for _, e := range roster {
			if runs(e) {
				running[e.Addr] = true
				if _, already := clocks[e.Addr]; !already {
					clocks[e.Addr] = now
				}
			}
		}
		maps.DeleteFunc(clocks, func(addr netip.Addr, _ time.Time) bool { return !running[addr] })
	}
	wished := make(map[netip.Addr]int, len(wishes))
	for _, w := range wishes {
		wished[w.Addr] = w.Weight
	}
	// The drain of one that still has pods, all of them going, ends only after they are gone.
	keep(c.draining, func(e ravel.RosterEntry) bool {
		_, has := wished[e.Addr]
		return e.State == ravel.Draining && !has
	})
	keep(c.gone, func(e ravel.RosterEntry) bool { return e.State == ravel.Gone })
	// One that comes for the first time is in no roster yet.
	rising := map[netip.Addr]bool{}
	for _, w := range wishes {
		e, there := roster.Find(w.Addr)
		if w.Weight > 0 && (!there || e.State != ravel.Active) {
			rising[w.Addr] = true
			if _, already := c.joining[w.Addr]; !already {
				c.joining[w.Addr] = now
			}
		}
	}
	maps.DeleteFunc(c.joining, func(addr netip.Addr, _ time.Time) bool { return !rising[addr] })
}

// powers say what may be written of a service.
func (a *advance) powers(key ravel.ServiceKey, c *clocks) Powers {
	if !a.Fleet.Settled || a.Fleet.Frozen() {
		return None
	}
	mine, same := a.Hashes[key], 1
	for _, name := range a.deciders[1:] {
		if a.Fleet.Reports[name].Services[key].Wish == mine {
			same++
		}
	}
	if same == len(a.deciders) {
		c.disagrees = time.Time{}
		return Full
	}
	if c.disagrees.IsZero() {
		c.disagrees = a.At
	}
	if a.after(c.disagrees, a.timing.Majority) {
		a.out.Problems = append(a.out.Problems, ravel.Problem{
			Where: key.String(),
			What:  fmt.Sprintf("%d of %d directors want other real servers or weights than this one", len(a.deciders)-same, len(a.deciders)),
			Fix:   "see that all directors get the same static file; ravel members shows who differs",
		})
		if 2*same > len(a.deciders) {
			return Full
		}
		return Add
	}
	if a.after(c.disagrees, a.timing.Skew) {
		return Add
	}
	return None
}

// ready reports whether a real server may take its first flow: its node says that the redirect is in place, or says
// nothing of redirects and has had time enough.
func (a *advance) ready(key ravel.ServiceKey, w Wish, was ravel.RosterState, c *clocks) bool {
	report := a.Fleet.Reports[w.Node]
	if report.Redirects[key] || was == ravel.Draining && report.Redirects == nil {
		return true // a redirect that nobody reports stayed while it drained, as far as anybody knows
	}
	if !a.after(c.joining[w.Addr], a.timing.Rise) {
		return false
	}
	m, member := a.Fleet.Member(w.Node)
	if member && m.State.Live() && report.Redirects != nil {
		a.out.Problems = append(a.out.Problems, ravel.Problem{
			Where: "nodes." + w.Node,
			What:  fmt.Sprintf("says that its redirect of %s is not in place, so it takes no flows", key),
			Fix:   "look at ravel check and the log of the realserver there",
		})
		return false
	}
	c.unsaid[w.Addr] = w.Node
	return true
}

// mine reports whether it is for this director to end a drain: it began it, or who did is not there any more or wishes
// differently, and no other director's name comes before of those that wish what this one does.
func (a *advance) mine(key ravel.ServiceKey, e ravel.RosterEntry) bool {
	if e.By == a.self {
		return true
	}
	first := a.self
	for _, name := range a.deciders[1:] {
		if a.Fleet.Reports[name].Services[key].Wish == a.Hashes[key] {
			if name == e.By {
				return false
			}
			first = min(first, name)
		}
	}
	return first == a.self
}

// forget drops entries that every director knows to be gone: all hold the same table, which is without them.
func (a *advance) forget(key ravel.ServiceKey, roster ravel.Roster, c *clocks) {
	mine := a.Fleet.Reports[a.self].Services[key].Table
	for _, name := range a.deciders[1:] {
		if a.Fleet.Reports[name].Services[key].Table != mine {
			return
		}
	}
	// The one that stands first, born last, is not forgotten, so that whoever comes next is born after all that ever were:
	// who has forgotten one does not take it for that.
	for _, e := range roster[min(1, len(roster)):] {
		if e.State == ravel.Gone && a.after(c.gone[e.Addr], a.timing.Tombstone) {
			a.out.Forget[key] = append(a.out.Forget[key], e.Addr)
		}
	}
}
