package gossip

import (
	"fmt"
	"math/rand/v2"
	"net"
	"net/netip"
	"os"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/ravel-lb/ravel"
)

// Directors and realservers write, report, part, lose packets, die and come back in random order; when it is over all
// hold the same of what concerns them. GOSSIP_SEED repeats a history, GOSSIP_HISTORIES says how many.
func TestRandomHistories(t *testing.T) {
	seed, histories := uint64(time.Now().UnixNano()), 1
	if s := os.Getenv("GOSSIP_SEED"); s != "" {
		seed, _ = strconv.ParseUint(s, 10, 64)
		histories = 1
	}
	if n, err := strconv.Atoi(os.Getenv("GOSSIP_HISTORIES")); err == nil {
		histories = n
	}
	for i := range histories {
		t.Run(fmt.Sprint(seed+uint64(i)), func(t *testing.T) { history(t, seed+uint64(i)) })
	}
}

func history(t *testing.T, seed uint64) {
	virtual(t, func(t *testing.T, w *world) {
		r := rand.New(rand.NewPCG(seed, 0))
		const directors, realservers = 4, 3
		all := w.together(directors)
		w.seeds = []string{at(1).String(), at(2).String()}
		for n := range realservers {
			all = append(all, w.realserver(50+n))
		}
		life := uint64(1)
		for range 60 {
			i := r.IntN(len(all))
			p := all[i]
			switch r.IntN(12) {
			case 0:
				w.net.Spoil(r.Float64()/2, time.Duration(r.IntN(200))*time.Millisecond)
			case 1:
				w.net.Spoil(0, 0)
			case 2:
				var side []netip.AddrPort
				for _, p := range all {
					if r.IntN(2) == 0 {
						side = append(side, p.addr)
					}
				}
				w.net.Part(side...)
			case 3:
				w.net.Cut(nil)
			case 4:
				if r.IntN(2) == 0 {
					_ = p.Leave(t.Context(), r.IntN(2) == 0)
				}
				p.stop()
				if r.IntN(2) == 0 {
					time.Sleep(time.Duration(r.IntN(5000)) * time.Millisecond)
				}
				c := w.config(50+i-directors, ravel.Realserver)
				if i < directors {
					c = w.config(i+1, ravel.Director)
				}
				all[i] = w.start(c)
			case 5, 6, 7:
				if i < directors {
					life++
					p.Write(service(r.IntN(4)), []ravel.RosterEntry{entry(r.IntN(6), life, ravel.RosterState(r.IntN(3)))})
				}
			case 8:
				_ = p.SetRegister(fmt.Sprint("drain/", r.IntN(3)), []string{"on", ""}[r.IntN(2)])
			default:
				if i < directors {
					rep := report(r.IntN(100))
					if r.IntN(2) == 0 {
						delete(rep.Services, service(1))
						delete(rep.Uses, at(50).Addr())
					}
					p.Report(rep)
					break
				}
				p.Report(ravel.Report{Redirects: map[ravel.ServiceKey]bool{service(r.IntN(4)): true, service(r.IntN(4)): true}})
			}
			time.Sleep(time.Duration(r.IntN(700)) * time.Millisecond)
		}
		w.net.Spoil(0, 0)
		w.net.Cut(nil)
		// Everybody says something, so that what earlier lives said does not matter.
		for i, p := range all {
			if i < directors {
				p.Report(report(i))
			} else {
				p.Report(ravel.Report{Redirects: map[ravel.ServiceKey]bool{service(1): true, service(i % 4): true}})
			}
		}
		until(t, "all know each other", 40*time.Second, func() bool {
			for _, p := range all {
				if f := p.fleet(); len(f.Live(ravel.Director)) != directors || len(f.Live(ravel.Realserver)) != realservers || !f.Settled {
					return false
				}
			}
			return true
		})
		took := agree(t, 20*time.Second, all[:directors]...)
		t.Logf("agreed after %s", took)
		d := all[0].fleet()
		for _, p := range all[directors:] {
			var diff string
			ok := func() bool {
				f := p.fleet()
				diff = cmp.Diff(map[ravel.ServiceKey]ravel.Roster{}, f.Rosters, exact) + cmp.Diff(d.Registers, f.Registers, exact)
				for _, o := range all[:directors] {
					uses := o.fleet().Reports[o.config.Name].Uses[p.config.Addrs[0]]
					diff += cmp.Diff(uses, f.Reports[o.config.Name].Uses[p.config.Addrs[0]], exact)
				}
				return diff == ""
			}
			for begin := time.Now(); !ok(); time.Sleep(200 * time.Millisecond) {
				if time.Since(begin) > 20*time.Second {
					t.Fatalf("%s does not agree on what concerns it (-d1 +%s):\n%s", p.config.Name, p.config.Name, diff)
				}
			}
		}
		time.Sleep(10 * time.Second)
		differ := func() (n float64) {
			for _, p := range all {
				n += p.differ()
			}
			return n
		}
		before := differ()
		time.Sleep(10 * time.Second)
		if n := differ() - before; n > 0 {
			t.Errorf("%v exchanges found a difference when all know the same", n)
		}
		for _, p := range all {
			p.store.check(t)
		}
	})
}

