// Package agree ties a process to its fleet: it tells the others what this one wants, holds and sees, writes into the
// rosters what is to be written, and turns what the fleet agreed on into the inputs of desired.Compute.
//
// Until a director has settled it changes nothing: what an earlier process left in the kernel stays as it is. While the
// fleet is frozen it gives out nothing new.
package agree

import (
	"cmp"
	"context"
	"fmt"
	"log/slog"
	"maps"
	"net/netip"
	"slices"
	"strings"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"golang.org/x/sync/errgroup"

	"github.com/ravel-lb/ravel"
	"github.com/ravel-lb/ravel/internal/desired"
	"github.com/ravel-lb/ravel/internal/health"
	"github.com/ravel-lb/ravel/internal/latest"
	"github.com/ravel-lb/ravel/internal/maglev"
	"github.com/ravel-lb/ravel/internal/node"
	"github.com/ravel-lb/ravel/internal/roster"
	"github.com/ravel-lb/ravel/internal/setdiff"
)

// fleet is what this package does in the fleet; gossip has it.
type fleet interface {
	Latest() (ravel.Fleet, bool)
	Changed() <-chan struct{}
	Report(ravel.Report)
	Write(ravel.ServiceKey, []ravel.RosterEntry)
	Forget(ravel.ServiceKey, []netip.Addr)
	RestoreRegister(name string, r ravel.Register)
	SetSeeds([]string)
	SetAddrs([]netip.Addr)
}

// kernel is what a director's IPVS says; package director has it.
type kernel interface {
	Read(ctx context.Context) ([]ravel.VirtualService, error)
	Digests(ctx context.Context) (map[ravel.ServiceKey]ravel.ServiceReport, map[netip.Addr][]ravel.ServiceKey, error)
	// TableSize finds out the number of slots of this kernel's Maglev tables, and says how it is known.
	TableSize(ctx context.Context) (slots int, how string, err error)
}

// Options are what a Director works with.
type Options struct {
	Log        *slog.Logger
	Registerer prometheus.Registerer // may be nil
	Self       string
	Fleet      fleet
	Kernel     kernel
	// Inputs are what the documents say, without Agreed.
	Inputs node.Source[desired.Inputs]
	// Unconfirmed says that Inputs may not be what the fleet goes by: until they are, it is as if the fleet was not heard
	// yet. nil is never.
	Unconfirmed func() bool
	// Source tells whether the source of Inputs answers, as ravel.Report has it (Unheard), and whether they are those of an
	// earlier process. nil always answers.
	Source func() (unheard uint64, earlier bool)
	// Walked changes when something was done to the kernel.
	Walked func() <-chan struct{}
	// Sessions are the BGP sessions, by the router's address: whether they are up. It is asked at every step.
	Sessions func() map[netip.Addr]bool
	Timing   roster.Timing
	// Prober probes the real servers; nil does not probe.
	Prober *health.Prober
	// ProbeTarget makes the target of an address.
	ProbeTarget func(netip.Addr) health.Target
	Health      health.Settings
	// Floor is the percentage of a service's real servers that stay in use although they seem dead.
	Floor int
	// WithdrawShare is the part of new flows, 0 to 1, by which the tables of a director that stands alone must differ for
	// it to withdraw.
	WithdrawShare float64
	// Repair has the kernel read again and made right; it does not wait for it.
	Repair func()
	// SeedPort is where the directors of the documents gossip.
	SeedPort uint16
	// File is where the rosters are kept over a restart; empty keeps nothing.
	File string
	// Boot names the life of this kernel.
	Boot string
}

// Result is what a director should do now, and why.
type Result struct {
	Inputs   desired.Inputs // with Agreed
	State    ravel.State
	Problems []ravel.Problem
	Fleet    ravel.Fleet
	Verdict  health.Verdict
	Differs  []Difference
}

