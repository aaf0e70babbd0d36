package fleet

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/ravel-lb/ravel/internal/nettest"
	"github.com/ravel-lb/ravel/lab/topology"
	"golang.org/x/sys/unix"
)

func TestMain(m *testing.M) { nettest.Main(m) }

const small = `name: small
topology:
  defaults: {kind: linux, image: x, network-mode: none}
  nodes:
    a:
      binds: ["bound:/run/bound:ro", "file:/run/deep/file"]
      exec:
        - ip address add 10.9.0.1/24 dev eth1
        - ip address add fd09::1/64 dev eth1 nodad
        - sh -c 'echo "$(cat /run/deep/file) on $(hostname)" > /run/said'
        - ip netns add p1
        - ip link add p1 type veth peer name eth0 netns p1
        - ip link set p1 up
        - ip -n p1 link set eth0 up
        - ip -n p1 address add 10.9.1.1/24 dev eth0
    b:
      exec:
        - ip address add 10.9.0.2/24 dev eth1
        - ip address add fd09::2/64 dev eth1 nodad
        - ip route add 10.8.0.0/24 via 10.9.0.1
        - ip route add fd08::/64 via fd09::1
    sw:
      exec:
        - ip link add rack type bridge
        - ip link set rack up
        - ip link set eth1 master rack
        - ip link set eth2 master rack
    c: {exec: [ip address add 10.7.0.1/24 dev eth1, ip address add fd07::1/64 dev eth1 nodad]}
    d: {exec: [ip address add 10.7.0.2/24 dev eth1, ip address add fd07::2/64 dev eth1 nodad]}
  links:
    - endpoints: ["a:eth1", "b:eth1"]
    - endpoints: ["c:eth1", "sw:eth1"]
    - endpoints: ["d:eth1", "sw:eth2"]
`

// load parses a topology whose $ are commands of the shell, as containerlab would after its own reading.
func load(t *testing.T, text string) *topology.Topology {
	t.Helper()
	topo, err := topology.Parse([]byte(strings.ReplaceAll(text, "$", "DOLLAR")))
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir() // below /tmp, which nodes have for themselves: binds must reach it all the same
	if err := os.Mkdir(filepath.Join(dir, "bound"), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, "file"), []byte("hello"), 0o644); err != nil {
		t.Fatal(err)
	}
	for _, n := range topo.Nodes {
		for i := range n.Binds {
			n.Binds[i].Source = filepath.Join(dir, n.Binds[i].Source)
		}
		for _, words := range n.Exec {
			for i := range words {
				words[i] = strings.ReplaceAll(words[i], "DOLLAR", "$")
			}
		}
	}
	return topo
}

func start(t *testing.T, topo *topology.Topology) *Fleet {
	t.Helper()
	nettest.Need(t, nettest.Root)
	f, err := Up(t.Context(), topo, Options{LogDir: t.TempDir()})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := f.Down(); err != nil {
			t.Error(err)
		}
	})
	return f
}

func output(t *testing.T, p *Place, args ...string) string {
	t.Helper()
	out, err := p.Command(t.Context(), args...).CombinedOutput()
	if err != nil {
		t.Fatalf("%s: %v\n%s", args, err, out)
	}
	return strings.TrimSpace(string(out))
}

func eventually(t *testing.T, what string, holds func() bool) {
	t.Helper()
	for deadline := time.Now().Add(20 * time.Second); !holds(); time.Sleep(10 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("not within 20 s: %s", what)
		}
	}
}

func pings(t *testing.T, p *Place, address string) bool {
	t.Helper()
	return p.Command(t.Context(), "ping", "-n", "-c1", "-W1", address).Run() == nil
}

