package gossip

import (
	"encoding/base64"
	"fmt"
	"maps"
	"net/netip"
	"os"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	"github.com/prometheus/client_golang/prometheus/testutil"
	"github.com/ravel-lb/ravel"
)

var exact = cmp.Options{cmp.Comparer(func(a, b netip.Addr) bool { return a == b }), cmpopts.EquateEmpty()}

func report(n int) ravel.Report {
	return ravel.Report{
		TableSize: 4093,
		Services:  map[ravel.ServiceKey]ravel.ServiceReport{service(1): {Wish: uint64(n), Table: 2, Available: 3}, service(2): {Wish: 7}},
		Uses:      map[netip.Addr][]ravel.ServiceKey{at(50).Addr(): {service(2), service(1)}, at(51).Addr(): {service(2)}},
		Health:    map[netip.Addr]ravel.Health{at(50).Addr(): ravel.Healthy, at(51).Addr(): ravel.Unprobed},
		Sessions:  map[netip.Addr]bool{netip.MustParseAddr("fe80::1%eth0"): true, at(1).Addr(): false},
	}
}

// together starts n directors that know each other.
func (w *world) together(n int) []*process {
	var all []*process
	for i := range n {
		all = append(all, w.director(i+1))
		w.seeds = []string{all[0].addr.String()}
	}
	for _, p := range all {
		ok := func() bool { return p.fleet().Settled && len(p.fleet().Live(ravel.Director)) == n }
		for begin := time.Now(); !ok(); time.Sleep(5 * time.Millisecond) {
			if time.Since(begin) > 15*time.Second {
				w.t.Fatalf("%s, settled %t, knows only %s", p.config.Name, p.fleet().Settled, names(p.fleet()))
			}
		}
	}
	return all
}

// dropped is how much a process dropped for a reason.
func (p *process) dropped(reason string) float64 {
	return testutil.ToFloat64(p.metrics.dropped.WithLabelValues(reason))
}

// agree waits until all processes know the same rosters, registers and, of others, reports.
func agree(t *testing.T, within time.Duration, all ...*process) time.Duration {
	t.Helper()
	var diff string
	begin := time.Now()
	time.Sleep(2 * (flushDelay + showDelay)) // until what was just written is on its way
	for time.Since(begin) < within {
		diff = ""
		for _, p := range all[1:] {
			a, b := all[0].fleet(), p.fleet()
			diff += cmp.Diff(a.Rosters, b.Rosters, exact) + cmp.Diff(a.Registers, b.Registers, exact)
			for name, r := range a.Reports {
				s := b.Reports[name]
				s.Uses, r.Uses = nil, nil // directors do not tell each other
				diff += cmp.Diff(r, s, exact)
			}
			if len(a.Reports) != len(b.Reports) {
				diff += fmt.Sprint(slices.Sorted(maps.Keys(a.Reports)), slices.Sorted(maps.Keys(b.Reports)))
			}
		}
		if diff == "" {
			return time.Since(begin)
		}
		time.Sleep(20 * time.Millisecond)
	}
	t.Fatalf("they do not agree within %s (-%s +others):\n%s", within, all[0].config.Name, diff)
	return 0
}

func TestReportsTravel(t *testing.T) {
	virtual(t, func(t *testing.T, w *world) {
		all := w.together(3)
		before := all[1].fleet()
		all[0].Report(report(1))
		until(t, "d2 and d3 hear", time.Second, func() bool {
			return len(all[1].fleet().Reports) == 1 && len(all[2].fleet().Reports) == 1
		})
		for _, p := range all {
			want := report(1)
			if p != all[0] {
				want.Uses = nil
			}
			if diff := cmp.Diff(want, p.fleet().Reports["d1"], exact); diff != "" {
				t.Errorf("%s (-want +got):\n%s", p.config.Name, diff)
			}
		}
		if len(before.Reports) != 0 {
			t.Error("a Fleet that was given away changed")
		}
		// Only what differs travels.
		messages := testutil.ToFloat64(all[0].metrics.bytes.WithLabelValues("sent", "delta"))
		r := report(1)
		r.Services = maps.Clone(r.Services)
		delete(r.Services, service(2))
		held := all[1].fleet().Reports["d1"]
		all[0].Report(r)
		until(t, "d2 hears of what is gone", time.Second, func() bool { return len(all[1].fleet().Reports["d1"].Services) == 1 })
		if len(held.Services) != 2 {
			t.Error("a report that was given away changed")
		}
		if n := testutil.ToFloat64(all[0].metrics.bytes.WithLabelValues("sent", "delta")) - messages; n == 0 || n > 200 {
			t.Errorf("%v bytes for one tombstone to two members", n)
		}
	})
}

