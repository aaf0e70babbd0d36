package traffic

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"sync"
	"time"
)

// Client does a load and reports on it. Its methods may be called by any goroutine.
type Client struct {
	flows    []*flows
	requests []*requests
	streams  []*streams
}

// NewClient prepares a load. It does nothing before Run.
func NewClient(load Load) (*Client, error) {
	c := &Client{}
	var errs []error
	fault := func(name string, target netip.AddrPort, bad bool, what string) {
		if !target.IsValid() {
			errs = append(errs, fmt.Errorf("%s: no target", name))
		}
		if bad {
			errs = append(errs, fmt.Errorf("%s: %s", name, what))
		}
	}
	for _, f := range load.Flows {
		fault(f.Name, f.Target, f.Count < 0 || f.Every <= 0, "count or interval is not positive")
		c.flows = append(c.flows, newFlows(f))
	}
	for _, q := range load.Requests {
		fault(q.Name, q.Target, q.Rate <= 0, "rate is not positive")
		c.requests = append(c.requests, newRequests(q))
	}
	for _, s := range load.Streams {
		fault(s.Name, s.Target, s.Count < 0 || s.Every <= 0, "count or interval is not positive")
		c.streams = append(c.streams, newStreams(s))
	}
	return c, errors.Join(errs...)
}

// Run does the load until ctx ends.
func (c *Client) Run(ctx context.Context) {
	var group sync.WaitGroup
	for _, g := range c.flows {
		group.Go(func() { g.run(ctx) })
	}
	for _, g := range c.requests {
		group.Go(func() { g.run(ctx) })
	}
	for _, g := range c.streams {
		group.Go(func() { g.run(ctx) })
	}
	group.Wait()
}

// Report says what happened since the start or the last Reset.
func (c *Client) Report() Report { return c.report(false) }

// Reset begins a new phase and returns the report of the one that ends: counters and gaps begin anew, flows and streams
// go on.
func (c *Client) Reset() Report { return c.report(true) }

func (c *Client) report(reset bool) Report {
	now := time.Now()
	var r Report
	for _, g := range c.flows {
		r.Flows = append(r.Flows, g.snapshot(now, reset))
	}
	for _, g := range c.requests {
		r.Requests = append(r.Requests, g.snapshot(reset))
	}
	for _, g := range c.streams {
		r.Streams = append(r.Streams, g.snapshot(now, reset))
	}
	return r
}

// Control lets other processes ask for reports and resets at a unix socket (Remote), until ctx ends.
func (c *Client) Control(ctx context.Context, path string) error {
	_ = os.Remove(path)
	listener, err := net.Listen("unix", path)
	if err != nil {
		return err
	}
	stop := context.AfterFunc(ctx, func() { _ = listener.Close() })
	defer stop()
	for {
		conn, err := listener.Accept()
		if ctx.Err() != nil {
			return nil
		}
		if err != nil {
			return err
		}
		_ = conn.SetDeadline(time.Now().Add(10 * time.Second))
		_ = c.serve(conn)
		_ = conn.Close()
	}
}

// question is what a Remote asks; the answer is a Report.
type question struct{ Reset bool }

func (c *Client) serve(conn net.Conn) error {
	var q question
	if err := json.NewDecoder(conn).Decode(&q); err != nil {
		return err
	}
	return json.NewEncoder(conn).Encode(c.report(q.Reset))
}

// Remote is a client in another process, by its control socket.
type Remote struct{ Path string }

// Report says what happened since the start or the last Reset.
func (r Remote) Report(ctx context.Context) (Report, error) { return r.ask(ctx, question{}) }

// Reset begins a new phase and returns the report of the one that ends.
func (r Remote) Reset(ctx context.Context) (Report, error) { return r.ask(ctx, question{Reset: true}) }

func (r Remote) ask(ctx context.Context, q question) (report Report, err error) {
	var dialer net.Dialer
	conn, err := dialer.DialContext(ctx, "unix", r.Path)
	if err != nil {
		return Report{}, err
	}
	defer func() { _ = conn.Close() }()
	stop := context.AfterFunc(ctx, func() { _ = conn.Close() })
	defer stop()
	if err := json.NewEncoder(conn).Encode(q); err != nil {
		return Report{}, fmt.Errorf("asking the client at %s: %w", r.Path, err)
	}
	if err := json.NewDecoder(conn).Decode(&report); err != nil {
		return Report{}, fmt.Errorf("reading the report of %s: %w", r.Path, err)
	}
	return report, nil
}
