package main

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/base64"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"log"
	"math/big"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/ravel-lb/ravel/gossip"
	"github.com/ravel-lb/ravel/internal/check"
	"github.com/ravel-lb/ravel/internal/nettest"
)

// way is one in which an installation fails. It ends in one line: what is wrong, where, and what to do.
type way struct {
	name  string            // docs/troubleshooting.md has a row of this name
	needs []nettest.Feature // with IPVS the way is tried on a kernel that has it, too, or alone
	line  string            // a regular expression that one line, and no other, matches
	fix   []string          // words of that line, or of the "mend it by" below it
	code  int               // the exit code; ofCheck is 1 if a line fails, else 0
	// show makes the fault and has a command show it.
	show func(h *site) (code int, output string)
}

const ofCheck = -1

var withIPVS = []nettest.Feature{nettest.IPVS, nettest.Dummy}

// ways are those that need no API server. install_kube_test.go has the others.
var ways = []way{
	{"no ip_vs", nil, `^fail  ?ipvs: .*ip_vs`, []string{"modprobe ip_vs"}, exitFault, noIPVS},
	{"no ip_vs", withIPVS, `^fail ipvs: .*ip_vs`, []string{"modprobe ip_vs"}, exitFault, otherKernel},
	{"iptables of the wrong variant", withIPVS, `^ravel: .*ip6?tables-(nft|legacy) (is missing|cannot do NAT)`, []string{"set --iptables to", "auto"}, exitFault, wrongVariant},
	{"iptables of the wrong variant", nil, `^ravel: .*ip6?tables-(nft|legacy) (is missing|cannot do NAT)`, []string{"set --iptables to", "auto"}, exitFault, wrongVariant},
	{"iptables in both variants", []nettest.Feature{nettest.NftNAT, nettest.LegacyNAT}, `^warn  iptables-variant: `, []string{"-save", "move what matters"}, ofCheck, bothVariants},
	{"gossip's port is taken", nil, `^ravel: .*7946.*in use`, []string{"ss -lntup 'sport = :7946'", "--gossip-listen"}, exitFault, taken("0.0.0.0:7946")},
	{"the port of probes is taken", nil, `^ravel: .*7947.*in use`, []string{"ss -lntup 'sport = :7947'", "--health-listen"}, exitFault, taken("0.0.0.0:7947")},
	{"the port of metrics is taken", nil, `^ravel: .*10234.*in use`, []string{"ss -lntup 'sport = :10234'", "--listen"}, exitFault, taken("127.0.0.1:10234", "--listen", "127.0.0.1:10234")},
	{"a port is taken, by the preflight", nil, `^fail  ports: port 7946: .* listens`, []string{"or set another port"}, exitFault, func(h *site) (int, string) {
		h.listen("0.0.0.0:7946")
		return h.ravel("check", "--host", "--role", "realserver")
	}},
	{"the port of BGP is taken", nil, `^ravel: .*:179: address already in use`, []string{"ss -lntup 'sport = :179'", "--bgp-port"}, exitFault, func(h *site) (int, string) {
		h.listen("0.0.0.0:179")
		return h.ravel(h.role("director", "--node", "director1", "--bgp-port", "179")...)
	}},
	{"the gossip key is missing", nil, `^ravel: reading the gossip key: .*/nowhere: no such file`, []string{"ravel gossip-key"}, exitUsage, withKey("")},
	{"the gossip key's file is empty", nil, `^ravel: reading the gossip key: .*/key2: no key in it`, []string{"ravel gossip-key"}, exitUsage, withKey("\n")},
	{"the gossip key is no key", nil, `^ravel: reading the gossip key: .*/key2: line 1: not base64`, []string{"ravel gossip-key"}, exitUsage, withKey("geheim!\n")},
	{"another gossip key", nil, `^warn  gossip: cannot decrypt what comes from 198\.51\.100\.31: `, []string{"the same keys", "--gossip-key-file"}, ofCheck, func(h *site) (int, string) {
		return h.beside("cannot decrypt", "--gossip-key-file", h.write("key2", gossip.NewKey()+"\n"))
	}},
	{"another fleet's name", nil, `^warn  gossip: what comes from 198\.51\.100\.31 is of another fleet than this one, "ravel"`, []string{"--fleet"}, ofCheck, func(h *site) (int, string) {
		return h.beside("another fleet", "--fleet", "other")
	}},
	{"a realserver under a wrong name", nil, `^fail  nodes\.nobody: this node is not in the list`, []string{"--node NAME"}, exitFault, func(h *site) (int, string) {
		h.start("realserver", "--node", "nobody")
		return h.until("nodes.nobody", "check")
	}},
	{"a director under a wrong name", nil, `^fail  fleet\.directors: this director, nobody, is not in the list.*director1, director2`, []string{"--node NAME"}, exitFault, func(h *site) (int, string) {
		h.start("director", "--node", "nobody")
		return h.until("fleet.directors", "check")
	}},
	{"no static file", nil, `^fail  /nowhere\.yaml: reading the file: no such file`, []string{"put the file there"}, exitFault, func(h *site) (int, string) {
		return h.ravel("check", "--static", "/nowhere.yaml")
	}},
	{"a fault in a document", nil, `^fail  fleet\.peers\[0\]\.asn: .*line \d+`, []string{"want"}, exitFault, func(h *site) (int, string) {
		text, err := os.ReadFile(h.static)
		h.must(err)
		text = bytes.Replace(text, []byte("{address: 198.51.100.1, asn: 65000}"), []byte("{address: 198.51.100.1, asn: 0}"), 1)
		return h.ravel("check", "--static", h.write("bad.yaml", string(text)))
	}},
	{"no kubeconfig", nil, `^ravel: .*kubeconfig.* /nowhere: `, []string{"set --kubeconfig"}, exitFault, func(h *site) (int, string) {
		return h.ravel(h.cluster("/nowhere")...)
	}},
	{"no route to the API server", nil, `^fail  API server: .*203\.0\.113\.99:6443: connect: network is unreachable`, []string{"route", "kubeconfig"}, exitFault, func(h *site) (int, string) {
		h.start(h.cluster(h.kubeconfig("https://203.0.113.99:6443", nil))...)
		return h.until("API server", "check")
	}},
	{"the API server refuses connections", nil, `^fail  API server: .*127\.0\.0\.1:6443: connect: connection refused`, []string{"https://127.0.0.1:6443", "kubeconfig"}, exitFault, func(h *site) (int, string) {
		h.start(h.cluster(h.kubeconfig("https://127.0.0.1:6443", nil))...)
		return h.until("API server", "check")
	}},
	{"the API server's authority is another one", nil, `^fail  API server: .*x509: certificate signed by unknown authority`, []string{"certificate-authority-data", "https://127.0.0.1:"}, exitFault, func(h *site) (int, string) {
		return h.untrusted(time.Now().Add(time.Hour), false)
	}},
	{"the API server's certificate is over, or the clock is wrong", nil, `^fail  API server: .*x509: certificate has expired`, []string{"clock", "renew", "https://127.0.0.1:"}, exitFault, func(h *site) (int, string) {
		return h.untrusted(time.Now().Add(-time.Hour), true)
	}},
	{"no CAP_NET_ADMIN", nil, `^ravel: ravel realserver lacks CAP_NET_ADMIN`, []string{"run it as root"}, exitUsage, func(h *site) (int, string) {
		self, err := os.Executable()
		h.must(err)
		return run1(exec.Command("setpriv", "--bounding-set", "-net_admin", "--inh-caps", "-net_admin", "--", self), h.role("realserver", "--node", "node1"))
	}},
	{"settings that cannot be written", nil, `^warn  sysctl net\.netfilter\.nf_conntrack_tcp_be_liberal: cannot be set.*read-only`, []string{"ravel check --host --fix --role realserver"}, ofCheck, func(h *site) (int, string) {
		h.shell("mount --bind /proc/sys /proc/sys && mount -o remount,bind,ro /proc/sys")
		h.start("realserver", "--node", "node1")
		return h.until("read-only", "check")
	}},
	{"settings of IPVS that cannot be written", withIPVS, `^(warn|fail)  sysctl net/ipv4/vs: cannot set .*sloppy_tcp=1.*read-only`, []string{"ravel check --host --fix --role director"}, ofCheck, func(h *site) (int, string) {
		h.shell("mount --bind /proc/sys /proc/sys && mount -o remount,bind,ro /proc/sys")
		h.start("director", "--node", "director1")
		return h.until("net/ipv4/vs", "check")
	}},
	{"both roles on one host", nil, `^ravel: another ravel runs here: realserver, process \d+`, []string{"stop that one first"}, exitFault, func(h *site) (int, string) {
		h.start("realserver", "--node", "node1")
		h.until("node1", "check")
		return h.ravel(h.role("director", "--node", "director1", "--admin-socket", "/run/other.sock")...)
	}},
	{"no BGP on the router", withIPVS, `^warn  peer 198\.51\.100\.1: .*connection refused`, []string{"start BGP", "port 179 of 198.51.100.1"}, ofCheck, func(h *site) (int, string) {
		return h.routed(nil)
	}},
	{"the router has another AS number", withIPVS, `^warn  peer 198\.51\.100\.1: `, []string{"65000", "remote AS for this director 65100"}, ofCheck, func(h *site) (int, string) {
		return h.routed(func(conn net.Conn) {
			_, _ = conn.Read(make([]byte, 4096)) // the OPEN
			_, _ = conn.Write(append(bytes.Repeat([]byte{0xff}, 16), 0, 21, 3, 2, 2))
			time.Sleep(100 * time.Millisecond)
		})
	}},
	{"the router does not answer", withIPVS, `^warn  peer 198\.51\.100\.2: .*(MD5 key|no route to host)`, []string{"198.51.100.2"}, ofCheck, func(h *site) (int, string) {
		h.start("director", "--node", "director1")
		return h.until("peer 198.51.100.2", "check")
	}},
	{"a router behind another one", nil, `^fail  peers: peer 198\.51\.100\.1 is behind 198\.51\.100\.254`, []string{"multihop"}, exitFault, func(h *site) (int, string) {
		h.shell("ip route add 198.51.100.1/32 via 198.51.100.254")
		return h.ravel("check", "--host", "--role", "director", "--node", "director1", "--static", h.static)
	}},
	{"a network plugin that carries packets past netfilter", nil, `^fail  cni: `, []string{"bpfEnabled"}, exitFault, func(h *site) (int, string) {
		h.shell("ip link add bpfin.cali type veth peer name bpfout.cali")
		return h.ravel("check", "--host", "--role", "realserver")
	}},
	{"kube-proxy in IPVS mode on a director", nil, `^warn  kube-proxy: kube-proxy runs in IPVS mode here`, []string{"--proxy-mode", "--ipvs-exclude-cidrs"}, ofCheck, func(h *site) (int, string) {
		h.shell("ip link add kube-ipvs0 type veth peer name kube-ipvs1")
		return h.ravel("check", "--host", "--role", "director", "--node", "director1", "--static", h.static)
	}},
	{"the state directory cannot be written", nil, `^warn  --state-dir: .*/proc/nowhere`, []string{"make /proc/nowhere writable, or set --state-dir"}, ofCheck, func(h *site) (int, string) {
		h.start("realserver", "--node", "node1", "--state-dir", "/proc/nowhere")
		return h.until("--state-dir", "check")
	}},
	{"the admin socket cannot be made", nil, `^ravel: making the admin socket's directory: .*/proc/nowhere`, []string{"--admin-socket"}, exitFault, func(h *site) (int, string) {
		return h.ravel(h.role("realserver", "--node", "node1", "--admin-socket", "/proc/nowhere/a.sock")...)
	}},
	{"modules cannot be loaded", nil, `^fail  fix: (loading module ip_vs_mh: exit status 1|making dummy link ravel0: )`, []string{"modprobe"}, exitFault, noModules},
	{"modules cannot be loaded", withIPVS, `^fail  fix: loading module ip_vs_mh: exit status 1`, []string{"modprobe ip_vs_mh"}, exitFault, noModules},
	{"no IP forwarding on a node", nil, `^fail  forwarding: net\.ipv4\.ip_forward is 0`, []string{"sysctl -w net.ipv4.ip_forward=1"}, exitFault, func(h *site) (int, string) {
		h.shell("echo 0 >/proc/sys/net/ipv4/ip_forward")
		return h.ravel("check", "--host", "--role", "realserver")
	}},
	{"a VIP on another link", nil, `^fail  vip-address: VIP 192\.0\.2\.80 is on e0 too`, []string{"ip addr del 192.0.2.80/32 dev e0"}, exitFault, func(h *site) (int, string) {
		h.shell("ip addr add 192.0.2.80/32 dev e0")
		return h.ravel("check", "--host", "--role", "realserver", "--static", h.static)
	}},
	{"directors that are not heard", nil, `^ravel: director director2 of fleet\.directors is not in the fleet`, []string{"UDP and TCP", "--fleet"}, exitNotWell, func(h *site) (int, string) {
		h.start("realserver", "--node", "node1")
		return h.until("director director2", "members")
	}},
}

