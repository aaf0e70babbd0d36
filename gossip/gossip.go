// Package gossip makes the processes of a fleet known to each other, and spreads what they say and what they agree on.
// Whatever way the news takes, members that heard of the same things hold the same; only its author changes what is
// said of itself; and nothing that comes from the network stops a process. FORMAT.md is the wire format.
package gossip

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"net"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/hashicorp/memberlist"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/ravel-lb/ravel"
	"github.com/ravel-lb/ravel/internal/latest"
)

// DefaultPort is the UDP and TCP port where members gossip.
const DefaultPort = 7946

// Config says who a member is and where it finds the others.
type Config struct {
	Log        *slog.Logger          // nil logs nothing
	Registerer prometheus.Registerer // nil has no metrics

	Name    string // of the director or node, no other member's; 1 to 128 bytes
	Role    ravel.Role
	Version string // of the program, for people
	// Addrs are the node's addresses, by which directors name it as a real server; 16 at most.
	Addrs []netip.Addr
	// Fleet is the fleet's name, 1 to 128 bytes. Members of differently named fleets do not hear each other.
	Fleet string
	// Bind is where UDP and TCP listen; the zero value is [::]:7946. Port 0 is 7946 too.
	Bind netip.AddrPort
	// Advertise is where others reach us. The zero value is Bind or, where that is unspecified, the first of Addrs.
	Advertise netip.AddrPort
	// KeyFile holds the fleet's keys: one in base64 per line, the first one encrypts. It is read again when it changes.
	KeyFile string
	// Insecure sends and takes everything in the clear. Exactly one of KeyFile and Insecure is to be set.
	Insecure bool
	Preset   Preset // LAN unless set
	// Seeds are members to join: addresses or names of hosts, each with a port or not.
	Seeds []string
	// SeedsFile holds more of them, one per line; it is read again before each try.
	SeedsFile string
	// Settle is how long to wait at most to hear from everybody; 10 s unless set.
	Settle time.Duration
	// Transport is for tests: what carries packets and streams instead of Bind. gossiptest makes one.
	Transport memberlist.Transport
	// MaxCells is the number of facts that are held at most; a million unless set.
	MaxCells int
}

// Gossip is this process as a member of the fleet. Its methods are safe for use by many goroutines.
type Gossip struct {
	config  Config
	timing  timing
	log     *slog.Logger
	keys    *keyring // nil if insecure
	metrics *metrics
	list    atomic.Pointer[memberlist.Memberlist] // nil unless Run runs
	fleet   latest.Value[ravel.Fleet]
	inbox   chan []byte
	inBytes atomic.Int64
	kick    chan struct{}       // there is something to send or to publish
	rejoin  chan struct{}       // there are new seeds
	pull    chan netip.AddrPort // a member that knows other members than we do
	tokens  tokens              // of streams
	sending sync.WaitGroup      // streams and joins
	running atomic.Bool
	renew   chan struct{} // our addresses changed
	ipv6    func() bool   // the host has IPv6
	lookup  lookupFunc

	opening   sync.Mutex           // guards the two fields below
	transport memberlist.Transport // nil unless open
	closed    bool

	newer string                   // fields that a test adds to our meta data, as a newer release would
	tune  func(*memberlist.Config) // for tests; nil changes nothing

	mu        sync.Mutex // guards the fields below
	store     *store
	view      view
	members   map[string]*member // this process included
	directors map[string]*member // those of them that are directors
	byAddr    map[netip.Addr]map[string]*member
	phase     phase
	said      map[cellName]string  // what our cells say, once published
	unsaid    map[cellName]outcome // what they should say and were refused
	report    *ravel.Report        // the last that was given; nil before
	published bool                 // our cells are out
	version   uint64               // of our last cell
	seq       uint64               // of our last delta
	pulled    time.Time            // when we last compared members with another
	sum       uint64               // of all live members, if sumKnown
	sumKnown  bool
	sweptAt   time.Time
	toSend    map[string]*member // those with something pending
	flying    map[string]*member // those with something that is not acknowledged
	toSync    map[string]time.Time
	flushAt   time.Time // when the next flush is due; zero if none is
	shownAt   time.Time // when the last Fleet was made
	changed   bool      // the Fleet is not the newest
	others    bool      // among what changed are members
	shown     []ravel.Member
	seeds     []string     // by SetSeeds
	addrs     []netip.Addr // by SetAddrs
	settle    settling
	conflicts map[string]conflict
	known     map[string]place             // where members were last, those who left for good excepted
	trying    map[netip.AddrPort]struct{}  // addresses that we are joining
	reached   map[netip.AddrPort]time.Time // those where somebody answered
	problems  map[string]ravel.Problem     // by what they are about
	strangers map[string]time.Time         // authors that are no members, since when
	revival   revival
	refused   ravel.Problem // the last fact of ours that was refused
	refusedAt time.Time

	unreadMu sync.Mutex // guards the field below; memberlist's log is written with locks of its own held
	unread   unreadable
}

