package realserver

import (
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"testing"

	"github.com/ravel-lb/ravel"
	"github.com/ravel-lb/ravel/internal/iptables"
	"github.com/ravel-lb/ravel/internal/nettest"
)

var (
	stranger4 = netip.MustParseAddr("10.1.0.3")
	stranger6 = netip.MustParseAddr("fd01::3")
)

// tunnelTo makes the client wrap what it sends to dst by a tunnel from source, as a director at that address would.
func tunnelTo(t *testing.T, dst netip.Addr, from netip.Addr) {
	t.Helper()
	kind, dev, node, bits := "ipip", "d4", "10.1.0.1", 32
	if dst.Is6() {
		kind, dev, node, bits = "ip6tnl mode ip6ip6 encaplimit none", "d6", "fd01::1", 128
	}
	nettest.Shell(t, fmt.Sprintf(`ip -n client link del %[1]s 2>/dev/null || true
		ip -n client link add %[1]s type %[2]s local %[3]s remote %[4]s
		ip -n client link set %[1]s up mtu 1500
		ip -n client route replace %[5]s/%[6]d dev %[1]s src %[7]s`, dev, kind, from, node, dst, bits,
		map[bool]string{true: client4.String(), false: client6.String()}[dst.Is4()]))
}

// Packets for a VIP are taken out of a tunnel from a director alone; another program's tunnels go on.
func TestTunnel(t *testing.T) {
	// No kernel here has both tunnels and nft's NAT, and the rules are the same text: legacy is what must run.
	nettest.Need(t, nettest.IPIP, nettest.LegacyNAT)
	for v, feature := range features {
		if !nettest.Has(feature) {
			continue
		}
		for _, vip := range []netip.Addr{vip4, vip6} {
			t.Run(string(v)+"/"+vip.String(), func(t *testing.T) {
				t.Cleanup(func() { flush(t, v) })
				testTunnel(t, v, vip)
			})
		}
	}
}

func testTunnel(t *testing.T, v iptables.Variant, vip netip.Addr) {
	flush(t, v)
	l := newLab(t, 2)
	l.serve(8080)
	director, stranger, device, command := client4, stranger4, "tunl0", "iptables"
	header := 20
	if vip.Is6() {
		director, stranger, device, command = client6, stranger6, "ip6tnl0", "ip6tables"
		header = 40
	}
	nettest.Shell(t, `ip -n client addr add 10.1.0.3/24 dev eth0; ip -n client addr add fd01::3/64 dev eth0 nodad
		echo 1 >/proc/sys/net/ipv4/conf/all/rp_filter`)
	t.Cleanup(func() { nettest.Shell(t, `echo 0 >/proc/sys/net/ipv4/conf/all/rp_filter`) })
	nettest.Shell(t, command+"-"+string(v)+" -P FORWARD DROP; "+command+"-"+string(v)+" -A INPUT -p icmp -j ACCEPT; "+
		command+"-"+string(v)+" -A INPUT -p ipv6-icmp -j ACCEPT; "+command+"-"+string(v)+" -P INPUT DROP")

	r := newReal(t, v, nil)
	tcp, udp := redirect(ravel.TCP, vip, 80, 0, 1), redirect(ravel.UDP, vip, 53, 0, 1)
	tcp.Tunnelled, udp.Tunnelled = true, true
	apply(t, r, tcp, udp)
	if p := r.Problems(); len(p) > 0 {
		t.Fatalf("problems: %v", p)
	}

	tunnelTo(t, vip, director)
	for _, key := range []ravel.ServiceKey{tcp.Key, udp.Key} {
		pod, saw, own, err := ask(key)
		if err != nil {
			t.Fatalf("%s by the director's tunnel: %v\n%s", key, err, nettest.Shell(t, command+"-"+string(v)+"-save -c; nstat -az | grep -iE 'rpf|InNoRoutes'; ip -s link show "+device))
		}
		if saw != own {
			t.Errorf("%s: %s saw %s, want the client's %s", key, pod, saw, own)
		}
	}
	// What the link to the director leaves is taken by itself; a smaller one shows on the wire that the rule is met.
	if rules := saved(t, v); !strings.Contains(rules, fmt.Sprintf("-j TCPMSS --set-mss %d\n", 1500-2*header-20)) {
		t.Errorf("segments are not clamped to what the link leaves:\n%s", rules)
	}
	r.mtu = 1300
	apply(t, r, tcp, udp)
	if got, want := clientMSS(t, tcp.Key), 1300-2*header-20; got != want {
		t.Errorf("segments through the tunnel are of %d bytes, want %d", got, want)
	}

	// Without INPUT's policy it is our rule alone that keeps a stranger out.
	nettest.Shell(t, command+"-"+string(v)+" -P FORWARD ACCEPT; "+command+"-"+string(v)+" -P INPUT ACCEPT")
	tunnelTo(t, vip, stranger)
	for _, key := range []ravel.ServiceKey{tcp.Key, udp.Key} {
		if pod, _, _, err := askFor(key, aMoment); err == nil {
			t.Errorf("%s by a stranger's tunnel: %s answered", key, pod)
		}
	}
	if out := nettest.Shell(t, command+"-"+string(v)+"-save -c -t mangle | grep -- '-j DROP'"); strings.Contains(out, "[0:0]") {
		t.Errorf("the stranger's packets were not dropped by our rule: %s", out)
	}

	// A stranger's packets for others go on: the device serves an overlay too.
	overlay := pod(0, vip)
	tunnelTo(t, overlay, stranger)
	before := received(t, device)
	family := map[bool]string{true: "-4", false: "-6"}[vip.Is4()]
	if out, err := exec.Command("ip", "netns", "exec", "client", "ping", family, "-c1", "-W2", overlay.String()).CombinedOutput(); err != nil {
		t.Errorf("overlay by %s: %v\n%s", device, err, out)
	}
	if now := received(t, device); now != before+1 {
		t.Errorf("%s took %d packets of the overlay, want 1", device, now-before)
	}

	// The clamp is for what came by the tunnel alone.
	nettest.Shell(t, "ip -n client link del "+map[bool]string{true: "d4", false: "d6"}[vip.Is4()])
	if got, want := clientMSS(t, tcp.Key), 1500-header-20; got != want {
		t.Errorf("segments of a flow that came directly are of %d bytes, want %d", got, want)
	}

	done, err := r.Cleanup(t.Context(), false)
	if err != nil {
		t.Fatal(err)
	}
	if out := nettest.Shell(t, "ip link show "+device); strings.Contains(out, ",UP") || strings.Contains(out, "ravel") {
		t.Errorf("after cleanup (%q): %s", done, out)
	}
	if left := saved(t, v); strings.Contains(left, "RAVEL") {
		t.Errorf("left behind:\n%s", left)
	}
}

// clientMSS opens a flow, sends full segments over it, and returns how long the client's may be, TCP's options counted in.
func clientMSS(t *testing.T, key ravel.ServiceKey) int {
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
	out := nettest.Shell(t, "ip netns exec client ss -tin sport = "+fmt.Sprint(c.LocalAddr().(*net.TCPAddr).Port))
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

// received returns how many packets a link took in.
func received(t *testing.T, link string) int {
	t.Helper()
	b, err := os.ReadFile("/proc/thread-self/net/dev")
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(b)) {
		if f := strings.Fields(line); len(f) > 2 && f[0] == link+":" {
			n, err := strconv.Atoi(f[2])
			if err != nil {
				t.Fatal(err)
			}
			return n
		}
	}
	t.Fatalf("no link %s", link)
	return 0
}