// documented are the rows of docs/troubleshooting.md: what is seen, by what is wrong.
func documented(t *testing.T) map[string]*regexp.Regexp {
	t.Helper()
	text, err := os.ReadFile("../../docs/troubleshooting.md")
	if err != nil {
		t.Fatal(err)
	}
	rows := map[string]*regexp.Regexp{}
	for _, m := range regexp.MustCompile("(?m)^\\| ([^|]+) \\| `([^`]+)` \\| [^|]+ \\| [^|]+ \\|$").FindAllStringSubmatch(string(text), -1) {
		var parts []string
		for part := range strings.SplitSeq(m[2], "…") {
			parts = append(parts, regexp.QuoteMeta(part))
		}
		rows[m[1]] = regexp.MustCompile(strings.Join(parts, ".*"))
	}
	return rows
}

func TestTroubleshootingHasEachWay(t *testing.T) {
	rows := documented(t)
	for _, w := range slices.Concat(ways, clusterWays) {
		if rows[w.name] == nil {
			t.Errorf("docs/troubleshooting.md has no row for %q", w.name)
		}
	}
	for name := range rows {
		if !slices.ContainsFunc(slices.Concat(ways, clusterWays), func(w way) bool { return w.name == name }) {
			t.Errorf("docs/troubleshooting.md has a row for %q, which no test makes", name)
		}
	}
}

