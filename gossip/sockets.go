package gossip

import (
	"context"
	"net"
	"time"

	"github.com/hashicorp/memberlist"
)

// sockets are memberlist's, save that Shutdown ends what was dialled as well: else a host that does not answer would hold
// up the end of this process.
type sockets struct {
	*memberlist.NetTransport
	open context.Context
	shut context.CancelFunc
}

var _ memberlist.NodeAwareTransport = (*sockets)(nil)

func newSockets(t *memberlist.NetTransport) *sockets {
	s := &sockets{NetTransport: t}
	s.open, s.shut = context.WithCancel(context.Background())
	return s
}

// DialTimeout opens a stream.
func (s *sockets) DialTimeout(addr string, timeout time.Duration) (net.Conn, error) {
	d := net.Dialer{Timeout: timeout}
	c, err := d.DialContext(s.open, "tcp", addr)
	if err != nil {
		return nil, err
	}
	return &dialled{c, context.AfterFunc(s.open, func() { _ = c.Close() })}, nil
}

// DialAddressTimeout opens a stream to a member.
func (s *sockets) DialAddressTimeout(a memberlist.Address, timeout time.Duration) (net.Conn, error) {
	return s.DialTimeout(a.Addr, timeout)
}

// Shutdown closes everything.
func (s *sockets) Shutdown() error {
	s.shut()
	return s.NetTransport.Shutdown()
}

// dialled is a stream that we opened.
type dialled struct {
	net.Conn
	forget func() bool
}

// Close closes it.
func (d *dialled) Close() error {
	d.forget()
	return d.Conn.Close()
}
