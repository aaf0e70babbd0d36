package agree

import (
	"context"
	"fmt"
	"log/slog"
	"maps"
	"net/netip"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/ravel-lb/ravel"
	"github.com/ravel-lb/ravel/internal/desired"
	"github.com/ravel-lb/ravel/internal/health"
	"github.com/ravel-lb/ravel/internal/latest"
	"github.com/ravel-lb/ravel/internal/maglev"
	"github.com/ravel-lb/ravel/internal/roster"
)

// world is a fleet in one process: directors with kernels that only remember, realservers that only say what they are
// told to, and news that reaches the others when the test says so.
type world struct {
	t         *testing.T
	dir       string
	now       time.Time
	directors map[string]*host
	nodes     map[string]*voice // realservers
	cut       map[string]bool   // who hears nobody
	document  desired.Inputs
}

// voice is one member as the others hear it.
type voice struct {
	member ravel.Member
	report ravel.Report
}

// host is a director's host: its kernel outlives its process.
type host struct {
	w      *world
	voice  voice
	kernel []ravel.VirtualService
	agreed *Director // nil while no process runs
	inputs latest.Value[desired.Inputs]

	rosters   map[ravel.ServiceKey]ravel.Roster
	registers map[string]ravel.Register
	heard     map[string]voice
	settled   bool
	unheard   uint64 // the source does not answer; inputs are of this revision
	earlier   bool   // and of an earlier process
	resyncs   int
}

var web = ravel.ServiceKey{VIP: netip.MustParseAddr("192.0.2.80"), Proto: ravel.TCP, Port: 80}

func nodeAddr(i int) netip.Addr { return netip.AddrFrom4([4]byte{10, 0, 0, byte(10 + i)}) }

func newWorld(t *testing.T, directors, nodes int) *world {
	w := &world{
		t: t, dir: t.TempDir(), now: time.Unix(1e9, 0), directors: map[string]*host{}, nodes: map[string]*voice{}, cut: map[string]bool{},
	}
	w.document.Cluster.Services = []desired.Service{{
		Key: web, Namespace: "shop", Service: "web", Scheduler: ravel.MH, Flags: ravel.Fallback | ravel.HashPort, Where: "web",
	}}
	for i := range directors {
		name := fmt.Sprintf("d%d", i+1)
		w.directors[name] = &host{w: w, voice: voice{member: ravel.Member{Name: name, Role: ravel.Director}}}
		w.document.Fleet.Directors = append(w.document.Fleet.Directors, desired.FleetDirector{
			Name: name, Addrs: []netip.Addr{netip.AddrFrom4([4]byte{10, 0, 0, byte(1 + i)})},
		})
	}
	for i := range nodes {
		name := fmt.Sprintf("r%d", i+1)
		w.nodes[name] = &voice{
			member: ravel.Member{Name: name, Role: ravel.Realserver},
			report: ravel.Report{Redirects: map[ravel.ServiceKey]bool{web: true}},
		}
		w.document.Cluster.Nodes = append(w.document.Cluster.Nodes, desired.Node{Name: name, Addrs: []netip.Addr{nodeAddr(i + 1)}, Ready: true})
	}
	return w
}

// pods changes the document: how many pods each node has.
func (w *world) pods(counts ...int) {
	w.document.Cluster.Endpoints = nil
	for i, n := range counts {
		for j := range n {
			w.document.Cluster.Endpoints = append(w.document.Cluster.Endpoints, desired.Endpoint{
				Namespace: "shop", Service: "web", Proto: ravel.TCP, Ready: true, Port: 8080, Node: fmt.Sprintf("r%d", i+1),
				Addr: netip.AddrFrom4([4]byte{10, 1, byte(i + 1), byte(j + 1)}),
			})
		}
	}
}

// read gives a director the document.
func (h *host) read() {
	inputs := h.w.document
	inputs.Node = h.voice.member.Name
	h.inputs.Set(inputs)
}

// start runs a director's process anew. It settles when it hears somebody, or is told to.
func (h *host) start(timing roster.Timing) {
	name := h.voice.member.Name
	h.rosters, h.registers, h.heard = map[ravel.ServiceKey]ravel.Roster{}, map[string]ravel.Register{}, map[string]voice{}
	h.voice.member.State, h.voice.report, h.settled = ravel.Alive, ravel.Report{}, false
	h.agreed = New(Options{
		Log: slog.New(slog.DiscardHandler), Self: name, Fleet: h, Kernel: h, Inputs: &h.inputs,
		Walked: func() <-chan struct{} { return nil }, Sessions: func() map[netip.Addr]bool {
			return map[netip.Addr]bool{netip.MustParseAddr("10.9.9.9"): true}
		},
		Repair: func() { h.resyncs++ },
		Source: func() (uint64, bool) { return h.unheard, h.earlier },

		Timing: timing, Health: health.Settings{}, File: filepath.Join(h.w.dir, name+".json"), Boot: "boot", Floor: 50, WithdrawShare: 0.0001,
	})
	h.read()
}

// stop ends a director's process, as a crash does.
func (h *host) stop() {
	if h.agreed != nil {
		_ = h.agreed.saver.flush()
	}
	h.agreed, h.voice.member.State = nil, ravel.Dead
}