// site is a host of its own: other networks, an empty /run, and a link e0 with the addresses of director1.
type site struct {
	t           *testing.T
	dir, static string
	key         string
	ends        []func() // what is to be ended
}

func TestFailedInstallations(t *testing.T) { try(t, ways, false) }

// Those that a kernel without IPVS never comes to, and those that look another way on one that has it.
func TestFailedInstallationsWithIPVS(t *testing.T) { try(t, ways, true) }

func try(t *testing.T, ways []way, ipvs bool) {
	for _, w := range ways {
		if slices.Contains(w.needs, nettest.IPVS) == ipvs {
			t.Run(w.name, func(t *testing.T) {
				nettest.Need(t, append([]nettest.Feature{nettest.Root}, w.needs...)...)
				inHost(t, func() { w.try(newSite(t)) })
			})
		}
	}
}

func newSite(t *testing.T) *site {
	h := &site{t: t, dir: t.TempDir()}
	h.key = h.write("key", gossip.NewKey()+"\n")
	text, err := os.ReadFile("../../deploy/example/ravel-static.yaml")
	h.must(err)
	h.static = h.write("static.yaml", string(text))
	h.shell(`ip link add e0 type veth peer name e1
		ip addr add 198.51.100.11/24 dev e0
		ip link set e0 up; ip link set e1 up`)
	return h
}

