package health

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"os"
	"runtime"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ravel-lb/ravel"
	"github.com/ravel-lb/ravel/internal/nettest"
)

// A node at the other end of a veth pair, and behind it addresses that its router part knows nothing of.
const topology = `
ip netns add node
ip link add d0 type veth peer name n0 netns node
ip link set d0 up
ip -n node link set lo up
ip -n node link set n0 up
ip addr add 10.99.0.1/24 dev d0
ip addr add fd00:99::1/64 dev d0 nodad
ip -n node addr add 10.99.0.2/24 dev n0
ip -n node addr add fd00:99::2/64 dev n0 nodad
ip netns exec node sysctl -qw net.ipv4.ip_forward=1 net.ipv6.conf.all.forwarding=1 \
	net.ipv4.icmp_ratelimit=0 net.ipv6.icmp.ratelimit=0
ip route add 10.98.0.0/24 via 10.99.0.2
ip route add fd00:98::/64 via fd00:99::2
ip route add unreachable 10.97.0.0/24
ip route add unreachable fd00:97::/64
ip route add prohibit 10.96.0.0/24
ip route add blackhole 10.95.0.0/24
`

// listenIn listens on a port of every address of the named namespace.
func listenIn(t *testing.T, netns string, port int) net.Listener {
	t.Helper()
	type listening struct {
		l   net.Listener
		err error
	}
	done := make(chan listening)
	go func() {
		runtime.LockOSThread() // never unlocked: the thread ends with the goroutine
		f, err := os.Open("/run/netns/" + netns)
		if err != nil {
			done <- listening{nil, err}
			return
		}
		defer func() { _ = f.Close() }()
		if err := unix.Setns(int(f.Fd()), unix.CLONE_NEWNET); err != nil {
			done <- listening{nil, err}
			return
		}
		l, err := net.Listen("tcp", fmt.Sprintf(":%d", port))
		done <- listening{l, err}
	}()
	got := <-done
	if got.err != nil {
		t.Fatal(got.err)
	}
	t.Cleanup(func() { _ = got.l.Close() })
	return got.l
}

// serve hands each connection to handle, until the listener is closed.
func serve(l net.Listener, handle func(net.Conn)) {
	for {
		conn, err := l.Accept()
		if err != nil {
			return
		}
		go func() {
			defer func() { _ = conn.Close() }()
			handle(conn)
		}()
	}
}

// hung accepts and says nothing until the other side is gone.
func hung(conn net.Conn) { _, _ = io.Copy(io.Discard, conn) }

// says reads a request and answers it.
func says(answer string) func(net.Conn) {
	return func(conn net.Conn) {
		if _, err := http.ReadRequest(bufio.NewReader(conn)); err == nil {
			_, _ = io.WriteString(conn, answer)
			_, _ = io.Copy(io.Discard, conn)
		}
	}
}

// once probes for a moment, where nothing is to come of it, or for as long as a busy machine may take.
func once(t *testing.T, target Target, nothing bool) (ravel.Health, error) {
	t.Helper()
	timeout := 10 * time.Second
	switch {
	case nothing && target.Port == answeredByICMP:
		// Through a veth pair an ICMP answer may come while connect(2) still holds the socket, and be ignored. The one to the
		// SYN that is sent again after 1 s is not.
		timeout = 1500 * time.Millisecond
	case nothing:
		timeout = 300 * time.Millisecond
	}
	ctx, cancel := context.WithTimeout(t.Context(), timeout)
	defer cancel()
	return probe(ctx, target)
}

const answeredByICMP = 8012

func stage(t *testing.T) {
	t.Helper()
	nettest.Need(t, nettest.Root)
	nettest.Shell(t, topology)
	t.Cleanup(func() {
		nettest.Shell(t, "ip netns del node; ip link del d0 2>/dev/null || true; ip route flush type unreachable; ip route flush type prohibit; ip route flush type blackhole; ip -6 route del unreachable fd00:97::/64")
	})
}