// No news: nothing is sent but probes and one comparison per interval.
func TestSilence(t *testing.T) {
	virtual(t, func(t *testing.T, w *world) {
		all := w.together(3)
		for _, p := range all {
			p.Report(report(1))
		}
		agree(t, 2*time.Second, all...)
		time.Sleep(5 * time.Second)
		differ := func() (n float64) {
			for _, p := range all {
				n += testutil.ToFloat64(p.metrics.exchanges.WithLabelValues("differ"))
			}
			return n
		}
		before, fleet := differ(), all[0].fleet()
		changed := all[0].Changed()
		time.Sleep(time.Minute)
		if n := differ() - before; n != 0 {
			t.Errorf("%v exchanges found a difference", n)
		}
		select {
		case <-changed:
			t.Errorf("a new Fleet without news: %s", cmp.Diff(fleet, all[0].fleet(), exact))
		default:
		}
		for _, p := range all {
			for _, reason := range []string{"malformed", "wild", "oversized", "kind", "version", "name", "value", "unconcerned"} {
				if n := p.dropped(reason); n != 0 {
					t.Errorf("%s dropped %v: %s", p.config.Name, n, reason)
				}
			}
		}
	})
}

func TestGoodbye(t *testing.T) {
	for _, comesBack := range []bool{false, true} {
		t.Run(fmt.Sprint(comesBack), func(t *testing.T) {
			virtual(t, func(t *testing.T, w *world) {
				all := w.together(3)
				all[2].Report(report(3))
				agree(t, time.Second, all...)
				begin := time.Now()
				if err := all[2].Leave(t.Context(), comesBack); err != nil {
					t.Fatal(err)
				}
				t.Logf("leaving took %s", time.Since(begin))
				all[2].stop()
				want := ravel.Left
				if comesBack {
					want = ravel.Restarting
				}
				for _, p := range all[:2] {
					p.sees("d3", want, 100*time.Millisecond)
					if p.fleet().Reports["d3"].TableSize == 0 {
						t.Error("what it said is gone at once")
					}
				}
				back := w.director(3)
				for _, p := range all[:2] {
					p.sees("d3", ravel.Alive, time.Second)
					if p.fleet().Reports["d3"].TableSize == 0 {
						t.Error("what it said is gone before it says anything new")
					}
				}
				r := report(30)
				delete(r.Services, service(2))
				back.Report(r)
				took := agree(t, time.Second, append(all[:2:2], back)...)
				t.Logf("its new report is known after %s", took)
				if n := len(all[0].fleet().Reports["d3"].Services); n != 1 {
					t.Errorf("%d services: the earlier life is not hidden", n)
				}
			})
		})
	}
}

// A process that is killed and comes back begins above what it said before, also when it speaks at once.
func TestKilledAndBack(t *testing.T) {
	virtual(t, func(t *testing.T, w *world) {
		all := w.together(3)
		for n := range 5 {
			all[2].Report(report(n))
			time.Sleep(50 * time.Millisecond)
		}
		agree(t, time.Second, all...)
		all[2].stop()
		c := w.config(3, ravel.Director)
		c.Transport = w.net.Transport(c.Bind)
		g, err := New(c)
		if err != nil {
			t.Fatal(err)
		}
		r := report(9)
		delete(r.Services, service(1))
		g.Report(r)
		back := w.run(g)
		took := until(t, "the new report is known", 2*time.Second, func() bool {
			s := all[0].fleet().Reports["d3"].Services
			return len(s) == 1 && s[service(2)].Wish == 7
		})
		t.Logf("after %s", took)
		agree(t, time.Second, append(all[:2:2], back)...)
		if m, _ := all[0].fleet().Member("d3"); m.State != ravel.Alive {
			t.Errorf("d3 is %s", m.State)
		}
	})
}

// A cell of ours that we did not write makes us begin a new life.
func TestSomebodyElseSpeaksForUs(t *testing.T) {
	virtual(t, func(t *testing.T, w *world) {
		all := w.together(2)
		all[0].Report(report(1))
		agree(t, time.Second, all...)
		forged := newCell(key{topicService, "d1", serviceName(service(9))}, rank{40, 3}, "\x09aaaaaaaa", "")
		all[1].mu.Lock()
		all[1].writeLocked(forged)
		all[1].mu.Unlock()
		until(t, "the lie is gone", 2*time.Second, func() bool {
			f := all[1].fleet().Reports["d1"]
			_, lie := f.Services[service(9)]
			return !lie && len(f.Services) == 2
		})
		agree(t, time.Second, all...)
		// One that is wild is not answered by going up to it.
		all[1].send([]outgoing{{all[1].members["d1"].node, deltaKind, seal(deltaKind, "d2", all[1].addr,
			appendCell(nil, 1, newCell(forged.key, rank{1 << 60, 0}, "x", "")))}})
		until(t, "it is counted", time.Second, func() bool { return all[0].dropped("wild") == 1 })
	})
}

