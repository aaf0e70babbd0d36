//go:build kube

package deploy

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"io/fs"
	"maps"
	"net/http"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/ravel-lb/ravel/internal/kube"
	"github.com/ravel-lb/ravel/lab/cluster"
	"github.com/ravel-lb/ravel/lab/cluster/clustertest"
)

// patience is for what takes a moment on a quiet machine.
const patience = time.Minute

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// until waits for what is so after a while.
func until(t *testing.T, what string, is func() error) {
	t.Helper()
	for deadline := time.Now().Add(patience); ; time.Sleep(50 * time.Millisecond) {
		err := is()
		if err == nil {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("%s: %v", what, err)
		}
	}
}

var apis = map[string]string{
	"v1 Namespace": "api/v1/namespaces", "v1 ServiceAccount": "api/v1/ serviceaccounts", "v1 ConfigMap": "api/v1/ configmaps",
	"apps/v1 DaemonSet": "apis/apps/v1/ daemonsets", "apps/v1 Deployment": "apis/apps/v1/ deployments", "batch/v1 Job": "apis/batch/v1/ jobs",
	"policy/v1 PodDisruptionBudget":                   "apis/policy/v1/ poddisruptionbudgets",
	"rbac.authorization.k8s.io/v1 ClusterRole":        "apis/rbac.authorization.k8s.io/v1/clusterroles",
	"rbac.authorization.k8s.io/v1 ClusterRoleBinding": "apis/rbac.authorization.k8s.io/v1/clusterrolebindings",
	"rbac.authorization.k8s.io/v1 Role":               "apis/rbac.authorization.k8s.io/v1/ roles",
	"rbac.authorization.k8s.io/v1 RoleBinding":        "apis/rbac.authorization.k8s.io/v1/ rolebindings",
}

// pathOf is where an object is at the API server.
func pathOf(t *testing.T, o object) string {
	t.Helper()
	kind := text(o, "apiVersion") + " " + text(o, "kind")
	api, known := apis[kind]
	if !known {
		t.Fatalf("where is a %s?", kind)
	}
	if root, resource, is := strings.Cut(api, " "); is {
		if text(o, "metadata", "namespace") != namespace {
			t.Errorf("%s is in namespace %q", nameOf(o), text(o, "metadata", "namespace"))
		}
		api = root + "namespaces/" + namespace + "/" + resource
	}
	return "/" + api + "/" + text(o, "metadata", "name")
}

// apply makes objects at the API server, the namespace first.
func apply(t *testing.T, c *cluster.Cluster, all []object, dryRun bool) {
	t.Helper()
	all = slices.Clone(all)
	slices.SortStableFunc(all, func(a, b object) int {
		first := func(o object) int { return map[bool]int{true: 0, false: 1}[o["kind"] == "Namespace"] }
		return first(a) - first(b)
	})
	for _, o := range all {
		if err := c.Apply(t.Context(), pathOf(t, o), o, dryRun); err != nil {
			t.Errorf("%s: %v", nameOf(o), err)
		}
	}
}

// podNamespace is what namespace.create renders.
func podNamespace(t *testing.T) object {
	t.Helper()
	for _, o := range rendered(t, "hooks: false\nnamespace: {create: true}") {
		if o["kind"] == "Namespace" {
			return o
		}
	}
	t.Fatal("there is no Namespace")
	return nil
}

// A real API server knows every field of all that is rendered.
func TestAPIServerTakesAll(t *testing.T) {
	c := clustertest.Start(t, "..", cluster.Options{Controllers: []string{}})
	apply(t, c, []object{podNamespace(t)}, false)
	for name, values := range variants {
		t.Run(name, func(t *testing.T) { apply(t, c, rendered(t, values), true) })
	}
	for _, dir := range []string{"base", "overlays/bgp", "cleanup"} {
		t.Run(dir, func(t *testing.T) { apply(t, c, kustomized(t, dir), true) })
	}
	// It would say so.
	wrong := rendered(t, "")[0]
	wrong["metadta"] = object{}
	if err := c.Apply(t.Context(), pathOf(t, wrong), wrong, true); err == nil || !strings.Contains(err.Error(), "metadta") {
		t.Errorf("a field that is misspelt: %v", err)
	}
}