func TestANodeIsAMachineOfItsOwn(t *testing.T) {
	f := start(t, load(t, small))
	a, b := f.Node("a"), f.Node("b")
	for _, c := range []struct{ want, command string }{
		{"a", "hostname"},
		{"hello on a", "cat /run/said"},
		{"1", "cut -d' ' -f1 /proc/1/stat"},
		{"eth1 lo p1", "ls /sys/class/net | grep -v tnl0 | grep -v tunl0 | xargs"},
		{"p1", "ip netns | cut -d' ' -f1"},
		{"0", "ls /tmp | wc -l"},
		{"read-only", "touch /run/bound/x 2>/dev/null || echo read-only"},
		{"b@", "ip -o link show eth1 >/dev/null && echo b@"},
	} {
		if got := output(t, &a.Place, "bash", "-c", c.command); got != c.want {
			t.Errorf("%s: got %q, want %q", c.command, got, c.want)
		}
	}
	if wd, err := os.Getwd(); err != nil || output(t, &a.Place, "pwd") != wd {
		t.Errorf("the working directory is not %s: %v", wd, err)
	}
	for _, address := range []string{"10.9.0.1", "fd09::1"} {
		eventually(t, "b reaches "+address, func() bool { return pings(t, &b.Place, address) })
	}
	pod, err := a.Pod("p1")
	if err != nil {
		t.Fatal(err)
	}
	if got := output(t, pod, "ip", "-br", "-4", "address", "show", "eth0"); !strings.Contains(got, "10.9.1.1/24") {
		t.Errorf("the pod's address: %s", got)
	}
	if _, err := a.Pod("p9"); err == nil {
		t.Error("there is no pod p9")
	}
	if said, err := os.ReadFile(a.Path("/run/said")); err != nil || string(said) != "hello on a\n" {
		t.Errorf("the node's file from outside: %q, %v", said, err)
	}
	// A socket that is made in a place belongs to it.
	var listener net.Listener
	if err := a.Do(func() (err error) { listener, err = net.Listen("tcp", "10.9.0.1:80"); return err }); err != nil {
		t.Fatal(err)
	}
	defer func() { _ = listener.Close() }()
	if err := b.Do(func() error {
		conn, err := net.DialTimeout("tcp", "10.9.0.1:80", 5*time.Second)
		if err == nil {
			err = conn.Close()
		}
		return err
	}); err != nil {
		t.Error(err)
	}
}

func TestProcesses(t *testing.T) {
	f := start(t, load(t, small))
	a := f.Node("a")
	p, err := a.Spawn("talker", "bash", "-c", "trap 'echo bye; exit 0' TERM; echo hello; while :; do sleep 0.05; done")
	if err != nil {
		t.Fatal(err)
	}
	logged := func() string { b, _ := os.ReadFile(p.Log); return string(b) }
	eventually(t, "it says hello", func() bool { return logged() == "hello\n" })
	if err := p.Stop(t.Context()); err != nil || logged() != "hello\nbye\n" {
		t.Errorf("stopped: %v, log %q", err, logged())
	}
	if err := p.Kill(); err != nil {
		t.Errorf("killing what is gone: %v", err)
	}
	if p, err = a.Spawn("failing", "bash", "-c", "sleep 0.1; exit 3"); err != nil {
		t.Fatal(err)
	}
	<-p.Done()
	if err := p.Stop(t.Context()); err == nil || !strings.Contains(err.Error(), "a failing: exit status 3") {
		t.Errorf("the end of a failing process: %v", err)
	}
	if p, err = a.Spawn("stubborn", "bash", "-c", "trap '' TERM; echo x; while :; do sleep 0.05; done"); err != nil {
		t.Fatal(err)
	}
	eventually(t, "it has started", func() bool { return logged() == "x\n" })
	ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
	defer cancel()
	if err := p.Stop(ctx); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("stopping a stubborn process: %v", err)
	}
	if _, err := a.Spawn("nothing", "/does/not/exist"); err == nil {
		t.Error("a program that is not there has started")
	}
	if out, err := a.Command(t.Context(), "bash", "-c", "echo out; echo err >&2; exit 4").Output(); err == nil || string(out) != "out\n" {
		t.Errorf("output %q, %v", out, err)
	}
}

