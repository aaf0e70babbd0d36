//go:build kube

package e2e

import (
	"errors"
	"fmt"
	"net/http"
	"net/netip"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/ravel-lb/ravel/lab/cluster"
	labfleet "github.com/ravel-lb/ravel/lab/fleet"
	"github.com/ravel-lb/ravel/lab/stage"
)

// kube-proxy runs on a director and on nodes, and knows the VIPs by externalIPs and by the Service's status: IPVS carries
// every flow all the same, and Ravel's redirects take it. So it is in modes iptables and ipvs, and, RAVEL_TEST_PROXIES times,
// also when kube-proxy is restarted and puts its rules first. The lab kernel has no NAT by nf_tables: for mode nftables, see internal/guard and
// realserver.
func TestKubeProxyTakesNothing(t *testing.T) {
	counting := []string{"--count-packets"}
	s, c, k := clusterFleetWith(t, counting, nil)
	explain(t, s)
	const service = "/api/v1/namespaces/" + stage.Namespace + "/services/web"
	ingress := []any{object{"ip": stage.VIP4}, object{"ip": stage.VIP6}}
	must(t, c.Call(t.Context(), http.MethodPatch, service, object{"spec": object{
		"type": "LoadBalancer", "allocateLoadBalancerNodePorts": false, "externalIPs": []any{stage.VIP4, stage.VIP6},
	}}, nil))
	must(t, c.Call(t.Context(), http.MethodPatch, service+"/status", object{"status": object{"loadBalancer": object{"ingress": ingress}}}, nil))
	t.Cleanup(func() {
		must(t, c.Call(within(t, 20*time.Second), http.MethodPatch, service+"/status", object{"status": object{"loadBalancer": nil}}, nil))
		must(t, c.Call(within(t, 20*time.Second), http.MethodPatch, service, object{"spec": object{
			"type": "ClusterIP", "allocateLoadBalancerNodePorts": nil, "externalIPs": nil,
		}}, nil))
	})
	// kube-proxy wants a Node to be on. A director's never is a real server.
	v4, v6 := netip.MustParseAddr("10.1.0.11"), netip.MustParseAddr("fd00:1::11")
	if err := c.AddNode(t.Context(), "d1", nil, v4, v6); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { must(t, c.Call(within(t, 20*time.Second), http.MethodDelete, "/api/v1/nodes/d1", nil, nil)) })
	config, err := c.NewKubeconfig("system:kube-proxy")
	must(t, err)

	for _, mode := range []string{"iptables", "ipvs"} {
		t.Run(mode, func(t *testing.T) {
			nodes := []string{"d1", "r1"}
			if mode == "ipvs" {
				// There it makes IPVS services of its own for VIPs that it knows: on a director two cannot have one.
				nodes = []string{"r1"}
			}
			load := startLoad(t, s)
			proxies := map[string]*labfleet.Process{}
			for _, node := range nodes {
				proxies[node] = startProxy(t, s, c, node, mode, config)
			}
			for _, node := range nodes {
				awaitProxy(t, s, node, mode)
			}
			load.unbroken(t, "kube-proxy has come")
			carried(t, s, k, load, mode, nodes)
			for range number(t, "RAVEL_TEST_PROXIES", 0) {
				// It is started anew, and puts its rules before all others.
				for _, node := range nodes {
					must(t, proxies[node].Kill())
					proxies[node] = startProxy(t, s, c, node, mode, config)
				}
				load.unbroken(t, "kube-proxy has come again")
				carried(t, s, k, load, mode, nodes)
				// Pods come and go, which both sides write.
				for _, n := range []int{replicas + 2, replicas} {
					must(t, c.Call(t.Context(), http.MethodPatch, deployments+"/web", object{"spec": object{"replicas": n}}, nil))
					k.settled(t, n)
					taking(t, s, k)
					load.unbroken(t, fmt.Sprintf("scaled to %d", n))
				}
				carried(t, s, k, load, mode, nodes)
			}
			load.stop(t)
		})
	}

	// On a director, an IPVS service that kube-proxy has is a Problem, and its VIP is announced by the others.
	t.Run("ipvs on a director", func(t *testing.T) {
		must(t, s.Process("d1").Stop(within(t, 20*time.Second)))
		ravelSays(t, s, "d1", 0, "cleanup")
		proxy := startProxy(t, s, c, "d1", "ipvs", config)
		awaitProxy(t, s, "d1", "ipvs")
		load := startLoad(t, s)
		must(t, s.Start("d1", counting...))
		eventually(t, 30*time.Second, func() error {
			out, err := s.Ravel(t.Context(), "d1", "check")
			if code, err := exitCode(err); err != nil || code != 1 || !strings.Contains(out, stage.VIP4.String()) || !strings.Contains(out, "IPVS") {
				return fmt.Errorf("d1: ravel check: exit code %d, %w:\n%s", code, err, out)
			}
			return nil
		})
		load.unbroken(t, "d1 has services of kube-proxy's")
		hops, err := s.NextHops(t.Context(), "tor1", stage.VIP4)
		must(t, err)
		if slices.Contains(hops, v4.String()) || len(hops) != 2 {
			t.Errorf("tor1 sends %s to %v: want the other two directors", stage.VIP4, hops)
		}
		must(t, proxy.Kill())
		on(t, s, "d1", "bash", "-c", withoutProxy)
		must(t, s.WaitHops(within(t, 2*time.Minute), stage.Routers(), vips, 3))
		load.unbroken(t, "kube-proxy is gone")
		load.stop(t)
	})
}

