package guard

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/prometheus/client_golang/prometheus/testutil"

	"github.com/ravel-lb/ravel"
	"github.com/ravel-lb/ravel/internal/iptables"
	"github.com/ravel-lb/ravel/internal/nettest"
)

// kubeProxy writes what kube-proxy does for a VIP that it knows by externalIPs, which leads to another address of this
// host, so that it is seen which of two listeners a client gets to. It counts what it took.
func kubeProxy(t *testing.T, tables []*iptables.Tables, port int) (took func() string) {
	t.Helper()
	var commands []string
	for i, one := range tables {
		command := []string{"iptables-", "ip6tables-"}[i] + string(one.Variant())
		commands = append(commands, command)
		rules := fmt.Sprintf("%[1]s -t nat -N KUBE-SERVICES; %[1]s -t nat -I PREROUTING -j KUBE-SERVICES\n", command)
		for _, proto := range []string{"tcp", "udp"} {
			rules += fmt.Sprintf("%[1]s -t nat -A KUBE-SERVICES -d %[2]s -p %[3]s --dport %[4]d -j DNAT --to-destination %[5]s\n",
				command, vips[i], proto, port, netip.AddrPortFrom(hosts[i], uint16(port)))
		}
		nettest.Shell(t, rules)
	}
	return func() string {
		t.Helper()
		var list []string
		for _, command := range commands {
			for line := range strings.Lines(nettest.Run(t, command+"-save", "-c", "-t", "nat")) {
				if strings.Contains(line, "-A KUBE-SERVICES") && !strings.HasPrefix(line, "[0:0]") {
					list = append(list, strings.TrimSpace(line))
				}
			}
		}
		return strings.Join(list, "\n")
	}
}

// A claimed packet meets no rule of nat, whatever its order there; what is not claimed, and what IPVS holds for somebody
// else, is left to the others' rules. Both families, by TCP and UDP.
func TestNobodyTakesClaimedPackets(t *testing.T) {
	eachVariant(t, func(t *testing.T, tables []*iptables.Tables) {
		client := wire(t)
		listen(t, slices.Concat(vips, hosts)...)
		took := kubeProxy(t, tables, port)
		all := func(want string) {
			t.Helper()
			for i, vip := range vips {
				for _, proto := range []string{"tcp", "udp"} {
					var got string
					in(t, client, func() {
						c, err := net.DialTimeout(proto, netip.AddrPortFrom(vip, port).String(), 2*time.Second)
						if err != nil {
							got = err.Error()
							return
						}
						defer func() { _ = c.Close() }()
						_ = c.SetDeadline(time.Now().Add(2 * time.Second))
						if _, err := c.Write([]byte("hello")); err != nil {
							got = err.Error()
							return
						}
						if proto == "udp" {
							_, err = c.Read(make([]byte, 10))
						}
						got = fmt.Sprint(err)
					})
					if got != "<nil>" {
						t.Fatalf("%s: %s to %s: %s", want, proto, vips[i], got)
					}
				}
			}
		}
		g := New(Options{Tables: tables, Enabled: true, Untrack: true})
		var claims []ravel.ServiceKey
		for _, vip := range vips {
			claims = append(claims, key(ravel.TCP, vip, port), key(ravel.UDP, vip, port))
		}
		all("before")
		if n := strings.Count(took(), "\n"); n != 3 {
			t.Fatalf("kube-proxy's rules do not take packets without us:\n%s", took())
		}
		zero := func() {
			for i, command := range []string{"iptables-", "ip6tables-"} {
				nettest.Run(t, command+string(tables[i].Variant()), "-t", "nat", "-Z")
			}
			nettest.Shell(t, "conntrack -F 2>/dev/null; conntrack -F -f ipv6 2>/dev/null; true")
		}

		apply := func(claims, foreign []ravel.ServiceKey) {
			t.Helper()
			_, err := g.Apply(t.Context(), vips, claims, foreign)
			must(t, err)
			zero()
		}
		apply(claims, nil)
		for _, command := range []string{"iptables-", "ip6tables-"} { // behind even what is put before it later
			nettest.Run(t, command+string(tables[0].Variant()), "-t", "nat", "-I", "PREROUTING", "-j", "KUBE-SERVICES")
		}
		all("claimed")
		if got := took(); got != "" {
			t.Fatalf("claimed packets met nat:\n%s", got)
		}
		if got := tracked(t); got != "" {
			t.Fatalf("claimed packets are tracked:\n%s", got)
		}
		apply(claims[:2], claims[2:])
		all("IPv6's are foreign")
		if got := took(); strings.Count(got, "-A") != 2 || strings.Contains(got, "192.0.2.1") {
			t.Fatalf("IPv6's services are others' in IPVS and need conntrack; met nat:\n%s", got)
		}
		apply(claims, nil)
		all("claimed again")
		if got := took(); got != "" {
			t.Fatalf("claimed again, and met nat:\n%s", got)
		}
		apply(nil, nil)
		all("not claimed any more")
		if n := strings.Count(took(), "-A"); n != 4 {
			t.Fatalf("not claimed, and %d rules of nat met:\n%s", n, took())
		}
	})
}