const (
	flushDelay  = 10 * time.Millisecond // what happens within it goes out together
	showDelay   = 20 * time.Millisecond // no more Fleets than one in this time
	memberDelay = 50 * time.Microsecond // and in this for each member, if it is members that changed
	remember    = 10 * time.Minute      // how long members that are gone, and what they said, are kept
	maxInbox    = 1024                  // messages that wait to be read
	maxInBytes  = 64 << 20              // and their bytes
	maxKnown    = 4096                  // places of members that were
	exchangesAt = 8                     // exchanges that are begun at once
)

// New checks the settings and reads the key file. Nothing is open before Open, and nobody is told before Run.
func New(c Config) (*Gossip, error) {
	c.Settle = cmp.Or(c.Settle, 10*time.Second)
	c.MaxCells = cmp.Or(c.MaxCells, 1_000_000)
	if c.Log == nil {
		c.Log = slog.New(slog.DiscardHandler)
	}
	t, err := c.Preset.timing()
	if err != nil {
		return nil, err
	}
	if err := c.check(); err != nil {
		return nil, err
	}
	g := &Gossip{
		config: c, timing: t, log: c.Log.With("component", "gossip"),
		inbox: make(chan []byte, maxInbox), kick: make(chan struct{}, 1), rejoin: make(chan struct{}, 1),
		pull:   make(chan netip.AddrPort, 1),
		tokens: newTokens(),
		renew:  make(chan struct{}, 1), ipv6: hasIPv6, lookup: net.DefaultResolver.LookupNetIP,
		store:   newStore(c.MaxCells, c.Role == ravel.Director),
		members: map[string]*member{}, directors: map[string]*member{}, byAddr: map[netip.Addr]map[string]*member{}, phase: up,
		toSend: map[string]*member{}, flying: map[string]*member{}, toSync: map[string]time.Time{},
		conflicts: map[string]conflict{}, known: map[string]place{}, problems: map[string]ravel.Problem{},
		strangers: map[string]time.Time{}, unread: unreadable{},
		unsaid: map[cellName]outcome{}, trying: map[netip.AddrPort]struct{}{}, reached: map[netip.AddrPort]time.Time{},
	}
	g.store.trusting = true
	g.settle.told = len(c.Seeds) > 0 || c.SeedsFile != ""
	g.view = newView(c.Name)
	if _, err := marshalMeta(g.meta()); err != nil {
		return nil, fmt.Errorf("gossip: addresses: %w", err)
	}
	if !c.Insecure {
		if g.keys, err = openKeys(c.KeyFile); err != nil {
			return nil, fmt.Errorf("reading the gossip key: %w; put the fleet's key there, the same for all members (ravel gossip-key prints a new one)", err)
		}
	}
	g.metrics = newMetrics(g)
	if c.Registerer != nil {
		if err := g.metrics.register(c.Registerer); err != nil {
			return nil, fmt.Errorf("registering the metrics of gossip: %w", err)
		}
	}
	return g, nil
}

func (c *Config) check() error {
	if c.Name == "" || len(c.Name) > maxName || strings.ContainsAny(c.Name, "/ \n") {
		return fmt.Errorf("gossip: name %q: want 1 to %d bytes without space or slash", c.Name, maxName)
	}
	if c.Fleet == "" || len(c.Fleet) > maxName {
		return fmt.Errorf("gossip: name of the fleet %q: want 1 to %d bytes", c.Fleet, maxName)
	}
	if len(c.Addrs) > maxAddrs {
		return fmt.Errorf("gossip: %d addresses: want %d at most", len(c.Addrs), maxAddrs)
	}
	for _, a := range c.Addrs {
		if !plain(a) {
			return fmt.Errorf("gossip: address %s: want IPv4 or IPv6 without a zone", a)
		}
	}
	switch {
	case c.KeyFile == "" && !c.Insecure:
		return errors.New("gossip: no key: make one with ravel gossip-key, give all members of the fleet the same file " +
			"with --gossip-key-file, or say --gossip-insecure")
	case c.KeyFile != "" && c.Insecure:
		return errors.New("gossip: a key file and insecure at once: want one of them")
	}
	if !c.Bind.IsValid() {
		c.Bind = netip.AddrPortFrom(netip.IPv6Unspecified(), DefaultPort)
	}
	if c.Bind.Port() == 0 {
		c.Bind = netip.AddrPortFrom(c.Bind.Addr(), DefaultPort)
	}
	if !c.Advertise.IsValid() {
		c.Advertise = c.Bind
	}
	c.Advertise = netip.AddrPortFrom(c.Advertise.Addr().Unmap(), c.Advertise.Port())
	if c.Advertise.Addr().IsUnspecified() {
		if len(c.Addrs) == 0 {
			return errors.New("gossip: listening on every address, and no default route tells which is an address to advertise: set --gossip-advertise")
		}
		c.Advertise = netip.AddrPortFrom(c.Addrs[0], c.Advertise.Port())
	}
	if c.Advertise.Port() == 0 {
		c.Advertise = netip.AddrPortFrom(c.Advertise.Addr(), c.Bind.Port())
	}
	return nil
}

