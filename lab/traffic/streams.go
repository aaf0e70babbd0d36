package traffic

import (
	"context"
	"errors"
	"net"
	"strconv"
	"strings"
	"sync"
	"time"
)

// patience is how long a datagram may go without an answer before it is lost.
const patience = 3 * time.Second

// streams keeps a group of streams going.
type streams struct {
	Streams
	mu     sync.Mutex // guards the fields below
	stream []stream
	report StreamReport
}

type stream struct {
	pod     string // that answered last
	last    time.Time
	waiting map[int]time.Time // sequence numbers without an answer, and when they were sent
}

func newStreams(s Streams) *streams {
	g := &streams{Streams: s, stream: make([]stream, s.Count)}
	for i := range g.stream {
		g.stream[i].waiting = map[int]time.Time{}
	}
	g.resetLocked(time.Now())
	return g
}

func (g *streams) run(ctx context.Context) {
	var group sync.WaitGroup
	for i := range g.Count {
		group.Go(func() {
			if !sleep(ctx, g.Every*time.Duration(i)/time.Duration(g.Count)) {
				return
			}
			if err := g.one(ctx, i); err != nil && ctx.Err() == nil {
				g.failed(err)
			}
		})
	}
	group.Wait()
}

func (g *streams) one(ctx context.Context, i int) error {
	conn, err := net.Dial("udp", g.Target.String())
	if err != nil {
		return err
	}
	var group sync.WaitGroup
	defer group.Wait()
	defer func() { _ = conn.Close() }()
	group.Go(func() { g.read(conn, i) })
	ticker := time.NewTicker(g.Every)
	defer ticker.Stop()
	for seq := 1; ; seq++ {
		g.sent(i, seq)
		if _, err := conn.Write([]byte(strconv.Itoa(seq))); err != nil {
			g.failed(err) // an ICMP error of an earlier datagram; this one was not sent and will be lost
		}
		select {
		case <-ticker.C:
		case <-ctx.Done():
			return nil
		}
	}
}

func (g *streams) read(conn net.Conn, i int) {
	buffer := make([]byte, 2048)
	for {
		n, err := conn.Read(buffer)
		if errors.Is(err, net.ErrClosed) {
			return
		}
		if err != nil {
			g.failed(err)
			continue
		}
		fields := strings.Fields(string(buffer[:n]))
		if len(fields) != 3 {
			g.failed(errGarbled)
			continue
		}
		seq, err := strconv.Atoi(fields[2])
		if err != nil {
			g.failed(errGarbled)
			continue
		}
		g.answered(i, seq, fields[0])
	}
}

func (g *streams) sent(i, seq int) {
	g.mu.Lock()
	defer g.mu.Unlock()
	now := time.Now()
	g.report.Sent++
	g.stream[i].waiting[seq] = now
	g.giveUp(i, now)
}

// giveUp counts what has waited too long. It needs mu.
func (g *streams) giveUp(i int, now time.Time) {
	for seq, sent := range g.stream[i].waiting {
		if now.Sub(sent) > patience {
			delete(g.stream[i].waiting, seq)
			g.report.Lost++
		}
	}
}

func (g *streams) answered(i, seq int, pod string) {
	g.mu.Lock()
	defer g.mu.Unlock()
	s := &g.stream[i]
	if _, waits := s.waiting[seq]; !waits {
		return // given up, or answered already
	}
	delete(s.waiting, seq)
	now := time.Now()
	g.report.Answered++
	if s.pod != "" {
		g.report.LongestGap = max(g.report.LongestGap, now.Sub(s.last))
		if s.pod != pod {
			g.report.OtherPod++
		}
	}
	s.pod, s.last = pod, now
}

func (g *streams) failed(err error) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.report.Errors[kind(err)]++
}

// snapshot reports, and begins the counters anew if it is asked to; what was sent before is then not counted when it is
// lost or answered later.
func (g *streams) snapshot(now time.Time, reset bool) StreamReport {
	g.mu.Lock()
	defer g.mu.Unlock()
	if reset {
		defer g.resetLocked(now)
	}
	for i := range g.stream {
		g.giveUp(i, now)
	}
	r := g.report
	r.Errors = added(nil, r.Errors)
	r.Pods = map[string]int{}
	for _, s := range g.stream {
		if s.pod != "" {
			r.Pods[s.pod]++
			r.LongestGap = max(r.LongestGap, now.Sub(s.last))
		}
	}
	return r
}

func (g *streams) resetLocked(now time.Time) {
	g.report = StreamReport{Name: g.Name, Count: g.Count, Errors: map[string]int{}}
	for i := range g.stream {
		clear(g.stream[i].waiting)
		g.stream[i].last = now
	}
}