// untrackedServices are what IPVS has in the tests with a director.
func untrackedServices() (claims []ravel.ServiceKey) {
	for _, vip := range vips {
		claims = append(claims, key(ravel.TCP, vip, servicePort), key(ravel.UDP, vip, servicePort))
	}
	return claims
}

// Beside a kube-proxy that knows the VIPs, IPVS gets every packet for its services, whole and in fragments, whether it
// is to keep conntrack true or not; and errors by ICMP about their flows find the real server.
func TestIPVSGetsWhatKubeProxyKnows(t *testing.T) {
	nettest.Need(t, nettest.IPVS, nettest.IPSet, nettest.LegacyNAT)
	nettest.InNetns(t, func() {
		directors(t)
		tables := open(t, iptables.Legacy)
		took := kubeProxy(t, tables, servicePort)
		ask := func(when, want string, sizes map[string]int) {
			t.Helper()
			for _, vip := range vips {
				for proto, size := range sizes {
					var who string
					var err error
					in(t, "client", func() { who, err = answer(proto, vip, size) })
					if err != nil || who != want {
						t.Fatalf("%s: %s to %s is answered by %q, %v; want %s", when, proto, vip, who, err, want)
					}
				}
			}
		}
		tracking := New(Options{Tables: tables, Enabled: true})
		mustApply(t, tracking, vips, untrackedServices())
		ask("tracked", "host", map[string]int{"tcp": 5}) // so it was: kube-proxy's rule comes before IPVS
		g := New(Options{Tables: tables, Enabled: true, Untrack: true})
		mustApply(t, g, vips, untrackedServices())
		for _, command := range []string{"iptables-legacy", "ip6tables-legacy"} {
			nettest.Run(t, command, "-t", "nat", "-Z")
		}
		nettest.Shell(t, "conntrack -F 2>/dev/null; conntrack -F -f ipv6 2>/dev/null; true")
		for _, conntrack := range []string{"0", "1"} {
			nettest.Run(t, "sysctl", "-qw", "net.ipv4.vs.conntrack="+conntrack)
			ask("untracked, vs.conntrack="+conntrack, "real", map[string]int{"tcp": 5, "udp": 3000})
			if got := took(); got != "" {
				t.Fatalf("kube-proxy took packets:\n%s", got)
			}
			if got := tracked(t); got != "" {
				t.Fatalf("tracked:\n%s", got)
			}
			for i, vip := range vips {
				findsRealServer(t, i, vip)
			}
		}
	})
}

// findsRealServer opens a flow, has the client's host send a "fragmentation needed" about it, and wants that to reach
// the real server.
func findsRealServer(t *testing.T, family int, vip netip.Addr) {
	t.Helper()
	network, kind, code := []string{"ip4:icmp", "ip6:ipv6-icmp"}[family], []byte{3, 2}[family], []byte{4, 0}[family]
	var flow net.Conn
	var err error
	in(t, "client", func() { flow, err = net.Dial("tcp", netip.AddrPortFrom(vip, servicePort).String()) })
	must(t, err)
	defer func() { _ = flow.Close() }()
	client := netip.MustParseAddrPort(flow.LocalAddr().String())
	var heard net.PacketConn
	in(t, "real", func() { heard, err = net.ListenPacket(network, "") })
	must(t, err)
	defer func() { _ = heard.Close() }()

	ports := []byte{0, servicePort, byte(client.Port() >> 8), byte(client.Port()), 1, 2, 3, 4}
	var inner []byte // the packet that was too long: from the VIP to the client
	if vip.Is4() {
		inner = append([]byte{0x45, 0, 0, 28, 0, 1, 0x40, 0, 64, 6, 0, 0}, slices.Concat(vip.AsSlice(), client.Addr().AsSlice(), ports)...)
		binary.BigEndian.PutUint16(inner[10:], checksum(inner[:20]))
	} else {
		inner = append([]byte{0x60, 0, 0, 0, 0, 8, 6, 64}, slices.Concat(vip.AsSlice(), client.Addr().AsSlice(), ports)...)
	}
	message := append([]byte{kind, code, 0, 0, 0, 0, 0x05, 0x00}, inner...) // MTU 1280
	if vip.Is4() {
		binary.BigEndian.PutUint16(message[2:], checksum(message))
	}
	in(t, "client", func() {
		var c net.Conn
		if c, err = net.Dial(network, vip.String()); err == nil {
			_, err = c.Write(message)
			_ = c.Close()
		}
	})
	must(t, err)
	_ = heard.SetDeadline(time.Now().Add(3 * time.Second))
	b := make([]byte, 1500)
	for {
		n, _, err := heard.ReadFrom(b)
		if err != nil {
			t.Fatalf("the error about a flow to %s does not reach the real server: %v", vip, err)
		}
		if n > 8 && b[0] == kind && bytes.Contains(b[:n], ports) {
			return
		}
	}
}

