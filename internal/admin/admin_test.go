package admin

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
)

func server(t *testing.T, socket string) *Server {
	t.Helper()
	return &Server{
		Log: slog.New(slog.DiscardHandler), Socket: socket, Gatherer: prometheus.NewRegistry(),
		Queries: map[string]Query{
			"peers": func(context.Context) (any, error) { return []string{"192.0.2.1"}, nil },
			"fault": func(context.Context) (any, error) { return nil, errors.New("the table is gone") },
		},
		Healthy: func() error { return nil },
		Ready:   func() error { return errors.New("no configuration yet") },
	}
}

// start runs s until the test ends and waits until its socket answers.
func start(t *testing.T, s *Server) {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- s.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("Run: %v", err)
		}
	})
	for deadline := time.Now().Add(5 * time.Second); ; {
		var peers []string
		err := Get(t.Context(), s.Socket, "peers", &peers)
		if err == nil {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("the socket does not answer: %v", err)
		}
		time.Sleep(time.Millisecond)
	}
}

func TestGet(t *testing.T) {
	s := server(t, filepath.Join(t.TempDir(), "run", "admin.sock"))
	var peers []string
	if err := Get(t.Context(), s.Socket, "peers", &peers); !errors.Is(err, ErrNotRunning) {
		t.Fatalf("before Run: %v, want ErrNotRunning", err)
	}
	start(t, s)
	if err := Get(t.Context(), s.Socket, "peers", &peers); err != nil || len(peers) != 1 {
		t.Fatalf("peers = %v, %v", peers, err)
	}
	if err := Get(t.Context(), s.Socket, "members", &peers); !errors.Is(err, ErrNoSuchQuery) {
		t.Fatalf("an unknown question: %v, want ErrNoSuchQuery", err)
	}
	if err := Get(t.Context(), s.Socket, "fault", &peers); err == nil || !strings.Contains(err.Error(), "the table is gone") {
		t.Fatalf("a fault over there: %v", err)
	}
	info, err := os.Stat(s.Socket)
	if err != nil || info.Mode().Perm() != 0o600 {
		t.Fatalf("the socket's mode is %v, %v; want 0600", info.Mode(), err)
	}
}

func TestSocketOfAProcessThatIsGoneIsTakenOver(t *testing.T) {
	socket := filepath.Join(t.TempDir(), "admin.sock")
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: socket})
	if err != nil {
		t.Fatal(err)
	}
	l.SetUnlinkOnClose(false)
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	s := server(t, socket)
	start(t, s)
	if err := server(t, socket).Run(t.Context()); err == nil || !strings.Contains(err.Error(), "another ravel") {
		t.Fatalf("a second process on the same socket: %v", err)
	}
	var peers []string
	if err := Get(t.Context(), socket, "peers", &peers); err != nil {
		t.Fatalf("the first process lost its socket: %v", err)
	}
}

func TestTCPShowsNoQueries(t *testing.T) {
	s := server(t, filepath.Join(t.TempDir(), "admin.sock"))
	free, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	s.Listen = free.Addr().String()
	if err := free.Close(); err != nil {
		t.Fatal(err)
	}
	start(t, s)
	for path, want := range map[string]int{"/healthz": 200, "/readyz": 503, "/metrics": 200, "/v1/peers": 404, "/debug/pprof/": 404} {
		response, err := http.Get("http://" + s.Listen + path)
		if err != nil {
			t.Fatal(err)
		}
		body, _ := io.ReadAll(response.Body)
		response.Body.Close()
		if response.StatusCode != want {
			t.Errorf("GET %s = %d %q, want %d", path, response.StatusCode, body, want)
		}
	}
}

