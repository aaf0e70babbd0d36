// Package guard keeps a VIP from being a door to the node that holds it: a packet to a VIP that no service claims is
// rejected, with a TCP reset or a port unreachable, before any socket of the node sees it.
//
// It does so with one rule a family, first in filter INPUT, which sends packets for a VIP to the chain RAVEL-GUARD.
// That returns ICMP (echo is answered, errors pass) and what a service claims, and rejects the rest. Which VIPs and
// services there are stands in kernel sets, ravel4-vip and ravel4-svc and their IPv6 likes, so that a change costs one
// entry and the rules stay. Sets are filled before a rule reads them, and a VIP is in its set from the Apply that names
// it to the one that does not, so that between the two no moment leaves it open. Nothing else is touched; packets that
// are forwarded never meet the chain.
//
// On a director it keeps the packets of claimed services from conntrack too (Options.Untrack), with a chain that raw
// PREROUTING leads to: what is not tracked meets no rule of nat, so that no program that redirects by nat, kube-proxy
// above all, takes a packet before IPVS does. The same set says which these are, so a service is claimed and untracked in
// one moment.
package guard

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"slices"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/vishvananda/netlink"

	"github.com/ravel-lb/ravel"
	"github.com/ravel-lb/ravel/internal/iptables"
)

const (
	table     = "filter"
	hook      = "INPUT"
	chain     = iptables.Prefix + "-GUARD"
	rawTable  = "raw"
	rawHook   = "PREROUTING"
	rawChain  = iptables.Prefix + "-UNTRACKED"
	maxFaults = 5  // entries that an error names
	expiry    = 10 // seconds after which the kernel itself ends a hold whose holder died

	// Who holds the lock of iptables for long must not hold up all else: rules that were in place at the last look are
	// most likely still there, and are looked at again the next time.
	patience = time.Second // for which one family's rules that were in place wait for the lock
	late     = 3           // times in a row after which not having got to look is a Problem
)

// Options are what New needs.
type Options struct {
	Log        *slog.Logger
	Registerer prometheus.Registerer // nil registers nothing
	Tables     []*iptables.Tables    // one of each family that the node has
	Enabled    bool                  // false: no VIP is guarded; Apply removes what an earlier run left of that
	Untrack    bool                  // packets of claimed services are not tracked; false removes what an earlier run left
}

// Guard guards VIPs. Its methods are safe for use by many goroutines.
type Guard struct {
	log     *slog.Logger
	enabled bool
	untrack bool
	sets    sets
	metrics *metrics

	mu       sync.Mutex // guards the fields below
	families []*family
	stray    []netip.Addr // VIPs of a family that the node has no tables of
}

// family is one address family's rules and sets.
type family struct {
	tables                *iptables.Tables
	vip, svc, hold        set
	others                set // claims that are tracked all the same
	guard, raw            *rules
	known                 bool               // vips, claims and foreign are what the kernel holds
	before                bool               // they were, so that a difference to them is drift
	removed               bool               // what is switched off was removed
	vips, claims, foreign []ravel.ServiceKey // sorted; of vips only the VIP is set
	holders               map[ravel.ServiceKey]int
	fault                 error // of the last Apply
}

// New returns a Guard that has touched nothing yet.
func New(o Options) *Guard {
	if o.Log == nil {
		o.Log = slog.New(slog.DiscardHandler)
	}
	g := &Guard{
		log:     o.Log.With("component", "guard"),
		enabled: o.Enabled,
		untrack: o.Untrack,
		sets:    ipset{&netlink.Handle{}},
		metrics: newMetrics(o.Registerer),
	}
	for _, t := range o.Tables {
		prefix := fmt.Sprintf("ravel%d-", t.Family())
		f := &family{
			tables:  t,
			vip:     set{prefix + "vip", false, t.Family(), 0},
			svc:     set{prefix + "svc", true, t.Family(), 0},
			hold:    set{prefix + "hold", true, t.Family(), expiry},
			others:  set{prefix + "others", true, t.Family(), 0},
			holders: map[ravel.ServiceKey]int{},
		}
		f.guard, f.raw = f.guarding(), f.untracking()
		g.families = append(g.families, f)
	}
	return g
}