// A node that comes back with another address is taken as soon as the old one is seen to be dead.
func TestChangedAddress(t *testing.T) {
	virtual(t, func(t *testing.T, w *world) {
		all := w.together(3)
		all[2].Report(report(1))
		agree(t, time.Second, all...)
		all[2].stop()
		c := w.config(3, ravel.Director)
		c.Bind = at(77)
		moved := w.start(c)
		moved.Report(report(2))
		took := until(t, "all take the new address", 10*time.Second, func() bool {
			for _, p := range all[:2] {
				if m, _ := p.fleet().Member("d3"); m.Gossip != at(77) || m.State != ravel.Alive {
					return false
				}
			}
			return true
		})
		t.Logf("after %s", took)
		agree(t, 2*time.Second, append(all[:2:2], moved)...)
		if took > Fast.DetectWithin(3)+3*time.Second {
			t.Errorf("too late: detection takes up to %s, and it tries every 2 s", Fast.DetectWithin(3))
		}
		time.Sleep(forgetConflict + time.Second)
		for _, p := range append(all[:2:2], moved) {
			if problems := p.Problems(); len(problems) > 0 {
				t.Errorf("%s has a problem still: %v", p.config.Name, problems)
			}
		}
	})
}

// Two live processes of one name: one is heard, and everybody says so.
func TestTwoOfOneName(t *testing.T) {
	virtual(t, func(t *testing.T, w *world) {
		all := w.together(3)
		all[2].Report(report(1))
		agree(t, time.Second, all...)
		c := w.config(3, ravel.Director)
		c.Bind = at(78)
		twin := w.start(c)
		twin.Report(report(999))
		for _, p := range []*process{all[0], all[1], twin} {
			until(t, p.config.Name+" tells of the conflict", 20*time.Second, func() bool {
				return slices.ContainsFunc(p.Problems(), func(p ravel.Problem) bool {
					return strings.Contains(p.What, at(78).String()) && strings.Contains(p.What, at(3).String())
				})
			})
		}
		time.Sleep(20 * time.Second)
		for _, p := range all[:2] {
			if m, _ := p.fleet().Member("d3"); m.Gossip != at(3) {
				t.Errorf("%s took the second one at %s", p.config.Name, m.Gossip)
			}
			if wish := p.fleet().Reports["d3"].Services[service(1)].Wish; wish != 1 {
				t.Errorf("%s heard the second one: %d", p.config.Name, wish)
			}
		}
		if life := all[2].store.author("d3").incarnation; life > 3 {
			t.Errorf("they outbid each other: life %d", life)
		}
	})
}

// Neither another fleet's name nor a wrong key lets anybody in, and both are counted.
func TestFleetsNeverMerge(t *testing.T) {
	virtual(t, func(t *testing.T, w *world) {
		all := w.together(2)
		other := w.config(8, ravel.Director)
		other.Fleet = "other"
		stranger := w.config(9, ravel.Director)
		stranger.KeyFile = keyFile(t, NewKey())
		plain := w.config(10, ravel.Director)
		plain.KeyFile, plain.Insecure = "", true
		var others []*process
		for _, c := range []Config{other, stranger, plain} {
			others = append(others, w.start(c))
		}
		time.Sleep(11 * time.Second)
		for _, p := range all {
			if got := names(p.fleet()); got != "[d1:alive d2:alive]" {
				t.Errorf("%s knows %s", p.config.Name, got)
			}
		}
		for _, p := range others {
			if len(p.fleet().Members) != 1 || !p.fleet().Settled {
				t.Errorf("%s, settled %t, knows %s", p.config.Name, p.fleet().Settled, names(p.fleet()))
			}
		}
		if all[0].dropped("fleet") == 0 || all[0].dropped("key") == 0 {
			t.Errorf("dropped of other fleets %v, of other keys %v", all[0].dropped("fleet"), all[0].dropped("key"))
		}
		// Each is told who cannot be read, once, for as long as something comes.
		tells := func(p *process, what ...string) {
			t.Helper()
			problems := p.Problems()
			if len(problems) != len(what) {
				t.Errorf("%s has problems %v", p.config.Name, problems)
				return
			}
			for i, want := range what {
				if got := problems[i]; !strings.Contains(got.What, want) || got.Fix == "" {
					t.Errorf("%s has the problem %v, want %q", p.config.Name, got, want)
				}
			}
		}
		tells(all[0], "cannot decrypt what comes from "+at(9).Addr().String()+" "+at(10).Addr().String(),
			"comes from "+at(8).Addr().String()+" is of another fleet")
		for _, p := range others {
			p.stop()
		}
		time.Sleep(tellOfUnreadable + time.Second)
		tells(all[0])
	})
}