// What is wrong with an address is known before Run, and leaves nothing behind.
func TestOpenTakesAllOrNothing(t *testing.T) {
	taken, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer taken.Close()
	s := server(t, filepath.Join(t.TempDir(), "admin.sock"))
	s.Listen = taken.Addr().String()
	if err := s.Open(t.Context()); err == nil || !strings.Contains(err.Error(), "address already in use") {
		t.Fatalf("a port in use: %v", err)
	}
	if _, err := os.Lstat(s.Socket); !errors.Is(err, os.ErrNotExist) {
		t.Fatalf("the socket was left: %v", err)
	}
	s.Listen = ""
	if err := s.Open(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	if err := s.Close(); err != nil {
		t.Fatalf("closing what is closed: %v", err)
	}
}

// A process removes the socket when it ends, but never another's.
func TestTheSocketGoesWithItsProcess(t *testing.T) {
	s := server(t, filepath.Join(t.TempDir(), "admin.sock"))
	ctx, cancel := context.WithCancel(t.Context())
	if err := s.Open(ctx); err != nil {
		t.Fatal(err)
	}
	cancel()
	if err := s.Run(ctx); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Lstat(s.Socket); !errors.Is(err, os.ErrNotExist) {
		t.Fatalf("the socket was left: %v", err)
	}
	if err := s.Open(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := os.Remove(s.Socket); err != nil {
		t.Fatal(err)
	}
	other := server(t, s.Socket)
	start(t, other)
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	var peers []string
	if err := Get(t.Context(), s.Socket, "peers", &peers); err != nil {
		t.Fatalf("the other's socket is gone: %v", err)
	}
}

// What changes something is a POST on the socket, with words that are read strictly.
func TestPost(t *testing.T) {
	type words struct {
		Name string `json:"name"`
	}
	s := server(t, filepath.Join(t.TempDir(), "admin.sock"))
	free, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	s.Listen = free.Addr().String()
	if err := free.Close(); err != nil {
		t.Fatal(err)
	}
	did := 0
	s.Commands = map[string]Command{"drain": func(_ context.Context, read func(any) error) (any, error) {
		var w words
		if err := read(&w); err != nil {
			return nil, err
		}
		switch w.Name {
		case "nobody":
			return nil, fmt.Errorf("draining: %w", &Refusal{Reason: "there is no nobody", Usage: true})
		case "last":
			return nil, &Refusal{Reason: "it is the last one"}
		case "broken":
			return nil, errors.New("the fleet is gone")
		}
		did++
		return "drained " + w.Name, nil
	}}
	start(t, s)
	var answer string
	if err := Post(t.Context(), s.Socket, "drain", words{"r1"}, &answer); err != nil || answer != "drained r1" {
		t.Fatalf("%q, %v", answer, err)
	}
	for name, usage := range map[string]bool{"nobody": true, "last": false} {
		var refusal *Refusal
		err := Post(t.Context(), s.Socket, "drain", words{name}, &answer)
		if !errors.As(err, &refusal) || refusal.Usage != usage || strings.Contains(err.Error(), "asking") {
			t.Errorf("%s: %v", name, err)
		}
	}
	if err := Post(t.Context(), s.Socket, "drain", words{"broken"}, &answer); err == nil || !strings.Contains(err.Error(), "the fleet is gone") {
		t.Errorf("a fault over there: %v", err)
	}
	var refusal *Refusal
	if err := Post(t.Context(), s.Socket, "drain", map[string]any{"name": "r1", "more": 1}, &answer); !errors.As(err, &refusal) || !refusal.Usage {
		t.Errorf("words that nobody knows: %v", err)
	}
	if err := Post(t.Context(), s.Socket, "drain", json.RawMessage(`{"name":"r1"}`), &answer); err != nil {
		t.Errorf("raw: %v", err)
	}
	for _, name := range []string{"peers", "freeze"} { // a question, and what nobody knows
		if err := Post(t.Context(), s.Socket, name, words{"r1"}, &answer); !errors.Is(err, ErrNoSuchQuery) {
			t.Errorf("POST %s: %v", name, err)
		}
	}
	if err := Get(t.Context(), s.Socket, "drain", &answer); !errors.Is(err, ErrNoSuchQuery) {
		t.Errorf("GET of a command: %v", err)
	}
	response, err := http.Post("http://"+s.Listen+"/v1/drain", "application/json", strings.NewReader(`{"name":"r1"}`))
	if err != nil {
		t.Fatal(err)
	}
	response.Body.Close()
	if response.StatusCode != http.StatusNotFound {
		t.Errorf("a command by TCP: %s", response.Status)
	}
	if did != 2 {
		t.Errorf("done %d times, want 2", did)
	}
}

// Whatever stands in a body, the answer is a refusal or the words.
func FuzzReadBody(f *testing.F) {
	for _, body := range []string{``, `{}`, `{"name":"r1"}`, `{"name":"r1"}{}`, `{"name":1}`, `[`, `null`, "\xff"} {
		f.Add([]byte(body))
	}
	f.Fuzz(func(t *testing.T, body []byte) {
		var w struct{ Name string }
		r, err := http.NewRequest(http.MethodPost, "http://ravel/", bytes.NewReader(body))
		if err != nil {
			t.Fatal(err)
		}
		var refusal *Refusal
		if err := readBody(r, &w); err != nil && (!errors.As(err, &refusal) || !refusal.Usage) {
			t.Errorf("%q: %v", body, err)
		}
	})
}
