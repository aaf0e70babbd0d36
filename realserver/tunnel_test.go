package realserver

import (
	"context"
	"errors"
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
		ip -n client link set %[1]s addrgenmode none; ip -n client link set %[1]s up mtu 1500
		ip -n client route replace %[5]s/%[6]d dev %[1]s src %[7]s`, dev, kind, from, node, dst, bits,
		map[bool]string{true: client4.String(), false: client6.String()}[dst.Is4()]))
}

// Packets are taken out of a tunnel from a director alone. On a device that was up before, another program's tunnels go
// on, and only packets for a VIP are refused from strangers.
func TestTunnel(t *testing.T) {
	// No kernel here has both tunnels and nft's NAT, and the rules are the same text: legacy is what must run.
	nettest.Need(t, nettest.IPIP, nettest.LegacyNAT)
	for v, feature := range features {
		if !nettest.Has(feature) {
			continue
		}
		for _, vip := range []netip.Addr{vip4, vip6} {
			for _, shared := range []bool{false, true} {
				t.Run(fmt.Sprintf("%s/%s/shared=%t", v, vip, shared), func(t *testing.T) {
					t.Cleanup(func() { flush(t, v) })
					testTunnel(t, v, vip, shared)
				})
			}
		}
	}
}

func testTunnel(t *testing.T, v iptables.Variant, vip netip.Addr, shared bool) {
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

	if shared {
		nettest.Shell(t, "ip link set "+device+" up")
		t.Cleanup(func() { nettest.Shell(t, "ip link set "+device+" down") })
	}
	r := newReal(t, v, nil)
	t.Cleanup(func() { _, _ = r.Cleanup(context.Background(), false) })
	tcp, udp := redirect(ravel.TCP, vip, 80, 0, 1), redirect(ravel.UDP, vip, 53, 0, 1)
	tcp.Tunnelled, udp.Tunnelled = true, true
	apply(t, r, tcp, udp)
	problems := fmt.Sprint(r.Problems())
	if shared != strings.Contains(problems, "serves somebody else") || !shared && problems != "[]" {
		t.Fatalf("problems: %v", problems)
	}
	apply(t, r, tcp, udp) // the device is up now: that we brought it up is still known
	if again := fmt.Sprint(r.Problems()); again != problems {
		t.Fatalf("problems were %v, and again: %v", problems, again)
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

	// Of what the tunnel leaves and what the VIP's MTU leaves the smaller counts.
	for _, mtu := range []struct{ path, vip, want int }{{1400, 1280, 1280 - header - 20}, {1300, 1290, 1300 - 2*header - 20}} {
		r.mtu, tcp.MTU = mtu.path, mtu.vip
		apply(t, r, tcp, udp)
		if got := clientMSS(t, tcp.Key); got != mtu.want {
			t.Errorf("segments through a tunnel of MTU %d to a VIP of MTU %d are of %d bytes, want %d", mtu.path, mtu.vip, got, mtu.want)
		}
	}
	tcp.MTU = 0
	apply(t, r, tcp, udp)

	// Without INPUT's policy it is our rule alone that keeps a stranger out.
	nettest.Shell(t, command+"-"+string(v)+" -P FORWARD ACCEPT; "+command+"-"+string(v)+" -P INPUT ACCEPT")
	tunnelTo(t, vip, stranger)
	for _, key := range []ravel.ServiceKey{tcp.Key, udp.Key} {
		before := dropped(t, v, command)
		if pod, _, _, err := askFor(key, aMoment); err == nil {
			t.Errorf("%s by a stranger's tunnel: %s answered", key, pod)
		}
		eventually(t, func() error {
			if dropped(t, v, command) == before {
				return fmt.Errorf("%s: the stranger's packet was not dropped by our rule", key)
			}
			return nil
		})
	}

	// A stranger's packets for others go on if the device serves an overlay too, else they end here.
	overlay := pod(0, vip)
	tunnelTo(t, overlay, stranger)
	before, droppedBefore := received(t, device), dropped(t, v, command)
	family := map[bool]string{true: "-4", false: "-6"}[vip.Is4()]
	ping := []string{"netns", "exec", "client", "ping", family, "-c1"}
	if shared {
		if out, err := exec.Command("ip", append(ping, "-W15", overlay.String())...).CombinedOutput(); err != nil {
			t.Errorf("overlay by %s: %v\n%s", device, err, out)
		}
		if now := received(t, device); now != before+1 {
			t.Errorf("%s took %d packets of the overlay, want 1", device, now-before)
		}
	} else {
		bits, kind, outer := 32, "ipip", "ipencap"
		if vip.Is6() {
			bits, kind, outer = 128, "ip6tnl mode ip6ip6 encaplimit none", "ipv6"
		}
		full := command + "-" + string(v)
		passed := fmt.Sprintf("-A FORWARD -d %s/%d", overlay, bits)
		nettest.Shell(t, full+" -t mangle "+passed)
		_ = exec.Command("ip", append(ping, "-W1", overlay.String())...).Run()
		eventually(t, func() error {
			if dropped(t, v, command) == droppedBefore {
				return errors.New("a stranger's packet for a pod was not dropped")
			}
			return nil
		})
		// Nor does a packet in a packet: what came out of the tunnel under a director's address is no director's.
		nested := fmt.Sprintf("-A PREROUTING -s %s/%d -d %[3]s/%[2]d -p %[4]s", director, bits, overlay, outer)
		nettest.Shell(t, full+" -t mangle "+strings.Replace(nested, "-A", "-I", 1))
		nettest.Shell(t, fmt.Sprintf(`ip -n client link add inner type %s local %s remote %s
			ip -n client link set inner addrgenmode none up; ip -n client route replace %s/%d dev inner`,
			kind, director, overlay, pod(1, vip), bits))
		_ = exec.Command("ip", append(ping, "-W1", pod(1, vip).String())...).Run()
		eventually(t, func() error {
			if counted(t, full, "mangle", nested) == 0 {
				return errors.New("the packet in a packet did not come")
			}
			return nil
		})
		nettest.Shell(t, "ip -n client link del inner")
		if n := counted(t, full, "mangle", passed); n != 0 {
			t.Errorf("%d packets of a stranger went to a pod by %s", n, device)
		}
		nettest.Shell(t, full+" -t mangle "+strings.Replace(passed, "-A", "-D", 1)+"; "+full+" -t mangle "+strings.Replace(nested, "-A", "-D", 1))
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
	if out := nettest.Shell(t, "ip link show "+device); strings.Contains(out, ",UP") != shared || strings.Contains(out, "ravel") {
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

// dropped returns how many packets of strangers our rule dropped.
func dropped(t *testing.T, v iptables.Variant, command string) int {
	t.Helper()
	return counted(t, command+"-"+string(v), "mangle", "-A RAVEL-KNOWN -m mark ! --mark 0x800/0x800 -j DROP")
}

// counted returns how many packets met a rule.
func counted(t *testing.T, command, table, rule string) int {
	t.Helper()
	out := nettest.Shell(t, command+"-save -c -t "+table)
	for line := range strings.Lines(out) {
		if counter, rest, ok := strings.Cut(strings.TrimSpace(line), " "); ok && rest == rule {
			packets, _, _ := strings.Cut(counter, ":")
			n, err := strconv.Atoi(strings.TrimPrefix(packets, "["))
			if err != nil {
				t.Fatal(err)
			}
			return n
		}
	}
	t.Fatalf("no rule %q in\n%s", rule, out)
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

// A device is ours alone if we brought it up or nobody did, and nobody else has addresses on it.
func TestTunnelShared(t *testing.T) {
	nettest.Need(t, nettest.Root)
	const device = "shared0" // what kind it is does not matter here
	check := func(when string, want bool) {
		t.Helper()
		if got, err := (kernelNetwork{}).tunnelShared(device); got != want || err != nil {
			t.Errorf("%s: shared is %t, %v, want %t", when, got, err, want)
		}
	}
	check("absent", false)
	nettest.Shell(t, "ip link add peer0 type veth peer name "+device)
	t.Cleanup(func() { nettest.Shell(t, "ip link del "+device) })
	for _, step := range []struct {
		command string
		want    bool
	}{
		{"ip link show", false},
		{"ip addr add 10.9.9.9/32 dev", true},
		{"ip addr del 10.9.9.9/32 dev", false},
		{"ip addr add " + tunnelAddr.String() + " dev", false},
		{"ip addr add fe80::9/64 nodad dev", false},
		{"ip link set up dev", true},
		{"ip link set alias \"" + tunnelAlias + "\" dev", false},
		{"ip addr add fd09::9/128 nodad dev", true},
		{"ip addr del fd09::9/128 dev", false},
		{"ip link set alias overlay dev", true},
		{"ip link set down dev", true},
	} {
		nettest.Shell(t, step.command+" "+device)
		check(step.command, step.want)
	}
	if err := (kernelNetwork{}).startTunnel(device); err != nil {
		t.Fatal(err)
	}
	check("brought up with an alias of others", true)
	nettest.Shell(t, "ip link set down alias '' dev "+device)
	if err := (kernelNetwork{}).startTunnel(device); err != nil {
		t.Fatal(err)
	}
	check("brought up by us", false)
}
