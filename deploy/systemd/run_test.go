package systemd_test

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
)

const (
	key      = "MDEyMzQ1Njc4OWFiY2RlZjAxMjM0NTY3ODlhYmNkZWY=\n"
	settings = `
static: /etc/ravel/static.yaml
gossip-key-file: /etc/ravel/gossip.key
gossip-advertise: 10.9.0.1
settle: 200ms
rise: 100ms
`
	document = `
cluster:
  config:
    192.0.2.80:
      80: {namespace: shop, service: web, portName: http, tcpEnabled: true, udpEnabled: true}
  config6:
    "2001:db8:2::80":
      443: {namespace: shop, service: web, portName: http, tcpEnabled: true}
fleet:
  asn: 65100
  directors:
    - {name: d1, addresses: [10.9.0.1, "fd09::1"]}
  peers:
    - {address: 10.9.0.254, asn: 65000}
nodes:
  - {name: r1, addresses: [10.9.0.31, "fd09::31"]}
endpoints:
  - {namespace: shop, service: web, portName: http, address: 203.0.113.10, port: 8080, node: r1}
  - {namespace: shop, service: web, portName: http, protocol: udp, address: 203.0.113.10, port: 8080, node: r1}
  - {namespace: shop, service: web, portName: http, address: "2001:db8:113::10", port: 8080, node: r1}
`
)

// files are those in /etc/ravel.
func files() map[string]string {
	return map[string]string{
		"director.yaml": "node: d1" + settings, "realserver.yaml": "node: r1" + settings, "static.yaml": document, "gossip.key": key,
	}
}

// ipvs is what IPVS serves.
func (m *machine) ipvs() string { return m.run("ipvsadm", "-Sn") }

// again waits until the unit is active with another process than before, and returns that.
func (m *machine) again(name, before string) (pid string) {
	m.t.Helper()
	return m.shows(name, func(u unit) bool {
		return u["ActiveState"] == "active" && u["MainPID"] != before && u["MainPID"] != "0"
	})["MainPID"]
}

