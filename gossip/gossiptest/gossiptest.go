// Package gossiptest is a network inside one process, for tests of what gossips: it loses, delays and reorders packets
// and parts the fleet as it is told. It works under testing/synctest.
package gossiptest

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"net/netip"
	"sync"
	"sync/atomic"
	"time"

	"github.com/hashicorp/memberlist"
)

// Network carries packets and streams between its transports. The zero value is a perfect network. Its methods are safe
// for use by many goroutines.
type Network struct {
	mu    sync.Mutex // guards the fields below
	hosts map[netip.AddrPort]*Transport
	cut   func(from, to netip.AddrPort) bool
	loss  float64
	delay time.Duration

	packets, streams, packetBytes, streamBytes atomic.Uint64
}

// Traffic is what a network carried.
type Traffic struct {
	Packets, PacketBytes uint64 // those lost included
	Streams, StreamBytes uint64
}

// Bytes is the sum of all.
func (t Traffic) Bytes() uint64 { return t.PacketBytes + t.StreamBytes }

// Traffic returns what was carried so far.
func (n *Network) Traffic() Traffic {
	return Traffic{n.packets.Load(), n.packetBytes.Load(), n.streams.Load(), n.streamBytes.Load()}
}

// Spoil has packets lost with a probability, and the others delayed by up to a time each, so that they overtake one
// another. Streams are delayed at their beginning.
func (n *Network) Spoil(loss float64, delay time.Duration) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.loss, n.delay = loss, delay
}

// Cut has nothing get through where the function says so; nil mends everything. It is called with locks held and must
// not call the network.
func (n *Network) Cut(cut func(from, to netip.AddrPort) bool) {
	n.mu.Lock()
	n.cut = cut
	var broken []net.Conn
	for _, t := range n.hosts {
		for c, to := range t.conns {
			if n.cutLocked(t.addr, to) || n.cutLocked(to, t.addr) {
				broken = append(broken, c)
			}
		}
	}
	n.mu.Unlock()
	for _, c := range broken {
		_ = c.Close()
	}
}

// Part cuts the network in two: those of one side do not reach the others.
func (n *Network) Part(side ...netip.AddrPort) {
	in := map[netip.AddrPort]bool{}
	for _, a := range side {
		in[a] = true
	}
	n.Cut(func(from, to netip.AddrPort) bool { return in[from] != in[to] })
}

func (n *Network) cutLocked(from, to netip.AddrPort) bool { return n.cut != nil && n.cut(from, to) }

// Transport is a host's way to the network.
type Transport struct {
	network *Network
	addr    netip.AddrPort
	packets chan *memberlist.Packet
	accept  chan net.Conn
	closed  chan struct{}
	once    sync.Once
	conns   map[net.Conn]netip.AddrPort // guarded by the network's lock: streams that we dialled
}

var _ memberlist.Transport = (*Transport)(nil)

// Transport makes a host at an address. A host that was there before is replaced.
func (n *Network) Transport(addr netip.AddrPort) *Transport {
	t := &Transport{
		network: n, addr: addr,
		packets: make(chan *memberlist.Packet, 1024), accept: make(chan net.Conn, 64), closed: make(chan struct{}),
		conns: map[net.Conn]netip.AddrPort{},
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.hosts == nil {
		n.hosts = map[netip.AddrPort]*Transport{}
	}
	n.hosts[addr] = t
	return t
}

// Alias gives a host one more address, that it does not know of.
func (n *Network) Alias(t *Transport, addr netip.AddrPort) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.hosts[addr] = t
}

// FinalAdvertiseAddr is the host's address, whatever is asked for.
func (t *Transport) FinalAdvertiseAddr(string, int) (net.IP, int, error) {
	return t.addr.Addr().AsSlice(), int(t.addr.Port()), nil
}

