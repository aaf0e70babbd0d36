package gossip

import (
	"context"
	"fmt"
	"math/rand/v2"
	"net"
	"net/netip"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/hashicorp/memberlist"
	"github.com/ravel-lb/ravel"
)

// joinsAt is how many addresses are tried in one round.
const joinsAt = 6

// join tries, for ever, to reach whoever ought to be there and is not: seeds, and all places where members ever were.
// memberlist by itself never comes back to whom it lost.
func (g *Gossip) join(ctx context.Context, m *memberlist.Memberlist) {
	wait := 100 * time.Millisecond
	for {
		targets, others := g.targets(ctx)
		var tries sync.WaitGroup
		var mu sync.Mutex
		answered := 0
		for _, t := range targets {
			tries.Go(func() {
				if n, _ := m.Join([]string{t.String()}); n > 0 {
					mu.Lock()
					defer mu.Unlock()
					answered++
				}
			})
		}
		tries.Wait()
		g.mu.Lock()
		g.settle.tried, g.settle.seeds = true, others
		g.settle.joined = g.settle.joined || answered > 0
		alone := !g.settle.joined
		g.mu.Unlock()
		wait = min(2*wait, g.timing.join)
		if !alone {
			wait = g.timing.join
		}
		pause := time.NewTimer(jitter(wait))
		select {
		case <-ctx.Done():
			pause.Stop()
			return
		case <-g.rejoin:
			pause.Stop()
		case <-pause.C:
		case other := <-g.pull:
			pause.Stop()
			_, _ = m.Join([]string{other.String()})
		}
	}
}

// strangerLocked is called when somebody speaks to us who, as far as we know, is not there: we ask.
func (g *Gossip) strangerLocked(from netip.AddrPort) {
	now := time.Now()
	if !from.IsValid() || now.Sub(g.pulled) < max(100*time.Millisecond, time.Duration(len(g.members))*200*time.Microsecond) {
		return
	}
	g.pulled = now
	select {
	case g.pull <- from:
	default:
	}
}

// membersSumLocked is the sum of all live members, us included.
func (g *Gossip) membersSumLocked() uint64 {
	if g.sumKnown {
		return g.sum
	}
	g.sum, g.sumKnown = 0, true
	for _, m := range g.members {
		if m.live() {
			g.sum ^= m.sum
		}
	}
	return g.sum
}

// compareMembersLocked sees to it that we and a member that goes on knowing other members than we do tell each other
// all. memberlist spreads the news of members by chance and misses one in some hundred; its own repair takes long.
func (g *Gossip) compareMembersLocked(from *member, sum uint64) {
	if from == nil || sum == 0 || sum == g.membersSumLocked() {
		if from != nil {
			from.apart = time.Time{}
		}
		return
	}
	now := time.Now()
	// All that is known of members is exchanged then: in a big fleet rather seldom.
	often := max(g.timing.exchange, time.Duration(len(g.members))*100*time.Millisecond)
	switch {
	case from.apart.IsZero():
		from.apart = now
	case now.Sub(from.apart) >= g.timing.exchange && now.Sub(g.pulled) >= often:
		from.apart, g.pulled = time.Time{}, now
		select {
		case g.pull <- from.addr:
		default:
		}
	}
}

// place is where a member gossiped when it came.
type place struct {
	addr netip.AddrPort
	seen time.Time
}

func (g *Gossip) knowLocked(name string, addr netip.AddrPort) {
	g.known[name] = place{addr, time.Now()}
	if len(g.known) <= maxKnown {
		return
	}
	oldest := name
	for n, p := range g.known {
		if p.seen.Before(g.known[oldest].seen) {
			oldest = n
		}
	}
	delete(g.known, oldest)
}

