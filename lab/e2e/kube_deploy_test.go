//go:build kube

package e2e

import (
	"context"
	"encoding/json"
	"fmt"
	"maps"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	"sigs.k8s.io/yaml"

	"github.com/ravel-lb/ravel/lab/cluster"
	labfleet "github.com/ravel-lb/ravel/lab/fleet"
	"github.com/ravel-lb/ravel/lab/kubelet"
	"github.com/ravel-lb/ravel/lab/stage"
)

const (
	ravelNamespace = "ravel-system"
	directorLabel  = "ravel.dev/director"
	// The image as it is, and the same with a ravel that says that it is another.
	imageNow, imageNext = "ravel:now", "ravel:next"
)

// deployed is the fleet as deploy/ brings it up: pods of the chart, each container by runc in the image's files, with the
// rights that the chart gives it.
type deployed struct {
	t        *testing.T
	s        *stage.Stage
	c        *cluster.Cluster
	pods     *kubelets // of the services
	kubelets *kubelet.Kubelets
	values   object
	load     *steady
	flows    *longFlows
}

// deploy prepares the shared fleet for what deploy/ has: no ravel runs, and the nodes are as ravel cleanup leaves them.
func deploy(t *testing.T) *deployed {
	t.Helper()
	s, c, pods := clusterStage(t)
	for _, file := range []string{"build/image/rootfs/usr/bin/ravel", "build/image/next/usr/bin/ravel", "build/tools/helm"} {
		if _, err := os.Stat(file); err != nil {
			t.Fatalf("%v; run make kube", err)
		}
	}
	for _, node := range everyNode(s) {
		if running(s, node) {
			must(t, s.Process(node).Stop(within(t, 30*time.Second)))
		}
		ravelSays(t, s, node, 0, "cleanup", "--state-dir", "/run/ravel")
	}
	pods.settled(t, replicas)
	for _, d := range s.Directors() {
		number := strings.TrimPrefix(d, "d")
		must(t, c.AddNode(t.Context(), d, map[string]string{directorLabel: ""},
			netip.MustParseAddr("10.1.0.1"+number), netip.MustParseAddr("fd00:1::1"+number)))
		// Of a new node the API server says that it is not ready; there is no controller here that sees that it is.
		patchNode(t, c, d, object{"spec": object{"taints": nil}})
	}
	dir, err := os.MkdirTemp(clusterDir, "kubelet")
	must(t, err)
	root, err := filepath.Abs("build/image/rootfs")
	must(t, err)
	next, err := filepath.Abs("build/image/next")
	must(t, err)
	k := kubelet.Start(kubelet.Options{
		Cluster: c, Namespace: ravelNamespace, Dir: dir, APIServer: apiServer,
		Node: func(name string) *labfleet.Node {
			if slices.Contains(everyNode(s), name) {
				return s.Fleet.Node(name)
			}
			return nil
		},
		Roots:      map[string]string{imageNow: root, imageNext: next + ":" + root},
		Entrypoint: []string{"/usr/bin/ravel"},
		// All nodes of the lab share the machine's /var/lib.
		HostPath: func(path string) string {
			if rest, ok := strings.CutPrefix(path, "/var/lib/"); ok {
				return "/run/lab-var-lib/" + rest
			}
			return path
		},
	})
	t.Cleanup(func() {
		k.Stop()
		for _, d := range s.Directors() {
			if err := c.Call(context.Background(), http.MethodDelete, "/api/v1/nodes/"+d, nil, nil); err != nil {
				t.Error(err)
			}
		}
	})
	d := &deployed{t: t, s: s, c: c, pods: pods, kubelets: k}
	d.values = object{
		"image":     object{"repository": "ravel", "tag": "now"},
		"documents": d.documents(),
		"settings":  object{"log-level": "debug", "blast-radius": 100},
		// There are but four.
		"realserver": object{"maxUnavailable": 2},
	}
	t.Cleanup(func() {
		if t.Failed() {
			d.explain()
		}
	})
	return d
}

func everyNode(s *stage.Stage) []string { return append(s.Realservers(), s.Directors()...) }

