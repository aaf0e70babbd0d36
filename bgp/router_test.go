package bgp

import (
	"context"
	"fmt"
	"io"
	"maps"
	"net"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/osrg/gobgp/v3/pkg/packet/bgp"
	"golang.org/x/sys/unix"
)

// router is a small honest router for tests: it takes one connection at a time, keeps what it hears as text, counts
// every message, and does as it is told. (GoBGP cannot play it in the same process: its path selection is set in
// package variables when a server starts.)
type router struct {
	t    testing.TB
	addr netip.AddrPort
	asn  uint32
	hold uint16

	mu         sync.Mutex // guards the fields below
	listener   net.Listener
	conn       net.Conn
	rib        map[string]string // prefix → attributes
	updates    int               // UPDATE messages that said something
	ups        int               // sessions that got as far as our KEEPALIVE
	ceases     []string          // NOTIFICATIONs heard
	log        []string          // "+ prefix" and "- prefix", in order
	keepalives int
	mute       bool            // take connections and say nothing
	deaf       bool            // send no KEEPALIVE
	frozen     bool            // read nothing
	refuse     *bgp.BGPMessage // answer every OPEN with this
	done       sync.WaitGroup
}

// newRouter starts a router that listens on addr, port 1790. An MD5 key may follow.
func newRouter(t testing.TB, addr string, asn uint32, key ...string) *router {
	t.Helper()
	r := &router{t: t, addr: netip.AddrPortFrom(netip.MustParseAddr(addr), 1790), asn: asn, hold: 90, rib: map[string]string{}}
	r.start(key...)
	t.Cleanup(r.stop)
	return r
}

func (r *router) start(key ...string) {
	r.t.Helper()
	var l net.Listener
	eventually(r.t, "listening on "+r.addr.String(), func() (err error) {
		var lc net.ListenConfig
		lc.SetMultipathTCP(false) // MPTCP has no MD5
		l, err = lc.Listen(context.Background(), "tcp", r.addr.String())
		return err
	})
	if len(key) > 0 {
		md5(r.t, l, key[0])
	}
	r.mu.Lock()
	r.listener = l
	r.mu.Unlock()
	r.done.Go(func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			r.mu.Lock()
			r.conn = conn
			r.mu.Unlock()
			r.serve(conn)
			conn.Close()
		}
	})
}

// md5 makes a listener want a TCP MD5 key of 127.0.0.1 (RFC 2385).
func md5(t testing.TB, l net.Listener, key string) {
	t.Helper()
	raw, err := l.(*net.TCPListener).SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	sig := &unix.TCPMD5Sig{Keylen: uint16(len(key))}
	sig.Addr.Family = unix.AF_INET
	copy(sig.Addr.Data[2:], []byte{127, 0, 0, 1}) // after the port
	copy(sig.Key[:], key)
	var setErr error
	if err := raw.Control(func(fd uintptr) { setErr = unix.SetsockoptTCPMD5Sig(int(fd), unix.IPPROTO_TCP, unix.TCP_MD5SIG, sig) }); err != nil {
		t.Fatal(err)
	}
	if setErr != nil {
		t.Fatal("setting the MD5 key:", setErr)
	}
}

// stop ends the router as a crash would: connection reset, nobody listens.
func (r *router) stop() {
	r.mu.Lock()
	if r.listener != nil {
		r.listener.Close()
	}
	reset(r.conn)
	r.frozen = false
	r.mu.Unlock()
	r.done.Wait()
	r.mu.Lock()
	r.rib = map[string]string{}
	r.mu.Unlock()
}

func reset(conn net.Conn) {
	if tcp, ok := conn.(*net.TCPConn); ok {
		_ = tcp.SetLinger(0)
		_ = tcp.Close()
	}
}

func (r *router) with(fn func()) {
	r.mu.Lock()
	defer r.mu.Unlock()
	fn()
}