// maxLine is what a line of a terminal's window still shows without a loss of sense.
const maxLine = 400

// try makes the fault and judges what was said of it.
func (w way) try(h *site) {
	h.t.Helper()
	defer h.end()
	code, out := w.show(h)
	lines := strings.Split(strings.TrimSpace(out), "\n")
	if want := w.code; want == ofCheck {
		want = exitOK
		if slices.ContainsFunc(lines, func(l string) bool { return strings.HasPrefix(l, "fail") }) {
			want = exitFault
		}
		if code != want {
			h.t.Errorf("exit code %d, want %d", code, want)
		}
	} else if code != want {
		h.t.Errorf("exit code %d, want %d", code, want)
	}
	pattern := regexp.MustCompile(w.line)
	var at []int
	for i, l := range lines {
		if pattern.MatchString(l) {
			at = append(at, i)
		}
	}
	if len(at) != 1 {
		h.t.Fatalf("%d lines say so, want one that matches %s:\n%s", len(at), w.line, out)
	}
	said, remedy := lines[at[0]], ""
	if at[0]+1 < len(lines) {
		remedy, _ = strings.CutPrefix(lines[at[0]+1], "      mend it by: ")
	}
	if strings.HasPrefix(said, "ravel: ") && at[0] != len(lines)-1 {
		h.t.Errorf("it is not the last line:\n%s", out)
	}
	for _, l := range []string{said, remedy} {
		if len(l) > maxLine {
			h.t.Errorf("a line of %d characters:\n%s", len(l), l)
		}
	}
	if shown := documented(h.t)[w.name]; shown == nil || !shown.MatchString(said) {
		h.t.Errorf("docs/troubleshooting.md has %s for it, and it is\n%s", shown, said)
	}
	for _, word := range w.fix {
		if !strings.Contains(said, word) && !strings.Contains(remedy, word) {
			h.t.Errorf("%q is not said:\n%s\n%s", word, said, remedy)
		}
	}
	h.t.Logf("%s\n%s", said, remedy)
}