func TestEachProbeMeansWhatTheKernelSays(t *testing.T) {
	stage(t)
	go serve(listenIn(t, "node", 8001), hung)
	go serve(listenIn(t, "node", 8002), says("HTTP/1.1 200 OK\r\n\r\n"))
	go serve(listenIn(t, "node", 8003), says("HTTP/1.1 503 Service Unavailable\r\n\r\n"))
	go serve(listenIn(t, "node", 8004), says("no HTTP\r\n"))
	go serve(listenIn(t, "node", 8005), func(net.Conn) {})
	nettest.Shell(t, `for ipt in iptables ip6tables; do
		ip netns exec node $ipt -A INPUT -p tcp --dport 8010 -j DROP
		ip netns exec node $ipt -A INPUT -p tcp --dport 8011 -j REJECT --reject-with tcp-reset
	done
	ip netns exec node iptables -A INPUT -p tcp --dport 8012 -j REJECT --reject-with icmp-port-unreachable
	ip netns exec node ip6tables -A INPUT -p tcp --dport 8012 -j REJECT --reject-with icmp6-port-unreachable`)
	var wg sync.WaitGroup
	for _, c := range []struct {
		addrs string
		port  uint16
		kind  string
		want  ravel.Health
		why   string
	}{
		{"10.99.0.2 fd00:99::2", 8001, TCP, ravel.Healthy, ""},
		{"10.99.0.2 fd00:99::2", 8002, HTTP, ravel.Healthy, ""},
		{"10.99.0.2 fd00:99::2", 8003, HTTP, ravel.Refused, "answer of status 503"},
		{"10.99.0.2 fd00:99::2", 8004, HTTP, ravel.Refused, "malformed HTTP"},
		{"10.99.0.2 fd00:99::2", 8005, HTTP, ravel.Refused, ""},
		{"10.99.0.2 fd00:99::2", 8001, HTTP, ravel.Refused, "timeout"}, // it hangs; its kernel does not
		{"10.99.0.2 fd00:99::2", 8009, TCP, ravel.Refused, "connection refused"},
		{"10.99.0.2 fd00:99::2", 8011, TCP, ravel.Refused, "connection refused"},
		{"10.99.0.2 fd00:99::2", answeredByICMP, TCP, ravel.Refused, "connection refused"},
		{"10.99.0.2 fd00:99::2", 8010, TCP, ravel.Silent, "timeout"},
		{"10.99.0.3 fd00:99::3", 8001, TCP, ravel.Silent, ""}, // no neighbour
		{"10.98.0.1 fd00:98::1", answeredByICMP, TCP, ravel.Silent, "unreachable"},
		{"10.97.0.1 fd00:97::1", 8001, TCP, ravel.Unprobed, "no route to host"},
		{"10.96.0.1", 8001, TCP, ravel.Unprobed, "permission denied"},
		{"10.95.0.1", 8001, TCP, ravel.Unprobed, "invalid argument"},
		{"192.0.2.1 2001:db8::1", 8001, TCP, ravel.Unprobed, "network is unreachable"},
	} {
		for _, a := range strings.Fields(c.addrs) {
			wg.Go(func() {
				target := Target{Addr: netip.MustParseAddr(a), Port: c.port, Kind: c.kind}
				got, err := once(t, target, c.want == ravel.Silent || c.why == "timeout")
				if got != c.want || (got == ravel.Healthy) != (err == nil) || !strings.Contains(fmt.Sprint(err), c.why) {
					t.Errorf("%+v: %s, %v; want %s, %q", target, got, err, c.want, c.why)
				}
			})
		}
	}
	wg.Wait()
	// Nothing of it is left behind.
	for _, where := range []string{"", "ip netns exec node "} {
		if left := nettest.Shell(t, where+"ss -Htan state time-wait state fin-wait-1 state fin-wait-2 state syn-sent"); left != "" {
			t.Errorf("%sss: connections are left:\n%s", where, left)
		}
	}
}

