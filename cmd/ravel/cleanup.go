package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"slices"
	"syscall"
	"time"

	"github.com/urfave/cli/v2"

	"github.com/ravel-lb/ravel"
	"github.com/ravel-lb/ravel/director"
	"github.com/ravel-lb/ravel/internal/guard"
	"github.com/ravel-lb/ravel/internal/ifaddr"
	"github.com/ravel-lb/ravel/internal/settings"
	"github.com/ravel-lb/ravel/realserver"
)

func cleanupCommand() *cli.Command {
	return &cli.Command{
		Name:  "cleanup",
		Usage: "remove exactly what is Ravel's from this host, in whichever role it ran; open flows break",
		Flags: append([]cli.Flag{
			&cli.BoolFlag{Name: "dry-run", Usage: "only say what would be removed"},
			&cli.DurationFlag{Name: "wait", Usage: "how long to wait for a ravel that runs here to end"},
			&cli.StringFlag{Name: "await", Usage: "remove nothing here, and wait until a cleanup has done its work on every node of a cluster: namespace/name of its DaemonSet"},
			&cli.BoolFlag{Name: "hold", Usage: "remove nothing, and run until SIGTERM: for a pod that is to stay when its host is clean"},
			stringFlag("kubeconfig", "", "with --await: the kubeconfig of the cluster; empty is that of this pod"),
			&cli.BoolFlag{Name: "original", Usage: "remove what the original Ravel (kube2ipvs) left instead: its chains and its link of each VIP; IPVS stays"},
		}, settings.Flags(append([]cli.Flag{configFlag(), socketFlag(), stateDirFlag()}, hostFlags()...)...)...),
		Action: func(c *cli.Context) error {
			switch {
			case c.Bool("hold"):
				<-c.Context.Done()
				return nil
			case c.String("await") != "":
				return awaitCleanup(c)
			case c.Bool("original"):
				return cleanupOriginal(c)
			}
			var f faults
			f.read(c)
			s := values{log: slog.New(slog.DiscardHandler), socket: c.String("admin-socket"), stateDir: c.String("state-dir")}
			f.host(c, &s)
			if err := f.err(); err != nil {
				return err
			}
			if err := mayChange(c.Command.Name); err != nil {
				return err
			}
			return cleanup(c, s)
		},
	}
}

func cleanup(c *cli.Context, s values) (err error) {
	dryRun := c.Bool("dry-run")
	if !dryRun {
		release, err := lockWithin(c.Context, c.Duration("wait"), lockFile, "cleanup")
		if err != nil {
			return fmt.Errorf("%w; stop it first", err)
		}
		defer release()
	}
	p := &process{settings: s, sysctl: hostSettings()}
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
	if !dryRun {
		// Not news. A role that ends with --cleanup-on-exit leaves it to the next one.
		if gone := os.Remove(variantNote); gone != nil && !errors.Is(gone, fs.ErrNotExist) {
			err = errors.Join(err, gone)
		}
	}
	for _, line := range done {
		fmt.Fprintln(c.App.Writer, line)
	}
	if len(done) == 0 && err == nil {
		fmt.Fprintln(c.App.Writer, "nothing of Ravel's is here")
	}
	return err
}

// staysFree is how long the lock of a role that was seen to run must be free before a cleanup takes it: a role that is
// restarted is not one that has ended.
const staysFree = 10 * time.Second

// lockWithin takes the lock when it is free, and waits for that.
func lockWithin(ctx context.Context, wait time.Duration, path, role string) (release func(), err error) {
	release, err = lock(path, role)
	if err == nil || wait == 0 {
		return release, err
	}
	over, free := time.After(wait), time.Time{}
	for {
		select {
		case <-ctx.Done():
			return nil, err
		case <-over:
			return nil, err
		case <-time.After(200 * time.Millisecond):
		}
		release, busy := lock(path, role)
		switch {
		case busy != nil:
			free, err = time.Time{}, busy
			continue
		case free.IsZero():
			free = time.Now()
		case time.Since(free) >= staysFree:
			return release, nil
		}
		err = fmt.Errorf("what ran here ended less than %s ago, and may be restarted", staysFree)
		release()
	}
}

// awaitCleanup waits until a DaemonSet of cleanups has done its work on every node.
func awaitCleanup(c *cli.Context) error {
	client, namespace, name, err := namespaced(c, "await")
	if err != nil {
		return err
	}
	return client.AwaitDaemonSet(c.Context, namespace, name, func(progress string) {
		fmt.Fprintln(c.App.Writer, "clean:", progress)
	})
}

// cleanupTimeout bounds a removal.
const cleanupTimeout = time.Minute

// removal removes one kind of what is ours and returns what went, or with dryRun would go.
type removal func(ctx context.Context, dryRun bool) ([]string, error)

// cleanup removes what is ours: VIPs first, then what the roles made, then the guard, the sysctls and the files. It
// returns what went, or with dryRun would go.
func (p *process) cleanup(ctx context.Context, dryRun bool, roles ...removal) ([]string, error) {
	ctx, cancel := context.WithTimeout(ctx, cleanupTimeout)
	defer cancel()
	rest := slices.Concat(roles, []removal{
		p.guard.Cleanup,
		func(context.Context, bool) ([]string, error) { return p.sysctl.Restore(dryRun) },
		func(context.Context, bool) ([]string, error) { return removeFiles(dryRun, lockFile, p.settings) },
	})
	return remove(ctx, dryRun, p.links.Cleanup, rest...)
}

// remove takes the VIPs off the host and then removes the rest. While a VIP may be held nothing else goes: packets for
// it would meet the host's own sockets, without the guard or behind a service that is let through.
func remove(ctx context.Context, dryRun bool, links removal, rest ...removal) ([]string, error) {
	all, err := links(ctx, dryRun)
	if err != nil {
		return all, fmt.Errorf("the guard and all else stay, because VIPs may still be held, and this host's own programs "+
			"would answer for them: mend this and clean up again: %w", err)
	}
	var errs []error
	for _, step := range rest {
		done, err := step(ctx, dryRun)
		all = append(all, done...)
		errs = append(errs, err)
	}
	return all, errors.Join(errs...)
}

// removeFiles removes what processes that are gone left on the disk. The lock, which the caller holds, is no news.
func removeFiles(dryRun bool, lock string, s values) ([]string, error) {
	var done []string
	var errs []error
	gone := func(what, path string, kind fs.FileMode) {
		info, err := os.Lstat(path)
		switch {
		case path == "" || errors.Is(err, fs.ErrNotExist) || errors.Is(err, syscall.ENOTDIR):
			return
		case err == nil && info.Mode().Type() != kind:
			return // nothing that we make
		case err == nil && !dryRun:
			err = os.Remove(path)
		}
		if err != nil {
			errs = append(errs, fmt.Errorf("removing %s: %w", what, err))
			return
		}
		done = append(done, what+" "+path)
	}
	for _, role := range []ravel.Role{ravel.Director, ravel.Realserver} {
		gone("last good file", lastGood(s.stateDir, role), 0)
		gone("last good file", lastGoodFleet(s.stateDir, role), 0)
		gone("what the cluster told", lastCluster(s.stateDir, role), 0)
		gone("documents in force", inForce(s.stateDir, role), 0)
	}
	gone("the fleet's rosters", rosterFile(s.stateDir), 0)
	gone("socket", s.socket, fs.ModeSocket)
	if !dryRun {
		if err := os.Remove(lock); err != nil && !errors.Is(err, fs.ErrNotExist) {
			errs = append(errs, fmt.Errorf("removing the lock: %w", err))
		}
	}
	return done, errors.Join(errs...)
}
