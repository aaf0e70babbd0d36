package main

import (
	"context"

	"github.com/urfave/cli/v2"

	"github.com/ravel-lb/ravel/internal/admin"
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
			return runRealserver(c.Context, s)
		},
	}
}

func runRealserver(ctx context.Context, s values) error {
	release, err := lock("realserver")
	if err != nil {
		return err
	}
	defer release()
	p, err := newProcess(ctx, s, desired.Realserver)
	if err != nil {
		return err
	}
	rs, err := realserver.New(realserver.Options{
		Log: s.log, Registerer: p.registry, V4: p.v4, V6: p.v6, Sysctl: p.sysctl, Chain: s.chain, Mark: s.mark,
		TunnelMark: s.tunnelMark, MasqueradeMark: s.masqueradeMark, NoMasquerade: s.noMasquerade, MTU: s.mtu,
	})
	if err != nil {
		return err
	}
	n := node.NewRealserver(
		node.Options{Log: s.log.With("component", "node"), Source: &p.state, Metrics: p.registry, Resync: s.resync},
		node.RealserverConfig{Redirects: rs, Guard: p.guard, Links: p.links, Linger: s.redirectLinger})
	queries := map[string]admin.Query{
		"vips":      func(context.Context) (any, error) { return p.vips(n), nil },
		"redirects": func(ctx context.Context) (any, error) { return rs.Status(ctx) },
	}
	if err := p.run(ctx, n, queries, func() error { return nil }); err != nil {
		return err
	}
	if !s.cleanupOnExit {
		return nil
	}
	done, err := p.cleanup(context.WithoutCancel(ctx), false, rs.Cleanup)
	for _, line := range done {
		s.log.Info("removed", "what", line)
	}
	return err
}