func (r *router) serve(conn net.Conn) {
	defer r.with(func() { r.conn, r.rib = nil, map[string]string{} })
	up := false
	for {
		r.mu.Lock()
		frozen := r.frozen
		r.mu.Unlock()
		if frozen {
			time.Sleep(10 * time.Millisecond)
			continue
		}
		msg, err := readMessage(conn)
		if err != nil {
			return
		}
		switch body := msg.Body.(type) {
		case *bgp.BGPOpen:
			r.mu.Lock()
			mute, deaf, refuse := r.mute, r.deaf, r.refuse
			r.mu.Unlock()
			if mute {
				continue
			}
			if refuse != nil {
				send(conn, refuse)
				return
			}
			as := uint16(min(r.asn, bgp.AS_TRANS))
			send(conn, bgp.NewBGPOpenMessage(as, r.hold, "192.0.2.254", []bgp.OptionParameterInterface{
				bgp.NewOptionParameterCapability([]bgp.ParameterCapabilityInterface{
					bgp.NewCapMultiProtocol(bgp.RF_IPv4_UC), bgp.NewCapMultiProtocol(bgp.RF_IPv6_UC),
					bgp.NewCapFourOctetASNumber(r.asn),
				})}))
			send(conn, bgp.NewBGPKeepAliveMessage())
			if !deaf {
				stop := make(chan struct{})
				defer close(stop)
				r.done.Go(func() {
					for {
						select {
						case <-stop:
							return
						case <-time.After(time.Second):
							send(conn, bgp.NewBGPKeepAliveMessage())
						}
					}
				})
			}
		case *bgp.BGPKeepAlive:
			r.with(func() {
				r.keepalives++
				if !up {
					up = true
					r.ups++
				}
			})
		case *bgp.BGPUpdate:
			r.with(func() { r.hear(body) })
		case *bgp.BGPNotification:
			text := ""
			if len(body.Data) > 1 {
				text = string(body.Data[1:])
			}
			r.with(func() { r.ceases = append(r.ceases, notification(body.ErrorCode, body.ErrorSubcode, text)) })
			return
		}
	}
}

// hear takes an UPDATE into the table. A message without a prefix (End-of-RIB) does not count.
func (r *router) hear(u *bgp.BGPUpdate) {
	var gone, come []bgp.AddrPrefixInterface
	for _, p := range u.WithdrawnRoutes {
		gone = append(gone, p)
	}
	for _, p := range u.NLRI {
		come = append(come, p)
	}
	var attrs []string
	for _, a := range u.PathAttributes {
		switch a := a.(type) {
		case *bgp.PathAttributeMpReachNLRI:
			come = append(come, a.Value...)
			attrs = append(attrs, "3 via "+a.Nexthop.String())
		case *bgp.PathAttributeMpUnreachNLRI:
			gone = append(gone, a.Value...)
		case *bgp.PathAttributeNextHop:
			attrs = append(attrs, "3 via "+a.Value.String())
		case *bgp.PathAttributeOrigin:
			attrs = append(attrs, fmt.Sprintf("1 origin %d", a.Value))
		case *bgp.PathAttributeAsPath:
			attrs = append(attrs, "2 as "+bgp.AsPathString(a))
		case *bgp.PathAttributeMultiExitDisc:
			attrs = append(attrs, fmt.Sprintf("4 med %d", a.Value))
		case *bgp.PathAttributeLocalPref:
			attrs = append(attrs, fmt.Sprintf("5 pref %d", a.Value))
		case *bgp.PathAttributeCommunities:
			for _, c := range a.Value {
				attrs = append(attrs, fmt.Sprintf("6 %d:%d", c>>16, c&0xffff))
			}
		case *bgp.PathAttributeLargeCommunities:
			for _, c := range a.Values {
				attrs = append(attrs, "7 "+c.String())
			}
		default:
			attrs = append(attrs, fmt.Sprintf("9 attribute %d", a.GetType()))
		}
	}
	if len(gone)+len(come) == 0 {
		return
	}
	r.updates++
	slices.Sort(attrs)
	for i, a := range attrs {
		attrs[i] = a[2:]
	}
	for _, p := range gone {
		delete(r.rib, p.String())
		r.log = append(r.log, "- "+p.String())
	}
	for _, p := range come {
		r.rib[p.String()] = strings.Join(attrs, " ")
		r.log = append(r.log, "+ "+p.String())
	}
}

// announce sends routes for IPv4 prefixes.
func (r *router) announce(prefixes ...string) {
	r.mu.Lock()
	conn := r.conn
	r.mu.Unlock()
	for chunk := range slices.Chunk(prefixes, 500) {
		var nlri []*bgp.IPAddrPrefix
		for _, p := range chunk {
			prefix := netip.MustParsePrefix(p)
			nlri = append(nlri, bgp.NewIPAddrPrefix(uint8(prefix.Bits()), prefix.Addr().String()))
		}
		send(conn, bgp.NewBGPUpdateMessage(nil, []bgp.PathAttributeInterface{
			bgp.NewPathAttributeOrigin(0),
			bgp.NewPathAttributeAsPath([]bgp.AsPathParamInterface{bgp.NewAs4PathParam(bgp.BGP_ASPATH_ATTR_TYPE_SEQ, []uint32{r.asn})}),
			bgp.NewPathAttributeNextHop(r.addr.Addr().String()),
		}, nlri))
	}
}

