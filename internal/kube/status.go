package kube

import (
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/ravel-lb/ravel"
)

// Status is how a Source is doing.
type Status struct {
	// Synced says that everything was told once.
	Synced bool
	// Known says that there is a value; Cached that it is an earlier process'.
	Known, Cached bool
	// Age is for how long something that the API server would tell may be missing from the value: 0 while all watches are
	// open. It means nothing where there is no value.
	Age time.Duration
	// Resources are what is watched, by name.
	Resources []Resource
	// Faults are why documents, as they now are, are not in force, or why nothing is known; they are among Problems.
	Faults []ravel.Problem
	// Problems are all there are now: those of the value, those of documents that there is no value of, the API server's and
	// the file's. Sorted.
	Problems []ravel.Problem
}

// Resource is one kind of objects that is watched.
type Resource struct {
	Name     string    `json:"name"` // nodes, services, endpointslices, configmaps
	Open     bool      `json:"open"` // a watch is
	Synced   bool      `json:"synced"`
	Objects  int       `json:"objects"`
	LastTold time.Time `json:"lastTold"`        // the API server last told something of it, if only that there is nothing new
	Fault    string    `json:"fault,omitempty"` // why no watch is open
	Errors   int       `json:"errors"`          // requests that failed, ever
}

// Status returns how the Source is doing.
func (s *Source) Status() Status {
	now := time.Now()
	v, known := s.value.Latest()
	s.mu.Lock()
	inner := s.status
	s.mu.Unlock()
	status := Status{Synced: inner.synced, Known: known, Cached: v.Cached, Faults: inner.faults, Problems: slices.Concat(v.Problems)}
	if !known {
		status.Problems = slices.Concat(inner.faults)
	}
	status.Age = s.age(now)
	type wrong struct{ what, fix string }
	lost := map[wrong][]string{}
	for _, w := range s.watches {
		at := w.standing()
		status.Resources = append(status.Resources, Resource{
			Name: w.kind, Open: at.open, Synced: s.caches.isSynced(w.kind), Objects: s.caches.count(w.kind), LastTold: at.heardAt,
			Fault: at.fault, Errors: at.errors,
		})
		switch {
		case at.fault != "":
			lost[wrong{at.fault, at.fix}] = append(lost[wrong{at.fault, at.fix}], w.kind)
		case inner.late && !s.caches.isSynced(w.kind):
			silent := wrong{errSilent.Error(), remedy(errSilent, w.client.server())}
			lost[silent] = append(lost[silent], w.kind)
		}
	}
	slices.SortFunc(status.Resources, func(a, b Resource) int { return strings.Compare(a.Name, b.Name) })
	for fault, kinds := range lost {
		slices.Sort(kinds)
		means := "nothing is known yet"
		if known {
			means = fmt.Sprintf("what was known %s ago stays in force", status.Age.Round(time.Second))
		}
		p := ravel.Problem{
			Where: "API server", What: fmt.Sprintf("does not tell of %s: %s; %s", strings.Join(kinds, ", "), fault.what, means), Fix: fault.fix,
		}
		status.Problems = append(status.Problems, p)
		if !known {
			status.Faults = append(slices.Clip(status.Faults), p)
		}
	}
	if v.Cached {
		status.Problems = append(status.Problems, ravel.Problem{
			Where: s.o.Cache, What: fmt.Sprintf("the inputs are those of an earlier process, of %s ago", status.Age.Round(time.Second)),
			Fix: "bring the API server back: it has a line of its own here",
		})
	}
	if inner.fileFault != nil {
		status.Problems = append(status.Problems, ravel.Problem{Where: s.o.Cache, What: inner.fileFault.Error()})
	}
	slices.SortStableFunc(status.Problems, ravel.Problem.Compare)
	return status
}

// Heard reports whether the API server tells of everything now, or did until a moment ago.
func (s *Source) Heard(now time.Time) bool {
	const moment = 10 * time.Second
	return now.Sub(s.touched(now)) < moment
}

// age is for how long something that the API server would tell may be missing from the value.
func (s *Source) age(now time.Time) time.Duration {
	if v, _ := s.value.Latest(); v.Cached {
		return now.Sub(v.Stamp)
	}
	return now.Sub(s.touched(now))
}

// missing are the kinds that were not told yet.
func (s *Source) missing() []string {
	var missing []string
	for _, w := range s.watches {
		if !s.caches.isSynced(w.kind) {
			missing = append(missing, w.kind)
		}
	}
	return missing
}