// The life of a director's process under systemd, none of whose ends takes anything from the kernel.
func TestDirector(t *testing.T) {
	t.Parallel()
	m := boot(t, files())
	m.shell(`mkdir /etc/systemd/system/` + director + `.d
		printf '[Service]\nWatchdogSec=6s\n' >/etc/systemd/system/` + director + `.d/sooner.conf
		systemctl daemon-reload; systemctl start ` + director)
	if state := strings.TrimSpace(m.run("systemctl", "is-active", director)); state != "active" {
		t.Fatalf("it is %s", state)
	}
	u := m.shows(director, func(u unit) bool { return strings.HasPrefix(u["StatusText"], "serves 2 VIPs, announces 2") })
	if want := "serves 2 VIPs, announces 2; not ready: no BGP session is up"; !strings.HasPrefix(u["StatusText"], want) { // and why
		t.Errorf("status %q, want %q", u["StatusText"], want)
	}
	if shown := m.run("systemctl", "status", "--no-pager", director); !strings.Contains(shown, `Status: "`+u["StatusText"]+`"`) {
		t.Errorf("systemctl status:\n%s", shown)
	}
	served := m.ipvs()
	if strings.Count(served, "-A ") != 3 || strings.Count(served, "-a ") != 3 {
		t.Fatalf("IPVS has\n%s", served)
	}
	stays := func(after string) {
		t.Helper()
		if now := m.ipvs(); now != served {
			t.Fatalf("%s IPVS has\n%s\nand had\n%s", after, now, served)
		}
	}

	// One that stands still is killed and started anew, and the kernel serves on.
	pid := u["MainPID"]
	m.run("kill", "-STOP", pid)
	stays("while the process stands still")
	m.shows(director, func(u unit) bool { return u["Result"] == "watchdog" })
	stays("after the watchdog")
	pid = m.again(director, pid)
	stays("after the watchdog's restart")

	// One that dies, likewise.
	m.run("kill", "-KILL", pid)
	pid = m.again(director, pid)
	if n := m.show(director)["NRestarts"]; n != "2" {
		t.Errorf("%s restarts, want 2", n)
	}
	stays("after a crash")

	// An upgrade.
	m.run("systemctl", "restart", director)
	m.again(director, pid)
	stays("after a restart")

	// The roles take the host from each other.
	for _, turn := range [][2]string{{realserver, director}, {director, realserver}} {
		m.run("systemctl", "start", turn[0])
		for name, want := range map[string]string{turn[0]: "active", turn[1]: "inactive"} {
			if u := m.show(name); u["ActiveState"] != want || u["Result"] != "success" || u["NRestarts"] != "0" {
				t.Errorf("%s was started, and %s is not %s: %s", turn[0], name, want, u)
			}
		}
	}
	stays("after a time as a realserver")

	// A planned stop.
	m.run("systemctl", "stop", director)
	if u := m.show(director); u["ActiveState"] != "inactive" || u["Result"] != "success" || u["ExecMainStatus"] != "0" {
		t.Errorf("after a planned stop it is %s", u)
	}
	stays("after a planned stop")
	m.run("test", "-s", "/run/ravel/sysctl.json")
	if journal := m.run("journalctl", "--no-pager", "-u", director, "-n", "5"); !strings.Contains(journal, "ravel stopped") {
		t.Errorf("the journal:\n%s", journal)
	}

	// The end.
	m.run("ravel", "cleanup", "--config", "/etc/ravel/director.yaml")
	if left := m.ipvs(); left != "" {
		t.Errorf("after ravel cleanup IPVS has\n%s", left)
	}
	if said := m.run("ravel", "cleanup", "--config", "/etc/ravel/director.yaml", "--dry-run"); said != "nothing of Ravel's is here\n" {
		t.Errorf("ravel cleanup leaves\n%s", said)
	}

	// Beside the original it does not start: it sees that one from within its sandbox.
	m.shell(`(exec -a kube2ipvs bash -c "sleep 60; :" director) </dev/null >/dev/null 2>&1 &`)
	if _, err := m.try("systemctl", "start", director); err == nil {
		t.Error("it starts beside the original")
	}
	if journal := m.run("journalctl", "--no-pager", "-u", director, "-n", "5"); !strings.Contains(journal, "the original Ravel runs here") {
		t.Errorf("the journal:\n%s", journal)
	}
}

// The start of a director that knows nothing is over all the same, and what it lacks is in its status.
func TestStartWithoutADocument(t *testing.T) {
	t.Parallel()
	f := files()
	delete(f, "static.yaml")
	m := boot(t, f)
	m.run("systemctl", "start", director)
	u := m.show(director)
	if want := "serves 0 VIPs, announces 0; not ready: nothing is applied yet"; u["ActiveState"] != "active" || u["NRestarts"] != "0" || u["StatusText"] != want {
		t.Errorf("it is %s; want it active with status %q", u, want)
	}
}

// kernel is all of the kernel that Ravel could have a hand in.
const kernel = `
ipvsadm -Sn
ip -o address | grep -w ravel0 | cut -d' ' -f2-
ip route show proto 82; ip -6 route show proto 82
for family in iptables ip6tables; do
	for table in raw mangle nat filter; do $family-save -t $table | sed -e '/^#/d' -e 's/ \[[0-9:]*\]$//' -e "s/^/$family $table /"; done
done
ipset save | sort
sysctl -a -r '^net\.(ipv[46]\.conf\.(all|default|lo|uplink|ravel0)|ipv4\.(conf\.(tunl0|ip6tnl0)|vs|ip_)|netfilter)' 2>/dev/null |
	grep -vE 'nf_conntrack_count|stable_secret'
test ! -e /run/ravel/sysctl.json || cat /run/ravel/sysctl.json
`

