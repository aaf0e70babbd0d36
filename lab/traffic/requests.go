package traffic

import (
	"bufio"
	"cmp"
	"context"
	"net"
	"strconv"
	"sync"
	"time"
)

// requests keeps a group of requests going.
type requests struct {
	Requests
	mu     sync.Mutex // guards the field below
	report RequestReport
}

func newRequests(q Requests) *requests {
	q.Timeout = cmp.Or(q.Timeout, 5*time.Second)
	g := &requests{Requests: q}
	g.resetLocked()
	return g
}

func (g *requests) run(ctx context.Context) {
	var group sync.WaitGroup
	defer group.Wait()
	start := time.Now()
	for n := 0; ; n++ {
		// By the clock, so that a busy machine does not lower the rate.
		due := start.Add(time.Duration(float64(n) / g.Rate * float64(time.Second)))
		if !sleep(ctx, time.Until(due)) {
			return
		}
		group.Go(func() { g.one(ctx, n) })
	}
}

func (g *requests) one(ctx context.Context, n int) {
	begun := time.Now()
	g.mu.Lock()
	g.report.Begun++
	g.mu.Unlock()
	pod, err := request(ctx, g.Target.String(), strconv.Itoa(n), begun.Add(g.Timeout))
	g.mu.Lock()
	defer g.mu.Unlock()
	switch {
	case err == nil:
		g.report.Answered++
		g.report.Slowest = max(g.report.Slowest, time.Since(begun))
		g.report.Pods[pod]++
	case ctx.Err() == nil:
		g.report.Failed[kind(err)]++
		g.report.Examples = examples(g.report.Examples, err.Error())
	}
}

// request makes one connection, one request, and closes.
func request(ctx context.Context, target, text string, deadline time.Time) (pod string, err error) {
	dialer := net.Dialer{Deadline: deadline, KeepAlive: -1}
	conn, err := dialer.DialContext(ctx, "tcp", target)
	if err != nil {
		return "", err
	}
	stop := context.AfterFunc(ctx, func() { _ = conn.Close() })
	defer stop()
	defer func() { _ = conn.Close() }()
	_ = conn.SetDeadline(deadline)
	if _, err := conn.Write([]byte(text + "\n")); err != nil {
		return "", err
	}
	line, err := bufio.NewReaderSize(conn, 256).ReadString('\n')
	if err != nil {
		return "", err
	}
	return answer(line, text)
}

// snapshot reports, and begins the counters anew if it is asked to. A request that is under way counts where it ends.
func (g *requests) snapshot(reset bool) RequestReport {
	g.mu.Lock()
	defer g.mu.Unlock()
	if reset {
		defer g.resetLocked()
	}
	r := g.report
	r.Failed = added(nil, r.Failed)
	r.Pods = added(nil, r.Pods)
	r.Examples = examples(nil, r.Examples...)
	return r
}

func (g *requests) resetLocked() {
	g.report = RequestReport{Name: g.Name, Failed: map[string]int{}, Pods: map[string]int{}}
}
