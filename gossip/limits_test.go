package gossip

import (
	"fmt"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/ravel-lb/ravel"
)

// hold has processes hold facts of a topic that nobody shows, as if they had always known them.
func hold(n int, stamp uint64, all ...*process) {
	for _, p := range all {
		p.mu.Lock()
	}
	for i := range n {
		c := newCell(key{99, "", fmt.Sprint(i)}, rank{stamp, 0}, "value of a fact, with some bytes", "")
		for _, p := range all {
			p.store.put(c)
		}
	}
	for _, p := range all {
		p.mu.Unlock()
	}
}

// sum is of all that directors share.
func (p *process) sum() uint64 {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.store.tree.sum()
}

// Differences in most parts of a big store are more than one digest may carry, and heal all the same; a newcomer
// settles with all of it.
func TestBigDifferences(t *testing.T) {
	virtual(t, func(t *testing.T, w *world) {
		all := w.together(2)
		a, b := all[0], all[1]
		hold(60_000, 1, a, b)
		hold(6_000, 2, a)
		took := until(t, "they hold the same", 20*time.Second, func() bool { return a.sum() == b.sum() })
		t.Logf("healed after %s", took)
		c := w.director(3)
		took = until(t, "a newcomer settles", 5*time.Second, func() bool { return c.fleet().Settled })
		t.Logf("settled after %s", took)
		if c.sum() != a.sum() {
			t.Error("it settled before it had heard all")
		}
		for _, p := range append(all, c) {
			if n := p.dropped("oversized"); n != 0 {
				t.Errorf("%s dropped %v oversized messages", p.config.Name, n)
			}
		}
	})
}

// What one message makes a member do is bounded.
func TestSmallDigestsOfMuch(t *testing.T) {
	virtual(t, func(t *testing.T, w *world) {
		all := w.together(2)
		a, b := all[0], all[1]
		hold(20_000, 1, a, b)
		time.Sleep(2 * time.Second)
		ask := func(leaves ...leaf) (n int) {
			for _, o := range a.handle(seal(digestKind, "d2", b.addr, marshalDigest(digest{leaves: leaves}))) {
				n += len(o.b)
			}
			return n
		}
		if n := ask(leaf{}, leaf{}); n != 0 || a.dropped("malformed") != 1 {
			t.Errorf("%d bytes for one span twice", n)
		}
		if n := ask(leaf{}, leaf{span: span{4, 77}}); n != 0 || a.dropped("malformed") != 2 {
			t.Errorf("%d bytes for a span within another", n)
		}
		total := 0
		for range 100 {
			n := ask(leaf{})
			if total += n; n > maxAnswer+maxAnswer/4 {
				t.Fatalf("%d bytes for one digest", n)
			}
		}
		if total < maxAnswer || total > maxGiven+2*maxAnswer || a.dropped("busy") == 0 {
			t.Errorf("%d bytes in a second, %v dropped", total, a.dropped("busy"))
		}
	})
}

// A rank that all others hold is not too high for a newcomer, and what is refused is an error.
func TestHighRanks(t *testing.T) {
	virtual(t, func(t *testing.T, w *world) {
		all := w.together(2)
		for i := range uint64(5) {
			all[0].RestoreRegister("freeze", ravel.Register{Stamp: 1 + i*wild, Value: "on", By: "x"})
		}
		agree(t, 2*time.Second, all...)
		all = append(all, w.director(3))
		until(t, "the newcomer settles", time.Second, func() bool { return all[2].fleet().Settled })
		agree(t, time.Second, all...)
		if err := all[2].SetRegister("freeze", "off"); err != nil {
			t.Error(err)
		}
		agree(t, time.Second, all...)
		if r := all[0].fleet().Registers["freeze"]; r.Stamp != 2+4*wild || r.Value != "off" {
			t.Errorf("register %+v", r)
		}
		all[2].RestoreRegister("drain/x", ravel.Register{Stamp: utmost + 1})
		all[2].mu.Lock()
		all[2].store.limit = 0
		all[2].mu.Unlock()
		if err := all[2].SetRegister("drain/y", "on"); err == nil || !strings.Contains(err.Error(), "full") {
			t.Errorf("set where there is no room: %v", err)
		}
		if all[2].dropped("wild") != 1 || all[2].dropped("full") != 1 || len(all[2].Problems()) != 1 {
			t.Errorf("wild %v, full %v, problems %v", all[2].dropped("wild"), all[2].dropped("full"), all[2].Problems())
		}
	})
}

// What does not rise above what was forgotten is said to be refused; graves outlive the tombstones of others.
func TestBuried(t *testing.T) {
	virtual(t, func(t *testing.T, w *world) {
		w.preset = LAN
		all := w.together(2)
		addr := at(9).Addr()
		all[0].Write(service(1), []ravel.RosterEntry{entry(8, 1, ravel.Active), entry(9, 5, ravel.Gone)})
		agree(t, time.Second, all...)
		all[0].Forget(service(1), []netip.Addr{addr})
		time.Sleep(remember + time.Minute) // the other one heard of it later, and keeps it longer
		if _, found := all[0].fleet().Rosters[service(1)].Find(addr); found {
			t.Error("what was forgotten came back")
		}
		before := all[0].dropped("forgotten")
		all[0].Write(service(1), []ravel.RosterEntry{entry(9, 2, ravel.Joining)})
		if all[0].dropped("forgotten") != before+1 || len(all[0].Problems()) != 1 {
			t.Errorf("refused %v, problems %v", all[0].dropped("forgotten")-before, all[0].Problems())
		}
		all[0].Write(service(1), []ravel.RosterEntry{entry(9, 6, ravel.Joining)})
		agree(t, time.Second, all...)
	})
}

// What directors use of one real server may be more than a cell holds. What cannot be said is a problem as long as it is
// so, and is said as soon as it can be.
func TestManyUses(t *testing.T) {
	virtual(t, func(t *testing.T, w *world) {
		d := w.director(1)
		w.seeds = []string{d.addr.String()}
		r := w.realserver(50)
		until(t, "they meet", 5*time.Second, func() bool { return r.fleet().Settled && len(d.fleet().Members) == 2 })
		addr := at(50).Addr()
		for _, n := range []int{1000, 4000, 3999, 1001, 12000, 3, 0, 5000} {
			var services []ravel.ServiceKey
			for i := range n {
				services = append(services, service(2*i+1))
			}
			d.Report(ravel.Report{Uses: map[netip.Addr][]ravel.ServiceKey{addr: services}})
			until(t, fmt.Sprint("it hears of ", n), 2*time.Second, func() bool {
				got := map[ravel.ServiceKey]bool{}
				for _, k := range r.fleet().Reports["d1"].Uses[addr] {
					got[k] = true
				}
				return len(got) == n && len(d.Problems()) == 0
			})
		}
		limit := func(n int) {
			d.mu.Lock()
			defer d.mu.Unlock()
			d.store.limit = n
		}
		limit(0)
		d.Report(ravel.Report{Uses: map[netip.Addr][]ravel.ServiceKey{addr: {service(1)}, at(51).Addr(): {service(1)}}})
		time.Sleep(remember + time.Minute)
		if text := fmt.Sprint(d.Problems()); !strings.Contains(text, "1 facts of this process cannot be told to others (topic 19: full)") {
			t.Errorf("problems %s", text)
		}
		limit(1000)
		until(t, "it is said", 2*time.Second, func() bool { return len(d.Problems()) == 0 })
	})
}
