package health

import (
	"container/heap"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"math/rand/v2"
	"net/netip"
	"slices"
	"sync"
	"syscall"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/ravel-lb/ravel"
	"github.com/ravel-lb/ravel/internal/latest"
)

// Options of a Prober.
type Options struct {
	Log        *slog.Logger
	Registerer prometheus.Registerer // nil keeps metrics to itself
	Timing     Timing                // what is 0 is as LAN says
	// InFlight bounds the probes that wait for an answer at one time, and so the sockets and source ports in use; 512
	// unless set.
	InFlight int
}

// publishGap is the least time between two values of a Prober's source, so that what changes together is told together.
const publishGap = 50 * time.Millisecond

// firstSpread is the time over which the first probes of new targets are spread.
const firstSpread = time.Second

// Prober probes targets for as long as it runs, and is a source of what it found: its value maps each address to
// Healthy, Refused or Silent, and lacks those that it can say nothing of. It is known from the first Apply on, is never
// changed after it was given out, and is another one only when something changed, be it the problems. Its methods are safe for use by many
// goroutines.
type Prober struct {
	log      *slog.Logger
	timing   Timing
	inFlight int
	metrics  *proberMetrics
	probe    func(context.Context, Target) (ravel.Health, error)
	wake     chan struct{}                             // of size 1: something was given
	value    latest.Value[map[netip.Addr]ravel.Health] // only Run sets it

	mu       sync.Mutex    // guards the fields below
	given    *[]Target     // by Apply and not taken yet; nil is nothing
	hints    *[]netip.Addr // by Hurry, likewise
	problems []ravel.Problem
}

// Latest returns what was found, by address, and false until Run has taken what the first Apply gave.
func (p *Prober) Latest() (map[netip.Addr]ravel.Health, bool) { return p.value.Latest() }

// Changed returns a channel that is closed when something else is found than before.
func (p *Prober) Changed() <-chan struct{} { return p.value.Changed() }

// New returns a Prober that probes nothing until it is given targets and runs.
func New(o Options) *Prober {
	if o.Log == nil {
		o.Log = slog.New(slog.DiscardHandler)
	}
	if o.InFlight <= 0 {
		o.InFlight = 512
	}
	return &Prober{
		log:      o.Log,
		timing:   o.Timing.orDefault(),
		inFlight: o.InFlight,
		metrics:  newProberMetrics(o.Registerer),
		probe:    probe,
		wake:     make(chan struct{}, 1),
	}
}

// Apply makes targets all that is probed. Those that are no valid target, or the second of an address, are left out; the
// error names each. An address whose target changed keeps what was found until the new probes find something.
func (p *Prober) Apply(targets []Target) error {
	targets = slices.SortedFunc(slices.Values(targets), Target.compare)
	targets = slices.Compact(targets)
	var errs []error
	good := make([]Target, 0, len(targets))
	for _, t := range targets {
		if err := t.check(); err != nil {
			errs = append(errs, fmt.Errorf("target to probe: %w", err))
			continue
		}
		if n := len(good); n > 0 && good[n-1].Addr == t.Addr {
			errs = append(errs, fmt.Errorf("target to probe: %s: is there twice; port %d was left out", t.Addr, t.Port))
			continue
		}
		good = append(good, t)
	}
	p.mu.Lock()
	p.given = &good
	p.mu.Unlock()
	p.poke()
	return errors.Join(errs...)
}

// Hurry makes addrs all those of which somebody suspects that they are dead. Each that newly is one is probed at once,
// and rapidly until it answers or is Silent. Those that are no targets are ignored.
func (p *Prober) Hurry(addrs []netip.Addr) {
	addrs = slices.Clone(addrs)
	p.mu.Lock()
	p.hints = &addrs
	p.mu.Unlock()
	p.poke()
}

// Problems returns what keeps this host from probing, sorted. The source changes when they do.
func (p *Prober) Problems() []ravel.Problem {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.problems
}

func (p *Prober) poke() {
	select {
	case p.wake <- struct{}{}:
	default:
	}
}

// Run probes until ctx ends, and returns nil when its last probe has ended. It is called once.
func (p *Prober) Run(ctx context.Context) error {
	r := &round{
		Prober:   p,
		subjects: map[netip.Addr]*subject{},
		results:  make(chan result, p.inFlight),
	}
	ctx, cancel := context.WithCancel(ctx)
	defer r.wg.Wait()
	defer cancel()
	timer := time.NewTimer(0)
	defer timer.Stop()
	for {
		now := time.Now()
		r.take(now)
		r.start(ctx, now)
		r.publish(now)
		pause := r.pause(now)
		timer.Reset(pause)
		select {
		case <-ctx.Done():
			return nil
		case <-p.wake:
			r.woke(now.Add(pause), time.Now())
		case <-timer.C:
			r.woke(now.Add(pause), time.Now())
		case res := <-r.results:
			r.woke(now.Add(pause), time.Now())
			r.finish(res, time.Now())
			for more := true; more; {
				select {
				case res := <-r.results:
					r.finish(res, time.Now())
				default:
					more = false
				}
			}
		}
	}
}

