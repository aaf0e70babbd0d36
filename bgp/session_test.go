package bgp

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"runtime"
	"strings"
	"sync"
	"testing"
	"time"

	gobgplog "github.com/osrg/gobgp/v3/pkg/log"
	"github.com/osrg/gobgp/v3/pkg/packet/bgp"

	"github.com/ravel-lb/ravel"
)

// logbook is a log that tests read.
type logbook struct {
	mu sync.Mutex // guards the buffer
	b  bytes.Buffer
}

func (l *logbook) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *logbook) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

func (l *logbook) logger() *slog.Logger { return slog.New(slog.NewTextHandler(l, nil)) }

// TestWhySessionsFail gives each of several routers another fate, and reads the reason where an operator would.
func TestWhySessionsFail(t *testing.T) {
	fates := []struct {
		name   string
		before func(r *router) // the session is dialled
		after  func(r *router) // it is up; nil if it never is
		reason string
		flaps  bool
	}{
		{"nobody listens", func(r *router) { r.stop() }, nil, "connecting to 127.0.2.0:1790: connection refused", false},
		{"another AS number than we think", func(r *router) { r.asn++ }, nil, `we sent NOTIFICATION 2/2 OPEN message error: bad peer AS ("as number mismatch`, false},
		{"it refuses our OPEN", func(r *router) {
			r.refuse = bgp.NewBGPNotificationMessage(bgp.BGP_ERROR_OPEN_MESSAGE_ERROR, bgp.BGP_ERROR_SUB_BAD_PEER_AS, nil)
		}, nil, "the router did not accept our OPEN", false},
		{"it takes the connection and falls silent", func(r *router) { r.mute = true }, nil, "sent no OPEN", false},
		{"it shuts down in good order", nil, func(r *router) {
			r.notify(bgp.BGP_ERROR_CEASE, bgp.BGP_ERROR_SUB_ADMINISTRATIVE_SHUTDOWN, "moving to rack 7")
		}, `the router sent NOTIFICATION 6/2 Cease: administrative shutdown ("moving to rack 7")`, true},
		{"it is reset", nil, func(r *router) { r.with(func() { reset(r.conn) }) }, "the router closed or reset the connection", true},
		{"it hangs", func(r *router) { r.deaf = true }, func(*router) {}, "hold timer expired", true},
	}
	var book logbook
	s := speaker(t, Options{Node: "d1", Log: book.logger()})
	var peers []ravel.Peer
	var routers []*router
	for i, fate := range fates {
		r := newRouter(t, fmt.Sprintf("127.0.2.%d", i), 65000+10*uint32(i))
		p := r.peer()
		p.HoldTime = 3 * time.Second
		if fate.before != nil {
			fate.before(r)
		}
		routers, peers = append(routers, r), append(peers, p)
	}
	apply(t, s, peers)
	for i, fate := range fates {
		if fate.after != nil {
			routers[i].wantUps(1)
			fate.after(routers[i])
		}
	}
	for i, fate := range fates {
		t.Run(fate.name, func(t *testing.T) {
			eventually(t, "the reason", func() error {
				p := status(t, s, routers[i].addr.Addr())
				if !strings.Contains(p.LastError, fate.reason) || fate.flaps != (p.Flaps > 0) {
					return fmt.Errorf("%+v; want %q", p, fate.reason)
				}
				return nil
			})
			// The log says it once, however often the speaker tried. A slow machine may see another end of the same session first.
			line, n := fmt.Sprintf("peer=%s asn=%d reason=", peers[i].Addr, peers[i].ASN), 0
			for l := range strings.Lines(book.String()) {
				if strings.Contains(l, line) && strings.Contains(strings.ReplaceAll(l, `\"`, `"`), fate.reason) {
					n++
				}
			}
			if n == 0 || n > 1 && !fate.flaps {
				t.Errorf("%d log lines with %q and the reason %q:\n%s", n, line, fate.reason, book.String())
			}
		})
	}
}