// Run takes part in the fleet until ctx ends. It says no goodbye: that is Leave's. An error means that it cannot
// listen. It is called once.
func (g *Gossip) Run(ctx context.Context) error {
	if !g.running.CompareAndSwap(false, true) {
		return errors.New("gossip: Run or Close was called before")
	}
	if err := g.Open(); err != nil {
		return err
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	defer g.sending.Wait()
	g.mu.Lock()
	g.settle.begin(time.Now(), g.timing)
	g.changed = true
	g.mu.Unlock()
	m, err := memberlist.Create(g.memberlistConfig())
	if err != nil {
		return errors.Join(fmt.Errorf("gossiping on %s: %w", g.config.Bind, err), shut(g.transport))
	}
	g.list.Store(m)
	defer func() {
		g.list.Store(nil)
		if err := m.Shutdown(); err != nil {
			g.log.Warn("closing gossip", "err", err)
		}
	}()
	var running sync.WaitGroup
	defer running.Wait()
	running.Go(func() { g.join(ctx, m) })
	running.Go(func() { g.renewing(ctx, m) })
	g.loop(ctx)
	cancel()
	return nil
}

func (g *Gossip) memberlistConfig() *memberlist.Config {
	c := memberlist.DefaultLANConfig()
	c.Name, c.Label, c.Transport = g.config.Name, g.config.Fleet, g.transport
	c.BindAddr, c.BindPort = g.listenOn().String(), int(g.config.Bind.Port())
	c.AdvertiseAddr, c.AdvertisePort = g.config.Advertise.Addr().String(), int(g.config.Advertise.Port())
	c.ProtocolVersion = memberlist.ProtocolVersionMax
	c.TCPTimeout = g.timing.stream
	c.ProbeInterval, c.ProbeTimeout = g.timing.probe, g.timing.timeout
	c.GossipInterval = g.timing.gossip
	c.PushPullInterval = g.timing.pushPull
	c.SuspicionMult, c.SuspicionMaxTimeoutMult, c.AwarenessMaxMultiplier = suspicionMult, 1, 1
	c.RetransmitMult = 4
	c.EnableCompression = false // most of what goes is small
	// A name whose owner is dead is free at once: where a node comes back with another address, waiting longer keeps it
	// out and protects nobody, for a dead owner that comes back finds the conflict and tells of it.
	c.DeadNodeReclaimTime = time.Millisecond
	c.Delegate, c.Events, c.Conflict, c.Alive, c.Ping = delegate{g}, delegate{g}, delegate{g}, delegate{g}, delegate{g}
	c.Logger = newLogger(g)
	if g.keys != nil {
		c.Keyring = g.keys.ring
	}
	if g.tune != nil {
		g.tune(c)
	}
	return c
}

// loop reads what arrives and sends what is due.
func (g *Gossip) loop(ctx context.Context) {
	exchange := time.NewTimer(jitter(g.timing.exchange))
	defer exchange.Stop()
	settle := time.NewTicker(50 * time.Millisecond)
	defer settle.Stop()
	flush := time.NewTimer(0)
	defer flush.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case b := <-g.inbox:
			g.inBytes.Add(-int64(len(b)))
			g.send(g.handle(b))
		case <-g.kick:
			g.mu.Lock()
			due := g.flushAt
			g.mu.Unlock()
			if !due.IsZero() {
				flush.Reset(time.Until(due))
			}
		case <-flush.C:
			g.send(g.flush(time.Now()))
		case <-settle.C:
			if g.trySettle(time.Now()) {
				settle.Stop()
			}
		case <-exchange.C:
			exchange.Reset(jitter(g.timing.exchange))
			g.send(g.tick(time.Now()))
		}
	}
}