// Director ties one director to its fleet.
type Director struct {
	o       Options
	log     *slog.Logger
	keeper  *roster.Keeper
	judge   *health.Judge
	metrics *metrics
	results latest.Value[Result]
	read    latest.Value[digests] // what the kernel was found to hold
	unread  atomic.Pointer[error] // why what it holds could not be read at the start; nil once it was

	// The fields below belong to Run.
	kept     []ravel.VirtualService // what the kernel held at the start
	known    bool                   // kept was read
	seeded   bool                   // what the fleet did not know was told
	restored bool                   // what an operator had set was given back
	left     [2]left                // whether it leaves it to others to announce VIPs of IPv4, and of IPv6
	older    older                  // whether its inputs are older than others'
	given    bool                   // a settled state was given out
	seeds    []string
	report   ravel.Report // the last that was given
	told     bool         // one was
	pending  map[ravel.ServiceKey][]ravel.RosterEntry
	wrote    map[ravel.ServiceKey]time.Time // when of pending the last was written
	probed   []health.Node                  // whom the prober was told to look at
	probing  bool                           // it was told
	wishes   wishes
	last     computed
	watch    watch
	saver    saver
}

// digests are what the kernel was found to hold.
type digests struct {
	services map[ravel.ServiceKey]ravel.ServiceReport
	uses     map[netip.Addr][]ravel.ServiceKey
	slots    int // of its Maglev tables; 0 is not known
}

// wishes are what the inputs ask for, and what they were computed from.
type wishes struct {
	inputs  *desired.Inputs
	dead    map[netip.Addr]bool
	drained map[string]bool
	list    map[ravel.ServiceKey][]roster.Wish
	hashes  map[ravel.ServiceKey]uint64 // of list
	nodes   []health.Node

	// What was said of them last, and what the kernel was found to hold then.
	said map[ravel.ServiceKey]ravel.ServiceReport
	back map[ravel.ServiceKey]ravel.ServiceReport
}

// computed is what desired.Compute said last, and of what.
type computed struct {
	inputs   *desired.Inputs // nil before the first time
	state    ravel.State
	problems []ravel.Problem
}

// New returns the Director of a process.
func New(o Options) *Director {
	return &Director{
		o: o, log: o.Log.With("component", "agree"), keeper: roster.NewKeeper(o.Self, o.Timing),
		judge: health.NewJudge(o.Log, o.Registerer, o.Health), metrics: newMetrics(o.Registerer),
		pending: map[ravel.ServiceKey][]ravel.RosterEntry{}, wrote: map[ravel.ServiceKey]time.Time{},
		watch: newWatch(),
		saver: saver{file: o.File, boot: o.Boot},
	}
}

// Results is where the newest Result is read. It is there once the documents are known and the kernel was read.
func (d *Director) Results() *latest.Value[Result] { return &d.results }

// Unread is why this director does nothing yet: what the kernel holds cannot be read. nil while it can.
func (d *Director) Unread() error {
	if err := d.unread.Load(); err != nil {
		return *err
	}
	return nil
}

// lookAgain is how often sessions are looked at though nothing else changes.
const lookAgain = 5 * time.Second

// Run keeps the director in step with its fleet until ctx ends.
func (d *Director) Run(ctx context.Context) error {
	group, ctx := errgroup.WithContext(ctx)
	group.Go(func() error {
		d.readBack(ctx)
		return nil
	})
	if d.o.Prober != nil {
		group.Go(func() error { return d.o.Prober.Run(ctx) })
	}
	group.Go(func() error { return d.loop(ctx) })
	return group.Wait()
}

// loop steps whenever something changed.
func (d *Director) loop(ctx context.Context) error {
	var probes <-chan struct{}
	for {
		inputsChanged, fleetChanged, readChanged := d.o.Inputs.Changed(), d.o.Fleet.Changed(), d.read.Changed()
		if d.o.Prober != nil {
			probes = d.o.Prober.Changed()
		}
		var wake <-chan time.Time
		if at := d.step(ctx, time.Now()); !at.IsZero() {
			wake = time.After(max(10*time.Millisecond, time.Until(at)))
		}
		select {
		case <-ctx.Done():
			return d.saver.flush()
		case <-inputsChanged:
		case <-fleetChanged:
		case <-readChanged:
		case <-probes:
		case <-wake:
		}
	}
}

// readBack reads the kernel's table again after everything that was done to it.
func (d *Director) readBack(ctx context.Context) {
	slots := 0
	var asked time.Time
	for {
		walked := d.o.Walked()
		if slots == 0 && time.Since(asked) > time.Minute {
			size, how, err := d.o.Kernel.TableSize(ctx)
			asked = time.Now()
			if slots = size; err != nil {
				d.log.Warn("the size of the kernel's Maglev tables is not known", "err", err)
			} else {
				d.log.Info("the size of the kernel's Maglev tables is known", "slots", slots, "from", how)
			}
		}
		services, uses, err := d.o.Kernel.Digests(ctx)
		if err == nil {
			before, known := d.read.Latest()
			if !known || before.slots != slots || !maps.Equal(before.services, services) || !sameUses(before.uses, uses) {
				d.read.Set(digests{services, uses, slots})
			}
		}
		select {
		case <-ctx.Done():
			return
		case <-walked:
		}
	}
}