// Apply guards vips, all but the services of claimed and foreign, whose packets are left to IPVS. Those of claimed are
// not tracked, if that is asked for; foreign are services of others, who may need conntrack. A service in both is
// foreign. Apply returns the VIPs that are guarded just as asked, sorted, also beside an error: what is wrong with one
// VIP or one family leaves the others guarded. With the guard switched off these are all. After the first call, and
// until Resync, only the difference to the call before is sent to the kernel. It does all that can be done and joins what
// went wrong. A VIP of a family that the node has no tables of is not guarded; that is a Problem and no error, since
// trying again does not mend it. Neither does it where the kernel cannot leave packets untracked.
//
// A claimed packet that nobody takes meets the node's sockets. So claim a service when IPVS has it, give the claim up
// before IPVS loses it, guard a VIP before a link gets it and until no link has it.
func (g *Guard) Apply(ctx context.Context, vips []netip.Addr, claimed, foreign []ravel.ServiceKey) (guarded []netip.Addr, err error) {
	g.mu.Lock()
	defer g.mu.Unlock()
	removing := g.removeLocked(ctx)
	if !g.enabled && !g.untrack {
		return sortedAddrs(vips), removing
	}
	g.stray = sortedAddrs(vips)
	entries, claims := 0, 0
	filled, there := make([][]netip.Addr, len(g.families)), make([]bool, len(g.families))
	// The sets of both families first: nothing else writes them, so they never wait.
	for i, f := range g.families {
		ofFamily := func(a netip.Addr) bool { return iptables.FamilyOf(a) == f.tables.Family() }
		g.stray = slices.DeleteFunc(g.stray, ofFamily)
		var want entriesOf
		for _, a := range vips {
			if ofFamily(a) {
				want.vips = append(want.vips, ravel.ServiceKey{VIP: a})
			}
		}
		want.claims = make([]ravel.ServiceKey, 0, len(claimed)+len(foreign))
		for _, key := range claimed {
			if ofFamily(key.VIP) {
				want.claims = append(want.claims, key)
			}
		}
		for _, key := range foreign {
			if ofFamily(key.VIP) {
				want.claims, want.foreign = append(want.claims, key), append(want.foreign, key)
			}
		}
		want.vips, want.claims, want.foreign = sorted(want.vips), sorted(want.claims), sorted(want.foreign)
		filled[i], there[i], f.fault = g.entriesLocked(ctx, f, want)
		entries += len(f.vips)
		claims += len(f.claims)
	}
	errs := []error{removing}
	for i, f := range g.families {
		if there[i] && g.untrack {
			f.fault = errors.Join(f.fault, g.seeToRulesLocked(ctx, f, f.raw))
		}
		if there[i] && g.enabled {
			f.fault = errors.Join(f.fault, g.seeToRulesLocked(ctx, f, f.guard))
		}
		if (f.guard.inPlace || !g.enabled) && (f.raw.inPlace || !g.untrack) {
			guarded = append(guarded, filled[i]...)
		}
		if f.fault != nil {
			errs = append(errs, fmt.Errorf("guarding %s VIPs: %w", f.tables.Family(), f.fault))
		}
	}
	slices.SortFunc(guarded, netip.Addr.Compare)
	g.metrics.entries.WithLabelValues("vip").Set(float64(entries))
	g.metrics.entries.WithLabelValues("claim").Set(float64(claims))
	return guarded, errors.Join(errs...)
}

// entriesOf are what one family's sets are to hold, each sorted.
type entriesOf struct{ vips, claims, foreign []ravel.ServiceKey }

