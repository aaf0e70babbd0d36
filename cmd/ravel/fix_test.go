package main

import (
	"os"
	"os/exec"
	"strings"
	"syscall"
	"testing"

	"github.com/ravel-lb/ravel/internal/nettest"
)

// inHost runs fn as on a host of its own: another network, and nothing in /run.
func inHost(t *testing.T, fn func()) {
	t.Helper()
	nettest.InNetns(t, func() {
		if err := syscall.Unshare(syscall.CLONE_NEWNS); err != nil {
			t.Fatal(err)
		}
		nettest.Shell(t, "mount --make-rprivate / && mount -t tmpfs tmpfs /run && mount -t sysfs sys /sys && ip link set lo up")
		fn()
	})
}

// ravelHere runs ravel as a process where the thread of the caller is, and returns what it printed on both outputs.
func ravelHere(args ...string) (int, string) {
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = append(os.Environ(), programArgs+"="+strings.Join(args, " "))
	out, err := cmd.CombinedOutput()
	if cmd.ProcessState == nil {
		return -1, err.Error()
	}
	return cmd.ProcessState.ExitCode(), string(out)
}

// hostState is what ravel could change of a host and has to give back.
const hostState = `iptables-legacy-save -c 2>/dev/null | grep -v '^#' | sed 's/\[.*//'; ip6tables-legacy-save 2>/dev/null | grep -v '^#' | sed 's/\[.*//'
nft list ruleset 2>/dev/null; ipset save; cat /proc/net/ip_vs | tail -n +4
ip -d -o link | sed 's/^[0-9]*: //'; ip -o addr | sed 's/^[0-9]*: //'; ip route show table all; ip -6 route show table all
grep -r . /proc/sys/net 2>/dev/null | grep -vE '/(ravel0|neigh|unix)/|nf_conntrack_(count|max|buckets)|stable_secret|/random/'`

func TestFixMakesAHostReadyAndCleanupGivesItBack(t *testing.T) {
	nettest.Need(t, nettest.IPVS, nettest.Dummy, nettest.IPIP, nettest.LegacyNAT)
	for _, role := range []string{"director", "realserver"} {
		t.Run(role, func(t *testing.T) {
			inHost(t, func() {
				before := nettest.Shell(t, hostState)
				_, out := ravelHere("check", "--host", "--fix", "--role", role)
				for setting, want := range map[string]string{
					"director net/ipv4/vs/sloppy_tcp": "1", "director net/ipv4/vs/schedule_icmp": "1", "director net/ipv4/conf/all/arp_announce": "2",
					"realserver net/ipv4/conf/all/arp_ignore": "1", "realserver net/netfilter/nf_conntrack_tcp_be_liberal": "1",
					"realserver net/ipv4/conf/tunl0/rp_filter": "2",
				} {
					of, name, _ := strings.Cut(setting, " ")
					if of != role {
						continue
					}
					got, err := os.ReadFile("/proc/sys/" + name)
					if err != nil || strings.TrimSpace(string(got)) != want {
						t.Errorf("%s is %q, %v; want %s", name, got, err, want)
					}
					if line := "sysctl -w " + strings.ReplaceAll(name, "/", ".") + "=" + want + " (was "; !strings.Contains(out, line) {
						t.Errorf("%q is not said", line)
					}
				}
				if link := nettest.Shell(t, "ip -d link show ravel0"); !strings.Contains(link, "dummy") || !strings.Contains(link, "alias ravel") {
					t.Errorf("the link is not there:\n%s", link)
				}
				if t.Failed() {
					t.Log(out)
				}
				// Once more: there is nothing to do.
				if _, out := ravelHere("check", "--host", "--fix", "--role", role); !strings.Contains(out, "fix: nothing was to do") {
					t.Errorf("the second time something was done:\n%s", out)
				}
				if code, out := ravelHere("cleanup", "--state-dir="); code != exitOK {
					t.Errorf("cleanup: %d\n%s", code, out)
				}
				if after := nettest.Shell(t, hostState); after != before {
					t.Errorf("the host is not as it was:\nbefore\n%s\nafter\n%s", before, after)
				}
			})
		})
	}
}

func TestFixSaysWhatItNeeds(t *testing.T) {
	for _, test := range []struct {
		args []string
		want string
	}{
		{[]string{"check", "--fix"}, "--fix: is of the host: set --host, too"},
		{[]string{"check", "--host", "--fix"}, "--fix: set --role director or realserver"},
	} {
		if code, out := ravelHere(test.args...); code != exitUsage || !strings.Contains(out, test.want) {
			t.Errorf("%q: %d, %s; want %s", test.args, code, out, test.want)
		}
	}
}