func sameUses(a, b map[netip.Addr][]ravel.ServiceKey) bool {
	return sameMap(a, b) || maps.EqualFunc(a, b, slices.Equal[[]ravel.ServiceKey])
}

// sameReport reports whether two reports say the same.
func sameReport(a, b ravel.Report) bool {
	return a.TableSize == b.TableSize && a.Withdrawn4 == b.Withdrawn4 && a.Withdrawn6 == b.Withdrawn6 && a.Dark == b.Dark && a.Unheard == b.Unheard && (a.Services == nil) == (b.Services == nil) &&
		(sameMap(a.Services, b.Services) || maps.Equal(a.Services, b.Services)) &&
		maps.Equal(a.Health, b.Health) && maps.Equal(a.Sessions, b.Sessions) && sameUses(a.Uses, b.Uses) &&
		(a.Redirects == nil) == (b.Redirects == nil) && maps.Equal(a.Redirects, b.Redirects)
}

// step looks at everything once, and returns when to look again though nothing changed.
func (d *Director) step(ctx context.Context, now time.Time) time.Time {
	inputs, known := d.o.Inputs.Latest()
	if !known {
		return time.Time{}
	}
	if !d.known {
		kept, err := d.o.Kernel.Read(ctx)
		if err != nil {
			if was := d.unread.Load(); was == nil || (*was).Error() != err.Error() {
				d.log.Error("what the kernel holds cannot be read: this director does nothing until it can", "err", err)
			}
			d.unread.Store(&err)
			return now.Add(time.Second)
		}
		d.kept, d.known = kept, true
		d.unread.Store(nil)
		if err := d.saver.load(); err != nil {
			d.log.Warn("the saved rosters are not used", "err", err)
		}
	}
	if list := Seeds(inputs, d.o.SeedPort); !slices.Equal(list, d.seeds) {
		d.seeds = list
		d.o.Fleet.SetSeeds(list)
	}
	for _, own := range inputs.Fleet.Directors {
		if own.Name == d.o.Self {
			d.o.Fleet.SetAddrs(own.Addrs)
		}
	}
	fleet, _ := d.o.Fleet.Latest()
	fleet.Settled = fleet.Settled && (d.o.Unconfirmed == nil || !d.o.Unconfirmed())
	wake := now.Add(lookAgain)
	sooner := func(at time.Time) {
		if !at.IsZero() && (wake.IsZero() || at.Before(wake)) {
			wake = at
		}
	}
	back, readBack := d.read.Latest()
	report := ravel.Report{TableSize: back.slots, Uses: back.uses, Sessions: d.o.Sessions()}
	if d.o.Prober != nil {
		report.Health, _ = d.o.Prober.Latest()
	}
	earlier := false
	if d.o.Source != nil {
		report.Unheard, earlier = d.o.Source()
	}
	fleet.Reports = maps.Clone(fleet.Reports)
	if fleet.Reports == nil {
		fleet.Reports = map[string]ravel.Report{}
	}
	fleet.Reports[d.o.Self] = report

	nodes := d.nodes(&inputs)
	verdict := d.judge.Judge(now, d.o.Self, voters(fleet, inputs), nodes)
	sooner(verdict.Wake)
	d.probe(nodes, verdict.Hurry)

	if fleet.Settled && !d.restored {
		// What an operator set counts from the first moment on.
		fleet.Registers = d.restore(fleet.Registers)
		d.restored = true
	}
	agreed := &desired.Agreed{
		Hold: !fleet.Settled || fleet.Frozen() && !d.given, Floor: d.o.Floor, Kept: d.kept, Dead: map[netip.Addr]bool{}, Drained: map[string]bool{},
	}
	for addr := range verdict.Dead {
		agreed.Dead[addr] = true
	}
	for name := range fleet.AllDrained() {
		agreed.Drained[name] = true
	}
	inputs.Agreed = agreed
	d.wish(&inputs)

	if fleet.Settled {
		var than []string
		if earlier {
			than = d.newer(report.Unheard, fleet)
		}
		sooner(d.older.look(now, than, d.o.Timing.Majority))
	}
	wrong := d.watch.outvoted || d.older.counts
	sooner(d.left[0].look(now, d.o.Self, fleet, true, wrong || verdict.Alone.V4, d.o.Timing.Majority))
	sooner(d.left[1].look(now, d.o.Self, fleet, false, wrong || verdict.Alone.V6, d.o.Timing.Majority))
	drained := fleet.Drained(d.o.Self)
	agreed.Withdraw4, agreed.Withdraw6 = drained || d.left[0].is, drained || d.left[1].is
	report.Withdrawn4, report.Withdrawn6, report.Dark = agreed.Withdraw4, agreed.Withdraw6, inputs.AttractNone

	problems := slices.Clone(verdict.Problems)
	if d.older.counts {
		means := ": this director announces nothing"
		if !d.left[0].is || !d.left[1].is {
			means = ", and too few others announce for this director to leave it to them"
		}
		problems = append(problems, ravel.Problem{
			Where: "inputs",
			What:  "are those of an earlier process, and ask for other real servers than the newer ones of " + strings.Join(d.older.than, ", ") + means,
			Fix:   "see why the API server does not answer here; routes come back by themselves when it does",
		})
	}
	if d.o.Prober != nil {
		problems = append(problems, d.o.Prober.Problems()...)
	}
	if fleet.Settled {
		report.Services = d.services(back)
		fleet.Reports[d.o.Self] = report
		if !d.seeded {
			d.seed(now, fleet)
			d.seeded = true
		}
		d.catchUp(now, fleet)
		fleet.Rosters = d.overlay(fleet.Rosters)
		out := d.keeper.Advance(roster.In{At: now, Fleet: fleet, Wishes: d.wishes.list, Hashes: d.wishes.hashes})
		for key, entries := range out.Write {
			d.write(now, key, entries)
		}
		for key, addrs := range out.Forget {
			d.o.Fleet.Forget(key, addrs)
		}
		fleet.Rosters = d.overlay(fleet.Rosters)
		problems = append(problems, out.Problems...)
		sooner(out.Wake)
	}
	// Not before the kernel was read back: a report says all, and who uses what must not seem to use nothing.
	if readBack && (!d.told || !sameReport(d.report, report)) {
		d.report, d.told = report, true
		d.o.Fleet.Report(report)
	}
	if agreed.Rosters = fleet.Rosters; !fleet.Settled {
		agreed.Rosters = nil
	} else if agreed.Rosters == nil {
		agreed.Rosters = map[ravel.ServiceKey]ravel.Roster{}
	}

	differs, more, at := d.watch.look(now, d.o.Self, fleet, d.o.Repair, func(keys []ravel.ServiceKey) bool {
		return d.far(ctx, keys, fleet)
	})
	problems = append(problems, more...)
	sooner(at)
	problems = append(problems, standing(fleet)...)
	sooner(d.saver.note(now, fleet))
	problems = append(problems, d.saver.problems()...)
	d.metrics.observe(fleet, differs)

	if fleet.Frozen() && d.given {
		// The state stays; what is known of the fleet goes on.
		result, _ := d.results.Latest()
		result.Fleet, result.Verdict, result.Differs, result.Problems = fleet, verdict, differs, problems
		d.results.Set(result)
		return wake
	}
	d.given = d.given || fleet.Settled
	d.last.compute(&inputs)
	d.results.Set(Result{
		Inputs: inputs, State: d.last.state, Problems: append(problems, d.last.problems...), Fleet: fleet, Verdict: verdict, Differs: differs,
	})
	return wake
}

