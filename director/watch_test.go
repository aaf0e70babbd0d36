package director

import (
	"bytes"
	"encoding/binary"
	"log/slog"
	"net/netip"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ravel-lb/ravel"
	"github.com/ravel-lb/ravel/internal/nettest"
)

// eventually waits until is holds.
func eventually(t *testing.T, what string, is func() bool) {
	t.Helper()
	for deadline := time.Now().Add(10 * time.Second); !is(); time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("not in 10 s: %s", what)
		}
	}
}

// TestCleanStopIsNoFault closes watches at every moment of their life; nothing is logged.
func TestCleanStopIsNoFault(t *testing.T) {
	nettest.Need(t, nettest.Root)
	var log bytes.Buffer
	for n := range 50 {
		r, err := newReach(nil, slog.New(slog.NewTextHandler(&log, nil)))
		if err != nil {
			t.Fatal(err)
		}
		time.Sleep(time.Duration(n%5) * time.Millisecond) // so that it reads already, or not yet
		r.close()
	}
	if log.Len() > 0 {
		t.Errorf("logged:\n%s", log.String())
	}
}

// faulty is a socket whose Receive fails with what is sent to it, and with EAGAIN once it is closed.
type faulty struct {
	errs   chan error
	closed chan struct{}
	once   sync.Once
}

func (f *faulty) Receive() ([]syscall.NetlinkMessage, *unix.SockaddrNetlink, error) {
	select {
	case err := <-f.errs:
		return nil, nil, err
	case <-f.closed:
		return nil, nil, unix.EAGAIN
	}
}

func (f *faulty) Close() { f.once.Do(func() { close(f.closed) }) }

// TestWatchBeginsAgain has the socket fail, and the next one not come at first.
func TestWatchBeginsAgain(t *testing.T) {
	errs := make(chan error)
	var changes, opened, left atomic.Int64
	open := func() (socket, error) {
		if n := opened.Add(1); n == 2 {
			return nil, unix.ENOMEM
		}
		left.Add(1)
		return &faulty{errs: errs, closed: make(chan struct{})}, nil
	}
	w, err := newWatch(func() { changes.Add(1) }, slog.New(slog.DiscardHandler), open, time.Millisecond)
	if err != nil {
		t.Fatal(err)
	}
	errs <- unix.EINTR
	errs <- unix.ENOBUFS
	eventually(t, "lost messages are a change", func() bool { return changes.Load() == 1 })
	if n := opened.Load(); n != 1 {
		t.Errorf("opened %d times before any fault", n)
	}
	errs <- unix.EBADF
	eventually(t, "the third socket is open, and what was missed is a change", func() bool { return opened.Load() == 3 && changes.Load() == 2 })
	errs <- unix.ENOBUFS
	eventually(t, "it is read", func() bool { return changes.Load() == 3 })
	w.close()
}

// TestCloseEndsAWatchThatWaits has the next socket never come.
func TestCloseEndsAWatchThatWaits(t *testing.T) {
	errs := make(chan error)
	w, err := newWatch(func() {}, slog.New(slog.DiscardHandler), func() (socket, error) {
		return &faulty{errs: errs, closed: make(chan struct{})}, nil
	}, time.Hour)
	if err != nil {
		t.Fatal(err)
	}
	errs <- unix.EBADF
	closed := make(chan struct{})
	go func() {
		defer close(closed)
		w.close()
	}()
	select {
	case <-closed:
	case <-time.After(10 * time.Second):
		t.Fatal("close waits for the pause")
	}
}

// asked is routes that can change and that count questions.
type asked struct {
	*hostRoutes
	mu     sync.Mutex
	behind map[netip.Addr]bool
	n      int
}

func (a *asked) onLink(addr netip.Addr) (bool, error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.n++
	return !a.behind[addr], nil
}

func (a *asked) count() int {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.n
}

