package e2e

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"github.com/ravel-lb/ravel/lab/stage"
)

// perKind is how many flows of each family and protocol a client makes: enough that each node gets some.
const perKind = 24

// exchange is one flow of a client, and what the pod said of it.
type exchange struct {
	flow  flow
	pod   stage.Pod
	seen  netip.AddrPort // the client, as the pod saw it
	large bool           // the client sent 200 kB
}

// v6 reports the family.
func (e exchange) v6() bool { return e.flow.dst.Addr().Is6() }

// tunnelled reports whether directors reach the pod's node by a tunnel.
func (e exchange) tunnelled() bool { return e.pod.Node == "r4" }

// nodeAddr is a real server's own address on its link to the pod, which masquerading takes.
func (e exchange) nodeAddr() netip.Addr {
	n := strings.TrimPrefix(e.pod.Node, "r")
	if e.v6() {
		return netip.MustParseAddr("fd00:4:" + n + "::1")
	}
	return netip.MustParseAddr("10.4." + n + ".1")
}

// clientAddr is the address of a client in the topology.
func clientAddr(node string, v6 bool) netip.Addr {
	n := strings.TrimPrefix(node, "c")
	if v6 {
		return netip.MustParseAddr("fd00:3:" + n + "::10")
	}
	return netip.MustParseAddr("10.3." + n + ".10")
}

// Replies go from the real server to the client past the directors, from the VIP, and what comes by a tunnel is no
// larger than the path takes. The pod sees who asked, unless masquerading is on.
func TestDirectServerReturn(t *testing.T) {
	s := fleet(t)
	ready(t, s)
	// Segments as a wire would carry them, not as one offloaded bunch.
	on(t, s, "c1", "ip", "link", "set", "eth1", "gso_max_segs", "1")
	for _, masquerade := range []bool{false, true} {
		t.Run(fmt.Sprintf("masquerade=%t", masquerade), func(t *testing.T) {
			must(t, s.Change(func(d *stage.Document) { d.Masquerade = masquerade }))
			for _, node := range s.Realservers() {
				for _, save := range []string{"iptables-save", "ip6tables-save"} {
					eventually(t, 20*time.Second, func() error {
						rules, err := s.Output(t.Context(), node, save, "-t", "nat")
						if err == nil && strings.Contains(rules, "-j RAVEL-MASQ\n") != masquerade {
							err = fmt.Errorf("%s masquerades: %t, want %t:\n%s", node, !masquerade, masquerade, rules)
						}
						return err
					})
				}
			}
			directServerReturn(t, s, masquerade)
		})
	}
}

func directServerReturn(t *testing.T, s *stage.Stage, masquerade bool) {
	at := func(node string) *capture { return captureAt(t, s, node, "eth1", vips) }
	servers := map[string]*capture{}
	for _, node := range s.Realservers() {
		servers[node] = at(node)
	}
	directors := map[string]*capture{}
	for _, node := range s.Directors() {
		directors[node] = at(node)
	}
	// Where replies enter the network beyond the nodes: the routers' side of the rack, and of r4's link.
	rack := []*capture{at("tor1"), at("tor2")}
	edge := captureAt(t, s, "edge", "eth2", vips)
	all := append([]*capture{edge}, rack...)
	for _, c := range servers {
		all = append(all, c)
	}
	for _, c := range directors {
		all = append(all, c)
	}

	exchanges := talk(t, s, "c1")
	nodes := map[string]int{}
	for _, e := range exchanges {
		nodes[fmt.Sprintf("%s %d %t", e.pod.Node, e.flow.proto, e.v6())]++
		want := e.flow.src
		if masquerade {
			if e.seen.Addr() != e.nodeAddr() {
				t.Errorf("%s: %s saw %s, want its node %s", e.flow, e.pod, e.seen, e.nodeAddr())
			}
		} else if e.seen != want {
			t.Errorf("%s: %s saw %s, want the client itself", e.flow, e.pod, e.seen)
		}
	}
	if want := 4 * len(s.Realservers()); len(nodes) != want {
		t.Fatalf("flows by node, protocol and IPv6: %v; want %d kinds: the test shows too little", nodes, want)
	}

	// The positive: each flow's replies are where they should be. What they are not is asked afterwards, when all
	// of them have been on the wire.
	for _, e := range exchanges {
		entry := rack
		if e.tunnelled() {
			entry = []*capture{edge}
		}
		eventually(t, 5*time.Second, func() error {
			replies := 0
			for _, c := range entry {
				for _, f := range c.frames() {
					if f.out || f.flow() != e.flow.back() {
						continue
					}
					replies++
					if f.srcMAC != servers[e.pod.Node].mac {
						t.Fatalf("%s: a reply came from another than %s (%s): %s", c.where, e.pod.Node, servers[e.pod.Node].mac, f)
					}
					if f.tunnel != 0 {
						t.Fatalf("%s: a reply in a tunnel: %s", c.where, f)
					}
				}
			}
			if replies == 0 {
				return fmt.Errorf("%s: no reply of %s where it should enter the network", e.flow, e.pod)
			}
			return nil
		})
		checkWayIn(t, e, servers, directors)
	}
	for _, c := range all {
		c.end()
	}
	for name, c := range directors {
		passed := 0
		for _, f := range c.frames() {
			if slices.Contains(vips, f.src.Addr()) {
				t.Errorf("a reply crosses %s: %s", name, f)
			}
			passed++
		}
		if passed == 0 {
			t.Errorf("nothing passed %s: the test shows too little", name)
			for _, router := range append(stage.Routers(), "spine") {
				t.Logf("%s:\n%s", router, on(t, s, router, "bash", "-c", "ip route; ip -6 route; sysctl net.ipv4.fib_multipath_hash_policy net.ipv6.fib_multipath_hash_policy"))
			}
		}
	}
	checkSegments(t, exchanges, servers)
}

