package realserver

import (
	"fmt"
	"io"
	"net"
	"net/netip"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/ravel-lb/ravel"
	"github.com/ravel-lb/ravel/internal/iptables"
	"github.com/ravel-lb/ravel/internal/nettest"
)

// ends returns how long the segments may be that the client and its server send, TCP's options counted in. An empty
// namespace is the node's own.
func ends(t *testing.T, key ravel.ServiceKey, serverNS string) (client, server int) {
	t.Helper()
	c, err := dial(key)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if _, _, err := askOn(c); err != nil {
		t.Fatal(err)
	}
	if err := echo(c, strings.Repeat("0123456789", 5000)); err != nil {
		t.Errorf("full segments: %v", err)
	}
	port := c.LocalAddr().(*net.TCPAddr).Port
	mss := func(ns, side string) int {
		command := fmt.Sprintf("ss -tin %s = :%d", side, port)
		if ns != "" {
			command = "ip netns exec " + ns + " " + command
		}
		out := nettest.Shell(t, command)
		for _, word := range strings.Fields(out) {
			if n, ok := strings.CutPrefix(word, "mss:"); ok {
				mss, err := strconv.Atoi(n)
				if err != nil {
					t.Fatal(err)
				}
				return mss + 12 // with timestamps (RFC 7323), as they are by default
			}
		}
		t.Fatalf("no mss in %q", out)
		return 0
	}
	return mss(clientNS, "sport"), mss(serverNS, "dport")
}

// The MTU of a VIP shortens the segments of both ends of its flows, those of pods and of the node's own network, and of no
// other VIP's; it never makes them longer, and ends when it is gone.
func TestMTU(t *testing.T) {
	eachVariant(t, func(t *testing.T, v iptables.Variant) {
		l := newLab(t, 1)
		l.serve(8080)
		for _, vip := range []netip.Addr{vip4, vip6} {
			node, other, headers := netip.MustParseAddr("10.2.1.1"), netip.MustParseAddr("192.0.2.9"), 40
			if vip.Is6() {
				node, other, headers = netip.MustParseAddr("fd02:1::1"), netip.MustParseAddr("2001:db8::9"), 60
			}
			serveHere(t, netip.AddrPortFrom(node, 8080))
			web, host, untouched := redirect(ravel.TCP, vip, 80, 0), redirect(ravel.TCP, vip, 81), redirect(ravel.TCP, other, 80, 0)
			host.Pods = []ravel.LocalPod{netip.AddrPortFrom(node, 8080)}
			udp := redirect(ravel.UDP, vip, 53, 0)
			r := newReal(t, v, nil)
			type step struct {
				mtu, want  int
				masquerade bool
			}
			steps := []step{{mtu: 1400, want: 1400}, {mtu: 1280, want: 1280, masquerade: true}, {mtu: 9000, want: 1500}, {mtu: 0, want: 1500}}
			if !nettest.Has(nettest.PlainClock) {
				steps = steps[1:2] // the slow kernel shows that it knows the rules
			}
			for _, mtu := range steps {
				web.MTU, host.MTU, web.Masquerade = mtu.mtu, mtu.mtu, mtu.masquerade
				apply(t, r, web, host, untouched, udp)
				for _, flow := range []struct {
					key    ravel.ServiceKey
					server string
					mtu    int
				}{{web.Key, podNS(0), mtu.want}, {host.Key, "", mtu.want}, {untouched.Key, podNS(0), 1500}} {
					client, server := ends(t, flow.key, flow.server)
					if want := flow.mtu - headers; client != want || server != want {
						t.Errorf("MTU %d, %s: the client sends segments of %d, the server of %d, want %d", mtu.mtu, flow.key, client, server, want)
					}
				}
				if _, _, _, err := ask(udp.Key); err != nil {
					t.Errorf("MTU %d, %s: %v", mtu.mtu, udp.Key, err)
				}
			}
			web.MTU, untouched.MTU = 1400, 9000
			neighbour := web
			neighbour.Key.VIP = vip.Prev() // of two neighbours one rule is made
			apply(t, r, web, host, untouched, udp, neighbour)
			before := saved(t, v)
			again := newReal(t, v, nil)
			for _, f := range again.families {
				f.tables = noWriting{t, f.tables}
			}
			apply(t, again, web, host, untouched, udp, neighbour)
			if after := saved(t, v); after != before {
				t.Errorf("a restart changed the rules from\n%s\nto\n%s", before, after)
			}
			if _, err := r.Cleanup(t.Context(), false); err != nil {
				t.Fatal(err)
			}
			if left := saved(t, v); strings.Contains(left, "RAVEL") {
				t.Errorf("left behind:\n%s", left)
			}
			flushFlows(t)
		}
	})
}

// serveHere answers TCP on an address of the node itself as pods do.
func serveHere(t *testing.T, at netip.AddrPort) {
	t.Helper()
	l, err := net.Listen("tcp", at.String())
	if err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	t.Cleanup(func() { l.Close(); wg.Wait() })
	wg.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			wg.Go(func() {
				defer c.Close()
				_ = c.SetDeadline(time.Now().Add(patience))
				fmt.Fprintf(c, "node %s\n", c.RemoteAddr())
				_, _ = io.Copy(c, c)
			})
		}
	})
}

// A redirect with an MTU that no VIP may have is left out, and told.
func TestMTUOutOfRange(t *testing.T) {
	for mtu, good := range map[int]bool{-1: false, 0: true, 1279: false, 1280: true, 9216: true, 9217: false} {
		r := &Realserver{families: []*family{{v6: false}}}
		x := redirect(ravel.TCP, vip4, 80, 0)
		x.MTU = mtu
		if fault := r.fault(x); (fault == "") != good {
			t.Errorf("MTU %d: %q", mtu, fault)
		}
	}
}