// Keys are changed on one member after the other while they gossip, and nobody notices.
func TestKeyRotation(t *testing.T) {
	virtual(t, func(t *testing.T, w *world) {
		first, second := NewKey(), NewKey()
		var all []*process
		var files []string
		for n := range 3 {
			c := w.config(n+1, ravel.Director)
			c.KeyFile = keyFile(t, first)
			files = append(files, c.KeyFile)
			all = append(all, w.start(c))
			w.seeds = []string{at(1).String()}
		}
		until(t, "all know each other", 3*time.Second, func() bool { return len(all[0].fleet().Members) == 3 && len(all[2].fleet().Members) == 3 })
		n := uint64(0)
		gossip := func(d time.Duration) {
			for begin := time.Now(); time.Since(begin) < d; {
				n++
				all[n%3].Write(service(1), []ravel.RosterEntry{entry(int(n%5), n, ravel.Active)})
				time.Sleep(100 * time.Millisecond)
			}
			agree(t, 2*time.Second, all...)
		}
		gossip(time.Second)
		// The new key may come first at once: nobody uses it before all can read it.
		encrypts := func() (keys []string) {
			for _, p := range all {
				keys = append(keys, base64.StdEncoding.EncodeToString(p.keys.ring.GetPrimaryKey()))
			}
			return keys
		}
		for i, f := range files {
			if got := encrypts(); slices.Contains(got, second) {
				t.Errorf("%d of 3 have the new key, and it is used: %v", i, got)
			}
			writeKeys(t, f, second, first)
			gossip(2 * time.Second)
		}
		until(t, "all use the new key", 2*time.Second, func() bool { return !slices.Contains(encrypts(), first) })
		for _, m := range all[0].fleet().Members {
			if len(m.Keys) != 2 {
				t.Errorf("%s tells of the keys %v, want two", m.Name, m.Keys)
			}
		}
		for _, f := range files {
			writeKeys(t, f, second)
			gossip(2 * time.Second)
		}
		for _, p := range all {
			if got := names(p.fleet()); got != "[d1:alive d2:alive d3:alive]" {
				t.Errorf("%s knows %s", p.config.Name, got)
			}
			if p.dropped("key") != 0 || len(p.keys.ring.GetKeys()) != 1 || len(p.Problems()) != 0 {
				t.Errorf("%s: %v undecipherable, %d keys, %v", p.config.Name, p.dropped("key"), len(p.keys.ring.GetKeys()), p.Problems())
			}
		}
		// A member that cannot read the first key keeps it from being used, and is named when that lasts.
		writeKeys(t, files[0], first, second)
		gossip(keysWait + 5*time.Second)
		if p := all[0].Problems(); len(p) != 1 || !strings.Contains(p[0].What, "they can read it: d2, d3") || slices.Contains(encrypts(), first) {
			t.Errorf("problems %v, encrypts %v", p, encrypts())
		}
		writeKeys(t, files[0], second)
		until(t, "the problem is gone", 3*time.Second, func() bool { return len(all[0].Problems()) == 0 })
		// A file that cannot be used changes nothing and is told of.
		if err := os.WriteFile(files[0], []byte("not a key\n"), 0o644); err != nil {
			t.Fatal(err)
		}
		until(t, "a problem says so", 2*time.Second, func() bool { return len(all[0].Problems()) == 1 })
		if !strings.Contains(all[0].Problems()[0].What, "line 1: not base64") {
			t.Errorf("problem %v", all[0].Problems())
		}
		if err := os.Chmod(files[0], 0o644); err != nil {
			t.Fatal(err)
		}
		writeKeys(t, files[0], second)
		until(t, "the readable file is a problem", 2*time.Second, func() bool {
			p := all[0].Problems()
			return len(p) == 1 && strings.Contains(p[0].Fix, "chmod")
		})
		gossip(time.Second)
	})
}