// checkWayIn looks at how a flow's packets came to its real server: from a director's MAC to the VIP itself, or to r4 in
// a tunnel from a director.
func checkWayIn(t *testing.T, e exchange, servers, directors map[string]*capture) {
	t.Helper()
	came := 0
	for _, f := range servers[e.pod.Node].frames() {
		if f.out || f.flow() != e.flow {
			continue
		}
		came++
		var from string
		for name, d := range directors {
			n := strings.TrimPrefix(name, "d")
			switch {
			case e.tunnelled() && (f.outerSrc == netip.MustParseAddr("10.1.0.1"+n) || f.outerSrc == netip.MustParseAddr("fd00:1::1"+n)):
				from = name
			case !e.tunnelled() && f.srcMAC == d.mac && f.tunnel == 0:
				from = name
			}
		}
		proto, to := unix.IPPROTO_IPIP, netip.MustParseAddr("10.2.0.24")
		if e.v6() {
			proto, to = unix.IPPROTO_IPV6, netip.MustParseAddr("fd00:2::24")
		}
		if from == "" || e.tunnelled() && (f.tunnel != proto || f.outerDst != to) {
			t.Fatalf("%s: a packet came to %s in another way: %s", e.flow, e.pod.Node, f)
		}
	}
	if came == 0 {
		t.Fatalf("%s: no packet of it came to %s, whose pod answered", e.flow, e.pod.Node)
	}
}

// checkSegments looks at what the two ends agreed on: the longest segment that fits the tunnel, and no less where there
// is none; and that a large upload was not in fragments.
func checkSegments(t *testing.T, exchanges []exchange, servers map[string]*capture) {
	t.Helper()
	large := map[string]int{}
	for _, e := range exchanges {
		if e.flow.proto != unix.IPPROTO_TCP {
			continue
		}
		want := 1460
		switch {
		case e.tunnelled() && e.v6():
			want = 1500 - 40 - 60
		case e.tunnelled():
			want = 1500 - 20 - 40
		case e.v6():
			want = 1440
		}
		agreed, full := 0, 0
		for _, f := range servers[e.pod.Node].frames() {
			if f.out && f.flow() == e.flow.back() && f.syn && f.ack {
				agreed++
				if f.mss != want {
					t.Errorf("%s: %s offers segments of %d bytes, want %d", e.flow, e.pod.Node, f.mss, want)
				}
			}
			if !f.out && f.flow() == e.flow {
				if f.fragment || f.length > 1500 {
					t.Errorf("%s: %s got a fragment, or more than a packet: %s", e.flow, e.pod.Node, f)
				}
				if f.length > 1450 {
					full++
				}
			}
		}
		if agreed == 0 {
			t.Errorf("%s: no SYN-ACK of %s", e.flow, e.pod.Node)
		}
		if e.large && full > 50 {
			large[fmt.Sprintf("tunnel=%t v6=%t", e.tunnelled(), e.v6())]++
		}
	}
	if len(large) != 4 {
		t.Errorf("large uploads in full segments: %v; want both ways in both families", large)
	}
}