// WriteTo sends a packet.
func (t *Transport) WriteTo(b []byte, addr string) (time.Time, error) {
	now := time.Now()
	to, err := netip.ParseAddrPort(addr)
	if err != nil {
		return now, err
	}
	t.network.packets.Add(1)
	t.network.packetBytes.Add(uint64(len(b)))
	n := t.network
	n.mu.Lock()
	host := n.hosts[to]
	lost := host == nil || n.cutLocked(t.addr, to) || n.loss > 0 && rand.Float64() < n.loss
	delay := n.delay
	n.mu.Unlock()
	if lost {
		return now, nil
	}
	packet := &memberlist.Packet{Buf: append([]byte(nil), b...), From: net.UDPAddrFromAddrPort(t.addr)}
	deliver := func() {
		packet.Timestamp = time.Now()
		select {
		case <-host.closed:
		case host.packets <- packet:
		default: // as a full socket buffer
		}
	}
	if delay > 0 {
		time.AfterFunc(rand.N(delay), deliver)
	} else {
		deliver()
	}
	return now, nil
}

// PacketCh has the packets that arrive.
func (t *Transport) PacketCh() <-chan *memberlist.Packet { return t.packets }

// DialTimeout opens a stream.
func (t *Transport) DialTimeout(addr string, timeout time.Duration) (net.Conn, error) {
	to, err := netip.ParseAddrPort(addr)
	if err != nil {
		return nil, err
	}
	n := t.network
	n.mu.Lock()
	host, cut, delay := n.hosts[to], n.cutLocked(t.addr, to) || n.cutLocked(to, t.addr), n.delay
	n.mu.Unlock()
	if cut || host == nil {
		// As SYNs that nobody answers.
		select {
		case <-time.After(timeout):
		case <-t.closed:
		}
		return nil, &net.OpError{Op: "dial", Net: "tcp", Err: fmt.Errorf("%s: no answer", addr)}
	}
	if delay > 0 {
		time.Sleep(rand.N(delay))
	}
	ours, theirs := net.Pipe()
	near := &conn{Conn: ours, owner: t, local: t.addr, remote: to}
	far := &conn{Conn: theirs, local: to, remote: t.addr}
	n.mu.Lock()
	t.conns[near] = to
	n.mu.Unlock()
	n.streams.Add(1)
	refused := time.NewTimer(timeout)
	defer refused.Stop()
	select {
	case host.accept <- far:
		select {
		case <-host.closed: // nobody may be left to take it
			_ = far.Close()
		default:
		}
		return near, nil
	case <-host.closed:
		err = errors.New("connection refused")
	case <-t.closed:
		err = net.ErrClosed
	case <-refused.C:
		err = errors.New("no answer")
	}
	_ = near.Close()
	return nil, &net.OpError{Op: "dial", Net: "tcp", Err: err}
}

// StreamCh has the streams that others opened.
func (t *Transport) StreamCh() <-chan net.Conn { return t.accept }

// Shutdown takes the host off the network.
func (t *Transport) Shutdown() error {
	t.once.Do(func() {
		close(t.closed)
		n := t.network
		n.mu.Lock()
		if n.hosts[t.addr] == t {
			delete(n.hosts, t.addr)
		}
		var open []net.Conn
		for c := range t.conns {
			open = append(open, c)
		}
		n.mu.Unlock()
		for _, c := range open {
			_ = c.Close()
		}
		for {
			select {
			case c := <-t.accept:
				_ = c.Close()
				continue
			default:
			}
			return
		}
	})
	return nil
}

// conn is a stream that counts its bytes and knows its ends.
type conn struct {
	net.Conn
	owner         *Transport // nil at the far end
	local, remote netip.AddrPort
}

func (c *conn) LocalAddr() net.Addr  { return net.TCPAddrFromAddrPort(c.local) }
func (c *conn) RemoteAddr() net.Addr { return net.TCPAddrFromAddrPort(c.remote) }

func (c *conn) Write(b []byte) (int, error) {
	n, err := c.Conn.Write(b)
	if c.owner != nil {
		c.owner.network.streamBytes.Add(uint64(n))
	}
	return n, err
}

func (c *conn) Close() error {
	if c.owner != nil {
		c.owner.network.mu.Lock()
		delete(c.owner.conns, c)
		c.owner.network.mu.Unlock()
	}
	return c.Conn.Close()
}