// compute computes what should be, unless it is what it was the last time.
func (c *computed) compute(inputs *desired.Inputs) {
	if was := c.inputs; was != nil && sameInputs(was, inputs) && was.Agreed.Same(inputs.Agreed) {
		return
	}
	state, problems := desired.Compute(*inputs)
	*c = computed{inputs: inputs, state: state, problems: problems}
}

// far reports whether one of these services is given to other real servers by this kernel than by the fleet's roster,
// for more than the share of new flows that counts.
func (d *Director) far(ctx context.Context, keys []ravel.ServiceKey, fleet ravel.Fleet) bool {
	held, err := d.o.Kernel.Read(ctx)
	if err != nil {
		return false
	}
	mine := maglev.Size(fleet.Reports[d.o.Self].TableSize)
	most := commonSize(fleet, d.o.Self)
	if mine == 0 || most == 0 {
		return false
	}
	for _, is := range held {
		if !slices.Contains(keys, is.Key) {
			continue
		}
		want := is
		want.RealServers = nil
		for _, e := range fleet.Rosters[is.Key] {
			if e.State != ravel.Gone {
				want.RealServers = append(want.RealServers, ravel.RealServer{Addr: e.Addr, Weight: e.Weight, LastWeight: e.Weight})
			}
		}
		// Only whose slots are whose counts here, not who takes flows right now.
		is.RealServers = slices.Clone(is.RealServers)
		for i := range is.RealServers {
			is.RealServers[i].Weight = is.RealServers[i].LastWeight
		}
		if _, share := maglev.Moved(maglev.Build(most, want), maglev.Build(mine, is)); share > d.o.WithdrawShare {
			return true
		}
	}
	return false
}