// What New refuses, and in which words.
func TestConfig(t *testing.T) {
	w := &world{t: t, key: keyFile(t, NewKey())}
	for _, test := range []struct {
		change func(*Config)
		want   string
	}{
		{func(c *Config) {}, ""},
		{func(c *Config) { c.KeyFile = "" }, "ravel gossip-key"},
		{func(c *Config) { c.Insecure = true }, "want one of them"},
		{func(c *Config) { c.KeyFile = "/nowhere" }, "reading the gossip key"},
		{func(c *Config) { c.KeyFile = keyFile(t, "# none") }, "no key in it"},
		{func(c *Config) { c.KeyFile = keyFile(t, "", "aGVsbG8=") }, "line 2: a key of 5 bytes"},
		{func(c *Config) { c.Name = "" }, "name"},
		{func(c *Config) { c.Name = "a/b" }, "name"},
		{func(c *Config) { c.Fleet = "" }, "name of the fleet"},
		{func(c *Config) { c.Fleet = strings.Repeat("x", 129) }, "name of the fleet"},
		{func(c *Config) { c.Preset = "wan" }, "want lan or fast"},
		{func(c *Config) { c.Addrs = make([]netip.Addr, 17) }, "16 at most"},
		{func(c *Config) { c.Addrs = []netip.Addr{netip.MustParseAddr("fe80::1%lo")} }, "without a zone"},
		{func(c *Config) { c.Bind, c.Addrs = netip.AddrPort{}, nil }, "an address to advertise"},
		{func(c *Config) { c.Bind = netip.AddrPort{} }, ""},
	} {
		c := w.config(1, ravel.Director)
		test.change(&c)
		g, err := New(c)
		switch {
		case test.want == "" && err != nil:
			t.Errorf("refused: %v", err)
		case test.want == "":
			if g.config.Advertise != at(1) {
				t.Errorf("advertises %s", g.config.Advertise)
			}
		case err == nil || !strings.Contains(err.Error(), test.want):
			t.Errorf("error %v, want one with %q", err, test.want)
		}
	}
	// A port that is taken is an error of Run.
	c := w.config(1, ravel.Director)
	c.Bind, c.Advertise = netip.MustParseAddrPort("203.0.113.1:7946"), netip.AddrPort{}
	g, err := New(c)
	if err != nil {
		t.Fatal(err)
	}
	if err := g.Run(t.Context()); err == nil || !strings.Contains(err.Error(), "203.0.113.1:7946") {
		t.Errorf("Run on a foreign address: %v", err)
	}
	if err := g.Run(t.Context()); err == nil {
		t.Error("Run ran twice")
	}
}

func TestSeedsAreRead(t *testing.T) {
	for seed, want := range map[string]string{
		"192.0.2.1": "192.0.2.1:7946", "192.0.2.1:1": "192.0.2.1:1", "2001:db8::1": "[2001:db8::1]:7946",
		"[2001:db8::1]": "[2001:db8::1]:7946", "[2001:db8::1]:5": "[2001:db8::1]:5", "192.0.2.1:0x": "", "host:99999": "",
	} {
		got, err := resolve(t.Context(), net.DefaultResolver.LookupNetIP, seed, DefaultPort)
		if want == "" {
			if err == nil {
				t.Errorf("%q is %v", seed, got)
			}
			continue
		}
		if err != nil || len(got) != 1 || got[0].String() != want {
			t.Errorf("%q is %v, %v; want %s", seed, got, err, want)
		}
	}
}