// entriesLocked fills one family's sets. It returns the VIPs whose entries are as asked, and whether the sets are there
// for a rule to read.
func (g *Guard) entriesLocked(ctx context.Context, f *family, want entriesOf) (filled []netip.Addr, there bool, err error) {
	vips, claims := want.vips, want.claims
	if !g.untrack {
		want.foreign = nil
	}
	if !f.known {
		if err := g.readLocked(f); err != nil {
			return nil, false, err
		}
		f.known, f.before = true, true
	}
	var errs []error
	faults := 0
	bad := map[netip.Addr]bool{} // VIPs of which an entry is not as asked
	change := func(s set, keys []ravel.ServiceKey, do func(set, ravel.ServiceKey) error) {
		for _, key := range keys {
			err := ctx.Err()
			if err == nil {
				err = do(s, key)
			}
			if err == nil {
				continue
			}
			bad[key.VIP] = true
			if faults++; faults <= maxFaults {
				errs = append(errs, fmt.Errorf("changing %s in set %s: %w", keyText(key), s.name, err))
			}
		}
	}
	newVIPs, oldVIPs := compare(f.vips, vips)
	newClaims, oldClaims := compare(f.claims, claims)
	newForeign, oldForeign := compare(f.foreign, want.foreign)
	// A new VIP's services are claimed before it is guarded, and a removed one's until it is not: a claimed service is
	// never rejected. Otherwise claims that go come first: what nobody serves any more must not meet a socket.
	var first, last []ravel.ServiceKey
	for _, key := range oldClaims {
		if has(vips, ravel.ServiceKey{VIP: key.VIP}) {
			first = append(first, key)
		} else {
			last = append(last, key)
		}
	}
	change(f.others, newForeign, g.sets.add) // what is another's is never untracked
	change(f.svc, newClaims, g.sets.add)
	change(f.vip, newVIPs, g.sets.add)
	change(f.svc, first, g.sets.del)
	change(f.vip, oldVIPs, g.sets.del)
	change(f.svc, last, g.sets.del)
	change(f.others, oldForeign, g.sets.del)
	if faults > maxFaults {
		errs = append(errs, fmt.Errorf("and %d more entries", faults-maxFaults))
	}
	if faults > 0 {
		f.known, f.before = false, false // the next Apply reads what there is
	} else {
		f.vips, f.claims, f.foreign = vips, claims, want.foreign
	}
	for _, key := range vips {
		if !bad[key.VIP] {
			filled = append(filled, key.VIP)
		}
	}
	// An entry that is missing is no reason to leave the others without their rule.
	return filled, true, errors.Join(errs...)
}

// sortedAddrs returns a sorted copy without what is in it twice.
func sortedAddrs(addrs []netip.Addr) []netip.Addr {
	list := slices.Clone(addrs)
	slices.SortFunc(list, netip.Addr.Compare)
	return slices.Compact(list)
}

// sorted sorts a list that is the caller's to change, and drops what is in it twice.
func sorted(keys []ravel.ServiceKey) []ravel.ServiceKey {
	if !slices.IsSortedFunc(keys, ravel.ServiceKey.Compare) {
		slices.SortFunc(keys, ravel.ServiceKey.Compare)
	}
	return slices.Compact(keys)
}

// has reports whether a sorted list holds the key.
func has(keys []ravel.ServiceKey, key ravel.ServiceKey) bool {
	_, found := slices.BinarySearchFunc(keys, key, ravel.ServiceKey.Compare)
	return found
}

// compare walks two sorted lists and returns what is only in want and what is only in have. It is called for every
// change of anything, mostly with equal lists of thousands, so it makes no maps.
func compare(have, want []ravel.ServiceKey) (add, remove []ravel.ServiceKey) {
	for len(have) > 0 && len(want) > 0 {
		switch {
		case have[0] == want[0]:
			have, want = have[1:], want[1:]
		case have[0].Compare(want[0]) < 0:
			remove, have = append(remove, have[0]), have[1:]
		default:
			add, want = append(add, want[0]), want[1:]
		}
	}
	return append(add, want...), append(remove, have...)
}

// keyText names an entry.
func keyText(k ravel.ServiceKey) string {
	if k.Port == 0 {
		return k.VIP.String()
	}
	return k.String()
}

