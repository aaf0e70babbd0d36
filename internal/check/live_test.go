package check

import (
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/moby/ipvs"
	"golang.org/x/sys/unix"

	"github.com/ravel-lb/ravel"
	"github.com/ravel-lb/ravel/internal/nettest"
)

func TestMain(m *testing.M) { nettest.Main(m) }

// picture is all of the machine that a careless look could change. How often a module is used is not in it: namespaces
// of earlier tests go in the background.
func picture(t *testing.T) string {
	t.Helper()
	out, err := exec.Command("bash", "-c", `cut -d" " -f1 /proc/modules; ip -d -o link; ip -o addr; ip route show table all; ip -6 route show table all
		cat /proc/net/ip_tables_names /proc/net/ip6_tables_names /proc/net/ip_tables_matches /proc/net/ip_tables_targets
		ls /proc/net; find /proc/sys/net | sort
		for t in $(cat /proc/net/ip_tables_names); do iptables-legacy-save -t $t | grep -v '^#'; done
		test -e /proc/net/ip_vs && cat /proc/net/ip_vs
		ls -R /run; true`).Output()
	if err != nil {
		t.Fatal(err)
	}
	return string(out)
}

// find returns the lines of one name.
func find(lines []Line, name string) []Line {
	var found []Line
	for _, l := range lines {
		if l.Name == name {
			found = append(found, l)
		}
	}
	return found
}

// wellFormed checks what holds for all lines.
func wellFormed(t *testing.T, lines []Line) {
	t.Helper()
	names := strings.Join(Names(), " ")
	for _, l := range lines {
		switch l.Status {
		case OK, Warn, Fail:
		default:
			t.Errorf("status %q: %v", l.Status, l)
		}
		if l.Status != OK && l.Fix == "" {
			t.Errorf("no fix: %v", l)
		}
		if l.Detail == "" || !strings.Contains(" "+names+" ", " "+l.Name+" ") {
			t.Errorf("no detail, or no known name: %v", l)
		}
		if strings.ContainsAny(l.Detail+l.Fix, "\n\x1b") {
			t.Errorf("more than a line: %q", l)
		}
		if strings.Contains(l.Detail, "the check itself broke") {
			t.Errorf("a check broke: %v", l)
		}
	}
}

func TestLookingChangesNothing(t *testing.T) {
	nettest.Need(t, nettest.Root)
	was := picture(t)
	for _, role := range []string{"", "director", "realserver"} {
		h := Host{
			Role: role, Tunnel: true, VIPs: []netip.Addr{netip.MustParseAddr("192.0.2.1"), netip.MustParseAddr("2001:db8::1")},
			Nodes: []netip.Addr{netip.MustParseAddr("198.51.100.1")}, Listen: []netip.AddrPort{netip.MustParseAddrPort("[::]:179")},
			Socket: "/run/ravel/ravel.sock",
		}
		lines := h.Run(t.Context())
		wellFormed(t, lines)
		for _, l := range lines {
			t.Log(l)
		}
		if len(lines) < 20 {
			t.Errorf("role %q: only %d lines", role, len(lines))
		}
		if role == "realserver" {
			continue
		}
		if nettest.Has(nettest.IPVS) {
			expect(t, lines, "ipvs", "ok|loaded|")
			expect(t, lines, "vip-ipvs", "ok|0 of Ravel's|")
		} else if ipvs := one(t, lines, "ipvs"); ipvs.Detail == "ip_vs: loaded" || len(find(lines, "vip-ipvs")) != 0 {
			t.Errorf("IPVS is taken to be there: %v", lines)
		}
	}
	if diff := cmp.Diff(was, picture(t)); diff != "" {
		t.Errorf("Run changed something (-before +after):\n%s", diff)
	}
}

// one returns the only line of a name.
func one(t *testing.T, lines []Line, name string) Line {
	t.Helper()
	found := find(lines, name)
	if len(found) != 1 {
		t.Fatalf("%s: %d lines, want one: %v", name, len(found), found)
	}
	return found[0]
}

// expect says what the only line of a name must be: "status|part of the detail|part of the fix".
func expect(t *testing.T, lines []Line, name, want string) {
	t.Helper()
	l := one(t, lines, name)
	part := strings.SplitN(want, "|", 3)
	if string(l.Status) != part[0] || !strings.Contains(l.Detail, part[1]) || !strings.Contains(l.Fix, part[2]) {
		t.Errorf("got  %v\nwant %s", l, want)
	}
}