// commonSize is the size of the Maglev tables that most of the other live directors have: who has another size has other
// tables.
func commonSize(fleet ravel.Fleet, self string) maglev.Size {
	sizes := map[int]int{}
	most := fleet.Reports[self].TableSize
	for _, m := range fleet.Live(ravel.Director) {
		if size := fleet.Reports[m.Name].TableSize; size > 0 && m.Name != self {
			if sizes[size]++; sizes[size] > sizes[most] || sizes[size] == sizes[most] && size < most {
				most = size
			}
		}
	}
	return maglev.Size(most)
}

// standing are the settings of the fleet that an operator should not forget.
func standing(fleet ravel.Fleet) []ravel.Problem {
	var problems []ravel.Problem
	if fleet.Frozen() {
		problems = append(problems, ravel.Problem{
			Where: "fleet", What: "is frozen by " + fleet.Registers[ravel.FreezeRegister].By + ": changes have no effect", Fix: "ravel freeze off",
		})
	}
	for name, by := range fleet.AllDrained() {
		problems = append(problems, ravel.Problem{Where: name, What: "is drained by " + by, Fix: "ravel drain --undo " + name})
	}
	slices.SortFunc(problems, ravel.Problem.Compare)
	return problems
}

// Seeds are where the other directors of the documents gossip.
func Seeds(inputs desired.Inputs, port uint16) []string {
	var list []string
	for _, d := range inputs.Fleet.Directors {
		if d.Name != inputs.Node && len(d.Addrs) > 0 {
			list = append(list, netip.AddrPortFrom(d.Addrs[0], port).String())
		}
	}
	slices.Sort(list)
	return list
}

// voters is the fleet without the agents of nodes that are gone for good: they said that they would be back, and the
// documents know them no more.
func voters(fleet ravel.Fleet, inputs desired.Inputs) ravel.Fleet {
	known := make(map[string]bool, len(inputs.Cluster.Nodes))
	for _, n := range inputs.Cluster.Nodes {
		known[n.Name] = true
	}
	fleet.Members = slices.Clone(fleet.Members)
	for i, m := range fleet.Members {
		if m.Role == ravel.Realserver && !m.State.Live() && !known[m.Name] {
			fleet.Members[i].State = ravel.Left
		}
	}
	return fleet
}

// nodes are the real servers of the inputs.
func (d *Director) nodes(inputs *desired.Inputs) []health.Node {
	if d.wishes.inputs == nil || !sameInputs(d.wishes.inputs, inputs) {
		d.wishes = wishes{list: d.wishes.list, hashes: d.wishes.hashes}
		for _, n := range desired.RealServers(*inputs) {
			d.wishes.nodes = append(d.wishes.nodes, health.Node{Name: n.Name, Addrs: n.Addrs})
		}
	}
	return d.wishes.nodes
}

