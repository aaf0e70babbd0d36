package health

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"os"
	"syscall"
	"time"

	"github.com/ravel-lb/ravel"
)

// maxAnswer is how much of an HTTP answer is read at most, in bytes: its head must fit.
const maxAnswer = 64 << 10

// dialer opens a target's connection; probe's only door to the network. It sends nothing to anybody else: no names are
// looked up, there is no proxy, and no second family is tried.
var dialer = net.Dialer{
	KeepAlive: -1,
	// Whenever the probe lets go of it, the connection ends by a reset: neither side keeps it in TIME-WAIT, and its
	// source port is free at once.
	Control: func(_, _ string, c syscall.RawConn) error {
		var err error
		return errors.Join(c.Control(func(fd uintptr) {
			err = syscall.SetsockoptLinger(int(fd), syscall.SOL_SOCKET, syscall.SO_LINGER, &syscall.Linger{Onoff: 1})
		}), err)
	},
}

// probe asks the target once, for as long as ctx allows, and says what it found. The error says why, and is nil for
// Healthy. Unprobed is a fault of this host, which says nothing of the target.
func probe(ctx context.Context, t Target) (ravel.Health, error) {
	conn, err := dialer.DialTCP(ctx, "tcp", netip.AddrPort{}, t.addrPort())
	if err != nil {
		return classify(err, func() bool { return routable(t) }), err
	}
	defer func() { _ = conn.Close() }()
	if t.Kind != HTTP {
		return ravel.Healthy, nil
	}
	// The connection is there, so the node's kernel lives: whatever happens from here is the agent's.
	if deadline, ok := ctx.Deadline(); ok {
		_ = conn.SetDeadline(deadline)
	}
	stop := context.AfterFunc(ctx, func() { _ = conn.SetDeadline(time.Unix(1, 0)) })
	defer stop()
	if err := ask(conn, t); err != nil {
		return ravel.Refused, err
	}
	return ravel.Healthy, nil
}

// ask sends one request and reads the head of its answer.
func ask(conn io.ReadWriter, t Target) error {
	path, host := t.Path, t.Host
	if path == "" {
		path = "/"
	}
	if host == "" {
		host = t.addrPort().String()
	}
	_, err := fmt.Fprintf(conn, "GET %s HTTP/1.1\r\nHost: %s\r\nUser-Agent: ravel\r\nConnection: close\r\n\r\n", path, host)
	if err != nil {
		return fmt.Errorf("sending the request: %w", err)
	}
	// The body is neither read nor closed: that would read it. It holds nothing but conn.
	answer, err := http.ReadResponse(bufio.NewReader(io.LimitReader(conn, maxAnswer)), nil)
	if err != nil {
		return fmt.Errorf("reading the answer: %w", err)
	}
	if answer.StatusCode < 200 || answer.StatusCode > 399 {
		return fmt.Errorf("answer of status %d", answer.StatusCode)
	}
	return nil
}

// classify says what it means that a connection was not set up. connect(2) names the same errors for this host's own
// routes as for what routers answer; routable tells them apart.
func classify(err error, routable func() bool) ravel.Health {
	var no syscall.Errno
	switch errors.As(err, &no); {
	case errors.Is(err, context.Canceled):
		return ravel.Unprobed
	case errors.Is(err, context.DeadlineExceeded), errors.Is(err, os.ErrDeadlineExceeded), no == syscall.ETIMEDOUT:
		return ravel.Silent
	case no == syscall.ECONNREFUSED, // RST; ICMP port unreachable
		no == syscall.ECONNRESET,
		no == syscall.ENOPROTOOPT, // ICMP protocol unreachable
		no == syscall.EPROTO:      // an ICMPv6 parameter problem
		return ravel.Refused
	case no == syscall.EHOSTUNREACH, no == syscall.ENETUNREACH, no == syscall.EHOSTDOWN:
		if routable() {
			return ravel.Silent
		}
	}
	return ravel.Unprobed
}

// routable reports whether this host has a route to the target. Connecting a datagram socket looks the route up and
// sends nothing.
func routable(t Target) bool {
	conn, err := net.DialUDP("udp", nil, net.UDPAddrFromAddrPort(t.addrPort()))
	if err != nil {
		return false
	}
	_ = conn.Close()
	return true
}
