package main

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"sync/atomic"
	"time"

	"github.com/urfave/cli/v2"

	"github.com/ravel-lb/ravel"
	"github.com/ravel-lb/ravel/bgp"
	"github.com/ravel-lb/ravel/director"
	"github.com/ravel-lb/ravel/gossip"
	"github.com/ravel-lb/ravel/internal/admin"
	"github.com/ravel-lb/ravel/internal/agree"
	"github.com/ravel-lb/ravel/internal/desired"
	"github.com/ravel-lb/ravel/internal/health"
	"github.com/ravel-lb/ravel/internal/node"
	"github.com/ravel-lb/ravel/internal/roster"
	"github.com/ravel-lb/ravel/internal/settings"
)

func directorCommand() *cli.Command {
	return &cli.Command{
		Name:  "director",
		Usage: "announce VIPs by BGP and spread their packets over the real servers",
		Flags: settings.Flags(append(commonFlags(), directorFlags()...)...),
		Action: func(c *cli.Context) error {
			s, err := readSettings(c, true)
			if err != nil {
				return err
			}
			if err := mayChange(c.Command.Name); err != nil {
				return err
			}
			if err := errors.Join(mayListen("bgp-port", s.bgpPort), mayListen("listen", int(s.listenAt.Port()))); err != nil {
				return usageError{err}
			}
			return runDirector(c.Context, s)
		},
	}
}

func runDirector(ctx context.Context, s values) (err error) {
	release, err := lock(lockFile, "director")
	if err != nil {
		return err
	}
	defer release()
	p, err := newProcess(ctx, s, ravel.Director)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, p.close()) }()
	p.endOther(ctx)
	ipvs, err := director.New(director.Options{
		Log: s.log, Registerer: p.registry, Sysctl: p.sysctl, HoldBack: p.guard.HoldBack, CountPackets: s.countPackets,
		Adopt: s.original.adopt,
	})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, ipvs.Close()) }()
	speaker := bgp.New(bgp.Options{
		Log: s.log, Registerer: p.registry, Node: s.node, RouterID: s.routerID,
		ListenPort: s.bgpPort, ListenAddrs: s.bgpListen, StopWait: s.stopWait,
	})
	defer func() { err = errors.Join(err, speaker.Close()) }()
	if !s.routerID.IsValid() {
		p.learn = func(fleet desired.Fleet) { speaker.SetRouterID(routerID(fleet, s.node)) }
	}
	p.trouble = func() []ravel.Problem {
		status, err := speaker.Status(ctx)
		if err != nil {
			return nil // the sessions' own affair, which peers and readyz name
		}
		if s.attractNone { // no session is needed
			return routerIDChange(status)
		}
		return append(routerIDChange(status), sessionProblems(status)...)
	}
	n := node.NewDirector(
		node.Options{Log: s.log.With("component", "node"), Source: &p.state, Metrics: p.registry, Resync: s.resync},
		node.DirectorConfig{
			IPVS: ipvs, Guard: p.guard, Links: p.links, BGP: speaker,
			Linger: s.linger,
		})
	agreed := agree.New(p.agreeOptions(n, ipvs, speaker))
	p.refused = func() []ravel.Problem {
		if err := agreed.Unread(); err != nil {
			return []ravel.Problem{{
				Where: "ipvs", What: fmt.Sprintf("what the kernel holds cannot be read, so this director does nothing: %v", err),
				Fix: "modprobe ip_vs; where there is no such module, install the package of the kernel's extra modules, or boot a kernel that has it",
			}}
		}
		return nil
	}
	queries := p.fleetQueries(map[string]admin.Query{
		"peers": func(ctx context.Context) (any, error) {
			status, err := speaker.Status(ctx)
			c, known := p.computed.Latest()
			answer := answerPeers(status, c, known)
			answer.Fleet = p.standing(p.known())
			return answer, err
		},
		"vips":     func(context.Context) (any, error) { return p.vips(n), nil },
		"services": func(ctx context.Context) (any, error) { return ipvs.Status(ctx) },
	})
	p.server.Gatherer = p.gatherer(ipvs.Status)
	p.server.Commands = p.fleetCommands(p.gossip.SetRegister)
	table := kernelTable{read: ipvs.Read, connections: kernelConnections}
	p.server.Commands["trace"], p.server.Commands["plan"] = p.trace(n, table), p.plan(table)
	ready := p.attracting(func() (bgp.Status, error) { return speaker.Status(ctx) })
	err = p.run(ctx, n, agreed, queries, ready)
	return p.end(ctx, err, func(ctx context.Context) ([]string, error) { return p.cleanup(ctx, false, ipvs.Cleanup) })
}