// The controllers of a real cluster make the pods of what is rendered: Pod Security lets them in, directors are on nodes with
// the label, and realservers on all others.
func TestPodsComeToTheirNodes(t *testing.T) {
	c := clustertest.Start(t, "..", cluster.Options{Controllers: append(slices.Clone(cluster.DefaultControllers), "daemonset-controller", "job-controller", "disruption-controller")})
	for i, node := range []string{"d1", "d2", "r1", "r2", "r3"} {
		labels := map[string]string{}
		if node[0] == 'd' {
			labels["ravel.dev/director"] = ""
		}
		must(t, c.AddNode(t.Context(), node, labels, netip.AddrFrom4([4]byte{10, 0, 0, byte(i + 1)})))
		// As the controller of nodes does with one that is Ready.
		must(t, c.Call(t.Context(), http.MethodPatch, "/api/v1/nodes/"+node, object{"spec": object{"taints": nil}}, nil))
	}
	apply(t, c, kustomized(t, "overlays/bgp"), false)
	const pods = "/api/v1/namespaces/" + namespace + "/pods"
	// A DaemonSet's pod says by its affinity which node it is for. This test is scheduler and kubelet.
	places := func() (map[string][]string, error) {
		var list struct{ Items []object }
		if err := c.Call(t.Context(), http.MethodGet, pods, nil, &list); err != nil {
			return nil, err
		}
		found := map[string][]string{}
		for _, p := range list.Items {
			node, name := "", text(p, "metadata", "name")
			if at(p, "metadata", "deletionTimestamp") != nil {
				if err := c.EndPod(t.Context(), namespace, name, false); err != nil {
					return nil, err
				}
				continue
			}
			if terms, is := at(p, "spec", "affinity", "nodeAffinity", "requiredDuringSchedulingIgnoredDuringExecution", "nodeSelectorTerms").([]any); is {
				if fields, is := terms[0].(object)["matchFields"].([]any); is {
					node = fields[0].(object)["values"].([]any)[0].(string)
				}
			}
			if node != "" && text(p, "spec", "nodeName") == "" {
				if err := c.BindPod(t.Context(), namespace, name, node); err != nil {
					return nil, err
				}
			}
			role := text(p, "metadata", "labels", "app.kubernetes.io/component")
			found[role] = append(found[role], node)
		}
		for _, nodes := range found {
			slices.Sort(nodes)
		}
		return found, nil
	}
	become := func(what string, want map[string][]string) {
		t.Helper()
		until(t, what, func() error {
			got, err := places()
			if err == nil && !maps.EqualFunc(got, want, slices.Equal) {
				err = fmt.Errorf("pods are for %v, want %v", got, want)
			}
			return err
		})
	}
	become("the overlay", map[string][]string{"director": {"d1", "d2"}, "realserver": {"r1", "r2", "r3"}, "gossip-key": {""}})

	// A node changes sides.
	must(t, c.Call(t.Context(), http.MethodPatch, "/api/v1/nodes/r3", object{"metadata": object{"labels": object{"ravel.dev/director": ""}}}, nil))
	become("r3 is a director's", map[string][]string{"director": {"d1", "d2", "r3"}, "realserver": {"r1", "r2"}, "gossip-key": {""}})

	apply(t, c, kustomized(t, "cleanup"), false)
	become("the cleanup", map[string][]string{
		"director": {"d1", "d2", "r3"}, "realserver": {"r1", "r2"}, "gossip-key": {""}, "cleanup": {"d1", "d2", "r1", "r2", "r3"},
	})

	// A Deployment's budget is understood; one over the DaemonSet's pods would not be, and refuse every eviction.
	for _, o := range rendered(t, "nameOverride: other\n"+variants["deployment"]) {
		if o["kind"] == "Deployment" || o["kind"] == "PodDisruptionBudget" {
			apply(t, c, []object{o}, false)
		}
		if o["kind"] == "PodDisruptionBudget" {
			over := object{"apiVersion": o["apiVersion"], "kind": o["kind"], "metadata": object{"name": "over-daemonset", "namespace": namespace}, "spec": object{
				"maxUnavailable": 1, "selector": object{"matchLabels": object{"app.kubernetes.io/component": "realserver"}},
			}}
			apply(t, c, []object{over}, false)
		}
	}
	for budget, want := range map[string]string{"ravel-other-director": "", "over-daemonset": "SyncFailed"} {
		until(t, budget, func() error {
			var o object
			if err := c.Call(t.Context(), http.MethodGet, "/apis/policy/v1/namespaces/"+namespace+"/poddisruptionbudgets/"+budget, nil, &o); err != nil {
				return err
			}
			conditions, _ := at(o, "status", "conditions").([]any)
			if len(conditions) == 0 || (text(conditions[0], "reason") == "SyncFailed") != (want == "SyncFailed") {
				return fmt.Errorf("%v", conditions)
			}
			return nil
		})
	}
}