// TestEventsOfNoConsequence has many events at once cost one question for each address and no pass, and one that
// changes the way to a real server cost a pass.
func TestEventsOfNoConsequence(t *testing.T) {
	routes := &asked{hostRoutes: newHostRoutes(), behind: map[netip.Addr]bool{}}
	f := &fake{}
	d := start(t, Options{open: f.handle, routes: routes})
	auto := func(a string) ravel.RealServer {
		r := rs(a, 1)
		r.Forwarding = ravel.Auto
		return r
	}
	want := []ravel.VirtualService{vs("tcp 192.0.2.1:80", auto("10.0.0.2"), auto("10.0.0.1")), vs("tcp 192.0.2.2:80", auto("10.0.0.1"))}
	apply(t, d, want...)
	if n := routes.count(); n != 2 {
		t.Fatalf("%d questions for two addresses", n)
	}
	generation := d.reach.generation()
	began := time.Now()
	for range 50 {
		d.reach.event()
		time.Sleep(time.Millisecond) // they come one by one
	}
	eventually(t, "both are asked for again", func() bool { return routes.count() >= 4 })
	select {
	case <-d.Changed():
		t.Error("told of a change though every way is as before")
	case <-time.After(3 * settle):
	}
	most := 2 + 2*int(time.Since(began)/settle)
	if n := routes.count(); n > most || d.reach.generation() != generation {
		t.Errorf("%d questions, generation %d; want %d at most, %d", n, d.reach.generation(), most, generation)
	}

	routes.mu.Lock()
	routes.behind[netip.MustParseAddr("10.0.0.2")] = true
	routes.mu.Unlock()
	d.reach.event()
	select {
	case <-d.Changed():
	case <-time.After(10 * time.Second):
		t.Fatal("not told of a change")
	}
	f.changes = nil
	apply(t, d, want...)
	if n := len(f.changes); n != 1 {
		t.Errorf("%d changes, want the one real server: %s", n, strings.Join(f.changes, "; "))
	}
}

// TestForgottenAddresses has real servers come and go for ever.
func TestForgottenAddresses(t *testing.T) {
	d := start(t, Options{open: (&fake{}).handle})
	for n := range 2000 {
		a := netip.AddrFrom4([4]byte{10, 0, byte(n / 250), byte(n%250 + 1)})
		apply(t, d, vs("tcp 192.0.2.1:80", rs(a.String(), 1), rs("10.1.0.1", 1)))
	}
	if n := len(d.reach.known) + len(d.reach.last); n > 300 {
		t.Errorf("%d addresses are remembered for two real servers", n)
	}
}

// linkMessage is an RTM_NEWLINK as the kernel writes it.
func linkMessage(family byte, index int32, flags uint32, attrs ...[]byte) []byte {
	b := make([]byte, unix.SizeofIfInfomsg)
	b[0] = family
	binary.NativeEndian.PutUint32(b[4:], uint32(index))
	binary.NativeEndian.PutUint32(b[8:], flags)
	for _, a := range attrs {
		b = append(b, a...)
	}
	return b
}

func attr(kind uint16, value ...byte) []byte {
	b := make([]byte, unix.SizeofRtAttr)
	binary.NativeEndian.PutUint16(b, uint16(unix.SizeofRtAttr+len(value)))
	binary.NativeEndian.PutUint16(b[2:], kind)
	b = append(b, value...)
	for len(b)%unix.RTA_ALIGNTO != 0 {
		b = append(b, 0)
	}
	return b
}

func TestLinks(t *testing.T) {
	known := linkStates{}
	name := attr(unix.IFLA_IFNAME, 'e', 'n', 's', '1', 0)
	up, dormant := attr(unix.IFLA_OPERSTATE, 6), attr(unix.IFLA_OPERSTATE, 5)
	for _, step := range []struct {
		what string
		kind uint16
		data []byte
		want bool
	}{
		{"a link that was not known", unix.RTM_NEWLINK, linkMessage(0, 3, unix.IFF_UP, name, up), true},
		{"the same again", unix.RTM_NEWLINK, linkMessage(0, 3, unix.IFF_UP, name, up), false},
		{"with what has no consequence", unix.RTM_NEWLINK, linkMessage(0, 3, unix.IFF_UP, name, up, attr(unix.IFLA_MTU, 1, 2, 3, 4)), false},
		{"other flags", unix.RTM_NEWLINK, linkMessage(0, 3, 0, name, up), true},
		{"another state", unix.RTM_NEWLINK, linkMessage(0, 3, 0, name, dormant), true},
		{"another master", unix.RTM_NEWLINK, linkMessage(0, 3, 0, name, dormant, attr(unix.IFLA_MASTER, 9, 0, 0, 0)), true},
		{"another link", unix.RTM_NEWLINK, linkMessage(0, 4, 0, name, dormant), true},
		{"a bridge of its port", unix.RTM_NEWLINK, linkMessage(unix.AF_BRIDGE, 3, unix.IFF_UP), false},
		{"a bridge of its former port", unix.RTM_DELLINK, linkMessage(unix.AF_BRIDGE, 3, 0), false},
		{"it goes", unix.RTM_DELLINK, linkMessage(0, 3, 0), true},
		{"it comes back", unix.RTM_NEWLINK, linkMessage(0, 3, 0, name, dormant, attr(unix.IFLA_MASTER, 9, 0, 0, 0)), true},
	} {
		if got := known.matters(step.kind, step.data); got != step.want {
			t.Errorf("%s: matters %t, want %t", step.what, got, step.want)
		}
	}
}

