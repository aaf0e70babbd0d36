package node

import (
	"fmt"
	"io"
	"maps"
	"net"
	"net/netip"
	"slices"
	"sync"
	"testing"

	gobgp "github.com/osrg/gobgp/v3/pkg/packet/bgp"
)

// router is a small honest router: it takes a session, keeps the prefixes that it hears, and forgets them when the
// session ends. (A second GoBGP cannot play it in the same process: path selection is set in package variables when
// a server starts.)
type router struct {
	addr     netip.AddrPort
	asn      uint32
	listener net.Listener
	group    sync.WaitGroup

	mu    sync.Mutex // guards the fields below
	rib   map[netip.Addr]uint64
	heard uint64 // announcements so far, each of which has its number in rib
	gone  uint64 // withdrawals so far, with those that the end of a session is
	up    bool
}

func newRouter(t *testing.T, addr string, asn uint32) *router {
	t.Helper()
	r := &router{addr: netip.AddrPortFrom(netip.MustParseAddr(addr), 1790), asn: asn, rib: map[netip.Addr]uint64{}}
	var err error
	if r.listener, err = net.Listen("tcp", r.addr.String()); err != nil {
		t.Fatal(err)
	}
	r.group.Go(func() {
		for {
			conn, err := r.listener.Accept()
			if err != nil {
				return
			}
			r.serve(conn)
			_ = conn.Close()
		}
	})
	t.Cleanup(func() {
		_ = r.listener.Close()
		r.group.Wait()
	})
	return r
}

// table returns what is announced, each VIP with the number of its announcement: an equal number later means that it
// was announced all the while.
func (r *router) table() map[netip.Addr]uint64 {
	r.mu.Lock()
	defer r.mu.Unlock()
	return maps.Clone(r.rib)
}

func (r *router) serve(conn net.Conn) {
	defer func() {
		r.mu.Lock()
		defer r.mu.Unlock()
		r.gone += uint64(len(r.rib))
		r.rib, r.up = map[netip.Addr]uint64{}, false
	}()
	for {
		message, err := readMessage(conn)
		if err != nil {
			return
		}
		switch body := message.Body.(type) {
		case *gobgp.BGPOpen:
			_ = send(conn, gobgp.NewBGPOpenMessage(uint16(r.asn), 9, "192.0.2.254", []gobgp.OptionParameterInterface{
				gobgp.NewOptionParameterCapability([]gobgp.ParameterCapabilityInterface{
					gobgp.NewCapMultiProtocol(gobgp.RF_IPv4_UC), gobgp.NewCapMultiProtocol(gobgp.RF_IPv6_UC),
					gobgp.NewCapFourOctetASNumber(r.asn),
				})}))
			_ = send(conn, gobgp.NewBGPKeepAliveMessage())
		case *gobgp.BGPKeepAlive:
			r.mu.Lock()
			r.up = true
			r.mu.Unlock()
			_ = send(conn, gobgp.NewBGPKeepAliveMessage())
		case *gobgp.BGPUpdate:
			r.hear(body)
		case *gobgp.BGPNotification:
			return
		}
	}
}

func (r *router) hear(u *gobgp.BGPUpdate) {
	var gone, come []gobgp.AddrPrefixInterface
	for _, p := range u.WithdrawnRoutes {
		gone = append(gone, p)
	}
	for _, p := range u.NLRI {
		come = append(come, p)
	}
	for _, a := range u.PathAttributes {
		switch a := a.(type) {
		case *gobgp.PathAttributeMpReachNLRI:
			come = append(come, a.Value...)
		case *gobgp.PathAttributeMpUnreachNLRI:
			gone = append(gone, a.Value...)
		}
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, p := range gone {
		delete(r.rib, netip.MustParsePrefix(p.String()).Addr())
		r.gone++
	}
	for _, p := range come {
		r.heard++
		r.rib[netip.MustParsePrefix(p.String()).Addr()] = r.heard
	}
}

func send(conn net.Conn, message *gobgp.BGPMessage) error {
	b, err := message.Serialize()
	if err == nil {
		_, err = conn.Write(b)
	}
	return err
}

func readMessage(conn net.Conn) (*gobgp.BGPMessage, error) {
	head := make([]byte, gobgp.BGP_HEADER_LENGTH)
	if _, err := io.ReadFull(conn, head); err != nil {
		return nil, err
	}
	h := &gobgp.BGPHeader{}
	if err := h.DecodeFromBytes(head); err != nil {
		return nil, err
	}
	if int(h.Len) < gobgp.BGP_HEADER_LENGTH {
		return nil, fmt.Errorf("a message of %d bytes", h.Len)
	}
	body := make([]byte, int(h.Len)-gobgp.BGP_HEADER_LENGTH)
	if _, err := io.ReadFull(conn, body); err != nil {
		return nil, err
	}
	return gobgp.ParseBGPBody(h, body)
}

func announcedAt(table map[netip.Addr]uint64) []netip.Addr {
	return slices.SortedFunc(maps.Keys(table), netip.Addr.Compare)
}