func TestANodeGoesAndComesBack(t *testing.T) {
	stage(t)
	timing := Timing{Interval: 200 * time.Millisecond, Timeout: 200 * time.Millisecond, Rapid: 50 * time.Millisecond, Failures: 3}
	p := New(Options{Timing: timing})
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- p.Run(ctx) }()
	defer func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	}()
	v4, v6 := netip.MustParseAddr("10.99.0.2"), netip.MustParseAddr("fd00:99::2")
	if err := p.Apply([]Target{{Addr: v4, Port: 8001}, {Addr: v6, Port: 8001}}); err != nil {
		t.Fatal(err)
	}
	l := listenIn(t, "node", 8001)
	go serve(l, hung)
	step := func(what, script string, want ravel.Health) {
		t.Helper()
		nettest.Shell(t, script)
		for _, addr := range []netip.Addr{v4, v6} {
			took, found := until(p, addr, want, 20*time.Second)
			if !found {
				now, _ := p.Latest()
				t.Fatalf("%s: %s is %s, want %s", what, addr, now[addr], want)
			}
			t.Logf("%s: %s is %s after %s", what, addr, want, took.Round(time.Millisecond))
		}
	}
	drop := func(op string) string {
		return fmt.Sprintf("for ipt in iptables ip6tables; do ip netns exec node $ipt %s INPUT -p tcp -j DROP; done", op)
	}
	step("it listens", "true", ravel.Healthy)
	step("packets are dropped", drop("-A"), ravel.Silent)
	step("and no more", drop("-D"), ravel.Healthy)
	step("its link is cut", "ip -n node link set n0 down", ravel.Silent)
	step("and mended", `ip -n node link set n0 up
		ip -n node addr replace fd00:99::2/64 dev n0 nodad`, ravel.Healthy)
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	step("its agent is down", "true", ravel.Refused)
	go serve(listenIn(t, "node", 8001), hung)
	step("and up again", "true", ravel.Healthy)
	step("our own link is down", "ip link set d0 down", ravel.Unprobed)
	if problems := fmt.Sprint(p.Problems()); !strings.Contains(problems, "cannot probe 2 real servers, such as 10.99.0.2: network is unreachable") {
		t.Errorf("problems: %s", problems)
	}
	step("and up", `ip link set d0 up
		ip addr replace fd00:99::1/64 dev d0 nodad`, ravel.Healthy)
	if problems := p.Problems(); len(problems) > 0 {
		t.Errorf("problems are left: %v", problems)
	}
}

func TestNothingGoesToOthers(t *testing.T) {
	stage(t)
	go serve(listenIn(t, "node", 8002), says("HTTP/1.1 302 Found\r\nLocation: http://10.99.0.77:8002/\r\n\r\n"))
	// A rule that counts what leaves for anybody else.
	nettest.Shell(t, `iptables -N elsewhere; iptables -A OUTPUT -d 10.99.0.2 -p tcp --dport 8002 -j RETURN; iptables -A OUTPUT -j elsewhere`)
	defer nettest.Shell(t, "iptables -F OUTPUT; iptables -X elsewhere")
	t.Setenv("http_proxy", "http://10.99.0.78:3128")
	if got, err := once(t, Target{Addr: netip.MustParseAddr("10.99.0.2"), Port: 8002, Kind: HTTP}, false); got != ravel.Healthy {
		t.Fatalf("%s, %v", got, err)
	}
	if routable(Target{Addr: netip.MustParseAddr("10.99.0.79"), Port: 8002}) != true {
		t.Fatal("no route")
	}
	if out := nettest.Shell(t, "iptables -nvxL OUTPUT | awk '/elsewhere/ {print $1}'"); strings.TrimSpace(out) != "0" {
		t.Errorf("%s packets went elsewhere", strings.TrimSpace(out))
	}
}

func BenchmarkProbe(b *testing.B) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		b.Fatal(err)
	}
	defer func() { _ = l.Close() }()
	go serve(l, func(net.Conn) {})
	target := Target{Addr: netip.MustParseAddr("127.0.0.1"), Port: uint16(l.Addr().(*net.TCPAddr).Port)}
	b.ReportAllocs()
	for b.Loop() {
		ctx, cancel := context.WithTimeout(b.Context(), time.Second)
		if h, err := probe(ctx, target); h != ravel.Healthy {
			b.Fatal(h, err)
		}
		cancel()
	}
}