func TestForeignVIPsOnRealLinks(t *testing.T) {
	nettest.Need(t, nettest.Root)
	nettest.InNetns(t, func() {
		nettest.Shell(t, `ip link set lo up; ip link add lan type veth peer name lan2; ip link set lan up; ip link set lan2 up
			ip addr add 10.0.1.11/24 dev lan; ip -6 addr add 2001:db8:1::11/64 dev lan nodad
			ip addr add 192.0.2.1/32 dev lan; ip route add 192.0.2.2/32 via 10.0.1.99; ip route add 192.0.2.3 dev lan2
			ip -6 route add 2001:db8::4/128 via 2001:db8:1::99; ip route add blackhole 192.0.2.5 proto 82 metric 1
			ip route add 10.0.9.0/24 via 10.0.1.1`)
		h := Host{VIPs: addrsOf("192.0.2.1", "192.0.2.2", "192.0.2.3", "2001:db8::4", "192.0.2.5", "10.0.1.200"),
			Nodes: addrsOf("10.0.1.21", "10.0.9.24", "2001:db8:1::21"), Tunnel: true}
		lines := h.Run(t.Context())
		wellFormed(t, lines)
		expect(t, lines, "vip-address", "fail|192.0.2.1 is on lan too|ip addr del 192.0.2.1/32 dev lan")
		expect(t, lines, "vip-subnet", "warn|10.0.1.200 lies in the subnet 10.0.1.0/24 of lan|outside")
		expect(t, lines, "nodes", "ok|2 on-link, 1 behind a router (10.0.9.24 by 10.0.1.1)|")
		expect(t, lines, "mtu", "ok|lan leaves 1460 bytes in a tunnel, lan leaves 1480|")
		routes := find(lines, "vip-route")
		var fixes []string
		for _, l := range routes {
			fixes = append(fixes, string(l.Status)+" "+l.Fix)
		}
		want := []string{"warn ip route del 192.0.2.2/32 via 10.0.1.99", "warn ip route del 192.0.2.3/32 dev lan2", "warn ip route del 2001:db8::4/128 via 2001:db8:1::99"}
		if diff := cmp.Diff(want, fixes); diff != "" {
			t.Errorf("vip-route (-want +got):\n%s", diff)
		}

		// Each fix is what it says: a command that mends the line.
		for _, l := range append(find(lines, "vip-address"), routes...) {
			nettest.Shell(t, l.Fix)
		}
		lines = h.Run(t.Context())
		expect(t, lines, "vip-address", "ok|on no other link|")
		expect(t, lines, "vip-route", "ok|no other|")

		nettest.Shell(t, "ip link set lan mtu 1400; sysctl -qw net.ipv4.conf.lan.rp_filter=1 net.ipv4.ip_forward=0")
		lines = h.Run(t.Context())
		expect(t, lines, "rp-filter", "warn|lan is strict|sysctl -w net/ipv4/conf/lan/rp_filter=2")
		var mtu []string
		for _, l := range find(lines, "mtu") {
			mtu = append(mtu, string(l.Status)+" "+l.Fix)
		}
		want = []string{"warn ip link set lan mtu 1520, and the same on all that lies between", "warn ip link set lan mtu 1540, and the same on all that lies between"}
		if diff := cmp.Diff(want, mtu); diff != "" {
			t.Errorf("mtu (-want +got):\n%s", diff)
		}
		nettest.Shell(t, one(t, lines, "rp-filter").Fix)
		for _, l := range find(lines, "forwarding") {
			nettest.Shell(t, l.Fix)
		}
		lines = h.Run(t.Context())
		expect(t, lines, "rp-filter", "ok|no link|")
		expect(t, lines, "forwarding", "ok|on|")
	})
}

