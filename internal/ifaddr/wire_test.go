package ifaddr

import (
	"context"
	"os/exec"
	"strings"
	"testing"
	"time"

	"github.com/ravel-lb/ravel/internal/nettest"
	"github.com/ravel-lb/ravel/internal/sysctl"
)

// What a neighbour sees of a VIP, in the real kernel: no answer to ARP or a solicitation, an answer to a ping that is
// routed here, silence once the VIP went, and the word of the host's routes again after the blackhole.
func TestOnTheWire(t *testing.T) {
	nettest.Need(t, nettest.Dummy)
	nettest.Shell(t, `
		ip netns add client
		ip link add wire0 type veth peer name wire0 netns client
		ip addr add 198.51.100.1/24 dev wire0
		ip addr add 2001:db8:1::1/64 dev wire0 nodad
		ip link set wire0 up
		sysctl -qw net.ipv4.conf.all.arp_ignore=0 net.ipv6.conf.all.forwarding=1 net.ipv4.ip_forward=1
		ip netns exec client bash -euc '
			ip link set lo up
			ip addr add 198.51.100.2/24 dev wire0
			ip addr add 2001:db8:1::2/64 dev wire0 nodad
			ip link set wire0 up'`)
	t.Cleanup(func() { nettest.Shell(t, `ip netns del client; ip link del wire0 2>/dev/null || true`) })

	l := New(Options{Sysctl: sysctl.New("/proc/sys", "")})
	start := time.Now()
	clock := start
	l.now = func() time.Time { return clock }
	_, err := l.Apply(t.Context(), addrs("192.0.2.1 2001:db8:2::1"))
	must(t, err)
	t.Cleanup(func() {
		must(t, l.Close())
		if _, err := l.Cleanup(context.Background(), false); err != nil {
			t.Log(err)
		}
	})

	ping := func(to string) (string, bool) {
		out, err := exec.Command("ip", "netns", "exec", "client", "ping", "-n", "-c1", "-W2", to).CombinedOutput()
		return string(out), err == nil
	}
	for _, family := range []struct{ vip, via, flag string }{
		{"192.0.2.1", "198.51.100.1", "-4"},
		{"2001:db8:2::1", "2001:db8:1::1", "-6"},
	} {
		client := "ip -n client " + family.flag + " "
		nettest.Shell(t, client+"route replace "+family.vip+" dev wire0")
		if out, ok := ping(family.vip); ok {
			t.Fatalf("the neighbour on the wire was told where %s is:\n%s", family.vip, out)
		}
		if neigh := nettest.Shell(t, client+"neigh show "+family.vip); strings.Contains(neigh, "lladdr") {
			t.Fatalf("the neighbour knows %s", neigh)
		}
		if family.flag == "-4" {
			// The same question is answered without the setting, so it is the setting that keeps the VIP quiet.
			nettest.Shell(t, "sysctl -qw net.ipv4.conf.all.arp_ignore=0; "+client+"neigh flush all")
			if out, ok := ping(family.vip); !ok {
				t.Fatalf("nothing answers even with arp_ignore=0:\n%s", out)
			}
			nettest.Shell(t, "sysctl -qw net.ipv4.conf.all.arp_ignore=1")
		}
		nettest.Shell(t, client+"neigh flush all; "+client+"route replace "+family.vip+" via "+family.via)
		if out, ok := ping(family.vip); !ok {
			t.Fatalf("a routed ping of %s is not answered:\n%s", family.vip, out)
		}
	}

	if _, err := l.Apply(t.Context(), nil); err != nil {
		t.Fatal(err)
	}
	for _, vip := range []string{"192.0.2.1", "2001:db8:2::1"} {
		if out, ok := ping(vip); ok || strings.Contains(out, "From ") {
			t.Fatalf("a VIP that went is not silent:\n%s", out)
		}
	}
	// A blackhole beside the address does not hide it: the local table is asked first.
	_, err = l.Apply(t.Context(), addrs("192.0.2.1 2001:db8:2::1"))
	must(t, err)
	for _, a := range addrs("192.0.2.1 2001:db8:2::1") {
		must(t, l.kernel.addHole(a.VIP))
		if out, ok := ping(a.VIP.String()); !ok {
			t.Fatalf("a blackhole hides a VIP that is held:\n%s", out)
		}
		must(t, l.kernel.delHole(a.VIP))
	}
	if _, err := l.Apply(t.Context(), nil); err != nil {
		t.Fatal(err)
	}
	clock = start.Add(time.Hour)
	if _, err := l.Apply(t.Context(), nil); err != nil {
		t.Fatal(err)
	}
	for _, vip := range []string{"192.0.2.1", "2001:db8:2::1"} {
		if out, ok := ping(vip); ok || !strings.Contains(strings.ToLower(out), "unreachable") {
			t.Fatalf("after the blackhole the host's routes should speak:\n%s", out)
		}
	}
}

// The host's own connections never start from a VIP, not even out of a link that has no address, as on a node whose
// addresses are on lo and whose links are unnumbered.
func TestVIPIsNoSource(t *testing.T) {
	nettest.Need(t, nettest.Dummy)
	nettest.InNetns(t, func() {
		nettest.Shell(t, `
			ip link set lo up
			ip addr add 2001:db8:ffff::1/128 dev lo
			ip link add bare0 type dummy
			ip link set bare0 up
			ip route add 203.0.113.0/24 dev bare0
			ip route add 2001:db8:5::/64 dev bare0`)
		l, _ := newLinks(t, newNetlink())
		_, err := l.Apply(t.Context(), addrs("192.0.2.1 2001:db8:2::1"))
		must(t, err)
		for to, vip := range map[string]string{"203.0.113.5": "192.0.2.1", "2001:db8:5::5": "2001:db8:2::1"} {
			if got := nettest.Shell(t, "ip route get "+to); strings.Contains(got, "src "+vip) {
				t.Errorf("to %s a connection would come from the VIP: %s", to, got)
			}
		}
	})
}
