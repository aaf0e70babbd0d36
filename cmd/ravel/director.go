package main

import (
	"context"
	"errors"
	"net/netip"

	"github.com/urfave/cli/v2"

	"github.com/ravel-lb/ravel/bgp"
	"github.com/ravel-lb/ravel/director"
	"github.com/ravel-lb/ravel/internal/admin"
	"github.com/ravel-lb/ravel/internal/config"
	"github.com/ravel-lb/ravel/internal/desired"
	"github.com/ravel-lb/ravel/internal/node"
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
			return runDirector(c.Context, s)
		},
	}
}

func runDirector(ctx context.Context, s values) (err error) {
	release, err := lock("director")
	if err != nil {
		return err
	}
	defer release()
	p, err := newProcess(ctx, s, desired.Director)
	if err != nil {
		return err
	}
	ipvs, err := director.New(director.Options{
		Log: s.log, Registerer: p.registry, Sysctl: p.sysctl, HoldBack: p.guard.HoldBack, CountPackets: s.countPackets,
	})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, ipvs.Close()) }()
	speaker := bgp.New(bgp.Options{
		Log: s.log, Registerer: p.registry, Node: s.node, RouterID: routerID(s),
		ListenPort: s.bgpPort, ListenAddrs: s.bgpListen, StopWait: max(s.stopWait, -1),
	})
	defer func() { err = errors.Join(err, speaker.Close()) }()
	n := node.NewDirector(
		node.Options{Log: s.log.With("component", "node"), Source: &p.state, Metrics: p.registry, Resync: s.resync},
		node.DirectorConfig{
			IPVS: ipvs, Guard: p.guard, Links: p.links, BGP: speaker,
			Timing: node.Timing{Linger: s.linger, Drain: s.drain, Rise: s.rise},
		})
	queries := map[string]admin.Query{
		"peers":    func(ctx context.Context) (any, error) { return speaker.Status(ctx) },
		"vips":     func(context.Context) (any, error) { return p.vips(n), nil },
		"services": func(ctx context.Context) (any, error) { return ipvs.Status(ctx) },
	}
	ready := func() error {
		c, _ := p.computed.Latest()
		if len(c.state.Peers) == 0 || s.attractNone {
			return nil
		}
		status, err := speaker.Status(ctx)
		if err != nil {
			return err
		}
		for _, peer := range status.Peers {
			if peer.Established() {
				return nil
			}
		}
		return errors.New("no BGP session is up")
	}
	if err := p.run(ctx, n, queries, ready); err != nil {
		return err
	}
	if !s.cleanupOnExit {
		return nil
	}
	done, err := p.cleanup(context.WithoutCancel(ctx), false, ipvs.Cleanup)
	for _, line := range done {
		s.log.Info("removed", "what", line)
	}
	return err
}

// routerID is the setting, or else what the fleet document has for this director at the start. It does not change
// while the process runs, because that would end every session.
func routerID(s values) netip.Addr {
	if s.routerID.IsValid() {
		return s.routerID
	}
	static, err := config.Load(s.static)
	if err != nil {
		return netip.Addr{}
	}
	for _, d := range static.Fleet.Directors {
		if d.Name != s.node {
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
