package health

import (
	"time"

	"github.com/ravel-lb/ravel"
)

// Majority is the one definition of it in this product: more than half of the voting members are seen. Voting members
// are directors, and as witnesses realservers.
func Majority(seen, voters int) bool { return seen > 0 && 2*seen > voters }

// forgetAfter is how long a majority must miss a member for the electorate to be one smaller.
const forgetAfter = time.Hour

// Electorate is how many members a process believes that the fleet has, and how many of them it sees. Its rules:
//
//   - The zero value knows nobody. The size is the most members seen at once; it grows at once.
//   - A goodbye for good makes it one smaller at once, if that member was ever seen; when the member comes back it
//     counts again.
//   - A goodbye "restarting" takes the member out of the count until it is back, or until the grace is over.
//   - For each hour in which members are missing, a process that sees a majority makes it one smaller. One that sees
//     none never does, so a minority cannot become a majority by waiting.
//   - A size that is set is not learned: it stands, unless more are seen. Only "restarting" lowers it for a while.
//
// It is a value: Next returns another one.
type Electorate struct {
	Size int // members there should be, without those that are about to be back
	Seen int // members alive or suspected, this one included
	Sure int // members alive and not suspected
	// Excused are those that said "restarting" and are not in Size.
	Excused int

	size    int                     // with the excused
	missing time.Time               // since when members are missing, or since the last was forgotten; zero is none
	known   map[string]acquaintance // whom it ever saw, while gossip knows them
}

// acquaintance is a member that was seen alive once.
type acquaintance struct {
	state ravel.MemberState
	since time.Time // when it was first seen to be in that state
}

// Majority reports whether more than half of the members are seen.
func (e Electorate) Majority() bool { return Majority(e.Seen, e.Size) }

// Sound reports whether so much is alive, and so little suspected, that what this process misses is not its own fault. A
// process that is cut off suspects one member after another, and the first ones are dead to it before it has asked half
// of a large fleet.
func (e Electorate) Sound() bool { return Majority(e.Sure, e.Size) && e.Suspects() <= maxSuspects }

// maxSuspects is how many members may be suspected in a sound fleet.
const maxSuspects = 2

// Suspects returns how many members are suspected.
func (e Electorate) Suspects() int { return e.Seen - e.Sure }

// Next returns the electorate after a look at the members. fixed is the size that is set; 0 learns it. grace is how long
// who said "restarting" is excused. The second value is when the next look changes something by itself; zero is never.
func (e Electorate) Next(now time.Time, members []ravel.Member, fixed int, grace time.Duration) (Electorate, time.Time) {
	next := Electorate{size: e.size, missing: e.missing, known: make(map[string]acquaintance, len(members))}
	var wake time.Time
	for _, m := range members {
		was, known := e.known[m.Name]
		if !known && !m.State.Live() {
			continue
		}
		if !known || was.state != m.State {
			if known && m.State == ravel.Left {
				next.size--
			}
			if known && was.state == ravel.Left && m.State.Live() {
				next.size++
			}
			was = acquaintance{state: m.State, since: now}
		}
		next.known[m.Name] = was
		switch m.State {
		case ravel.Alive:
			next.Seen++
			next.Sure++
		case ravel.Suspect:
			next.Seen++
		case ravel.Restarting:
			if end := was.since.Add(grace); now.Before(end) {
				next.Excused++
				wake = earliest(wake, end)
			}
		}
	}
	here := next.Seen + next.Excused
	next.size = max(next.size, here)
	switch {
	case here == next.size || !Majority(next.Seen, next.size-next.Excused):
		next.missing = time.Time{}
	case next.missing.IsZero():
		next.missing = now
	default:
		for here < next.size && !now.Before(next.missing.Add(forgetAfter)) {
			next.size--
			next.missing = next.missing.Add(forgetAfter)
		}
	}
	if !next.missing.IsZero() && here < next.size {
		wake = earliest(wake, next.missing.Add(forgetAfter))
	}
	next.Size = next.size - next.Excused
	if fixed > 0 {
		next.Size = max(fixed, here) - next.Excused
	}
	return next, wake
}

// earliest returns the earlier of two times, where zero is never.
func earliest(a, b time.Time) time.Time {
	if a.IsZero() || !b.IsZero() && b.Before(a) {
		return b
	}
	return a
}
