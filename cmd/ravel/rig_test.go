package main

import (
	"context"
	"log/slog"
	"maps"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"github.com/ravel-lb/ravel"
	"github.com/ravel-lb/ravel/director"
	"github.com/ravel-lb/ravel/gossip"
	"github.com/ravel-lb/ravel/internal/admin"
	"github.com/ravel-lb/ravel/internal/agree"
	"github.com/ravel-lb/ravel/internal/config"
	"github.com/ravel-lb/ravel/internal/desired"
	"github.com/ravel-lb/ravel/internal/health"
	"github.com/ravel-lb/ravel/internal/maglev"
	"github.com/ravel-lb/ravel/internal/node"
	"github.com/ravel-lb/ravel/internal/roster"
)

// rig is director d1 of a fleet of three directors and four nodes that have settled: what it holds is what is wanted.
type rig struct {
	t      *testing.T
	p      *process
	n      *node.Node
	in     desired.Inputs
	fleet  ravel.Fleet
	verd   health.Verdict
	differ []agree.Difference
	kernel []ravel.VirtualService
	open   []connection
	told   []string // registers that were set
}

var (
	web  = ravel.ServiceKey{VIP: netip.MustParseAddr("192.0.2.80"), Proto: ravel.TCP, Port: 80}
	web6 = ravel.ServiceKey{VIP: netip.MustParseAddr("2001:db8::80"), Proto: ravel.TCP, Port: 80}
	dns  = ravel.ServiceKey{VIP: netip.MustParseAddr("192.0.2.53"), Proto: ravel.UDP, Port: 53}
)

func member(name string, role ravel.Role, host byte) ravel.Member {
	a := netip.AddrFrom4([4]byte{10, 0, 0, host})
	return ravel.Member{Name: name, Role: role, Gossip: netip.AddrPortFrom(a, 7946), Addrs: []netip.Addr{a}, Version: "1.0", Wire: 1}
}

func newRig(t *testing.T, role ravel.Role) *rig {
	t.Helper()
	log := slog.New(slog.DiscardHandler)
	r := &rig{t: t}
	r.in = desired.Inputs{Role: role, Node: "d1"}
	if role == ravel.Realserver {
		r.in.Node = "r1"
	}
	for i, name := range []string{"d1", "d2", "d3"} {
		r.in.Fleet.Directors = append(r.in.Fleet.Directors, desired.FleetDirector{
			Name: name, Addrs: []netip.Addr{netip.AddrFrom4([4]byte{10, 0, 0, byte(11 + i)}), netip.MustParseAddr("2001:db8::1" + string(rune('1'+i)))},
		})
		r.fleet.Members = append(r.fleet.Members, member(name, ravel.Director, byte(11+i)))
	}
	for _, s := range []struct {
		key  ravel.ServiceKey
		name string
		hash ravel.SchedulerFlags
	}{{web, "web", 0}, {web6, "web6", 0}, {dns, "dns", ravel.HashPort}} {
		r.in.Cluster.Services = append(r.in.Cluster.Services, desired.Service{
			Key: s.key, Namespace: "default", Service: s.name, PortName: "p", Scheduler: ravel.MH, Flags: ravel.Fallback | s.hash,
		})
	}
	for i, name := range []string{"r1", "r2", "r3", "r4"} {
		n := byte(i + 1)
		v6 := netip.AddrFrom16([16]byte{0x20, 1, 0xd, 0xb8, 0, 1, 15: n})
		r.in.Cluster.Nodes = append(r.in.Cluster.Nodes, desired.Node{
			Name: name, Addrs: []netip.Addr{netip.AddrFrom4([4]byte{10, 0, 0, n}), v6}, Ready: true,
		})
		r.fleet.Members = append(r.fleet.Members, member(name, ravel.Realserver, n))
		for _, e := range []desired.Endpoint{
			{Service: "web", Proto: ravel.TCP, Addr: netip.AddrFrom4([4]byte{10, 1, n, 1})},
			{Service: "web", Proto: ravel.TCP, Addr: netip.AddrFrom4([4]byte{10, 1, n, 2})},
			{Service: "web6", Proto: ravel.TCP, Addr: v6},
			{Service: "dns", Proto: ravel.UDP, Addr: netip.AddrFrom4([4]byte{10, 1, n, 3})},
		} {
			if e.Service == "dns" && n > 1 {
				continue // r1 alone has it
			}
			e.Namespace, e.PortName, e.Port, e.Node, e.Ready = "default", "p", 8080, name, true
			r.in.Cluster.Endpoints = append(r.in.Cluster.Endpoints, e)
		}
	}
	slices.SortFunc(r.fleet.Members, func(a, b ravel.Member) int { return strings.Compare(a.Name, b.Name) })
	r.fleet.Settled = true
	r.fleet.Registers = map[string]ravel.Register{}
	r.fleet.Rosters = map[ravel.ServiceKey]ravel.Roster{}
	r.verd = health.Verdict{Majority: true, Seen: 7, Voters: 7, Dead: map[netip.Addr]string{}}
	r.in.Agreed = &desired.Agreed{Rosters: r.fleet.Rosters, Dead: map[netip.Addr]bool{}, Drained: map[string]bool{}}
	for key, wishes := range desired.Wishes(r.in) {
		r.fleet.Rosters[key] = roster.Predict("d1", nil, wishes, false)
	}
	state, _ := desired.Compute(r.in)
	r.kernel = state.Services
	if role == ravel.Realserver {
		director := r.in
		director.Role = ravel.Director
		state, _ := desired.Compute(director)
		r.kernel = state.Services
	}
	r.p = &process{role: role, settings: values{node: r.in.Node, log: log, guard: true, gossip: gossip.Config{Fleet: "ravel"}},
		file: config.NewFile("/nowhere.yaml", log, nil)}
	var err error
	if r.p.gossip, err = gossip.New(gossip.Config{Name: r.in.Node, Role: role, Fleet: "ravel", Insecure: true, Log: log,
		Bind: netip.MustParseAddrPort("127.0.0.1:7946")}); err != nil {
		t.Fatal(err)
	}
	r.n = node.NewDirector(node.Options{Log: log, Source: &r.p.state}, node.DirectorConfig{})
	r.report()
	r.know()
	return r
}

