package node

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"net/netip"
	"os/exec"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/moby/ipvs"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/ravel-lb/ravel"
	"github.com/ravel-lb/ravel/bgp"
	ipvsdirector "github.com/ravel-lb/ravel/director"
	"github.com/ravel-lb/ravel/internal/guard"
	"github.com/ravel-lb/ravel/internal/ifaddr"
	"github.com/ravel-lb/ravel/internal/iptables"
	"github.com/ravel-lb/ravel/internal/latest"
	"github.com/ravel-lb/ravel/internal/nettest"
	"github.com/ravel-lb/ravel/internal/sysctl"
	iptablesrealserver "github.com/ravel-lb/ravel/realserver"
)

func TestMain(m *testing.M) { nettest.Main(m) }

// wander is how long each of the two walks through random states goes on, and atMost how long where a busy machine
// lets the observer see little.
const (
	wander = 15 * time.Second
	atMost = 2 * time.Minute
)

// walking reports whether a walk goes on: it saw too little so far, or its time is not over.
func walking(began time.Time, o *observer, enough func(looks int) bool) bool {
	o.mu.Lock()
	defer o.mu.Unlock()
	took := time.Since(began)
	return len(o.faults) == 0 && took < atMost && (took < wander || !enough(o.looks))
}

// host is this test's network namespace as an observer sees it: nothing that the appliers say is believed.
type host struct {
	t     *testing.T
	ipvs  *ipvs.Handle
	links *netlink.Handle
}

func newHost(t *testing.T) *host {
	t.Helper()
	// Real servers and routers are on-link.
	nettest.Shell(t, `ip link add rack0 type dummy; ip link set rack0 up
		ip address add 10.0.0.1/24 dev rack0; ip address add fd00::1/64 dev rack0 nodad`)
	h := &host{t: t}
	var err error
	if h.links, err = netlink.NewHandle(unix.NETLINK_ROUTE); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(h.links.Close)
	t.Cleanup(func() { nettest.Shell(t, `ip link del rack0`) })
	return h
}

// watchIPVS opens what served needs.
func (h *host) watchIPVS() {
	h.t.Helper()
	var err error
	if h.ipvs, err = ipvs.New(""); err != nil {
		h.t.Fatal(err)
	}
	h.t.Cleanup(h.ipvs.Close)
}

// served returns the VIPs of which the kernel has a service with a real server that has a weight.
func (h *host) served() (map[netip.Addr]bool, error) {
	services, err := h.ipvs.GetServices()
	if err != nil {
		return nil, err
	}
	served := map[netip.Addr]bool{}
	for _, s := range services {
		vip, ok := netip.AddrFromSlice(s.Address)
		if !ok {
			return nil, fmt.Errorf("an IPVS service with the address %v", s.Address)
		}
		reals, err := h.ipvs.GetDestinations(s)
		if errors.Is(err, unix.ESRCH) {
			continue // it went in this moment
		}
		if err != nil {
			return nil, err
		}
		for _, r := range reals {
			// Without a scheduler no flow is taken.
			if r.Weight > 0 && s.SchedName != "" && s.SchedName != "none" {
				served[vip.Unmap()] = true
			}
		}
	}
	return served, nil
}

// addresses returns what ravel0 holds, but for its link-local address.
func (h *host) addresses() (map[netip.Addr]bool, error) {
	held := map[netip.Addr]bool{}
	link, err := h.links.LinkByName(ifaddr.DefaultLink)
	if errors.As(err, new(netlink.LinkNotFoundError)) {
		return held, nil
	}
	if err != nil {
		return nil, err
	}
	list, err := h.links.AddrList(link, netlink.FAMILY_ALL)
	if errors.Is(err, unix.ENODEV) {
		return held, nil
	}
	if err != nil {
		return nil, err
	}
	for _, a := range list {
		if addr, ok := netip.AddrFromSlice(a.IP); ok && !a.IP.IsLinkLocalUnicast() {
			held[addr.Unmap()] = true
		}
	}
	return held, nil
}

// guarded returns the VIPs that the guard's sets hold.
func (h *host) guarded() (map[netip.Addr]bool, error) {
	guarded := map[netip.Addr]bool{}
	for _, name := range []string{"ravel4-vip", "ravel6-vip"} {
		set, err := netlink.IpsetList(name)
		if errors.Is(err, unix.ENOENT) {
			continue
		}
		if err != nil {
			return nil, err
		}
		for _, e := range set.Entries {
			if a, ok := netip.AddrFromSlice(e.IP); ok {
				guarded[a.Unmap()] = true
			}
		}
	}
	return guarded, nil
}

