package iptables

import (
	"context"
	"testing"
	"time"

	"github.com/ravel-lb/ravel/internal/nettest"
)

// A held lock costs no more time than the context gives, and Save needs no lock at all.
func TestHeldLock(t *testing.T) {
	nettest.Need(t, nettest.LegacyNAT)
	nettest.InNetns(t, func() {
		tables, err := Open(Legacy, V4)
		must(t, err)
		must(t, tables.EnsureChain(t.Context(), "filter", "RAVEL-X"))
		defer nettest.HoldTables(t)()
		for what, do := range map[string]func(context.Context) error{
			"reading rules": func(ctx context.Context) error { _, err := tables.Rules(ctx, "filter", "RAVEL-X"); return err },
			"adding a jump": func(ctx context.Context) error {
				return tables.EnsureFirst(ctx, "filter", "INPUT", []string{"-j", "RAVEL-X"})
			},
			"a transaction": func(ctx context.Context) error {
				return tables.Restore(ctx, "*filter\n-A RAVEL-X -p tcp -j RETURN\nCOMMIT\n")
			},
		} {
			ctx, cancel := context.WithTimeout(t.Context(), 1500*time.Millisecond)
			start := time.Now()
			err := do(ctx)
			cancel()
			if took := time.Since(start); err == nil || took > 4*time.Second {
				t.Errorf("%s with a context of 1.5 s: %v after %s", what, err, took)
			}
		}
		lines, err := tables.Save(t.Context(), "filter")
		if err != nil || len(lines) == 0 {
			t.Errorf("saving while the lock is held: %q, %v", lines, err)
		}
	})
}