// documents are the fleet's, with the nodes that have the label as its directors.
func (d *deployed) documents() object {
	clusterText, fleetText := shared.first.ConfigMap()
	var clusterDocument, fleetDocument object
	must(d.t, json.Unmarshal(clusterText, &clusterDocument))
	must(d.t, yaml.Unmarshal(fleetText, &fleetDocument))
	delete(fleetDocument, "directors")
	fleetDocument["directorNodes"] = object{directorLabel: ""}
	return object{"cluster": clusterDocument, "fleet": fleetDocument}
}

// helm runs helm beside the API server, and fails the test unless that goes well.
func (d *deployed) helm(args ...string) string {
	d.t.Helper()
	out, err := d.tryHelm(within(d.t, 5*time.Minute), args...)
	if err != nil {
		d.t.Fatalf("helm %s: %v\n%s", strings.Join(args, " "), err, out)
	}
	return out
}

func (d *deployed) tryHelm(ctx context.Context, args ...string) (string, error) {
	args = append([]string{"env", "HOME=/tmp", "HELM_DRIVER=secret", "build/tools/helm", "--kubeconfig", d.c.Kubeconfig(), "-n", ravelNamespace}, args...)
	out, err := d.s.Fleet.Node("k1").Command(ctx, args...).CombinedOutput()
	return string(out), err
}

// install installs, or upgrades to, the chart with the values as they are.
func (d *deployed) install(args ...string) string {
	d.t.Helper()
	text, err := yaml.Marshal(d.values)
	must(d.t, err)
	file := filepath.Join(clusterDir, "values.yaml")
	must(d.t, os.WriteFile(file, text, 0o600))
	return d.helm(append([]string{"upgrade", "--install", "ravel", "deploy/helm/ravel", "--create-namespace", "--values", file}, args...)...)
}

// rollout is the state of one workload.
type rollout struct {
	Metadata struct{ Generation int64 }
	Status   struct {
		ObservedGeneration                                                           int64
		DesiredNumberScheduled, UpdatedNumberScheduled, NumberReady, NumberAvailable int
	}
}

// rolled waits until every pod of both roles is of the newest kind, and available.
func (d *deployed) rolled() {
	d.t.Helper()
	want := map[string]int{"ravel-director": len(d.s.Directors()), "ravel-realserver": len(d.s.Realservers())}
	eventually(d.t, 10*time.Minute, func() error { // the emulated processor has the whole fleet and its control plane
		for name, nodes := range want {
			var r rollout
			if err := d.c.Call(d.t.Context(), http.MethodGet, "/apis/apps/v1/namespaces/"+ravelNamespace+"/daemonsets/"+name, nil, &r); err != nil {
				return err
			}
			s := r.Status
			if s.ObservedGeneration < r.Metadata.Generation || s.DesiredNumberScheduled != nodes || s.UpdatedNumberScheduled != nodes || s.NumberAvailable != nodes {
				return fmt.Errorf("%s of %d nodes: %+v", name, nodes, s)
			}
		}
		return d.kubelets.Err()
	})
}

// serves waits until the fleet serves as it is to.
func (d *deployed) serves() {
	d.t.Helper()
	must(d.t, d.s.WaitHops(within(d.t, 2*time.Minute), stage.Routers(), vips, len(d.s.Directors())))
	must(d.t, d.s.WaitHops(within(d.t, time.Minute), []string{"spine"}, vips, len(stage.Routers())))
	taking(d.t, d.s, d.pods)
}

// during does a change of the installation under load, while which no two directors may be away, and waits for its end:
// no request may fail, and no flow break.
func (d *deployed) during(what string, change func()) {
	d.t.Helper()
	began := time.Now()
	watch, stop := context.WithCancel(d.t.Context())
	fewest := len(d.s.Directors())
	var watching sync.WaitGroup
	watching.Go(func() {
		for watch.Err() == nil {
			if n, err := d.readyDirectors(watch); err == nil {
				fewest = min(fewest, n)
			}
			time.Sleep(200 * time.Millisecond)
		}
	})
	change()
	d.rolled()
	stop()
	watching.Wait()
	if fewest < len(d.s.Directors())-1 {
		d.t.Errorf("%s: only %d of %d directors were ready at a time", what, fewest, len(d.s.Directors()))
	}
	d.serves()
	r := d.load.unbroken(d.t, what)
	open, broken := d.flows.calm()
	if broken > 0 {
		d.t.Errorf("%s: %d of %d flows broke: %q", what, broken, d.flows.count, d.flows.why)
	}
	n, requests := 0, 0
	for _, on := range open {
		n += on
	}
	for _, q := range r.Requests {
		requests += q.Answered
	}
	d.t.Logf("%s: %d flows live on, %d requests answered, %d directors ready at least; %s", what, n, requests, fewest, time.Since(began).Round(time.Second))
}