// observer looks at the host all the time, from another goroutine than the loop's.
type observer struct {
	stop chan struct{}
	done sync.WaitGroup

	mu     sync.Mutex // guards the fields below
	faults []string
	looks  int // in which a promise was at stake
}

func observe(look func() (atStake bool, faults []string, err error)) *observer {
	o := &observer{stop: make(chan struct{})}
	o.done.Go(func() {
		for {
			select {
			case <-o.stop:
				return
			default:
			}
			atStake, faults, err := look()
			if err != nil {
				faults = append(faults, "looking: "+err.Error())
			}
			o.mu.Lock()
			if atStake {
				o.looks++
			}
			if len(o.faults) < 10 {
				o.faults = append(o.faults, faults...)
			}
			o.mu.Unlock()
			time.Sleep(time.Millisecond) // one CPU is for all
		}
	})
	return o
}

// end stops the observer and returns how many of its looks had something to see.
func (o *observer) end(t *testing.T) int {
	t.Helper()
	close(o.stop)
	o.done.Wait()
	for _, f := range o.faults {
		t.Error(f)
	}
	return o.looks
}

// broken reports whether the observer saw a fault.
func (o *observer) broken() bool {
	o.mu.Lock()
	defer o.mu.Unlock()
	return len(o.faults) > 0
}

// The real appliers, each of which waits for a moment before it begins: a wrong order between two of them shows.
type (
	slowIPVS      struct{ *ipvsdirector.Director }
	slowLinks     struct{ *ifaddr.Links }
	slowRedirects struct{ *iptablesrealserver.Realserver }
)

func moment() { time.Sleep(rand.N(40 * time.Millisecond)) }

func (s slowIPVS) Apply(ctx context.Context, want []ravel.VirtualService) ([]ravel.ServiceKey, error) {
	moment()
	return s.Director.Apply(ctx, want)
}

func (s slowLinks) Apply(ctx context.Context, want []ravel.Addr) ([]netip.Addr, error) {
	moment()
	return s.Links.Apply(ctx, want)
}

func (s slowRedirects) Apply(ctx context.Context, want []ravel.Redirect, directors []netip.Addr) ([]ravel.ServiceKey, error) {
	moment()
	return s.Realserver.Apply(ctx, want, directors)
}

// life is a loop with appliers of its own, as a process has them.
type life struct {
	node  *Node
	end   context.CancelFunc
	done  chan error
	close func() error // of what outlives the loop
}

func begin(n *Node, close func() error) *life {
	ctx, cancel := context.WithCancel(context.Background())
	l := &life{node: n, end: cancel, done: make(chan error, 1), close: close}
	go func() { l.done <- n.Run(ctx) }()
	return l
}

// stop ends the life in good order.
func (l *life) stop(t *testing.T) {
	t.Helper()
	l.end()
	if err := <-l.done; err != nil {
		t.Errorf("stopping: %v", err)
	}
	if err := l.close(); err != nil {
		t.Errorf("closing: %v", err)
	}
}

func openTables(t *testing.T) (v4, v6 *iptables.Tables) {
	t.Helper()
	variant, err := iptables.Detect(t.Context())
	if err == nil {
		if v4, err = iptables.Open(variant, iptables.V4); err == nil {
			v6, err = iptables.Open(variant, iptables.V6)
		}
	}
	if err != nil {
		t.Fatal(err)
	}
	return v4, v6
}

// complete makes a random state one for the real appliers.
func complete(s ravel.State, at *router) ravel.State {
	s.Peers = []ravel.Peer{{Addr: at.addr.Addr(), Port: at.addr.Port(), ASN: at.asn, LocalASN: 65100,
		HoldTime: 9 * time.Second, Keepalive: 3 * time.Second}}
	s.Routes = slices.Clone(s.Routes)
	for i, r := range s.Routes {
		s.Routes[i].NextHop = netip.MustParseAddr("10.0.0.1")
		if r.Prefix.Addr().Is6() {
			s.Routes[i].NextHop = netip.MustParseAddr("fd00::1")
		}
		s.Routes[i].Communities = []ravel.Community{65100<<16 | 120}
	}
	for i := range s.Services {
		s.Services[i].Flags = ravel.Fallback | ravel.HashPort
		s.Services[i].RealServers = slices.Clone(s.Services[i].RealServers)
		for j := range s.Services[i].RealServers {
			s.Services[i].RealServers[j].Forwarding = ravel.Auto
		}
	}
	s.Redirects = nil
	return s
}

