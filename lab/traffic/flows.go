package traffic

import (
	"bufio"
	"cmp"
	"context"
	"fmt"
	"net"
	"strconv"
	"sync"
	"time"
)

// flows keeps a group of flows going.
type flows struct {
	Flows
	mu     sync.Mutex // guards the fields below
	flow   []flow
	report FlowReport // the counters that only grow
}

// flow is one connection. A flow that was never answered has no pod.
type flow struct {
	pod   string
	asked time.Time // when the request was sent that has no answer yet, or of the last reset since; zero if there is none
	open  bool
}

func newFlows(f Flows) *flows {
	f.Timeout = cmp.Or(f.Timeout, 30*time.Second)
	g := &flows{Flows: f, flow: make([]flow, f.Count)}
	g.resetLocked(time.Now())
	return g
}

func (g *flows) run(ctx context.Context) {
	var group sync.WaitGroup
	for i := range g.Count {
		group.Go(func() {
			// Spread the first connects over a second, and the requests over the interval.
			spread := max(g.Every, time.Second) * time.Duration(i) / time.Duration(g.Count)
			if !sleep(ctx, spread) {
				return
			}
			if err := g.one(ctx, i); err != nil && ctx.Err() == nil {
				g.broke(i, err)
			}
		})
	}
	group.Wait()
}

func (g *flows) one(ctx context.Context, i int) error {
	dialer := net.Dialer{Timeout: g.Timeout, KeepAlive: -1}
	conn, err := dialer.DialContext(ctx, "tcp", g.Target.String())
	if err != nil {
		return err
	}
	stop := context.AfterFunc(ctx, func() { _ = conn.Close() })
	defer stop()
	defer func() { _ = conn.Close() }()
	lines := bufio.NewReaderSize(conn, 256)
	ticker := time.NewTicker(g.Every)
	defer ticker.Stop()
	for seq := 1; ; seq++ {
		request := strconv.Itoa(seq)
		_ = conn.SetDeadline(time.Now().Add(g.Timeout))
		g.asks(i)
		if _, err := conn.Write([]byte(request + "\n")); err != nil {
			return err
		}
		line, err := lines.ReadString('\n')
		if err != nil {
			return err
		}
		pod, err := answer(line, request)
		if err != nil {
			return err
		}
		g.answered(i, pod)
		select {
		case <-ticker.C:
		case <-ctx.Done():
			return nil
		}
	}
}

func (g *flows) asks(i int) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.flow[i].asked = time.Now()
}

func (g *flows) answered(i int, pod string) {
	now := time.Now()
	g.mu.Lock()
	defer g.mu.Unlock()
	f := &g.flow[i]
	g.report.Answered++
	g.report.LongestWait = max(g.report.LongestWait, now.Sub(f.asked))
	f.asked = time.Time{}
	if !f.open {
		f.open, f.pod = true, pod
		return
	}
	if f.pod != pod {
		g.report.OtherPod++
		g.report.Examples = examples(g.report.Examples, fmt.Sprintf("flow %d: %s answered instead of %s", i, pod, f.pod))
	}
}

func (g *flows) broke(i int, err error) {
	g.mu.Lock()
	defer g.mu.Unlock()
	f := &g.flow[i]
	if f.open && !f.asked.IsZero() {
		g.report.LongestWait = max(g.report.LongestWait, time.Since(f.asked))
	}
	f.open, f.asked = false, time.Time{}
	g.report.Broken[kind(err)]++
	g.report.Examples = examples(g.report.Examples, fmt.Sprintf("flow %d: %v", i, err))
}

// snapshot reports, and begins the counters anew if it is asked to; the flows and their pods stay.
func (g *flows) snapshot(now time.Time, reset bool) FlowReport {
	g.mu.Lock()
	defer g.mu.Unlock()
	if reset {
		defer g.resetLocked(now)
	}
	r := g.report
	r.Broken = added(nil, r.Broken)
	r.Pods = map[string]int{}
	r.Examples = examples(nil, r.Examples...)
	for _, f := range g.flow {
		if !f.open {
			continue
		}
		r.Open++
		r.Pods[f.pod]++
		if f.asked.IsZero() {
			continue
		}
		wait := now.Sub(f.asked)
		r.LongestWait = max(r.LongestWait, wait)
		if wait > time.Second {
			r.Silent++
		}
	}
	return r
}

func (g *flows) resetLocked(now time.Time) {
	g.report = FlowReport{Name: g.Name, Count: g.Count, Broken: map[string]int{}}
	for i := range g.flow {
		if f := &g.flow[i]; !f.asked.IsZero() {
			f.asked = now
		}
	}
}

// sleep waits, and reports whether ctx still stands.
func sleep(ctx context.Context, d time.Duration) bool {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
		return true
	case <-ctx.Done():
		return false
	}
}