// jitter is d, give or take a fifth.
func jitter(d time.Duration) time.Duration { return d*4/5 + rand.N(d*2/5) }

// soonLocked has the loop flush before long.
func (g *Gossip) soonLocked() { g.dueLocked(time.Now().Add(flushDelay)) }

func (g *Gossip) dueLocked(at time.Time) {
	if !g.flushAt.IsZero() && !at.Before(g.flushAt) {
		return
	}
	g.flushAt = at
	select {
	case g.kick <- struct{}{}:
	default:
	}
}

// Latest returns the newest Fleet, and false before Run.
func (g *Gossip) Latest() (ravel.Fleet, bool) { return g.fleet.Latest() }

// Changed returns a channel that is closed when there is a newer Fleet.
func (g *Gossip) Changed() <-chan struct{} { return g.fleet.Changed() }

// Write merges entries into the fleet's roster of a service, and spreads those that are news. Entries that are older
// than what is known change nothing. Those that cannot travel (no address, a weight beyond 65535), and those that do not
// rise above what was forgotten, are left out, logged and counted.
func (g *Gossip) Write(k ravel.ServiceKey, entries []ravel.RosterEntry) {
	var why string
	refused := 0
	service := serviceName(k)
	g.mu.Lock()
	defer g.mu.Unlock()
	for _, e := range entries {
		travels := plain(k.VIP) && plain(e.Addr) && e.Weight >= 0 && e.Weight <= 65535 &&
			eachField([]byte(e.Unknown), func(field) bool { return true })
		if !travels {
			g.metrics.drop("invalid")
			refused, why = refused+1, "invalid"
			continue
		}
		if o := g.writeLocked(entryCell(service, e)); o.refused() {
			refused, why = refused+1, outcomes[o]
		}
	}
	if refused > 0 {
		g.log.Warn("entries of a roster were not taken", "service", k, "entries", refused, "why", why)
	}
}

// writeLocked merges a cell of ours or the fleet's, and has it sent to those concerned if it is news.
func (g *Gossip) writeLocked(c *cell) outcome {
	o := g.store.merge(c)
	switch {
	case o == taken:
		g.spreadLocked(c.key)
		g.changed = true
		g.soonLocked()
	case o.refused():
		g.metrics.drop(outcomes[o])
		if c.author == "" {
			g.refused = ravel.Problem{Where: "gossip", What: fmt.Sprintf("a fact of topic %d was not spread: %s", c.topic, outcomes[o])}
			g.refusedAt = time.Now()
		}
	}
	return o
}

// SetRegister sets one of the fleet's settings; an empty value is as if it was never set.
func (g *Gossip) SetRegister(name, value string) error {
	if len(name) > maxKey || len(value) > maxValue/2 {
		return fmt.Errorf("register %q: longer than can travel", name)
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	var stamp uint64
	if c := g.store.cells[key{topicRegister, "", name}]; c != nil {
		stamp = c.hi
	}
	o := g.writeLocked(registerCell(name, ravel.Register{Stamp: stamp + 1, Value: value, By: g.config.Name}))
	if o != taken {
		return fmt.Errorf("register %q: not taken: %s", name, outcomes[o])
	}
	return nil
}

// RestoreRegister merges a setting of the fleet with its own stamp, as an earlier life saved it: it counts unless the fleet
// knows a newer one.
func (g *Gossip) RestoreRegister(name string, r ravel.Register) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.writeLocked(registerCell(name, r))
}

// Forget drops what a roster says of real servers that are gone (ravel.Gone); others are left alone. Only this process
// forgets; for three hours it does not take the same from those who did not yet.
func (g *Gossip) Forget(k ravel.ServiceKey, addrs []netip.Addr) {
	if !plain(k.VIP) {
		return
	}
	service := serviceName(k)
	g.mu.Lock()
	defer g.mu.Unlock()
	for _, a := range addrs {
		c := g.store.cells[key{topicRoster, "", service + addrName(a)}]
		if c == nil {
			continue
		}
		if _, e, ok := parseEntry(c); ok && e.State == ravel.Gone {
			g.store.bury(c, time.Now().Add(buryFor))
			g.changed = true
			g.soonLocked()
		}
	}
}