// A member that has the new key first joins those that do not have it yet, and does not make them unreadable.
func TestNewcomerInAKeyRotation(t *testing.T) {
	virtual(t, func(t *testing.T, w *world) {
		old, fresh := NewKey(), NewKey()
		start := func(n int, role ravel.Role, keys ...string) *process {
			c := w.config(n, role)
			c.KeyFile = keyFile(t, keys...)
			return w.start(c)
		}
		first := start(1, ravel.Director, old)
		w.seeds = []string{at(1).String()}
		start(2, ravel.Director, old)
		until(t, "two know each other", 3*time.Second, func() bool { return len(first.fleet().Members) == 2 })
		newcomer := start(3, ravel.Realserver, fresh, old)
		until(t, "it joins", 10*time.Second, func() bool { return len(newcomer.fleet().Members) == 3 && len(first.fleet().Members) == 3 })
		if got := base64.StdEncoding.EncodeToString(newcomer.keys.ring.GetPrimaryKey()); got != old {
			t.Error("it encrypts with a key that the others cannot read")
		}
	})
}

// A partition of three minutes, after which memberlist has forgotten the other side, heals by itself.
func TestPartition(t *testing.T) {
	virtual(t, func(t *testing.T, w *world) {
		all := w.together(4)
		for i, p := range all {
			p.Report(report(i))
		}
		agree(t, time.Second, all...)
		w.net.Part(all[0].addr, all[1].addr)
		all[0].sees("d3", ravel.Dead, Fast.DetectWithin(4)+time.Second)
		all[3].sees("d1", ravel.Dead, Fast.DetectWithin(4)+time.Second)
		all[0].Write(service(1), []ravel.RosterEntry{entry(1, 5, ravel.Active)})
		all[3].Write(service(1), []ravel.RosterEntry{entry(2, 5, ravel.Active)})
		all[2].Report(report(33))
		time.Sleep(3 * time.Minute)
		if got := names(all[0].fleet()); got != "[d1:alive d2:alive d3:dead d4:dead]" {
			t.Errorf("d1 knows %s", got)
		}
		w.net.Cut(nil)
		took := until(t, "all are back", 20*time.Second, func() bool {
			for _, p := range all {
				if len(p.fleet().Live(ravel.Director)) != 4 {
					return false
				}
			}
			return true
		})
		t.Logf("healed after %s", took)
		t.Logf("and agreed after %s", agree(t, 3*time.Second, all...))
		if r := all[1].fleet().Rosters[service(1)]; len(r) != 2 {
			t.Errorf("roster %v", r)
		}
		// And again soon after, though each has lately reached all others.
		for range 3 {
			w.net.Part(all[0].addr, all[1].addr)
			time.Sleep(30 * time.Second)
			w.net.Cut(nil)
			took := until(t, "all are back again", 20*time.Second, func() bool {
				for _, p := range all {
					if len(p.fleet().Live(ravel.Director)) != 4 {
						return false
					}
				}
				return true
			})
			t.Logf("healed again after %s", took)
		}
	})
}

// Directors that were stopped in good order and come back are found again by realservers, whose seeds they are.
func TestDirectorsThatLeftComeBack(t *testing.T) {
	virtual(t, func(t *testing.T, w *world) {
		d := w.director(1)
		w.seeds = []string{d.addr.String()}
		all := []*process{w.realserver(2), w.realserver(3)}
		known := func() bool {
			for _, r := range all {
				if len(r.fleet().Live(ravel.Director)) != 1 {
					return false
				}
			}
			return len(d.fleet().Live(ravel.Realserver)) == 2
		}
		until(t, "they know each other", 20*time.Second, known)
		for range 3 {
			time.Sleep(20 * time.Second)
			if err := d.Leave(t.Context(), false); err != nil {
				t.Fatal(err)
			}
			d.stop()
			time.Sleep(2 * time.Second)
			d = w.director(1)
			t.Logf("found again after %s", until(t, "the director is found again", 10*time.Second, known))
		}
	})
}

// Whom a member cannot reach it hears by way of others.
func TestByWayOfAThird(t *testing.T) {
	virtual(t, func(t *testing.T, w *world) {
		all := w.together(3)
		w.net.Cut(func(a, b netip.AddrPort) bool { return a == at(1) && b == at(2) || a == at(2) && b == at(1) })
		all[1].Report(report(4))
		all[1].Write(service(5), []ravel.RosterEntry{entry(1, 5, ravel.Active)})
		took := until(t, "d1 hears of d2", 5*time.Second, func() bool {
			return len(all[0].fleet().Rosters[service(5)]) == 1 && len(all[0].fleet().Reports) == 1
		})
		t.Logf("after %s", took)
		agree(t, time.Second, all...)
	})
}