// end ends what was started.
func (h *site) end() {
	for _, end := range slices.Backward(h.ends) {
		end()
	}
	h.ends = nil
}

func (h *site) must(err error) {
	h.t.Helper()
	if err != nil {
		h.t.Fatal(err)
	}
}

func (h *site) shell(script string) { nettest.Shell(h.t, script) }

func (h *site) write(name, text string) string {
	path := filepath.Join(h.dir, name)
	h.must(os.WriteFile(path, []byte(text), 0o600))
	return path
}

// role are the arguments of a role that follows the static file. More of them win over those before.
func (h *site) role(role string, more ...string) []string {
	args := []string{role, "--settle", "300ms", "--state-dir="}
	if !slices.Contains(more, "--static") && !slices.Contains(more, "--config-name") {
		args = append(args, "--static", h.static)
	}
	if !slices.Contains(more, "--gossip-key-file") {
		args = append(args, "--gossip-key-file", h.key)
	}
	if role == directorRole {
		args = append(args, "--gossip-advertise", "198.51.100.11")
	}
	return append(args, more...)
}

// cluster are the arguments of a realserver that follows a cluster.
func (h *site) cluster(kubeconfig string) []string {
	return h.role("realserver", "--node", "node1", "--kubeconfig", kubeconfig, "--config-namespace", "ravel",
		"--config-name", "lb", "--config-key", "cluster", "--fleet-key", "fleet", "--kube-wait", "1s")
}

func (h *site) kubeconfig(server string, authority []byte) string {
	return h.write("kubeconfig", fmt.Sprintf(`apiVersion: v1
kind: Config
clusters: [{name: a, cluster: {server: %q, certificate-authority-data: %q}}]
users: [{name: a, user: {token: nothing}}]
contexts: [{name: a, context: {cluster: a, user: a}}]
current-context: a
`, server, base64.StdEncoding.EncodeToString(authority)))
}

// ravel runs a command to its end, which it must come to.
func (h *site) ravel(args ...string) (int, string) {
	return run1(exec.Command("/proc/self/exe"), args)
}

func run1(cmd *exec.Cmd, args []string) (int, string) {
	cmd.Env = append(os.Environ(), programArgs+"="+strings.Join(args, " "))
	timer := time.AfterFunc(20*time.Second, func() { _ = cmd.Process.Kill() })
	defer timer.Stop()
	out, err := cmd.CombinedOutput()
	if cmd.ProcessState == nil {
		return -1, err.Error()
	}
	return cmd.ProcessState.ExitCode(), string(out)
}

// start starts a role that runs until end.
func (h *site) start(args ...string) {
	if !slices.Contains(args, "--settle") {
		args = h.role(args[0], args[1:]...)
	}
	h.startIn(nil, args)
}