// checksum is RFC 1071's.
func checksum(b []byte) uint16 {
	var sum uint32
	for i := 0; i+1 < len(b); i += 2 {
		sum += uint32(b[i])<<8 | uint32(b[i+1])
	}
	for sum>>16 != 0 {
		sum = sum&0xffff + sum>>16
	}
	return ^uint16(sum)
}

// tracked returns the connections to VIPs that conntrack knows.
func tracked(t *testing.T) string {
	t.Helper()
	var list []string
	for _, family := range []string{"ipv4", "ipv6"} {
		for line := range strings.Lines(nettest.Run(t, "conntrack", "-L", "-f", family)) {
			for _, vip := range vips {
				// Replies leave from a VIP by OUTPUT, and are a flow of their own to conntrack.
				if strings.Contains(line, " dst="+vip.String()+" ") && !strings.Contains(line, "src="+vip.String()) {
					list = append(list, line)
				}
			}
		}
	}
	return strings.Join(list, "")
}

// rawRules returns what both families' raw PREROUTING, and our chain there, hold.
func rawRules(t *testing.T, tables []*iptables.Tables) string {
	t.Helper()
	var list []string
	for _, one := range tables {
		lines, err := one.Save(t.Context(), rawTable)
		must(t, err)
		for _, l := range lines {
			if strings.HasPrefix(l, "-A ") {
				list = append(list, l)
			}
		}
	}
	return strings.Join(list, "\n")
}

// State after state of the raw table, in the words of iptables; what others have there stays as it is.
func TestRawTable(t *testing.T) {
	eachVariant(t, func(t *testing.T, tables []*iptables.Tables) {
		nettest.Shell(t, "ip link set lo up")
		run := func(args ...string) {
			t.Helper()
			for i, command := range []string{"iptables-", "ip6tables-"} {
				nettest.Run(t, command+string(tables[i].Variant()), append([]string{"-t", "raw"}, args...)...)
			}
		}
		run("-N", "cali-PREROUTING")
		run("-A", "PREROUTING", "-j", "cali-PREROUTING")
		run("-A", "PREROUTING", "-p", "tcp", "--dport", "9", "-j", "CT", "--notrack")
		claims := []ravel.ServiceKey{key(ravel.TCP, vips[0], 80), key(ravel.TCP, vips[1], 80)}
		apply := func(g *Guard) {
			t.Helper()
			mustApply(t, g, vips, claims)
		}
		const (
			calico  = "-A PREROUTING -j cali-PREROUTING"
			foreign = "-A PREROUTING -p tcp -m tcp --dport 9 -j CT --notrack"
			jump    = "-A PREROUTING -m set --match-set ravel4-vip dst -j RAVEL-UNTRACKED"
			accept  = "-A PREROUTING -p udp -j ACCEPT"
			chain   = "-A RAVEL-UNTRACKED -m set --match-set ravel4-others dst,dst -j RETURN\n" +
				"-A RAVEL-UNTRACKED -m set --match-set ravel4-svc dst,dst -j CT --notrack"
		)
		expect := func(when string, four ...string) {
			t.Helper()
			want := strings.Join(four, "\n")
			want += "\n" + strings.ReplaceAll(want, "ravel4", "ravel6")
			if diff := cmp.Diff(strings.TrimSpace(want), rawRules(t, tables)); diff != "" {
				t.Fatalf("%s (-want +got):\n%s", when, diff)
			}
		}
		g := New(Options{Tables: tables, Enabled: true, Untrack: true})
		apply(g)
		expect("first", jump, calico, foreign, chain)
		run("-D", "PREROUTING", "-j", "cali-PREROUTING")
		run("-I", "PREROUTING", "-j", "cali-PREROUTING")
		g.Resync()
		apply(g)
		expect("another wants to be first too", calico, jump, foreign, chain)
		run("-I", "PREROUTING", "-p", "udp", "-j", "ACCEPT")
		g.Resync()
		apply(g)
		expect("a rule stood in the way", jump, accept, calico, foreign, chain)
		run("-D", "PREROUTING", "-p", "udp", "-j", "ACCEPT")
		run("-F", "RAVEL-UNTRACKED")
		g.Resync()
		apply(g)
		expect("the chain was flushed", jump, calico, foreign, chain)
		if n := testutil.ToFloat64(g.metrics.drift.WithLabelValues("rule")); n != 4 {
			t.Fatalf("two rules of each family were changed, counted %v", n)
		}
		filter := saved(t, tables)
		_ = g.Look(t.Context())
		run("-I", "PREROUTING", "-p", "udp", "-j", "ACCEPT")
		if g.Look(t.Context()) {
			t.Fatal("our jump is there, and must be mended at once")
		}
		run("-F")
		if !g.Look(t.Context()) {
			t.Fatal("flushed, and nothing must be mended")
		}
		apply(g)
		if g.Look(t.Context()) {
			t.Fatal("mended, and must be mended again")
		}
		run("-A", "PREROUTING", "-j", "cali-PREROUTING")
		run("-A", "PREROUTING", "-p", "tcp", "--dport", "9", "-j", "CT", "--notrack")
		expect("flushed", jump, calico, foreign, chain)

		tracking := New(Options{Tables: tables, Enabled: true})
		apply(tracking)
		expect("a realserver after a director", calico, foreign)
		if diff := cmp.Diff(strings.NewReplacer("ravel4-others\n", "", "ravel6-others\n", "").Replace(filter), saved(t, tables)); diff != "" {
			t.Fatalf("what guards (-want +got):\n%s", diff)
		}
		open := New(Options{Tables: tables, Untrack: true})
		apply(open)
		expect("not guarded", jump, calico, foreign, chain)
		if got := saved(t, tables); strings.Contains(got, "RAVEL") {
			t.Fatalf("not guarded, and in filter stands\n%s", got)
		}
		would, err := open.Cleanup(t.Context(), true)
		must(t, err)
		did, err := open.Cleanup(t.Context(), false)
		must(t, err)
		if len(did) != 10 || !slices.Equal(would, did) {
			t.Fatalf("would do %q, did %q", would, did)
		}
		expect("cleaned up", calico, foreign)
		if got := strings.TrimSpace(saved(t, tables)); got != "" {
			t.Fatalf("cleanup left %s", got)
		}
	})
}

