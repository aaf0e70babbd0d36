package systemd

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync/atomic"
	"testing"
	"time"
)

// manager is a service manager's socket.
type manager struct {
	t    *testing.T
	conn *net.UnixConn
}

// listen makes a manager of a name, which the environment then has.
func listen(t *testing.T, name string) *manager {
	t.Helper()
	conn, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: name, Net: "unixgram"})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close() })
	t.Setenv("NOTIFY_SOCKET", name)
	t.Setenv("WATCHDOG_USEC", "")
	t.Setenv("WATCHDOG_PID", "")
	return &manager{t, conn}
}

// hears returns the next datagram that is not skipped, and "" if none comes within a time.
func (m *manager) hears(within time.Duration, skip ...string) string {
	m.t.Helper()
	if err := m.conn.SetReadDeadline(time.Now().Add(within)); err != nil {
		m.t.Fatal(err)
	}
	b := make([]byte, 4096)
next:
	for {
		n, err := m.conn.Read(b)
		if errors.Is(err, os.ErrDeadlineExceeded) {
			return ""
		}
		if err != nil {
			m.t.Fatal(err)
		}
		for _, s := range skip {
			if string(b[:n]) == s {
				continue next
			}
		}
		return string(b[:n])
	}
}

func (m *manager) wants(want string, skip ...string) {
	m.t.Helper()
	if got := m.hears(10*time.Second, skip...); got != want {
		m.t.Fatalf("heard %q, want %q", got, want)
	}
}

func open(t *testing.T) *Manager {
	t.Helper()
	m, err := Open()
	if err != nil || m == nil {
		t.Fatalf("Open: %v, %v", m, err)
	}
	return m
}

// start runs m until the test ends, or stop is called; the other channel is for a planned stop.
func start(t *testing.T, m *Manager, p Process) (stopping chan struct{}, stop func()) {
	t.Helper()
	p.Log = slog.New(slog.DiscardHandler)
	stopping = make(chan struct{})
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan struct{})
	go func() { defer close(ended); m.Run(ctx, stopping, p) }()
	stop = func() { cancel(); <-ended }
	t.Cleanup(stop)
	return stopping, stop
}

func well() error { return nil }

func abstract(t *testing.T) string {
	return fmt.Sprintf("@ravel-test/%d/%s", os.Getpid(), t.Name())
}

func TestWhatAProcessTells(t *testing.T) {
	for kind, name := range map[string]string{"path": filepath.Join(t.TempDir(), "notify"), "abstract": abstract(t)} {
		t.Run(kind, func(t *testing.T) {
			manager := listen(t, name)
			m := open(t)
			for _, left := range []string{"NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID"} {
				if value, there := os.LookupEnv(left); there {
					t.Errorf("programs that it runs get %s=%s", left, value)
				}
			}
			type status struct {
				line string
				done bool
			}
			var now atomic.Pointer[status]
			now.Store(&status{"nothing is applied yet", false})
			stopping, stop := start(t, m, Process{
				Healthy: well, ReadyWithin: time.Hour, Every: time.Millisecond,
				Status: func() (string, bool) { s := now.Load(); return s.line, s.done },
			})
			manager.wants("STATUS=nothing is applied yet")
			if said := manager.hears(50 * time.Millisecond); said != "" {
				t.Errorf("said again: %q", said)
			}
			now.Store(&status{"one\ntwo", true})
			manager.wants("READY=1\nSTATUS=one; two")
			// Ready once is ready.
			now.Store(&status{"no BGP session is up", false})
			manager.wants("STATUS=no BGP session is up")
			close(stopping)
			manager.wants("STOPPING=1\nSTATUS=stopping")
			stop()
			if said := manager.hears(20 * time.Millisecond); said != "" {
				t.Errorf("said after the end: %q", said)
			}
		})
	}
}

// The start of a process that waits for something is over after a time, so that nobody kills it for waiting.
func TestTheStartEndsInAnyCase(t *testing.T) {
	manager := listen(t, abstract(t))
	began := time.Now()
	start(t, open(t), Process{
		Healthy: well, ReadyWithin: 200 * time.Millisecond, Every: time.Millisecond,
		Status: func() (string, bool) { return "the API server is away", false },
	})
	manager.wants("STATUS=the API server is away")
	manager.wants("READY=1")
	if took := time.Since(began); took < 200*time.Millisecond {
		t.Errorf("ready after %s", took)
	}
}

