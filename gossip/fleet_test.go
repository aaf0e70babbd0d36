package gossip

import (
	"cmp"
	"context"
	"fmt"
	"log/slog"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"testing/synctest"
	"time"

	"github.com/hashicorp/memberlist"
	"github.com/prometheus/client_golang/prometheus/testutil"
	"github.com/ravel-lb/ravel"
	"github.com/ravel-lb/ravel/gossip/gossiptest"
)

// process is a member that runs in a test.
type process struct {
	*Gossip
	t    testing.TB
	addr netip.AddrPort
	stop func()
}

// world is a fleet in one process and its network.
type world struct {
	b        *testing.B // of a benchmark
	insecure bool
	lookup   lookupFunc
	untold   bool // nobody tells of seeds
	tune     func(*memberlist.Config)
	t        *testing.T
	net      gossiptest.Network
	seeds    []string
	key      string
	preset   Preset // Fast unless set
}

func (w *world) tb() testing.TB {
	if w.b != nil {
		return w.b
	}
	return w.t
}

// virtual runs a test in a bubble where time passes at once.
func virtual(t *testing.T, f func(t *testing.T, w *world)) {
	synctest.Test(t, func(t *testing.T) {
		t.Cleanup(func() { time.Sleep(30 * time.Second) }) // memberlist's goroutines end by and by
		f(t, &world{t: t, key: keyFile(t, NewKey())})
	})
}

func keyFile(t *testing.T, keys ...string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "keys")
	writeKeys(t, path, keys...)
	return path
}

func writeKeys(t *testing.T, path string, keys ...string) {
	t.Helper()
	var b []byte
	for _, k := range keys {
		b = append(b, k+"\n"...)
	}
	if err := os.WriteFile(path, b, 0o600); err != nil {
		t.Fatal(err)
	}
}

// at is the address of the nth host.
func at(n int) netip.AddrPort {
	return netip.AddrPortFrom(netip.AddrFrom4([4]byte{10, 0, byte(n >> 8), byte(n)}), DefaultPort)
}

// config is of the nth host as it is unless a test wants otherwise.
func (w *world) config(n int, role ravel.Role) Config {
	name := fmt.Sprintf("d%d", n)
	if role == ravel.Realserver {
		name = fmt.Sprintf("r%d", n)
	}
	c := Config{
		Insecure: w.insecure,
		Name:     name, Role: role, Fleet: "test", Version: "v0", Preset: cmp.Or(w.preset, Fast), Addrs: []netip.Addr{at(n).Addr()},
		Bind: at(n), KeyFile: w.key, Seeds: w.seeds,
	}
	if os.Getenv("GOSSIP_TEST_LOG") != "" {
		c.Log = slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: slog.LevelDebug})).With("at", name)
	}
	return c
}

// start runs a member until the test or stop ends it.
func (w *world) start(c Config) *process {
	w.tb().Helper()
	if c.Transport == nil {
		c.Transport = w.net.Transport(c.Bind)
	}
	g, err := New(c)
	if err != nil {
		w.tb().Fatal(err)
	}
	g.tune = w.tune
	if w.lookup != nil {
		g.lookup = w.lookup
	}
	return w.run(g)
}

func (w *world) run(g *Gossip) *process {
	if !g.settle.told && !w.untold {
		g.SetSeeds(nil)
	}
	ctx, cancel := context.WithCancel(w.tb().Context())
	done := make(chan error, 1)
	go func() { done <- g.Run(ctx) }()
	stopped := false
	stop := func() {
		if !stopped {
			stopped = true
			cancel()
			if err := <-done; err != nil {
				w.tb().Errorf("%s: %v", g.config.Name, err)
			}
		}
	}
	w.tb().Cleanup(stop)
	return &process{g, w.tb(), g.config.Bind, stop}
}

func (w *world) director(n int) *process { return w.start(w.config(n, ravel.Director)) }

func (w *world) realserver(n int) *process { return w.start(w.config(n, ravel.Realserver)) }

// fleet is what the process knows.
func (p *process) fleet() ravel.Fleet {
	f, _ := p.Latest()
	return f
}