// SetSeeds replaces the seeds that were set by it before; those of the settings stay. Each is an address or a name of a
// host, with a port or without. Where the settings have none this process does not settle before it was called once, be
// it with none, or the time for it is over.
func (g *Gossip) SetSeeds(seeds []string) {
	g.mu.Lock()
	if !g.settle.told || !slices.Equal(g.seeds, seeds) {
		g.settle.begun = time.Time{}
	}
	g.settle.told = true
	g.settle.asked++
	g.seeds = slices.Clone(seeds)
	g.mu.Unlock()
	select {
	case g.rejoin <- struct{}{}:
	default:
	}
}

// SetAddrs says by which addresses the document names this node; they come before those of the settings where 16 are too
// few. Those that cannot travel are left out.
func (g *Gossip) SetAddrs(addrs []netip.Addr) {
	g.mu.Lock()
	before := g.addrsLocked()
	g.addrs = slices.Clone(addrs)
	same := slices.Equal(before, g.addrsLocked())
	g.mu.Unlock()
	if !same {
		g.renewSoon()
	}
}

// renewSoon has memberlist tell others anew what we are.
func (g *Gossip) renewSoon() {
	select {
	case g.renew <- struct{}{}:
	default:
	}
}

// addrsLocked are the addresses that we tell others of.
func (g *Gossip) addrsLocked() []netip.Addr {
	var all []netip.Addr
	for _, a := range slices.Concat(g.addrs, g.config.Addrs) {
		if plain(a) && !slices.Contains(all, a) && len(all) < maxAddrs {
			all = append(all, a)
		}
	}
	return all
}

// renewing has memberlist tell others of our addresses whenever they change.
func (g *Gossip) renewing(ctx context.Context, m *memberlist.Memberlist) {
	for {
		select {
		case <-ctx.Done():
			return
		case <-g.renew:
		}
		// That it waits until all are told does not matter to us.
		if err := m.UpdateNode(g.timing.gossip); err != nil {
			g.log.Debug("telling of new addresses", "err", err)
		}
	}
}

// Leave says goodbye, for good or to come back soon, so that nobody has to find out. Run goes on: end its context
// next.
func (g *Gossip) Leave(ctx context.Context, comesBack bool) error {
	m := g.list.Load()
	if m == nil {
		return nil
	}
	g.mu.Lock()
	g.phase = leaving
	if comesBack {
		g.phase = restarting
	}
	if g.published {
		g.sayLocked(cellName{lifeTopic(g.config.Role), ""}, lifeValue(g.phase))
	}
	alone := true
	for _, o := range g.members {
		alone = alone && (o.name == g.config.Name || !o.live())
	}
	g.mu.Unlock()
	if alone {
		return nil
	}
	timeout := 20 * g.timing.gossip
	if end, ok := ctx.Deadline(); ok {
		timeout = max(time.Millisecond, min(timeout, time.Until(end)/2))
	}
	err := m.UpdateNode(timeout)
	// The phase goes first: memberlist forgets the meta of those who left.
	select {
	case <-ctx.Done():
	case <-time.After(min(timeout, 4*g.timing.gossip+2*flushDelay)):
	}
	return errors.Join(err, m.Leave(timeout))
}

// Problems are what is wrong with gossip now.
func (g *Gossip) Problems() []ravel.Problem {
	g.mu.Lock()
	defer g.mu.Unlock()
	var all []ravel.Problem
	if g.keys != nil {
		all = append(all, g.keys.problems()...)
	}
	for _, c := range g.conflicts {
		all = append(all, c.problem())
	}
	for _, p := range g.problems {
		all = append(all, p)
	}
	if len(g.unsaid) > 0 {
		var topics []string
		for n, o := range g.unsaid {
			topics = append(topics, fmt.Sprintf("topic %d: %s", n.topic, outcomes[o]))
		}
		slices.Sort(topics)
		all = append(all, ravel.Problem{Where: "gossip", What: fmt.Sprintf("%d facts of this process cannot be told to others (%s)",
			len(topics), strings.Join(slices.Compact(topics), ", "))})
	}
	all = append(all, g.streamProblemsLocked(time.Now())...)
	all = append(all, g.unreadableProblems(time.Now())...)
	if !g.refusedAt.IsZero() && time.Since(g.refusedAt) < remember {
		all = append(all, g.refused)
	}
	slices.SortFunc(all, ravel.Problem.Compare)
	return all
}

// meta is what memberlist is to say of us. The lock is held.
func (g *Gossip) meta() meta {
	return meta{role: g.config.Role, wire: wireVersion, version: g.config.Version, addrs: g.addrsLocked(), phase: g.phase, keys: g.keys.fingerprints()}
}
