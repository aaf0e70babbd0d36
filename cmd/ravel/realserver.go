package main

import (
	"context"
	"errors"
	"fmt"

	"github.com/urfave/cli/v2"

	"github.com/ravel-lb/ravel"
	"github.com/ravel-lb/ravel/internal/admin"
	"github.com/ravel-lb/ravel/internal/agree"
	"github.com/ravel-lb/ravel/internal/desired"
	"github.com/ravel-lb/ravel/internal/node"
	"github.com/ravel-lb/ravel/internal/settings"
	"github.com/ravel-lb/ravel/realserver"
)

func realserverCommand() *cli.Command {
	return &cli.Command{
		Name:  "realserver",
		Usage: "hand packets for the VIPs to the pods of this node",
		Flags: settings.Flags(append(commonFlags(), realserverFlags()...)...),
		Action: func(c *cli.Context) error {
			s, err := readSettings(c, false)
			if err != nil {
				return err
			}
			if err := mayChange(c.Command.Name); err != nil {
				return err
			}
			return runRealserver(c.Context, s)
		},
	}
}

func runRealserver(ctx context.Context, s values) (err error) {
	release, err := lock(lockFile, "realserver")
	if err != nil {
		return err
	}
	defer release()
	p, err := newProcess(ctx, s, ravel.Realserver)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, p.close()) }()
	p.endOther(ctx)
	rs, err := realserver.New(realserver.Options{
		Log: s.log, Registerer: p.registry, V4: p.v4, V6: p.v6, Sysctl: p.sysctl, Chain: s.chain, Mark: s.mark,
		TunnelMark: s.tunnelMark, MasqueradeMark: s.masqueradeMark, NoMasquerade: s.noMasquerade, MTU: s.mtu,
		ThroughKubeProxy: s.throughKubeProxy,
	})
	if err != nil {
		return err
	}
	n := node.NewRealserver(
		node.Options{Log: s.log.With("component", "node"), Source: &p.state, Metrics: p.registry, Resync: s.resync},
		node.RealserverConfig{Redirects: rs, Guard: p.guard, Links: p.links, Linger: s.redirectLinger})
	queries := p.fleetQueries(map[string]admin.Query{
		"vips":      func(context.Context) (any, error) { return p.vips(n), nil },
		"redirects": func(ctx context.Context) (any, error) { return rs.Status(ctx) },
	})
	p.server.Gatherer = p.gatherer(nil)
	p.server.Commands = p.fleetCommands(p.gossip.SetRegister)
	ready := func() error {
		if c, _ := p.computed.Latest(); !c.inputs.Listed() {
			return fmt.Errorf("nodes.%s: %s", s.node, desired.NotListed)
		}
		for _, p := range p.plugins.Bypass(ctx) {
			return errors.New(p.String())
		}
		return nil
	}
	for _, p := range p.plugins.Bypass(ctx) {
		s.log.Error("redirects cannot work on this host, so directors are told of none", "why", p.String())
	}
	agreed := agree.NewRealserver(agree.RealserverOptions{
		Log: s.log, Fleet: p.gossip, Inputs: &p.inputs, Reports: n.Reports(), Read: rs.Read,
		Refused: func() bool { return len(p.plugins.Bypass(ctx)) > 0 }, Addrs: s.gossip.Addrs, SeedPort: s.gossip.Bind.Port(),
	})
	err = p.run(ctx, n, agreed, queries, ready)
	return p.end(ctx, err, func(ctx context.Context) ([]string, error) { return p.cleanup(ctx, false, rs.Cleanup) })
}