// What is said after an install names what there is, and warns where documents are missing.
func TestNotes(t *testing.T) {
	c := clustertest.Start(t, "..", cluster.Options{Controllers: []string{}})
	for name, wants := range map[string][]string{
		"default":    {"WARNING: no documents", "create configmap ravel --from-file=cluster.json --from-file=fleet.yaml", "daemonset/ravel-director", "Secret ravel-gossip stays"},
		"deployment": {"WARNING: no documents", "deployment/ravel-director"},
		"existing":   {"describe configmap lb"},
		"everything": {"kubectl label node NODE example.net/lb=", "{example.net/lb: \"\"}", "daemonset/ravel-lb-director"},
	} {
		out, stderr, err := tool(variants[name], "helm", "install", "ravel", chart, "--namespace", namespace, "--dry-run=server", "--kubeconfig", c.Kubeconfig(), "--values", "-")
		_, notes, found := strings.Cut(out, "\nNOTES:\n")
		if err != nil || !found {
			t.Fatalf("%s: %v: %s", name, err, stderr)
		}
		for _, want := range wants {
			if !strings.Contains(notes, want) {
				t.Errorf("%s: %q is not said:\n%s", name, want, notes)
			}
		}
		if warns := strings.Contains(notes, "WARNING"); warns != strings.Contains(wants[0], "WARNING") {
			t.Errorf("%s: it warns: %v", name, warns)
		}
	}
}

// What directors and realservers are granted is what they use of a real API server, all of it and nothing else. use says
// what each right is for.
func TestRightsAreThoseThatAreUsed(t *testing.T) {
	use := map[string]string{
		"watch nodes":                           "all of them: addresses, labels, Ready, cordoned; with what there is in the stream",
		"watch services":                        "all of them: which there are",
		"watch discovery.k8s.io/endpointslices": "all of them: the pods",
		"watch configmaps ravel-system/ravel":   "the documents",
		"list nodes":                            "the same, of an API server that does not stream lists",
		"list services":                         "the same",
		"list discovery.k8s.io/endpointslices":  "the same",
		"list configmaps ravel-system/ravel":    "the same",
		"create events ravel-system":            "directors: what is wrong with a document",
	}
	used := map[string]map[string]bool{"director": {}, "realserver": {}}
	for name, flags := range map[string][]string{"streams": nil, "lists": {"--feature-gates=WatchList=false"}} {
		t.Run(name, func(t *testing.T) {
			for role, rights := range useAll(t, flags) {
				maps.Copy(used[role], rights)
			}
		})
	}
	for role, rights := range used {
		granted := grantedTo(t, kustomized(t, "overlays/bgp"), "ravel-"+role)
		if diff := cmp.Diff(granted, slices.Sorted(maps.Keys(rights))); diff != "" {
			t.Errorf("%s (-granted +used):\n%s", role, diff)
		}
		for _, right := range granted {
			if use[right] == "" {
				t.Errorf("what is %q for?", right)
			}
		}
	}
	if granted := grantedTo(t, kustomized(t, "overlays/bgp"), "ravel-director"); len(granted) != len(use) {
		t.Errorf("%d rights are granted, %d have a use", len(granted), len(use))
	}
}