func (h *site) startIn(enter, args []string) {
	self, err := os.Executable()
	h.must(err)
	words := append(slices.Clone(enter), self)
	cmd := exec.Command(words[0], words[1:]...)
	cmd.Env = append(os.Environ(), programArgs+"="+strings.Join(args, " "))
	var said bytes.Buffer
	cmd.Stdout, cmd.Stderr = &said, &said
	h.must(cmd.Start())
	h.ends = append(h.ends, func() {
		_ = cmd.Process.Signal(syscall.SIGTERM)
		timer := time.AfterFunc(10*time.Second, func() { _ = cmd.Process.Kill() })
		err := cmd.Wait()
		if !timer.Stop() {
			err = errors.Join(err, errors.New("it did not end"))
		}
		if h.t.Failed() {
			h.t.Logf("%v: %v\n%s", args, err, said.String())
		}
	})
}

// until asks again and again until a word is said, and returns the answer that has it, or else the last one.
func (h *site) until(word string, args ...string) (code int, out string) {
	for deadline := time.Now().Add(20 * time.Second); ; time.Sleep(100 * time.Millisecond) {
		code, out = h.ravel(args...)
		if strings.Contains(out, word) || time.Now().After(deadline) {
			return code, out
		}
	}
}

// listen has another program listen.
func (h *site) listen(at string) net.Listener {
	l, err := net.Listen("tcp", at)
	h.must(err)
	h.ends = append(h.ends, func() { _ = l.Close() })
	return l
}

func taken(at string, more ...string) func(*site) (int, string) {
	return func(h *site) (int, string) {
		h.listen(at)
		return h.ravel(h.role("realserver", append([]string{"--node", "node1"}, more...)...)...)
	}
}

func withKey(text string) func(*site) (int, string) {
	return func(h *site) (int, string) {
		path := filepath.Join(h.dir, "nowhere")
		if text != "" {
			path = h.write("key2", text)
		}
		return h.ravel(h.role("realserver", "--node", "node1", "--gossip-key-file", path)...)
	}
}

// beside has a realserver run next to another one that has other settings, node2 at 198.51.100.31, and returns what this
// one says of it.
func (h *site) beside(word string, other ...string) (int, string) {
	h.shell(`ip netns add other
		ip link set e1 netns other
		ip -n other addr add 198.51.100.31/24 dev e1
		ip -n other link set lo up; ip -n other link set e1 up
		mkdir /run/first`)
	h.start("realserver", "--node", "node1", "--gossip-advertise", "198.51.100.11", "--seeds", "198.51.100.31")
	enter := []string{"ip", "netns", "exec", "other", "sh", "-c", `mount -t tmpfs run /run && exec "$0"`}
	h.startIn(enter, h.role("realserver", append([]string{"--node", "node2", "--gossip-advertise", "198.51.100.31", "--seeds", "198.51.100.11"}, other...)...))
	return h.until(word, "check")
}

// untrusted has a realserver follow an API server whose certificate ends at a time, and whose authority it knows or not.
func (h *site) untrusted(end time.Time, known bool) (int, string) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	h.must(err)
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "api"}, NotBefore: end.Add(-24 * time.Hour), NotAfter: end,
		IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)}, IsCA: true, BasicConstraintsValid: true,
		KeyUsage: x509.KeyUsageDigitalSignature | x509.KeyUsageCertSign, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, &key.PublicKey, key)
	h.must(err)
	server := httptest.NewUnstartedServer(http.NotFoundHandler())
	server.TLS = &tls.Config{Certificates: []tls.Certificate{{Certificate: [][]byte{der}, PrivateKey: key}}}
	server.Config.ErrorLog = log.New(io.Discard, "", 0)
	server.StartTLS()
	h.ends = append(h.ends, server.Close)
	var authority []byte
	if known {
		authority = pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})
	}
	h.start(h.cluster(h.kubeconfig(server.URL, authority))...)
	return h.until("API server", "check")
}

