package realserver

import (
	"context"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/ravel-lb/ravel"
	"github.com/ravel-lb/ravel/internal/iptables"
	"github.com/ravel-lb/ravel/internal/nettest"
	"github.com/ravel-lb/ravel/internal/sysctl"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

func TestMain(m *testing.M) { nettest.Main(m) }

// lab is a node (the test's own namespace), a client and pods, each a namespace with a veth to the node.
type lab struct {
	t    *testing.T
	pods int
}

const clientNS = "client"

var (
	vip4    = netip.MustParseAddr("192.0.2.1")
	vip6    = netip.MustParseAddr("2001:db8::1")
	client4 = netip.MustParseAddr("10.1.0.2")
	client6 = netip.MustParseAddr("fd01::2")
)

func newLab(t *testing.T, pods int) *lab {
	t.Helper()
	l := &lab{t: t, pods: pods}
	l.wire(clientNS, "10.1.0", "fd01:")
	nettest.Shell(t, `ip -n client route replace default via 10.1.0.1; ip -n client route replace default via fd01::1`)
	for i := range pods {
		l.wire(podNS(i), fmt.Sprintf("10.2.%d", i+1), fmt.Sprintf("fd02:%d:", i+1))
		nettest.Shell(t, fmt.Sprintf("ip -n %[1]s route replace default via 10.2.%[2]d.1; ip -n %[1]s route replace default via fd02:%[2]d::1", podNS(i), i+1))
	}
	nettest.Shell(t, `echo 1 >/proc/sys/net/ipv4/ip_forward; echo 1 >/proc/sys/net/ipv6/conf/all/forwarding`)
	return l
}

// wire makes a namespace, joined to the node by a veth of the same name: .1 the node, .2 the other end.
func (l *lab) wire(ns, net4, net6 string) {
	l.t.Helper()
	nettest.Shell(l.t, fmt.Sprintf(`echo 0 >/proc/sys/net/ipv6/conf/default/accept_dad
		ip netns add %[1]s; ip netns exec %[1]s sh -c 'echo 0 >/proc/sys/net/ipv6/conf/default/accept_dad'
		ip link add %[1]s type veth peer name eth0 netns %[1]s
		ip addr add %[2]s.1/24 dev %[1]s; ip addr add %[3]s:1/64 dev %[1]s nodad; ip link set %[1]s up
		ip -n %[1]s addr add %[2]s.2/24 dev eth0; ip -n %[1]s addr add %[3]s:2/64 dev eth0 nodad
		ip -n %[1]s link set eth0 up; ip -n %[1]s link set lo up`, ns, net4, net6))
	l.t.Cleanup(func() { _ = exec.Command("bash", "-c", "ip link del "+ns+"; ip netns del "+ns).Run() })
}

func podNS(i int) string { return fmt.Sprintf("pod%d", i+1) }

// pod returns the address of a pod in the family of vip.
func pod(i int, vip netip.Addr) netip.Addr {
	if vip.Is4() {
		return netip.AddrFrom4([4]byte{10, 2, byte(i + 1), 2})
	}
	return netip.MustParseAddr(fmt.Sprintf("fd02:%d::2", i+1))
}

// in runs fn on a thread in the namespace.
func in(t testing.TB, ns string, fn func() error) {
	t.Helper()
	if err := inNS(ns, fn); err != nil {
		t.Fatalf("in %s: %v", ns, err)
	}
}

func inNS(ns string, fn func() error) error {
	done := make(chan error)
	go func() {
		runtime.LockOSThread() // for ever: the thread ends with the goroutine
		f, err := os.Open(filepath.Join("/run/netns", ns))
		if err == nil {
			err = unix.Setns(int(f.Fd()), unix.CLONE_NEWNET)
			f.Close()
		}
		if err == nil {
			err = fn()
		}
		done <- err
	}()
	return <-done
}

// serve answers TCP and UDP on a port of every pod, both families, with "podN CLIENT\n", and TCP then with an echo.
func (l *lab) serve(port uint16) {
	l.t.Helper()
	var wg sync.WaitGroup
	var closers []io.Closer
	done, cancel := context.WithCancel(context.Background())
	for i := range l.pods {
		for _, vip := range []netip.Addr{vip4, vip6} {
			at := netip.AddrPortFrom(pod(i, vip), port)
			var tcp net.Listener
			var udp *net.UDPConn
			in(l.t, podNS(i), func() (err error) {
				if tcp, err = net.Listen("tcp", at.String()); err != nil {
					return err
				}
				udp, err = net.ListenUDP("udp", net.UDPAddrFromAddrPort(at))
				return err
			})
			closers = append(closers, tcp, udp)
			wg.Add(2)
			go func() {
				defer wg.Done()
				for {
					c, err := tcp.Accept()
					if err != nil {
						return
					}
					wg.Add(1)
					go func() {
						defer wg.Done()
						defer c.Close()
						defer context.AfterFunc(done, func() { c.Close() })() // whose client's FIN may never come
						fmt.Fprintf(c, "%s %s\n", podNS(i), c.RemoteAddr())
						_, _ = io.Copy(c, c)
					}()
				}
			}()
			go func() {
				defer wg.Done()
				b := make([]byte, 2048)
				for {
					_, from, err := udp.ReadFromUDPAddrPort(b)
					if err != nil {
						return
					}
					_, _ = udp.WriteToUDPAddrPort(fmt.Appendf(nil, "%s %s\n", podNS(i), from), from)
				}
			}()
		}
	}
	l.t.Cleanup(func() {
		cancel()
		for _, c := range closers {
			c.Close()
		}
		wg.Wait()
	})
}

// How long a client waits for an answer that must come, on a machine that may be busy, and for one that must not.
const (
	patience = 15 * time.Second
	aMoment  = time.Second
)

// dial connects the client to a key. For UDP it never fails.
func dial(key ravel.ServiceKey) (c net.Conn, err error) { return dialFor(key, patience) }

func dialFor(key ravel.ServiceKey, wait time.Duration) (c net.Conn, err error) {
	return dialFrom(clientNS, key, wait)
}

// dialFrom connects from a namespace.
func dialFrom(ns string, key ravel.ServiceKey, wait time.Duration) (c net.Conn, err error) {
	err = inNS(ns, func() error {
		d := net.Dialer{Timeout: wait}
		c, err = d.Dial(key.Proto.String(), netip.AddrPortFrom(key.VIP, key.Port).String())
		return err
	})
	return c, err
}

// ask makes one request and returns the pod and the address that it saw, and the client's own.
func ask(key ravel.ServiceKey) (pod string, saw, own netip.AddrPort, err error) {
	return askFor(key, patience)
}

func askFor(key ravel.ServiceKey, wait time.Duration) (pod string, saw, own netip.AddrPort, err error) {
	c, err := dialFor(key, wait)
	if err != nil {
		return "", saw, own, err
	}
	defer c.Close()
	pod, saw, err = askOnFor(c, wait)
	return pod, saw, netip.MustParseAddrPort(c.LocalAddr().String()), err
}

// askOn asks on a connection. A connected UDP socket takes answers from the VIP's address and port alone.
func askOn(c net.Conn) (pod string, saw netip.AddrPort, err error) { return askOnFor(c, patience) }

func askOnFor(c net.Conn, wait time.Duration) (pod string, saw netip.AddrPort, err error) {
	_ = c.SetDeadline(time.Now().Add(wait))
	if c.RemoteAddr().Network() == "udp" {
		if _, err := c.Write([]byte("?")); err != nil {
			return "", saw, err
		}
	}
	b := make([]byte, 200)
	n, err := c.Read(b)
	if err != nil {
		return "", saw, err
	}
	pod, from, _ := strings.Cut(strings.TrimSpace(string(b[:n])), " ")
	saw, err = netip.ParseAddrPort(from)
	return pod, saw, err
}

// echo sends text on a TCP connection that has been asked on and wants it back.
func echo(c net.Conn, text string) error {
	_ = c.SetDeadline(time.Now().Add(patience))
	if _, err := io.WriteString(c, text); err != nil {
		return err
	}
	b := make([]byte, len(text))
	if _, err := io.ReadFull(c, b); err != nil {
		return err
	}
	if string(b) != text {
		return fmt.Errorf("echo of %q is %q", text, b)
	}
	return nil
}

// stopped wants what ask sends to an address to come to the node and none of it to go on to a pod: that nobody answered
// within a moment says little on a machine that is busy.
func stopped(t *testing.T, v iptables.Variant, to netip.Addr, proto string, ask func()) {
	t.Helper()
	command, pods := "iptables-"+string(v), "10.2.0.0/16"
	if to.Is6() {
		command, pods = "ip6tables-"+string(v), "fd02::/16"
	}
	came := fmt.Sprintf("PREROUTING -d %s -p %s", host(to), proto)
	went := fmt.Sprintf("POSTROUTING -d %s -p %s", pods, proto)
	nettest.Shell(t, fmt.Sprintf("%[1]s -t mangle -A %[2]s; %[1]s -t mangle -A %[3]s", command, came, went))
	defer func() {
		nettest.Shell(t, fmt.Sprintf("%[1]s -t mangle -D %[2]s; %[1]s -t mangle -D %[3]s", command, came, went))
	}()
	ask()
	eventually(t, func() error {
		if counted(t, command, "mangle", "-A "+came) == 0 {
			return fmt.Errorf("nothing came to %s", to)
		}
		return nil
	})
	if n := counted(t, command, "mangle", "-A "+went); n != 0 {
		t.Errorf("%d packets for %s went on to a pod", n, to)
	}
}

var features = map[iptables.Variant]nettest.Feature{iptables.NFT: nettest.NftNAT, iptables.Legacy: nettest.LegacyNAT}

// eachVariant runs fn with empty tables of each variant that this kernel has.
func eachVariant(t *testing.T, fn func(t *testing.T, v iptables.Variant)) {
	for _, v := range []iptables.Variant{iptables.NFT, iptables.Legacy} {
		t.Run(string(v), func(t *testing.T) {
			nettest.Need(t, nettest.Root, features[v])
			flush(t, v)
			t.Cleanup(func() { flush(t, v) })
			fn(t, v)
		})
	}
}

// flush empties all tables of a variant, policies too, and conntrack.
func flush(t testing.TB, v iptables.Variant) {
	t.Helper()
	for _, f := range []string{"iptables", "ip6tables"} {
		cmd := exec.Command(f + "-" + string(v) + "-restore")
		cmd.Stdin = strings.NewReader("*raw\nCOMMIT\n*mangle\nCOMMIT\n*nat\nCOMMIT\n*filter\n:INPUT ACCEPT\n:FORWARD ACCEPT\n:OUTPUT ACCEPT\nCOMMIT\n")
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Fatalf("flushing %s-%s: %v: %s", f, v, err, out)
		}
	}
	flushFlows(t)
}