// A kernel without the table serves and guards all the same, which is a Problem of that family and no error.
func TestNoRawTable(t *testing.T) {
	nettest.Need(t, nettest.IPSet, nettest.LegacyNAT)
	nettest.InNetns(t, func() {
		dir := t.TempDir()
		for _, name := range []string{"iptables-legacy", "ip6tables-legacy"} {
			for _, part := range []string{"", "-save", "-restore"} {
				real, err := exec.LookPath(name + part)
				must(t, err)
				script := "#!/bin/sh\nexec " + real + " \"$@\"\n"
				if part == "-restore" {
					script = "#!/bin/bash\ninput=$(cat)\ncase $input in *'*raw'*) [ -e " + dir + "/raw ] || { echo \"" + name +
						"-restore: unable to initialize table 'raw'\" >&2; exit 1; };; esac\n" + real + " \"$@\" <<<\"$input\"\n"
				}
				must(t, os.WriteFile(filepath.Join(dir, name+part), []byte(script), 0o700))
			}
		}
		t.Setenv("PATH", dir+":"+os.Getenv("PATH"))
		tables := open(t, iptables.Legacy)
		g := New(Options{Tables: tables, Enabled: true, Untrack: true})
		claims := []ravel.ServiceKey{key(ravel.TCP, vips[0], 80)}
		for range 2 {
			mustApply(t, g, vips, claims)
			problems := g.Problems()
			if len(problems) != 2 || !strings.Contains(problems[0].String(), "before IPVS") ||
				problems[0].Fix != "modprobe -a iptable_raw xt_CT" || problems[1].Fix != "modprobe -a ip6table_raw xt_CT" {
				t.Fatalf("problems %v", problems)
			}
			g.Resync()
		}
		must(t, os.WriteFile(filepath.Join(dir, "raw"), nil, 0o600))
		g.Resync()
		mustApply(t, g, vips, claims)
		if problems := g.Problems(); len(problems) != 0 || !strings.Contains(rawRules(t, tables), "--notrack") {
			t.Fatalf("the table is there now: problems %v, rules\n%s", problems, rawRules(t, tables))
		}
		if n := testutil.ToFloat64(g.metrics.drift.WithLabelValues("rule")); n != 0 {
			t.Fatalf("nobody changed a rule, counted %v", n)
		}
	})
}