// useAll has a director and a realserver follow a real API server with the rights of their ServiceAccounts, through all
// that they ask it for, and returns what its audit log says that they did.
func useAll(t *testing.T, flags []string) map[string]map[string]bool {
	c, log := auditing(t, flags)
	all := kustomized(t, "overlays/bgp")
	apply(t, c, all, false)
	must(t, c.AddNode(t.Context(), "n1", nil, netip.MustParseAddr("10.0.0.1")))
	for _, shop := range []string{"shop", "store"} {
		must(t, c.Call(t.Context(), http.MethodPost, "/api/v1/namespaces", object{"metadata": object{"name": shop}}, nil))
		must(t, c.Call(t.Context(), http.MethodPost, "/api/v1/namespaces/"+shop+"/services", object{
			"metadata": object{"name": "web"}, "spec": object{"ports": []any{object{"name": "http", "port": 80}}},
		}, nil))
	}

	documents := all[slices.IndexFunc(all, func(o object) bool { return o["kind"] == "ConfigMap" })]
	good := text(documents, "data", "cluster.json")
	write := func(document string) {
		t.Helper()
		must(t, c.Call(t.Context(), http.MethodPatch, pathOf(t, documents), object{"data": object{"cluster.json": document}}, nil))
	}
	sources := map[string]*kube.Source{}
	for _, role := range []string{"director", "realserver"} {
		client, err := kube.NewClient(account(t, c, role), "test")
		must(t, err)
		s := kube.New(kube.Options{
			Client: client, Namespace: namespace, Name: "ravel", Key: "cluster.json", FleetKey: "fleet.yaml", Events: role == "director",
		})
		sources[role] = s
		ctx, stop := context.WithCancel(context.Background())
		ended := make(chan error)
		go func() { ended <- s.Run(ctx) }()
		t.Cleanup(func() {
			stop()
			if err := <-ended; err != nil {
				t.Error(err)
			}
		})
	}
	become := func(what string, is func(s *kube.Source, v kube.Value) bool) {
		t.Helper()
		for role, s := range sources {
			until(t, what, func() error {
				v, known := s.Latest()
				if status := s.Status(); !known || !is(s, v) || status.Age > 0 {
					return fmt.Errorf("%s: %v, %d services, %v", role, known, len(v.Cluster.Services), status.Problems)
				}
				return nil
			})
		}
	}
	isGood := func(s *kube.Source, v kube.Value) bool {
		return len(v.Cluster.Services) == 2 && len(v.Fleet.DirectorNodes) == 1 && len(v.Problems)+len(v.Warnings) == 0
	}
	become("the start", isGood)
	write(strings.ReplaceAll(good, "shop", "store"))
	become("a change", func(_ *kube.Source, v kube.Value) bool {
		return len(v.Cluster.Services) == 2 && v.Cluster.Services[0].Namespace == "store"
	})
	write("{")
	become("a document that is bad", func(s *kube.Source, v kube.Value) bool { return len(s.Status().Faults) > 0 })
	until(t, "an Event says so", func() error {
		var list struct{ Items []object }
		err := c.Call(t.Context(), http.MethodGet, "/api/v1/namespaces/"+namespace+"/events", nil, &list)
		if err == nil && (len(list.Items) != 1 || text(list.Items[0], "reason") != "DocumentRefused") {
			err = fmt.Errorf("there are %v", list.Items)
		}
		return err
	})
	write(good)
	become("it is good again", isGood)
	must(t, c.StopAPIServer())
	until(t, "the API server is missed", func() error {
		for role, s := range sources {
			if s.Status().Age == 0 {
				return fmt.Errorf("not by the %s", role)
			}
		}
		return nil
	})
	must(t, c.StartAPIServer(t.Context()))
	become("the API server is back", isGood)
	write(strings.ReplaceAll(good, "shop", "store"))
	become("a change after that", func(_ *kube.Source, v kube.Value) bool { return v.Cluster.Services[0].Namespace == "store" })
	return audited(t, log, all)
}

