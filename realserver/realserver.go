// Package realserver hands packets for VIPs to the pods of this node: it keeps iptables redirects, the tunnel devices
// that directors reach the node by, and conntrack true to a whole list of redirects.
//
// What it guarantees:
//   - One iptables-restore transaction a table and family carries a change, so a packet meets the old rules or the new.
//     Only the chains that change are in it. Only the first packet of a flow meets them; later ones follow conntrack.
//   - It writes its own chains and one jump to each of them, nothing else. Its chains are known by their names, see
//     names.go, also after a restart: the first Apply reads them back and changes only what is not as it should be.
//   - Tunnelled packets are taken from directors alone, unless somebody else uses the same device, which is a Problem.
//   - What is for a redirected VIP and for none of its redirects meets no later rule of nat: ports that other programs
//     publish on every address of the host are not published on VIPs.
//   - The rules outlive the process. Cleanup removes them, and all else that is ours.
//
// The rules accept packets of redirected flows at the head of FORWARD, so neither a DROP policy nor network policies of
// a CNI that stand behind it apply to them: what may reach a VIP is the business of whoever announces it.
package realserver

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/ravel-lb/ravel"
	"github.com/ravel-lb/ravel/internal/iptables"
	"github.com/ravel-lb/ravel/internal/nftnat"
	"github.com/ravel-lb/ravel/internal/sysctl"
)

// The defaults of Options.
const (
	// DefaultMark is bit 12. In the marks of packets and connections it is free of kube-proxy (0x4000, 0x8000), the
	// portmap plugin and netavark (0x2000), Calico and Cilium identities (the upper 16 bits), Cilium's magic (0xf00),
	// the AWS CNI (0x80) and Tailscale (0xff0000). It matters that packet marks are too: policy routing often copies
	// the one to the other (CONNMARK --restore-mark).
	DefaultMark = 0x1000
	// DefaultTunnelMark is bit 11: Cilium alone uses it, in packets that come from no tunnel of ours.
	DefaultTunnelMark = 0x0800
	// DefaultMasqueradeMark is kube-proxy's, so that its own rule masquerades too where it runs.
	DefaultMasqueradeMark = 0x4000
)

// Options are the settings of a Realserver. The zero value of a field means its default.
type Options struct {
	Log        *slog.Logger          // nil logs nothing
	Registerer prometheus.Registerer // nil registers nothing
	// V4 and V6 are the two families' tables. Redirects of a family without tables are refused.
	V4, V6 *iptables.Tables
	// Sysctl sets rp_filter of tunl0 and reads what else matters. It is never nil.
	Sysctl *sysctl.Setter
	// Chain is the name of the base chain and the prefix of the others: RAVEL, or RAVEL and up to 5 more upper case
	// letters and digits.
	Chain string
	// Mark is the connection mark bit of redirected flows.
	Mark uint32
	// TunnelMark is the bit that tunnelled packets carry between their outer and inner pass (packet mark), and flows
	// that came by the tunnel (connection mark).
	TunnelMark uint32
	// MasqueradeMark is the packet mark bit of flows to masquerade.
	MasqueradeMark uint32
	// NoMasquerade are sources that are never masqueraded, such as the pods' own networks. In any order. What they send
	// to a VIP's port that is not redirected here may meet the rules of others, such as kube-proxy's.
	NoMasquerade []netip.Prefix
	// MTU is that of the path from the directors; 0 takes that of the links that they are reached by.
	MTU int
	// ThroughKubeProxy lets the chain of a Service that kube-proxy, in its mode iptables, has for a VIP and port pick the
	// pod; a redirect's own rules take what no such chain takes.
	ThroughKubeProxy bool
}

// tables is what a Realserver needs of one family's iptables.
type tables interface {
	Restore(ctx context.Context, input string) error
	Save(ctx context.Context, table string) ([]string, error)
	Rules(ctx context.Context, table, chain string) ([]string, error)
	EnsureFirst(ctx context.Context, table, chain string, rule []string) error
	Stamp(table string) (uint64, error)
	Remove(ctx context.Context, table, chain string, rule []string) error
}