// routed has a director run beside the router of its first peer, which answers as told, or listens nowhere.
func (h *site) routed(answer func(net.Conn)) (int, string) {
	h.shell("ip addr add 198.51.100.1/32 dev lo")
	if answer != nil {
		l := h.listen("198.51.100.1:179")
		go func() {
			for {
				conn, err := l.Accept()
				if err != nil {
					return
				}
				answer(conn)
				_ = conn.Close()
			}
		}()
	}
	h.start("director", "--node", "director1")
	return h.until("peer 198.51.100.1:", "check")
}

// noIPVS has a director run in this kernel where that has no IPVS.
func noIPVS(h *site) (int, string) {
	if nettest.Has(nettest.IPVS) {
		return otherKernel(h)
	}
	h.start("director", "--node", "director1")
	return h.until("ipvs", "check")
}

// otherKernel is the preflight over the files of a kernel that has no IPVS.
func otherKernel(h *site) (int, string) {
	root := h.t.TempDir()
	for name, text := range map[string]string{
		"proc/version": "Linux", "proc/modules": "", "proc/sys/kernel/osrelease": "6.1.0-test\n",
		"lib/modules/6.1.0-test/modules.dep": "", "lib/modules/6.1.0-test/modules.builtin": "",
	} {
		path := filepath.Join(root, name)
		h.must(errors.Join(os.MkdirAll(filepath.Dir(path), 0o755), os.WriteFile(path, []byte(text), 0o644)))
	}
	var out strings.Builder
	for _, l := range (check.Host{Role: directorRole, Root: root}).Run(h.t.Context()) {
		fmt.Fprintln(&out, strings.Replace(l.String(), "     fix: ", "      mend it by: ", 1))
	}
	return exitFault, out.String()
}

// wrongVariant asks for iptables of the variant that the kernel cannot do, or whose programs are not here.
func wrongVariant(h *site) (int, string) {
	variant := "nft"
	if nettest.Has(nettest.NftNAT) {
		variant = "legacy"
		h.shell("mount --bind /dev/null $(readlink -f $(PATH=$PATH:/usr/sbin command -v iptables-legacy))")
	}
	return h.ravel(h.role("realserver", "--node", "node1", "--iptables", variant)...)
}

func bothVariants(h *site) (int, string) {
	h.shell("for v in nft legacy; do iptables-$v -A INPUT -p tcp --dport 9 -j ACCEPT; done")
	return h.ravel("check", "--host", "--role", "realserver")
}

// noModules is a kernel that has none to load, or one that seems to lack a module whose loading is refused.
func noModules(h *site) (int, string) {
	if nettest.Has(nettest.IPVS) {
		h.shell(`grep -v '^ip_vs_mh ' /proc/modules >/run/modules
			mount --bind /run/modules /proc/modules
			mount -t tmpfs none /sys/module
			mount --bind /bin/false $(PATH=$PATH:/usr/sbin command -v modprobe)`)
	}
	return h.ravel("check", "--host", "--fix", "--role", "director")
}

// clusterWays are those that need a real API server; install_kube_test.go makes them.
var clusterWays = []way{
	{"a right is missing in the cluster", nil, `^fail  API server: does not tell of endpointslices: .*User "stranger" cannot (list|watch) resource "endpointslices"`,
		[]string{"list and watch", "ClusterRole"}, exitFault, nil},
	{"the right to the ConfigMap is missing", nil, `^fail  API server: does not tell of configmaps: .*cannot (list|watch) resource "configmaps".* in the namespace "ravel"`,
		[]string{"list and watch", "Role"}, exitFault, nil},
	{"a token that does not hold", nil, `^fail  API server: does not tell of .*: Unauthorized`, []string{"token", "https://127.0.0.1:"}, exitFault, nil},
	{"no ConfigMap", nil, `^fail  configmap ravel/lb: is not there`, []string{"make it", "--config-name"}, exitFault, nil},
	{"a key is missing in the ConfigMap", nil, `^fail  configmap ravel/lb key fleet: is not in the ConfigMap`, []string{"--fleet-key"}, exitFault, nil},
	{"a fault in a document of the ConfigMap", nil, `^fail  configmap ravel/lb key fleet: fleet\.directors: `, []string{"want"}, exitFault, nil},
}