// Most packets are lost and those that come overtake each other.
func TestLoss(t *testing.T) {
	virtual(t, func(t *testing.T, w *world) {
		all := w.together(3)
		w.net.Spoil(0.4, 200*time.Millisecond)
		for n := range 50 {
			p := all[n%3]
			p.Write(service(n%7), []ravel.RosterEntry{entry(n%11, uint64(n+1), ravel.Active)})
			p.Report(report(n))
			time.Sleep(20 * time.Millisecond)
		}
		t.Logf("agreed after %s", agree(t, time.Minute, all...))
		if len(all[0].fleet().Rosters) != 7 || len(all[0].fleet().Reports) != 3 {
			t.Errorf("they agree on %+v", all[0].fleet())
		}
	})
}

// A realserver hears what concerns it and nothing else.
func TestRealserverHearsItsOwn(t *testing.T) {
	virtual(t, func(t *testing.T, w *world) {
		all := w.together(2)
		all[0].Write(service(1), []ravel.RosterEntry{entry(50, 1, ravel.Active)})
		all[0].Write(service(2), []ravel.RosterEntry{entry(50, 1, ravel.Active), entry(51, 2, ravel.Gone)})
		all[0].Report(report(1))
		all[1].Report(report(2))
		r := w.realserver(50)
		s := w.realserver(51)
		until(t, "they settle", 3*time.Second, func() bool { return r.fleet().Settled && s.fleet().Settled })
		uses := []ravel.ServiceKey{service(2), service(1)} // IPv4 first
		if got := r.fleet(); !reflect.DeepEqual(got.Reports["d1"].Uses, map[netip.Addr][]ravel.ServiceKey{at(50).Addr(): uses}) ||
			len(got.Rosters) != 0 || len(got.Reports["d1"].Services) != 0 {
			t.Errorf("r50 is settled and knows %+v", got)
		}
		r.Report(ravel.Report{Redirects: map[ravel.ServiceKey]bool{service(2): true}})
		s.Report(ravel.Report{Redirects: map[ravel.ServiceKey]bool{}})
		until(t, "the directors hear of the redirect", time.Second, func() bool {
			return all[0].fleet().Reports["r50"].Redirects[service(2)] && all[1].fleet().Reports["r50"].Redirects[service(2)] &&
				all[0].fleet().Reports["r51"].Redirects != nil
		})
		all[1].Write(service(2), []ravel.RosterEntry{entry(52, 3, ravel.Joining)})
		used := report(1)
		used.Uses = map[netip.Addr][]ravel.ServiceKey{at(50).Addr(): {service(2)}}
		all[0].Report(used)
		took := until(t, "it hears of a change", time.Second, func() bool {
			return len(r.fleet().Reports["d1"].Uses[at(50).Addr()]) == 1 && len(s.fleet().Reports["d1"].Uses) == 0
		})
		t.Logf("of a change after %s", took)
		for _, p := range []*process{r, s} {
			for k := range p.store.cells {
				if k.topic != topicDirector && k.topic != topicUses && k.author != p.config.Name {
					t.Errorf("%s holds %v", p.config.Name, k)
				}
			}
		}
		time.Sleep(5 * time.Second)
		before := testutil.ToFloat64(all[0].metrics.exchanges.WithLabelValues("differ")) + testutil.ToFloat64(all[1].metrics.exchanges.WithLabelValues("differ"))
		time.Sleep(20 * time.Second)
		after := testutil.ToFloat64(all[0].metrics.exchanges.WithLabelValues("differ")) + testutil.ToFloat64(all[1].metrics.exchanges.WithLabelValues("differ"))
		if after != before {
			t.Errorf("%v exchanges found a difference when all should know the same", after-before)
		}
	})
}

// What is forgotten does not come back from those who forget it later, nor do they stay apart.
func TestForget(t *testing.T) {
	virtual(t, func(t *testing.T, w *world) {
		all := w.together(3)
		all[0].Write(service(1), []ravel.RosterEntry{entry(1, 1, ravel.Gone), entry(2, 2, ravel.Active)})
		agree(t, time.Second, all...)
		all[0].Forget(service(1), []netip.Addr{at(1).Addr(), at(2).Addr()})
		time.Sleep(5 * time.Second)
		if r := all[0].fleet().Rosters[service(1)]; len(r) != 1 || r[0].Addr != at(2).Addr() {
			t.Errorf("roster %v", r)
		}
		if r := all[1].fleet().Rosters[service(1)]; len(r) != 2 {
			t.Errorf("d2 forgot as well: %v", r)
		}
		all[1].Forget(service(1), []netip.Addr{at(1).Addr()})
		all[2].Forget(service(1), []netip.Addr{at(1).Addr()})
		agree(t, time.Second, all...)
		// It may come again.
		all[2].Write(service(1), []ravel.RosterEntry{entry(1, 9, ravel.Joining)})
		until(t, "it is back", time.Second, func() bool { return len(all[0].fleet().Rosters[service(1)]) == 2 })
	})
}

