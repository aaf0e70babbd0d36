package agree

import (
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/ravel-lb/ravel"
)

// Difference is a service whose tables are not alike on all directors that wish the same of it.
type Difference struct {
	Service   ravel.ServiceKey `json:"service"`
	Directors []string         `json:"directors"` // whose table or set of available real servers differs from ours, sorted
	Since     time.Time        `json:"since"`
	// Table says that the tables differ; else only which real servers take new flows does.
	Table bool `json:"table"`
}

// watch finds services whose tables differ for longer than news travels.
type watch struct {
	since    map[ravel.ServiceKey]time.Time
	repaired time.Time // when the kernel was last asked to be made right
	outvoted bool      // this director's tables are the wrong ones, and it matters
}

func newWatch() watch { return watch{since: map[ravel.ServiceKey]time.Time{}} }

const (
	// differGrace is how long tables may differ before it counts: what changes reaches the directors one after the other.
	differGrace = 10 * time.Second
	// withdrawAfter is how long this director's tables may differ from those of all others before it withdraws.
	withdrawAfter = 30 * time.Second
	// repairEvery is how often the kernel is read and repaired because of a difference.
	repairEvery = 15 * time.Second
)

// look compares what the directors say of their tables, and returns what differs for too long, what to tell, and when to
// look again.
//
// This director is outvoted where it stands alone for half a minute: at least two others wish the same as it does, all of
// them hold one other table, and far says that the difference matters. Of several that are outvoted, each in another
// service, only the first by name is.
func (w *watch) look(
	now time.Time, self string, fleet ravel.Fleet, repair func(), far func([]ravel.ServiceKey) bool,
) ([]Difference, []ravel.Problem, time.Time) {
	var differs []Difference
	var wake time.Time
	var alone []ravel.ServiceKey
	directors := fleet.Live(ravel.Director)
	first := self // of those that are outvoted in anything
	for key, own := range fleet.Reports[self].Services {
		var others []string
		table := false
		for _, m := range directors {
			r, says := fleet.Reports[m.Name].Services[key]
			if m.Name == self || !says || r.Wish != own.Wish {
				continue
			}
			tables := differ(r.Table, own.Table)
			if tables || differ(r.Available, own.Available) {
				others = append(others, m.Name)
			}
			table = table || tables
		}
		if len(others) == 0 {
			delete(w.since, key)
			continue
		}
		since, already := w.since[key]
		if !already {
			since, w.since[key] = now, now
		}
		lasted := now.Sub(since)
		if lasted < differGrace {
			if at := since.Add(differGrace); wake.IsZero() || at.Before(wake) {
				wake = at
			}
			continue
		}
		slices.Sort(others)
		differs = append(differs, Difference{Service: key, Directors: others, Since: since, Table: table})
		for _, m := range directors {
			switch {
			case !outvoted(key, m.Name, directors, fleet):
			case m.Name != self:
				first = min(first, m.Name)
			case lasted >= withdrawAfter:
				alone = append(alone, key)
			}
		}
	}
	for key := range w.since {
		if _, wished := fleet.Reports[self].Services[key]; !wished {
			delete(w.since, key)
		}
	}
	slices.SortFunc(differs, func(a, b Difference) int { return a.Service.Compare(b.Service) })
	w.outvoted = len(alone) > 0 && first == self && (w.outvoted || far(alone))
	if len(differs) == 0 {
		return nil, nil, wake
	}
	if now.Sub(w.repaired) >= repairEvery {
		w.repaired = now
		repair()
	}
	if at := now.Add(5 * time.Second); wake.IsZero() || at.Before(wake) {
		wake = at
	}
	var problems []ravel.Problem
	for i, d := range differs {
		if i == 5 {
			problems = append(problems, ravel.Problem{Where: "fleet", What: fmt.Sprintf("%d more services differ", len(differs)-i), Fix: "ravel members"})
			break
		}
		what := "takes new flows by other real servers than"
		if d.Table {
			what = "has another Maglev table than"
		}
		problems = append(problems, ravel.Problem{
			Where: d.Service.String(),
			What:  fmt.Sprintf("%s %s: open flows break when one of them is lost", what, strings.Join(d.Directors, " and ")),
			Fix:   "compare ravel services and the table size in ravel members -o wide on both",
		})
	}
	if w.outvoted {
		problems = append(problems, ravel.Problem{
			Where: "fleet", What: fmt.Sprintf("this director alone has other tables, of %d services", len(alone)),
			Fix: "it announces nothing while others do; see ravel members, and restart it when the cause is gone",
		})
	}
	return differs, problems, wake
}

// differ reports whether two hashes that are known are not equal.
func differ(a, b uint64) bool { return a != 0 && b != 0 && a != b }

// outvoted reports whether a director holds another table than at least two others that wish the same and hold one.
func outvoted(key ravel.ServiceKey, name string, directors []ravel.Member, fleet ravel.Fleet) bool {
	own, says := fleet.Reports[name].Services[key]
	if !says {
		return false
	}
	agreeing, theirs := 0, uint64(0)
	for _, m := range directors {
		r, says := fleet.Reports[m.Name].Services[key]
		if m.Name == name || !says || r.Wish != own.Wish || r.Table == 0 {
			continue
		}
		if !differ(r.Table, own.Table) || theirs != 0 && r.Table != theirs {
			return false
		}
		theirs = r.Table
		agreeing++
	}
	return agreeing >= 2
}
