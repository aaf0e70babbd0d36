package config

import (
	"context"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"
)

// keeping runs a File until the test ends, or stop is called, that keeps its last good content.
func keeping(t *testing.T, path, keep string) (w *watched, stop func()) {
	t.Helper()
	w = &watched{t: t, log: &logged{}, reg: prometheus.NewPedanticRegistry()}
	w.File = NewFile(path, slog.New(slog.NewTextHandler(w.log, nil)), w.reg)
	w.debounce, w.poll, w.Keep = 10*time.Millisecond, 20*time.Millisecond, keep
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- w.Run(ctx) }()
	stopped := false
	stop = func() {
		if stopped {
			return
		}
		stopped = true
		cancel()
		if err := <-done; err != nil {
			t.Errorf("Run: %v", err)
		}
	}
	t.Cleanup(stop)
	return w, stop
}

// staleMetric reads ravel_config_stale.
func (w *watched) staleMetric(want string) {
	w.t.Helper()
	text := "# HELP ravel_config_stale 1 while what the static file says is not wholly in force: it cannot be used, so that the last good one, if any, is; or it names a service that no endpoint names.\n" +
		"# TYPE ravel_config_stale gauge\nravel_config_stale " + want + "\n"
	if err := testutil.GatherAndCompare(w.reg, strings.NewReader(text), "ravel_config_stale"); err != nil {
		w.t.Error(err)
	}
}

// A process that starts while its file is bad or gone goes on where the one before it was.
func TestTheLastGoodContentOutlivesTheProcess(t *testing.T) {
	for name, spoil := range map[string]func(path string) error{
		"bad":       func(path string) error { return os.WriteFile(path, []byte("cluster: ["), 0o644) },
		"cut off":   func(path string) error { return os.Truncate(path, 10) },
		"gone":      os.Remove,
		"of others": func(path string) error { return os.WriteFile(path, []byte("apiVersion: v1"), 0o644) },
	} {
		t.Run(name, func(t *testing.T) {
			path, keep := filepath.Join(t.TempDir(), "static.yaml"), filepath.Join(t.TempDir(), "state", "last-good.yaml")
			put(t, path, document("1"))
			first, stop := keeping(t, path, keep)
			first.has(1)
			put(t, path, document("2"))
			first.has(2)
			first.until("kept", func() bool {
				b, err := os.ReadFile(keep)
				return err == nil && string(b) == document("2")
			})
			must(t, spoil(path))
			first.until("stale", func() bool { return first.Status().Fault != nil })
			stop()
			if info, err := os.Stat(keep); err != nil || info.Mode().Perm() != 0o600 {
				t.Fatalf("mode %v, %v; want 0600", info.Mode(), err)
			}
			if others, err := filepath.Glob(filepath.Dir(keep) + "/.*last*"); err != nil || len(others) > 0 {
				t.Errorf("left behind: %v, %v", others, err)
			}

			second, stop := keeping(t, path, keep)
			second.until("known", func() bool { _, known := second.Latest(); return known })
			if s, _ := second.Latest(); s.Fleet.ASN != 2 {
				t.Errorf("the value in force is %+v", s)
			}
			status := second.Status()
			if status.Fault == nil || !status.Kept || status.LoadedAt.IsZero() || status.Hash == "" {
				t.Errorf("status %+v", status)
			}
			second.staleMetric("1")
			second.until("logged", func() bool { return second.log.count("from an earlier process, is in force") == 1 })
			// The file as it was heals it, and so does another.
			put(t, path, document("2"))
			second.has(2)
			if second.Status().Kept {
				t.Error("the value is still said to be an earlier process's")
			}
			second.staleMetric("0")
			put(t, path, document("3"))
			second.has(3)
			stop()
		})
	}
}

func TestWithoutGoodContentNothingIsKnown(t *testing.T) {
	dir := t.TempDir()
	for name, content := range map[string]string{"nothing kept": "", "kept but bad": "cluster: [", "kept but cut off": document("1")[:12]} {
		t.Run(name, func(t *testing.T) {
			keep := filepath.Join(t.TempDir(), "last-good.yaml")
			if content != "" {
				put(t, keep, content)
			}
			w, _ := keeping(t, filepath.Join(dir, "static.yaml"), keep)
			w.until("refused", func() bool { return w.log.count("none was loaded before") == 1 })
			w.stale("no such file", 0)
			if w.Status().Kept {
				t.Errorf("status %+v", w.Status())
			}
		})
	}
}

// A good file is never overtaken by what was kept, not even for a moment.
func TestAGoodFileIsNotOvertakenByTheKeptOne(t *testing.T) {
	path, keep := filepath.Join(t.TempDir(), "static.yaml"), filepath.Join(t.TempDir(), "last-good.yaml")
	put(t, path, document("2"))
	put(t, keep, document("1"))
	w := NewFile(path, slog.New(slog.DiscardHandler), nil)
	w.Keep = keep
	changed := w.Changed()
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- w.Run(ctx) }()
	<-changed
	if s, _ := w.Latest(); s.Fleet.ASN != 2 {
		t.Errorf("first in force was %d", s.Fleet.ASN)
	}
	cancel()
	must(t, <-done)
}

// Content that cannot be kept is in force nevertheless, and is kept as soon as that can be done.
func TestAnUnwritableStateDirectoryIsNoFailure(t *testing.T) {
	dir := t.TempDir()
	path, inTheWay := filepath.Join(dir, "static.yaml"), filepath.Join(dir, "state")
	put(t, path, document("1"))
	put(t, inTheWay, "")
	w, _ := keeping(t, path, filepath.Join(inTheWay, "last-good.yaml"))
	w.has(1)
	w.until("a fault", func() bool { return w.Status().KeepFault != nil })
	put(t, path, document("2"))
	w.has(2)
	if n := w.log.count("cannot be kept"); n != 1 {
		t.Errorf("logged %d times", n)
	}
	must(t, os.Remove(inTheWay))
	w.until("kept", func() bool { return w.Status().KeepFault == nil })
	if b, err := os.ReadFile(filepath.Join(inTheWay, "last-good.yaml")); err != nil || string(b) != document("2") {
		t.Errorf("kept %q, %v", b, err)
	}
}