// until waits for a condition.
func until(t testing.TB, what string, within time.Duration, ok func() bool) time.Duration {
	t.Helper()
	begin := time.Now()
	for !ok() {
		if time.Since(begin) > within {
			t.Fatalf("not within %s: %s", within, what)
		}
		time.Sleep(5 * time.Millisecond)
	}
	return time.Since(begin)
}

// sees waits until the process sees a member in a state.
func (p *process) sees(name string, want ravel.MemberState, within time.Duration) time.Duration {
	p.t.Helper()
	return until(p.t, fmt.Sprintf("%s sees %s %s; it knows %v", p.config.Name, name, want, p.fleet().Members), within, func() bool {
		m, ok := p.fleet().Member(name)
		return ok && m.State == want
	})
}

func service(n int) ravel.ServiceKey {
	vip := netip.AddrFrom4([4]byte{192, 0, byte(n >> 8), byte(n)})
	if n%2 == 1 {
		vip = netip.AddrFrom16([16]byte{0x20, 1, 0xd, 0xb8, 14: byte(n >> 8), 15: byte(n)})
	}
	return ravel.ServiceKey{VIP: vip, Proto: ravel.TCP, Port: 80}
}

func entry(n int, birth uint64, state ravel.RosterState) ravel.RosterEntry {
	weight := 7
	if state == ravel.Joining {
		weight = 0
	}
	return ravel.RosterEntry{Addr: at(n).Addr(), Birth: birth, Rev: 1, State: state, Weight: weight}
}

func names(f ravel.Fleet) string {
	var s []string
	for _, m := range f.Members {
		s = append(s, m.Name+":"+m.State.String())
	}
	slices.SortFunc(s, cmp.Compare[string])
	return fmt.Sprint(s)
}

func TestTwoDirectors(t *testing.T) {
	virtual(t, func(t *testing.T, w *world) {
		a := w.director(1)
		until(t, "alone and settled", time.Second, func() bool { return a.fleet().Settled })
		a.Write(service(1), []ravel.RosterEntry{entry(9, 1, ravel.Active)})
		if err := a.SetRegister(ravel.FreezeRegister, "on"); err != nil {
			t.Fatal(err)
		}
		a.Report(ravel.Report{TableSize: 4093, Services: map[ravel.ServiceKey]ravel.ServiceReport{service(1): {Wish: 1, Table: 2, Available: 3}}})
		w.seeds = []string{a.addr.String()}
		b := w.director(2)
		took := until(t, "b settles", 2*time.Second, func() bool { return b.fleet().Settled })
		t.Logf("settled after %s", took)
		f := b.fleet()
		if len(f.Rosters[service(1)]) != 1 || !f.Frozen() || f.Reports["d1"].TableSize != 4093 || names(f) != "[d1:alive d2:alive]" {
			t.Fatalf("b is settled and knows %+v", f)
		}
		b.Write(service(2), []ravel.RosterEntry{entry(8, 1, ravel.Joining), entry(9, 1, ravel.Joining)})
		took = until(t, "a hears of a roster", time.Second, func() bool { return len(a.fleet().Rosters[service(2)]) == 2 })
		if took > 100*time.Millisecond {
			t.Errorf("it took %s", took)
		}
		if r := a.fleet().Rosters[service(2)]; r[0].Addr != at(9).Addr() {
			t.Errorf("not the newest first: %v", r)
		}
		b.stop()
		took = a.sees("d2", ravel.Dead, Fast.DetectWithin(2))
		t.Logf("dead after %s, bound %s", took, Fast.DetectWithin(2))
	})
}

// count is how many messages or bytes of a kind the process sent.
func (p *process) count(what, kind string) float64 {
	vec := p.metrics.messages
	if what == "bytes" {
		vec = p.metrics.bytes
	}
	return testutil.ToFloat64(vec.WithLabelValues("sent", kind))
}

// differ is how many exchanges that others began with the process found a difference.
func (p *process) differ() float64 {
	return testutil.ToFloat64(p.metrics.exchanges.WithLabelValues("differ"))
}
