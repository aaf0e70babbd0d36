//go:build kube

package deploy

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"sigs.k8s.io/yaml"

	"github.com/ravel-lb/ravel/internal/nettest"
	"github.com/ravel-lb/ravel/lab/cluster"
)

const (
	chart     = "helm/ravel"
	namespace = "ravel-system"
)

func TestMain(m *testing.M) {
	// Before the tests are in a network of their own, from where there is no way to a module proxy.
	tools := exec.Command("../lab/tools/build")
	tools.Stderr = os.Stderr
	err := tools.Run()
	if err == nil {
		_, err = cluster.Build(context.Background(), "..")
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	nettest.Main(m)
}

type object = map[string]any

// variants are ways to set the chart.
var variants = map[string]string{
	"default": "",
	"deployment": `
director: {kind: Deployment, replicas: 3, settings: {stop-wait: 2500ms}}`,
	"existing": `
documents: {existingConfigMap: lb, clusterKey: cluster, fleetKey: fleet}
gossip: {existingSecret: key}
cleanup: {enabled: false}`,
	"ipv6": `
metrics: {listen: "[::]:9100"}
settings: {gossip-listen: "[::]:7950"}
documents:
  cluster: {config: {}, config6: {"2001:db8:2::80": {80: {namespace: shop, service: web, portName: http, tcpEnabled: true}}}}
  fleet: {asn: 4200000001, directors: [{name: d1, addresses: ["2001:db8:51::11"], routerID: 192.0.2.11}], peers: [{address: "2001:db8:51::1", asn: 65000}]}`,
	"everything": `
nameOverride: lb
image: {repository: registry.example.net:5000/net/ravel, tag: v1, digest: "sha256:` + digest + `", pullPolicy: Always, pullSecrets: [pull]}
seLinuxOptions: {type: spc_t}
documents:
  cluster: {config: {192.0.2.80: {80: {namespace: shop, service: web, portName: http, tcpEnabled: true}}}, config6: {}}
  fleet: {asn: 65100, directors: [{name: d1, addresses: [198.51.100.11]}], peers: [{address: 198.51.100.1, asn: 65000, passwordFile: /etc/ravel/peers/tor1}]}
  clusterKey: c.json
  fleetKey: f.yaml
metrics: {listen: ":10300"}
settings: {link: lb0, iptables: nft, log-format: json, blackhole: 2m, seeds: [d1, "d2:7950"]}
director:
  nodeLabel: example.net/lb
  nodeSelector: {kubernetes.io/arch: amd64}
  tolerations: [{key: a, operator: Equal, value: b, effect: NoSchedule}]
  settings: {blackhole: 3m, bgp-port: 179, bgp-listen: [198.51.100.11, "2001:db8:51::11"], attract: none, count-packets: true, stop-wait: 0s}
  resources: {requests: {cpu: 1, memory: 1Gi}, limits: {memory: 2Gi}}
  priorityClassName: ""
  podLabels: {team: net}
  podAnnotations: {example.net/a: b}
  extraVolumes: [{name: peers, secret: {secretName: peers, defaultMode: 256}}]
  extraVolumeMounts: [{name: peers, mountPath: /etc/ravel/peers, readOnly: true}]
realserver:
  nodeSelector: {kubernetes.io/arch: amd64}
  tolerations: []
  settings: {redirect: kube-service, mark: 2097152}
  maxUnavailable: 3
  podLabels: {team: net}
  podAnnotations: {example.net/a: b}
  extraVolumes: [{name: cilium, hostPath: {path: /var/run/cilium}}]
  extraVolumeMounts: [{name: cilium, mountPath: /var/run/cilium, readOnly: true}]
probes: {liveness: {periodSeconds: 20, timeoutSeconds: 10, failureThreshold: 3}}
jobs: {nodeSelector: {kubernetes.io/arch: amd64}, tolerations: [], resources: {limits: {memory: 64Mi}}}
cleanup: {wait: 90s}`,
}

const digest = "0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef"

// tool runs helm or kustomize.
func tool(stdin, name string, args ...string) (stdout, stderr string, err error) {
	cmd := exec.Command(filepath.Join("../build/tools", name), args...)
	var out, errs bytes.Buffer
	cmd.Stdin, cmd.Stdout, cmd.Stderr = strings.NewReader(stdin), &out, &errs
	err = cmd.Run()
	return out.String(), errs.String(), err
}

// render is helm template with values.
func render(values string, args ...string) (text, stderr string, err error) {
	return tool(values, "helm", append([]string{"template", "ravel", chart, "--namespace", namespace, "--values", "-"}, args...)...)
}

func rendered(t *testing.T, values string, args ...string) []object {
	t.Helper()
	text, stderr, err := render(values, args...)
	if err != nil {
		t.Fatalf("helm template: %v: %s", err, stderr)
	}
	return parse(t, text)
}

func parse(t *testing.T, text string) []object {
	t.Helper()
	var all []object
	for _, part := range strings.Split("\n"+text, "\n---\n") {
		var o object
		if err := yaml.UnmarshalStrict([]byte(part), &o); err != nil {
			t.Fatalf("%v:\n%s", err, part)
		}
		if o != nil {
			all = append(all, o)
		}
	}
	return all
}

// at is what stands in an object at a path of names.
func at(o any, path ...string) any {
	for _, name := range path {
		m, _ := o.(object)
		o = m[name]
	}
	return o
}

func text(o any, path ...string) string {
	s, _ := at(o, path...).(string)
	return s
}

func nameOf(o object) string { return text(o, "kind") + " " + text(o, "metadata", "name") }

// component finds the workload of a role.
func component(t *testing.T, all []object, role string) object {
	t.Helper()
	for _, o := range all {
		if at(o, "spec", "template") != nil && text(o, "metadata", "labels", "app.kubernetes.io/component") == role {
			return o
		}
	}
	t.Fatalf("there is no %s", role)
	return nil
}

func podOf(o object) object { return at(o, "spec", "template", "spec").(object) }

// containers are those of a pod, init containers first.
func containers(pod object) (all []object) {
	for _, list := range []string{"initContainers", "containers"} {
		some, _ := pod[list].([]any)
		for _, c := range some {
			all = append(all, c.(object))
		}
	}
	return all
}

func argsOf(container object) (args []string) {
	for _, a := range container["args"].([]any) {
		args = append(args, a.(string))
	}
	return args
}

func each(t *testing.T, test func(t *testing.T, all []object)) {
	for name, values := range variants {
		t.Run(name, func(t *testing.T) { test(t, rendered(t, values)) })
	}
}

func TestLint(t *testing.T) {
	for name, values := range variants {
		if out, stderr, err := tool(values, "helm", "lint", "--strict", chart, "--namespace", namespace, "--values", "-"); err != nil {
			t.Errorf("%s: %v: %s%s", name, err, out, stderr)
		}
	}
}

// What is misspelt, of the wrong kind, or contradicts itself is refused by its name.
func TestRefused(t *testing.T) {
	for values, want := range map[string]string{
		"direktor: {}":                                                      "'direktor' not allowed",
		"image: {tga: v1}":                                                  "at '/image': additional properties 'tga'",
		"image: {digest: sha256:1}":                                         "/image/digest",
		"image: {repository: ''}":                                           "/image/repository",
		"documents: {cluster: '{}'}":                                        "at '/documents/cluster': got string, want object",
		"gossip: {key: c2VjcmV0}":                                           "at '/gossip': additional properties 'key'",
		"metrics: {listen: 198.51.100.7:10234}":                             "/metrics/listen",
		"settings: {stop-wait: 1s}":                                         "at '/settings': additional properties 'stop-wait'",
		"settings: {log-levle: info}":                                       "'log-levle'",
		"settings: {gossip-insecure: true}":                                 "'gossip-insecure'",
		"settings: {cleanup-on-exit: true}":                                 "'cleanup-on-exit'",
		"namespace: {create: true}":                                         "Helm itself needs the namespace before the release",
		"director: {settings: {drain: 60}}":                                 "at '/director/settings/drain': got number, want string",
		"director: {settings: {drain: 1 min}}":                              "/director/settings/drain",
		"director: {settings: {bgp-port: '179'}}":                           "at '/director/settings/bgp-port': got string, want integer",
		"director: {settings: {link: lb0}}":                                 "'link'",
		"director: {settings: {stop-wait: 8001ms}}":                         "director.settings.stop-wait: 8001ms: want 8s at most",
		"director: {kind: StatefulSet}":                                     "/director/kind",
		"director: {replicas: 0}":                                           "/director/replicas",
		"director: {resources: {limit: {cpu: 1}}}":                          "at '/director/resources': additional properties 'limit'",
		"director: {tolerations: [{keys: a}]}":                              "'keys'",
		"realserver: {settings: {bgp-port: 179}}":                           "at '/realserver/settings': additional properties 'bgp-port'",
		"realserver: {replicas: 1}":                                         "at '/realserver': additional properties 'replicas'",
		"realserver: {maxUnavailable: 0%}":                                  "/realserver/maxUnavailable",
		"probes: {liveness: {periodSecond: 3}}":                             "'periodSecond'",
		"cleanup: {wait: 60}":                                               "at '/cleanup/wait': got number, want string",
		"documents: {cluster: {config: {}}}":                                "documents.fleet: not set",
		"documents: {fleet: {asn: 1}}":                                      "documents.cluster: not set",
		"documents: {fleetKey: cluster.json}":                               "documents.fleetKey",
		"documents: {cluster: {a: 1}, fleet: {a: 1}, existingConfigMap: b}": "existingConfigMap is set beside",
	} {
		if out, stderr, err := render(values); err == nil || !strings.Contains(stderr, want) {
			t.Errorf("%s: %v, want %q in what is said:\n%s%s", values, err, want, stderr, out)
		}
	}
}

// Every value stands in values.yaml, and every one there is in the schema.
func TestValuesAndSchemaAgree(t *testing.T) {
	var schema, values object
	b, err := os.ReadFile(schemaFile)
	if err == nil {
		err = json.Unmarshal(b, &schema)
	}
	if err != nil {
		t.Fatal(err)
	}
	if b, err = os.ReadFile(filepath.Join(chart, "values.yaml")); err == nil {
		err = yaml.UnmarshalStrict(b, &values)
	}
	if err != nil {
		t.Fatal(err)
	}
	var walk func(path string, schema, values object)
	walk = func(path string, schema, values object) {
		if ref := text(schema, "$ref"); ref != "" {
			return // labels, settings and the like
		}
		properties, _ := schema["properties"].(object)
		for name, is := range properties {
			value, there := values[name]
			if !there && name != "global" {
				t.Errorf("%s%s is in the schema alone", path, name)
			}
			if inner, is2 := value.(object); is2 {
				walk(path+name+".", is.(object), inner)
			}
		}
		if properties != nil && schema["additionalProperties"] != false {
			t.Errorf("%s takes what it does not know", path)
		}
	}
	walk("", schema, values)
}

func TestGracePeriod(t *testing.T) {
	for wait, want := range map[string]float64{
		"": 16, "1s": 16, "0": 15, "0s": 15, "1500ms": 17, "1.2s": 17, "8s": 23, "1s1ms": 17, "0.1m": 21, "300us": 16, "8000ms": 23,
	} {
		values := ""
		if wait != "" {
			values = "director: {settings: {stop-wait: '" + wait + "'}}"
		}
		all := rendered(t, values)
		if got := podOf(component(t, all, "director"))["terminationGracePeriodSeconds"]; got != want {
			t.Errorf("%q: %v s, want %v", wait, got, want)
		}
	}
}

// Both roles may do what they are listed with here, and nothing more.
func TestSecurity(t *testing.T) {
	each(t, func(t *testing.T, all []object) {
		for _, role := range []string{"director", "realserver"} {
			pod := podOf(component(t, all, role))
			security := object{"runAsUser": 0.0, "seccompProfile": object{"type": "RuntimeDefault"}}
			if given, ok := pod["securityContext"].(object)["seLinuxOptions"]; ok {
				security["seLinuxOptions"] = given
			}
			for path, want := range map[string]any{
				"securityContext": security,
				"hostNetwork":     true, "dnsPolicy": "ClusterFirstWithHostNet", "enableServiceLinks": false, "automountServiceAccountToken": true,
				"hostPID": nil, "hostIPC": nil, "shareProcessNamespace": nil, "hostUsers": nil,
			} {
				if diff := cmp.Diff(want, pod[path]); diff != "" {
					t.Errorf("%s: %s (-want +got):\n%s", role, path, diff)
				}
			}
			contexts, rights := map[string]any{}, []any{"NET_ADMIN", "NET_RAW"}
			if strings.Contains(strings.Join(argsOf(containers(pod)[1]), " "), "--bgp-port=179") {
				rights = append(rights, "NET_BIND_SERVICE")
			}
			for _, c := range containers(pod) {
				contexts[text(c, "name")] = c["securityContext"]
				if c["lifecycle"] != nil {
					t.Errorf("%s: %s has a lifecycle", role, c["name"])
				}
			}
			if diff := cmp.Diff(map[string]any{
				"host": object{"privileged": true, "readOnlyRootFilesystem": true},
				role: object{
					"readOnlyRootFilesystem": true, "allowPrivilegeEscalation": false,
					"capabilities": object{"drop": []any{"ALL"}, "add": rights},
				},
			}, contexts); diff != "" {
				t.Errorf("%s (-want +got):\n%s", role, diff)
			}
			want := map[string]string{
				"/run/ravel": "rw", "/var/lib/ravel": "rw", "/run/xtables.lock": "rw", "/etc/ravel/gossip": "ro",
			}
			if role == "director" { // the one setting that changes while it works
				want["/host/proc/sys/net/ipv4/vs/expire_nodest_conn"] = "rw"
			}
			if diff := cmp.Diff(want, mounts(containers(pod)[1], "/etc/ravel/peers", "/var/run/cilium")); diff != "" {
				t.Errorf("%s mounts (-want +got):\n%s", role, diff)
			}
		}
		for _, o := range all {
			if o["kind"] == "Secret" {
				t.Errorf("the release has a Secret: %v", o)
			}
			if o["kind"] != "Job" {
				continue
			}
			for _, c := range containers(podOf(o)) {
				if c := c["securityContext"].(object); c["runAsNonRoot"] != true || c["privileged"] != nil || c["readOnlyRootFilesystem"] != true {
					t.Errorf("%s: %v", nameOf(o), c)
				}
			}
		}
	})
}

// mounts are a container's, without those that values gave.
func mounts(container object, but ...string) map[string]string {
	found := map[string]string{}
	for _, m := range container["volumeMounts"].([]any) {
		m := m.(object)
		if m["subPath"] != nil {
			found[text(m, "mountPath")] = "a part"
			continue
		}
		if path := text(m, "mountPath"); !slices.Contains(but, path) {
			found[path] = map[bool]string{true: "ro", false: "rw"}[m["readOnly"] == true]
		}
	}
	return found
}

// A director and a realserver cannot share a host: what one asks of a node's labels, the other excludes.
func TestNoNodeIsForBothRoles(t *testing.T) {
	each(t, func(t *testing.T, all []object) {
		asks := func(role string) (key, operator string) {
			node := at(podOf(component(t, all, role)), "affinity", "nodeAffinity", "requiredDuringSchedulingIgnoredDuringExecution", "nodeSelectorTerms")
			terms := node.([]any)
			if len(terms) != 1 { // any one of them would do
				t.Fatalf("%s: %v", role, terms)
			}
			e := terms[0].(object)["matchExpressions"].([]any)
			return text(e[0], "key"), text(e[0], "operator")
		}
		key, director := asks("director")
		other, realserver := asks("realserver")
		if key != other || key == "" || director != "Exists" || realserver != "DoesNotExist" {
			t.Errorf("directors: %s %s; realservers: %s %s", key, director, other, realserver)
		}
	})
}

// An update never has two directors down, and no budget stands where it would refuse each eviction.
func TestUpdates(t *testing.T) {
	each(t, func(t *testing.T, all []object) {
		d := component(t, all, "director")
		strategy := "updateStrategy"
		deployment := d["kind"] == "Deployment"
		if deployment {
			strategy = "strategy"
		}
		want := object{"type": "RollingUpdate", "rollingUpdate": object{"maxUnavailable": 1.0, "maxSurge": 0.0}}
		if diff := cmp.Diff(want, at(d, "spec", strategy)); diff != "" || at(d, "spec", "minReadySeconds") != 10.0 {
			t.Errorf("%v\n%s", at(d, "spec", "minReadySeconds"), diff)
		}
		budget := slices.ContainsFunc(all, func(o object) bool {
			return o["kind"] == "PodDisruptionBudget" && at(o, "spec", "maxUnavailable") == 1.0
		})
		if budget != deployment {
			t.Errorf("a budget: %v", budget)
		}
		apart := at(podOf(d), "affinity", "podAntiAffinity", "requiredDuringSchedulingIgnoredDuringExecution") != nil
		if apart != deployment {
			t.Errorf("directors of a %s are kept apart: %v", d["kind"], apart)
		}
	})
}

// The documents are in the ConfigMap as they were given, and a change of them restarts nothing; a changed setting does.
func TestDocumentsAndSettings(t *testing.T) {
	all := rendered(t, variants["ipv6"])
	is := slices.IndexFunc(all, func(o object) bool { return o["kind"] == "ConfigMap" })
	if is < 0 {
		t.Fatal("there is no ConfigMap")
	}
	var cluster, fleet any
	if err := json.Unmarshal([]byte(text(all[is], "data", "cluster.json")), &cluster); err != nil {
		t.Fatal(err)
	}
	if err := yaml.UnmarshalStrict([]byte(text(all[is], "data", "fleet.yaml")), &fleet); err != nil {
		t.Fatal(err)
	}
	var given object
	if err := yaml.Unmarshal([]byte(variants["ipv6"]), &given); err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(given["documents"], any(object{"cluster": cluster, "fleet": fleet})); diff != "" {
		t.Errorf("the documents (-given +rendered):\n%s", diff)
	}
	if !strings.Contains(text(all[is], "data", "fleet.yaml"), "asn: 4200000001\n") {
		t.Error("a large number is not as it was: " + text(all[is], "data", "fleet.yaml"))
	}
	changed := strings.ReplaceAll(variants["ipv6"], "4200000001", "65100")
	restarts := func(role string, values ...string) bool {
		a, b := rendered(t, values[0]), rendered(t, values[1])
		return !cmp.Equal(at(component(t, a, role), "spec", "template"), at(component(t, b, role), "spec", "template"))
	}
	for _, c := range []struct {
		what, values         string
		director, realserver bool
	}{
		{"the documents", changed, false, false},
		{"a setting of both", strings.ReplaceAll(variants["ipv6"], "7950", "7951"), true, true},
		{"a setting of directors", variants["ipv6"] + "\ndirector: {settings: {rise: 3s}}", true, false},
		{"a setting of realservers", variants["ipv6"] + "\nrealserver: {settings: {mtu: 9000}}", false, true},
	} {
		if d, r := restarts("director", variants["ipv6"], c.values), restarts("realserver", variants["ipv6"], c.values); d != c.director || r != c.realserver {
			t.Errorf("%s: directors restart: %v, realservers: %v", c.what, d, r)
		}
	}
	args := argsOf(containers(podOf(component(t, rendered(t, variants["everything"]), "director")))[1])
	for _, want := range []string{"--blackhole=3m", "--bgp-listen=198.51.100.11", "--bgp-listen=2001:db8:51::11", "--seeds=d1", "--seeds=d2:7950", "--listen=:10300"} {
		if !slices.Contains(args, want) {
			t.Errorf("%s is not among %q", want, args)
		}
	}
	if args := argsOf(containers(podOf(component(t, rendered(t, variants["everything"]), "realserver")))[1]); !slices.Contains(args, "--mark=2097152") {
		t.Errorf("a large number is not as it was: %q", args)
	}
}

// build builds the product.
func build(t *testing.T) string {
	t.Helper()
	binary := filepath.Join(t.TempDir(), "ravel")
	if out, err := exec.Command("go", "build", "-o", binary, "../cmd/ravel").CombinedOutput(); err != nil {
		t.Fatalf("go build: %v: %s", err, out)
	}
	return binary
}

var flag = regexp.MustCompile(`(?m)^\s+--([a-z0-9-]+)`)

// Every flag in the manifests is one of the command that it is given to, and the roles find nothing wrong with theirs.
func TestFlagsAreTheProducts(t *testing.T) {
	binary := build(t)
	key := filepath.Join(t.TempDir(), "gossip.key")
	printed, err := exec.Command(binary, "gossip-key").Output()
	if err == nil {
		err = os.WriteFile(key, printed, 0o400)
	}
	if err != nil {
		t.Fatal(err)
	}
	given := map[string][]string{}
	for variant, values := range variants {
		for _, o := range rendered(t, values) {
			if at(o, "spec", "template") == nil {
				continue
			}
			for _, c := range containers(podOf(o)) {
				args := argsOf(c)
				given[args[0]] = append(given[args[0]], args[1:]...)
				if args[0] != "director" && args[0] != "realserver" {
					continue
				}
				// One thing is wrong, so that nothing begins. All faults of settings are told at once.
				for i := range args {
					args[i] = strings.ReplaceAll(args[i], "/etc/ravel/gossip/gossip.key", key)
				}
				role := exec.Command(binary, append(args, "--log-level=loud")...)
				role.Env = append(os.Environ(), "RAVEL_NODE=d1", "RAVEL_GOSSIP_ADVERTISE=2001:db8:51::11")
				said, _ := role.CombinedOutput()
				if lines := strings.Split(strings.TrimSpace(string(said)), "\n"); len(lines) != 1 || !strings.Contains(lines[0], "--log-level") {
					t.Errorf("%s: %q: %s", variant, args, said)
				}
			}
		}
	}
	for command, args := range given {
		t.Run(command, func(t *testing.T) {
			help, err := exec.Command(binary, command, "--help").Output()
			if err != nil {
				t.Fatal(err)
			}
			var known []string
			for _, m := range flag.FindAllStringSubmatch(string(help), -1) {
				known = append(known, m[1])
			}
			for _, arg := range args {
				name, is := strings.CutPrefix(arg, "--")
				if name, _, _ = strings.Cut(name, "="); !is || !slices.Contains(known, name) {
					t.Errorf("ravel %s has no %s", command, arg)
				}
			}
		})
	}
}

// deploy/kustomize is made of the chart. RAVEL_TEST_UPDATE=1 writes it anew.
func TestKustomizeIsTheChart(t *testing.T) {
	values, err := os.ReadFile("kustomize/values.yaml")
	if err != nil {
		t.Fatal(err)
	}
	const made = "# Made of the chart by its test (deploy/README.md): change nothing here.\n"
	want := map[string]string{}
	add := func(into func(template string) string, args ...string) {
		all, stderr, err := render(string(values), args...)
		if err != nil {
			t.Fatalf("%v: %s", err, stderr)
		}
		for _, part := range strings.Split(all, "---\n# Source: ravel/templates/")[1:] {
			source, o, _ := strings.Cut(part, "\n")
			file := into(source)
			want[file] += map[bool]string{true: made, false: "---\n"}[want[file] == ""] + o
		}
	}
	add(func(template string) string { return "kustomize/base/" + template })
	add(func(string) string { return "kustomize/cleanup/daemonset.yaml" }, "--set", "cleanup.enabled=true", "--show-only", "templates/cleanup.yaml")
	files, err := filepath.Glob("kustomize/*/*.yaml")
	if err != nil {
		t.Fatal(err)
	}
	for _, file := range files {
		if _, is := want[file]; !is && filepath.Base(file) != "kustomization.yaml" {
			t.Errorf("%s is not of the chart", file)
		}
	}
	for file, text := range want {
		if os.Getenv("RAVEL_TEST_UPDATE") != "" {
			if err := os.WriteFile(file, []byte(text), 0o644); err != nil {
				t.Fatal(err)
			}
			continue
		}
		got, err := os.ReadFile(file)
		if err != nil {
			t.Error(err)
		}
		if diff := cmp.Diff(text, string(got)); diff != "" {
			t.Errorf("%s is not up to date (-want +got):\n%s", file, diff)
		}
	}
}

// kustomized are the objects of a directory of deploy/kustomize.
func kustomized(t *testing.T, dir string) []object {
	t.Helper()
	out, stderr, err := tool("", "kustomize", "build", filepath.Join("kustomize", dir))
	if err != nil {
		t.Fatalf("kustomize build %s: %v: %s", dir, err, stderr)
	}
	return parse(t, out)
}

// The base has all that its files have, and the overlay a ConfigMap by the name that the roles ask for.
func TestKustomize(t *testing.T) {
	var base []string
	for _, o := range kustomized(t, "base") {
		base = append(base, nameOf(o))
	}
	text, _, err := render("", "--values", "kustomize/values.yaml")
	if err != nil {
		t.Fatal(err)
	}
	var whole []string
	for _, o := range parse(t, text) {
		whole = append(whole, nameOf(o))
	}
	slices.Sort(base)
	slices.Sort(whole)
	if diff := cmp.Diff(whole, base); diff != "" {
		t.Errorf("the base (-chart +kustomize):\n%s", diff)
	}
	all := kustomized(t, "overlays/bgp")
	if !slices.ContainsFunc(all, func(o object) bool { return nameOf(o) == "ConfigMap ravel" }) {
		t.Errorf("no ConfigMap of the documents")
	}
	if args := argsOf(containers(podOf(component(t, all, "director")))[1]); !slices.Contains(args, "--config-name=ravel") {
		t.Errorf("%q", args)
	}
}
