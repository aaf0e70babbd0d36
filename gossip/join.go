package gossip

import (
	"context"
	"fmt"
	"maps"
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

const (
	joinsAt  = 6  // addresses that are tried in one round
	firstAt  = 64 // seeds that are tried in one round while nobody else is known
	joinsMax = 80 // addresses that are tried at once
	// reachedFor is how long a seed counts as there once somebody answered: it may be another address of a member.
	reachedFor = 10 * time.Minute
	resolveIn  = 2 * time.Second // the longest that finding the addresses of names may take
	// Places where members were are tried in every round for backOff since they were heard, then ever more seldom, and
	// forgotten in the end.
	backOff   = 15 * time.Minute
	seldom    = 10 * time.Minute
	forgetful = 7 * 24 * time.Hour
)

// join tries, for ever, to reach whoever ought to be there and is not: seeds, and all places where members ever were.
// memberlist by itself never comes back to whom it lost. Nothing here waits for an answer.
func (g *Gossip) join(ctx context.Context, m *memberlist.Memberlist) {
	wait := 100 * time.Millisecond
	names := map[string]lookup{}
	resolving, fresh := false, false
	var lookups sync.WaitGroup
	defer lookups.Wait()
	resolved := make(chan map[string]lookup, 1)
	for {
		seeds := g.readSeeds(names)
		if len(seeds.names) > 0 && !resolving && !fresh {
			resolving = true
			lookups.Go(func() { resolved <- g.resolveAll(ctx, seeds.names) })
		}
		fresh = false
		targets, alone := g.round(seeds, resolving)
		for _, t := range targets {
			g.try(m, t)
		}
		wait = min(2*wait, g.timing.join)
		if !alone {
			wait = g.timing.join
		}
		pause := time.NewTimer(jitter(wait))
		for again := false; !again; {
			again = true
			select {
			case <-ctx.Done():
				pause.Stop()
				return
			case <-g.rejoin:
			case found := <-resolved:
				resolving = false
				again = !maps.EqualFunc(names, found, lookup.equal)
				names, fresh = found, again
				if !again {
					g.mu.Lock()
					g.settle.resolving = false
					g.mu.Unlock()
				}
			case <-pause.C:
			case other := <-g.pull:
				g.try(m, other)
				again = false
			}
		}
		pause.Stop()
	}
}

// try joins an address, unless that is being done. Nobody waits for it but the end of Run.
func (g *Gossip) try(m *memberlist.Memberlist, to netip.AddrPort) {
	g.mu.Lock()
	_, busy := g.trying[to]
	busy = busy || len(g.trying) >= joinsMax
	if !busy {
		g.trying[to] = struct{}{}
	}
	g.mu.Unlock()
	if busy {
		return
	}
	g.sending.Go(func() {
		n, _ := m.Join([]string{to.String()})
		g.mu.Lock()
		defer g.mu.Unlock()
		delete(g.trying, to)
		if n > 0 {
			g.reached[to] = time.Now()
		}
	})
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

// place is where a member gossiped.
type place struct {
	addr  netip.AddrPort
	seen  time.Time // when it came or, if it is not there, went
	tried time.Time
}

// due reports whether it is time to try a place that does not answer.
func (p place) due(now time.Time) bool {
	silence := now.Sub(p.seen)
	return silence < backOff || now.Sub(p.tried) >= min(silence/backOff*time.Minute, seldom)
}

func (g *Gossip) knowLocked(name string, addr netip.AddrPort) {
	g.known[name] = place{addr: addr, seen: time.Now()}
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

// selfLocked reports whether an address is our own.
func (g *Gossip) selfLocked(a netip.AddrPort) bool {
	if a == g.config.Advertise || a == g.config.Bind {
		return true
	}
	return a.Port() == g.config.Bind.Port() && (slices.Contains(g.addrs, a.Addr()) || slices.Contains(g.config.Addrs, a.Addr()))
}

// round says which addresses to try now, and whether nobody else is known.
func (g *Gossip) round(seeds seeds, resolving bool) (targets []netip.AddrPort, alone bool) {
	g.mu.Lock()
	defer g.mu.Unlock()
	now := time.Now()
	live := map[netip.AddrPort]bool{}
	var theirs []netip.AddrPort
	for _, m := range g.members {
		if !m.live() || m.name == g.config.Name {
			continue
		}
		theirs = append(theirs, m.addr)
		live[m.addr] = true
		for _, a := range m.addrs {
			live[netip.AddrPortFrom(a, m.addr.Port())] = true
		}
	}
	alone = len(theirs) == 0
	lost := g.lostLocked(now, live)
	// A seed that somebody answered at is another address of a member, so it is not joined again and again; but where
	// the member that was there is lost, it is.
	for a, when := range g.reached {
		switch {
		case now.Sub(when) > reachedFor:
			delete(g.reached, a)
		case !alone && !slices.Contains(lost, a):
			live[a] = true
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
	others := seeds.open
	var addrs []netip.AddrPort
	for _, a := range seeds.addrs {
		if !g.selfLocked(a) {
			others = true
			addrs = append(addrs, a)
		}
	}
	s := &g.settle
	s.seeds, s.resolving, s.addrs = others, resolving, addrs
	if s.begun.IsZero() && seeds.asked == s.asked {
		s.begun = now
	}
	some := joinsAt / 2
	if alone {
		some = firstAt
	}
	pick(addrs, some)
	pick(lost, max(1, joinsAt-len(targets)))
	// Where others hold our name for another's, as after a change of our address, they hear from us again only if we
	// tell them once that one is dead.
	if _, ok := g.conflicts[g.config.Name]; ok && len(theirs) > 0 {
		targets = append(targets, theirs[rand.IntN(len(theirs))])
	}
	return targets, alone
}

// lostLocked are some of the places where members were: first those that were heard last, for after a partition they
// are all there, and one of the others.
func (g *Gossip) lostLocked(now time.Time, live map[netip.AddrPort]bool) []netip.AddrPort {
	var lost []string
	for name, p := range g.known {
		switch {
		case live[p.addr]:
		case now.Sub(p.seen) > forgetful:
			delete(g.known, name)
		case p.due(now):
			lost = append(lost, name)
		}
	}
	slices.SortFunc(lost, func(a, b string) int { return g.known[b].seen.Compare(g.known[a].seen) })
	n := min(len(lost), 4*joinsAt)
	recent, old := lost[:n], lost[n:]
	rand.Shuffle(len(recent), func(i, j int) { recent[i], recent[j] = recent[j], recent[i] })
	picked := recent[:min(len(recent), joinsAt-1)]
	if len(old) > 0 {
		picked = append(slices.Clone(picked), old[rand.IntN(len(old))])
	}
	var addrs []netip.AddrPort
	for _, name := range picked {
		p := g.known[name]
		p.tried = now
		g.known[name] = p
		addrs = append(addrs, p.addr)
	}
	return addrs
}

// seeds are what there is to join.
type seeds struct {
	addrs []netip.AddrPort
	names []string // that are to be resolved
	asked int      // how often SetSeeds was called
	open  bool     // it is not known what some of them are
}

// lookupFunc finds the addresses of a name, as net.Resolver does.
type lookupFunc func(ctx context.Context, network, host string) ([]netip.Addr, error)

// lookup is what became of a name.
type lookup struct {
	addrs []netip.AddrPort
	err   string
}

func (l lookup) equal(m lookup) bool { return l.err == m.err && slices.Equal(l.addrs, m.addrs) }

// readSeeds are all seeds now; names are what was resolved so far.
func (g *Gossip) readSeeds(names map[string]lookup) (s seeds) {
	g.mu.Lock()
	all := slices.Concat(g.config.Seeds, g.seeds)
	s.asked = g.settle.asked
	g.mu.Unlock()
	var problems []string
	if g.config.SeedsFile != "" {
		b, err := os.ReadFile(g.config.SeedsFile)
		if err != nil {
			s.open = true
			problems = append(problems, err.Error())
		}
		for _, line := range strings.Split(string(b), "\n") {
			line, _, _ = strings.Cut(line, "#")
			if line = strings.TrimSpace(line); line != "" {
				all = append(all, line)
			}
		}
	}
	for _, seed := range all {
		if a, ok := parseSeed(seed, g.config.Bind.Port()); ok {
			s.addrs = append(s.addrs, a)
			continue
		}
		s.names = append(s.names, seed)
		found, ok := names[seed]
		s.open = s.open || !ok || found.err != ""
		s.addrs = append(s.addrs, found.addrs...)
		if found.err != "" {
			problems = append(problems, found.err)
		}
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	delete(g.problems, "seeds")
	if len(problems) > 0 {
		g.problems["seeds"] = ravel.Problem{Where: "gossip seeds", What: strings.Join(problems, "; ")}
	}
	return s
}

// resolveAll finds the addresses of names, of all at once.
func (g *Gossip) resolveAll(ctx context.Context, names []string) map[string]lookup {
	ctx, cancel := context.WithTimeout(ctx, resolveIn)
	defer cancel()
	var mu sync.Mutex
	var lookups sync.WaitGroup
	found := map[string]lookup{}
	for _, name := range names {
		lookups.Go(func() {
			var l lookup
			addrs, err := resolve(ctx, g.lookup, name, g.config.Bind.Port())
			if err != nil {
				l.err = err.Error()
			}
			l.addrs = slices.SortedFunc(slices.Values(addrs), netip.AddrPort.Compare)
			mu.Lock()
			defer mu.Unlock()
			found[name] = l
		})
	}
	lookups.Wait()
	return found
}

// parseSeed reads "192.0.2.1", "192.0.2.1:7946", "2001:db8::1" or "[2001:db8::1]:7946".
func parseSeed(seed string, port uint16) (netip.AddrPort, bool) {
	if a, err := netip.ParseAddrPort(seed); err == nil {
		return netip.AddrPortFrom(a.Addr().Unmap(), a.Port()), true
	}
	a, err := netip.ParseAddr(strings.Trim(seed, "[]"))
	return netip.AddrPortFrom(a.Unmap(), port), err == nil
}

// resolve turns "host", "host:port", "192.0.2.1", "2001:db8::1" or "[2001:db8::1]:7946" into addresses.
func resolve(ctx context.Context, lookup lookupFunc, seed string, port uint16) ([]netip.AddrPort, error) {
	if a, ok := parseSeed(seed, port); ok {
		return []netip.AddrPort{a}, nil
	}
	host := seed
	if h, p, err := net.SplitHostPort(seed); err == nil {
		n, err := strconv.ParseUint(p, 10, 16)
		if err != nil || n == 0 {
			return nil, fmt.Errorf("seed %q: port %q: want 1 to 65535", seed, p)
		}
		host, port = h, uint16(n)
	}
	ips, err := lookup(ctx, "ip", host)
	if err != nil {
		return nil, fmt.Errorf("seed %q: %w", seed, err)
	}
	var addrs []netip.AddrPort
	for _, ip := range ips {
		addrs = append(addrs, netip.AddrPortFrom(ip.Unmap(), port))
	}
	return addrs, nil
}