func TestCables(t *testing.T) {
	f := start(t, load(t, small))
	b, c, d, sw := f.Node("b"), f.Node("c"), f.Node("d"), f.Node("sw")
	routes := func() string {
		return output(t, &b.Place, "bash", "-c", "ip route; ip -6 route show; ip -br address show eth1") +
			output(t, &c.Place, "bash", "-c", "ip route; ip -6 route show; ip -br address show eth1")
	}
	state := func(p *Place, link string) string {
		return strings.Fields(output(t, p, "ip", "-br", "link", "show", link))[1]
	}
	for _, address := range []string{"10.9.0.1", "fd09::1"} {
		eventually(t, "b reaches a", func() bool { return pings(t, &b.Place, address) })
	}
	for _, address := range []string{"10.7.0.2", "fd07::2"} {
		eventually(t, "c reaches d", func() bool { return pings(t, &c.Place, address) })
	}
	before := routes()
	for range 2 { // cutting twice is cutting once
		if err := errors.Join(f.CutLink("b", "eth1"), f.CutLink("d", "eth1")); err != nil {
			t.Fatal(err)
		}
	}
	for _, n := range []*Node{f.Node("a"), d} { // and neither's link is set down
		eventually(t, n.Name()+" sees that the carrier is lost", func() bool {
			return strings.Contains(output(t, &n.Place, "ip", "-o", "link", "show", "eth1"), "NO-CARRIER")
		})
	}
	if pings(t, &b.Place, "10.9.0.1") || pings(t, &c.Place, "10.7.0.2") {
		t.Error("a cut cable carries packets")
	}
	for range 2 {
		if err := errors.Join(f.RestoreLink("b", "eth1"), f.RestoreLink("d", "eth1")); err != nil {
			t.Fatal(err)
		}
	}
	for _, address := range []string{"10.9.0.1", "fd09::1"} {
		eventually(t, "b reaches a again", func() bool { return pings(t, &b.Place, address) })
	}
	for _, address := range []string{"10.7.0.2", "fd07::2"} {
		eventually(t, "c reaches d again", func() bool { return pings(t, &c.Place, address) })
	}
	eventually(t, "all is as before", func() bool { return routes() == before })
	if err := f.CutLink("b", "eth7"); err == nil {
		t.Error("there is no cable at b:eth7")
	}
	if got := state(&sw.Place, "eth2"); got != "UP" {
		t.Errorf("the switch's port is %s", got)
	}
}

func TestADeadNode(t *testing.T) {
	f := start(t, load(t, small))
	a, b := f.Node("a"), f.Node("b")
	p, err := a.Spawn("sleeper", "sleep", "1000")
	if err != nil {
		t.Fatal(err)
	}
	if err := f.KillNode("a"); err != nil {
		t.Fatal(err)
	}
	<-p.Done()
	eventually(t, "b sees that the carrier is lost", func() bool {
		return strings.Contains(output(t, &b.Place, "ip", "-o", "link", "show", "eth1"), "NO-CARRIER")
	})
	if err := a.Command(t.Context(), "true").Run(); !errors.Is(err, errEnded) {
		t.Errorf("a command on a dead node: %v", err)
	}
	if err := f.KillNode("a"); err != nil {
		t.Errorf("killing the dead: %v", err)
	}
}

func TestACommandThatFails(t *testing.T) {
	nettest.Need(t, nettest.Root)
	before := leftovers(t)
	topo := load(t, strings.Replace(small, "ip route add 10.8.0.0/24 via 10.9.0.1", "ip route add 10.8.0.0/24 via 10.99.0.1", 1))
	_, err := Up(t.Context(), topo, Options{})
	if err == nil || !strings.Contains(err.Error(), "node b: ip -batch -: exit status") || !strings.Contains(err.Error(), "10.99.0.1") {
		t.Errorf("got %v", err)
	}
	gone(t, before)
	topo = load(t, strings.Replace(small, "/run/deep/file", "/etc/ravel-lab-is-not-here", 1))
	if _, err = Up(t.Context(), topo, Options{}); err == nil || !strings.Contains(err.Error(), "/etc/ravel-lab-is-not-here is not on this machine") {
		t.Errorf("got %v", err)
	}
	gone(t, before)
}

