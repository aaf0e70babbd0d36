package health

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"os"
	"strings"
	"sync"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"

	"github.com/ravel-lb/ravel"
	"github.com/ravel-lb/ravel/internal/nettest"
)

func TestMain(m *testing.M) { nettest.Main(m) }

// network answers probes as it is told; what it is not told of is silent.
type network struct {
	mu      sync.Mutex
	answers map[netip.Addr]func() (ravel.Health, error)
	delay   time.Duration
	asked   map[netip.Addr][]time.Time
	open    int
	most    int
}

func newNetwork() *network {
	return &network{
		answers: map[netip.Addr]func() (ravel.Health, error){}, asked: map[netip.Addr][]time.Time{},
		delay: time.Millisecond,
	}
}

// set makes addr answer h from now on; Silent does not answer.
func (n *network) set(addr netip.Addr, h ravel.Health, err error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.answers[addr] = func() (ravel.Health, error) { return h, err }
}

func (n *network) probe(ctx context.Context, t Target) (ravel.Health, error) {
	n.mu.Lock()
	n.asked[t.Addr] = append(n.asked[t.Addr], time.Now())
	n.open++
	n.most = max(n.most, n.open)
	delay := n.delay
	n.mu.Unlock()
	defer func() {
		n.mu.Lock()
		n.open--
		n.mu.Unlock()
	}()
	select {
	case <-time.After(delay):
	case <-ctx.Done():
		return ravel.Silent, ctx.Err()
	}
	n.mu.Lock()
	answer := n.answers[t.Addr]
	n.mu.Unlock()
	if answer != nil {
		if h, err := answer(); h != ravel.Silent {
			return h, err
		}
	}
	<-ctx.Done()
	return ravel.Silent, ctx.Err()
}

func (n *network) count(addr netip.Addr) int {
	n.mu.Lock()
	defer n.mu.Unlock()
	return len(n.asked[addr])
}

// address returns the nth of many addresses, of both families.
func address(n int) netip.Addr {
	if n%2 == 0 {
		return netip.AddrFrom4([4]byte{10, 0, byte(n >> 8), byte(n)})
	}
	return netip.AddrFrom16([16]byte{0: 0xfd, 14: byte(n >> 8), 15: byte(n)})
}

func targetsOf(n int) []Target {
	var all []Target
	for i := range n {
		all = append(all, Target{Addr: address(i), Port: 8080})
	}
	return all
}

// running runs a prober against n until the returned function is called. It is for use in a synctest bubble.
func running(t *testing.T, n *network, o Options) (*Prober, func()) {
	t.Helper()
	p := New(o)
	p.probe = n.probe
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- p.Run(ctx) }()
	return p, func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("Run: %v", err)
		}
	}
}

// until waits until addr is h and says how long it took; after limit it gives up.
func until(p *Prober, addr netip.Addr, h ravel.Health, limit time.Duration) (time.Duration, bool) {
	begin := time.Now()
	end := time.After(limit)
	for {
		changed := p.Changed()
		if now, known := p.Latest(); known && now[addr] == h {
			return time.Since(begin), true
		}
		select {
		case <-changed:
		case <-end:
			return limit, false
		}
	}
}

var presets = map[string]Timing{"lan": LAN(), "fast": Fast()}