// So are those of the Jobs: one makes the Secret with the key, once; the other waits for the cleanup.
func TestRightsOfJobs(t *testing.T) {
	c, log := auditing(t, nil)
	all := append(rendered(t, ""), podNamespace(t))
	apply(t, c, all, false)
	binary := build(t)
	run := func(job string) string {
		t.Helper()
		args := argsOf(containers(podOf(all[slices.IndexFunc(all, func(o object) bool { return nameOf(o) == "Job ravel-"+job })]))[0])
		out, err := exec.CommandContext(t.Context(), binary, append(args, "--kubeconfig="+account(t, c, job))...).CombinedOutput()
		if err != nil {
			t.Fatalf("ravel %s: %v: %s", strings.Join(args, " "), err, out)
		}
		return string(out)
	}
	key := func() string {
		t.Helper()
		var secret object
		must(t, c.Call(t.Context(), http.MethodGet, "/api/v1/namespaces/"+namespace+"/secrets/ravel-gossip", nil, &secret))
		return text(secret, "data", "gossip.key")
	}
	run("gossip-key")
	first := key()
	run("gossip-key") // an upgrade
	if again := key(); first == "" || again != first {
		t.Errorf("the key was %d letters, and is %d other ones", len(first), len(again))
	}
	const daemonSet = "/apis/apps/v1/namespaces/" + namespace + "/daemonsets/ravel-cleanup"
	must(t, c.Call(t.Context(), http.MethodPatch, daemonSet+"/status", object{"status": object{
		"observedGeneration": 1, "currentNumberScheduled": 2, "desiredNumberScheduled": 2, "updatedNumberScheduled": 2, "numberReady": 2, "numberMisscheduled": 0,
	}}, nil))
	run("cleanup")
	used := audited(t, log, all)
	for _, job := range []string{"gossip-key", "cleanup"} {
		if diff := cmp.Diff(grantedTo(t, all, "ravel-"+job), slices.Sorted(maps.Keys(used[job]))); diff != "" {
			t.Errorf("%s (-granted +used):\n%s", job, diff)
		}
	}
}

// auditing starts a cluster whose API server tells in a file what it was asked.
func auditing(t *testing.T, flags []string) (c *cluster.Cluster, log string) {
	t.Helper()
	dir := t.TempDir()
	policy, log := filepath.Join(dir, "policy.yaml"), filepath.Join(dir, "audit.log")
	must(t, os.WriteFile(policy, []byte("apiVersion: audit.k8s.io/v1\nkind: Policy\nrules: [{level: Metadata}]\n"), 0o644))
	return clustertest.Start(t, "..", cluster.Options{
		Controllers: []string{}, APIServerFlags: append([]string{"--audit-log-path=" + log, "--audit-policy-file=" + policy}, flags...),
	}), log
}

// account is a kubeconfig of the ServiceAccount of a component.
func account(t *testing.T, c *cluster.Cluster, component string) string {
	t.Helper()
	const group = "system:serviceaccounts"
	config, err := c.NewKubeconfig("system:serviceaccount:"+namespace+":ravel-"+component, group, group+":"+namespace)
	must(t, err)
	return config
}