// Members that are gone for long, and what they said, are forgotten by everybody, and nobody brings them back.
func TestForgottenMembers(t *testing.T) {
	virtual(t, func(t *testing.T, w *world) {
		w.preset = LAN
		all := w.together(4)
		for i, p := range all {
			p.Report(report(i))
		}
		agree(t, time.Second, all...)
		all[3].stop()
		all[0].sees("d4", ravel.Dead, LAN.DetectWithin(4))
		time.Sleep(remember - 10*time.Second)
		if _, ok := all[0].fleet().Reports["d4"]; !ok {
			t.Error("forgotten too early")
		}
		time.Sleep(30 * time.Second)
		for _, p := range all[:3] {
			if _, ok := p.fleet().Member("d4"); ok || len(p.fleet().Reports) != 3 {
				t.Errorf("%s knows %s and the reports of %v", p.config.Name, names(p.fleet()), slices.Sorted(maps.Keys(p.fleet().Reports)))
			}
		}
		time.Sleep(remember + time.Minute)
		for _, p := range all[:3] {
			if p.store.authors["d4"] != nil {
				t.Errorf("%s holds what d4 said", p.config.Name)
			}
		}
	})
}

func TestSettle(t *testing.T) {
	virtual(t, func(t *testing.T, w *world) {
		w.seeds = []string{at(99).String()}
		c := w.config(1, ravel.Director)
		c.Settle = 3 * time.Second
		a := w.start(c)
		took := until(t, "it settles though no seed answers", 4*time.Second, func() bool { return a.fleet().Settled })
		if took < 2900*time.Millisecond {
			t.Errorf("after %s", took)
		}
		w.seeds = nil
		b := w.director(2)
		until(t, "without seeds at once", 100*time.Millisecond, func() bool { return b.fleet().Settled })
		b.SetSeeds([]string{a.addr.String()})
		until(t, "they meet", time.Second, func() bool { return len(a.fleet().Members) == 2 && len(b.fleet().Members) == 2 })
		path := t.TempDir() + "/seeds"
		c = w.config(3, ravel.Director)
		c.SeedsFile = path
		d := w.start(c)
		time.Sleep(time.Second)
		if d.fleet().Settled || len(d.Problems()) != 1 {
			t.Errorf("settled %t without its file of seeds, problems %v", d.fleet().Settled, d.Problems())
		}
		if err := os.WriteFile(path, []byte("# them\n\n10.0.0.1 # a\n"), 0o644); err != nil {
			t.Fatal(err)
		}
		until(t, "it reads the file", 5*time.Second, func() bool { return d.fleet().Settled && len(d.fleet().Members) == 3 && len(d.Problems()) == 0 })
	})
}

// A silent member is seen to be dead by everybody within the bound.
func TestDetection(t *testing.T) {
	for _, n := range []int{2, 3, 5, 10} {
		var worst time.Duration
		for range 5 {
			virtual(t, func(t *testing.T, w *world) {
				all := w.together(n)
				time.Sleep(time.Second)
				w.net.Cut(func(a, b netip.AddrPort) bool { return a == at(n) || b == at(n) })
				begin := time.Now()
				for _, p := range all[:n-1] {
					p.sees(fmt.Sprint("d", n), ravel.Dead, 10*time.Second)
				}
				worst = max(worst, time.Since(begin))
				for _, p := range all[:n-1] {
					if live := len(p.fleet().Live(ravel.Director)); live != n-1 {
						t.Errorf("%s sees %d live", p.config.Name, live)
					}
				}
			})
		}
		t.Logf("%d members: %s, bound %s", n, worst, Fast.DetectWithin(n))
		if worst > Fast.DetectWithin(n) {
			t.Errorf("%d members: after %s, bound %s", n, worst, Fast.DetectWithin(n))
		}
	}
}

// Suspect is what our own probes say, and passes when it answers.
func TestSuspect(t *testing.T) {
	virtual(t, func(t *testing.T, w *world) {
		all := w.together(2)
		w.net.Part(all[1].addr)
		all[0].sees("d2", ravel.Suspect, Fast.DetectWithin(2))
		w.net.Cut(nil)
		all[0].sees("d2", ravel.Alive, 300*time.Millisecond)
	})
}