// Promise P1 on a real kernel and a real BGP session: through random states, and stops and crashes of the process in
// between, no VIP is ever announced and not held, none is taken away and still announced, and none is held without
// its guard.
func TestLabNeverAnnouncedAndNotHeld(t *testing.T) {
	nettest.Need(t, nettest.IPVS, nettest.Dummy, nettest.IPSet)
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	rng := rand.New(rand.NewPCG(seed, 0))
	h := newHost(t)
	h.watchIPVS()
	peer := newRouter(t, "127.0.0.5", 65001)
	v4, v6 := openTables(t)
	settings := sysctl.New("/proc/sys", t.TempDir()+"/sysctl.json")
	var source latest.Value[ravel.State]

	type parts struct {
		*life
		guard   *guard.Guard
		links   *ifaddr.Links
		ipvs    *ipvsdirector.Director
		speaker *bgp.Speaker
	}
	start := func() parts {
		var p parts
		p.guard = guard.New(guard.Options{Tables: []*iptables.Tables{v4, v6}, Enabled: true})
		p.links = ifaddr.New(ifaddr.Options{Sysctl: settings, Blackhole: time.Second})
		var err error
		if p.ipvs, err = ipvsdirector.New(ipvsdirector.Options{Sysctl: settings, HoldBack: p.guard.HoldBack}); err != nil {
			t.Fatal(err)
		}
		p.speaker = bgp.New(bgp.Options{Node: "d1", RouterID: netip.MustParseAddr("192.0.2.200"), StopWait: 300 * time.Millisecond})
		p.life = begin(
			NewDirector(Options{Log: slog.New(slog.DiscardHandler), Source: &source, Resync: 2 * time.Second},
				DirectorConfig{IPVS: slowIPVS{p.ipvs}, Guard: p.guard, Links: slowLinks{p.links}, BGP: p.speaker, Linger: 400 * time.Millisecond}),
			func() error { return errors.Join(p.speaker.Close(), p.ipvs.Close()) })
		return p
	}

	o := observe(func() (bool, []string, error) {
		held, err := h.addresses()
		if err != nil {
			return false, nil, err
		}
		before := peer.table()
		guarded, err := h.guarded()
		if err != nil {
			return false, nil, err
		}
		served, err := h.served()
		if err != nil {
			return false, nil, err
		}
		heldStill, err := h.addresses()
		if err != nil {
			return false, nil, err
		}
		after := peer.table()
		var faults []string
		atStake := false
		for _, vip := range announcedAt(before) {
			// Only what was announced all the while that we looked.
			if after[vip] != before[vip] {
				continue
			}
			atStake = true
			if !served[vip] {
				faults = append(faults, fmt.Sprintf("%s is announced, and no IPVS service of it takes new flows", vip))
			}
			if !heldStill[vip] {
				faults = append(faults, fmt.Sprintf("%s is announced, and ravel0 does not hold it", vip))
			}
		}
		for vip := range held {
			if heldStill[vip] && !guarded[vip] {
				faults = append(faults, fmt.Sprintf("ravel0 holds %s, and the guard does not know it", vip))
			}
		}
		return atStake, faults, nil
	})

	want := complete(randomState(rng), peer)
	source.Set(want)
	p := start()
	stops, crashes, states := 0, 0, 0
	enough := func(looks int) bool {
		peer.mu.Lock()
		defer peer.mu.Unlock()
		return looks >= 100 && peer.heard >= 5 && peer.gone >= 5 && states >= 10 && stops+crashes > 0
	}
	for began := time.Now(); walking(began, o, enough); {
		switch rng.IntN(20) {
		case 0:
			p.stop(t)
			p, stops = start(), stops+1
		case 1:
			// A crash: the kernel closes the session, and nothing else is done.
			_ = p.speaker.Close()
			p.end()
			<-p.done
			_ = p.ipvs.Close()
			p, crashes = start(), crashes+1
		default:
			want, states = complete(randomState(rng), peer), states+1
			source.Set(want)
		}
		time.Sleep(time.Duration(rng.IntN(600)) * time.Millisecond)
	}

	// Time leads to exactly what is wanted.
	deadline := time.Now().Add(10 * time.Second)
	for {
		err := reached(t.Context(), want, p.ipvs, h, peer)
		if err == nil {
			break
		}
		if time.Now().After(deadline) || o.broken() {
			report, _ := p.node.Reports().Latest()
			t.Errorf("%v\nlast walk: %+v", err, report)
			break
		}
		time.Sleep(20 * time.Millisecond)
	}
	looks := o.end(t)
	p.stop(t)
	if left := peer.table(); len(left) > 0 {
		t.Errorf("after a planned stop the router has %v", left)
	}
	heard, gone := peer.heard, peer.gone
	t.Logf("%d states, %d stops, %d crashes; the router heard %d announcements and %d withdrawals; %d looks while something was announced",
		states, stops, crashes, heard, gone, looks)
	if !enough(looks) {
		t.Error("that is too little to tell anything")
	}
	cleanUp(t, settings, p.guard.Cleanup, p.links.Cleanup, func(ctx context.Context, dry bool) ([]string, error) {
		d, err := ipvsdirector.New(ipvsdirector.Options{})
		if err != nil {
			return nil, err
		}
		defer func() { _ = d.Close() }()
		return d.Cleanup(ctx, dry)
	})
}

