package gossip

import (
	"fmt"
	"net/netip"
	"runtime"
	"runtime/debug"
	"slices"
	"testing"
	"time"

	"github.com/hashicorp/memberlist"
	"github.com/ravel-lb/ravel"
)

// A thousand members in one process: how long until the directors know all and all know the directors, and a change is known to all that it
// concerns, what a member costs, and how many bytes a change is. The probes of the time are subtracted.
func BenchmarkTwoHundredMembers(b *testing.B) {
	for b.Loop() {
		thousand(b, 5, 195)
	}
}

func BenchmarkThousandMembers(b *testing.B) {
	for b.Loop() {
		thousand(b, 10, 990)
	}
}

func thousand(b *testing.B, directors, realservers int) {
	n := directors + realservers
	defer debug.SetGCPercent(debug.SetGCPercent(400))
	var before, after runtime.MemStats
	runtime.GC()
	runtime.ReadMemStats(&before)
	w := &world{b: b, preset: LAN, insecure: true}
	var all []*process
	began := time.Now()
	// A thousand members share a core or two here, so memberlist is slowed down: what it takes is not what is measured.
	w.tune = func(c *memberlist.Config) {
		c.ProbeInterval, c.ProbeTimeout = 10*time.Second, 5*time.Second
		c.GossipInterval, c.RetransmitMult = 250*time.Millisecond, 2
		c.PushPullInterval, c.TCPTimeout = time.Minute, 30*time.Second
	}
	for i := range n {
		role := ravel.Realserver
		if i < directors {
			role = ravel.Director
		}
		c := w.config(i+1, role)
		c.Settle = 2 * time.Minute
		if i > directors {
			w.seeds = []string{at(1 + i%directors).String()}
			c.Seeds = w.seeds
		}
		all = append(all, w.start(c))
		if i%50 == 49 { // all at once they would fight for the core
			until(b, "fifty more settle", time.Minute, func() bool {
				return !slices.ContainsFunc(all[max(0, i-49):], func(p *process) bool { return !p.fleet().Settled })
			})
		}
		if i == 0 {
			w.seeds = []string{at(1).String()}
			until(b, "the first settles", 5*time.Second, func() bool { return all[0].fleet().Settled })
		}
	}
	know := func() bool {
		for _, p := range slices.Backward(all) {
			// A realserver need not know all others.
			f := p.fleet()
			if !f.Settled || len(f.Live(ravel.Director)) != directors || p.config.Role == ravel.Director && len(f.Members) != n {
				return false
			}
		}
		return true
	}
	for !know() {
		if time.Since(began) > 3*time.Minute {
			settled, fewest := 0, n
			for _, p := range all {
				settled += int(flag(p.fleet().Settled))
				if p.config.Role == ravel.Director {
					fewest = min(fewest, len(p.fleet().Members))
				}
			}
			b.Fatalf("after 3 minutes %d have settled, and a director knows only %d", settled, fewest)
		}
		time.Sleep(100 * time.Millisecond)
	}
	b.ReportMetric(time.Since(began).Seconds(), "s-to-meet")
	// Every realserver has redirects of 20 of 100 services.
	began = time.Now()
	for i, p := range all[directors:] {
		r := ravel.Report{Redirects: map[ravel.ServiceKey]bool{}}
		for k := range 20 {
			r.Redirects[service((i+k*5)%100)] = true
		}
		p.Report(r)
	}
	for i := range directors {
		all[i].Report(ravel.Report{TableSize: 4093})
	}
	for s := range 100 {
		var entries []ravel.RosterEntry
		for i := range 20 {
			entries = append(entries, entry(directors+1+(s+i*5)%realservers, uint64(i+1), ravel.Active))
		}
		all[s%directors].Write(service(s), entries)
	}
	until(b, "all directors know all", time.Minute, func() bool {
		for _, p := range all[:directors] {
			if f := p.fleet(); len(f.Rosters) != 100 || len(f.Reports) != n || len(f.Reports[all[n-1].config.Name].Redirects) != 20 {
				return false
			}
		}
		return true
	})
	b.ReportMetric(time.Since(began).Seconds(), "s-to-share-22000-facts")
	runtime.GC()
	runtime.ReadMemStats(&after)
	b.ReportMetric(float64(after.HeapAlloc-before.HeapAlloc)/float64(n)/1024, "KiB/member")
	// What goes on the wire when nothing happens, then for changes.
	quiet := func(d time.Duration) float64 {
		start := w.net.Traffic().Bytes()
		time.Sleep(d)
		return float64(w.net.Traffic().Bytes()-start) / d.Seconds()
	}
	idle := quiet(3 * time.Second)
	for range 5 { // memberlist's own news are still on their way
		time.Sleep(time.Second)
		next := quiet(time.Second)
		if next > idle*0.95 {
			break
		}
		idle = next
	}
	idle = quiet(3 * time.Second)
	b.ReportMetric(idle/float64(n), "idle-B/s/member")
	sent := func() (bytes, messages float64) {
		for _, p := range all {
			bytes += p.count("bytes", "delta") + p.count("bytes", "ack")
			messages += p.count("messages", "delta") + p.count("messages", "ack")
		}
		return bytes, messages
	}
	bytes0, messages0 := sent()
	var worst, sum time.Duration
	const changes = 20
	for i := range changes {
		s := service(i)
		began := time.Now()
		all[i%directors].Write(s, []ravel.RosterEntry{{Addr: at(directors + 1 + i).Addr(), Birth: uint64(100 + i), State: ravel.Active, Weight: 3}})
		concerned := slices.Clone(all[:directors])
		until(b, "a change is known to all that it concerns", 10*time.Second, func() bool {
			for len(concerned) > 0 {
				e, ok := concerned[len(concerned)-1].fleet().Rosters[s].Find(at(directors + 1 + i).Addr())
				if !ok || e.Birth != uint64(100+i) {
					return false
				}
				concerned = concerned[:len(concerned)-1]
			}
			return true
		})
		took := time.Since(began)
		worst, sum = max(worst, took), sum+took
	}
	bytes1, messages1 := sent()
	b.ReportMetric((bytes1-bytes0)/changes, "B/change")
	b.ReportMetric((messages1-messages0)/changes, "messages/change")
	b.ReportMetric(float64(sum.Milliseconds())/changes, "ms/change")
	b.ReportMetric(float64(worst.Milliseconds()), "worst-ms/change")
}

