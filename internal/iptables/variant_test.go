package iptables

import (
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/ravel-lb/ravel/internal/nettest"
)

func TestDetect(t *testing.T) {
	for _, c := range []struct {
		what, script string
		want         Variant
	}{
		{"hints in nft, more rules in legacy", `
			iptables-nft -t mangle -N KUBE-KUBELET-CANARY
			iptables-legacy -t filter -A INPUT -p tcp -j ACCEPT`, NFT},
		{"hints in legacy, more rules in nft", `
			ip6tables-legacy -t mangle -N KUBE-IPTABLES-HINT
			iptables-nft -A INPUT -p tcp -j ACCEPT`, Legacy},
		{"hints in both, more rules in legacy", `
			iptables-nft -t mangle -N KUBE-IPTABLES-HINT
			iptables-legacy -t mangle -N KUBE-IPTABLES-HINT
			iptables-legacy -A INPUT -p tcp -j ACCEPT`, Legacy},
		{"more rules in legacy", `iptables-legacy -A INPUT -p tcp -j ACCEPT`, Legacy},
		{"more rules in nft", `iptables-nft -A INPUT -p tcp -j ACCEPT`, NFT},
		{"our own rules do not count", `
			for v in legacy nft; do iptables-$v -N RAVEL-X; done
			for i in 1 2 3; do iptables-legacy -A RAVEL-X -p tcp -j ACCEPT; done
			iptables-legacy -A INPUT -j RAVEL-X
			iptables-nft -A INPUT -p tcp -j ACCEPT`, NFT},
		{"an earlier run's chain in nft, all else in legacy", `
			ip6tables-nft -t nat -N RAVEL
			iptables-legacy -t mangle -N KUBE-IPTABLES-HINT
			iptables-legacy -A INPUT -p tcp -j ACCEPT`, NFT},
		{"an earlier run's chain in legacy, all else in nft", `
			iptables-legacy -N RAVEL-GUARD
			iptables-nft -t mangle -N KUBE-IPTABLES-HINT
			iptables-nft -A INPUT -p tcp -j ACCEPT`, Legacy},
	} {
		t.Run(c.what, func(t *testing.T) {
			nettest.Need(t, nettest.NftNAT, nettest.LegacyNAT)
			nettest.InNetns(t, func() {
				nettest.Shell(t, c.script)
				if got, err := Detect(t.Context()); got != c.want || err != nil {
					t.Fatalf("got %q, %v; want %q", got, err, c.want)
				}
			})
		})
	}
}

// Where only one variant can do NAT, that is the one, whatever the plain iptables is and wherever the rules are.
func TestDetectNeedsNAT(t *testing.T) {
	nettest.Need(t, nettest.LegacyNAT)
	if nettest.Has(nettest.NftNAT) {
		if err := canNAT(t.Context(), NFT); err != nil {
			t.Fatalf("this kernel's nft can do NAT: %v", err)
		}
		return
	}
	nettest.InNetns(t, func() {
		if err := canNAT(t.Context(), NFT); err == nil {
			t.Fatal("this kernel's nft cannot do NAT")
		}
		if got, err := Detect(t.Context()); got != Legacy || err != nil {
			t.Fatalf("got %q, %v", got, err)
		}
	})
}

// Another program that holds the lock says nothing about what a variant can do, and is not waited for.
func TestDetectWhileTheLockIsHeld(t *testing.T) {
	nettest.Need(t, nettest.LegacyNAT)
	nettest.InNetns(t, func() {
		nettest.Shell(t, `iptables-legacy -A INPUT -p tcp -j ACCEPT`)
		defer nettest.HoldTables(t)()
		start := time.Now()
		if got, err := Detect(t.Context()); got != Legacy || err != nil {
			t.Fatalf("got %q, %v", got, err)
		}
		if took := time.Since(start); took > lockWait*time.Second {
			t.Fatalf("took %s", took)
		}
	})
}

// A program that knows no other lock file may meet the lock: that is tried again, and is no answer in the end.
func TestCanNATMeetsTheLock(t *testing.T) {
	nettest.Need(t, nettest.Root)
	const held = "echo Another app is currently holding the xtables lock. >&2; exit 4"
	for _, c := range []struct {
		what, script string
		can          bool
	}{
		{"once", "[ -e $0.again ] && exit 0; touch $0.again; " + held, true},
		{"always", held, true},
		{"the kernel's refusal has the same status", "echo RULE_APPEND failed: No such file or directory >&2; exit 4", false},
		{"another refusal", "echo unknown option >&2; exit 2", false},
	} {
		dir := t.TempDir()
		for _, name := range []string{"iptables-legacy", "ip6tables-legacy"} {
			must(t, os.WriteFile(filepath.Join(dir, name), []byte("#!/bin/sh\n"+c.script+"\n"), 0o755))
		}
		t.Setenv("PATH", dir+":"+os.Getenv("PATH"))
		if err := canNAT(t.Context(), Legacy); (err == nil) != c.can {
			t.Errorf("%s: %v", c.what, err)
		}
	}
}

func TestPrefer(t *testing.T) {
	for _, c := range []struct {
		nft, legacy seen
		want        Variant
	}{
		{seen{hints: 1}, seen{rules: 100}, NFT},
		{seen{rules: 100}, seen{hints: 1}, Legacy},
		{seen{hints: 1, rules: 1}, seen{hints: 2}, NFT},
		{seen{}, seen{rules: 1}, Legacy},
		{seen{ours: 1}, seen{hints: 1, rules: 9}, NFT},
		{seen{hints: 1, rules: 9}, seen{ours: 1}, Legacy},
		{seen{ours: 1}, seen{ours: 2, hints: 1}, Legacy},
	} {
		if got := prefer(c.nft, c.legacy); got != c.want {
			t.Errorf("nft %+v, legacy %+v: got %s, want %s", c.nft, c.legacy, got, c.want)
		}
	}
}
