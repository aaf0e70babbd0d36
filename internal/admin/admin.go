// Package admin lets the operator's commands ask a running process, and tell it: JSON over a unix socket that only root
// may open, and, where a listen address is set, /metrics, /healthz and /readyz over TCP. Whatever changes something is a
// POST on the socket; by TCP nothing can be changed.
package admin

import (
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
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promhttp"
	"golang.org/x/sync/errgroup"
)

// Query answers one question with a value that is sent as JSON.
type Query func(ctx context.Context) (any, error)

// Command answers a question that comes with words of its own, or does what it says. read decodes these words, strictly:
// its error, and any Refusal, is for the operator.
type Command func(ctx context.Context, read func(into any) error) (any, error)

// Refusal is an error whose words are for the operator as they stand. Nothing was done.
type Refusal struct {
	Reason string
	// Usage says that what was asked for makes no sense here, whatever the state of things: a name that nobody has. Else
	// it cannot be done as things are.
	Usage bool
}

func (r *Refusal) Error() string { return r.Reason }

// Server answers on the socket and, where Listen is set, by TCP. Its fields are set before Run.
type Server struct {
	Log    *slog.Logger
	Socket string // path of the unix socket; its directory is made
	Listen string // TCP address for /metrics, /healthz and /readyz; empty opens none
	// Queries are the questions that commands ask, by name; on the socket only.
	Queries map[string]Query
	// Commands are what commands ask or tell with words of their own, by name; on the socket only.
	Commands map[string]Command
	Gatherer prometheus.Gatherer
	// Healthy returns an error while the process does not do its work; Ready while it does not serve traffic.
	Healthy, Ready func() error

	socket, tcp net.Listener // nil while not open
	made        os.FileInfo  // the socket that Open made
}

// Open takes the socket and the TCP address, so that what is wrong with them is known before anything else is done;
// who connects waits for Run. It fails where the socket is another process's. Close undoes it.
func (s *Server) Open(ctx context.Context) (err error) {
	if s.socket, err = s.listenUnix(); err != nil {
		return err
	}
	if s.made, err = os.Lstat(s.Socket); err != nil {
		return errors.Join(fmt.Errorf("making the admin socket: %w", err), s.Close())
	}
	if s.Listen == "" {
		return nil
	}
	if s.tcp, err = (&net.ListenConfig{}).Listen(ctx, "tcp", s.Listen); err != nil {
		return errors.Join(fmt.Errorf("listening for metrics: %w", err), s.Close())
	}
	return nil
}

// Close ends what Open took, and removes the socket unless another process's is in its place. It does nothing where
// nothing is open; Run does it in the end.
func (s *Server) Close() error {
	var errs []error
	if now, err := os.Lstat(s.Socket); err == nil && s.made != nil && os.SameFile(now, s.made) {
		errs = append(errs, os.Remove(s.Socket))
	}
	for _, l := range []net.Listener{s.socket, s.tcp} {
		if l == nil {
			continue
		}
		if err := l.Close(); !errors.Is(err, net.ErrClosed) {
			errs = append(errs, err)
		}
	}
	s.socket, s.tcp, s.made = nil, nil, nil
	if err := errors.Join(errs...); err != nil {
		return fmt.Errorf("closing the admin socket: %w", err)
	}
	return nil
}

// Run answers until ctx ends. It opens what is not open.
func (s *Server) Run(ctx context.Context) (err error) {
	if s.socket == nil {
		if err := s.Open(ctx); err != nil {
			return err
		}
	}
	defer func() { err = errors.Join(err, s.Close()) }()
	listeners := map[net.Listener]http.Handler{s.socket: s.handler(true)}
	if s.tcp != nil {
		listeners[s.tcp] = s.handler(false)
	}
	group, ctx := errgroup.WithContext(ctx)
	for listener, handler := range listeners {
		server := &http.Server{
			Handler:           handler,
			ReadHeaderTimeout: 5 * time.Second,
			IdleTimeout:       time.Minute,
			MaxHeaderBytes:    16 << 10,
			ErrorLog:          slog.NewLogLogger(s.Log.Handler(), slog.LevelDebug),
		}
		group.Go(func() error {
			if err := server.Serve(listener); !errors.Is(err, http.ErrServerClosed) {
				return fmt.Errorf("serving on %s: %w", listener.Addr(), err)
			}
			return nil
		})
		group.Go(func() error {
			<-ctx.Done()
			grace, cancel := context.WithTimeout(context.WithoutCancel(ctx), time.Second)
			defer cancel()
			if server.Shutdown(grace) != nil {
				return server.Close()
			}
			return nil
		})
	}
	return group.Wait()
}

