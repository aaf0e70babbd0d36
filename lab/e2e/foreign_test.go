package e2e

import (
	"fmt"
	"net/netip"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	labfleet "github.com/ravel-lb/ravel/lab/fleet"
	"github.com/ravel-lb/ravel/lab/stage"
)

var (
	sets   = regexp.MustCompile(`\bravel[46]-(vip|svc|hold|others)\b`) // also an entry that lets another's service pass
	theirs = regexp.MustCompile(`:9999\b`)
	// tunnels are the kernel's own devices, which a real server sets up.
	tunnels = regexp.MustCompile(`\b(tunl0|ip6tnl0)\b|^/proc/sys/`)
)

func isOurs(line string) bool {
	return sets.MatchString(line) || ours.MatchString(line) && !theirs.MatchString(line)
}

// foreign is what is neither ours nor meant to change while ravel runs.
func foreign(line string) bool { return !isOurs(line) && !tunnels.MatchString(line) }

// decorate is what others have on a host beside ravel. $1 is the rule set of another program, $2 and $3 are the host's
// own addresses.
const decorate = `
for command in iptables ip6tables; do
	for table in raw mangle nat filter; do $command -w -t $table -S >/dev/null; done
done
iptables-restore <realserver/testdata/$1.v4
ip6tables-restore <realserver/testdata/$1.v6
ipset create foreign hash:ip
ipset add foreign 203.0.113.9
ipset create ravel4-other hash:ip,port
ipset add ravel4-other 203.0.113.9,tcp:80
for command in iptables ip6tables; do
	$command -w -t nat -N RAVELLO
	$command -w -t nat -A RAVELLO -p tcp --dport 9 -j ACCEPT
	$command -w -t nat -I PREROUTING -p tcp --dport 9 -j RAVELLO
	$command -w -t mangle -A PREROUTING -p tcp --dport 9 -j MARK --set-mark 9
	$command -w -I FORWARD -p tcp --dport 9 -j DROP
done
iptables -w -I INPUT -m set --match-set foreign src -j DROP
ip link add dum0 type dummy
ip link set dum0 up
ip address add 192.0.2.77/32 dev dum0
ip address add 2001:db8:99::1/128 dev dum0
ip link add ravel1 type dummy
ip link set ravel1 alias ravels
ip link add tunl7 type ipip local $2 remote 10.9.9.9
ip link set tunl7 up
ip link add tnl7 type ip6tnl local $3 remote fd00:9::9
ip route add blackhole 203.0.113.0/24
ip route add blackhole 203.0.113.7/32 proto static
ip route add unreachable 203.0.113.128/25 table 100
ip -6 route add blackhole 2001:db8:66::/64
ip rule add from 203.0.113.5 table 100 priority 1000
ipvsadm -A -t 203.0.113.50:80 -s rr
ipvsadm -a -t 203.0.113.50:80 -r 10.9.9.2:8080 -m -w 3
ipvsadm -A -f 7 -s wlc -p 60
ipvsadm -a -f 7 -r 10.9.9.3 -g
ipvsadm -A -f 8 -6 -s rr
ipvsadm -A -t $2:8081 -s sh -b sh-port
ipvsadm -a -t $2:8081 -r 10.9.9.4 -i
ipvsadm -A -u [2001:db8:99::1]:53 -s rr -o
ipvsadm -A -t 198.51.100.20:9999 -s mh -b mh-fallback,mh-port
ipvsadm -a -t 198.51.100.20:9999 -r 10.9.9.5 -g -w 2
`

// undecorate takes all of that away.
const undecorate = `
for command in iptables ip6tables; do
	for table in raw mangle nat filter; do $command -w -t $table -F; $command -w -t $table -X; done
	$command -w -P FORWARD ACCEPT
done
ipset destroy
ipvsadm -C
ip rule del priority 1000
for link in dum0 ravel1 tunl7 tnl7; do ip link del $link; done
ip route del blackhole 203.0.113.0/24
ip route del blackhole 203.0.113.7/32
ip route del unreachable 203.0.113.128/25 table 100
ip -6 route del blackhole 2001:db8:66::/64
`