// wish computes what the inputs ask for, where that may have changed.
func (d *Director) wish(inputs *desired.Inputs) {
	w := &d.wishes
	if w.inputs != nil && maps.Equal(w.dead, inputs.Agreed.Dead) && maps.Equal(w.drained, inputs.Agreed.Drained) {
		return
	}
	w.inputs, w.dead, w.drained = inputs, inputs.Agreed.Dead, inputs.Agreed.Drained
	before, hashes := w.list, w.hashes
	w.list = desired.Wishes(*inputs)
	w.hashes, w.said = make(map[ravel.ServiceKey]uint64, len(w.list)), nil
	for key, list := range w.list {
		if slices.Equal(before[key], list) && len(list) > 0 {
			w.list[key], w.hashes[key] = before[key], hashes[key] // the very same, so that others see that nothing changed
			continue
		}
		w.hashes[key] = roster.Hash(list)
	}
}

// sameInputs reports whether the documents are the very same.
func sameInputs(a, b *desired.Inputs) bool {
	return setdiff.Same(a.Cluster.Services, b.Cluster.Services) && setdiff.Same(a.Cluster.Nodes, b.Cluster.Nodes) &&
		setdiff.Same(a.Cluster.Endpoints, b.Cluster.Endpoints) && setdiff.Same(a.Fleet.Directors, b.Fleet.Directors) &&
		setdiff.Same(a.Fleet.Peers, b.Fleet.Peers) && setdiff.Same(a.Fleet.Pools, b.Fleet.Pools)
}

// probe has the prober look at the nodes, and at some at once.
func (d *Director) probe(nodes []health.Node, hurry []netip.Addr) {
	if d.o.Prober == nil {
		return
	}
	if !d.probing || !setdiff.Same(nodes, d.probed) {
		var targets []health.Target
		for _, n := range nodes {
			for _, addr := range n.Addrs {
				targets = append(targets, d.o.ProbeTarget(addr))
			}
		}
		if err := d.o.Prober.Apply(targets); err != nil {
			d.log.Error("probing", "err", err)
		}
		d.probed, d.probing = nodes, true
	}
	d.o.Prober.Hurry(hurry)
}

// left is whether a director leaves it to others to announce VIPs of a family, because it is wrong: it alone does not reach
// real servers, or has other tables, or old inputs.
type left struct {
	is  bool
	few time.Time // since when too few others announce, though it is; zero is not
}

// look decides, and returns when to look again though nothing changed. A director that is wrong leaves while the others are
// enough: one at least, and half of all live directors. It comes back when they no more are: the first by
// name at once, the next when that did not help for a while, lest all come and go together. One that sees nobody stays as
// it is, for who cannot be heard may well announce.
func (l *left) look(now time.Time, self string, fleet ravel.Fleet, ipv4, wrong bool, while time.Duration) time.Time {
	if !wrong {
		*l = left{}
		return time.Time{}
	}
	live, attract, first := 0, 0, true
	for _, m := range fleet.Live(ravel.Director) {
		live++
		r := fleet.Reports[m.Name]
		switch {
		case m.Name == self || fleet.Drained(m.Name):
		case r.Attracts(ipv4):
			attract++
		case m.Name < self && !r.Dark && r.SessionUp():
			first = false
		}
	}
	switch {
	case attract > 0 && 2*attract >= live:
		*l = left{is: true}
	case !l.is || live <= 1:
		l.few = time.Time{}
	case first || !l.few.IsZero() && now.Sub(l.few) >= while:
		*l = left{}
	case l.few.IsZero():
		l.few = now
		fallthrough
	default:
		return l.few.Add(while)
	}
	return time.Time{}
}

// older is what came of comparing inputs of an earlier process with those of others.
type older struct {
	than   []string  // whose are newer, and differ
	counts bool      // they do so for long enough
	equal  bool      // they did not, once
	since  time.Time // they do; zero is not
}

// look takes whose inputs are newer and differ, and returns when to look again though nothing changed. Until it was once
// seen that nobody's do, a difference counts at once; later it must last, for news reach one director before another.
func (o *older) look(now time.Time, than []string, lasts time.Duration) time.Time {
	if len(than) == 0 {
		*o = older{equal: true}
		return time.Time{}
	}
	if o.since.IsZero() {
		o.since = now
	}
	o.than, o.counts = than, o.counts || !o.equal || now.Sub(o.since) >= lasts
	if o.counts {
		return time.Time{}
	}
	return o.since.Add(lasts)
}

