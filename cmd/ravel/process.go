package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"github.com/ravel-lb/ravel"
	"github.com/ravel-lb/ravel/gossip"
	"github.com/ravel-lb/ravel/internal/admin"
	"github.com/ravel-lb/ravel/internal/agree"
	"github.com/ravel-lb/ravel/internal/cni"
	"github.com/ravel-lb/ravel/internal/config"
	"github.com/ravel-lb/ravel/internal/desired"
	"github.com/ravel-lb/ravel/internal/guard"
	"github.com/ravel-lb/ravel/internal/hold"
	"github.com/ravel-lb/ravel/internal/ifaddr"
	"github.com/ravel-lb/ravel/internal/iptables"
	"github.com/ravel-lb/ravel/internal/kube"
	"github.com/ravel-lb/ravel/internal/latest"
	"github.com/ravel-lb/ravel/internal/node"
	"github.com/ravel-lb/ravel/internal/regular"
	"github.com/ravel-lb/ravel/internal/sysctl"
	"github.com/ravel-lb/ravel/internal/systemd"
)

// process is what both roles are made of.
type process struct {
	settings values
	role     ravel.Role
	registry *prometheus.Registry
	sysctl   *sysctl.Setter
	file     *config.File // nil where a cluster has all documents
	cluster  *kube.Source // nil where a static file has them
	manager  *systemd.Manager
	server   *admin.Server
	gossip   *gossip.Gossip
	gate     *hold.Gate
	decision latest.Value[hold.Decision]  // which documents are in force
	unkept   atomic.Pointer[error]        // why those could not be kept for a later process
	inputs   latest.Value[desired.Inputs] // what those say
	computed latest.Value[computed]
	state    latest.Value[ravel.State]

	keepAfter time.Time // of read: the documents in force are not tried to be kept before

	learn   func(desired.Fleet)    // of a director: is told each fleet of the document before its state is applied
	trouble func() []ravel.Problem // of a director
	other   []ravel.Problem        // what a run of the other role left, and could not be removed
	refused func() []ravel.Problem // of a director: why it does nothing

	v4, v6 *iptables.Tables // v6 is nil on a host without IPv6
	guard  *guard.Guard
	links  *ifaddr.Links

	plugins cni.Watcher // of a realserver
}

// computed is what the newest document and the fleet came to.
type computed struct {
	inputs   desired.Inputs
	state    ravel.State
	problems []ravel.Problem
	result   agree.Result
}

