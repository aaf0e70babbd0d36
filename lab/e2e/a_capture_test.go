package e2e

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ravel-lb/ravel/lab/stage"
)

// frame is a packet as an interface saw it.
type frame struct {
	at       time.Time
	out      bool // the node sent it; else it arrived
	srcMAC   string
	dstMAC   string
	length   int        // of the outermost IP packet
	tunnel   int        // IPPROTO_IPIP or IPPROTO_IPV6 if the packet is in a tunnel, else 0
	outerSrc netip.Addr // of the tunnel
	outerDst netip.Addr
	fragment bool // of the outermost packet
	proto    int
	src, dst netip.AddrPort // the ports are 0 for ICMP and later fragments
	syn, ack bool
	rst      bool
	mss      int // of the SYN, else 0
	// about is what an ICMP error is about: the packet that it quotes, as that was sent.
	about flow
}

// flow names what a packet belongs to, as its sender sees it.
type flow struct {
	proto    int
	src, dst netip.AddrPort
}

func (f frame) flow() flow { return flow{f.proto, f.src, f.dst} }

func (f flow) back() flow { return flow{f.proto, f.dst, f.src} }

func (f flow) String() string {
	name := map[int]string{unix.IPPROTO_TCP: "tcp", unix.IPPROTO_UDP: "udp"}[f.proto]
	if name == "" {
		name = fmt.Sprint("protocol ", f.proto)
	}
	return fmt.Sprintf("%s %s > %s", name, f.src, f.dst)
}

func (f frame) String() string {
	way := "in "
	if f.out {
		way = "out"
	}
	s := fmt.Sprintf("%s %s > %s, %s, %d bytes", way, f.srcMAC, f.dstMAC, f.flow(), f.length)
	if f.tunnel != 0 {
		s += fmt.Sprintf(", in %d %s > %s", f.tunnel, f.outerSrc, f.outerDst)
	}
	if f.rst {
		s += ", reset"
	}
	return s
}

// parse takes an Ethernet frame apart. It is false for what is no IP packet.
func parse(b []byte) (frame, bool) {
	if len(b) < 14 {
		return frame{}, false
	}
	f := frame{dstMAC: net.HardwareAddr(b[:6]).String(), srcMAC: net.HardwareAddr(b[6:12]).String(), length: len(b) - 14}
	kind := binary.BigEndian.Uint16(b[12:])
	if kind != unix.ETH_P_IP && kind != unix.ETH_P_IPV6 {
		return frame{}, false
	}
	p, ok := parseIP(b[14:])
	if !ok {
		return frame{}, false
	}
	f.length, f.fragment = p.length, p.fragment
	if (p.proto == unix.IPPROTO_IPIP || p.proto == unix.IPPROTO_IPV6) && !p.later {
		f.tunnel, f.outerSrc, f.outerDst = p.proto, p.src, p.dst
		if p, ok = parseIP(p.rest); !ok {
			return frame{}, false
		}
	}
	f.proto = p.proto
	src, dst := p.ports()
	f.src, f.dst = netip.AddrPortFrom(p.src, src), netip.AddrPortFrom(p.dst, dst)
	if f.proto == unix.IPPROTO_TCP && len(p.rest) >= 20 && !p.later {
		flags := p.rest[13]
		f.syn, f.rst, f.ack = flags&2 != 0, flags&4 != 0, flags&16 != 0
		if f.syn {
			f.mss = mss(p.rest)
		}
	}
	icmpError := p.proto == unix.IPPROTO_ICMP && len(p.rest) > 8 && slices.Contains([]byte{3, 11, 12}, p.rest[0]) ||
		p.proto == unix.IPPROTO_ICMPV6 && len(p.rest) > 8 && p.rest[0] < 128
	if icmpError && !p.later {
		if q, ok := parseIP(p.rest[8:]); ok {
			src, dst := q.ports()
			f.about = flow{q.proto, netip.AddrPortFrom(q.src, src), netip.AddrPortFrom(q.dst, dst)}
		}
	}
	return f, true
}

// packet is an IP packet of either family.
type packet struct {
	length   int
	fragment bool
	later    bool // a fragment, and not the first
	proto    int
	src, dst netip.Addr
	rest     []byte
}