var _ tables = (*iptables.Tables)(nil)

// Realserver keeps the redirects of one node. Apply, Resync and Cleanup are for one goroutine at a time; its other
// methods are safe beside them.
type Realserver struct {
	log     *slog.Logger
	names   names
	marks   marks
	sysctl  *sysctl.Setter
	net     network
	metrics *metrics
	noMasq  []netip.Prefix
	through bool // Options.ThroughKubeProxy
	mtu     int

	applying sync.Mutex // guards the fields below and what is in them
	ways     map[netip.Addr]route
	families []*family
	retired  bool // what runs with other bases left is gone

	mu       sync.Mutex // guards the fields below
	problems []ravel.Problem
	applied  []ravel.Redirect // what the last Apply was asked for, without what it refused
}

// family is one address family's half.
type family struct {
	v6       bool
	tables   tables
	counters func(ctx context.Context) ([]string, error) // the lines of iptables-save -c for nat
	early    early                                       // before a kube-proxy with nftables; nil is nowhere

	known  bool    // whether have is what the kernel holds
	hooked bool    // whether the jumps are known to stand where they should
	stamp  uint64  // of nat when its order was last looked at; 0 is never
	kube   bool    // nat had kube-proxy's chains at the last look
	late   bool    // that early cannot be done was seen since the last Resync
	have   ruleset // what the kernel held after the last look or change
	built  *built  // what have was built from, nil if it was read
	held   []ravel.ServiceKey
	odd    map[string]odd                        // by table and chain: what the kernel prints in another way than we write
	stale  map[ravel.ServiceKey]bool             // UDP keys whose conntrack entries are still to be looked through
	pods   map[ravel.ServiceKey][]netip.AddrPort // where the kernel redirects UDP keys to, nil before the first look
}

// odd is a chain that the kernel's programs print in words of their own.
type odd struct{ wrote, prints string }

// New checks the options. It touches nothing.
func New(o Options) (*Realserver, error) {
	r := &Realserver{
		log:     o.Log,
		sysctl:  o.Sysctl,
		net:     kernelNetwork{},
		ways:    map[netip.Addr]route{},
		noMasq:  slices.Clone(o.NoMasquerade),
		mtu:     o.MTU,
		through: o.ThroughKubeProxy,
		marks:   marks{flow: o.Mark, tunnel: o.TunnelMark, masquerade: o.MasqueradeMark},
	}
	if r.log == nil {
		r.log = slog.New(slog.DiscardHandler)
	}
	var errs []error
	var err error
	if r.names, err = newNames(o.Chain); err != nil {
		errs = append(errs, err)
	}
	if o.Sysctl == nil {
		errs = append(errs, errors.New("sysctl: missing"))
	}
	r.marks.setDefaults()
	errs = append(errs, r.marks.check())
	for i, p := range r.noMasq {
		if !p.IsValid() || p.Addr().Is4In6() {
			errs = append(errs, fmt.Errorf("masquerade exclusions: %s is no network", p))
			continue
		}
		r.noMasq[i] = p.Masked()
	}
	slices.SortFunc(r.noMasq, comparePrefixes)
	r.noMasq = slices.Compact(r.noMasq)
	if o.MTU != 0 && (o.MTU < 1280 || o.MTU > 65535) {
		errs = append(errs, fmt.Errorf("mtu %d: want 1280 to 65535, or 0 for that of the links", o.MTU))
	}
	if err := errors.Join(errs...); err != nil {
		return nil, fmt.Errorf("realserver: %w", err)
	}
	if o.V4 != nil {
		r.families = append(r.families, newFamily(o.V4, false))
	}
	if o.V6 != nil {
		r.families = append(r.families, newFamily(o.V6, true))
	}
	for _, f := range r.families {
		of := filter(r.noMasq, func(p netip.Prefix) bool { return p.Addr().Is6() == f.v6 })
		nft := map[bool]*iptables.Tables{false: o.V4, true: o.V6}[f.v6].Variant() == iptables.NFT
		f.early = nftnat.New(f.v6, nft, r.marks.flow, r.marks.masquerade, of)
	}
	if r.metrics, err = newMetrics(o.Registerer); err != nil {
		return nil, fmt.Errorf("realserver: %w", err)
	}
	return r, nil
}