// subject is an address that is probed. Only Run's goroutine touches it.
type subject struct {
	target Target
	state  ravel.Health
	due    time.Time // when the next probe starts
	place  int       // in the queue
	gone   bool      // it is no target any more
	hurry  bool

	started  int       // probes so far
	last     time.Time // when the last of them started
	open     int       // those that wait for an answer
	answered int       // the newest that was answered
	silences int       // those that were not, since one was
	lapses   int       // faults of this host in a row
	fault    string    // the last of them, once they are Failures in a row
}

// result is what one probe found.
type result struct {
	subject *subject
	probe   int // which of the subject's
	began   time.Time
	ended   time.Time
	health  ravel.Health
	err     error
}

// round is what Run's goroutine knows.
type round struct {
	*Prober
	subjects  map[netip.Addr]*subject
	queue     queue
	results   chan result
	open      int
	wg        sync.WaitGroup
	known     bool
	dirty     bool
	published time.Time
	stalled   time.Time // when this process last got to run again after it had not, while it should
}

// take brings in what Apply and Hurry gave.
func (r *round) take(now time.Time) {
	r.mu.Lock()
	given, hints := r.given, r.hints
	r.given, r.hints = nil, nil
	r.mu.Unlock()
	if given != nil {
		r.targets(*given, now)
	}
	if hints != nil {
		r.hurry(*hints, now)
	}
}

func (r *round) targets(given []Target, now time.Time) {
	if !r.known {
		r.known, r.dirty = true, true
	}
	wanted := make(map[netip.Addr]Target, len(given))
	for _, t := range given {
		wanted[t.Addr] = t
	}
	for addr, s := range r.subjects {
		t, still := wanted[addr]
		switch {
		case !still:
			r.drop(s)
			r.dirty = true
		case t != s.target:
			r.drop(s)
			r.add(&subject{target: t, state: s.state, due: now, hurry: s.hurry})
		}
	}
	for _, t := range given {
		if r.subjects[t.Addr] == nil {
			r.add(&subject{target: t, due: now.Add(rand.N(min(r.timing.Interval, firstSpread)))})
		}
	}
}

func (r *round) add(s *subject) {
	r.subjects[s.target.Addr] = s
	heap.Push(&r.queue, s)
}

func (r *round) drop(s *subject) {
	s.gone = true
	delete(r.subjects, s.target.Addr)
	heap.Remove(&r.queue, s.place)
}

func (r *round) hurry(hints []netip.Addr, now time.Time) {
	hinted := make(map[netip.Addr]bool, len(hints))
	for _, addr := range hints {
		hinted[addr] = true
	}
	for addr, s := range r.subjects {
		if hinted[addr] && !s.hurry && s.state != ravel.Silent {
			r.plan(s, now)
		}
		s.hurry = hinted[addr]
	}
}

// plan sets when the subject's next probe starts.
func (r *round) plan(s *subject, at time.Time) {
	s.due = at
	heap.Fix(&r.queue, s.place)
}

// later is when an address that nothing is wrong with, or that is known to be dead, is probed again: Interval after its
// last probe at the latest. The gaps differ, so that many addresses and many directors do not beat together.
func (r *round) later(s *subject) time.Time {
	if s.started == 1 {
		return s.last.Add(rand.N(r.timing.Interval))
	}
	return s.last.Add(r.timing.Interval - rand.N(r.timing.Interval/5+1))
}

// start starts the probes that are due.
func (r *round) start(ctx context.Context, now time.Time) {
	for len(r.queue) > 0 && r.open < r.inFlight && !r.queue[0].due.After(now) {
		s := r.queue[0]
		s.started, s.last = s.started+1, now
		s.open++
		r.open++
		// Unless it is answered until then the next one follows; but never more than are needed to know.
		switch next := now.Add(r.timing.Rapid); {
		case s.state == ravel.Silent:
			r.plan(s, r.later(s))
		case s.silences+s.open >= r.timing.Failures:
			r.plan(s, now.Add(3*r.timing.Timeout))
		default:
			r.plan(s, next)
		}
		number, target := s.started, s.target
		r.wg.Go(func() {
			ctx, cancel := context.WithTimeout(ctx, r.timing.Timeout)
			defer cancel()
			h, err := r.probe(ctx, target)
			r.results <- result{s, number, now, time.Now(), h, err}
		})
	}
}

// woke notes when this process, or the whole machine, stood still: it gets to run later than it asked for. A probe that
// was on its way then may have been answered, and the answer not been seen in time.
func (r *round) woke(asked, now time.Time) {
	if r.late(asked, now) {
		r.stalled = now
	}
}

