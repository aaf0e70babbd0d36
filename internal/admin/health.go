package admin

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"time"
)

// ServeHealth answers GET /healthz on a listener, and nothing else, until ctx ends: 200 while healthy returns nil, else
// 503. It is for who probes this process, and closes each connection after one answer.
func ServeHealth(ctx context.Context, listener net.Listener, healthy func() error) error {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /healthz", state(healthy))
	server := &http.Server{
		Handler: mux, ReadHeaderTimeout: 2 * time.Second, ReadTimeout: 2 * time.Second, WriteTimeout: 2 * time.Second, MaxHeaderBytes: 4 << 10,
	}
	server.SetKeepAlivesEnabled(false)
	stop := context.AfterFunc(ctx, func() { _ = server.Close() })
	defer stop()
	if err := server.Serve(listener); !errors.Is(err, http.ErrServerClosed) {
		return fmt.Errorf("answering probes on %s: %w", listener.Addr(), err)
	}
	return nil
}