// newReal returns a Realserver on the test's own namespace.
func newReal(t testing.TB, v iptables.Variant, change func(*Options)) *Realserver {
	t.Helper()
	o := Options{Sysctl: sysctl.New("/proc/sys", filepath.Join(t.TempDir(), "sysctl.json"))}
	for f, to := range map[iptables.Family]**iptables.Tables{iptables.V4: &o.V4, iptables.V6: &o.V6} {
		tables, err := iptables.Open(v, f)
		if err != nil {
			t.Fatal(err)
		}
		*to = tables
	}
	if change != nil {
		change(&o)
	}
	r, err := New(o)
	if err != nil {
		t.Fatal(err)
	}
	return r
}

// apply applies and wants exactly the keys with pods held.
func apply(t testing.TB, r *Realserver, redirects ...ravel.Redirect) {
	t.Helper()
	held, err := r.Apply(context.Background(), redirects, directors)
	if err != nil {
		t.Fatal(err)
	}
	var want []ravel.ServiceKey
	for _, x := range redirects {
		if len(x.Pods) > 0 {
			want = append(want, x.Key)
		}
	}
	slices.SortFunc(want, ravel.ServiceKey.Compare)
	if !slices.Equal(held, want) {
		t.Fatalf("held %v, want %v; problems %v", held, want, r.Problems())
	}
}