// TestRecovery: a router that comes up late, crashes and comes back is served again within seconds.
func TestRecovery(t *testing.T) {
	r := newRouter(t, "127.0.1.1", 65001)
	steady := newRouter(t, "127.0.1.2", 65002)
	r.stop()
	s := speaker(t, Options{Node: "d1"})
	apply(t, s, []ravel.Peer{r.peer(), steady.peer()}, route("192.0.2.1/32", "10.0.0.7"))
	steady.want("192.0.2.1/32 origin 0 as 64600 via 10.0.0.7")
	wantState(t, s, r, "Active", "connection refused")
	// GoBGP by itself takes 6 s or more to dial again after a session that ended.
	recovered := func() {
		t.Helper()
		from := time.Now()
		r.want("192.0.2.1/32 origin 0 as 64600 via 10.0.0.7")
		if took := time.Since(from); took > 4500*time.Millisecond {
			t.Errorf("recovery took %s", took)
		}
	}
	r.start()
	recovered()
	r.stop()
	r.start()
	recovered()
	if got := steady.counts(); got != "1 sessions, 1 updates" {
		t.Errorf("the other router was troubled: %s", got)
	}
	eventually(t, "flaps", func() error {
		if p := status(t, s, r.addr.Addr()); p.Flaps != 1 {
			return fmt.Errorf("%d, want 1", p.Flaps)
		}
		return nil
	})
}

// TestStop: withdrawn, served on for a while, then a Cease that says who and why.
func TestStop(t *testing.T) {
	a, b := newRouter(t, "127.0.1.1", 65001), newRouter(t, "127.0.1.2", 65002)
	b.stop()
	s := speaker(t, Options{Node: "d1", StopWait: 300 * time.Millisecond})
	peers, routes := []ravel.Peer{a.peer(), b.peer()}, []ravel.Route{route("192.0.2.1/32", "10.0.0.7"), route("2001:db8::1/128", "fd00::7")}
	apply(t, s, peers, routes...)
	a.want("192.0.2.1/32 origin 0 as 64600 via 10.0.0.7", "2001:db8::1/128 origin 0 as 64600 via fd00::7")
	a.forgetLog()

	done := make(chan error, 1)
	began := time.Now()
	go func() { done <- s.Stop(context.Background()) }()
	a.want()
	a.with(func() {
		if a.conn == nil || len(a.ceases) > 0 {
			t.Error("the session ended together with the routes")
		}
	})
	if err := <-done; err != nil {
		t.Error(err)
	}
	if took := time.Since(began); took < 300*time.Millisecond {
		t.Errorf("stopped after %s, which is before StopWait", took)
	}
	eventually(t, "the Cease", func() error {
		a.mu.Lock()
		defer a.mu.Unlock()
		if got, want := strings.Join(a.ceases, "; "), `NOTIFICATION 6/2 Cease: administrative shutdown ("ravel: planned stop of director d1")`; got != want {
			return fmt.Errorf("%q, want %q", got, want)
		}
		return nil
	})
	if err := s.Apply(context.Background(), peers, routes); !errors.Is(err, ErrStopped) {
		t.Errorf("Apply after Stop: %v", err)
	}
	if err := errors.Join(s.Stop(context.Background()), s.Close(), s.Close()); err != nil {
		t.Error(err)
	}
	if st, err := s.Status(context.Background()); err != nil || st.Running || len(st.Announced) > 0 || st.Peers[0].Flaps > 0 {
		t.Errorf("status after Stop: %+v, %v", st, err)
	}
}

// TestStopInAHurry: a context that ends cuts the wait short, and Close cuts a Stop short.
func TestStopInAHurry(t *testing.T) {
	for name, cut := range map[string]func(s *Speaker, cancel func()){
		"context": func(_ *Speaker, cancel func()) { cancel() },
		"close":   func(s *Speaker, _ func()) { _ = s.Close() },
	} {
		t.Run(name, func(t *testing.T) {
			r := newRouter(t, "127.0.1.1", 65001)
			s := speaker(t, Options{StopWait: time.Hour})
			apply(t, s, []ravel.Peer{r.peer()}, route("192.0.2.1/32", "10.0.0.7"))
			r.want("192.0.2.1/32 origin 0 as 64600 via 10.0.0.7")
			ctx, cancel := context.WithCancel(context.Background())
			defer cancel()
			done := make(chan error, 1)
			go func() { done <- s.Stop(ctx) }()
			r.want() // withdrawn: it waits now
			cut(s, cancel)
			select {
			case err := <-done:
				if name == "context" && !errors.Is(err, context.Canceled) {
					t.Errorf("error %v", err)
				}
			case <-time.After(5 * time.Second):
				t.Fatal("Stop still waits")
			}
		})
	}
}