// agreeOptions are what ties this director to its fleet.
func (p *process) agreeOptions(n *node.Node, ipvs *director.Director, speaker *bgp.Speaker) agree.Options {
	s := p.settings
	o := agree.Options{
		Log: s.log, Registerer: p.registry, Self: s.node, Fleet: p.gossip, Kernel: ipvs, Inputs: &p.inputs, Unconfirmed: p.unconfirmed, Source: p.source,
		Walked: func() <-chan struct{} { return n.Reports().Changed() },
		Repair: func() {
			ipvs.Resync()
			if state, known := p.state.Latest(); known {
				p.state.Set(state) // the same, so that the loop walks
			}
		},
		Sessions: speaker.Sessions,
		Timing: roster.Timing{
			Batch: s.batch, Drain: s.drain, Rise: s.rise, Skew: 2 * time.Second, Majority: 10 * time.Second, Tombstone: time.Hour,
		},
		Health: health.Settings{Probes: s.probe != "off", FleetSize: s.fleetSize},
		Floor:  s.floor, WithdrawShare: float64(s.withdrawShare) / 100,
		SeedPort: s.gossip.Bind.Port(),
		File:     rosterFile(s.stateDir), Boot: bootID(),
	}
	if s.probe != "off" {
		timing := health.LAN()
		if s.preset == gossip.Fast {
			timing = health.Fast()
		}
		o.Prober = health.New(health.Options{Log: s.log, Registerer: p.registry, Timing: timing})
		o.ProbeTarget = func(addr netip.Addr) health.Target {
			return health.Target{Addr: addr, Port: uint16(s.probePort), Kind: s.probe, Path: s.probePath}
		}
	}
	return o
}

// sessionsWithin bounds how long a director that starts is not ready for want of some of its sessions only.
const sessionsWithin = time.Minute

// attracting says of this director whether the next one may be restarted: it attracts packets, and it is not drained. At
// its start that takes all of its sessions, unless some do not come: a router that has no session yet would be without a
// next hop when another director goes.
func (p *process) attracting(status func() (bgp.Status, error)) func() error {
	began, was := time.Now(), atomic.Bool{}
	return func() error {
		c, _ := p.computed.Latest()
		s, err := status()
		if err == nil {
			err = attracts(c, s)
		}
		if err != nil {
			return err
		}
		if fleet := p.known(); fleet.Drained(p.settings.node) {
			return fmt.Errorf("this director is drained by %s", fleet.Registers[ravel.DrainRegisterPrefix+p.settings.node].By)
		}
		if c.inputs.AttractNone || was.Load() {
			return nil
		}
		up := 0
		for _, peer := range s.Peers {
			if peer.Established() {
				up++
			}
		}
		if up < len(c.state.Peers) && time.Since(began) < sessionsWithin {
			return fmt.Errorf("%d of %d BGP sessions are up", up, len(c.state.Peers))
		}
		was.Store(true)
		return nil
	}
}

// attracts returns what keeps a director from attracting any packet that it should.
func attracts(c computed, status bgp.Status) error {
	switch {
	case c.inputs.AttractNone:
		return nil
	case !listed(c.inputs.Fleet, c.inputs.Node):
		return fmt.Errorf("this director, %s, is not in fleet.directors, and no node of its name has the labels of fleet.directorNodes, so it announces nothing", c.inputs.Node)
	case len(c.state.Peers) == 0 || slices.ContainsFunc(status.Peers, bgp.PeerStatus.Established):
		return nil
	}
	for _, p := range sessionProblems(status) {
		return fmt.Errorf("no BGP session is up; %s: %s", p.Where, p.What)
	}
	return errors.New("no BGP session is up")
}

// routerID is what the fleet document has for a director: its router ID, else its IPv4 address, else nothing.
func routerID(fleet desired.Fleet, name string) netip.Addr {
	for _, d := range fleet.Directors {
		if d.Name != name {
			continue
		}
		if d.RouterID.IsValid() {
			return d.RouterID
		}
		for _, a := range d.Addrs {
			if a.Is4() {
				return a
			}
		}
	}
	return netip.Addr{}
}

// routerIDChange says that the sessions go by another router ID than the document now has: to change it ends them all,
// so that is left to a restart.
func routerIDChange(status bgp.Status) []ravel.Problem {
	if !status.RouterIDWanted.IsValid() {
		return nil
	}
	return []ravel.Problem{{
		Where: "routerID",
		What: fmt.Sprintf("the router ID of this director is now %s, and its sessions go on with %s, because another would end them all",
			status.RouterIDWanted, status.RouterID),
		Fix: "restart this director at a time that suits",
	}}
}
