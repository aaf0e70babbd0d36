package config

import (
	"bytes"
	"context"
	"errors"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"

	"github.com/ravel-lb/ravel/internal/config/doc"
)

// document is a good one; asn makes them differ.
func document(asn string) string { return static("", "{asn: "+asn+"}", "", "") }

// logged is a log that a test can read while it is written.
type logged struct {
	mu sync.Mutex // guards the field below
	b  bytes.Buffer
}

func (l *logged) Write(b []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(b)
}

func (l *logged) count(s string) int {
	l.mu.Lock()
	defer l.mu.Unlock()
	return strings.Count(l.b.String(), s)
}

// watched is a File that runs until the test ends.
type watched struct {
	*File
	t   *testing.T
	log *logged
	reg *prometheus.Registry
}

func watchFile(t *testing.T, path string, poll time.Duration) *watched {
	t.Helper()
	w := &watched{t: t, log: &logged{}, reg: prometheus.NewPedanticRegistry()}
	w.File = NewFile(path, slog.New(slog.NewTextHandler(w.log, nil)), w.reg)
	w.debounce, w.poll = 10*time.Millisecond, poll
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error)
	go func() { done <- w.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("Run: %v", err)
		}
		if t.Failed() {
			t.Log(w.log.b.String())
		}
	})
	return w
}

// until waits for something to come true.
func (w *watched) until(what string, is func() bool) {
	w.t.Helper()
	for deadline := time.Now().Add(10 * time.Second); !is(); time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			w.t.Fatalf("never %s; status %+v", what, w.Status())
		}
	}
}

// has waits until the value in force is the document with this AS number, and is not stale.
func (w *watched) has(asn uint32) {
	w.t.Helper()
	w.until("the new value", func() bool {
		s, ok := w.Latest()
		return ok && s.Fleet.ASN == asn && w.Status().Fault == nil
	})
}

// stale waits until the file is refused for a reason, and checks that the value in force is still the one of asn.
func (w *watched) stale(why string, asn uint32) {
	w.t.Helper()
	w.until("refused because of "+why, func() bool {
		fault := w.Status().Fault
		return fault != nil && strings.Contains(fault.Error(), why)
	})
	if s, known := w.Latest(); known != (asn != 0) || s.Fleet.ASN != asn {
		w.t.Fatalf("the value in force is %+v, %v", s, known)
	}
	if e := (*Error)(nil); !errors.As(w.Status().Fault, &e) || len(e.Faults) == 0 {
		w.t.Fatalf("no *Error in %v", w.Status().Fault)
	}
}