func (d *deployed) readyDirectors(ctx context.Context) (n int, err error) {
	var list corev1.PodList
	path := "/api/v1/namespaces/" + ravelNamespace + "/pods?labelSelector=app.kubernetes.io/component%3Ddirector"
	if err := d.c.Call(ctx, http.MethodGet, path, nil, &list); err != nil {
		return 0, err
	}
	for _, p := range list.Items {
		if slices.ContainsFunc(p.Status.Conditions, func(c corev1.PodCondition) bool {
			return c.Type == corev1.PodReady && c.Status == corev1.ConditionTrue
		}) && p.DeletionTimestamp == nil {
			n++
		}
	}
	return n, nil
}

// versions are those of the ravels that run, by node.
func (d *deployed) versions() map[string]string {
	d.t.Helper()
	found := map[string]string{}
	for _, node := range everyNode(d.s) {
		out, err := d.s.Output(d.t.Context(), node, "curl", "-sS", "--unix-socket", "/run/ravel/admin.sock", "http://ravel/metrics")
		must(d.t, err)
		for line := range strings.Lines(out) {
			if rest, ok := strings.CutPrefix(line, "ravel_build_info{"); ok {
				_, rest, _ = strings.Cut(rest, `version="`)
				found[node], _, _ = strings.Cut(rest, `"`)
			}
		}
	}
	return found
}

func (d *deployed) explain() {
	ctx := context.Background()
	d.t.Logf("kubelets: %v", d.kubelets.Err())
	for _, name := range []string{"ravel-director", "ravel-realserver"} {
		var text object
		_ = d.c.Call(ctx, http.MethodGet, "/apis/apps/v1/namespaces/"+ravelNamespace+"/daemonsets/"+name, nil, &text)
		d.t.Logf("%s: %v", name, text["status"])
	}
	var events corev1.EventList
	_ = d.c.Call(ctx, http.MethodGet, "/api/v1/namespaces/"+ravelNamespace+"/events", nil, &events)
	for _, e := range events.Items {
		d.t.Logf("event: %s %s: %s", e.InvolvedObject.Name, e.Reason, e.Message)
	}
	for _, node := range everyNode(d.s) {
		out, _ := d.s.Ravel(ctx, node, "check")
		d.t.Logf("%s: ravel check: %s", node, strings.TrimSpace(out))
	}
	var list corev1.PodList
	_ = d.c.Call(ctx, http.MethodGet, "/api/v1/namespaces/"+ravelNamespace+"/pods", nil, &list)
	for _, p := range list.Items {
		text, _ := json.Marshal(p.Status)
		d.t.Logf("pod %s on %s: %s", p.Name, p.Spec.NodeName, text)
	}
}

// host is what ravel could change of a host, and has to give back.
const host = `iptables-legacy-save | grep -v '^#' | sed 's/\[.*//'; ip6tables-legacy-save | grep -v '^#' | sed 's/\[.*//'; ipset save
tail -n +4 /proc/net/ip_vs; ip -d -o link | sed 's/^[0-9]*: //' | sort; ip -o addr | sed 's/^[0-9]*: //' | sort
ip route show table all | sort; ip -6 route show table all | grep -v 'expires\|cache' | sort
grep -r . /proc/sys/net 2>/dev/null | grep -vE '/(neigh|unix)/|nf_conntrack_(count|max|buckets)|stable_secret' | sort`

