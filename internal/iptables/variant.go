package iptables

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"syscall"
	"time"

	goiptables "github.com/coreos/go-iptables/iptables"
)

// Variant says which of the kernel's two rule engines the iptables programs write to.
type Variant string

// The variants. Rules of one are not seen by the programs of the other; packets pass both.
const (
	NFT    Variant = "nft"    // nf_tables, by iptables-nft
	Legacy Variant = "legacy" // ip_tables, by iptables-legacy
)

// other returns the other variant.
func (v Variant) other() Variant {
	if v == NFT {
		return Legacy
	}
	return NFT
}

// Detect returns the variant that holds chains of ours, so that a restart never leaves the rules of an earlier run in the
// other; else the one that this node's other programs use: in which the kubelet or kube-proxy left its hint chains, else
// the one that holds more rules, else the one that the plain iptables program is. A variant that cannot do NAT here is
// never returned. It changes nothing, reads legacy tables only where the kernel holds some, and does not wait for the
// lock of other programs.
func Detect(ctx context.Context) (Variant, error) {
	first := prefer(look(ctx, NFT), look(ctx, Legacy))
	var faults []error
	for _, v := range []Variant{first, first.other()} {
		if err := canNAT(ctx, v); err != nil {
			faults = append(faults, err)
			continue
		}
		return v, nil
	}
	return "", fmt.Errorf("finding an iptables that can do NAT: %w", errors.Join(faults...))
}

// seen is what one variant's tables hold.
type seen struct {
	ours  int // chains of ours
	hints int // chains that Kubernetes makes to show which variant it uses
	rules int
}

// prefer picks the variant by what the tables hold.
func prefer(nft, legacy seen) Variant {
	switch {
	case nft.ours > 0 && legacy.ours == 0:
		return NFT
	case legacy.ours > 0 && nft.ours == 0:
		return Legacy
	case nft.hints > 0 && legacy.hints == 0:
		return NFT
	case legacy.hints > 0 && nft.hints == 0:
		return Legacy
	case nft.rules > legacy.rules:
		return NFT
	case legacy.rules > nft.rules:
		return Legacy
	}
	if plain, err := find("iptables"); err == nil {
		return plainVariant(plain)
	}
	return NFT
}

// look counts chains of ours, hint chains and rules of both families. What cannot be read holds nothing.
func look(ctx context.Context, v Variant) seen {
	var s seen
	for _, f := range []Family{V4, V6} {
		path, err := program(v, f, "-save")
		if err != nil {
			continue
		}
		tables := []string{""}
		if v == Legacy {
			tables, _ = legacyTables(f)
		}
		for _, table := range tables {
			var args []string
			if table != "" {
				args = []string{"-t", table}
			}
			var out string
			err := retry(ctx, func(ctx context.Context) (err error) {
				out, err = execute(ctx, "", path, args...)
				return err
			})
			if err == nil {
				s.count(out)
			}
		}
	}
	return s
}

// count reads the output of iptables-save.
func (s *seen) count(saved string) {
	for line := range strings.Lines(saved) {
		switch {
		case strings.HasPrefix(line, ":"+Prefix):
			s.ours++
		case strings.HasPrefix(line, ":KUBE-IPTABLES-HINT "), strings.HasPrefix(line, ":KUBE-KUBELET-CANARY "):
			s.hints++
		case strings.HasPrefix(line, "-A ") && !strings.HasPrefix(line, "-A "+Prefix) && !strings.Contains(line, "-j "+Prefix):
			s.rules++
		}
	}
}

// legacyTables returns the legacy tables that the kernel holds in this network namespace.
func legacyTables(f Family) ([]string, error) {
	name := "/proc/thread-self/net/ip_tables_names"
	if f == V6 {
		name = "/proc/thread-self/net/ip6_tables_names"
	}
	b, err := os.ReadFile(name)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("reading which %s tables the kernel holds: %w", f, err)
	}
	return strings.Fields(string(b)), nil
}

// plainVariant asks a program without a variant in its name which it is.
func plainVariant(path string) Variant {
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
	defer cancel()
	out, err := execute(ctx, "", path, "--version")
	if err != nil {
		return ""
	}
	if strings.Contains(out, "nf_tables") {
		return NFT
	}
	return Legacy
}

// Usable returns an error where a variant cannot do NAT in this kernel, as Detect finds out.
func Usable(ctx context.Context, v Variant) error {
	err := canNAT(ctx, v)
	if err == nil || canNAT(ctx, v.other()) != nil {
		return err
	}
	return fmt.Errorf("%w; set --iptables to %s, which can, or to auto", err, v.other())
}

// canNAT adds a DNAT rule in a network namespace that is thrown away at once. Where no namespace may be made, or another
// program keeps the lock, the answer is taken to be yes.
func canNAT(ctx context.Context, v Variant) error {
	for f, to := range map[Family]string{V4: "127.0.0.1:9", V6: "[::1]:9"} {
		if _, err := os.Stat("/proc/sys/net/ipv6"); f == V6 && err != nil {
			continue // a kernel without IPv6
		}
		path, err := program(v, f, "")
		if err != nil {
			return err
		}
		err = probe(ctx, path, "-w", strconv.Itoa(lockWait), "-t", "nat", "-A", "PREROUTING", "-p", "tcp", "--dport", "9",
			"-j", "DNAT", "--to-destination", to)
		if err != nil && !errors.Is(err, fs.ErrPermission) && !Locked(err) {
			return fmt.Errorf("%s cannot do NAT in this kernel: %w", path, err)
		}
	}
	return nil
}

// Locked reports whether a command failed for want of the lock, or of a moment in which nobody else changed the rules,
// alone. Its exit status does not say: iptables-nft has the same one for what the kernel does not know.
func Locked(err error) bool {
	var text string
	var own *CommandError
	var library *goiptables.Error
	switch {
	case errors.As(err, &own) && own.Status == resourceProblem:
		text = own.Stderr
	case errors.As(err, &library) && library.ExitStatus() == resourceProblem:
		text = library.Error()
	}
	return strings.Contains(text, "xtables lock") || strings.Contains(text, "Resource temporarily unavailable")
}

// probe runs a program in a network namespace of its own. The lock is one for all namespaces, so the probe gets another
// one, where the program lets it (iptables 1.8.6).
func probe(ctx context.Context, path string, args ...string) error {
	env := os.Environ()
	if f, err := os.CreateTemp("", "ravel-xtables-lock-"); err == nil {
		_ = f.Close()
		defer func() { _ = os.Remove(f.Name()) }()
		env = append(env, "XTABLES_LOCKFILE="+f.Name())
	}
	return retry(ctx, func(ctx context.Context) error {
		var stderr bytes.Buffer
		cmd := exec.CommandContext(ctx, path, args...)
		cmd.WaitDelay = time.Second
		cmd.Env, cmd.Stderr = env, &stderr
		cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNET}
		return commandError(ctx, cmd, cmd.Run(), &stderr)
	})
}
