package cni

import (
	"encoding/json"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/ravel-lb/ravel/internal/nettest"
)

func TestMain(m *testing.M) { nettest.Main(m) }

// agent answers as Cilium's does, below a root.
func agent(t *testing.T, status int, answer string) (root string) {
	t.Helper()
	root, err := os.MkdirTemp("", "cni") // the path of a unix socket is short
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(root) })
	dir := filepath.Join(root, "var/run/cilium")
	if err := os.MkdirAll(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	l, err := net.Listen("unix", filepath.Join(dir, "cilium.sock"))
	if err != nil {
		t.Fatal(err)
	}
	server := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path != "/v1/healthz" || r.Method != http.MethodGet {
			t.Errorf("asked %s %s", r.Method, r.URL)
		}
		w.WriteHeader(status)
		_, _ = w.Write([]byte(answer))
	})}
	done := make(chan struct{})
	go func() { _ = server.Serve(l); close(done) }()
	t.Cleanup(func() { _ = server.Close(); <-done })
	return root
}

func TestFind(t *testing.T) {
	cilium := []string{"lo", "eth0", "cilium_net", "cilium_host"}
	for _, test := range []struct {
		name   string
		links  []string
		status int // of the agent; 0 there is none
		answer string
		file   string // that is there
		want   []string
	}{
		{name: "none", links: []string{"lo", "eth0", "flannel.1", "cni0"}},
		{name: "legacy host routing", links: cilium, status: 200,
			answer: `{"cilium":{"state":"Ok"},"routing":{"inter-host-routing-mode":"Tunnel","intra-host-routing-mode":"Legacy"},"kube-proxy-replacement":{"mode":"False"}}`},
		{name: "eBPF host routing", links: cilium, status: 200,
			answer: `{"routing":{"inter-host-routing-mode":"Native","intra-host-routing-mode":"BPF"},"kube-proxy-replacement":{"mode":"True"}}`,
			want:   []string{"bypass Cilium: eBPF host routing here (BPF)|bpf.hostLegacyRouting=true", "Cilium: stands in for kube-proxy|externalIPs"}},
		{name: "netkit", links: cilium, status: 200, answer: `{"routing":{"intra-host-routing-mode":"Netkit L2"}}`,
			want: []string{"bypass Cilium: Netkit L2|netkit"}},
		{name: "an old agent", links: cilium, status: 200, answer: `{"kube-proxy-replacement":{"mode":"Disabled"}}`,
			want: []string{"Cilium: this version|Host: Legacy"}},
		{name: "no agent", links: cilium, want: []string{"Cilium: no /var/run/cilium/cilium.sock|mount /var/run/cilium"}},
		{name: "an agent in trouble", links: cilium, status: 500, want: []string{"Cilium: 500|cilium-dbg status"}},
		{name: "garbage", links: cilium, status: 200, answer: "<html>", want: []string{"Cilium: reading the agent's answer|cilium-dbg"}},
		{name: "Calico", links: []string{"lo", "vxlan.calico", "cali0123456789a"}},
		{name: "Calico's eBPF data plane", links: []string{"lo", "bpfin.cali", "bpfout.cali"}, want: []string{"bypass Calico: bpfin.cali|linuxDataplane"}},
		{name: "Calico's maps", links: []string{"lo", "eth0"}, file: "sys/fs/bpf/tc/globals/cali_v4_nat_fe3", want: []string{"bypass Calico: cali_v4_nat_fe3|bpfEnabled"}},
		{name: "somebody else's maps", links: []string{"lo", "eth0"}, file: "sys/fs/bpf/tc/globals/cilium_lxc"},
	} {
		t.Run(test.name, func(t *testing.T) {
			root := t.TempDir()
			if test.status != 0 {
				root = agent(t, test.status, test.answer)
			}
			if test.file != "" {
				path := filepath.Join(root, test.file)
				if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
					t.Fatal(err)
				}
				if err := os.WriteFile(path, nil, 0o644); err != nil {
					t.Fatal(err)
				}
			}
			got := Find(t.Context(), Host{Root: root, Links: test.links})
			if len(got) != len(test.want) {
				t.Fatalf("found %+v, want %q", got, test.want)
			}
			for i, want := range test.want {
				head, rest, _ := strings.Cut(want, ": ")
				plugin, bypass := strings.CutPrefix(head, "bypass ")
				what, fix, _ := strings.Cut(rest, "|")
				f := got[i]
				if f.Plugin != plugin || f.Bypass != bypass || !strings.Contains(f.What, what) || !strings.Contains(f.Fix, fix) {
					t.Errorf("found %+v, want %q", f, want)
				}
			}
		})
	}
}

func TestWatcher(t *testing.T) {
	nettest.Need(t, nettest.Root)
	w := Watcher{Root: t.TempDir()}
	if got := w.Problems(t.Context()); len(got) != 0 {
		t.Fatalf("problems without a plugin: %v", got)
	}
	nettest.Shell(t, "ip link add bpfin.cali type veth peer name bpfout.cali")
	if got := w.Problems(t.Context()); len(got) != 0 {
		t.Fatalf("looked again at once: %v", got)
	}
	w.Keep = 1
	if got := w.Problems(t.Context()); len(got) != 1 || got[0].Where != "network plugin Calico" || got[0].Fix == "" {
		t.Fatalf("problems %v", got)
	}
	if got := w.Bypass(t.Context()); len(got) != 1 {
		t.Fatalf("what passes netfilter by: %v", got)
	}
	nettest.Shell(t, "ip link del bpfin.cali")
	if got := w.Bypass(t.Context()); len(got) != 0 {
		t.Fatalf("what passes netfilter by no more: %v", got)
	}
	if got := w.Problems(t.Context()); len(got) != 0 {
		t.Fatalf("problems that are over: %v", got)
	}
}

// Whatever an agent answers is taken or refused, and each finding says how it is mended.
func FuzzParse(f *testing.F) {
	for _, s := range []string{`{}`, `[]`, `{"routing":null}`, `{"routing":{"intra-host-routing-mode":"BPF"}}`, `{"kube-proxy-replacement":{"mode":"True"}}`} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		s, err := parse(b)
		if err == nil && !json.Valid(b) {
			t.Fatalf("%q was taken", b)
		}
		for _, finding := range s.findings() {
			if finding.What == "" || finding.Fix == "" || finding.Plugin == "" {
				t.Fatalf("%q: %+v", b, finding)
			}
		}
	})
}