// TestLinkOfNoConsequence has the kernel tell of a link over and over.
func TestLinkOfNoConsequence(t *testing.T) {
	links(t)
	var changes atomic.Int64
	w, err := newWatch(func() { changes.Add(1) }, slog.New(slog.DiscardHandler), subscribe, again)
	if err != nil {
		t.Fatal(err)
	}
	defer w.close()
	nettest.Shell(t, `ip link set reach0 alias first`)
	eventually(t, "the first word of a link is seen", func() bool { return changes.Load() > 0 })
	before := changes.Load()
	nettest.Shell(t, `for i in 1 2 3 4 5 6 7 8 9; do ip link set reach0 alias "text $i"; done; ip route add 10.2.0.0/16 dev reach0`)
	eventually(t, "the route is seen", func() bool { return changes.Load() > before })
	if n := changes.Load() - before; n != 1 {
		t.Errorf("%d changes seen, want that of the route only", n)
	}
}

func FuzzMatters(f *testing.F) {
	f.Add(uint16(unix.RTM_NEWLINK), []byte{})
	f.Add(uint16(unix.RTM_NEWLINK), linkMessage(0, 3, unix.IFF_UP, attr(unix.IFLA_OPERSTATE, 6), attr(unix.IFLA_MASTER, 1, 2, 3, 4)))
	f.Add(uint16(unix.RTM_NEWLINK), linkMessage(0, 3, unix.IFF_UP, []byte{5, 0, unix.IFLA_OPERSTATE, 0, 6})) // not padded
	f.Add(uint16(unix.RTM_NEWLINK), linkMessage(0, 3, unix.IFF_UP, []byte{3, 0, 1, 0}))
	f.Add(uint16(unix.RTM_DELLINK), linkMessage(0, 3, 0))
	f.Add(uint16(unix.RTM_NEWADDR), []byte{unix.AF_INET, 24, 0, 0, 0, 0, 0, 0})
	f.Add(uint16(unix.RTM_NEWADDR), []byte{unix.AF_INET6})
	f.Add(uint16(unix.RTM_DELROUTE), []byte{unix.AF_INET, 24, 0, 0, 254, 3, 0, unix.RTN_UNICAST, 0, 0, 0, 0})
	f.Add(uint16(unix.RTM_NEWROUTE), []byte{unix.AF_INET6, 128, 0, 0, 254, 2, 0, unix.RTN_UNICAST, 0, 0, 0, 0})
	f.Add(uint16(unix.RTM_NEWROUTE), []byte{unix.AF_INET6, 128, 0, 0})
	f.Fuzz(func(t *testing.T, kind uint16, data []byte) {
		known := linkStates{}
		first := known.matters(kind, data)
		if first && len(data) < 8 {
			t.Errorf("a message of %d bytes matters", len(data))
		}
		if second := known.matters(kind, data); kind == unix.RTM_NEWLINK && second {
			t.Error("the same word of a link matters twice")
		}
	})
}

// BenchmarkEvent is what an event costs that changes no way, with 20 real servers.
func BenchmarkEvent(b *testing.B) {
	r, err := newReach(nil, slog.New(slog.DiscardHandler))
	if err != nil {
		b.Fatal(err)
	}
	defer r.close()
	for n := range 20 {
		r.ask(netip.AddrFrom4([4]byte{127, 0, 0, byte(n + 1)}))
	}
	for b.Loop() {
		r.refresh(b.Context())
	}
}
