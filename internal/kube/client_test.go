package kube

import (
	"fmt"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/prometheus/client_golang/prometheus"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// A client says who it is, and asks for protobuf.
func TestClient(t *testing.T) {
	var asked http.Header
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		asked = r.Header.Clone()
		answer(w, http.StatusNotFound, metav1.StatusReasonNotFound)
	}))
	defer server.Close()
	path := filepath.Join(t.TempDir(), "kubeconfig")
	must(t, os.WriteFile(path, fmt.Appendf(nil, `{"apiVersion": "v1", "kind": "Config", "current-context": "c",
		"clusters": [{"name": "c", "cluster": {"server": %q}}], "contexts": [{"name": "c", "context": {"cluster": "c"}}]}`, server.URL), 0o600))
	client, err := NewClient(path, "1.2.3")
	must(t, err)
	if err := client.list(t.Context(), kindNodes, "", metav1.ListOptions{}, &corev1.NodeList{}); err == nil {
		t.Error("the answer was no error")
	}
	if agent, accept := asked.Get("User-Agent"), asked.Get("Accept"); agent != "ravel/1.2.3" || !strings.HasPrefix(accept, "application/vnd.kubernetes.protobuf,") {
		t.Errorf("user agent %q, accepts %q", agent, accept)
	}

	t.Setenv("KUBERNETES_SERVICE_HOST", "")
	for path, want := range map[string]string{
		"":                              "no kubeconfig is given, and this is no pod with a ServiceAccount: set --kubeconfig FILE: ",
		filepath.Join(t.TempDir(), "x"): "reading kubeconfig ",
	} {
		if _, err := NewClient(path, "1"); err == nil || !strings.HasPrefix(err.Error(), want) {
			t.Errorf("kubeconfig %q: %v, want %s", path, err, want)
		}
	}
}

// What is wrong with the API server reads the same for each request.
func TestReason(t *testing.T) {
	server := httptest.NewServer(nil)
	server.Close()
	client := (&apiServer{Server: server}).client(t)
	nodes := client.list(t.Context(), kindNodes, "", metav1.ListOptions{}, &corev1.NodeList{})
	_, services := client.watch(t.Context(), kindServices, "a", metav1.ListOptions{})
	if nodes == nil || services == nil {
		t.Fatal("there is an API server")
	}
	want := "dial tcp " + strings.TrimPrefix(server.URL, "http://") + ": connect: connection refused"
	if a, b := reason(nodes), reason(services); a != want || b != want {
		t.Errorf("%q and %q, want %q", a, b, want)
	}
}

func TestCheckOptions(t *testing.T) {
	for _, test := range []struct {
		o    Options
		want string
	}{
		{Options{Namespace: "a", Name: "b", Key: "c"}, "<nil>"},
		{Options{Namespace: "a", Name: "b", Key: "c", FleetKey: "c"}, "both documents cannot be in key c"},
		{Options{}, "the namespace of the ConfigMap is missing\nthe name of the ConfigMap is missing\nthe key of the ConfigMap is missing"},
	} {
		if got := fmt.Sprint(test.o.Check()); got != test.want {
			t.Errorf("%+v: %q, want %q", test.o, got, test.want)
		}
	}
}

func TestMetrics(t *testing.T) {
	registry := prometheus.NewPedanticRegistry()
	api := newAPIServer(t, webMap, nodeOf("n1", "10.0.0.1"), nodeOf("n2", "10.0.0.2"), serviceOf("shop", "web"), sliceOf("shop", "web", "s", "10.1.0.1@n1"))
	s := source(t, Options{Client: api.client(t), Registerer: registry}, brisk)
	value := func() map[string]float64 {
		families, err := registry.Gather()
		must(t, err)
		values := map[string]float64{}
		for _, f := range families {
			for _, m := range f.Metric {
				name := f.GetName()
				for _, l := range m.Label {
					name += " " + l.GetValue()
				}
				values[name] = m.GetGauge().GetValue() + m.GetCounter().GetValue()
			}
		}
		return values
	}
	if v := value(); v["ravel_kube_synced"] != 0 && v["ravel_kube_values_total"] == 0 {
		t.Errorf("before: %v", v)
	}
	waitFor(t, s, "the first", func(Value) bool { return true })
	opened(t, s)
	is := func(what string, want map[string]float64) {
		t.Helper()
		until(t, what, func() bool {
			got := value()
			for name, v := range want {
				if _, there := got[name]; !there || got[name] != v {
					return false
				}
			}
			return true
		})
	}
	is("all is well", map[string]float64{
		"ravel_kube_synced": 1, "ravel_kube_cached": 0, "ravel_kube_cache_age_seconds": 0, "ravel_kube_document_stale": 0, "ravel_kube_values_total": 1,
		"ravel_kube_watch_open nodes": 1, "ravel_kube_objects nodes": 2, "ravel_kube_objects endpointslices": 1, "ravel_kube_objects configmaps": 1,
		"ravel_kube_objects services": 1, "ravel_kube_watch_errors_total nodes": 0,
	})
	if at := value()["ravel_kube_last_event_timestamp_seconds nodes"]; at < 1e9 {
		t.Errorf("nodes were last told of at %f", at)
	}
	api.set(configMapOf(nil))
	is("the document is gone", map[string]float64{"ravel_kube_document_stale": 1, "ravel_kube_values_total": 2})
	api.behave(fails)
	until(t, "the API server is lost", func() bool {
		v := value()
		return v["ravel_kube_watch_open nodes"] == 0 && v["ravel_kube_synced"] == 1 && v["ravel_kube_watch_errors_total nodes"] >= 1 && v["ravel_kube_cache_age_seconds"] > 0
	})
}