func TestRealPortsAndSocket(t *testing.T) {
	nettest.Need(t, nettest.Root)
	nettest.InNetns(t, func() {
		nettest.Shell(t, "ip link set lo up")
		for _, listen := range []string{"127.0.0.1:0", "[::1]:0", "0.0.0.0:0", "[::]:0"} {
			listener, err := net.Listen("tcp", listen)
			if err != nil {
				t.Fatal(err)
			}
			have := netip.MustParseAddrPort(listener.Addr().String())
			all := netip.AddrPortFrom(netip.IPv6Unspecified(), have.Port())
			lines := Host{Listen: []netip.AddrPort{all}}.Run(t.Context())
			l := one(t, lines, "ports")
			if l.Status != Fail || !strings.Contains(l.Detail, fmt.Sprintf("(process %d)", os.Getpid())) {
				t.Errorf("%s: %v", listen, l)
			}
			_ = listener.Close()
			expect(t, Host{Listen: []netip.AddrPort{all}}.Run(t.Context()), "ports", "ok|1 free|")
		}
	})
}

func TestRealRules(t *testing.T) {
	nettest.Need(t, nettest.NftNAT)
	nettest.InNetns(t, func() {
		nettest.Shell(t, `iptables-nft -P FORWARD DROP; iptables-nft -N KUBE-SERVICES; iptables-nft -A FORWARD -j KUBE-SERVICES
			iptables-nft -A KUBE-SERVICES -p tcp --dport 80 -m comment --comment x -j ACCEPT
			iptables-nft -N RAVEL-FORWARD; iptables-nft -I FORWARD -j RAVEL-FORWARD; iptables-nft -A RAVEL-FORWARD -j ACCEPT`)
		chains, err := live{}.nft()
		if err != nil {
			t.Fatal(err)
		}
		var got []string
		for _, c := range chains {
			got = append(got, fmt.Sprintf("%s hook=%s drops=%t rules=%d", c, c.hook, c.drops, c.rules))
		}
		slices.Sort(got)
		want := []string{
			"ip filter FORWARD hook=forward drops=true rules=1",
			"ip filter KUBE-SERVICES hook= drops=false rules=1",
			"ip filter RAVEL-FORWARD hook= drops=false rules=1",
		}
		if diff := cmp.Diff(want, got); diff != "" {
			t.Errorf("(-want +got):\n%s", diff)
		}
		lines := Host{Role: "realserver", VIPs: addrsOf("192.0.2.1")}.Run(t.Context())
		expect(t, lines, "policies", "ok|ip filter FORWARD drops by policy|")
		expect(t, lines, "iptables-variant", "ok|nft|")
		expect(t, lines, "neighbours", "ok|kube-proxy|")
		lines = Host{Role: "realserver", IPTables: "legacy", VIPs: addrsOf("192.0.2.1")}.Run(t.Context())
		expect(t, lines, "policies", "warn|ip filter FORWARD (nft)|iptables-nft -t filter -A FORWARD -m connmark")
		nettest.Shell(t, "iptables-nft -P INPUT DROP")
		lines = Host{Role: "director", VIPs: addrsOf("192.0.2.1", "192.0.2.2")}.Run(t.Context())
		expect(t, lines, "policies", "warn|ip filter INPUT drops|for a in 192.0.2.1 192.0.2.2")
		nettest.Shell(t, one(t, lines, "policies").Fix)
		if rules := nettest.Shell(t, "iptables-nft -S INPUT"); !strings.Contains(rules, "-A INPUT -d 192.0.2.2/32 -j ACCEPT") {
			t.Errorf("the fix left:\n%s", rules)
		}
	})
}

func TestRealLegacyRules(t *testing.T) {
	nettest.Need(t, nettest.LegacyNAT)
	nettest.InNetns(t, func() {
		nettest.Shell(t, `iptables-legacy -P FORWARD DROP; iptables-legacy -t nat -N DOCKER; iptables-legacy -t nat -A PREROUTING -j DOCKER`)
		h := Host{Role: "realserver", VIPs: addrsOf("192.0.2.1")}
		was := picture(t)
		lines := h.Run(t.Context())
		if diff := cmp.Diff(was, picture(t)); diff != "" {
			t.Errorf("Run changed something (-before +after):\n%s", diff)
		}
		expect(t, lines, "iptables-variant", "ok|legacy|")
		expect(t, lines, "policies", "ok|ip filter FORWARD drops by policy|")
		expect(t, lines, "neighbours", "ok|Docker|")
		h.IPTables = "nft"
		expect(t, h.Run(t.Context()), "policies", "warn|(legacy) drops|iptables-legacy -t filter -A FORWARD")
	})
}

