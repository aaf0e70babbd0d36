// Package iptables changes one family's iptables rules so that nothing but Ravel's own chains, and the jumps to them,
// is ever written: every change is a --noflush transaction or a single command that names a chain of ours, safe beside
// other programs that write the same tables.
//
// Chains of ours begin with Prefix. Packets see a transaction whole or not at all.
package iptables

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	goiptables "github.com/coreos/go-iptables/iptables"
)

// Prefix begins the name of every chain that is Ravel's.
const Prefix = "RAVEL"

// Family is the address family that a set of tables is for.
type Family uint8

// The two families. Their tables are apart in the kernel and have programs of their own.
const (
	V4 Family = 4
	V6 Family = 6
)

// FamilyOf returns the family of an address.
func FamilyOf(a netip.Addr) Family {
	if a.Is4() {
		return V4
	}
	return V6
}

// String returns "ipv4" or "ipv6".
func (f Family) String() string { return fmt.Sprintf("ipv%d", uint8(f)) }

// command is the base name of the family's programs.
func (f Family) command() string {
	if f == V6 {
		return "ip6tables"
	}
	return "iptables"
}

const (
	execTimeout = 30 * time.Second // for one command, with all its tries
	lockWait    = 5                // seconds that one try waits for the xtables lock, if the context leaves them
	tries       = 6
	firstPause  = 20 * time.Millisecond // before the second try; doubles
)

// Tables are one family's tables. Its methods are safe for use by many goroutines; each command that they run is bounded
// by the context and by 30 s, also while another program holds the xtables lock. Save waits for no lock.
type Tables struct {
	family  Family
	variant Variant
	ipt     *goiptables.IPTables
	hasty   *goiptables.IPTables // waits just a second for the lock
	restore string               // paths of the programs
	save    string
}

// Open finds the programs of one variant and family. The error names what is missing and the package that holds it.
func Open(v Variant, f Family) (*Tables, error) {
	t := &Tables{family: f, variant: v}
	main, err := program(v, f, "")
	if err != nil {
		return nil, err
	}
	if t.restore, err = program(v, f, "-restore"); err != nil {
		return nil, err
	}
	if t.save, err = program(v, f, "-save"); err != nil {
		return nil, err
	}
	proto := goiptables.ProtocolIPv4
	if f == V6 {
		proto = goiptables.ProtocolIPv6
	}
	for wait, ipt := range map[int]**goiptables.IPTables{lockWait: &t.ipt, 1: &t.hasty} {
		*ipt, err = goiptables.New(goiptables.IPFamily(proto), goiptables.Path(main), goiptables.Timeout(wait))
		if err != nil {
			return nil, fmt.Errorf("asking %s for its version: %w", main, err)
		}
	}
	return t, nil
}

// Family returns the family that the tables are for.
func (t *Tables) Family() Family { return t.family }

// Variant returns the variant that the tables are of.
func (t *Tables) Variant() Variant { return t.variant }

// Restore feeds input, in the words of iptables-save, to iptables-restore --noflush: each table in it changes in one
// transaction. A chain that input declares (":RAVEL-X - [0:0]") is emptied first. Input that names a chain that is not
// ours is refused, unless the rule jumps to one that is. An error quotes the line that the kernel or the program did
// not take.
func (t *Tables) Restore(ctx context.Context, input string) error {
	return t.RestoreOf(ctx, input, ours)
}

// RestoreOf is Restore for chains that are ours by another proof than their name, as those of a program that Ravel takes
// the place of: owned says which.
func (t *Tables) RestoreOf(ctx context.Context, input string, owned func(chain string) bool) error {
	if err := checkOurs(input, owned); err != nil {
		return fmt.Errorf("refusing %s-restore input: %w", t.family.command(), err)
	}
	_, err := t.run(ctx, input, t.restore, "--noflush", "-w", strconv.Itoa(waitFor(ctx)))
	var failed *CommandError
	if errors.As(err, &failed) {
		failed.Line = failedLine(failed.Stderr, input)
	}
	return err
}

// Save returns the lines of iptables-save for one table, chains and rules without counters of rules. A table that the
// kernel does not hold has none.
func (t *Tables) Save(ctx context.Context, table string) ([]string, error) {
	if there, err := t.holds(table); err != nil || !there {
		return nil, err
	}
	out, err := t.run(ctx, "", t.save, "-t", table)
	if err != nil {
		return nil, err
	}
	return strings.Split(strings.TrimSuffix(out, "\n"), "\n"), nil
}