// The bounds that the documents name, at random moments of the cut.
func TestPowerCutIsFoundWithinTheFormula(t *testing.T) {
	for name, timing := range presets {
		for _, hurried := range []bool{true, false} {
			t.Run(fmt.Sprintf("%s, hurried %v", name, hurried), func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) {
					n := newNetwork()
					p, stop := running(t, n, Options{Timing: timing})
					defer stop()
					targets := targetsOf(10)
					for _, target := range targets {
						n.set(target.Addr, ravel.Healthy, nil)
					}
					if err := p.Apply(targets); err != nil {
						t.Fatal(err)
					}
					seed := rand.Uint64()
					t.Logf("seed %d", seed)
					rnd := rand.New(rand.NewPCG(seed, 0))
					bound, worst := timing.Detect()+publishGap, time.Duration(0)
					if hurried {
						bound = timing.Confirm() + publishGap
					}
					for range runs(40) {
						addr := targets[rnd.IntN(len(targets))].Addr
						if _, well := until(p, addr, ravel.Healthy, firstSpread+timing.Detect()); !well {
							t.Fatalf("%s is not healthy", addr)
						}
						time.Sleep(time.Duration(rnd.Int64N(int64(3 * timing.Interval))))
						n.set(addr, ravel.Silent, nil)
						if hurried {
							time.Sleep(time.Duration(rnd.Int64N(int64(timing.Interval / 4)))) // gossip takes a while
							p.Hurry([]netip.Addr{addr})
						}
						took, found := until(p, addr, ravel.Silent, bound)
						if !found {
							t.Fatalf("%s is not silent %s after the cut", addr, bound)
						}
						worst = max(worst, took)
						p.Hurry(nil)
						n.set(addr, ravel.Healthy, nil)
					}
					t.Logf("worst %s of %s", worst, bound)
				})
			})
		}
	}
}

func TestPresetsLeaveTimeForGossip(t *testing.T) {
	// Gossip suspects within 0.6 s and 2 s; the rest of the bounds of 2 s and 8 s is for the report and the kernel.
	if got := 600*time.Millisecond + Fast().Confirm() + publishGap; got > 1500*time.Millisecond {
		t.Errorf("fast: %s", got)
	}
	if got := 2*time.Second + LAN().Confirm() + publishGap; got > 5*time.Second {
		t.Errorf("lan: %s", got)
	}
	if fast, lan := Fast().Detect(), LAN().Detect(); fast != 1550*time.Millisecond || lan != 7*time.Second {
		t.Errorf("without a hint: fast %s, lan %s", fast, lan)
	}
}

func TestLostProbesAreNoSilence(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := newNetwork()
		p, stop := running(t, n, Options{Timing: Fast()})
		defer stop()
		addr := address(0)
		_ = p.Apply(targetsOf(1))
		calls := 0
		n.mu.Lock()
		n.answers[addr] = func() (ravel.Health, error) { // two of three are lost
			n.mu.Lock()
			defer n.mu.Unlock()
			calls++
			if calls%3 == 0 {
				return ravel.Healthy, nil
			}
			return ravel.Silent, nil
		}
		n.mu.Unlock()
		if _, well := until(p, addr, ravel.Healthy, 5*time.Second); !well {
			t.Fatal("never healthy")
		}
		changed := p.Changed()
		select {
		case <-changed:
			now, _ := p.Latest()
			t.Fatalf("changed to %v", now)
		case <-time.After(10 * time.Minute):
		}
	})
}

func TestQuietWhileNothingChanges(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := newNetwork()
		p, stop := running(t, n, Options{Timing: LAN()})
		defer stop()
		targets := targetsOf(150)
		for i, target := range targets {
			n.set(target.Addr, []ravel.Health{ravel.Healthy, ravel.Refused, ravel.Silent}[i%3], nil)
		}
		_ = p.Apply(targets)
		time.Sleep(time.Minute)
		value, _ := p.Latest()
		if len(value) != 150 || value[address(0)] != ravel.Healthy || value[address(1)] != ravel.Refused || value[address(2)] != ravel.Silent {
			t.Fatalf("%d found", len(value))
		}
		n.mu.Lock()
		clear(n.asked)
		n.mu.Unlock()
		changed := p.Changed()
		begin := time.Now()
		time.Sleep(3 * time.Minute)
		select {
		case <-changed:
			t.Error("a value without news")
		default:
		}
		n.mu.Lock()
		defer n.mu.Unlock()
		perSecond := map[int]int{}
		for addr, times := range n.asked {
			if rate := float64(len(times)) / 180; rate < 0.19 || rate > 0.26 {
				t.Errorf("%s was probed %.3f times a second", addr, rate)
			}
			for i, at := range times {
				perSecond[int(at.Sub(begin)/time.Second)]++
				if i > 0 && at.Sub(times[i-1]) > LAN().Interval {
					t.Errorf("%s was not probed for %s", addr, at.Sub(times[i-1]))
				}
			}
		}
		most := 0
		for _, count := range perSecond {
			most = max(most, count)
		}
		if most > 80 {
			t.Errorf("%d probes in one second, of 33 on average", most)
		}
		t.Logf("most probes in one second: %d; in flight: %d", most, n.most)
	})
}