// talk makes flows of both families and protocols to port 80 of the VIPs, one after the other. Those by TCP send 200 kB
// until each way in each family had some.
func talk(t *testing.T, s *stage.Stage, client string) []exchange {
	t.Helper()
	pods := map[string]stage.Pod{}
	for _, p := range s.Pods {
		pods[p.String()] = p
	}
	var exchanges []exchange
	uploads := map[string]int{}
	for _, vip := range vips {
		for _, network := range []string{"tcp", "udp"} {
			answered := map[string]bool{} // nodes; each should have some flows of each kind
			for i := 0; i < perKind || len(answered) < len(s.Realservers()) && i < 10*perKind; i++ {
				e := exchange{flow: flow{proto: unix.IPPROTO_TCP, dst: netip.AddrPortFrom(vip, 80)}}
				if network == "udp" {
					e.flow.proto = unix.IPPROTO_UDP
				}
				conn, err := dialFrom(s, client, nextPort, network, e.flow.dst)
				must(t, err)
				nextPort++
				e.flow.src = conn.LocalAddr().(interface{ AddrPort() netip.AddrPort }).AddrPort()
				e.flow.src = netip.AddrPortFrom(e.flow.src.Addr().Unmap(), e.flow.src.Port())
				if want := clientAddr(client, vip.Is6()); e.flow.src.Addr() != want {
					t.Fatalf("the client's address is %s, not %s", e.flow.src, want)
				}
				text := fmt.Sprintf("%s-%d", network, i)
				var name string
				name, e.seen, err = ask(conn, text)
				if err != nil {
					t.Fatalf("%s: %v", e.flow, err)
				}
				e.pod = pods[name]
				answered[e.pod.Node] = true
				kind := fmt.Sprint(e.tunnelled(), e.v6())
				if network == "tcp" && uploads[kind] < 2 {
					uploads[kind]++
					e.large = true
					if err := upload(conn, name); err != nil {
						t.Fatalf("%s, 200 kB to %s: %v", e.flow, name, err)
					}
				}
				must(t, conn.Close())
				exchanges = append(exchanges, e)
			}
		}
	}
	return exchanges
}

// nextPort is where the next flow of talk comes from: below what sockets get by themselves, so that no test before had a
// flow from there, of which conntrack or IPVS may know still.
var nextPort uint16 = 12000

// dialFrom opens a socket on a node, at a port of it, or any if 0.
func dialFrom(s *stage.Stage, node string, port uint16, network string, to netip.AddrPort) (conn net.Conn, err error) {
	dialer := net.Dialer{Timeout: 5 * time.Second, LocalAddr: &net.TCPAddr{Port: int(port)}}
	if network == "udp" {
		dialer.LocalAddr = &net.UDPAddr{Port: int(port)}
	}
	err = s.Fleet.Node(node).Do(func() error {
		conn, err = dialer.Dial(network, to.String())
		return err
	})
	return conn, err
}

// ask sends a line and returns which pod answered, and whom it saw. A datagram may be lost, as while a link looks for its
// neighbour: it is sent again.
func ask(conn net.Conn, text string) (pod string, client netip.AddrPort, err error) {
	tries, patience := 1, 10*time.Second
	if conn.RemoteAddr().Network() == "udp" {
		tries, patience = 5, 2*time.Second
	}
	var line string
	for range tries {
		_ = conn.SetDeadline(time.Now().Add(patience))
		if _, err = conn.Write([]byte(text + "\n")); err != nil {
			return "", client, err
		}
		if line, err = bufio.NewReader(conn).ReadString('\n'); !errors.Is(err, os.ErrDeadlineExceeded) {
			break
		}
	}
	if err != nil {
		return "", client, err
	}
	words := strings.Fields(line)
	if len(words) != 3 || words[2] != text {
		return "", client, fmt.Errorf("%q is no answer to %q", line, text)
	}
	client, err = netip.ParseAddrPort(words[1])
	return words[0], client, err
}

// upload sends 200 kB as fast as it can and reads the answers to all of it.
func upload(conn net.Conn, pod string) error {
	line := append(bytes.Repeat([]byte("x"), 399), '\n')
	_ = conn.SetDeadline(time.Now().Add(20 * time.Second))
	var group errgroup.Group
	group.Go(func() error {
		_, err := conn.Write(bytes.Repeat(line, 500))
		return err
	})
	lines := bufio.NewScanner(conn)
	answers := 0
	for answers < 500 && lines.Scan() {
		words := strings.Fields(lines.Text())
		if len(words) != 3 || words[0] != pod || words[2] != string(line[:399]) {
			return fmt.Errorf("a garbled answer: %.60q", lines.Text())
		}
		answers++
	}
	if answers < 500 {
		return errors.Join(fmt.Errorf("%d answers to 500 lines", answers), lines.Err(), group.Wait())
	}
	return group.Wait()
}