func newProcess(ctx context.Context, s values, role ravel.Role) (*process, error) {
	p := &process{settings: s, role: role, registry: prometheus.NewRegistry(), sysctl: hostSettings()}
	b := buildInfo()
	info := prometheus.NewGauge(prometheus.GaugeOpts{
		Name: "ravel_build_info", Help: "Which ravel this is; always 1.",
		ConstLabels: prometheus.Labels{"version": b.Version, "revision": b.Revision, "go": b.Go, "role": role.String()},
	})
	info.Set(1)
	p.registry.MustRegister(info, collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	var err error
	if p.manager, err = systemd.Open(); err != nil {
		s.log.Warn("nothing is told to the service manager", "err", err)
	}
	if err := p.follow(); err != nil {
		return nil, err
	}
	p.gate = p.newGate()

	// What others have taken already is found out before anything is touched.
	p.server = &admin.Server{Log: s.log.With("component", "admin"), Socket: s.socket, Listen: s.listen, Gatherer: p.registry}
	if err := p.server.Open(ctx); err != nil {
		return nil, listenFault("listen", s.listen, err)
	}
	if err := s.laterPorts(); err != nil {
		return nil, errors.Join(err, p.server.Close())
	}
	if s.variant != "auto" && role == ravel.Realserver { // whose redirects are NAT; auto looks by itself
		if err := iptables.Usable(ctx, iptables.Variant(s.variant)); err != nil {
			return nil, errors.Join(err, p.server.Close())
		}
	}
	if p.v4, p.v6, err = openTables(ctx, s); err != nil {
		return nil, errors.Join(err, p.server.Close())
	}
	s.gossip.Registerer = p.registry
	if p.gossip, err = gossip.New(s.gossip); err == nil {
		if err = p.gossip.Open(); err != nil {
			err = listenFault("gossip-listen", s.gossip.Bind.String(), err)
		}
	}
	if err != nil {
		return nil, errors.Join(err, p.server.Close())
	}
	p.guard = guard.New(guard.Options{
		Log: s.log, Registerer: p.registry, Tables: bothTables(p.v4, p.v6), Enabled: s.guard, Untrack: role == ravel.Director,
	})
	p.links = ifaddr.New(ifaddr.Options{Log: s.log, Registerer: p.registry, Sysctl: p.sysctl, Link: s.link, Blackhole: s.blackhole})
	return p, nil
}

// close ends what newProcess began. What the kernel holds stays.
func (p *process) close() error {
	return errors.Join(p.links.Close(), p.gossip.Close(), p.server.Close())
}

// openTables opens the iptables that the node uses. A host without IPv6 has none of that family.
func openTables(ctx context.Context, s values) (v4, v6 *iptables.Tables, err error) {
	variant := iptables.Variant(s.variant)
	if s.variant == "auto" {
		if variant, err = detectIPTables(ctx); err != nil {
			return nil, nil, err
		}
	}
	if v4, err = iptables.Open(variant, iptables.V4); err != nil {
		return nil, nil, err
	}
	if _, err := os.Stat("/proc/net/if_inet6"); err != nil {
		return v4, nil, nil
	}
	v6, err = iptables.Open(variant, iptables.V6)
	return v4, v6, err
}

// variantNote is where a preflight with all rights notes which iptables it found that this kernel can do.
const variantNote = runDir + "/iptables"

// detectIPTables finds which iptables the node uses. Who may not try in a network namespace of its own which of them the
// kernel can do, as in a container, goes by what the preflight found.
func detectIPTables(ctx context.Context) (iptables.Variant, error) {
	if may, err := hasCapability(unix.CAP_SYS_ADMIN); err == nil && !may {
		b, err := regular.Read(variantNote)
		if v := iptables.Variant(b); err == nil && (v == iptables.NFT || v == iptables.Legacy) {
			return v, nil
		}
	}
	return iptables.Detect(ctx)
}

func bothTables(v4, v6 *iptables.Tables) []*iptables.Tables {
	return slices.DeleteFunc([]*iptables.Tables{v4, v6}, func(t *iptables.Tables) bool { return t == nil })
}

// lastGood is the file in which a role keeps the last good static file, or nothing where none is to be kept.
func lastGood(stateDir string, role ravel.Role) string {
	if stateDir == "" {
		return ""
	}
	return filepath.Join(stateDir, "last-good-"+role.String()+".yaml")
}

// lock keeps a second ravel, of whichever role, out of this host's kernel. The lock goes with the process; cleanup
// removes its file while it holds it.
func lock(path, role string) (release func(), err error) {
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return nil, fmt.Errorf("making the lock's directory: %w", err)
	}
	// Who may write to the directory must not lead us elsewhere: we truncate it.
	f, err := regular.Open(path, os.O_RDWR|os.O_CREATE)
	if err != nil {
		return nil, fmt.Errorf("opening the lock: %w", err)
	}
	if err := syscall.Flock(int(f.Fd()), syscall.LOCK_EX|syscall.LOCK_NB); err != nil {
		holder, _ := regular.Read(path)
		return nil, errors.Join(fmt.Errorf("another ravel runs here: %s; a director and a realserver cannot share a network namespace, "+
			"because the redirect would take every packet before IPVS sees it; stop that one first, or run this one on another host", holder), f.Close())
	}
	ours, err := f.Stat()
	if err == nil {
		if now, gone := os.Stat(path); gone != nil || !os.SameFile(now, ours) {
			// A cleanup removed it between our opening and our locking it.
			return nil, errors.Join(errors.New("another ravel just left this host; try again"), f.Close())
		}
		err = f.Truncate(0)
	}
	if err == nil {
		_, err = fmt.Fprintf(f, "%s, process %d", role, os.Getpid())
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("writing the lock: %w", err), f.Close())
	}
	return func() { _ = f.Close() }, nil
}