func (r *router) notify(code, sub uint8, text string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	var data []byte
	if text != "" {
		data = append([]byte{byte(len(text))}, text...)
	}
	send(r.conn, bgp.NewBGPNotificationMessage(code, sub, data))
	r.conn.Close()
}

func send(conn net.Conn, msg *bgp.BGPMessage) {
	if b, err := msg.Serialize(); err == nil && conn != nil {
		_, _ = conn.Write(b)
	}
}

func readMessage(conn net.Conn) (*bgp.BGPMessage, error) {
	head := make([]byte, bgp.BGP_HEADER_LENGTH)
	if _, err := io.ReadFull(conn, head); err != nil {
		return nil, err
	}
	h := &bgp.BGPHeader{}
	if err := h.DecodeFromBytes(head); err != nil {
		return nil, err
	}
	body := make([]byte, int(h.Len)-bgp.BGP_HEADER_LENGTH)
	if _, err := io.ReadFull(conn, body); err != nil {
		return nil, err
	}
	return bgp.ParseBGPBody(h, body)
}

// table returns what the router holds, a route a line, sorted.
func (r *router) table() string {
	r.mu.Lock()
	defer r.mu.Unlock()
	var b strings.Builder
	for _, prefix := range slices.Sorted(maps.Keys(r.rib)) {
		fmt.Fprintf(&b, "%s %s\n", prefix, r.rib[prefix])
	}
	return b.String()
}

// counts returns the sessions and UPDATEs so far.
func (r *router) counts() string {
	r.mu.Lock()
	defer r.mu.Unlock()
	return fmt.Sprintf("%d sessions, %d updates", r.ups, r.updates)
}

// forgetLog begins a new log.
func (r *router) forgetLog() { r.with(func() { r.log = nil }) }

// sorted returns the log with withdrawals first in each run of a kind, which is the order that a session's start may
// change: GoBGP sends its table in any order then.
func (r *router) sorted() string {
	r.mu.Lock()
	defer r.mu.Unlock()
	log := slices.Clone(r.log)
	for i := 0; i < len(log); {
		j := i
		for j < len(log) && log[j][0] == log[i][0] {
			j++
		}
		slices.Sort(log[i:j])
		i = j
	}
	return strings.Join(log, " ")
}

// awaitKeepalive waits for the next KEEPALIVE: everything that was sent before it has been heard then.
func (r *router) awaitKeepalive() {
	r.t.Helper()
	r.mu.Lock()
	seen := r.keepalives
	r.mu.Unlock()
	eventually(r.t, "a keepalive to "+r.addr.String(), func() error {
		r.mu.Lock()
		defer r.mu.Unlock()
		if r.keepalives == seen {
			return fmt.Errorf("none after %d", seen)
		}
		return nil
	})
}

// eventually calls check until it returns nil, or 10 s have passed.
func eventually(t testing.TB, what string, check func() error) {
	t.Helper()
	deadline := time.Now().Add(10 * time.Second)
	for {
		err := check()
		if err == nil {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("%s: %v", what, err)
		}
		time.Sleep(2 * time.Millisecond)
	}
}

// want waits until the router's table is as given.
func (r *router) want(lines ...string) {
	r.t.Helper()
	want := ""
	for _, line := range lines {
		want += line + "\n"
	}
	eventually(r.t, "the table of "+r.addr.String(), func() error {
		if got := r.table(); got != want {
			return fmt.Errorf("\ngot:\n%swant:\n%s", got, want)
		}
		return nil
	})
}

// wantUps waits until the router has seen n sessions, and one is up.
func (r *router) wantUps(n int) {
	r.t.Helper()
	eventually(r.t, "sessions of "+r.addr.String(), func() error {
		r.mu.Lock()
		defer r.mu.Unlock()
		if r.ups != n || r.conn == nil {
			return fmt.Errorf("%d, want %d", r.ups, n)
		}
		return nil
	})
}