// targets are the addresses to try now, and whether there are seeds besides ourselves.
func (g *Gossip) targets(ctx context.Context) (targets []netip.AddrPort, others bool) {
	seeds, others := g.seedAddrs(ctx)
	g.mu.Lock()
	defer g.mu.Unlock()
	live := map[netip.AddrPort]bool{g.config.Advertise: true}
	var theirs []netip.AddrPort
	for _, m := range g.members {
		if m.live() {
			live[m.addr] = true
			if m.name != g.config.Name {
				theirs = append(theirs, m.addr)
			}
		}
	}
	pick := func(from []netip.AddrPort, n int) {
		rand.Shuffle(len(from), func(i, j int) { from[i], from[j] = from[j], from[i] })
		for _, a := range from {
			if n > 0 && !live[a] {
				live[a] = true
				targets = append(targets, a)
				n--
			}
		}
	}
	pick(seeds, joinsAt/2)
	// Of the places where members were, first those that were heard last: after a partition they are all there.
	var lost []place
	for _, p := range g.known {
		if !live[p.addr] {
			lost = append(lost, p)
		}
	}
	slices.SortFunc(lost, func(a, b place) int { return b.seen.Compare(a.seen) })
	var recent, old []netip.AddrPort
	for _, p := range lost {
		if len(recent) < 4*joinsAt {
			recent = append(recent, p.addr)
		} else {
			old = append(old, p.addr)
		}
	}
	pick(recent, joinsAt-1-len(targets))
	pick(old, 1)
	// Where others hold our name for another's, as after a change of our address, they hear from us again only if we
	// tell them once that one is dead.
	if _, ok := g.conflicts[g.config.Name]; ok && len(theirs) > 0 {
		targets = append(targets, theirs[rand.IntN(len(theirs))])
	}
	return targets, others
}

// seedAddrs are the addresses of all seeds, and whether there are others than ourselves among them. A seed that cannot
// be resolved counts as another.
func (g *Gossip) seedAddrs(ctx context.Context) (addrs []netip.AddrPort, others bool) {
	g.mu.Lock()
	seeds := append(append([]string(nil), g.config.Seeds...), g.seeds...)
	g.mu.Unlock()
	var problems []string
	if g.config.SeedsFile != "" {
		b, err := os.ReadFile(g.config.SeedsFile)
		if err != nil {
			others = true
			problems = append(problems, err.Error())
		}
		for _, line := range strings.Split(string(b), "\n") {
			line, _, _ = strings.Cut(line, "#")
			if line = strings.TrimSpace(line); line != "" {
				seeds = append(seeds, line)
			}
		}
	}
	ctx, cancel := context.WithTimeout(ctx, g.timing.stream)
	defer cancel()
	for _, s := range seeds {
		found, err := resolve(ctx, s, g.config.Bind.Port())
		if err != nil {
			others = true
			problems = append(problems, err.Error())
			continue
		}
		for _, a := range found {
			others = others || a != g.config.Advertise
			addrs = append(addrs, a)
		}
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	delete(g.problems, "seeds")
	if len(problems) > 0 {
		g.problems["seeds"] = ravel.Problem{Where: "gossip seeds", What: strings.Join(problems, "; ")}
	}
	return addrs, others
}

// resolve turns "host", "host:port", "192.0.2.1", "2001:db8::1" or "[2001:db8::1]:7946" into addresses.
func resolve(ctx context.Context, seed string, port uint16) ([]netip.AddrPort, error) {
	if a, err := netip.ParseAddrPort(seed); err == nil {
		return []netip.AddrPort{netip.AddrPortFrom(a.Addr().Unmap(), a.Port())}, nil
	}
	if a, err := netip.ParseAddr(strings.Trim(seed, "[]")); err == nil {
		return []netip.AddrPort{netip.AddrPortFrom(a.Unmap(), port)}, nil
	}
	host := seed
	if h, p, err := net.SplitHostPort(seed); err == nil {
		n, err := strconv.ParseUint(p, 10, 16)
		if err != nil || n == 0 {
			return nil, fmt.Errorf("seed %q: port %q: want 1 to 65535", seed, p)
		}
		host, port = h, uint16(n)
	}
	ips, err := net.DefaultResolver.LookupNetIP(ctx, "ip", host)
	if err != nil {
		return nil, fmt.Errorf("seed %q: %w", seed, err)
	}
	var addrs []netip.AddrPort
	for _, ip := range ips {
		addrs = append(addrs, netip.AddrPortFrom(ip.Unmap(), port))
	}
	return addrs, nil
}
