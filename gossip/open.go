package gossip

import (
	"errors"
	"fmt"
	"net/netip"

	"github.com/hashicorp/memberlist"
	"golang.org/x/sys/unix"
)

// Open takes the UDP and the TCP port, so that one that is taken is known before Run. Nothing is read or sent yet. Run
// opens by itself what is not open.
func (g *Gossip) Open() error {
	g.opening.Lock()
	defer g.opening.Unlock()
	switch {
	case g.closed:
		return errors.New("gossip: it is closed")
	case g.transport != nil:
		return nil
	case g.config.Transport != nil:
		g.transport = g.config.Transport
		return nil
	}
	t, err := memberlist.NewNetTransport(&memberlist.NetTransportConfig{
		BindAddrs: []string{g.listenOn().String()}, BindPort: int(g.config.Bind.Port()), Logger: newLogger(g),
	})
	if err != nil {
		return fmt.Errorf("gossiping on %s: %w", g.config.Bind, err)
	}
	g.transport = newSockets(t)
	return nil
}

// listenOn is the address to bind. On a host without IPv6 nothing can listen on [::]; there 0.0.0.0 is every address.
func (g *Gossip) listenOn() netip.Addr {
	a := g.config.Bind.Addr()
	if a == netip.IPv6Unspecified() && !g.ipv6() {
		return netip.IPv4Unspecified()
	}
	return a
}

// hasIPv6 reports whether this host's kernel makes sockets of IPv6.
func hasIPv6() bool {
	fd, err := unix.Socket(unix.AF_INET6, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return !errors.Is(err, unix.EAFNOSUPPORT)
	}
	_ = unix.Close(fd)
	return true
}

// Close gives the ports of Open back if Run was never called, which cannot be called afterwards. Run closes by itself.
func (g *Gossip) Close() error {
	if !g.running.CompareAndSwap(false, true) {
		return nil
	}
	g.opening.Lock()
	defer g.opening.Unlock()
	g.closed = true
	if g.transport == nil {
		return nil
	}
	if err := shut(g.transport); err != nil {
		return fmt.Errorf("closing gossip: %w", err)
	}
	return nil
}

// shut closes a transport that nobody reads: what had arrived would hold it up.
func shut(t memberlist.Transport) error {
	done := make(chan error, 1)
	go func() { done <- t.Shutdown() }()
	for {
		select {
		case err := <-done:
			return err
		case <-t.PacketCh():
		case c := <-t.StreamCh():
			_ = c.Close()
		}
	}
}