func TestInFlightIsBounded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := newNetwork()
		p, stop := running(t, n, Options{Timing: Fast(), InFlight: 16})
		defer stop()
		_ = p.Apply(targetsOf(200)) // all silent
		if _, silent := until(p, address(199), ravel.Silent, time.Minute); !silent {
			t.Fatal("starved")
		}
		time.Sleep(time.Minute)
		value, _ := p.Latest()
		n.mu.Lock()
		defer n.mu.Unlock()
		if len(value) != 200 || n.most > 16 {
			t.Fatalf("%d found, %d in flight", len(value), n.most)
		}
	})
}

func TestHurryIsOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := newNetwork()
		p, stop := running(t, n, Options{Timing: LAN()})
		defer stop()
		addr := address(0)
		n.set(addr, ravel.Healthy, nil)
		_ = p.Apply(targetsOf(1))
		time.Sleep(time.Minute)
		before := n.count(addr)
		for range 100 { // gossip is blocked: it is suspected for ever, and answers
			p.Hurry([]netip.Addr{addr, address(7)})
			time.Sleep(time.Millisecond)
		}
		if got := n.count(addr) - before; got < 1 || got > 2 {
			t.Fatalf("%d probes, want one for the hint", got)
		}
		if value, _ := p.Latest(); value[addr] != ravel.Healthy {
			t.Fatalf("found %v", value)
		}
	})
}

func TestFaultsOfThisHostSayNothing(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := newNetwork()
		reg := prometheus.NewRegistry()
		p, stop := running(t, n, Options{Timing: Fast(), Registerer: reg})
		defer stop()
		a, b := address(0), address(1)
		n.set(a, ravel.Healthy, nil)
		n.set(b, ravel.Healthy, nil)
		_ = p.Apply(targetsOf(2))
		time.Sleep(5 * time.Second)

		calls := 0
		n.mu.Lock()
		n.answers[a] = func() (ravel.Health, error) { // for a moment there are no files
			n.mu.Lock()
			defer n.mu.Unlock()
			if calls++; calls < 3 {
				return ravel.Unprobed, os.NewSyscallError("socket", syscall.EMFILE)
			}
			return ravel.Healthy, nil
		}
		n.mu.Unlock()
		changed := p.Changed()
		time.Sleep(5 * time.Second)
		select {
		case <-changed:
			t.Error("two faults in a row ended an opinion")
		default:
		}

		n.set(a, ravel.Unprobed, os.NewSyscallError("connect", syscall.ENETUNREACH))
		n.set(b, ravel.Unprobed, os.NewSyscallError("connect", syscall.ENETUNREACH))
		if _, gone := until(p, a, ravel.Unprobed, 2*time.Second); !gone {
			t.Fatal("an opinion that nothing supports stands")
		}
		time.Sleep(5 * time.Second)
		problems := fmt.Sprint(p.Problems())
		if want := "[probes: cannot probe 2 real servers, such as 10.0.0.0: network is unreachable; this director says nothing of them]"; problems != want {
			t.Errorf("problems\n%s, want\n%s", problems, want)
		}
		if testutil.ToFloat64(p.metrics.probes.WithLabelValues("unprobed")) < 6 {
			t.Error("faults are not counted")
		}
		if got := testutil.ToFloat64(p.metrics.targets.WithLabelValues("unprobed")); got != 2 {
			t.Errorf("%g addresses are unprobed by the metric", got)
		}
		n.set(a, ravel.Healthy, nil)
		n.set(b, ravel.Refused, errors.New("x"))
		time.Sleep(5 * time.Second)
		if value, _ := p.Latest(); value[a] != ravel.Healthy || value[b] != ravel.Refused || len(p.Problems()) != 0 {
			t.Errorf("found %v, problems %v", value, p.Problems())
		}
	})
}