// A register that an earlier life saved counts with the stamp that it had.
func TestRestoreRegister(t *testing.T) {
	virtual(t, func(t *testing.T, w *world) {
		a := w.director(1)
		until(t, "it settles", time.Second, func() bool { return a.fleet().Settled })
		for _, v := range []string{"a", "b"} {
			if err := a.SetRegister("freeze", v); err != nil {
				t.Fatal(err)
			}
		}
		if err := a.SetRegister("drain/x", "on"); err != nil {
			t.Fatal(err)
		}
		until(t, "it shows", time.Second, func() bool { return len(a.fleet().Registers) == 2 })
		c := w.config(2, ravel.Director)
		c.Seeds, c.Transport = []string{a.addr.String()}, w.net.Transport(c.Bind)
		g, err := New(c)
		if err != nil {
			t.Fatal(err)
		}
		g.RestoreRegister("freeze", ravel.Register{Stamp: 1, Value: "older", By: "d2"})
		g.RestoreRegister("drain/x", ravel.Register{Stamp: 5, Value: "", By: "d2"})
		g.RestoreRegister("drain/y", ravel.Register{Stamp: 3, Value: "on", By: "d2"})
		b := w.run(g)
		until(t, "it settles", 5*time.Second, func() bool { return b.fleet().Settled })
		want := map[string]ravel.Register{
			"freeze": {Stamp: 2, Value: "b", By: "d1"}, "drain/x": {Stamp: 5, By: "d2"}, "drain/y": {Stamp: 3, Value: "on", By: "d2"},
		}
		agree(t, 2*time.Second, a, b)
		if diff := cmp.Diff(want, a.fleet().Registers); diff != "" {
			t.Errorf("(-want +got):\n%s", diff)
		}
	})
}

// The addresses by which the document names a node reach it, though its interfaces did not bear them at the start.
func TestSetAddrs(t *testing.T) {
	virtual(t, func(t *testing.T, w *world) {
		a := w.director(1)
		w.seeds = []string{a.addr.String()}
		c := w.config(50, ravel.Realserver)
		for n := range maxAddrs - 1 {
			c.Addrs = append(c.Addrs, at(60+n).Addr())
		}
		r := w.start(c)
		until(t, "they know each other", 5*time.Second, func() bool { return r.fleet().Settled && len(a.fleet().Members) == 2 })
		doc := netip.MustParseAddr("2001:db8::50")
		want := []ravel.ServiceKey{service(1)}
		a.Report(ravel.Report{Uses: map[netip.Addr][]ravel.ServiceKey{doc: want}})
		time.Sleep(3 * time.Second)
		if got := r.fleet().Reports["d1"].Uses[doc]; got != nil {
			t.Fatalf("it hears %v", got)
		}
		r.SetAddrs([]netip.Addr{doc, netip.MustParseAddr("fe80::1%lo"), at(50).Addr(), doc})
		took := until(t, "it hears", 3*time.Second, func() bool { return slices.Equal(r.fleet().Reports["d1"].Uses[doc], want) })
		t.Logf("after %s", took)
		if m, _ := a.fleet().Member("r50"); len(m.Addrs) != maxAddrs || m.Addrs[0] != doc || m.Addrs[1] != at(50).Addr() {
			t.Errorf("d1 knows its addresses as %v", m.Addrs)
		}
		r.SetAddrs(nil)
		until(t, "d1 hears that it is gone", time.Second, func() bool {
			m, _ := a.fleet().Member("r50")
			return !slices.Contains(m.Addrs, doc)
		})
	})
}

// A connection that is closed before anything was said is no word of another fleet; a label of another one is.
func TestWhoSaysNothingIsOfNoOtherFleet(t *testing.T) {
	virtual(t, func(t *testing.T, w *world) {
		p := w.start(w.config(1, ravel.Director))
		p.unreadableFrom("fleet", `memberlist: discarding stream with unacceptable label "": from=10.0.0.9:4711`, time.Now())
		if got := p.Problems(); len(got) != 0 {
			t.Errorf("problems %v", got)
		}
		p.unreadableFrom("fleet", `memberlist: discarding stream with unacceptable label "other": from=10.0.0.9:4711`, time.Now())
		if got := p.Problems(); len(got) != 1 || !strings.Contains(got[0].What, "10.0.0.9") {
			t.Errorf("problems %v, want one of 10.0.0.9", got)
		}
	})
}