// newer names the live directors whose inputs are newer than ours, which are unheard, and differ: those that hear the source,
// or went on with more of what it told. Who says nothing of services may not know any yet.
func (d *Director) newer(unheard uint64, fleet ravel.Fleet) (names []string) {
	for _, m := range fleet.Live(ravel.Director) {
		r := fleet.Reports[m.Name]
		if m.Name == d.o.Self || len(r.Services) == 0 || r.Unheard > 0 && r.Unheard <= unheard {
			continue
		}
		differs := len(r.Services) != len(d.wishes.hashes)
		for key, hash := range d.wishes.hashes {
			differs = differs || r.Services[key].Wish != hash
		}
		if differs {
			names = append(names, m.Name)
		}
	}
	return names
}

// services are what this director says of each service.
func (d *Director) services(back digests) map[ravel.ServiceKey]ravel.ServiceReport {
	w := &d.wishes
	if w.said != nil && sameMap(w.back, back.services) {
		return w.said
	}
	w.back, w.said = back.services, make(map[ravel.ServiceKey]ravel.ServiceReport, len(w.list))
	for key := range w.list {
		r := back.services[key]
		r.Wish = w.hashes[key]
		w.said[key] = r
	}
	return w.said
}

// seed tells the fleet of the services that only our kernel knows, in the order of trust: the fleet's roster; else our
// own saved one, if it fits the kernel's list; else that list.
func (d *Director) seed(now time.Time, fleet ravel.Fleet) {
	for _, s := range d.kept {
		if len(fleet.Rosters[s.Key]) > 0 {
			continue
		}
		saved := d.saver.saved.roster(s.Key)
		r := roster.Seed(d.o.Self, s.RealServers, d.wishes.list[s.Key], saved)
		if roster.Fits(saved, s.RealServers) {
			r = saved
		}
		if len(r) > 0 {
			d.write(now, s.Key, r)
		}
	}
}

// restore gives the fleet what an operator had set before this process began, with the stamps of then, and returns what
// is set now.
func (d *Director) restore(registers map[string]ravel.Register) map[string]ravel.Register {
	now := maps.Clone(registers)
	if now == nil {
		now = map[string]ravel.Register{}
	}
	for name, r := range d.saver.saved.Registers {
		if is, set := now[name]; !set || r.Stamp > is.Stamp {
			d.o.Fleet.RestoreRegister(name, r)
			now[name] = r
		}
	}
	return now
}

// write gives entries to the fleet, and remembers them until they come back.
func (d *Director) write(now time.Time, key ravel.ServiceKey, entries []ravel.RosterEntry) {
	d.o.Fleet.Write(key, entries)
	d.pending[key] = append(d.pending[key], entries...)
	d.wrote[key] = now
	for _, e := range entries {
		d.log.Debug("roster", "service", key.String(), "entry", fmt.Sprintf("%+v", e))
	}
	d.metrics.writes.Add(float64(len(entries)))
}

// catchUp forgets what has come back, or what came in its place: of two entries with equal stamps gossip has chosen one, by
// an order of its own. What does not come back at all was refused by it, and is what nobody else goes by.
func (d *Director) catchUp(now time.Time, fleet ravel.Fleet) {
	for key, entries := range d.pending {
		entries = slices.DeleteFunc(entries, func(e ravel.RosterEntry) bool {
			there, known := fleet.Rosters[key].Find(e.Addr)
			return known && cmp.Or(cmp.Compare(there.Birth, e.Birth), cmp.Compare(there.Rev, e.Rev)) >= 0
		})
		if len(entries) > 0 && now.Sub(d.wrote[key]) > comesBack {
			d.log.Warn("gossip did not take entries of a roster", "service", key.String(), "entries", len(entries))
			entries = nil
		}
		if d.pending[key] = entries; len(entries) == 0 {
			delete(d.pending, key)
			delete(d.wrote, key)
		}
	}
}

// comesBack is how soon after it was written an entry is among the fleet's rosters, and far longer than that takes.
const comesBack = 10 * time.Second

// overlay are the rosters with what was written and has not come back yet.
func (d *Director) overlay(rosters map[ravel.ServiceKey]ravel.Roster) map[ravel.ServiceKey]ravel.Roster {
	if len(d.pending) == 0 {
		return rosters
	}
	rosters = maps.Clone(rosters)
	if rosters == nil {
		rosters = map[ravel.ServiceKey]ravel.Roster{}
	}
	for key, entries := range d.pending {
		rosters[key] = roster.Merge(rosters[key], entries...)
	}
	return rosters
}