func newFamily(t *iptables.Tables, v6 bool) *family {
	counters := func(ctx context.Context) ([]string, error) { return saveCounters(ctx, t) }
	return &family{v6: v6, tables: t, counters: counters, odd: map[string]odd{}, stale: map[ravel.ServiceKey]bool{}}
}

// name returns "ipv4" or "ipv6".
func (f *family) name() string {
	if f.v6 {
		return "ipv6"
	}
	return "ipv4"
}

// Resync makes the next Apply compare with what the kernel holds, instead of with what it held when last changed: it
// mends rules and devices that another program changed and puts our jumps back in front.
func (r *Realserver) Resync() {
	r.applying.Lock()
	defer r.applying.Unlock()
	for _, f := range r.families {
		f.known, f.hooked, f.late = false, false, false
	}
	clear(r.ways)
}

// Problems returns what the last Apply found wrong with the host or with single redirects.
func (r *Realserver) Problems() []ravel.Problem {
	r.mu.Lock()
	defer r.mu.Unlock()
	return slices.Clone(r.problems)
}

// Apply makes the redirects true, in any order of the list, and takes tunnelled packets from the directors alone. It
// returns the keys whose redirect the kernel now holds, sorted: after an error those that it is known to hold still. A
// redirect without pods needs no rule and is not held. A redirect that cannot be is left out and becomes a Problem.
func (r *Realserver) Apply(ctx context.Context, redirects []ravel.Redirect, directors []netip.Addr) (held []ravel.ServiceKey, err error) {
	r.applying.Lock()
	defer r.applying.Unlock()
	began := time.Now()
	good, problems := r.checkRedirects(redirects)
	directors = slices.Clone(directors)
	slices.SortFunc(directors, netip.Addr.Compare)
	directors = slices.Compact(directors)

	var errs []error
	for _, f := range r.families {
		of := func(a netip.Addr) bool { return a.Is4() != f.v6 }
		w := wanted{
			v6:        f.v6,
			redirects: filter(good, func(x ravel.Redirect) bool { return of(x.Key.VIP) }),
			directors: filter(directors, of),
			noMasq:    filter(r.noMasq, func(p netip.Prefix) bool { return of(p.Addr()) }),
			names:     r.names,
			marks:     r.marks,
		}
		found, err := r.applyFamily(ctx, f, w)
		for _, p := range found {
			if !slices.Contains(problems, p) { // some are of both families
				problems = append(problems, p)
			}
		}
		if err != nil {
			r.metrics.errors.WithLabelValues(f.name()).Inc()
			errs = append(errs, fmt.Errorf("redirecting %s: %w", f.name(), err))
		}
		held = append(held, f.held...)
		r.metrics.desired.WithLabelValues(f.name()).Set(float64(len(w.redirects)))
		r.metrics.held.WithLabelValues(f.name()).Set(float64(len(f.held)))
	}
	if len(errs) == 0 && !r.retired {
		if err := r.retire(ctx); err != nil {
			problems = append(problems, ravel.Problem{
				Where: "iptables", What: fmt.Sprintf("what a run with another --iptables-chain left may lead flows to pods of that time: %v", err),
			})
		} else {
			r.retired = true
		}
	}
	slices.SortFunc(held, ravel.ServiceKey.Compare)
	r.mu.Lock()
	r.problems, r.applied = problems, good
	r.mu.Unlock()
	r.metrics.duration.Observe(time.Since(began).Seconds())
	if len(errs) == 0 {
		r.metrics.success.SetToCurrentTime()
	}
	return held, errors.Join(errs...)
}