func TestDirectorAndRealserverWithIPVS(t *testing.T) {
	nettest.Need(t, nettest.IPVS, nettest.Dummy, nettest.IPIP)
	nettest.InNetns(t, func() {
		nettest.Shell(t, `ip link set lo up; ip link add strange type dummy; ip link set strange up; ip addr add 192.0.2.1/32 dev strange`)
		h := Host{VIPs: addrsOf("192.0.2.1", "2001:db8::1"), Directors: addrsOf("10.0.1.12"), Tunnel: true}
		lines := h.Run(t.Context())
		wellFormed(t, lines)
		expect(t, lines, "ipvs", "ok|loaded|")
		expect(t, lines, "ipvs-ipv6", "ok|IPVS does IPv6|")
		expect(t, lines, "scheduler-mh", "ok|loaded|")
		expect(t, lines, "link", "ok|dummy|")
		expect(t, lines, "tunnel", "ok|tunl0 is there, ip6tnl0 is there|")
		expect(t, lines, "tunnel-others", "ok|no other|")
		expect(t, lines, "vip-address", "fail|VIP 192.0.2.1 is on strange too|ip addr del 192.0.2.1/32 dev strange")
		if l := one(t, lines, "mh-table"); l.Status != OK {
			expect(t, lines, "mh-table", "warn|cannot tell the size|modprobe configs && zgrep")
			nettest.Shell(t, l.Fix)
			expect(t, h.Run(t.Context()), "mh-table", "ok|4093 slots (/proc/config.gz)|")
		}
		nettest.Shell(t, one(t, lines, "vip-address").Fix)
		expect(t, h.Run(t.Context()), "vip-address", "ok|on no other link|")

		nettest.Shell(t, "ip link add ravel0 type dummy; ip link set ravel0 up")
		expect(t, h.Run(t.Context()), "link", `fail|a dummy with the alias ""|ip link delete ravel0`)
		nettest.Shell(t, "ip link set ravel0 alias ravel; ip addr add 192.0.2.1/32 dev ravel0")
		lines = h.Run(t.Context())
		expect(t, lines, "link", "ok|ravel0 is Ravel's|")
		expect(t, lines, "vip-address", "ok|on no other link|")

		nettest.Shell(t, "ip link add thief type ipip external; ip link add ex6 type ip6tnl external; ip link add known type ipip local 10.0.1.11 remote 10.0.1.12")
		var details []string
		for _, l := range find(h.Run(t.Context()), "tunnel-others") {
			details = append(details, string(l.Status)+" "+l.Fix)
		}
		want := []string{"fail ip link delete thief", "fail ip link delete ex6", "fail ip link delete known"}
		if diff := cmp.Diff(want, details); diff != "" {
			t.Errorf("tunnel-others (-want +got):\n%s", diff)
		}

		handle, err := ipvs.New("")
		if err != nil {
			t.Fatal(err)
		}
		defer handle.Close()
		foreign := &ipvs.Service{Address: net.IPv4(192, 0, 2, 1).To4(), AddressFamily: unix.AF_INET, Protocol: unix.IPPROTO_TCP, Port: 80,
			SchedName: "rr", Netmask: 0xffffffff}
		ours := &ipvs.Service{Address: addrOf("2001:db8::1").AsSlice(), AddressFamily: unix.AF_INET6, Protocol: unix.IPPROTO_UDP, Port: 53,
			SchedName: "mh", Netmask: 128, Flags: uint32(ravel.Flag3)}
		for _, s := range []*ipvs.Service{foreign, ours} {
			if err := handle.NewService(s); err != nil {
				t.Fatal(err)
			}
		}
		h.Role = "director"
		expect(t, h.Run(t.Context()), "vip-ipvs", "fail|tcp 192.0.2.1:80|ipvsadm -D -t 192.0.2.1:80")
		if err := handle.DelService(foreign); err != nil {
			t.Fatal(err)
		}
		expect(t, h.Run(t.Context()), "vip-ipvs", "ok|1 of Ravel's, 0 of others|")
		h.Role = "realserver"
		expect(t, h.Run(t.Context()), "vip-ipvs", "warn|udp [2001:db8::1]:53|ravel cleanup")
	})
}

func BenchmarkRun(b *testing.B) {
	h, _ := host()
	h.Root = healthy().write(b)
	for b.Loop() {
		h.Run(b.Context())
	}
}