func TestSignsOfLife(t *testing.T) {
	manager := listen(t, abstract(t))
	t.Setenv("WATCHDOG_USEC", "40000")
	t.Setenv("WATCHDOG_PID", strconv.Itoa(os.Getpid()))
	var sick atomic.Bool
	block := make(chan struct{})
	stopping, stop := start(t, open(t), Process{
		ReadyWithin: time.Hour,
		Healthy: func() error {
			if sick.Load() {
				return errors.New("the last walk ended an hour ago")
			}
			return nil
		},
		// A status that never comes is not what the watchdog is for.
		Status: func() (string, bool) { <-block; return "well", true },
	})
	for range 5 {
		manager.wants("WATCHDOG=1")
	}
	sick.Store(true)
	manager.hears(30 * time.Millisecond) // one may be on its way
	if said := manager.hears(150 * time.Millisecond); said != "" {
		t.Errorf("a process that does no work said %q", said)
	}
	sick.Store(false)
	manager.wants("WATCHDOG=1")
	close(block)
	manager.wants("READY=1\nSTATUS=well", "WATCHDOG=1")
	// A stop takes its time; it is not to be shot meanwhile.
	close(stopping)
	manager.wants("STOPPING=1\nSTATUS=stopping", "WATCHDOG=1")
	manager.wants("WATCHDOG=1")
	stop()
}

func TestNobodyToTell(t *testing.T) {
	listen(t, abstract(t))
	t.Setenv("NOTIFY_SOCKET", "")
	m, err := Open()
	if m != nil || err != nil {
		t.Fatalf("Open: %v, %v", m, err)
	}
	m.Run(t.Context(), nil, Process{})
}

func TestTheWatchdogOfAnotherProcess(t *testing.T) {
	manager := listen(t, abstract(t))
	t.Setenv("WATCHDOG_USEC", "2000")
	t.Setenv("WATCHDOG_PID", "1")
	start(t, open(t), Process{Healthy: well, ReadyWithin: time.Hour, Status: func() (string, bool) { return "", false }})
	if said := manager.hears(50 * time.Millisecond); said != "" {
		t.Errorf("said %q", said)
	}
}

func TestAnEnvironmentThatMakesNoSense(t *testing.T) {
	listen(t, abstract(t))
	for _, test := range []struct{ socket, every, says string }{
		{"vsock:2:1234", "", "only unix sockets"},
		{abstract(t), "soon", "WATCHDOG_USEC"},
		{abstract(t), "0", "WATCHDOG_USEC"},
	} {
		t.Setenv("NOTIFY_SOCKET", test.socket)
		t.Setenv("WATCHDOG_USEC", test.every)
		if _, err := Open(); err == nil || !strings.Contains(err.Error(), test.says) {
			t.Errorf("%q, %q: error %v", test.socket, test.every, err)
		}
	}
}

// A manager that is away for a while hears what it missed.
func TestAManagerThatStartsAnew(t *testing.T) {
	path := filepath.Join(t.TempDir(), "notify")
	first := listen(t, path)
	var line atomic.Pointer[string]
	say := func(s string) { line.Store(&s) }
	say("one")
	start(t, open(t), Process{Healthy: well, Every: time.Millisecond, Status: func() (string, bool) { return *line.Load(), true }})
	first.wants("READY=1\nSTATUS=one")
	if err := first.conn.Close(); err != nil {
		t.Fatal(err)
	}
	say("two")
	time.Sleep(20 * time.Millisecond)
	if err := os.RemoveAll(path); err != nil {
		t.Fatal(err)
	}
	listen(t, path).wants("STATUS=two")
}

func TestOneLine(t *testing.T) {
	if got := oneLine("a\n\nb\r\nc"); got != "a; b; c" {
		t.Errorf("%q", got)
	}
	if got := oneLine(strings.Repeat("ä", 1000)); len(got) > 410 || !strings.HasSuffix(got, "ä...") {
		t.Errorf("%q", got)
	}
}