// step has a director look at everything once, and programs its kernel.
func (h *host) step() {
	if h.agreed == nil {
		return
	}
	services, uses, _ := h.Digests(h.w.t.Context())
	h.agreed.read.Set(digests{services, uses, int(maglev.DefaultSize)})
	h.agreed.step(h.w.t.Context(), h.w.now)
	result, known := h.agreed.Results().Latest()
	if !known {
		return
	}
	for _, s := range result.State.Services {
		s.RealServers = slices.Clone(s.RealServers)
		i := slices.IndexFunc(h.kernel, func(k ravel.VirtualService) bool { return k.Key == s.Key })
		switch {
		case s.AsIs:
		case i < 0:
			h.kernel = append(h.kernel, s)
		default:
			h.kernel[i] = s
		}
	}
}

// hear takes what another director knows.
func (h *host) hear(o *host) {
	for key, r := range o.rosters {
		h.rosters[key] = roster.Merge(h.rosters[key], r...)
	}
	for name, r := range o.registers {
		if mine := h.registers[name]; r.Stamp > mine.Stamp || r.Stamp == mine.Stamp && r.Value+r.By > mine.Value+mine.By {
			h.registers[name] = r
		}
	}
	h.heard[o.voice.member.Name] = o.voice
}

// spread lets everybody hear everybody who is not cut off.
func (w *world) spread() {
	for _, name := range slices.Sorted(maps.Keys(w.directors)) {
		h := w.directors[name]
		if h.agreed == nil {
			continue
		}
		h.heard = map[string]voice{}
		for n, node := range w.nodes {
			v := *node
			if w.cut[name] {
				v.member.State = ravel.Dead
			}
			h.heard[n] = v
		}
		for n, o := range w.directors {
			switch {
			case n == name:
			case o.agreed == nil || w.cut[n] || w.cut[name]:
				v := o.voice
				v.member.State = ravel.Dead
				h.heard[n] = v
			default:
				h.hear(o)
			}
		}
		h.settled = true
	}
}

// pass lets time pass, half a second at a time.
func (w *world) pass(d time.Duration) {
	for end := w.now.Add(d); w.now.Before(end); w.now = w.now.Add(500 * time.Millisecond) {
		w.spread()
		for _, name := range slices.Sorted(maps.Keys(w.directors)) {
			w.directors[name].step()
		}
	}
}

// list is what a director's kernel holds of the service, newest first.
func (h *host) list() string {
	var b strings.Builder
	for _, s := range h.kernel {
		for _, rs := range s.RealServers {
			fmt.Fprintf(&b, "%s=%d/%d ", rs.Addr, rs.Weight, rs.LastWeight)
		}
	}
	return strings.TrimSpace(b.String())
}

// same fails the test unless all kernels hold this list.
func (w *world) same(want string) {
	w.t.Helper()
	for _, name := range slices.Sorted(maps.Keys(w.directors)) {
		if got := w.directors[name].list(); got != want {
			w.t.Errorf("%s holds %s\nwant     %s", name, got, want)
		}
	}
}

// A host is the fleet and the kernel of its director.

func (h *host) Latest() (ravel.Fleet, bool) {
	f := ravel.Fleet{Settled: h.settled, Rosters: maps.Clone(h.rosters), Registers: maps.Clone(h.registers), Reports: map[string]ravel.Report{}}
	f.Members = append(f.Members, h.voice.member)
	f.Reports[h.voice.member.Name] = h.voice.report
	for name, v := range h.heard {
		f.Members = append(f.Members, v.member)
		f.Reports[name] = v.report
	}
	slices.SortFunc(f.Members, func(a, b ravel.Member) int { return strings.Compare(a.Name, b.Name) })
	return f, true
}

func (h *host) Changed() <-chan struct{} { return nil }

func (h *host) Report(r ravel.Report) { h.voice.report = r }

func (h *host) Write(key ravel.ServiceKey, entries []ravel.RosterEntry) {
	h.rosters[key] = roster.Merge(h.rosters[key], entries...)
}

func (h *host) Forget(key ravel.ServiceKey, addrs []netip.Addr) {
	h.rosters[key] = slices.DeleteFunc(slices.Clone(h.rosters[key]), func(e ravel.RosterEntry) bool {
		return slices.Contains(addrs, e.Addr) && e.State == ravel.Gone
	})
}

func (h *host) SetRegister(name, value string) error {
	h.registers[name] = ravel.Register{Stamp: h.registers[name].Stamp + 1, Value: value, By: h.voice.member.Name}
	return nil
}

func (h *host) SetSeeds([]string) {}

func (h *host) SetAddrs([]netip.Addr) {}

func (h *host) RestoreRegister(name string, r ravel.Register) {
	if r.Stamp > h.registers[name].Stamp {
		h.registers[name] = r
	}
}

// Read returns what the kernel tells: no last weights of those that take no new flows.
func (h *host) Read(context.Context) ([]ravel.VirtualService, error) {
	var list []ravel.VirtualService
	for _, s := range h.kernel {
		s.RealServers = slices.Clone(s.RealServers)
		for i := range s.RealServers {
			s.RealServers[i].LastWeight = s.RealServers[i].Weight
		}
		list = append(list, s)
	}
	return list, nil
}

func (h *host) Digests(context.Context) (map[ravel.ServiceKey]ravel.ServiceReport, map[netip.Addr][]ravel.ServiceKey, error) {
	services, uses := map[ravel.ServiceKey]ravel.ServiceReport{}, map[netip.Addr][]ravel.ServiceKey{}
	for _, s := range h.kernel {
		table, available := maglev.Digest(maglev.DefaultSize, s)
		services[s.Key] = ravel.ServiceReport{Table: table, Available: available}
		for _, rs := range s.RealServers {
			uses[rs.Addr] = append(uses[rs.Addr], s.Key)
		}
	}
	return services, uses, nil
}

func (h *host) TableSize(context.Context) (int, string, error) {
	return int(maglev.DefaultSize), "test", nil
}
