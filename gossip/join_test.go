package gossip

import (
	"context"
	"net/netip"
	"testing"
	"time"

	"github.com/ravel-lb/ravel"
)

// slow is of timings as they are unless somebody sets others.
func (w *world) slow(n int, seeds ...string) Config {
	c := w.config(n, ravel.Director)
	c.Preset, c.Settle, c.Seeds = LAN, 5*time.Second, seeds
	return c
}

// Whatever is wrong with some seeds, one that answers is enough, and is asked at once.
func TestOneSeedAnswers(t *testing.T) {
	deaf := []string{at(71).String(), at(72).String(), at(73).String(), at(74).String(), at(75).String()}
	for name, seeds := range map[string][]string{
		"a host is off":         {at(1).String(), at(71).String()},
		"many are off":          append(deaf, at(1).String()),
		"no name server":        {at(1).String(), "directors.example.org"},
		"all of it":             append(deaf, "directors.example.org", at(1).String()),
		"another of its own":    {at(1).String(), at(102).String()},
		"itself by its address": {at(1).String(), at(2).String()},
	} {
		t.Run(name, func(t *testing.T) {
			virtual(t, func(t *testing.T, w *world) {
				w.lookup = func(ctx context.Context, _, _ string) ([]netip.Addr, error) {
					<-ctx.Done()
					return nil, ctx.Err()
				}
				a := w.start(w.slow(1))
				a.Write(service(1), []ravel.RosterEntry{entry(9, 1, ravel.Active)})
				w.net.Spoil(0, 10*time.Millisecond)
				c := w.slow(2, seeds...)
				transport := w.net.Transport(c.Bind)
				w.net.Alias(transport, at(102))
				c.Transport = transport
				b := w.start(c)
				took := until(t, "it settles", 5*time.Second, func() bool { return b.fleet().Settled })
				if len(b.fleet().Members) != 2 || len(b.fleet().Rosters) != 1 {
					t.Errorf("settled, and knows %+v", b.fleet())
				}
				if took > time.Second {
					t.Errorf("it settled after %s", took)
				}
			})
		})
	}
}

// Another address of our own is not somebody else who answered.
func TestSeedIsOurselves(t *testing.T) {
	virtual(t, func(t *testing.T, w *world) {
		c := w.slow(2, at(1).String(), at(102).String())
		transport := w.net.Transport(c.Bind)
		w.net.Alias(transport, at(102))
		c.Transport = transport
		b := w.start(c)
		if took := until(t, "it settles", time.Minute, func() bool { return b.fleet().Settled }); took < c.Settle {
			t.Errorf("it settled after %s", took)
		}
		// If it is known to be ours there is nobody to wait for.
		c = w.slow(3, at(3).String(), at(103).String())
		c.Addrs = append(c.Addrs, at(103).Addr())
		d := w.start(c)
		until(t, "it settles at once", 200*time.Millisecond, func() bool { return d.fleet().Settled })
	})
}

// Without seeds in the settings it is not known that there are none before somebody says so.
func TestSeedsComeLater(t *testing.T) {
	virtual(t, func(t *testing.T, w *world) {
		a := w.start(w.slow(1))
		a.Write(service(1), []ravel.RosterEntry{entry(9, 1, ravel.Active)})
		w.untold = true
		b := w.start(w.slow(2))
		time.Sleep(4 * time.Second)
		if b.fleet().Settled {
			t.Fatal("settled alone")
		}
		b.SetSeeds([]string{a.addr.String()})
		until(t, "it settles", 500*time.Millisecond, func() bool { return b.fleet().Settled })
		if len(b.fleet().Rosters) != 1 {
			t.Error("settled before it heard")
		}
		c := w.start(w.slow(3))
		time.Sleep(time.Second)
		c.SetSeeds(nil)
		until(t, "it settles", 200*time.Millisecond, func() bool { return c.fleet().Settled })
		d := w.start(w.slow(4))
		if took := until(t, "it settles", 6*time.Second, func() bool { return d.fleet().Settled }); took < 5*time.Second {
			t.Errorf("settled alone after %s", took)
		}
	})
}

// A seed that is another address of a member is not joined for ever.
func TestSeedsByOtherAddresses(t *testing.T) {
	virtual(t, func(t *testing.T, w *world) {
		c := w.slow(1)
		transport := w.net.Transport(c.Bind)
		w.net.Alias(transport, at(101))
		w.net.Alias(transport, at(102))
		c.Transport = transport
		c.Addrs = append(c.Addrs, at(102).Addr())
		a := w.start(c)
		b := w.start(w.slow(2, at(101).String(), at(102).String()))
		until(t, "they meet", 5*time.Second, func() bool { return b.fleet().Settled && len(a.fleet().Members) == 2 })
		time.Sleep(time.Minute)
		before := w.net.Traffic().Streams
		time.Sleep(5 * time.Minute)
		// memberlist compares all that it knows by itself now and then.
		if n := w.net.Traffic().Streams - before; n > 2*uint64(5*time.Minute/LAN.must().pushPull) {
			t.Errorf("%d streams in five minutes", n)
		}
	})
}

func (p Preset) must() timing {
	t, _ := p.timing()
	return t
}

// Where a member was is tried ever more seldom, and forgotten in the end.
func TestPlacesAreTriedEverMoreSeldom(t *testing.T) {
	gone := time.Date(2030, 1, 1, 0, 0, 0, 0, time.UTC)
	p := place{seen: gone, tried: gone}
	var tries []time.Duration
	for now := gone; now.Sub(gone) < 24*time.Hour; now = now.Add(5 * time.Second) {
		if p.due(now) {
			tries = append(tries, now.Sub(p.tried))
			p.tried = now
		}
	}
	if n := int(backOff / (5 * time.Second)); tries[n-1] != 5*time.Second || len(tries) < n+140 || len(tries) > n+220 ||
		tries[len(tries)-1] != seldom {
		t.Errorf("%d tries in a day, the last after %s", len(tries), tries[len(tries)-1])
	}
	g, err := New(Config{Name: "me", Fleet: "f", Insecure: true, Addrs: []netip.Addr{at(1).Addr()}})
	if err != nil {
		t.Fatal(err)
	}
	g.known["old"] = place{addr: at(5), seen: time.Now().Add(-forgetful - time.Second)}
	g.known["older"] = place{addr: at(6), seen: time.Now().Add(-forgetful + time.Hour)}
	g.known["lost"] = place{addr: at(7), seen: time.Now()}
	if got := g.lostLocked(time.Now(), nil); len(got) != 2 || len(g.known) != 2 {
		t.Errorf("tries %v, knows %v", got, g.known)
	}
	if got := g.lostLocked(time.Now(), nil); len(got) != 1 || got[0] != at(7) {
		t.Errorf("tries %v next", got)
	}
}

// Stopping does not wait for those that do not answer.
func TestStopIsQuick(t *testing.T) {
	virtual(t, func(t *testing.T, w *world) {
		a := w.start(w.slow(1, at(77).String(), at(78).String()))
		time.Sleep(7 * time.Second)
		begin := time.Now()
		a.stop()
		if took := time.Since(begin); took > 100*time.Millisecond {
			t.Errorf("it took %s", took)
		}
	})
}