// report has all directors say what d1's kernel holds.
func (r *rig) report() {
	up := map[netip.Addr]bool{netip.MustParseAddr("10.0.0.254"): true, netip.MustParseAddr("10.0.0.253"): true}
	services := map[ravel.ServiceKey]ravel.ServiceReport{}
	wishes := desired.Wishes(r.in)
	for _, v := range r.kernel {
		table, available := maglev.Digest(maglev.DefaultSize, v)
		services[v.Key] = ravel.ServiceReport{Wish: roster.Hash(wishes[v.Key]), Table: table, Available: available}
	}
	r.fleet.Reports = map[string]ravel.Report{}
	for _, m := range r.fleet.Members {
		if m.Role == ravel.Director {
			r.fleet.Reports[m.Name] = ravel.Report{Services: services, Sessions: up, TableSize: 4093}
		} else {
			r.fleet.Reports[m.Name] = ravel.Report{Redirects: map[ravel.ServiceKey]bool{web: true, web6: true}}
		}
	}
	own := r.fleet.Reports["d1"]
	own.Health = map[netip.Addr]ravel.Health{}
	for i := range byte(4) {
		own.Health[netip.AddrFrom4([4]byte{10, 0, 0, i + 1})] = ravel.Healthy
	}
	r.fleet.Reports["d1"] = own
}

// change replaces what a member says.
func (r *rig) change(name string, change func(*ravel.Report)) {
	report := r.fleet.Reports[name]
	report.Services, report.Sessions, report.Health = maps.Clone(report.Services), maps.Clone(report.Sessions), maps.Clone(report.Health)
	change(&report)
	r.fleet.Reports[name] = report
}

// know makes it all known to the process.
func (r *rig) know() {
	state, problems := desired.Compute(r.in)
	r.p.computed.Set(computed{inputs: r.in, state: state, problems: problems, result: agree.Result{
		Inputs: r.in, State: state, Problems: problems, Fleet: r.fleet, Verdict: r.verd, Differs: r.differ,
	}})
}

// socket answers as the process does.
func (r *rig) socket() string {
	kernel := kernelTable{
		read: func(context.Context) ([]ravel.VirtualService, error) { return r.kernel, nil },
		connections: func(_ context.Context, each func(connection) bool) (bool, error) {
			for _, c := range r.open {
				if !each(c) {
					return false, nil
				}
			}
			return true, nil
		},
	}
	queries := r.p.fleetQueries(map[string]admin.Query{
		"vips":     func(context.Context) (any, error) { return r.p.vips(r.n), nil },
		"services": func(context.Context) (any, error) { return []director.ServiceStatus{}, nil },
		"check":    r.p.check(r.n),
	})
	commands := r.p.fleetCommands(r.set)
	if r.p.role == ravel.Director {
		commands["trace"], commands["plan"] = r.p.trace(r.n, kernel), r.p.plan(kernel)
	}
	return serveWith(r.t, queries, commands)
}

// set is SetRegister.
func (r *rig) set(name, value string) error {
	r.told = append(r.told, name+"="+value)
	r.fleet.Registers = maps.Clone(r.fleet.Registers)
	r.fleet.Registers[name] = ravel.Register{Stamp: r.fleet.Registers[name].Stamp + 1, Value: value, By: r.p.settings.node}
	r.know()
	return nil
}

func (r *rig) state(name string, state ravel.MemberState) {
	r.fleet.Members = slices.Clone(r.fleet.Members)
	for i := range r.fleet.Members {
		if r.fleet.Members[i].Name == name {
			r.fleet.Members[i].State = state
		}
	}
}