// One change in a big Fleet: what it costs to show it.
func BenchmarkShow(b *testing.B) {
	g, err := New(Config{Name: "d", Fleet: "f", Insecure: true, Bind: at(1), Addrs: []netip.Addr{at(1).Addr()}})
	if err != nil {
		b.Fatal(err)
	}
	for n := range 500 {
		name := fmt.Sprint("r", n)
		g.store.setPresent(name, true)
		for s := range 40 {
			g.store.put(newCell(key{topicRedirect, name, serviceName(service(s))}, rank{1, uint64(s)}, "\x08\x01", ""))
		}
	}
	for s := range 1000 {
		var entries []ravel.RosterEntry
		for i := range 20 {
			entries = append(entries, entry(i, uint64(i+1), ravel.Active))
		}
		g.Write(service(s), entries)
	}
	g.showLocked(time.Now())
	n := uint64(100)
	b.ReportAllocs()
	for b.Loop() {
		n++
		g.Write(service(int(n)%1000), []ravel.RosterEntry{entry(5, n, ravel.Active)})
		g.showLocked(time.Now())
	}
}

// An exchange between two directors that differ in one of 60,000 facts.
func BenchmarkExchange(b *testing.B) {
	make := func(name, other string) *Gossip {
		g, err := New(Config{Name: name, Fleet: "f", Insecure: true, Bind: at(1), Addrs: []netip.Addr{at(1).Addr()}})
		if err != nil {
			b.Fatal(err)
		}
		for _, n := range []string{name, other} {
			m := &member{name: n, meta: meta{role: ravel.Director}, addr: at(1)}
			g.members[n], g.directors[n] = m, m
		}
		for n := range 60000 {
			g.store.put(newCell(key{topicRegister, "", fmt.Sprint(n)}, rank{1, 0}, "x", ""))
		}
		return g
	}
	both := map[string]*Gossip{"a": make("a", "b"), "b": make("b", "a")}
	bytes, messages, n := 0, 0, uint64(1)
	for b.Loop() {
		n++
		both["a"].mergeLocked(nil, delta{cells: []*cell{newCell(key{topicRegister, "", "77"}, rank{n, 0}, "x", "")}})
		queue := []outgoing{both["a"].summaryLocked(both["a"].members["b"], time.Now())}
		for at := "b"; len(queue) > 0; {
			var next []outgoing
			for _, o := range queue {
				bytes += len(o.b)
				messages++
				next = append(next, both[at].handle(o.b)...)
			}
			queue = next
			at = map[string]string{"a": "b", "b": "a"}[at]
		}
		if both["b"].store.cells[key{topicRegister, "", "77"}].hi != n {
			b.Fatal("it did not come over")
		}
	}
	b.ReportMetric(float64(bytes)/float64(b.N), "wire-B/op")
	b.ReportMetric(float64(messages)/float64(b.N), "messages/op")
}