// reached says what is not yet as wanted.
func reached(ctx context.Context, want ravel.State, d *ipvsdirector.Director, h *host, peer *router) error {
	programmed, err := d.Read(ctx)
	if err != nil {
		return err
	}
	shown := func(services []ravel.VirtualService) string {
		var b strings.Builder
		for _, s := range services {
			fmt.Fprintf(&b, "%s:", s.Key)
			reals := slices.Clone(s.RealServers)
			slices.SortFunc(reals, func(a, b ravel.RealServer) int { return a.Addr.Compare(b.Addr) })
			for _, r := range reals {
				fmt.Fprintf(&b, " %s=%d", r.Addr, r.Weight)
			}
			b.WriteByte('\n')
		}
		return b.String()
	}
	if got, want := shown(programmed), shown(want.Services); got != want {
		return fmt.Errorf("IPVS has\n%swant\n%s", got, want)
	}
	held, err := h.addresses()
	if err != nil {
		return err
	}
	if len(held) != len(want.Addrs) {
		return fmt.Errorf("ravel0 holds %v, want %v", held, want.Addrs)
	}
	table := peer.table()
	if len(table) != len(want.Routes) {
		return fmt.Errorf("the router has %v, want %v", table, want.Routes)
	}
	for _, r := range want.Routes {
		if _, has := table[r.Prefix.Addr()]; !has {
			return fmt.Errorf("the router has not %s", r.Prefix)
		}
	}
	return nil
}

// cleanUp takes away what is left and sees that nothing is.
func cleanUp(t *testing.T, settings *sysctl.Setter, steps ...func(context.Context, bool) ([]string, error)) {
	t.Helper()
	for _, step := range steps {
		if _, err := step(t.Context(), false); err != nil {
			t.Error(err)
		}
	}
	if _, err := settings.Restore(false); err != nil {
		t.Error(err)
	}
}

// redirected returns the VIPs that nat PREROUTING leads to a pod.
func redirected(ctx context.Context) (map[netip.Addr]bool, error) {
	found := map[netip.Addr]bool{}
	for _, save := range []string{"iptables-save", "ip6tables-save"} {
		out, err := exec.CommandContext(ctx, save, "-t", "nat").Output()
		if err != nil {
			return nil, fmt.Errorf("%s: %w", save, err)
		}
		rules := map[string][]string{} // by chain
		for line := range strings.Lines(string(out)) {
			if rest, isRule := strings.CutPrefix(strings.TrimSpace(line), "-A "); isRule {
				chain, rule, _ := strings.Cut(rest, " ")
				rules[chain] = append(rules[chain], rule)
			}
		}
		// leads reports whether a chain has a way to a DNAT.
		var leads func(chain string, depth int) bool
		leads = func(chain string, depth int) bool {
			return depth > 0 && slices.ContainsFunc(rules[chain], func(rule string) bool {
				_, target, _ := strings.Cut(rule, "-j ")
				target, _, _ = strings.Cut(target, " ")
				return target == "DNAT" || leads(target, depth-1)
			})
		}
		if !slices.Contains(rules["PREROUTING"], "-j RAVEL") {
			continue
		}
		for _, rule := range rules["RAVEL"] {
			words := strings.Fields(rule)
			if len(words) != 4 || words[0] != "-d" {
				continue
			}
			if p, err := netip.ParsePrefix(words[1]); err == nil && leads(words[3], 3) {
				found[p.Addr()] = true
			}
		}
	}
	return found, nil
}