func (r *round) late(asked, now time.Time) bool { return now.Sub(asked) > r.timing.Timeout/4 }

// finish takes in what a probe found.
func (r *round) finish(res result, now time.Time) {
	s := res.subject
	s.open--
	r.open--
	r.metrics.probes.WithLabelValues(res.health.String()).Inc()
	if s.gone {
		return
	}
	switch res.health {
	case ravel.Healthy, ravel.Refused:
		if res.probe < s.answered {
			return // a newer one said already
		}
		s.answered, s.silences, s.lapses = res.probe, 0, 0
		r.found(s, res.health, "", res.err)
		r.plan(s, r.later(s))
	case ravel.Silent:
		switch {
		case res.probe < s.answered:
			return // it has answered since
		case res.began.Before(r.stalled) || r.late(res.began.Add(r.timing.Timeout), res.ended):
			r.metrics.void.Inc()
			if s.open == 0 {
				r.plan(s, now.Add(r.timing.Rapid))
			}
			return
		}
		s.silences, s.lapses = s.silences+1, 0
		switch {
		case s.silences >= r.timing.Failures:
			r.found(s, ravel.Silent, "", res.err)
			r.plan(s, r.later(s))
		case s.silences+s.open < r.timing.Failures && s.due.After(now.Add(r.timing.Rapid)):
			r.plan(s, now)
		}
	default:
		s.lapses++
		if s.lapses < r.timing.Failures {
			r.plan(s, now.Add(r.timing.Rapid))
			return
		}
		r.found(s, ravel.Unprobed, reason(res.err), res.err)
		r.plan(s, r.later(s))
	}
}

// found notes what is known of a subject now.
func (r *round) found(s *subject, h ravel.Health, fault string, err error) {
	if s.state == h && s.fault == fault {
		return
	}
	r.log.Info("probes of a real server changed", "addr", s.target.Addr, "was", s.state, "is", h, "err", err)
	s.state, s.fault = h, fault
	r.dirty = true
}

// reason is the fault of this host without the target's address, so that equal ones are told once.
func reason(err error) string {
	var no syscall.Errno
	if errors.As(err, &no) {
		return no.Error()
	}
	if err == nil {
		return "unknown"
	}
	return err.Error()
}

// publish sets the source's value if there is something new, unless it just did.
func (r *round) publish(now time.Time) {
	if !r.dirty || now.Sub(r.published) < publishGap {
		return
	}
	r.dirty, r.published = false, now
	value := make(map[netip.Addr]ravel.Health, len(r.subjects))
	count := map[ravel.Health]int{}
	faults := map[string][]netip.Addr{}
	for addr, s := range r.subjects {
		count[s.state]++
		if s.state != ravel.Unprobed {
			value[addr] = s.state
		}
		if s.fault != "" {
			faults[s.fault] = append(faults[s.fault], addr)
		}
	}
	r.metrics.set(count)
	var problems []ravel.Problem
	for _, fault := range slices.Sorted(maps.Keys(faults)) {
		first := slices.MinFunc(faults[fault], netip.Addr.Compare)
		what := fmt.Sprintf("cannot probe %s: %s; this director says nothing of it", first, fault)
		if n := len(faults[fault]); n > 1 {
			what = fmt.Sprintf("cannot probe %d real servers, such as %s: %s; this director says nothing of them", n, first, fault)
		}
		problems = append(problems, ravel.Problem{Where: "probes", What: what})
	}
	r.mu.Lock()
	same := slices.Equal(r.problems, problems)
	r.problems = problems
	r.mu.Unlock()
	if old, known := r.Latest(); !known || !same || !maps.Equal(old, value) {
		r.value.Set(value)
	}
}

// pause is how long there is nothing to do unless something comes in.
func (r *round) pause(now time.Time) time.Duration {
	pause := time.Hour
	if len(r.queue) > 0 && r.open < r.inFlight {
		pause = r.queue[0].due.Sub(now)
	}
	if r.dirty {
		pause = min(pause, r.published.Add(publishGap).Sub(now))
	}
	if r.open > 0 {
		pause = min(pause, r.timing.Timeout/10) // so that woke notices
	}
	return max(pause, 0)
}

// queue holds subjects by when they are due (container/heap).
type queue []*subject

func (q queue) Len() int           { return len(q) }
func (q queue) Less(i, j int) bool { return q[i].due.Before(q[j].due) }
func (q queue) Swap(i, j int) {
	q[i], q[j] = q[j], q[i]
	q[i].place, q[j].place = i, j
}
func (q *queue) Push(x any) {
	s := x.(*subject)
	s.place = len(*q)
	*q = append(*q, s)
}
func (q *queue) Pop() any {
	old := *q
	s := old[len(old)-1]
	*q = old[:len(old)-1]
	return s
}