// applyFamily brings one family to what is wanted and leaves in f what the kernel then holds.
func (r *Realserver) applyFamily(ctx context.Context, f *family, w wanted) ([]ravel.Problem, error) {
	looked := false
	if !f.known {
		if err := r.look(ctx, f); err != nil {
			return nil, err
		}
		looked = true
	}
	w.keep, w.through = f.have, r.through && f.kube
	if len(w.redirects) == 0 && len(f.have) == 0 {
		f.held, f.built = nil, nil
		return f.forestall(nil), nil // nothing of ours is there and nothing is wanted: not even the tables are made
	}
	var problems []ravel.Problem
	if r.through && !f.kube {
		problems = append(problems, ravel.Problem{
			Where: "--redirect of " + f.name(),
			What:  "kube-service: no kube-proxy in mode iptables has its chain " + kubeServices + " in nat, so redirects lead straight to the pods",
			Fix:   "run kube-proxy in mode iptables, with the variant of iptables that Ravel uses (ravel check --host), or set --redirect=pods",
		})
	}
	if w.tunnels() {
		var found []ravel.Problem
		w.mtu, found = r.pathMTU(w)
		problems = append(problems, found...)
		w.shared, found = r.sharedTunnel(w)
		problems = append(problems, found...)
	}
	b := build(w, f.built)
	if err := r.change(ctx, f, b, looked); err != nil {
		return problems, err
	}
	if !f.hooked {
		if err := r.hook(ctx, f); err != nil {
			f.held = stillHeld(f, b) // a jump that was there is likely there still
			return problems, err
		}
		f.hooked = true
	}
	var errs []error
	tunnelOK := true
	if w.tunnels() {
		if found := r.ensureTunnel(w); len(found) > 0 {
			problems, tunnelOK = append(problems, found...), false
		}
	}
	problems = append(problems, f.forestall(w.redirects)...)
	problems = append(problems, r.checkHost(w)...)
	problems = append(problems, r.liberal(w)...)
	f.held = nil
	for _, x := range w.redirects {
		if len(x.Pods) > 0 && (tunnelOK || !x.Tunnelled) {
			f.held = append(f.held, x.Key)
		}
	}
	if err := r.forget(f, b); err != nil {
		errs = append(errs, err)
	}
	return problems, errors.Join(errs...)
}

// look reads what the kernel holds of ours.
func (r *Realserver) look(ctx context.Context, f *family) error {
	have := ruleset{}
	for _, table := range tableOrder {
		lines, err := f.tables.Save(ctx, table)
		if err != nil {
			return fmt.Errorf("reading the %s table: %w", table, err)
		}
		if table == "nat" {
			f.kube = hasServiceChains(lines)
		}
		if chains := parseSaved(lines, func(chain string) bool { return r.names.ours(table, chain) }); len(chains) > 0 {
			have[table] = chains
		}
	}
	for where, o := range f.odd {
		table, chain, _ := strings.Cut(where, " ")
		if rules, there := have[table][chain]; there && strings.Join(rules, "\n") == o.prints {
			have[table][chain] = strings.Split(o.wrote, "\n")
		}
	}
	first := f.pods == nil
	f.have, f.known, f.built = have, true, nil
	if first {
		// Whatever went while no agent ran went unseen: look through the entries of all that there are.
		f.pods = map[ravel.ServiceKey][]netip.AddrPort{}
		for key := range redirectsIn(have["nat"], r.names) {
			if key.Proto == ravel.UDP {
				f.stale[key] = true
			}
		}
	}
	return nil
}

// change brings the kernel from f.have to b in one transaction a table. After a look it looks again, so that a kernel
// whose programs print a rule of ours in other words is not mended for ever.
func (r *Realserver) change(ctx context.Context, f *family, b *built, looked bool) error {
	tx := plan(f.have, b.rules)
	if tx.empty() {
		f.have, f.built = b.rules, b
		return nil
	}
	adopted := looked && len(f.have) > 0
	err := f.tables.Restore(ctx, tx.text(true))
	if err != nil && tx.removed > 0 && ctx.Err() == nil {
		// A rule of another program may jump to a chain of ours that should go. It stays then, empty.
		if again := f.tables.Restore(ctx, tx.text(false)); again == nil {
			r.log.Warn("chains of ours are in use by others and stay", "family", f.name(), "err", err)
			err = nil
			f.have, f.built = b.rules, b
			f.known = false // try again at the next Apply
		}
	}
	if err != nil {
		f.known, f.built = false, nil
		f.held = stillHeld(f, b)
		return err
	}
	r.metrics.transactions.WithLabelValues(f.name()).Inc()
	r.log.Info("changed iptables", "family", f.name(), "chains", tx.changed, "removed", tx.removed, "mended", adopted)
	if len(f.have) == 0 || !sameChains(f.have, b.rules, r.names) {
		f.hooked = false
	}
	f.have, f.built = b.rules, b
	if !adopted {
		return nil
	}
	if err := r.look(ctx, f); err != nil {
		return err
	}
	for _, table := range tableOrder {
		for chain, rules := range b.rules[table] {
			if have, there := f.have[table][chain]; there && !slices.Equal(have, rules) {
				f.odd[table+" "+chain] = odd{wrote: strings.Join(rules, "\n"), prints: strings.Join(have, "\n")}
			}
		}
	}
	f.have, f.built = b.rules, b
	return nil
}