func TestAStallIsNoSilence(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		timing := Fast()
		p := New(Options{Timing: timing})
		stalled := true
		var mu sync.Mutex
		p.probe = func(ctx context.Context, _ Target) (ravel.Health, error) {
			<-ctx.Done()
			mu.Lock()
			late := stalled
			mu.Unlock()
			if late {
				time.Sleep(5 * time.Second) // as if nothing had run
			}
			return ravel.Silent, ctx.Err()
		}
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error, 1)
		go func() { done <- p.Run(ctx) }()
		defer func() { cancel(); <-done }()
		_ = p.Apply(targetsOf(1))
		if took, silent := until(p, address(0), ravel.Silent, time.Minute); silent {
			t.Fatalf("silent after %s", took)
		}
		mu.Lock()
		stalled = false
		mu.Unlock()
		if _, silent := until(p, address(0), ravel.Silent, time.Minute); !silent {
			t.Fatal("not silent")
		}
	})
}

func TestApply(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := newNetwork()
		p, stop := running(t, n, Options{Timing: Fast()})
		defer stop()
		if _, known := p.Latest(); known {
			t.Fatal("known before any target")
		}
		_ = p.Apply(nil)
		synctest.Wait()
		if value, known := p.Latest(); !known || len(value) != 0 {
			t.Fatalf("without targets: %v, %v", value, known)
		}
		a, b := address(0), address(1)
		n.set(a, ravel.Healthy, nil)
		n.set(b, ravel.Healthy, nil)
		_ = p.Apply(targetsOf(2))
		time.Sleep(3 * time.Second)
		old, _ := p.Latest()
		if len(old) != 2 {
			t.Fatalf("found %v", old)
		}

		// Another port: what was found stands until the new probe finds something.
		n.set(a, ravel.Silent, nil)
		_ = p.Apply([]Target{{Addr: a, Port: 9}, {Addr: b, Port: 8080}})
		synctest.Wait()
		if value, _ := p.Latest(); value[a] != ravel.Healthy {
			t.Fatalf("after another port: %v", value)
		}
		if took, silent := until(p, a, ravel.Silent, Fast().Confirm()+publishGap); !silent {
			t.Fatalf("not silent after %s", took)
		}

		_ = p.Apply([]Target{{Addr: a, Port: 9}})
		time.Sleep(publishGap)
		synctest.Wait()
		if value, _ := p.Latest(); len(value) != 1 {
			t.Fatalf("after one is gone: %v", value)
		}
		if len(old) != 2 || old[a] != ravel.Healthy {
			t.Fatal("a value that was given out changed")
		}
		before := n.count(b)
		time.Sleep(time.Minute)
		if n.count(b) != before {
			t.Fatal("who is no target is probed")
		}
	})
}

