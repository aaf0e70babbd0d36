package main

import (
	"context"
	"debug/buildinfo"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"

	"github.com/urfave/cli/v2"

	"github.com/ravel-lb/ravel/internal/iptables"
	"github.com/ravel-lb/ravel/internal/original"
)

// cleanupOriginal removes what the original Ravel left on this host, in both variants of iptables unless one is named.
// Ravel itself may run meanwhile.
func cleanupOriginal(c *cli.Context) error {
	var f faults
	f.read(c)
	variants := []iptables.Variant{iptables.NFT, iptables.Legacy}
	if v := f.oneOf(c, "iptables", "auto", string(iptables.NFT), string(iptables.Legacy)); v != "auto" {
		variants = []iptables.Variant{iptables.Variant(v)}
	}
	chain, dryRun := c.String("iptables-chain"), c.Bool("dry-run")
	if err := original.CheckChain(chain); err != nil {
		f.add("iptables-chain", "%v", err)
	}
	if err := f.err(); err != nil {
		return err
	}
	if err := mayChange(c.Command.Name); err != nil {
		return err
	}
	if err := besideOriginal("/proc"); err != nil {
		if !dryRun {
			return usageError{fmt.Errorf("%w; stop it first, for it would make all of this again", err)}
		}
		warnOf(c.App.ErrWriter, []string{err.Error()})
	}
	ctx, cancel := context.WithTimeout(c.Context, cleanupTimeout)
	defer cancel()
	done, left, err := removeOriginal(ctx, variants, chain, ravelRuns(lockFile), dryRun)
	for _, line := range done {
		fmt.Fprintln(c.App.Writer, line)
	}
	warnOf(c.App.ErrWriter, left)
	if len(done) == 0 && err == nil {
		fmt.Fprintln(c.App.Writer, "nothing of the original's is here")
	}
	return err
}

// removeOriginal removes the chains, so that no packet meets them, and then the links. What could not be looked at is
// returned in left, as long as one variant of iptables could. keep is for RemoveChains.
func removeOriginal(ctx context.Context, variants []iptables.Variant, chain string, keep, dryRun bool) (
	done, left []string, err error,
) {
	families := []iptables.Family{iptables.V4}
	if _, err := os.Stat("/proc/net/if_inet6"); err == nil {
		families = append(families, iptables.V6)
	}
	var errs []error
	looked := false
	for _, v := range variants {
		for _, family := range families {
			tables, err := iptables.Open(v, family)
			if err == nil {
				_, err = tables.Save(ctx, "nat")
			}
			if err != nil {
				if len(variants) == 1 || iptables.Locked(err) || ctx.Err() != nil {
					errs = append(errs, err)
				} else if !errors.Is(err, exec.ErrNotFound) {
					left = append(left, fmt.Sprintf("iptables-%s (%s) was not looked at: %v", v, family, err))
				}
				continue
			}
			looked = true
			lines, err := original.RemoveChains(ctx, tables, chain, keep, dryRun)
			done, errs = append(done, lines...), append(errs, err)
		}
	}
	if !looked && len(errs) == 0 {
		errs = append(errs, errors.New("no iptables could be read; its chains, if any, are as they were"))
	}
	lines, err := original.RemoveLinks(ctx, dryRun)
	return append(done, lines...), left, errors.Join(append(errs, err)...)
}

// ravelRuns reports whether a role of ours holds the lock.
func ravelRuns(path string) bool {
	f, err := os.Open(path)
	if err != nil {
		return !errors.Is(err, fs.ErrNotExist)
	}
	defer func() { _ = f.Close() }()
	return syscall.Flock(int(f.Fd()), syscall.LOCK_EX|syscall.LOCK_NB) != nil
}

// oldRoles are the subcommands of the original that change the kernel.
var oldRoles = []string{"bgp", "director", "realserver"}

// besideOriginal returns an error that names the original's processes in this network namespace. The two do not go
// together: it removes IPVS services, dummy links and RAVEL chains that it does not know.
func besideOriginal(proc string) error {
	dirs, err := os.ReadDir(proc)
	if err != nil {
		return nil // not known; a host without /proc has worse to tell
	}
	// Each network namespace has a file of its own there. The name of another's namespace may only be read by who has all
	// rights that the other has, which is not so in a sandbox.
	const links = "net/dev"
	own, err := os.Stat(filepath.Join(proc, "thread-self", links))
	if err != nil {
		return nil
	}
	var found []string
	for _, d := range dirs {
		pid, err := strconv.Atoi(d.Name())
		if err != nil || pid == os.Getpid() {
			continue
		}
		dir := filepath.Join(proc, d.Name())
		b, _ := os.ReadFile(filepath.Join(dir, "cmdline"))
		words := strings.Split(strings.TrimRight(string(b), "\x00"), "\x00")
		its, err := os.Stat(filepath.Join(dir, links))
		if err != nil || !os.SameFile(its, own) || !isOriginal(words, filepath.Join(dir, "exe")) {
			continue
		}
		found = append(found, fmt.Sprintf("process %d: %s", pid, strings.Join(words[:min(len(words), 4)], " ")))
	}
	if len(found) == 0 {
		return nil
	}
	return fmt.Errorf("the original Ravel runs here (%s), and removes services, links and chains that are not its own",
		strings.Join(found, "; "))
}

// module is the path of this program's module, by which its own processes are told from the original's.
const module = "github.com/ravel-lb/ravel"

// isOriginal reports whether words are the command line of the original's program in a role.
func isOriginal(words []string, exe string) bool {
	name := filepath.Base(words[0])
	inRole := slices.ContainsFunc(words[1:], func(w string) bool { return slices.Contains(oldRoles, w) })
	if name != "ravel" && name != oldProgram || !inRole {
		return false
	}
	info, err := buildinfo.ReadFile(exe)
	return err != nil || info.Main.Path != module
}
