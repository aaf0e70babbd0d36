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
	withdraw bool
}

func newWatch() watch { return watch{since: map[ravel.ServiceKey]time.Time{}} }

const (
	// differGrace is how long tables may differ before it counts: what changes reaches the directors one after the other.
	differGrace = 10 * time.Second
	// withdrawAfter is how long this director's tables may differ from those of all others before it withdraws.
	withdrawAfter = 30 * time.Second
	// repairEvery is how often the kernel is read and repaired because of a difference.
	repairEvery = 30 * time.Second
)

// look compares what the directors say of their tables, and returns what differs for too long, what to tell, and when to
// look again.
//
// This director withdraws where it stands alone for half a minute: at least two others wish the same as it does, all of
// them hold one other table, and far says that the difference is large.
func (w *watch) look(now time.Time, self string, fleet ravel.Fleet, repair func(), far func(ravel.ServiceKey) bool) ([]Difference, []ravel.Problem, time.Time) {
	var differs []Difference
	var wake time.Time
	mine := fleet.Reports[self].Services
	alone := 0
	directors := fleet.Live(ravel.Director)
	for key, own := range mine {
		var others []string
		table, outvoted := false, true
		var theirs uint64
		agreeing := 0
		if own.Table != 0 || own.Available != 0 {
			for _, m := range directors {
				r, says := fleet.Reports[m.Name].Services[key]
				if m.Name == self || !says || r.Wish != own.Wish || r.Available == 0 {
					continue
				}
				if r.Table != own.Table || r.Available != own.Available {
					others = append(others, m.Name)
				}
				table = table || r.Table != own.Table
				outvoted = outvoted && r.Table != own.Table && (theirs == 0 || theirs == r.Table)
				theirs = r.Table
				agreeing++
			}
		}
		if len(others) == 0 {
			delete(w.since, key)
			continue
		}
		since, already := w.since[key]
		if !already {
			since, w.since[key] = now, now
		}
		if lasted := now.Sub(since); lasted < differGrace {
			if at := since.Add(differGrace); wake.IsZero() || at.Before(wake) {
				wake = at
			}
		} else {
			slices.Sort(others)
			differs = append(differs, Difference{Service: key, Directors: others, Since: since, Table: table})
			if outvoted && agreeing >= 2 && lasted >= withdrawAfter && (w.withdraw || far(key)) {
				alone++
			}
		}
	}
	for key := range w.since {
		if _, wished := mine[key]; !wished {
			delete(w.since, key)
		}
	}
	slices.SortFunc(differs, func(a, b Difference) int { return a.Service.Compare(b.Service) })
	w.withdraw = alone > 0
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
	if w.withdraw {
		problems = append(problems, ravel.Problem{
			Where: "fleet", What: fmt.Sprintf("this director alone has other tables, of %d services, so it announces nothing", alone),
			Fix: "see ravel members; restart this director when the cause is gone",
		})
	}
	return differs, problems, wake
}