func put(t *testing.T, path, content string) {
	t.Helper()
	if err := os.WriteFile(path, []byte(content), 0o644); err != nil {
		t.Fatal(err)
	}
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// swap puts a file in place as editors do.
func swap(t *testing.T, path, content string) {
	t.Helper()
	put(t, path+".new", content)
	must(t, os.Rename(path+".new", path))
}

// never is a poll that no test lives to see: changes must be seen by events.
const never = time.Hour

func TestFileFollowsChanges(t *testing.T) {
	path := filepath.Join(t.TempDir(), "static.yaml")
	put(t, path, document("1"))
	w := watchFile(t, path, never)
	w.has(1)

	changed := w.Changed()
	put(t, path, document("2"))
	w.has(2)
	select {
	case <-changed:
	default:
		t.Error("the change was not signalled")
	}

	swap(t, path, document("3"))
	w.has(3)

	// Half of a file, then the rest.
	half := strings.Index(document("4"), "fleet")
	put(t, path, document("4")[:half])
	w.stale("fleet is missing", 3)
	f, err := os.OpenFile(path, os.O_APPEND|os.O_WRONLY, 0)
	must(t, err)
	_, err = f.WriteString(document("4")[half:])
	must(t, err)
	must(t, f.Close())
	w.has(4)

	// It vanishes and returns.
	must(t, os.Remove(path))
	w.stale("no such file", 4)
	if !errors.Is(w.Status().Fault, fs.ErrNotExist) {
		t.Errorf("%v is not ErrNotExist", w.Status().Fault)
	}
	put(t, path, document("5"))
	w.has(5)

	// Its directory vanishes and returns.
	must(t, os.RemoveAll(filepath.Dir(path)))
	w.stale("no such file", 5)
	must(t, os.Mkdir(filepath.Dir(path), 0o755))
	put(t, path, document("6"))
	w.has(6)

	// Another directory takes the place of its own.
	other := t.TempDir()
	put(t, filepath.Join(other, "static.yaml"), document("7"))
	must(t, os.Rename(filepath.Dir(path), filepath.Dir(path)+".old"))
	must(t, os.Rename(other, filepath.Dir(path)))
	w.has(7)
	put(t, path, document("8"))
	w.has(8)

	// A directory takes its own place.
	must(t, os.Remove(path))
	must(t, os.Mkdir(path, 0o755))
	w.stale("is a directory", 8)
	must(t, os.Remove(path))

	// A pipe, that nobody writes to, must not stop anything.
	must(t, syscall.Mkfifo(path, 0o644))
	w.stale("not a regular file", 8)
	swap(t, path, document("9"))
	w.has(9)
}

func TestFileBehindLinksOfKubernetes(t *testing.T) {
	dir := t.TempDir()
	version := func(name, content string) {
		t.Helper()
		must(t, os.Mkdir(filepath.Join(dir, name), 0o755))
		put(t, filepath.Join(dir, name, "static.yaml"), content)
		must(t, os.Symlink(name, filepath.Join(dir, "..data_tmp")))
		must(t, os.Rename(filepath.Join(dir, "..data_tmp"), filepath.Join(dir, "..data")))
	}
	version("..2026_01", document("1"))
	must(t, os.Symlink(filepath.Join("..data", "static.yaml"), filepath.Join(dir, "static.yaml")))
	w := watchFile(t, filepath.Join(dir, "static.yaml"), never)
	w.has(1)
	version("..2026_02", document("2"))
	must(t, os.RemoveAll(filepath.Join(dir, "..2026_01")))
	w.has(2)
	version("..2026_03", "cluster: [")
	must(t, os.RemoveAll(filepath.Join(dir, "..2026_02")))
	w.stale("syntax error", 2)
	version("..2026_04", document("4"))
	w.has(4)
}

func TestFileBehindLinksToOtherDirectories(t *testing.T) {
	there, here := t.TempDir(), t.TempDir()
	must(t, os.Mkdir(filepath.Join(there, "a"), 0o755))
	put(t, filepath.Join(there, "real.yaml"), document("1"))
	must(t, os.Symlink("../real.yaml", filepath.Join(there, "a", "static.yaml")))
	must(t, os.Symlink(filepath.Join(there, "a"), filepath.Join(here, "etc")))
	w := watchFile(t, filepath.Join(here, "etc", "static.yaml"), never)
	w.has(1)
	swap(t, filepath.Join(there, "real.yaml"), document("2"))
	w.has(2)
	must(t, os.Mkdir(filepath.Join(there, "b"), 0o755))
	put(t, filepath.Join(there, "b", "static.yaml"), document("3"))
	must(t, os.Symlink(filepath.Join(there, "b"), filepath.Join(here, "new")))
	must(t, os.Rename(filepath.Join(here, "new"), filepath.Join(here, "etc")))
	w.has(3)
}

func TestFileStartsBad(t *testing.T) {
	path := filepath.Join(t.TempDir(), "not", "yet", "static.yaml")
	w := watchFile(t, path, never)
	w.stale("no such file", 0)
	if w.log.count("none was loaded before") != 1 {
		t.Error("the log does not say that nothing is known")
	}
	must(t, os.MkdirAll(filepath.Dir(path), 0o755))
	put(t, path, "")
	w.stale("is empty", 0)
	put(t, path, document("1"))
	w.has(1)
}

func TestFileIsPolledWithoutEvents(t *testing.T) {
	path := filepath.Join(t.TempDir(), "static.yaml")
	put(t, path, document("1"))
	// Of a change by way of another name of the same file the directory tells nothing.
	alias := filepath.Join(t.TempDir(), "alias.yaml")
	must(t, os.Link(path, alias))
	w := watchFile(t, path, 20*time.Millisecond)
	w.has(1)
	put(t, alias, document("2"))
	w.has(2)
}

func TestFileTellsEachThingOnce(t *testing.T) {
	path := filepath.Join(t.TempDir(), "static.yaml")
	warns := static("{config: {}, mtuConfig: {192.0.2.1: 1500}}", "{asn: 1}", "", "")
	put(t, path, warns)
	w := watchFile(t, path, time.Millisecond)
	w.has(1)
	changed := w.Changed()

	swap(t, path, "cluster: 7")
	w.stale("want a mapping, got 7", 1)
	hash := w.Status().Hash
	// Other content, same fault; then another fault; then the same bytes as in the beginning.
	swap(t, path, "cluster: 7\nfleet: {}\nnodes: []\nendpoints: []\n")
	w.until("another fault", func() bool { return !strings.Contains(w.Status().Fault.Error(), "fleet is missing") })
	swap(t, path, warns)
	w.has(1)
	if w.Status().Hash != hash {
		t.Error("the same bytes have another hash")
	}
	select {
	case <-changed:
		t.Error("the same bytes were signalled as a change")
	default:
	}
	swap(t, path, warns+"# changed\n")
	// What is logged follows what is told.
	w.until("another hash", func() bool { return w.Status().Hash != hash && w.log.count("msg=loaded") > 1 })
	for text, times := range map[string]int{
		"want a mapping, got 7": 2, "the last good one stays in force": 2, "the file is good again": 1,
		"no service has this VIP by TCP": 1, "msg=loaded": 2,
	} {
		if n := w.log.count(text); n != times {
			t.Errorf("%q was logged %d times, want %d", text, n, times)
		}
	}
}

func TestFileMetrics(t *testing.T) {
	path := filepath.Join(t.TempDir(), "static.yaml")
	w := watchFile(t, path, never)
	w.stale("no such file", 0)
	want := func(stale, failures, warnings, unknown string) {
		t.Helper()
		must(t, testutil.GatherAndCompare(w.reg, strings.NewReader(`
# HELP ravel_config_load_failures_total Contents of the static file that could not be used, each counted when it was first seen.
# TYPE ravel_config_load_failures_total counter
ravel_config_load_failures_total `+failures+`
# HELP ravel_config_stale 1 while what the static file says is not wholly in force: it cannot be used, so that the last good one, if any, is; or it names a service that no endpoint names.
# TYPE ravel_config_stale gauge
ravel_config_stale `+stale+`
# HELP ravel_config_unknown_services Services of the static file in force that no endpoint names.
# TYPE ravel_config_unknown_services gauge
ravel_config_unknown_services `+unknown+`
# HELP ravel_config_warnings Parts of the static file in force that were left out or mean less than they seem to.
# TYPE ravel_config_warnings gauge
ravel_config_warnings `+warnings+`
`), "ravel_config_load_failures_total", "ravel_config_stale", "ravel_config_unknown_services", "ravel_config_warnings"))
	}
	want("1", "1", "0", "0")
	put(t, path, static("{config: {192.0.2.1: {80: {namespace: a, service: b, tcpEnabled: true, x: y}}}}", "{asn: 1}", "", ""))
	w.has(1)
	want("1", "1", "1", "1")
	if at := w.Status().LoadedAt; time.Since(at) > time.Minute {
		t.Errorf("loaded at %v", at)
	}
	put(t, path, "")
	w.stale("is empty", 1)
	want("1", "2", "1", "1")
	if n, err := testutil.GatherAndCount(w.reg); err != nil || n != 5 {
		t.Errorf("%d metrics, %v", n, err)
	}
}

// A busy directory must not keep a changed file from being read.
func TestFileInABusyDirectory(t *testing.T) {
	path := filepath.Join(t.TempDir(), "static.yaml")
	put(t, path, document("1"))
	w := watchFile(t, path, never)
	w.has(1)
	put(t, path, document("2"))
	w.until("read", func() bool {
		put(t, filepath.Join(filepath.Dir(path), "busy"), "x")
		s, _ := w.Latest()
		return s.Fleet.ASN == 2
	})
}

func TestLoad(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "static.yaml")
	want := func(why string) {
		t.Helper()
		_, err := Load(path)
		var e *Error
		if err == nil || err.Error() != why || !errors.As(err, &e) {
			t.Errorf("got %v, want %s", err, why)
		}
	}
	want(path + ": reading the file: no such file or directory")
	f, err := os.Create(path)
	must(t, err)
	must(t, f.Truncate(doc.MaxSize+1))
	must(t, f.Close())
	want(path + ": reading the file: is larger than 16 MiB")
	must(t, os.Truncate(path, 0))
	want("document: is empty")
	put(t, path, document("7"))
	if s, err := Load(path); err != nil || s.Fleet.ASN != 7 {
		t.Errorf("got %+v, %v", s, err)
	}
	path = dir
	want(path + ": reading the file: is a directory")
}