// read decides of all new documents whether they are in force, and turns those that are into inputs, until ctx ends.
func (p *process) read(ctx context.Context) error {
	for {
		file, cluster := p.documentsChanged()
		heard := p.gossip.Changed()
		var again <-chan time.Time
		if documents, known := p.documents(); known {
			if at := p.offer(documents); !at.IsZero() {
				again = time.After(time.Until(at))
			}
		}
		select {
		case <-ctx.Done():
			return nil
		case <-file:
		case <-cluster:
		case <-heard: // an operator may have accepted what is held
		case <-again:
		}
	}
}

// take gives what the documents and the fleet came to to the loop, until ctx ends.
func (p *process) take(ctx context.Context, results *latest.Value[agree.Result]) error {
	listed := false // ever
	for {
		changed := results.Changed()
		if r, known := results.Latest(); known {
			before, _ := p.computed.Latest()
			if p.learn != nil {
				p.learn(r.Inputs.Fleet)
			}
			p.computed.Set(computed{inputs: r.Inputs, state: r.State, problems: r.Problems, result: r})
			// A realserver under a name that nobody knows was likely started with the wrong one. That is not the same as
			// wanting nothing: what the kernel holds stays. A node that leaves the list later is to let go.
			if listed = listed || p.role != ravel.Realserver || r.Inputs.Listed(); listed {
				if was, any := p.state.Latest(); !any || !same(was, r.State) {
					p.state.Set(r.State)
				}
			}
			node.LogNew(p.settings.log, before.problems, r.Problems)
		}
		select {
		case <-ctx.Done():
			return nil
		case <-changed:
		}
	}
}

// same reports whether two states are equal.
func same(a, b ravel.State) bool { return reflect.DeepEqual(a, b) }

// problems are those of this process itself.
func (p *process) problems() []ravel.Problem {
	problems := append(p.documentProblems(), p.heldProblems()...)
	problems = append(problems, p.gossip.Problems()...)
	problems = append(problems, p.other...)
	if p.role == ravel.Realserver {
		problems = append(problems, p.plugins.Problems(context.Background())...)
	}
	if p.trouble != nil {
		problems = append(problems, p.trouble()...)
	}
	return problems
}

// agreeing is what ties a process to its fleet.
type agreeing interface {
	Run(context.Context) error
	Results() *latest.Value[agree.Result]
}

// answerProbes lets directors ask for the health of a realserver until longer ends: from the first walk on that ended
// well, because who answers before that has no redirects.
func (p *process) answerProbes(ctx, longer context.Context, n *node.Node) error {
	for {
		changed := n.Reports().Changed()
		if report, any := n.Reports().Latest(); any && report.Err == nil {
			break
		}
		select {
		case <-ctx.Done():
			return nil
		case <-changed:
		}
	}
	listener, err := (&net.ListenConfig{}).Listen(longer, "tcp", p.settings.health.String())
	if err != nil {
		return listenFault("health-listen", p.settings.health.String(), fmt.Errorf("listening for probes: %w", err))
	}
	return admin.ServeHealth(longer, listener, p.server.Healthy)
}

// join takes part in gossip until longer ends. It begins when the document has told where the other directors are: who
// knows of nobody would think itself alone. Where there are seeds besides, it does not wait for long.
func (p *process) join(ctx, longer context.Context) error {
	changed := p.inputs.Changed()
	if _, known := p.inputs.Latest(); !known {
		var enough <-chan time.Time
		if len(p.settings.gossip.Seeds) > 0 || p.settings.gossip.SeedsFile != "" {
			enough = time.After(p.settings.gossip.Settle)
		}
		select {
		case <-ctx.Done():
			return nil
		case <-changed:
		case <-enough:
		}
	}
	if inputs, known := p.inputs.Latest(); known {
		p.gossip.SetSeeds(agree.Seeds(inputs, p.settings.gossip.Bind.Port()))
	}
	return p.gossip.Run(longer)
}

// leaveWithin bounds the goodbye.
const leaveWithin = 2 * time.Second

// startsWithin bounds what a service manager sees as the start. A process that waits for its documents, or for an API
// server, does what it can: to kill it for that would help nobody.
const startsWithin = 20 * time.Second

