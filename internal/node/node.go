// Package node brings one host to the state that is wanted, in an order that never announces what is not held and
// never deletes what is still announced. One goroutine calls every applier.
package node

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"slices"
	"time"

	"github.com/ravel-lb/ravel"
	"github.com/ravel-lb/ravel/internal/latest"
)

// Source is where a value comes from that changes: latest.Value is one. Latest says false until all of the value is
// known; Changed is asked for first.
type Source[T any] interface {
	Latest() (T, bool)
	Changed() <-chan struct{}
}

// Report is what one walk through the appliers left behind.
type Report struct {
	Effective ravel.State // the wanted state as it is right now: with what lingers and drains, without what still waits
	Held      []ravel.ServiceKey
	HeldVIPs  []netip.Addr
	Announced []netip.Addr
	Problems  []ravel.Problem
	Lingering int       // VIPs, or on a realserver redirects, that are kept for a moment
	Draining  int       // real servers that take no new flows and keep those that they have
	Rising    int       // real servers that wait for their first flow
	Wake      time.Time // when time alone changes something; zero is never
	At        time.Time // when the walk ended
	Took      time.Duration
	Err       error // what could not be done; it is tried again
}

// walker is one role's walk.
type walker interface {
	step(ctx context.Context, want ravel.State, now time.Time) (Report, error)
	stop(ctx context.Context) error
	resync()
	// look reports whether somebody else changed rules so that the walk must mend them. It costs next to nothing.
	look(ctx context.Context) bool
	changed() (ipvs, links <-chan struct{}) // told when somebody else changed what the walk is about
}

// Node is the loop of one process. Make it with NewDirector or NewRealserver.
type Node struct {
	log     *slog.Logger
	source  Source[ravel.State]
	walker  walker
	metrics *metrics
	reports latest.Value[Report]

	// Resync is how often the appliers read the kernel again, in case somebody else changed it.
	resyncEvery time.Duration
	// lookEvery is how often they look whether their jumps in iptables stand where they should.
	lookEvery time.Duration
	// StopWithin bounds a planned stop.
	stopWithin time.Duration
}

// Options are what both roles need.
type Options struct {
	Log     *slog.Logger
	Source  Source[ravel.State]
	Metrics Registerer    // may be nil
	Resync  time.Duration // how often the kernel is read again; 0 is 30 s
	// Look is how often the jumps in iptables, which other programs like to overtake, are looked at; 0 is 1 s.
	Look time.Duration
	// StopWithin bounds a planned stop; 0 is 10 s.
	StopWithin time.Duration
}

// NewDirector returns the loop of a director.
func NewDirector(o Options, c DirectorConfig) *Node {
	return newNode(o, &directorWalk{DirectorConfig: c})
}

// NewRealserver returns the loop of a realserver.
func NewRealserver(o Options, c RealserverConfig) *Node {
	return newNode(o, &realserverWalk{RealserverConfig: c})
}

func newNode(o Options, w walker) *Node {
	if o.Resync == 0 {
		o.Resync = 30 * time.Second
	}
	if o.Look == 0 {
		o.Look = time.Second
	}
	if o.StopWithin == 0 {
		o.StopWithin = 10 * time.Second
	}
	return &Node{
		log: o.Log, source: o.Source, walker: w, metrics: newMetrics(o.Metrics),
		resyncEvery: o.Resync, lookEvery: o.Look, stopWithin: o.StopWithin,
	}
}

// Reports is where the newest Report is read.
func (n *Node) Reports() Source[Report] { return &n.reports }

// The first retry after a fault comes soon, later ones at most this far apart.
const (
	firstRetry = 200 * time.Millisecond
	lastRetry  = 10 * time.Second
)

// Run applies the newest state until ctx ends, then stops in good order. Until the source knows a state it touches
// nothing: "not known yet" is not "nothing wanted".
func (n *Node) Run(ctx context.Context) error {
	resync := time.NewTicker(n.resyncEvery)
	defer resync.Stop()
	look := time.NewTicker(n.lookEvery)
	defer look.Stop()
	timer := time.NewTimer(0)
	defer timer.Stop()
	retry := firstRetry
	var lastErr string
	for {
		changed := n.source.Changed()
		want, known := n.source.Latest()
		var wake <-chan time.Time
		if known {
			report := n.walk(ctx, want)
			after := time.Duration(-1)
			if !report.Wake.IsZero() {
				after = max(0, time.Until(report.Wake))
			}
			switch {
			case report.Err != nil && ctx.Err() == nil:
				if msg := report.Err.Error(); msg != lastErr {
					n.log.Error("not all could be applied; trying again", "err", report.Err)
					lastErr = msg
				}
				if after < 0 || retry < after {
					after = retry
				}
				retry = min(2*retry, lastRetry)
			case report.Err == nil:
				if lastErr != "" {
					n.log.Info("all is applied again")
				}
				lastErr, retry = "", firstRetry
			}
			if after >= 0 {
				timer.Reset(after)
				wake = timer.C
			}
		}
		ipvs, links := n.walker.changed()
		for waiting := true; waiting; {
			waiting = false
			select {
			case <-ctx.Done():
				return n.end(ctx)
			case <-changed:
				timer.Stop()
			case <-wake:
			case <-ipvs:
			case <-links:
			case <-resync.C:
				n.walker.resync()
			case <-look.C:
				waiting = !known || !n.walker.look(ctx)
			}
		}
	}
}

func (n *Node) walk(ctx context.Context, want ravel.State) Report {
	began := time.Now()
	report, err := n.walker.step(ctx, want, began)
	report.Err, report.At = err, time.Now()
	report.Took = report.At.Sub(began)
	before, _ := n.reports.Latest()
	n.tell(before, report)
	n.metrics.observe(want, report)
	n.reports.Set(report)
	return report
}

// tell logs what an operator asks about.
func (n *Node) tell(before, now Report) {
	for _, vip := range now.Announced {
		if !slices.Contains(before.Announced, vip) {
			n.log.Info("VIP announced", "vip", vip)
		}
	}
	for _, vip := range before.Announced {
		if !slices.Contains(now.Announced, vip) {
			n.log.Info("VIP withdrawn", "vip", vip)
		}
	}
	LogNew(n.log, before.Problems, now.Problems)
}

// loggedProblems bounds how many problems are logged at once.
const loggedProblems = 20

// LogNew logs the problems that are not in before, a line each, and of very many just how many more there are.
func LogNew(log *slog.Logger, before, now []ravel.Problem) {
	known := make(map[ravel.Problem]bool, len(before))
	for _, p := range before {
		known[p] = true
	}
	fresh := 0
	for _, p := range now {
		if known[p] {
			continue
		}
		if fresh++; fresh <= loggedProblems {
			log.Warn("problem", "where", p.Where, "what", p.What, "fix", p.Fix)
		}
	}
	if fresh > loggedProblems {
		log.Warn(fmt.Sprintf("… and %d more problems; ravel check shows all", fresh-loggedProblems))
	}
}

func (n *Node) end(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), n.stopWithin)
	defer cancel()
	if err := n.walker.stop(ctx); err != nil && !errors.Is(err, context.Canceled) {
		return err
	}
	return nil
}