// In the sandbox of its unit each role does all that it does without one.
func TestTheDirectorsSandboxTakesNothing(t *testing.T) {
	t.Parallel()
	sandbox(t, "director", "0000000000003400",
		"-a -t 192.0.2.80:80 -r 10.9.0.31", "-a -u 192.0.2.80:80", "[2001:db8:2::80]:443", "ravel0", "RAVEL", "net.ipv4.vs.")
}

func TestTheRealserversSandboxTakesNothing(t *testing.T) {
	t.Parallel()
	sandbox(t, "realserver", "0000000000003000",
		"ravel0", "192.0.2.80", "2001:db8:2::80", "203.0.113.10:8080", "[2001:db8:113::10]:8080", "RAVEL")
}

// sandbox compares what a role does to the kernel with and without the sandbox of its unit; holds are parts of it.
func sandbox(t *testing.T, role, capabilities string, holds ...string) {
	m := boot(t, files())
	name, configuration := "ravel-"+role+".service", "/etc/ravel/"+role+".yaml"
	before := m.shell(kernel)
	m.run("systemctl", "start", name)
	m.shows(name, func(u unit) bool { return strings.HasPrefix(u["StatusText"], "serves 2 VIPs") })
	inside := m.shell(kernel)
	for _, what := range holds {
		if !strings.Contains(inside, what) {
			t.Errorf("%s is not in\n%s", what, inside)
		}
	}
	m.inForce(name, capabilities)
	if journal := m.run("journalctl", "--no-pager", "-u", name, "-o", "cat"); strings.Contains(journal, "level=ERROR") ||
		strings.Contains(journal, "not permitted") || strings.Contains(journal, "denied") || strings.Contains(journal, "ead-only") {
		t.Errorf("the journal:\n%s", journal)
	}
	m.run("systemctl", "stop", name)
	m.run("ravel", "cleanup", "--config", configuration)
	if diff := differ(before, m.shell(kernel)); diff != "" {
		t.Errorf("ravel cleanup left:\n%s", diff)
	}
	m.shell("setsid ravel " + role + " --config " + configuration + " </dev/null >/run/bare 2>&1 &")
	m.until("without a sandbox the kernel gets the same", func() error {
		if diff := differ(inside, m.shell(kernel)); diff != "" {
			said, err := m.try("cat", "/run/bare")
			return errors.Join(fmt.Errorf("with it (-) and without (+):\n%s\n%s", diff, said), err)
		}
		return nil
	})
}

// differ lists the lines that only one of two texts has.
func differ(before, after string) string {
	a, b := strings.Split(before, "\n"), strings.Split(after, "\n")
	var diff strings.Builder
	for _, side := range []struct {
		sign       string
		has, lacks []string
	}{{"- ", a, b}, {"+ ", b, a}} {
		for _, line := range side.has {
			if !slices.Contains(side.lacks, line) {
				diff.WriteString(side.sign + line + "\n")
			}
		}
	}
	return diff.String()
}

// inForce looks whether the sandbox is.
func (m *machine) inForce(name, capabilities string) {
	m.t.Helper()
	pid := m.show(name)["MainPID"]
	status := m.run("cat", "/proc/"+pid+"/status")
	for _, want := range []string{"CapBnd:\t" + capabilities, "CapEff:\t" + capabilities, "NoNewPrivs:\t1", "Seccomp:\t2"} {
		if !strings.Contains(status, want) {
			m.t.Errorf("%q is not in the status of the process:\n%s", want, status)
		}
	}
	for path, want := range map[string]bool{"/etc": false, "/usr": false, "/run": false, "/var/lib": false, "/root": false,
		"/run/ravel": true, "/var/lib/ravel": true} {
		_, err := m.try("nsenter", "--target", pid, "--mount", "touch", path+"/probe")
		if (err == nil) != want {
			m.t.Errorf("%s can be written to: %v, want %v (%v)", path, err == nil, want, err)
		}
	}
}