// Chains returns the chains of one table, the kernel's own ones first.
func (t *Tables) Chains(ctx context.Context, table string) ([]string, error) {
	if there, err := t.holds(table); err != nil || !there {
		return nil, err
	}
	var chains []string
	err := t.try(ctx, func(ipt *goiptables.IPTables) (err error) {
		chains, err = ipt.ListChains(table)
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("listing the chains of %s %s: %w", t.family, table, err)
	}
	return chains, nil
}

// Rules returns the rules of one chain as "iptables -S" prints them ("-A CHAIN …"), in order. A chain that is not
// there has none.
func (t *Tables) Rules(ctx context.Context, table, chain string) ([]string, error) {
	if there, err := t.holds(table); err != nil || !there {
		return nil, err
	}
	var lines []string
	err := t.try(ctx, func(ipt *goiptables.IPTables) (err error) {
		lines, err = ipt.List(table, chain)
		return err
	})
	if Busy(err) {
		return nil, fmt.Errorf("listing %s %s %s: %w", t.family, table, chain, err)
	}
	if err != nil {
		// The programs have several words for a chain that is not there; iptables-nft even says "incompatible".
		chains, listErr := t.Chains(ctx, table)
		if listErr != nil || slices.Contains(chains, chain) {
			return nil, fmt.Errorf("listing %s %s %s: %w", t.family, table, chain, err)
		}
		return nil, nil
	}
	return slices.DeleteFunc(lines, func(l string) bool { return !strings.HasPrefix(l, "-A ") }), nil
}

// EnsureChain makes an empty chain of ours unless it is there.
func (t *Tables) EnsureChain(ctx context.Context, table, chain string) error {
	if !ours(chain) {
		return fmt.Errorf("chain %s is not ours: want a name that begins with %s", chain, Prefix)
	}
	err := t.try(ctx, func(ipt *goiptables.IPTables) error {
		there, err := ipt.ChainExists(table, chain)
		if err != nil || there {
			return err
		}
		if err := ipt.NewChain(table, chain); err != nil {
			if there, _ := ipt.ChainExists(table, chain); there {
				return nil
			}
			return err
		}
		return nil
	})
	if err != nil {
		return fmt.Errorf("making %s %s %s: %w", t.family, table, chain, err)
	}
	return nil
}

// holds reports whether the table is there to be read. Reading a legacy table makes it, and loads modules, so that is
// asked of /proc first.
func (t *Tables) holds(table string) (bool, error) {
	if t.variant != Legacy {
		return true, nil
	}
	names, err := legacyTables(t.family)
	return slices.Contains(names, table), err
}

// CommandError says which command failed and why.
type CommandError struct {
	Command string // with its arguments
	Status  int    // its exit status; -1 if it was killed or did not start
	Stderr  string
	Line    string // iptables-restore only: the line that was not taken, if it is known
	err     error
}

// Error returns all of it on one line.
func (e *CommandError) Error() string {
	s := fmt.Sprintf("%s: %v", e.Command, e.err)
	if text := causes(e.Stderr); text != "" {
		s += ": " + text
	}
	if e.Line != "" {
		s += fmt.Sprintf(" (the line %q)", e.Line)
	}
	return s
}

// What is told of standard error: the causes that differ, as far as a line has room.
const (
	maxCauses = 2
	maxCause  = 150 // bytes
)

// lineNumber begins what iptables-nft-restore says of a line.
var lineNumber = regexp.MustCompile(`^line \d+: `)

// causes makes one line of what a program said: iptables-restore has one for each thing that it was to add, with the
// same cause each.
func causes(stderr string) string {
	var said []string
	left := 0
	for line := range strings.Lines(stderr) {
		line = lineNumber.ReplaceAllString(strings.Join(strings.Fields(line), " "), "")
		switch {
		case line == "" || strings.HasSuffix(line, "(nf_tables):") || slices.Contains(said, line):
		case len(said) == maxCauses:
			left++
		default:
			said = append(said, line[:min(len(line), maxCause)])
		}
	}
	text := strings.Join(said, "; ")
	if left > 0 {
		text += fmt.Sprintf(" (and %d lines more)", left)
	}
	return strings.ToValidUTF8(text, "")
}

// Unwrap returns what ended the command.
func (e *CommandError) Unwrap() error { return e.err }

// run runs a program, again if the fault is a passing one, and returns its standard output.
func (t *Tables) run(ctx context.Context, input, name string, args ...string) (string, error) {
	var out string
	err := t.try(ctx, func(*goiptables.IPTables) (err error) {
		out, err = execute(ctx, input, name, args...)
		return err
	})
	return out, err
}

// execute runs a program once.
func execute(ctx context.Context, input, name string, args ...string) (string, error) {
	ctx, cancel := context.WithTimeout(ctx, execTimeout)
	defer cancel()
	cmd := exec.CommandContext(ctx, name, args...)
	cmd.WaitDelay = time.Second
	var out, stderr bytes.Buffer
	cmd.Stdin, cmd.Stdout, cmd.Stderr = strings.NewReader(input), &out, &stderr
	if err := commandError(ctx, cmd, cmd.Run(), &stderr); err != nil {
		return "", err
	}
	return out.String(), nil
}

// commandError tells of a command that ended with err, nil if that is nil.
func commandError(ctx context.Context, cmd *exec.Cmd, err error, stderr *bytes.Buffer) error {
	if err == nil {
		return nil
	}
	failed := &CommandError{
		Command: filepath.Base(cmd.Path) + " " + strings.Join(cmd.Args[1:], " "),
		Status:  -1, Stderr: stderr.String(), err: err,
	}
	if cmd.ProcessState != nil {
		failed.Status = cmd.ProcessState.ExitCode()
	}
	if ctx.Err() != nil {
		failed.err = ctx.Err()
	}
	return failed
}

// waitFor returns how many seconds a command may wait for the lock: the programs know no shorter time than one.
func waitFor(ctx context.Context) int {
	if due, bounded := ctx.Deadline(); bounded && time.Until(due) < lockWait*time.Second {
		return 1
	}
	return lockWait
}

// try is retry with the library's door to this family. go-iptables takes no context: its commands are bounded by their
// own wait for the lock, which is as long as the context has room for.
func (t *Tables) try(ctx context.Context, fn func(ipt *goiptables.IPTables) error) error {
	return retry(ctx, func(ctx context.Context) error {
		if waitFor(ctx) < lockWait {
			return fn(t.hasty)
		}
		return fn(t.ipt)
	})
}

// retry calls fn until it is done, or fails for good, or the time is up; then it returns the last fault.
func retry(ctx context.Context, fn func(context.Context) error) error {
	ctx, cancel := context.WithTimeout(ctx, execTimeout)
	defer cancel()
	if err := ctx.Err(); err != nil {
		return err
	}
	pause := firstPause
	for n := 1; ; n++ {
		err := fn(ctx)
		if err == nil || n == tries || !Busy(err) {
			return err
		}
		select {
		case <-ctx.Done():
			return err
		case <-time.After(pause):
			pause *= 2
		}
		if ctx.Err() != nil {
			return err
		}
	}
}

// resourceProblem is the exit status of iptables for a lock or kernel resource that it did not get.
const resourceProblem = 4

// Busy reports whether the same command may succeed in a moment: another program holds the lock, or the kernel's rules
// changed while iptables-nft worked.
func Busy(err error) bool {
	var library *goiptables.Error
	if errors.As(err, &library) {
		return library.ExitStatus() == resourceProblem || strings.Contains(library.Error(), "Resource temporarily unavailable")
	}
	var own *CommandError
	return errors.As(err, &own) &&
		(own.Status == resourceProblem || strings.Contains(own.Stderr, "Resource temporarily unavailable"))
}

// program finds one of the programs of a variant: under its own name, or under the plain one where that is the variant.
func program(v Variant, f Family, part string) (string, error) {
	name := f.command() + "-" + string(v) + part
	if path, err := find(name); err == nil {
		return path, nil
	}
	if plain, err := find(f.command() + part); err == nil && plainVariant(plain) == v {
		return plain, nil
	}
	return "", fmt.Errorf("%s is missing: install the package that holds it (Debian, Ubuntu, Fedora: iptables; RHEL: iptables-nft; Alpine: iptables, iptables-legacy): %w",
		name, exec.ErrNotFound)
}

// find looks for a program in PATH and then where administrators' programs are: services often run without the latter.
func find(name string) (string, error) {
	path, err := exec.LookPath(name)
	if err == nil {
		return path, nil
	}
	for _, dir := range []string{"/usr/sbin", "/sbin", "/usr/local/sbin"} {
		full := filepath.Join(dir, name)
		if info, statErr := os.Stat(full); statErr == nil && info.Mode().IsRegular() && info.Mode()&0o111 != 0 {
			return full, nil
		}
	}
	return "", err
}