// audited is what each role did by the API server's audit log. What was refused that was not granted is an error. An API
// server that has just started refuses everything for a moment: it knows no roles yet.
func audited(t *testing.T, log string, all []object) map[string]map[string]bool {
	t.Helper()
	file, err := os.Open(log)
	must(t, err)
	defer func() { _ = file.Close() }()
	used, requests := map[string]map[string]bool{}, 0
	for lines := bufio.NewScanner(file); lines.Scan(); {
		var e struct {
			Verb, RequestURI string
			User             struct{ Username string }
			ObjectRef        struct{ APIGroup, Resource, Namespace, Name string }
			ResponseStatus   struct{ Code int }
		}
		must(t, json.Unmarshal(lines.Bytes(), &e))
		role, is := strings.CutPrefix(e.User.Username, "system:serviceaccount:"+namespace+":ravel-")
		if !is {
			continue
		}
		requests++
		name := e.ObjectRef.Name
		if e.Verb == "create" {
			name = "" // a right to create is one to any name
		}
		did := right(e.Verb, e.ObjectRef.APIGroup, e.ObjectRef.Resource, e.ObjectRef.Namespace, name)
		if e.ResponseStatus.Code == http.StatusForbidden && slices.Contains(grantedTo(t, all, "ravel-"+role), did) {
			continue
		}
		if code := e.ResponseStatus.Code; code == http.StatusForbidden || code == http.StatusUnauthorized {
			t.Errorf("%s: %s %s: %d", role, e.Verb, e.RequestURI, code)
		}
		if used[role] == nil {
			used[role] = map[string]bool{}
		}
		used[role][did] = true
	}
	t.Logf("%d requests", requests)
	return used
}

// right is one verb on one resource: "list nodes", "watch configmaps NAMESPACE/NAME".
func right(verb, group, resource, namespace, name string) string {
	if group != "" {
		resource = group + "/" + resource
	}
	where := namespace
	if name != "" {
		where += "/" + name
	}
	return strings.TrimSpace(verb + " " + resource + " " + where)
}

// grantedTo are the rights that manifests give to a ServiceAccount, sorted.
func grantedTo(t *testing.T, all []object, account string) []string {
	t.Helper()
	rights := map[string]bool{}
	for _, binding := range all {
		subjects, _ := binding["subjects"].([]any)
		if !slices.ContainsFunc(subjects, func(s any) bool { return text(s, "name") == account && text(s, "namespace") == namespace }) {
			continue
		}
		role := slices.IndexFunc(all, func(o object) bool {
			return nameOf(o) == text(binding, "roleRef", "kind")+" "+text(binding, "roleRef", "name")
		})
		if role < 0 {
			t.Fatalf("%s: there is no such role", nameOf(binding))
		}
		for _, rule := range all[role]["rules"].([]any) {
			strs := func(name string) []string {
				list, _ := rule.(object)[name].([]any)
				if len(list) == 0 {
					return []string{""}
				}
				var all []string
				for _, s := range list {
					all = append(all, s.(string))
				}
				return all
			}
			for _, group := range strs("apiGroups") {
				for _, resource := range strs("resources") {
					for _, name := range strs("resourceNames") {
						for _, verb := range strs("verbs") {
							rights[right(verb, group, resource, text(all[role], "metadata", "namespace"), name)] = true
						}
					}
				}
			}
		}
	}
	return slices.Sorted(maps.Keys(rights))
}

// No file of deploy has a key in it.
func TestNoKeyIsKept(t *testing.T) {
	must(t, filepath.WalkDir(".", func(path string, e fs.DirEntry, err error) error {
		if err != nil || e.IsDir() || strings.HasSuffix(path, "_test.go") {
			return err
		}
		b, err := os.ReadFile(path)
		for document := range strings.SplitSeq(string(b), "\n---\n") {
			// One of an account's token is asked for empty.
			if strings.Contains(document, "kind: Secret\n") && (!strings.Contains(document, "\ntype: kubernetes.io/service-account-token") ||
				strings.Contains(document, "\ndata:") || strings.Contains(document, "\nstringData:")) {
				t.Errorf("%s has a Secret with something in it", path)
			}
		}
		return err
	}))
}