// listenUnix takes over the socket of a process that is gone, never that of one that answers.
func (s *Server) listenUnix() (net.Listener, error) {
	if err := os.MkdirAll(filepath.Dir(s.Socket), 0o755); err != nil {
		return nil, fmt.Errorf("making the admin socket's directory: %w; set --admin-socket to a path that can be made", err)
	}
	if conn, err := net.DialTimeout("unix", s.Socket, time.Second); err == nil {
		return nil, errors.Join(fmt.Errorf("another ravel answers on %s: stop it first, or set another --admin-socket", s.Socket), conn.Close())
	}
	if err := os.Remove(s.Socket); err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, fmt.Errorf("removing the admin socket of an earlier process: %w", err)
	}
	// Made under a name of its own and renamed when its mode is right, so that nobody else can ever open it.
	temporary := fmt.Sprintf("%s.%d", s.Socket, os.Getpid())
	if err := os.Remove(temporary); err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, fmt.Errorf("making the admin socket: %w", err)
	}
	listener, err := net.ListenUnix("unix", &net.UnixAddr{Name: temporary, Net: "unix"})
	if err != nil {
		return nil, fmt.Errorf("making the admin socket: %w", err)
	}
	listener.SetUnlinkOnClose(false)
	err = os.Chmod(temporary, 0o600)
	if err == nil {
		err = os.Rename(temporary, s.Socket)
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("making the admin socket: %w", err), listener.Close())
	}
	return listener, nil
}

func (s *Server) handler(private bool) http.Handler {
	mux := http.NewServeMux()
	mux.Handle("GET /metrics", promhttp.HandlerFor(s.Gatherer, promhttp.HandlerOpts{}))
	mux.HandleFunc("GET /healthz", state(s.Healthy))
	mux.HandleFunc("GET /readyz", state(s.Ready))
	if private {
		for name, query := range s.Queries {
			mux.HandleFunc("GET /v1/"+name, s.answer(queryTimeout, func(ctx context.Context, _ *http.Request) (any, error) { return query(ctx) }))
		}
		for name, command := range s.Commands {
			mux.HandleFunc("POST /v1/"+name, s.answer(commandTimeout, func(ctx context.Context, r *http.Request) (any, error) {
				return command(ctx, func(into any) error { return readBody(r, into) })
			}))
		}
	}
	return mux
}

func state(check func() error) http.HandlerFunc {
	return func(w http.ResponseWriter, _ *http.Request) {
		if err := check(); err != nil {
			http.Error(w, err.Error(), http.StatusServiceUnavailable)
			return
		}
		_, _ = w.Write([]byte("ok\n"))
	}
}

func (s *Server) answer(timeout time.Duration, ask func(context.Context, *http.Request) (any, error)) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		ctx, cancel := context.WithTimeout(r.Context(), timeout)
		defer cancel()
		r.Body = http.MaxBytesReader(w, r.Body, maxBody)
		value, err := ask(ctx, r)
		var refusal *Refusal
		switch {
		case errors.As(err, &refusal) && refusal.Usage:
			http.Error(w, refusal.Reason, http.StatusBadRequest)
			return
		case errors.As(err, &refusal):
			http.Error(w, refusal.Reason, http.StatusConflict)
			return
		case err != nil:
			http.Error(w, err.Error(), http.StatusInternalServerError)
			return
		}
		body, err := json.Marshal(value)
		if err != nil {
			http.Error(w, err.Error(), http.StatusInternalServerError)
			return
		}
		w.Header().Set("Content-Type", "application/json")
		_, _ = w.Write(body)
	}
}

// maxBody bounds what a command comes with: a static file of 20,000 endpoints is some 5 MB.
const maxBody = 64 << 20

// readBody decodes the one JSON value of a request.
func readBody(r *http.Request, into any) error {
	d := json.NewDecoder(r.Body)
	d.DisallowUnknownFields()
	err := d.Decode(into)
	if err == nil {
		if _, more := d.Token(); !errors.Is(more, io.EOF) {
			err = errors.New("there is more than one value")
		}
	}
	if err != nil {
		return &Refusal{Reason: "what was asked cannot be read (is it the same ravel that runs here?): " + err.Error(), Usage: true}
	}
	return nil
}