// statusLine is what a service manager shows of a process.
func statusLine(role ravel.Role, report node.Report, notReady error) string {
	served := map[netip.Addr]bool{}
	for _, key := range report.Held {
		served[key.VIP] = true
	}
	line := fmt.Sprintf("serves %d VIPs", len(served))
	if role == ravel.Director {
		line += fmt.Sprintf(", announces %d", len(report.Announced))
	}
	if notReady != nil {
		line += "; not ready: " + notReady.Error()
	}
	return line
}

// run runs the process until ctx ends or a part of it cannot go on.
func (p *process) run(ctx context.Context, n *node.Node, agreeing agreeing, queries map[string]admin.Query, ready func() error) error {
	started := time.Now()
	queries["check"] = p.check(n)
	p.server.Queries = queries
	p.server.Healthy = func() error {
		// The loop walks at least once a resync, once it knows a state.
		report, any := n.Reports().Latest()
		if _, known := p.state.Latest(); !known {
			return nil
		}
		last := report.At
		if !any {
			last = started
		}
		if age := time.Since(last); age > 2*p.settings.resync+time.Minute {
			return fmt.Errorf("the last walk through the appliers ended %s ago", span(age))
		}
		return nil
	}
	p.server.Ready = func() error {
		report, any := n.Reports().Latest()
		fleet, _ := p.gossip.Latest()
		switch {
		case !any && p.refused != nil && len(p.refused()) > 0:
			return errors.New(p.refused()[0].String())
		case !any:
			return errors.New("nothing is applied yet")
		case !fleet.Settled:
			return errNotSettled
		case report.Err != nil:
			return report.Err
		}
		return ready()
	}
	// The socket outlives the others, so that an operator can watch a planned stop.
	// So does gossip, which says goodbye last.
	longer, end := context.WithCancel(context.WithoutCancel(ctx))
	defer end()
	planned := ctx.Done()
	group, ctx := errgroup.WithContext(ctx)
	group.Go(func() error { return p.server.Run(longer) })
	group.Go(func() error {
		p.manager.Run(longer, planned, systemd.Process{
			Log: p.settings.log.With("component", "systemd"), Healthy: p.server.Healthy, ReadyWithin: startsWithin,
			Status: func() (string, bool) {
				report, any := n.Reports().Latest()
				return statusLine(p.role, report, p.server.Ready()), any && report.Err == nil
			},
		})
		return nil
	})
	group.Go(func() error { return p.join(ctx, longer) })
	if p.settings.health.IsValid() {
		group.Go(func() error { return p.answerProbes(ctx, longer, n) })
	}
	work, ctx := errgroup.WithContext(ctx)
	work.Go(func() error { return p.runDocuments(ctx) })
	work.Go(func() error { return p.read(ctx) })
	work.Go(func() error { return agreeing.Run(ctx) })
	work.Go(func() error { return p.take(ctx, agreeing.Results()) })
	work.Go(func() error { return n.Run(ctx) })
	group.Go(func() error {
		defer end()
		err := work.Wait()
		// An agent that stops is expected back: its node goes on without it.
		goodbye, cancel := context.WithTimeout(longer, leaveWithin)
		defer cancel()
		if left := p.gossip.Leave(goodbye, p.role == ravel.Realserver && !p.settings.cleanupOnExit); left != nil {
			p.settings.log.Warn("saying goodbye to the fleet", "err", left)
		}
		return err
	})
	p.settings.log.Info("ravel started", "role", p.role, "node", p.settings.node, "version", version)
	err := group.Wait()
	p.settings.log.Info("ravel stopped", "err", err)
	return err
}

// end follows a run: with --cleanup-on-exit a planned stop leaves nothing behind, also where the stop itself had a
// fault. A process that ends by itself is started again, and leaves the kernel to serve on.
func (p *process) end(ctx context.Context, stopped error, cleanup func(context.Context) ([]string, error)) error {
	if !p.settings.cleanupOnExit || ctx.Err() == nil {
		return stopped
	}
	done, err := cleanup(context.WithoutCancel(ctx))
	for _, line := range done {
		p.settings.log.Info("removed", "what", line)
	}
	return errors.Join(stopped, err)
}
