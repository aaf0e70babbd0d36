package iptables

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"time"
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

// Detect returns the variant that this node's other programs use: the one in which the kubelet or kube-proxy left its
// hint chains, else the one that holds more rules, else the one that the plain iptables program is. A variant that
// cannot do NAT here is never returned. It changes nothing, and reads legacy tables only where the kernel holds some.
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
	hints int // chains that Kubernetes makes to show which variant it uses
	rules int
}

// prefer picks the variant by what the tables hold.
func prefer(nft, legacy seen) Variant {
	switch {
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

// look counts hint chains and rules of both families. What cannot be read holds nothing.
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
			if out, err := execute(ctx, "", path, args...); err == nil {
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

// canNAT adds a DNAT rule in a network namespace that is thrown away at once. Where no namespace may be made, the
// answer is taken to be yes.
func canNAT(ctx context.Context, v Variant) error {
	for f, to := range map[Family]string{V4: "127.0.0.1:9", V6: "[::1]:9"} {
		if _, err := os.Stat("/proc/sys/net/ipv6"); f == V6 && err != nil {
			continue // a kernel without IPv6
		}
		path, err := program(v, f, "")
		if err != nil {
			return err
		}
		ctx, cancel := context.WithTimeout(ctx, execTimeout)
		cmd := exec.CommandContext(ctx, path, "-w", "5", "-t", "nat", "-A", "PREROUTING", "-p", "tcp", "--dport", "9",
			"-j", "DNAT", "--to-destination", to)
		cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNET}
		out, err := cmd.CombinedOutput()
		cancel()
		if err != nil && !errors.Is(err, fs.ErrPermission) {
			return fmt.Errorf("%s cannot do NAT in this kernel: %w: %s", path, err, strings.Join(strings.Fields(string(out)), " "))
		}
	}
	return nil
}