// write is another program that edits the tables all the time: rules at the heads of chains that come and go, and
// others that stay, each with a number of its own.
const write = `
n=0
while :; do
	n=$((n + 1))
	for command in iptables ip6tables; do
		for place in "nat PREROUTING" "filter INPUT" "filter FORWARD"; do
			set -- $place
			echo "*$1"
			echo "-I $2 -p tcp --dport 7 -m comment --comment churn -j RETURN"
			echo "-A $2 -p udp --dport $n -m comment --comment grown -j RETURN"
			echo COMMIT
		done | $command-restore -w --noflush
		for place in "nat PREROUTING" "filter INPUT" "filter FORWARD"; do
			set -- $place
			printf '*%s\n-D %s -p tcp --dport 7 -m comment --comment churn -j RETURN\nCOMMIT\n' $1 $2
		done | $command-restore -w --noflush
	done
	echo $n >/run/grown
	sleep 3
done`

// stranger is a node on which others have things too.
type stranger struct {
	node, rules string
	v4, v6      string            // own addresses
	writer      *labfleet.Process // another program that edits the tables; nil on some nodes
	bare        string            // the host's state with the others' things, and nothing of ours
}

// Promise P7: what is not ours survives our start, changes, stop, removal and cleanup, byte for byte, while somebody
// else edits the same tables; and after cleanup nothing of ours is left.
func TestForeignThingsSurvive(t *testing.T) {
	s := fleet(t)
	strangers := []*stranger{
		{node: "d1", rules: "kube-proxy", v4: "10.1.0.11", v6: "fd00:1::11"},
		{node: "r1", rules: "calico", v4: "10.1.0.21", v6: "fd00:1::21"},
		{node: "r4", rules: "kube-proxy", v4: "10.2.0.24", v6: "fd00:2::24"}, // reached by a tunnel
	}
	// With the third it takes a minute longer.
	strangers = strangers[:number(t, "RAVEL_TEST_STRANGERS", 2)]
	each := func(do func(x *stranger)) {
		t.Helper()
		for _, x := range strangers {
			do(x)
		}
	}
	stop := func(x *stranger) {
		t.Helper()
		if running(s, x.node) {
			must(t, s.Process(x.node).Stop(within(t, 20*time.Second)))
		}
	}
	start := func(args ...string) {
		t.Helper()
		each(func(x *stranger) { must(t, s.Start(x.node, args...)) })
		must(t, s.WaitHops(within(t, 30*time.Second), stage.Routers(), vips, 3))
		each(func(x *stranger) { awaitApplied(t, s, x.node) })
	}
	survived := func(when string) {
		t.Helper()
		each(func(x *stranger) {
			if want, got := filterLines(x.bare, foreign), hostState(t, s, x.node, foreign); got != want {
				t.Errorf("%s, %s: foreign things changed:\n%s", x.node, when, diff(want, got))
			}
		})
	}
	gone := func(when string) {
		t.Helper()
		each(func(x *stranger) {
			if got := hostState(t, s, x.node, everything); got != x.bare {
				t.Errorf("%s, %s: the host is not as it was:\n%s", x.node, when, diff(x.bare, got))
			}
		})
	}

	each(func(x *stranger) {
		stop(x)
		ravelSays(t, s, x.node, 0, "cleanup")
		on(t, s, x.node, "bash", "-euc", decorate, "-", x.rules, x.v4, x.v6)
		t.Cleanup(func() {
			stop(x)
			ravelSays(t, s, x.node, 0, "cleanup")
			if out, err := s.Output(within(t, time.Minute), x.node, "bash", "-uc", undecorate); err != nil {
				t.Errorf("%s: taking the foreign things away: %v\n%s", x.node, err, out)
			}
		})
		x.bare = hostState(t, s, x.node, everything)
		for line := range strings.Lines(x.bare) {
			if isOurs(line) {
				t.Errorf("%s: cleanup left: %s", x.node, line)
			}
		}
		if x.node == "r4" {
			return // two other writers are enough for one CPU
		}
		writer, err := s.Fleet.Node(x.node).Spawn("writer", "bash", "-euo", "pipefail", "-c", write)
		must(t, err)
		x.writer = writer
		t.Cleanup(func() { _ = writer.Kill() })
	})
	// Ravel had run on d1 before. Its sysctls are now those of a host on which it never did.
	fresh := hostState(t, s, "c2", isSetting)
	if got := filterLines(strangers[0].bare, isSetting); got != fresh {
		t.Errorf("d1: cleanup did not put the sysctls back:\n%s", diff(fresh, got))
	}

	start()
	survived("after the start")
	load := startSteady(t, s)
	podsAnswer := func(when string) {
		t.Helper()
		report := load.unbroken(t, when)
		for _, x := range strangers[1:] {
			for _, q := range report.Requests {
				if !slices.ContainsFunc(s.Pods, func(p stage.Pod) bool { return p.Node == x.node && q.Pods[p.String()] > 0 }) {
					t.Errorf("%s: no pod of %s, where FORWARD's policy is DROP, answered over %s: %v", when, x.node, q.Name, q.Pods)
				}
			}
		}
	}
	podsAnswer("beside the rules of others")

	second := []netip.Addr{netip.MustParseAddr("198.51.100.21"), netip.MustParseAddr("2001:db8:77::21")}
	for _, change := range []struct {
		name string
		edit func(d *stage.Document)
	}{
		{"two more VIPs", func(d *stage.Document) {
			for _, vip := range second {
				d.Services = append(d.Services, stage.Service{VIP: vip, Port: 81, Name: "web", TCP: true, UDP: true})
			}
		}},
		{"a tunnel for all, and masquerading", func(d *stage.Document) { d.Forwarding, d.Masquerade = "tunnel", true }},
		{"another scheduler", func(d *stage.Document) { d.Services[0].Scheduler = "wlc" }},
		{"the first document", func(d *stage.Document) { *d = shared.first.Clone() }},
	} {
		must(t, s.Change(change.edit))
		each(func(x *stranger) { awaitDocument(t, s, x.node) })
		podsAnswer(change.name)
		survived(change.name)
	}

	each(stop)
	survived("after a planned stop")
	start()
	podsAnswer("after another start")
	must(t, s.Process("d1").Kill())
	must(t, s.Process("r1").Kill())
	must(t, s.Start("d1"))
	must(t, s.Start("r1"))
	survived("after a crash")
	load.stop(t)

	must(t, s.Change(func(d *stage.Document) { d.Services = nil }))
	must(t, s.WaitHops(within(t, 20*time.Second), stage.Routers(), vips, 0))
	each(func(x *stranger) {
		eventually(t, 30*time.Second, func() error {
			out := on(t, s, x.node, "bash", "-c", "ip -o address show dev ravel0; ipvsadm -Sn; iptables-save -t nat; ip6tables-save -t nat")
			for line := range strings.Lines(out) {
				if ours.MatchString(line) && !theirs.MatchString(line) && (strings.Contains(line, "198.51.100") || strings.Contains(line, "db8:77")) {
					return fmt.Errorf("%s: a removed VIP is left: %s", x.node, line)
				}
			}
			return nil
		})
	})
	survived("after all VIPs were removed")
	must(t, s.SetDocument(shared.first))
	must(t, s.WaitHops(within(t, 30*time.Second), stage.Routers(), vips, 3))
	each(func(x *stranger) { awaitDocument(t, s, x.node) })

	// What cleanup says beforehand is what it does.
	each(func(x *stranger) {
		if out := ravelSays(t, s, x.node, 1, "cleanup"); !strings.Contains(out, "another ravel runs here") {
			t.Errorf("%s: ravel cleanup beside a ravel that runs:\n%s", x.node, out)
		}
		stop(x)
		before := hostState(t, s, x.node, everything)
		dry := ravelSays(t, s, x.node, 0, "cleanup", "--dry-run")
		if after := hostState(t, s, x.node, everything); after != before {
			t.Errorf("%s: ravel cleanup --dry-run changed the host:\n%s", x.node, diff(before, after))
		}
		if did := ravelSays(t, s, x.node, 0, "cleanup"); did != dry {
			t.Errorf("%s: ravel cleanup did\n%s\nand had said\n%s", x.node, did, dry)
		}
		if out := ravelSays(t, s, x.node, 0, "cleanup"); out != "nothing of Ravel's is here\n" {
			t.Errorf("%s: a second cleanup:\n%s", x.node, out)
		}
		// Each line names something that was there.
		for line := range strings.Lines(dry) {
			words := strings.Fields(line)
			name := strings.Trim(words[len(words)-1], "[]")
			if name == `""` { // ip link set NAME alias ""
				name = words[3]
			}
			if !strings.Contains(before, name) && !strings.Contains(line, "sysctl") {
				t.Errorf("%s: ravel cleanup --dry-run names what is not there: %s", x.node, line)
			}
		}
	})
	gone("after ravel cleanup")

	start("--cleanup-on-exit")
	survived("with --cleanup-on-exit")
	each(stop)
	gone("after a stop with --cleanup-on-exit")

	// Not one rule of the other writer was lost, and it was never refused.
	each(func(x *stranger) {
		if x.writer == nil {
			return
		}
		select {
		case <-x.writer.Done():
			t.Errorf("%s: the other writer failed; see %s", x.node, x.writer.Log)
		default:
		}
		must(t, x.writer.Kill())
		var n int
		if _, err := fmt.Sscan(on(t, s, x.node, "cat", "/run/grown"), &n); err != nil || n < 5 {
			t.Errorf("%s: the other writer made %d rounds, %v", x.node, n, err)
		}
		for _, save := range []string{"iptables-save", "ip6tables-save"} {
			saved := on(t, s, x.node, save)
			for _, chain := range []string{"PREROUTING", "INPUT", "FORWARD"} {
				for i := 1; i <= n; i++ {
					rule := fmt.Sprintf("-A %s -p udp -m udp --dport %d -m comment --comment grown -j RETURN\n", chain, i)
					if strings.Count(saved, rule) != 1 {
						t.Fatalf("%s: %s has rule %d of %d %d times: %s", x.node, save, i, n, strings.Count(saved, rule), rule)
					}
				}
			}
		}
	})
}