// readLocked makes the sets where they are not and reads what is in them.
func (g *Guard) readLocked(f *family) error {
	read := func(s set) ([]ravel.ServiceKey, error) {
		if err := g.sets.create(s); err != nil {
			return nil, fmt.Errorf("making set %s: %w", s.name, err)
		}
		list, _, err := g.sets.list(s)
		if err != nil {
			return nil, fmt.Errorf("reading set %s: %w", s.name, err)
		}
		return sorted(list), nil
	}
	vips, err := read(f.vip)
	if err != nil {
		return err
	}
	claims, err := read(f.svc)
	if err != nil {
		return err
	}
	var foreign []ravel.ServiceKey
	if g.untrack {
		if foreign, err = read(f.others); err != nil {
			return err
		}
	}
	var held []ravel.ServiceKey
	if g.enabled {
		if held, err = read(f.hold); err != nil {
			return err
		}
	}
	for _, key := range held {
		if f.holders[key] > 0 {
			continue
		}
		// An earlier process held it and died.
		if err := g.sets.del(f.hold, key); err != nil {
			return fmt.Errorf("removing %s from set %s: %w", key, f.hold.name, err)
		}
	}
	if f.before {
		foundVIPs, lostVIPs := compare(f.vips, vips)
		foundClaims, lostClaims := compare(f.claims, claims)
		foundForeign, lostForeign := compare(f.foreign, foreign)
		if n := len(foundVIPs) + len(lostVIPs) + len(foundClaims) + len(lostClaims) + len(foundForeign) + len(lostForeign); n > 0 {
			g.metrics.drift.WithLabelValues("entry").Add(float64(n))
			g.log.Warn("set entries changed behind our back", "family", f.tables.Family(), "entries", n)
		}
	}
	f.vips, f.claims, f.foreign = vips, claims, foreign
	return nil
}

// HoldBack silently drops the packets that would start a flow to key until release is called, so that clients repeat
// them: for the moment in which IPVS has no scheduler for the service and would refuse them. Established TCP flows go
// on; of UDP, which has no first packet, all are dropped. It ends by itself after 10 s, should this process die.
//
// With the guard switched off nothing is held back. A VIP that is not guarded yet is an error, and release is never
// nil.
func (g *Guard) HoldBack(key ravel.ServiceKey) (release func(), err error) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if !g.enabled {
		return func() {}, nil
	}
	i := slices.IndexFunc(g.families, func(f *family) bool { return f.tables.Family() == iptables.FamilyOf(key.VIP) })
	if i < 0 || !has(g.families[i].vips, ravel.ServiceKey{VIP: key.VIP}) {
		return func() {}, fmt.Errorf("holding back new flows to %s: the VIP is not guarded", key)
	}
	f := g.families[i]
	if err := g.sets.add(f.hold, key); err != nil {
		return func() {}, fmt.Errorf("holding back new flows to %s: %w", key, err)
	}
	f.holders[key]++
	return sync.OnceFunc(func() {
		g.mu.Lock()
		defer g.mu.Unlock()
		if f.holders[key]--; f.holders[key] > 0 {
			return
		}
		delete(f.holders, key)
		if err := g.sets.del(f.hold, key); err != nil {
			g.log.Warn("new flows are held back until the entry expires", "service", key, "err", err)
		}
	}), nil
}

// Resync makes the next Apply read the kernel again: sets, chain, and whether the jump still stands first, since other
// programs insert before it.
func (g *Guard) Resync() {
	g.mu.Lock()
	defer g.mu.Unlock()
	for _, f := range g.families {
		f.known, f.guard.looked, f.raw.looked = false, false, false
	}
}