func TestTheEndOfTheContextEndsTheStart(t *testing.T) {
	nettest.Need(t, nettest.Root)
	before := leftovers(t)
	topo := load(t, strings.Replace(small, "sh -c 'echo", "sh -c 'sleep 1000; echo", 1))
	reason := errors.New("the user has left")
	ctx, cancel := context.WithCancelCause(t.Context())
	time.AfterFunc(300*time.Millisecond, func() { cancel(reason) })
	if _, err := Up(ctx, topo, Options{}); !errors.Is(err, context.Canceled) && !errors.Is(err, reason) {
		t.Errorf("got %v", err)
	}
	gone(t, before)
}

func TestDownLeavesNothing(t *testing.T) {
	nettest.Need(t, nettest.Root)
	before := leftovers(t)
	topo := load(t, small)
	f, err := Up(t.Context(), topo, Options{LogDir: t.TempDir()})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := f.Node("b").Spawn("stubborn", "bash", "-c", "trap '' TERM; (sleep 1000) & sleep 1000"); err != nil {
		t.Fatal(err)
	}
	if _, err := f.Node("a").Pod("p1"); err != nil {
		t.Fatal(err)
	}
	if cmp.Equal(before, leftovers(t)) {
		t.Fatal("a fleet that is up cannot be seen: this test would see nothing that is left")
	}
	for range 2 {
		if err := f.Down(); err != nil {
			t.Error(err)
		}
	}
	gone(t, before)
	if err := f.Node("a").Command(t.Context(), "true").Run(); err == nil {
		t.Error("a command runs in a fleet that is down")
	}
}

// A process that is killed takes its fleet with it.
func TestAKilledRunnerLeavesNothing(t *testing.T) {
	nettest.Need(t, nettest.Root)
	if os.Getenv("FLEET_TEST_VICTIM") != "" {
		start(t, load(t, small))
		fmt.Println("up")
		select {}
	}
	before := leftovers(t)
	victim := exec.Command("/proc/self/exe", "-test.run=^"+t.Name()+"$")
	victim.Env = append(os.Environ(), "FLEET_TEST_VICTIM=1")
	out, err := victim.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := victim.Start(); err != nil {
		t.Fatal(err)
	}
	if _, err := fmt.Fscanln(out, new(string)); err != nil {
		t.Fatal(err)
	}
	if err := victim.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	_ = victim.Wait()
	gone(t, before)
}

// leftovers are the namespaces that processes of this machine are in, this process's mounts and links, and the children
// of this process.
func leftovers(t *testing.T) []string {
	t.Helper()
	var all []string
	namespaces, err := filepath.Glob("/proc/[0-9]*/ns/net")
	if err != nil {
		t.Fatal(err)
	}
	for _, ns := range namespaces {
		if name, err := os.Readlink(ns); err == nil {
			all = append(all, name)
		}
	}
	threads, _ := filepath.Glob("/proc/self/task/*/ns/net")
	for _, ns := range threads {
		if name, err := os.Readlink(ns); err == nil {
			all = append(all, name)
		}
	}
	mounts, err := os.ReadFile("/proc/self/mounts")
	if err != nil {
		t.Fatal(err)
	}
	all = append(all, strings.Split(string(mounts), "\n")...)
	links, err := net.Interfaces()
	if err != nil {
		t.Fatal(err)
	}
	for _, l := range links {
		all = append(all, "link "+l.Name)
	}
	slices.Sort(all)
	return slices.Compact(all)
}

// gone fails if something is there that was not before.
func gone(t *testing.T, before []string) {
	t.Helper()
	var left []string
	for deadline := time.Now().Add(10 * time.Second); ; time.Sleep(20 * time.Millisecond) {
		left = slices.DeleteFunc(leftovers(t), func(s string) bool { return slices.Contains(before, s) })
		if len(left) == 0 {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("left behind:\n%s", strings.Join(left, "\n"))
		}
	}
}