func TestApplyNamesBadTargets(t *testing.T) {
	p := New(Options{})
	a := netip.MustParseAddr("10.0.0.1")
	err := p.Apply([]Target{
		{Addr: a, Port: 2}, {Addr: a, Port: 1}, {Addr: a, Port: 1},
		{Port: 1},
		{Addr: netip.MustParseAddr("::ffff:10.0.0.2"), Port: 1},
		{Addr: netip.MustParseAddr("224.0.0.1"), Port: 1},
		{Addr: netip.MustParseAddr("10.0.0.3")},
		{Addr: netip.MustParseAddr("10.0.0.4"), Port: 1, Kind: "icmp"},
		{Addr: netip.MustParseAddr("10.0.0.5"), Port: 1, Kind: HTTP, Path: "/a\r\nX: y"},
		{Addr: netip.MustParseAddr("10.0.0.6"), Port: 1, Kind: HTTP, Path: "a"},
	})
	want := `target to probe: address "invalid IP": cannot be a real server's
target to probe: 10.0.0.1: is there twice; port 2 was left out
target to probe: 10.0.0.3: port missing
target to probe: 10.0.0.4: kind "icmp": want tcp or http
target to probe: 10.0.0.5: a space or control character in path "/a\r\nX: y" or host ""
target to probe: 10.0.0.6: path "a": does not begin with /
target to probe: address "224.0.0.1": cannot be a real server's
target to probe: address "::ffff:10.0.0.2": cannot be a real server's`
	if err == nil || err.Error() != want {
		t.Errorf("got\n%v, want\n%s", err, want)
	}
	if got := len(*p.given); got != 1 {
		t.Errorf("%d targets are left, want 1", got)
	}
}

func FuzzAsk(f *testing.F) {
	f.Add("HTTP/1.1 200 OK\r\n\r\n")
	f.Add("HTTP/1.1 302 Found\r\nLocation: /\r\n\r\n")
	f.Add("HTTP/1.1 503 No\r\n\r\n")
	f.Add("HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\n\r\n")
	f.Add("SSH-2.0-x\r\n")
	f.Add("")
	f.Add("HTTP/1.1 200 OK\r\nX: " + strings.Repeat("x", 1<<17))
	f.Fuzz(func(t *testing.T, answer string) {
		err := ask(&exchange{in: strings.NewReader(answer)}, Target{Addr: address(0), Port: 80, Kind: HTTP})
		if err == nil && !strings.HasPrefix(answer, "HTTP/") {
			t.Errorf("%.40q is well", answer)
		}
	})
}

func TestAsk(t *testing.T) {
	for answer, want := range map[string]string{
		"HTTP/1.1 200 OK\r\n\r\n":                                       "",
		"HTTP/1.0 204 No Content\r\n\r\n":                               "",
		"HTTP/1.1 302 Found\r\nLocation: http://10.9.9.9/\r\n\r\n":      "",
		"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nnonsense": "",
		"HTTP/1.1 404 Not Found\r\n\r\n":                                "answer of status 404",
		"HTTP/1.1 503 Service Unavailable\r\n\r\n":                      "answer of status 503",
		"HTTP/1.1 100 Continue\r\n\r\n":                                 "answer of status 100",
		"SSH-2.0-OpenSSH_9.2\r\n":                                       `reading the answer: malformed HTTP response "SSH-2.0-OpenSSH_9.2"`,
		"":                                                              "reading the answer: unexpected EOF",
		"HTTP/1.1 200 OK\r\nX: " + strings.Repeat("x", maxAnswer) + "\r\n\r\n": "reading the answer: unexpected EOF",
	} {
		e := &exchange{in: strings.NewReader(answer)}
		err := ask(e, Target{Addr: netip.MustParseAddr("fd00::1"), Port: 80, Kind: HTTP, Path: "/healthz?x=1"})
		if got := fmt.Sprint(err); got != want && (want != "" || err != nil) {
			t.Errorf("%.40q: %s, want %s", answer, got, want)
		}
		want := "GET /healthz?x=1 HTTP/1.1\r\nHost: [fd00::1]:80\r\nUser-Agent: ravel\r\nConnection: close\r\n\r\n"
		if got := e.out.String(); got != want {
			t.Errorf("asked %q", got)
		}
	}
}

type exchange struct {
	in  *strings.Reader
	out strings.Builder
}

func (e *exchange) Read(b []byte) (int, error)  { return e.in.Read(b) }
func (e *exchange) Write(b []byte) (int, error) { return e.out.Write(b) }