// Problems returns what keeps VIPs unguarded, as of the last Apply.
func (g *Guard) Problems() []ravel.Problem {
	g.mu.Lock()
	defer g.mu.Unlock()
	var problems []ravel.Problem
	for _, f := range g.families {
		if f.fault != nil {
			problems = append(problems, ravel.Problem{
				Where: "guard of " + f.tables.Family().String(),
				What:  fmt.Sprintf("a VIP may be a door to this node's own sockets: %v", f.fault),
				Fix:   "modprobe -a ip_set_hash_ip ip_set_hash_ipport xt_set",
			})
		}
	}
	for _, f := range g.families {
		for _, r := range []*rules{f.guard, f.raw} {
			if r.putOff >= late {
				problems = append(problems, ravel.Problem{
					Where: "guard of " + f.tables.Family().String(),
					What: fmt.Sprintf("whether our rules in %s %s still stand first could not be seen to %d times in a row: %v",
						r.table, r.hook, r.putOff, r.putOffFor),
					Fix: "fuser -v /run/xtables.lock",
				})
			}
			if r.never != nil {
				problems = append(problems, r.impossible(f))
			}
		}
	}
	if len(g.stray) > 0 {
		problems = append(problems, ravel.Problem{
			Where: "guard",
			What: fmt.Sprintf("%d VIPs, %s first, are not guarded: this node has no iptables for their family",
				len(g.stray), g.stray[0]),
		})
	}
	return problems
}

// removeLocked removes what is switched off, once.
func (g *Guard) removeLocked(ctx context.Context) error {
	var errs []error
	for _, f := range g.families {
		if f.removed || g.enabled && g.untrack {
			continue
		}
		if _, err := g.cleanup(ctx, f, !g.enabled, !g.untrack, false); err != nil {
			errs = append(errs, err)
			continue
		}
		f.removed = true
	}
	return errors.Join(errs...)
}

// Cleanup removes rules, chains and sets, and returns what it did, or with dryRun what it would do, in the words of
// iptables and ipset.
func (g *Guard) Cleanup(ctx context.Context, dryRun bool) ([]string, error) {
	g.mu.Lock()
	defer g.mu.Unlock()
	var did []string
	var errs []error
	for _, f := range g.families {
		if !dryRun {
			f.known, f.before, f.removed = false, false, false
			f.guard.forget()
			f.raw.forget()
		}
		done, err := g.cleanup(ctx, f, true, true, dryRun)
		did = append(did, done...)
		errs = append(errs, err)
	}
	return did, errors.Join(errs...)
}

// cleanup removes one family's rules that guard, those that untrack, or both, and the sets that no rule of ours needs
// then.
func (g *Guard) cleanup(ctx context.Context, f *family, guard, untrack, dryRun bool) ([]string, error) {
	var did []string
	var errs []error
	for _, r := range []struct {
		*rules
		remove bool
	}{{f.raw, untrack}, {f.guard, guard}} {
		if !r.remove {
			continue
		}
		done, err := f.tables.RemoveChains(ctx, r.table, r.chain, dryRun)
		did = append(did, done...)
		if err != nil {
			return did, err
		}
	}
	var useless []set
	if untrack {
		useless = append(useless, f.others)
	}
	if guard {
		useless = append(useless, f.hold)
	}
	if guard && untrack {
		useless = append(useless, f.vip, f.svc)
	}
	for _, s := range useless {
		_, there, err := g.sets.list(s)
		if err != nil {
			errs = append(errs, fmt.Errorf("reading set %s: %w", s.name, err))
			continue
		}
		if !there {
			continue
		}
		if !dryRun {
			if err := g.destroy(ctx, s); err != nil {
				errs = append(errs, fmt.Errorf("destroying set %s: %w", s.name, err))
				continue
			}
		}
		did = append(did, "ipset destroy "+s.name)
	}
	if !dryRun && guard && untrack {
		f.vips, f.claims, f.foreign = nil, nil, nil
	}
	return did, errors.Join(errs...)
}

// destroy waits for nf_tables to let go of a set: it does so a moment after the rule went.
func (g *Guard) destroy(ctx context.Context, s set) error {
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	for {
		err := g.sets.destroy(s)
		if !errors.Is(err, errBusy) {
			return err
		}
		select {
		case <-ctx.Done():
			return err
		case <-time.After(20 * time.Millisecond):
		}
	}
}