// TestStartStopCycles: no goroutine, port or metric is left behind, whatever state the sessions are in.
func TestStartStopCycles(t *testing.T) {
	r := newRouter(t, "127.0.1.1", 65001)
	cycle := func(i int) {
		s := New(Options{Node: "d1", ListenPort: 1791})
		absent := r.peer()
		absent.Addr = netip.MustParseAddr("127.0.9.9")
		apply(t, s, []ravel.Peer{r.peer(), absent}, route("192.0.2.1/32", "10.0.0.7"))
		var err error
		switch {
		case i%20 == 0:
			r.want("192.0.2.1/32 origin 0 as 64600 via 10.0.0.7")
			err = s.Close()
		case i%2 == 0:
			err = s.Stop(context.Background())
		default:
			apply(t, s, []ravel.Peer{r.peer()})
			err = s.Close()
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	cycle(0)
	r.want()
	before := runtime.NumGoroutine()
	for i := range 12 {
		cycle(i + 1)
	}
	r.want()
	eventually(t, "goroutines", func() error {
		if now := runtime.NumGoroutine(); now > before {
			buf := make([]byte, 1<<16)
			return fmt.Errorf("%d, were %d\n%s", now, before, buf[:runtime.Stack(buf, true)])
		}
		return nil
	})
	for range 200 { // the server alone, as often as it takes to meet any order of events
		gobgp, err := startServer(context.Background(), Options{Log: slog.New(slog.DiscardHandler)}, ourASN,
			netip.MustParseAddr("192.0.2.1"), newSessions(slog.New(slog.DiscardHandler)))
		if err != nil {
			t.Fatal(err)
		}
		gobgp.stop()
		select {
		case <-gobgp.done:
		default:
			t.Fatal("Serve outlives the server")
		}
	}
	l, err := net.Listen("tcp", ":1791")
	if err != nil {
		t.Fatal("the port is still taken:", err)
	}
	l.Close()
}

// TestLocalASN: peers that disagree are named and change nothing; a new number restarts every session.
func TestLocalASN(t *testing.T) {
	a, b := newRouter(t, "127.0.1.1", 65001), newRouter(t, "127.0.1.2", 65002)
	s := speaker(t, Options{Node: "d1"})
	p, q := a.peer(), b.peer()
	apply(t, s, []ravel.Peer{p, q}, route("192.0.2.1/32", "10.0.0.7"))
	a.want("192.0.2.1/32 origin 0 as 64600 via 10.0.0.7")

	q.LocalASN = 64601
	err := s.Apply(context.Background(), []ravel.Peer{p, q}, []ravel.Route{route("192.0.2.2/32", "10.0.0.7")})
	for _, word := range []string{"127.0.1.1", "127.0.1.2", "64600", "64601"} {
		if err == nil || !strings.Contains(err.Error(), word) {
			t.Errorf("error %v, want one with %s", err, word)
		}
	}
	a.want("192.0.2.2/32 origin 0 as 64600 via 10.0.0.7")
	if got := a.counts(); got != "1 sessions, 3 updates" {
		t.Errorf("a has %s", got)
	}

	p.LocalASN = 64601
	apply(t, s, []ravel.Peer{p, q}, route("192.0.2.2/32", "10.0.0.7"))
	a.want("192.0.2.2/32 origin 0 as 64601 via 10.0.0.7")
	b.want("192.0.2.2/32 origin 0 as 64601 via 10.0.0.7")
	if p := status(t, s, a.addr.Addr()); p.Flaps != 0 || p.LocalASN != 64601 {
		t.Errorf("%+v", p)
	}
}

// TestLateRouterID: it counts until GoBGP starts; later it is shown and touches no session.
func TestLateRouterID(t *testing.T) {
	r := newRouter(t, "127.0.1.1", 65001)
	s := speaker(t, Options{Node: "d1"})
	ids := func() string {
		t.Helper()
		st, err := s.Status(context.Background())
		if err != nil {
			t.Fatal(err)
		}
		return fmt.Sprintf("%v %s %s", st.Running, st.RouterID, st.RouterIDWanted)
	}
	peers, routes := []ravel.Peer{r.peer()}, []ravel.Route{route("192.0.2.1/32", "10.0.0.7")}
	apply(t, s, nil)
	s.SetRouterID(netip.MustParseAddr("192.0.2.7"))
	if got := ids(); got != "false invalid IP invalid IP" {
		t.Error("before GoBGP runs:", got)
	}
	apply(t, s, peers, routes...)
	r.want("192.0.2.1/32 origin 0 as 64600 via 10.0.0.7")
	if got := ids(); got != "true 192.0.2.7 invalid IP" {
		t.Error("started:", got)
	}
	s.SetRouterID(netip.MustParseAddr("192.0.2.8"))
	apply(t, s, peers, routes...)
	if got := ids(); got != "true 192.0.2.7 192.0.2.8" {
		t.Error("set while it runs:", got)
	}
	s.SetRouterID(netip.MustParseAddr("192.0.2.7"))
	if got := ids(); got != "true 192.0.2.7 invalid IP" {
		t.Error("set back:", got)
	}
	s.SetRouterID(netip.MustParseAddr("192.0.2.8"))
	if got := r.counts(); got != "1 sessions, 1 updates" {
		t.Error("the session was touched:", got)
	}
	// Another AS number starts GoBGP anew, and that is when it counts.
	peers[0].LocalASN++
	apply(t, s, peers, routes...)
	if got := ids(); got != "true 192.0.2.8 invalid IP" {
		t.Error("started anew:", got)
	}
}

// TestPassive: the router dials us.
func TestPassive(t *testing.T) {
	r := newRouter(t, "127.0.1.1", 65001)
	s := speaker(t, Options{Node: "d1", ListenPort: 1792, ListenAddrs: []netip.Addr{netip.MustParseAddr("127.0.0.7")}})
	p := r.peer()
	p.Passive = true
	apply(t, s, []ravel.Peer{p}, route("192.0.2.1/32", "10.0.0.7"))
	wantState(t, s, r, "Active", "")
	d := net.Dialer{LocalAddr: &net.TCPAddr{IP: net.IPv4(127, 0, 1, 1)}}
	conn, err := d.Dial("tcp", "127.0.0.7:1792")
	if err != nil {
		t.Fatal(err)
	}
	r.with(func() { r.conn = conn })
	r.done.Go(func() { r.serve(conn) })
	r.want("192.0.2.1/32 origin 0 as 64600 via 10.0.0.7")
}

// TestStatusDoesNotWait: an Apply that hangs holds up neither Status nor Announced.
func TestStatusDoesNotWait(t *testing.T) {
	s := speaker(t, Options{Node: "d1"})
	apply(t, s, []ravel.Peer{{Addr: netip.MustParseAddr("127.0.9.9"), ASN: 1, LocalASN: ourASN, HoldTime: 9 * time.Second}})
	s.mu.Lock()
	defer s.mu.Unlock()
	done := make(chan error)
	go func() {
		_, err := s.Status(context.Background())
		s.Announced()
		done <- err
	}()
	select {
	case err := <-done:
		if err != nil {
			t.Error(err)
		}
	case <-time.After(5 * time.Second):
		t.Fatal("Status waits for Apply")
	}
}

// TestGoBGPMayNotEndTheProcess: its Panic and Fatal are log lines and a fault in the status.
func TestGoBGPMayNotEndTheProcess(t *testing.T) {
	var book logbook
	s := speaker(t, Options{Log: book.logger()})
	l := &logger{log: s.log, observer: s.sessions, exit: &exit{}, freed: &freed{}}
	l.Fatal("the sky falls", gobgplog.Fields{"Topic": "Peer", "Key": "127.0.1.1"})
	l.Panic("again", nil)
	st, err := s.Status(context.Background())
	if err != nil || st.Fault != "GoBGP: again" {
		t.Errorf("status %+v, %v", st, err)
	}
	if !strings.Contains(book.String(), `level=ERROR msg="the sky falls" peer=127.0.1.1 topic=Peer`) {
		t.Errorf("log: %s", book.String())
	}
}