func parseIP(b []byte) (packet, bool) {
	if len(b) < 20 {
		return packet{}, false
	}
	if b[0]>>4 == 4 {
		head := int(b[0]&15) * 4
		if head < 20 || len(b) < head {
			return packet{}, false
		}
		at := binary.BigEndian.Uint16(b[6:])
		return packet{
			length: int(binary.BigEndian.Uint16(b[2:])), proto: int(b[9]), rest: b[head:],
			src: netip.AddrFrom4([4]byte(b[12:16])), dst: netip.AddrFrom4([4]byte(b[16:20])),
			fragment: at&0x3fff != 0, later: at&0x1fff != 0,
		}, true
	}
	if b[0]>>4 != 6 || len(b) < 40 {
		return packet{}, false
	}
	p := packet{
		length: 40 + int(binary.BigEndian.Uint16(b[4:])), proto: int(b[6]), rest: b[40:],
		src: netip.AddrFrom16([16]byte(b[8:24])), dst: netip.AddrFrom16([16]byte(b[24:40])),
	}
	for {
		switch p.proto {
		case unix.IPPROTO_DSTOPTS, unix.IPPROTO_HOPOPTS, unix.IPPROTO_ROUTING: // ip6tnl sends a tunnel encapsulation limit
			if len(p.rest) < 8 {
				return packet{}, false
			}
			size := 8 + 8*int(p.rest[1])
			if len(p.rest) < size {
				return packet{}, false
			}
			p.proto, p.rest = int(p.rest[0]), p.rest[size:]
		case unix.IPPROTO_FRAGMENT:
			if len(p.rest) < 8 {
				return packet{}, false
			}
			p.fragment, p.later = true, binary.BigEndian.Uint16(p.rest[2:])&0xfff8 != 0
			p.proto, p.rest = int(p.rest[0]), p.rest[8:]
		default:
			return p, true
		}
	}
}

func (p packet) ports() (src, dst uint16) {
	if p.later || len(p.rest) < 4 || p.proto != unix.IPPROTO_TCP && p.proto != unix.IPPROTO_UDP {
		return 0, 0
	}
	return binary.BigEndian.Uint16(p.rest), binary.BigEndian.Uint16(p.rest[2:])
}

func mss(tcp []byte) int {
	options := tcp[20:min(len(tcp), max(20, int(tcp[12]>>4)*4))]
	for len(options) > 1 {
		switch {
		case options[0] == 0:
			return 0
		case options[0] == 1:
			options = options[1:]
			continue
		case options[0] == 2 && len(options) >= 4:
			return int(binary.BigEndian.Uint16(options[2:]))
		}
		if options[1] < 2 || int(options[1]) > len(options) {
			return 0
		}
		options = options[options[1]:]
	}
	return 0
}

// capture notes every IP packet that passes an interface and concerns one of its VIPs.
type capture struct {
	t     *testing.T
	where string
	mac   string // the interface's own
	fd    int
	vips  []netip.Addr
	stop  chan struct{}
	done  sync.WaitGroup

	mu   sync.Mutex // guards the field below
	seen []frame
}

// captureAt begins to note what passes an interface of a node; the test's end stops it, and fails if a packet was missed.
func captureAt(t *testing.T, s *stage.Stage, node, iface string, vips []netip.Addr) *capture {
	t.Helper()
	c := &capture{t: t, where: node + ":" + iface, vips: vips, stop: make(chan struct{})}
	must(t, s.Fleet.Node(node).Do(func() error {
		link, err := net.InterfaceByName(iface)
		if err != nil {
			return err
		}
		c.mac = link.HardwareAddr.String()
		const all = unix.ETH_P_ALL>>8 | unix.ETH_P_ALL<<8&0xff00 // network byte order
		if c.fd, err = unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, all); err != nil {
			return err
		}
		return errors.Join(
			unix.SetsockoptInt(c.fd, unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, 16<<20),
			unix.SetsockoptTimeval(c.fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &unix.Timeval{Usec: 100_000}),
			unix.Bind(c.fd, &unix.SockaddrLinklayer{Protocol: all, Ifindex: link.Index}),
		)
	}))
	c.done.Go(c.read)
	t.Cleanup(c.end)
	return c
}

func (c *capture) read() {
	buffer := make([]byte, 70_000)
	var until time.Time
	for {
		n, from, err := unix.Recvfrom(c.fd, buffer, 0)
		at := time.Now()
		select {
		case <-c.stop:
			if until.IsZero() {
				until = at.Add(300 * time.Millisecond) // for what waits in the socket
			}
			if err != nil || at.After(until) {
				return
			}
		default:
		}
		if err != nil {
			continue // nothing came for a while
		}
		f, ok := parse(buffer[:n])
		if !ok {
			continue
		}
		concerns := func(a netip.Addr) bool { return a.IsValid() && slices.Contains(c.vips, a) }
		if !concerns(f.src.Addr()) && !concerns(f.dst.Addr()) && !concerns(f.about.src.Addr()) && !concerns(f.about.dst.Addr()) {
			continue
		}
		link, _ := from.(*unix.SockaddrLinklayer)
		f.at, f.out = at, link != nil && link.Pkttype == unix.PACKET_OUTGOING
		c.mu.Lock()
		c.seen = append(c.seen, f)
		c.mu.Unlock()
	}
}

// end stops the capture. A capture that missed something proves nothing.
func (c *capture) end() {
	select {
	case <-c.stop:
		return
	default:
	}
	close(c.stop)
	c.done.Wait()
	if stats, err := unix.GetsockoptTpacketStats(c.fd, unix.SOL_PACKET, unix.PACKET_STATISTICS); err != nil || stats.Drops > 0 {
		c.t.Errorf("the capture at %s missed packets: %+v, %v", c.where, stats, err)
	}
	_ = unix.Close(c.fd)
}

// frames returns what was seen until now.
func (c *capture) frames() []frame {
	c.mu.Lock()
	defer c.mu.Unlock()
	return slices.Clone(c.seen)
}
