package health

import (
	"cmp"
	"context"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/ravel-lb/ravel"
	"github.com/ravel-lb/ravel/internal/latest"
)

// fleet is directors with probers and judges that hear of each other by a gossip that takes its time.
type fleet struct {
	mu      sync.Mutex // guards the fields below
	members []ravel.Member
	reports map[string]map[netip.Addr]ravel.Health
	news    map[string]*latest.Value[ravel.Fleet] // what each director knows
	told    int
	heard   map[string]int // the newest that each was told
}

// tell gives each director what is so, after at most delay.
func (f *fleet) tell(delay time.Duration) {
	f.mu.Lock()
	defer f.mu.Unlock()
	now := ravel.Fleet{Settled: true, Members: slices.Clone(f.members), Reports: map[string]ravel.Report{}}
	for name, health := range f.reports {
		now.Reports[name] = ravel.Report{Health: health}
	}
	f.told++
	told := f.told
	for name, news := range f.news {
		time.AfterFunc(rand.N(delay), func() {
			f.mu.Lock()
			defer f.mu.Unlock()
			if told > f.heard[name] {
				f.heard[name] = told
				news.Set(now)
			}
		})
	}
}

func (f *fleet) state(name string, s ravel.MemberState) {
	f.mu.Lock()
	for i := range f.members {
		if f.members[i].Name == name {
			f.members[i].State = s
		}
	}
	f.mu.Unlock()
	f.tell(time.Millisecond)
}

// From the power cut until every director's verdict, with gossip as slow as the presets have it; and nobody dies while
// gossip is blocked and probes are answered.
func TestFleetJudgesWithinTheBound(t *testing.T) {
	const spread = 200 * time.Millisecond // of a report
	for name, c := range map[string]struct {
		timing  Timing
		suspect time.Duration // gossip's, from the cut
		bound   time.Duration
	}{
		"fast": {Fast(), 600 * time.Millisecond, 2 * time.Second},
		"lan":  {LAN(), 2 * time.Second, 8 * time.Second},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				nodes := nodesOf(6)
				f := &fleet{reports: map[string]map[netip.Addr]ravel.Health{}, news: map[string]*latest.Value[ravel.Fleet]{}, heard: map[string]int{}}
				var targets []Target
				for _, n := range nodes {
					f.members = append(f.members, ravel.Member{Name: n.Name, Role: ravel.Realserver})
					for _, addr := range n.Addrs {
						targets = append(targets, Target{Addr: addr, Port: 80})
					}
				}
				net := newNetwork()
				for _, target := range targets {
					net.set(target.Addr, ravel.Healthy, nil)
				}
				names := []string{"d1", "d2", "d3"}
				for _, name := range names {
					f.members = append(f.members, ravel.Member{Name: name})
					f.news[name] = &latest.Value[ravel.Fleet]{}
				}
				slices.SortFunc(f.members, func(a, b ravel.Member) int { return cmp.Compare(a.Name, b.Name) })

				ctx, cancel := context.WithCancel(t.Context())
				var wg sync.WaitGroup
				defer wg.Wait()
				defer cancel()
				verdicts := map[string]*latest.Value[Verdict]{}
				for _, name := range names {
					p, stop := running(t, net, Options{Timing: c.timing})
					defer stop()
					if err := p.Apply(targets); err != nil {
						t.Fatal(err)
					}
					out := &latest.Value[Verdict]{}
					verdicts[name] = out
					wg.Go(func() { direct(ctx, f, name, p, nodes, out, spread) })
				}
				time.Sleep(5 * time.Second)

				all := func(dead int) bool {
					for _, v := range verdicts {
						if now, _ := v.Latest(); len(now.Dead) != dead {
							return false
						}
					}
					return true
				}
				var worst time.Duration
				for i := range runs(len(nodes)) {
					n := nodes[i%len(nodes)]
					time.Sleep(rand.N(c.timing.Interval))
					for _, addr := range n.Addrs {
						net.set(addr, ravel.Silent, nil)
					}
					cut := time.Now()
					suspected := time.AfterFunc(rand.N(c.suspect), func() { f.state(n.Name, ravel.Suspect) })
					for !all(len(n.Addrs)) {
						if time.Since(cut) > c.bound {
							t.Fatalf("%s is not dead everywhere %s after the cut", n.Name, c.bound)
						}
						time.Sleep(time.Millisecond)
					}
					worst = max(worst, time.Since(cut))
					suspected.Stop()
					for _, addr := range n.Addrs {
						net.set(addr, ravel.Healthy, nil)
					}
					f.state(n.Name, ravel.Alive)
					time.Sleep(2*c.timing.Interval + hold(1+i/len(nodes)))
					if !all(0) {
						t.Fatalf("%s is not back", n.Name)
					}
				}
				t.Logf("worst %s", worst)

				// Gossip is blocked for half of the realservers.
				for _, n := range nodes[:3] {
					f.state(n.Name, ravel.Suspect)
				}
				for _, n := range nodes[:3] {
					f.state(n.Name, ravel.Dead)
				}
				for range 100 {
					time.Sleep(100 * time.Millisecond)
					if !all(0) {
						t.Fatal("gossip alone ejected a node that answers probes")
					}
				}
			})
		})
	}
}

// direct is what a director does: its findings go to gossip, and what gossip knows to the judge.
func direct(ctx context.Context, f *fleet, name string, p *Prober, nodes []Node, out *latest.Value[Verdict], spread time.Duration) {
	j := NewJudge(nil, nil, Settings{Probes: true})
	for ctx.Err() == nil {
		found, heard := p.Changed(), f.news[name].Changed()
		health, _ := p.Latest()
		f.mu.Lock()
		said := f.reports[name]
		f.reports[name] = health
		f.mu.Unlock()
		if fmt.Sprint(said) != fmt.Sprint(health) {
			f.tell(spread)
		}
		knows, _ := f.news[name].Latest()
		v := j.Judge(time.Now(), name, knows, nodes)
		p.Hurry(v.Hurry)
		out.Set(v)
		wake := time.Hour
		if !v.Wake.IsZero() {
			wake = time.Until(v.Wake)
		}
		select {
		case <-ctx.Done():
		case <-found:
		case <-heard:
		case <-time.After(wake):
		}
	}
}