// A fleet is installed by Helm, used, upgraded, rolled back, told other settings and another key, and uninstalled: no
// request fails and no flow breaks, and in the end the hosts are as they were.
func TestInstallUpgradeUninstall(t *testing.T) {
	d := deploy(t)
	before := map[string]string{}
	for _, node := range everyNode(d.s) {
		// Tables that were looked at, and links that were up once, look otherwise to the kernel, though nothing is in them.
		shell(t, d.s, node, `for f in iptables ip6tables; do for t in raw mangle nat filter; do $f-legacy -t $t -S; done; done
			for l in tunl0 ip6tnl0; do ip link set $l up; ip link set $l down; done`)
		before[node] = shell(t, d.s, node, host)
	}

	began := time.Now()
	d.install()
	d.rolled()
	d.serves()
	t.Logf("installed, and serves, after %s", time.Since(began).Round(time.Second))
	d.asWritten()
	d.load, d.flows = startLoad(t, d.s), &longFlows{t: t, s: d.s, every: 4 * time.Second}
	d.flows.open(600)
	if _, broken := d.flows.calm(); broken > 0 {
		t.Fatalf("%d flows broke before anything happened: %q", broken, d.flows.why)
	}
	now := d.versions()

	d.during("an upgrade", func() {
		d.values["image"] = object{"repository": "ravel", "tag": "next"}
		d.install()
	})
	for node, version := range d.versions() {
		if version != "next" {
			t.Errorf("after the upgrade %s runs %s", node, version)
		}
	}
	d.during("a rollback", func() { d.helm("rollback", "ravel", "1") })
	if got := d.versions(); !maps.Equal(got, now) {
		t.Errorf("after the rollback %v run, want %v", got, now)
	}
	d.values["image"] = object{"repository": "ravel", "tag": "now"}
	d.rotateKey()
	for _, round := range settingsRounds()[:number(t, "RAVEL_TEST_SETTINGS", 0)] {
		d.during(round.name, func() {
			maps.Copy(d.values["settings"].(object), round.both)
			d.values["director"] = object{"settings": round.director}
			d.values["realserver"] = object{"settings": round.realserver, "maxUnavailable": 2}
			d.install()
		})
	}

	d.load.stop(t)
	d.flows.stop()
	d.helm("uninstall", "ravel")
	var left struct {
		Items []struct{ Metadata struct{ Name string } }
	}
	for _, kind := range []string{"/api/v1/namespaces/" + ravelNamespace + "/pods", "/apis/apps/v1/namespaces/" + ravelNamespace + "/daemonsets"} {
		eventually(t, time.Minute, func() error {
			must(t, d.c.Call(t.Context(), http.MethodGet, kind, nil, &left))
			if len(left.Items) > 0 {
				return fmt.Errorf("%s: left are %v", kind, left.Items)
			}
			return nil
		})
	}
	for _, node := range everyNode(d.s) {
		eventually(t, 90*time.Second, func() error { // blackhole routes, neighbours
			if after := shell(t, d.s, node, host); after != before[node] {
				return fmt.Errorf("%s is not as it was:\n%s", node, diff(before[node], after))
			}
			return nil
		})
	}
}

// asWritten looks at the containers that run: they have what the chart says, and no more.
func (d *deployed) asWritten() {
	d.t.Helper()
	for _, node := range everyNode(d.s) {
		role := "realserver"
		if strings.HasPrefix(node, "d") {
			role = "director"
		}
		id, ok := d.kubelets.Container(node, "ravel-"+role, role)
		if !ok {
			d.t.Fatalf("%s: no container runs", node)
		}
		var state struct{ Pid int }
		must(d.t, json.Unmarshal([]byte(on(d.t, d.s, node, "runc", "--root", "/run/runc", "state", id)), &state))
		proc := "/proc/" + strconv.Itoa(state.Pid)
		status := on(d.t, d.s, node, "cat", proc+"/status")
		for _, want := range []string{"CapEff:\t0000000000003000", "CapBnd:\t0000000000003000", "NoNewPrivs:\t1", "Seccomp:\t2"} {
			if !strings.Contains(status, want) {
				d.t.Errorf("%s: a process without %q:\n%s", node, want, status)
			}
		}
		for line := range strings.Lines(status) {
			if rss, ok := strings.CutPrefix(line, "VmRSS:"); ok {
				d.t.Logf("%s: %s resident", node, strings.TrimSpace(rss))
			}
		}
		readonly := map[string]bool{}
		for line := range strings.Lines(on(d.t, d.s, node, "cat", proc+"/mountinfo")) {
			words := strings.Fields(line)
			readonly[words[4]] = slices.Contains(strings.Split(words[5], ","), "ro")
		}
		for _, path := range []string{"/", "/proc/sys"} {
			if !readonly[path] {
				d.t.Errorf("%s: %s can be written", node, path)
			}
		}
		// As kubectl exec would: with the container's rights, and with what it sees.
		out, err := d.s.Fleet.Node(node).Command(d.t.Context(), "runc", "--root", "/run/runc", "exec", id, "/usr/bin/ravel", "check", "--host").CombinedOutput()
		if err != nil || !strings.Contains(string(out), "ok    proc-sys: mounted read-only") {
			d.t.Errorf("%s: ravel check --host: %v\n%s", node, err, out)
		}
	}
}