// A real server holds a VIP only while its iptables lead it to a pod, and never without its guard, through random
// states and restarts.
func TestLabHeldOnlyWhileRedirected(t *testing.T) {
	nettest.Need(t, nettest.Dummy, nettest.IPSet, nettest.LegacyNAT)
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	rng := rand.New(rand.NewPCG(seed, 0))
	h := newHost(t)
	v4, v6 := openTables(t)
	settings := sysctl.New("/proc/sys", t.TempDir()+"/sysctl.json")
	var source latest.Value[ravel.State]
	type parts struct {
		*life
		guard     *guard.Guard
		links     *ifaddr.Links
		redirects *iptablesrealserver.Realserver
	}
	start := func() parts {
		var p parts
		p.guard = guard.New(guard.Options{Tables: []*iptables.Tables{v4, v6}, Enabled: true})
		p.links = ifaddr.New(ifaddr.Options{Sysctl: settings, Blackhole: time.Second})
		var err error
		if p.redirects, err = iptablesrealserver.New(iptablesrealserver.Options{V4: v4, V6: v6, Sysctl: settings}); err != nil {
			t.Fatal(err)
		}
		p.life = begin(
			NewRealserver(Options{Log: slog.New(slog.DiscardHandler), Source: &source, Resync: 2 * time.Second},
				RealserverConfig{Redirects: slowRedirects{p.redirects}, Guard: p.guard, Links: slowLinks{p.links}, Linger: 200 * time.Millisecond}),
			func() error { return nil })
		return p
	}
	o := observe(func() (bool, []string, error) {
		held, err := h.addresses()
		if err != nil || len(held) == 0 {
			return false, nil, err
		}
		guarded, err := h.guarded()
		if err != nil {
			return false, nil, err
		}
		leads, err := redirected(context.Background())
		if err != nil {
			return false, nil, err
		}
		heldStill, err := h.addresses()
		if err != nil {
			return false, nil, err
		}
		var faults []string
		for vip := range held {
			if !heldStill[vip] {
				continue
			}
			if !leads[vip] {
				faults = append(faults, fmt.Sprintf("this node holds %s, and no rule leads it to a pod", vip))
			}
			if !guarded[vip] {
				faults = append(faults, fmt.Sprintf("this node holds %s, and the guard does not know it", vip))
			}
		}
		return true, faults, nil
	})
	random := func() ravel.State {
		s := randomState(rng)
		s.Services, s.Routes, s.Addrs = nil, nil, nil
		redirects := s.Redirects
		s.Redirects = nil
		for _, r := range redirects {
			for pod := range rng.IntN(4) {
				addr := netip.AddrFrom4([4]byte{10, 0, 1, byte(pod + 1)})
				if r.Key.VIP.Is6() {
					addr = netip.AddrFrom16([16]byte{0xfd, 14: 1, 15: byte(pod + 1)})
				}
				r.Pods = append(r.Pods, netip.AddrPortFrom(addr, 8080))
			}
			if len(r.Pods) == 0 {
				continue // Compute makes none either
			}
			s.Redirects = append(s.Redirects, r)
			if a := (ravel.Addr{VIP: r.Key.VIP}); len(s.Addrs) == 0 || s.Addrs[len(s.Addrs)-1] != a {
				s.Addrs = append(s.Addrs, a)
			}
		}
		return s
	}
	want := random()
	source.Set(want)
	p := start()
	states, restarts := 0, 0
	enough := func(looks int) bool { return looks >= 15 && states >= 10 && restarts > 0 }
	for began := time.Now(); walking(began, o, enough); {
		if rng.IntN(6) == 0 {
			p.stop(t)
			p, restarts = start(), restarts+1
		} else {
			want, states = random(), states+1
			source.Set(want)
		}
		time.Sleep(time.Duration(rng.IntN(400)) * time.Millisecond)
	}
	deadline := time.Now().Add(10 * time.Second)
	for {
		held, err := h.addresses()
		if err == nil && len(held) != len(want.Addrs) {
			err = fmt.Errorf("ravel0 holds %v, want %v", held, want.Addrs)
		}
		if err == nil {
			break
		}
		if time.Now().After(deadline) || o.broken() {
			report, _ := p.node.Reports().Latest()
			t.Errorf("%v\nlast walk: %+v", err, report)
			break
		}
		time.Sleep(20 * time.Millisecond)
	}
	looks := o.end(t)
	p.stop(t)
	t.Logf("%d states, %d restarts, %d looks while a VIP was held", states, restarts, looks)
	if !enough(looks) {
		t.Error("that is too little to tell anything")
	}
	cleanUp(t, settings, p.guard.Cleanup, p.links.Cleanup, p.redirects.Cleanup)
}
