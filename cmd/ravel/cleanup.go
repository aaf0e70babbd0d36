package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"time"

	"github.com/urfave/cli/v2"

	"github.com/ravel-lb/ravel/director"
	"github.com/ravel-lb/ravel/internal/guard"
	"github.com/ravel-lb/ravel/internal/ifaddr"
	"github.com/ravel-lb/ravel/internal/sysctl"
	"github.com/ravel-lb/ravel/realserver"
)

func cleanupCommand() *cli.Command {
	return &cli.Command{
		Name:  "cleanup",
		Usage: "remove exactly what is Ravel's from this host, in whichever role it ran; open flows break",
		Flags: append([]cli.Flag{
			&cli.BoolFlag{Name: "dry-run", Usage: "only say what would be removed"},
		}, hostFlags()...),
		Action: func(c *cli.Context) error {
			s := values{log: slog.New(slog.DiscardHandler)}
			var f faults
			f.host(c, &s)
			if err := f.err(); err != nil {
				return err
			}
			return cleanup(c, s)
		},
	}
}

func cleanup(c *cli.Context, s values) (err error) {
	dryRun := c.Bool("dry-run")
	if !dryRun {
		release, err := lock("cleanup")
		if err != nil {
			return fmt.Errorf("%w; stop it first", err)
		}
		defer release()
	}
	p := &process{settings: s, sysctl: sysctl.New("/proc/sys", sysctlNotes)}
	if p.v4, p.v6, err = openTables(c.Context, s); err != nil {
		return err
	}
	p.guard = guard.New(guard.Options{Tables: bothTables(p.v4, p.v6)})
	p.links = ifaddr.New(ifaddr.Options{Sysctl: p.sysctl, Link: s.link})
	rs, err := realserver.New(realserver.Options{V4: p.v4, V6: p.v6, Sysctl: p.sysctl, Chain: s.chain})
	if err != nil {
		return err
	}
	ipvs, err := director.New(director.Options{})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, ipvs.Close()) }()
	done, err := p.cleanup(c.Context, dryRun, ipvs.Cleanup, rs.Cleanup)
	for _, line := range done {
		fmt.Fprintln(c.App.Writer, line)
	}
	if len(done) == 0 && err == nil {
		fmt.Fprintln(c.App.Writer, "nothing of Ravel's is here")
	}
	return err
}

// cleanupTimeout bounds a removal.
const cleanupTimeout = time.Minute

// cleanup removes what is ours: VIPs first, so that no packet for one meets the host's own sockets without the guard;
// then what the roles made, then the guard, then the sysctls. It returns what went, or with dryRun would go.
func (p *process) cleanup(ctx context.Context, dryRun bool, roles ...func(context.Context, bool) ([]string, error)) ([]string, error) {
	ctx, cancel := context.WithTimeout(ctx, cleanupTimeout)
	defer cancel()
	steps := append([]func(context.Context, bool) ([]string, error){p.links.Cleanup}, roles...)
	steps = append(steps, p.guard.Cleanup, func(context.Context, bool) ([]string, error) { return p.sysctl.Restore(dryRun) })
	var all []string
	var errs []error
	for _, step := range steps {
		done, err := step(ctx, dryRun)
		all = append(all, done...)
		errs = append(errs, err)
	}
	return all, errors.Join(errs...)
}