var directors = []netip.Addr{client4, client6}

// redirect makes one to pods by their numbers.
func redirect(proto ravel.Proto, vip netip.Addr, port uint16, pods ...int) ravel.Redirect {
	r := ravel.Redirect{Key: ravel.ServiceKey{VIP: vip, Proto: proto, Port: port}, Name: "default/web:http"}
	for _, i := range pods {
		r.Pods = append(r.Pods, netip.AddrPortFrom(pod(i, vip), 8080))
	}
	return r
}

// saved returns all rules of both families, without counters and comments.
func saved(t testing.TB, v iptables.Variant) string {
	t.Helper()
	var b strings.Builder
	for _, f := range []string{"iptables", "ip6tables"} {
		for _, table := range []string{"raw", "mangle", "nat", "filter"} {
			out := nettest.Run(t, f+"-"+string(v)+"-save", "-t", table)
			for line := range strings.Lines(out) {
				if line[0] != '#' {
					if line[0] == ':' {
						line, _, _ = strings.Cut(line, "[")
					}
					b.WriteString(strings.TrimSpace(line) + "\n")
				}
			}
		}
	}
	return b.String()
}

func flushFlows(t testing.TB) {
	t.Helper()
	if err := netlink.ConntrackTableFlush(netlink.ConntrackTable); err != nil {
		t.Fatalf("flushing conntrack: %v", err)
	}
}

// eventually polls until fn returns no error.
func eventually(t testing.TB, fn func() error) {
	t.Helper()
	deadline := time.Now().Add(patience)
	for {
		err := fn()
		if err == nil {
			return
		}
		if time.Now().After(deadline) {
			t.Fatal(err)
		}
		time.Sleep(10 * time.Millisecond)
	}
}
