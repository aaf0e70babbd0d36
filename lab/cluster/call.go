package cluster

import (
	"bytes"
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"strconv"
	"time"
)

// StatusError is an answer of the API server that is no success.
type StatusError struct {
	Code    int    // of HTTP
	Reason  string // such as AlreadyExists
	Message string
}

func (e *StatusError) Error() string { return fmt.Sprintf("%d %s: %s", e.Code, e.Reason, e.Message) }

// Call asks the API server, as admin: method is that of HTTP, path begins with a slash and may have a query. in is sent
// as JSON unless it is nil, a PATCH as a merge patch. The answer goes to out unless that is nil. An answer that is no
// success is a *StatusError.
func (c *Cluster) Call(ctx context.Context, method, path string, in, out any) error {
	kind := "application/json"
	if method == http.MethodPatch {
		kind = "application/merge-patch+json"
	}
	return c.callWith(ctx, method, path, kind, in, out)
}

// Apply makes the object at path what in is, as kubectl apply --server-side does: fields that the API server does not know
// are refused. A dry run does all but that.
func (c *Cluster) Apply(ctx context.Context, path string, in any, dryRun bool) error {
	path += "?fieldManager=lab&fieldValidation=Strict"
	if dryRun {
		path += "&dryRun=All"
	}
	return c.callWith(ctx, http.MethodPatch, path, "application/apply-patch+yaml", in, nil) // JSON is YAML too
}

func (c *Cluster) callWith(ctx context.Context, method, path, kind string, in, out any) error {
	if err := c.call(ctx, method, path, kind, in, out); err != nil {
		return fmt.Errorf("%s %s: %w", method, path, err)
	}
	return nil
}

func (c *Cluster) call(ctx context.Context, method, path, kind string, in, out any) error {
	var body io.Reader
	if in != nil {
		text, err := json.Marshal(in)
		if err != nil {
			return err
		}
		body = bytes.NewReader(text)
	}
	r, err := http.NewRequestWithContext(ctx, method, c.URL()+path, body)
	if err != nil {
		return err
	}
	r.Header.Set("Accept", "application/json")
	r.Header.Set("Content-Type", kind)
	answer, err := c.client.Do(r)
	if err != nil {
		return err
	}
	defer func() { _ = answer.Body.Close() }()
	text, err := io.ReadAll(answer.Body)
	if err != nil {
		return err
	}
	if answer.StatusCode >= 300 {
		refusal := new(StatusError)
		if json.Unmarshal(text, refusal) != nil {
			refusal = &StatusError{Message: string(text)} // /readyz has its own words
		}
		refusal.Code = answer.StatusCode
		return refusal
	}
	if out == nil {
		return nil
	}
	return json.Unmarshal(text, out)
}

func (c *Cluster) newClient(own tls.Certificate) *http.Client {
	return &http.Client{Transport: &http.Transport{
		DialContext:       c.dial,
		TLSClientConfig:   &tls.Config{RootCAs: c.pool(), Certificates: []tls.Certificate{own}},
		ForceAttemptHTTP2: true,
		IdleConnTimeout:   time.Minute,
	}}
}

// dial connects from the cluster's place.
func (c *Cluster) dial(ctx context.Context, network, address string) (conn net.Conn, err error) {
	err = c.opts.Place.Do(func() (err error) {
		conn, err = new(net.Dialer).DialContext(ctx, network, address)
		return err
	})
	return conn, err
}

// ready waits until the API server serves and has its own objects, among them namespace default.
func (c *Cluster) ready(ctx context.Context) error {
	tick := time.NewTicker(50 * time.Millisecond)
	defer tick.Stop()
	for {
		err := c.probe(ctx)
		if err == nil {
			return nil
		}
		for _, p := range []*process{c.etcd, c.server} {
			if !p.runs() {
				p.told = true
				return p.ended()
			}
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return fmt.Errorf("the API server is not ready (%s): %w: %w", c.server.log, ctx.Err(), err)
		}
	}
}

func (c *Cluster) probe(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, 2*time.Second)
	defer cancel()
	if err := c.Call(ctx, http.MethodGet, "/readyz", nil, nil); err != nil {
		return err
	}
	return c.Call(ctx, http.MethodGet, "/api/v1/namespaces/default", nil, nil)
}

// freePort returns a TCP port that nobody here listens on, and that no connection is given as its own: below
// 32768. It is not other.
func freePort(other uint16) (uint16, error) {
	for range 100 {
		port := uint16(20000 + rand.IntN(12000))
		if port == other {
			continue
		}
		l, err := net.Listen("tcp", ":"+strconv.Itoa(int(port)))
		if err != nil {
			continue
		}
		return port, l.Close()
	}
	return 0, errors.New("finding a free port: 100 are taken")
}