// startProxy runs the real kube-proxy on a node. It ends with the test, with all that it made.
func startProxy(t *testing.T, s *stage.Stage, c *cluster.Cluster, node, mode, kubeconfig string) *labfleet.Process {
	t.Helper()
	p, err := s.Fleet.Node(node).Spawn("kube-proxy", c.ProxyArgs(node, mode, kubeconfig)...)
	must(t, err)
	t.Cleanup(func() {
		must(t, p.Kill())
		on(t, s, node, "bash", "-c", withoutProxy)
	})
	return p
}

// withoutProxy takes away what kube-proxy made. Its own --cleanup gives up at the first chain of its other mode that is
// still used.
const withoutProxy = `
for command in iptables ip6tables; do
	for table in nat filter mangle; do
		{
			echo "*$table"
			$command-save -t $table | grep -E '^-A .*KUBE-' | sed 's/^-A/-D/'
			$command-save -t $table | sed -nE 's/^:(KUBE-[^ ]*) .*/-X \1/p'
			echo COMMIT
		} | $command-restore -w --noflush
	done
done
ip link del kube-ipvs0 2>/dev/null
ipvsadm -Sn | grep -E '^-A .* -s rr' | sed 's/^-A \(.*\) -s rr.*/ipvsadm -D \1/' | bash
ipset -n list | grep ^KUBE- | xargs -r -n 1 ipset destroy
true
`

// awaitProxy waits until kube-proxy has something for the VIPs of both families.
func awaitProxy(t *testing.T, s *stage.Stage, node, mode string) {
	t.Helper()
	show, word := "iptables-save -t nat; ip6tables-save -t nat", "KUBE-"
	if mode == "ipvs" {
		show, word = "ipvsadm -Sn", "-s rr"
	}
	eventually(t, 3*time.Minute, func() error {
		out, err := s.Output(t.Context(), node, "bash", "-c", show)
		for _, vip := range vips {
			has := false
			for line := range strings.Lines(out) {
				has = has || strings.Contains(line, vip.String()) && strings.Contains(line, word)
			}
			if !has {
				return fmt.Errorf("%s: kube-proxy does not know %s yet (%v): %s", node, vip, err, out)
			}
		}
		return nil
	})
}

var (
	ruleCount = regexp.MustCompile(`^\[(\d+):\d+\] -A (\S+) (.*)`)
	connCount = regexp.MustCompile(`(?m)^(?:TCP|UDP) +\S+:80 +(\d+) `)
)

// carried looks who took the next flows: of kube-proxy's rules for a VIP none counts a packet, on directors IPVS counts
// all of them, on the nodes Ravel's redirects do.
func carried(t *testing.T, s *stage.Stage, k *kubelets, load *steady, mode string, nodes []string) {
	t.Helper()
	// Rules of kube-proxy's may be first for up to a second.
	time.Sleep(2 * time.Second)
	for _, node := range nodes {
		on(t, s, node, "bash", "-c", "iptables -w -t nat -Z; ip6tables -w -t nat -Z")
	}
	before := 0
	for _, d := range s.Directors() {
		before += scheduled(t, s, d)
	}
	report := load.unbroken(t, mode)
	eventually(t, 30*time.Second, func() error {
		r, err := stage.Report(t.Context(), load.clients...)
		if err == nil && r.Requests[0].Answered < 100 {
			err = errors.New("few requests yet")
		}
		return err
	})
	report = load.unbroken(t, mode)
	asked := 0
	for _, q := range report.Requests {
		asked += q.Answered
	}
	time.Sleep(3 * time.Second) // the kernel adds its counters up every 2 s
	after := 0
	for _, d := range s.Directors() {
		after += scheduled(t, s, d)
	}
	if after-before < asked {
		t.Errorf("%s: IPVS scheduled %d flows, and %d requests were answered", mode, after-before, asked)
	}
	took := 0
	for _, node := range nodes {
		for _, save := range []string{"iptables-save", "ip6tables-save"} {
			for line := range strings.Lines(on(t, s, node, save, "-c", "-t", "nat")) {
				m := ruleCount.FindStringSubmatch(line)
				if m == nil || m[1] == "0" {
					continue
				}
				n, _ := strconv.Atoi(m[1])
				forVIP := slices.ContainsFunc(vips, func(vip netip.Addr) bool { return strings.Contains(m[3], "-d "+vip.String()+"/") })
				switch {
				case strings.HasPrefix(m[2], "KUBE-EXT-"), strings.HasPrefix(m[2], "KUBE-") && forVIP, strings.Contains(m[3], "KUBE-LOAD-BALANCER"),
					strings.Contains(m[3], "KUBE-EXTERNAL-IP"):
					t.Errorf("%s, mode %s: a rule of kube-proxy's took packets for a VIP: %s", node, mode, line)
				case strings.HasPrefix(m[2], "RAVEL") && strings.Contains(m[3], "-j DNAT"):
					took += n
				}
			}
		}
	}
	if took == 0 {
		t.Errorf("mode %s: no redirect on %v took a flow", mode, nodes)
	}
	t.Logf("mode %s: IPVS scheduled %d flows, %d requests were answered, redirects of %v took %d, kube-proxy 0", mode, after-before, asked, nodes, took)
}

// scheduled is how many flows the IPVS of a director has scheduled for the VIPs.
func scheduled(t *testing.T, s *stage.Stage, node string) (n int) {
	t.Helper()
	for _, m := range connCount.FindAllStringSubmatch(on(t, s, node, "ipvsadm", "-Ln", "--stats", "--exact"), -1) {
		count, err := strconv.Atoi(m[1])
		must(t, err)
		n += count
	}
	return n
}