// isSetting keeps the sysctls that ravel sets on a director.
func isSetting(line string) bool {
	return strings.HasPrefix(line, "/proc/sys/net/ipv4/vs/") || strings.HasPrefix(line, "/proc/sys/net/ipv4/conf/all/")
}

func filterLines(text string, keep func(string) bool) string {
	var b strings.Builder
	for line := range strings.Lines(text) {
		if keep(line) {
			b.WriteString(line)
		}
	}
	return b.String()
}

// awaitDocument waits until a node has each service of the document in force, of those that lead somewhere, and no
// other of ours.
func awaitDocument(t *testing.T, s *stage.Stage, node string) {
	t.Helper()
	d := s.Document()
	eventually(t, 30*time.Second, func() error {
		script := "ipvsadm -Sn"
		if strings.HasPrefix(node, "r") {
			script = "iptables-save -t nat; ip6tables-save -t nat"
		}
		out := on(t, s, node, "bash", "-c", script)
		for _, vip := range []string{"198.51.100.20", "198.51.100.21", "2001:db8:77::20", "2001:db8:77::21"} {
			at := slices.IndexFunc(d.Services, func(x stage.Service) bool { return x.VIP.String() == vip })
			if has := strings.Contains(strings.ReplaceAll(out, "198.51.100.20:9999", ""), vip); has != (at >= 0) {
				return fmt.Errorf("%s: has %s: %t\n%s", node, vip, has, out)
			}
			if at >= 0 && d.Services[at].Scheduler != "" && strings.HasPrefix(node, "d") &&
				!strings.Contains(out, fmt.Sprintf("%s:%d -s %s", vip, d.Services[at].Port, d.Services[at].Scheduler)) {
				return fmt.Errorf("%s: %s has not the scheduler %s\n%s", node, vip, d.Services[at].Scheduler, out)
			}
		}
		return nil
	})
}