func TestClassify(t *testing.T) {
	for _, c := range []struct {
		err      error
		routable bool
		want     ravel.Health
	}{
		{syscall.ECONNREFUSED, true, ravel.Refused},
		{syscall.ECONNRESET, true, ravel.Refused},
		{syscall.ENOPROTOOPT, true, ravel.Refused},
		{syscall.ETIMEDOUT, true, ravel.Silent},
		{context.DeadlineExceeded, true, ravel.Silent},
		{os.ErrDeadlineExceeded, true, ravel.Silent},
		{syscall.EHOSTUNREACH, true, ravel.Silent},
		{syscall.ENETUNREACH, true, ravel.Silent},
		{syscall.EHOSTUNREACH, false, ravel.Unprobed},
		{syscall.ENETUNREACH, false, ravel.Unprobed},
		{syscall.EADDRNOTAVAIL, true, ravel.Unprobed},
		{syscall.EMFILE, true, ravel.Unprobed},
		{syscall.ENOBUFS, true, ravel.Unprobed},
		{syscall.EPERM, true, ravel.Unprobed},
		{syscall.EACCES, true, ravel.Unprobed},
		{syscall.EAFNOSUPPORT, true, ravel.Unprobed},
		{context.Canceled, true, ravel.Unprobed},
		{errors.New("what is this"), true, ravel.Unprobed},
	} {
		if got := classify(fmt.Errorf("dial: %w", c.err), func() bool { return c.routable }); got != c.want {
			t.Errorf("%v, with a route %v: %s, want %s", c.err, c.routable, got, c.want)
		}
	}
}

// Probes that wait while this host stands still say nothing; those that begin afterwards do.
func TestAStalledHostFindsNobodySilent(t *testing.T) {
	p := New(Options{Timing: LAN()})
	r := &round{Prober: p, subjects: map[netip.Addr]*subject{}, results: make(chan result, p.inFlight)}
	p.probe = func(context.Context, Target) (ravel.Health, error) { return ravel.Silent, context.DeadlineExceeded }
	targets, now := targetsOf(1), time.Now()
	r.targets(targets, now)
	s := r.subjects[targets[0].Addr]
	found := func() ravel.Health {
		now = now.Add(5 * time.Second)
		for range p.timing.Failures {
			r.plan(s, now)
			r.start(t.Context(), now)
		}
		return s.state
	}
	late := func(by time.Duration) {
		r.woke(now, now.Add(by))
		for r.open > 0 {
			r.finish(<-r.results, now.Add(2*time.Second))
		}
	}
	for range 3 {
		if h := found(); h != ravel.Unprobed {
			t.Fatalf("%s before an answer was due", h)
		}
		late(p.timing.Timeout)
		if s.state != ravel.Unprobed || s.silences != 0 || s.fault != "" {
			t.Errorf("a stalled host found %s, %d silences, %q", s.state, s.silences, s.fault)
		}
		if s.due.After(now.Add(2*time.Second + p.timing.Rapid)) {
			t.Error("it does not ask again at once")
		}
	}
	found()
	late(p.timing.Timeout / 10)
	if s.state != ravel.Silent {
		t.Errorf("a host that runs found %s, want silent", s.state)
	}
}

// A fleet's worth of targets, well and dead, for a second of the preset "lan".
func BenchmarkScheduling(b *testing.B) {
	p := New(Options{Timing: LAN()})
	r := &round{Prober: p, subjects: map[netip.Addr]*subject{}, results: make(chan result, p.inFlight)}
	p.probe = func(context.Context, Target) (ravel.Health, error) { return ravel.Healthy, nil }
	targets, now := targetsOf(500), time.Now()
	r.targets(targets, now)
	b.ReportAllocs()
	for b.Loop() {
		now = now.Add(time.Second)
		r.start(context.Background(), now)
		for r.open > 0 {
			r.finish(<-r.results, now)
		}
		r.publish(now)
	}
}
