// Package clustertest starts a cluster for a test.
package clustertest

import (
	"path/filepath"
	"testing"

	"github.com/ravel-lb/ravel/lab/cluster"
)

// Start starts a cluster on this machine, which ends with the test. top is the checkout; Options.Binary is not asked.
func Start(t testing.TB, top string, opts cluster.Options) *cluster.Cluster {
	t.Helper()
	var err error
	if opts.Binary, err = cluster.Build(t.Context(), top); err != nil {
		t.Fatal(err)
	}
	c, err := cluster.Start(t.Context(), filepath.Join(t.TempDir(), "cluster"), opts)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := c.Stop(); err != nil {
			t.Error(err)
		}
	})
	return c
}