// stillHeld returns what is held after a failed change: the keys whose rules the change was not to touch. Whether the
// transaction of their table failed or not, they are as they were.
func stillHeld(f *family, b *built) []ravel.ServiceKey {
	var held []ravel.ServiceKey
	for _, key := range f.held {
		if one, wanted := b.find(key); wanted && slices.Equal(f.have["nat"][one.chain], one.rules) {
			held = append(held, key)
		}
	}
	return held
}

// checkRedirects returns the redirects that can be, by key, and what is wrong with the others.
func (r *Realserver) checkRedirects(redirects []ravel.Redirect) ([]ravel.Redirect, []ravel.Problem) {
	byKey := func(a, b ravel.Redirect) int { return a.Key.Compare(b.Key) }
	if !slices.IsSortedFunc(redirects, byKey) {
		redirects = slices.Clone(redirects)
		slices.SortStableFunc(redirects, byKey)
	}
	var problems []ravel.Problem
	good := make([]ravel.Redirect, 0, len(redirects))
	for _, x := range redirects {
		what := r.fault(x)
		if len(good) > 0 && good[len(good)-1].Key == x.Key {
			what = "a second redirect of the same key"
		}
		if what != "" {
			problems = append(problems, ravel.Problem{Where: "redirect " + x.Key.String(), What: what + "; it is left out"})
			continue
		}
		good = append(good, x)
	}
	return good, problems
}

// fault says why a redirect cannot be, "" if it can.
func (r *Realserver) fault(x ravel.Redirect) string {
	vip := x.Key.VIP
	switch {
	case !vip.IsValid() || vip.Is4In6() || vip.Zone() != "" || vip.IsUnspecified():
		return fmt.Sprintf("%s is no address that can be a VIP", vip)
	case x.Key.Port == 0:
		return "port 0"
	case x.MTU != 0 && (x.MTU < 1280 || x.MTU > 9216):
		return fmt.Sprintf("MTU %d: want 1280 to 9216", x.MTU)
	case x.Key.Proto != ravel.TCP && x.Key.Proto != ravel.UDP:
		return fmt.Sprintf("protocol %s is not redirected", x.Key.Proto)
	case !slices.ContainsFunc(r.families, func(f *family) bool { return f.v6 == vip.Is6() }):
		return "this node has no iptables for its address family"
	}
	for _, pod := range x.Pods {
		if pod.Port() == 0 || !pod.IsValid() || pod.Addr().Is4() != vip.Is4() || pod.Addr().Is4In6() || pod.Addr().Zone() != "" {
			return fmt.Sprintf("pod %s cannot stand behind this VIP", pod)
		}
	}
	return ""
}

// filter returns the elements that keep holds for.
func filter[T any](list []T, keep func(T) bool) []T {
	var kept []T
	for _, v := range list {
		if keep(v) {
			kept = append(kept, v)
		}
	}
	return kept
}

// sameChains reports whether the chains that are jumped to from the kernel's own chains are there in both or neither.
func sameChains(a, b ruleset, n names) bool {
	for _, h := range n.hooks() {
		_, inA := a[h.table][h.to]
		_, inB := b[h.table][h.to]
		if inA != inB {
			return false
		}
	}
	return true
}