// rotateKey gives the fleet another key by two edits of the Secret, and restarts nothing.
func (d *deployed) rotateKey() {
	d.t.Helper()
	const path = "/api/v1/namespaces/" + ravelNamespace + "/secrets/ravel-gossip"
	var secret corev1.Secret
	must(d.t, d.c.Call(d.t.Context(), http.MethodGet, path, nil, &secret))
	old := strings.TrimSpace(string(secret.Data["gossip.key"]))
	fresh := strings.TrimSpace(on(d.t, d.s, "k1", "build/ravel", "gossip-key"))
	edit := func(keys ...string) {
		must(d.t, d.c.Call(d.t.Context(), http.MethodPatch, path, object{"stringData": object{"gossip.key": strings.Join(keys, "\n") + "\n"}}, nil))
		eventually(d.t, time.Minute, func() error { // as everybody sees everybody
			for _, node := range everyNode(d.s) {
				var a struct {
					Members []struct {
						Name string
						Keys []string
					}
				}
				if err := d.s.Ask(d.t.Context(), node, "members", &a); err != nil {
					return err
				}
				for _, m := range a.Members {
					if len(m.Keys) != len(keys) {
						return fmt.Errorf("%s: %s has %d keys, want %d", node, m.Name, len(m.Keys), len(keys))
					}
				}
			}
			return nil
		})
	}
	d.during("a new key", func() {
		edit(fresh, old)
		edit(fresh)
	})
	for _, node := range d.s.Directors() {
		if out, err := d.s.Ravel(d.t.Context(), node, "members"); err != nil {
			d.t.Errorf("%s: ravel members: %v\n%s", node, err, out)
		}
	}
}

// settingsRound is a change of settings.
type settingsRound struct {
	name                       string
	both, director, realserver object
}

// settingsRounds change the settings that a process reads at its start: its own first, then those that a fleet shares,
// which differ between its members while the change goes from one to the next. Not ipvs-weight-override: it moves slots of
// the Maglev tables, and flows of moved slots do not live through the restart of their director that comes after.
func settingsRounds() []settingsRound {
	return []settingsRound{{
		name: "settings of a process",
		both: object{
			"log-level": "info", "log-format": "json", "blackhole": "30s", "resync": "20s", "blast-radius": 100, "original-metrics": true,
			"max-cache-age": "12h", "kube-wait": "3s", "settle": "4s", "iptables": "legacy", "guard": true,
		},
		director: object{
			"router-id": "", "bgp-port": 179, "stop-wait": "2s", "linger": "3s", "drain": "50s", "rise": "8s", "batch": "900ms",
			"probe": "http", "probe-path": "/healthz", "floor": 40, "withdraw-share": 2, "fleet-size": 7, "count-packets": true,
		},
		realserver: object{"redirect": "kube-service", "redirect-linger": "6s", "mtu": 1400, "pod-cidr-masq": []any{"10.4.0.0/16"}},
	}, {
		name: "settings of the fleet",
		both: object{
			"blast-radius": 90, "gossip-timing": "fast", "gossip-listen": "[::]:7956", "link": "vips0", "iptables-chain": "RAVELLB",
			"auto-configure-service": "shop/web:http", "auto-configure-port": 8000,
		},
		director:   object{"probe-port": 7957, "ipvs-ignore-node-cordon": true},
		realserver: object{"health-listen": "[::]:7957", "mark": 0x40000, "tunnel-mark": 0x80000, "masquerade-mark": 0x100000},
	}, {
		name: "another name of the fleet", both: object{"fleet": "other"}, director: object{}, realserver: object{},
	}}
}