func TestBatches(t *testing.T) {
	words := func(s string) []string { return strings.Fields(s) }
	got := batches([][]string{
		words("ip link add x type dummy"), words("ip link set x up"), words("ip -n p1 link set lo up"), words("ip -n p1 route"),
		words("ip -n p2 route"), words("sysctl -w a=b"), words("ip route"), words("ip netns exec p1 true"),
		{"ip", "link", "set", "x", "alias", "two words"}, words("ip -6 route"), words("ip netns add p3"),
	})
	want := []batch{
		{words("ip -batch -"), "link add x type dummy\nlink set x up\n"},
		{words("ip -n p1 -batch -"), "link set lo up\nroute\n"},
		{words("ip -n p2 -batch -"), "route\n"},
		{words("sysctl -w a=b"), ""},
		{words("ip -batch -"), "route\n"},
		{words("ip netns exec p1 true"), ""},
		{[]string{"ip", "link", "set", "x", "alias", "two words"}, ""},
		{words("ip -6 route"), ""},
		{words("ip -batch -"), "netns add p3\n"},
	}
	if diff := cmp.Diff(want, got, cmp.AllowUnexported(batch{})); diff != "" {
		t.Errorf("(-want +got)\n%s", diff)
	}
}

// The lab's own topology: FRR finds its neighbours, the gateway has one owner, and everyone reaches everyone.
func TestTheLab(t *testing.T) {
	nettest.Need(t, nettest.Root, nettest.FRR)
	topo, err := topology.Load("../ravel.clab.yml")
	if err != nil {
		t.Fatal(err)
	}
	began := time.Now()
	f := start(t, topo)
	t.Logf("up after %v", time.Since(began))
	c1, spine := f.Node("c1"), f.Node("spine")
	for _, address := range []string{"10.1.0.11", "fd00:1::12", "10.1.0.23", "10.2.0.24", "fd00:2::24", "10.3.2.10"} {
		eventually(t, "c1 reaches "+address, func() bool { return pings(t, &c1.Place, address) })
	}
	t.Logf("reachable after %v", time.Since(began))
	for _, family := range []string{"-4", "-6"} {
		prefix := map[string]string{"-4": "10.1.0.0/24", "-6": "fd00:1::/64"}[family]
		eventually(t, "the spine has two paths to the rack", func() bool {
			return strings.Count(output(t, &spine.Place, "ip", family, "route", "show", prefix), "via") == 2
		})
	}
	master := func(tor string) string {
		out := output(t, &f.Node(tor).Place, "vtysh", "-c", "show vrrp summary")
		fields := strings.Fields(out[strings.LastIndex(out, "\n")+1:])
		return strings.Join(fields[5:], " ")
	}
	eventually(t, "tor1 is the gateway", func() bool { return master("tor1") == "Master Master" && master("tor2") == "Backup Backup" })

	// The death of the gateway's router: another is the gateway in about a second, and the spine has no path through
	// the dead one at once.
	if err := f.KillNode("tor1"); err != nil {
		t.Fatal(err)
	}
	died := time.Now()
	for _, address := range []string{"10.3.1.10", "fd00:3:1::10"} {
		eventually(t, "d1 reaches c1 through tor2", func() bool { return pings(t, &f.Node("d1").Place, address) })
	}
	t.Logf("d1 reaches c1 again %v after tor1 died", time.Since(died))
	eventually(t, "the spine has one path", func() bool {
		return !strings.Contains(output(t, &spine.Place, "ip", "route", "show", "10.1.0.0/24"), "10.0.1.2")
	})
	if err := unix.Kill(f.Node("tor2").PID(), 0); err != nil {
		t.Errorf("tor2 is dead too: %v", err)
	}
}

func BenchmarkUpDown(b *testing.B) {
	nettest.Need(b, nettest.Root)
	topo, err := topology.Load("../ravel.clab.yml")
	if err != nil {
		b.Fatal(err)
	}
	for b.Loop() {
		f, err := Up(b.Context(), topo, Options{LogDir: b.TempDir()})
		if err != nil {
			b.Fatal(err)
		}
		if err := f.Down(); err != nil {
			b.Fatal(err)
		}
	}
}
