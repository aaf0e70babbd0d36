// Package cni knows the network plugins whose eBPF programs carry the packets of pods past netfilter, where Ravel's
// redirects are rules. A node with such a one cannot be a real server until a setting of the plugin is changed, which
// Find names.
//
// It looks at links, at the names of pinned eBPF maps, and asks Cilium's agent how it forwards. It changes nothing.
package cni

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/ravel-lb/ravel"
)

// Finding is what a plugin does that Ravel does not get along with.
type Finding struct {
	Plugin string // "Cilium" or "Calico"
	What   string
	Fix    string // the setting of the plugin that mends it; never empty
	// Bypass says that packets of pods pass netfilter by, so that redirects cannot work. Otherwise it may do harm, or
	// cannot be known.
	Bypass bool
}

// Host is what Find looks at.
type Host struct {
	Root  string   // where the files of the host are; "" is "/"
	Links []string // the names of its links
}

// agentWait bounds the question to a plugin's agent.
const agentWait = time.Second

// maxAnswer bounds what is read of an agent's answer.
const maxAnswer = 4 << 20

// Find returns what the plugins of this host do that Ravel does not get along with; nothing where there is none.
func Find(ctx context.Context, h Host) []Finding {
	if h.Root == "" {
		h.Root = "/"
	}
	var found []Finding
	if slices.Contains(h.Links, "cilium_host") || slices.Contains(h.Links, "cilium_net") {
		found = append(found, cilium(ctx, h.Root)...)
	}
	return append(found, calico(h)...)
}

// calico knows Felix's eBPF mode by the pair of links that it makes for services, or by its maps.
func calico(h Host) []Finding {
	sign := ""
	switch {
	case slices.Contains(h.Links, "bpfin.cali"):
		sign = "it has a link bpfin.cali"
	default:
		entries, err := os.ReadDir(filepath.Join(h.Root, "sys/fs/bpf/tc/globals"))
		if err != nil {
			return nil
		}
		at := slices.IndexFunc(entries, func(e fs.DirEntry) bool {
			return strings.HasPrefix(e.Name(), "cali_v4_") || strings.HasPrefix(e.Name(), "cali_v6_")
		})
		if at < 0 {
			return nil
		}
		sign = "its map " + entries[at].Name() + " is there"
	}
	return []Finding{{
		Plugin: "Calico", Bypass: true,
		What: "Calico's eBPF data plane runs here (" + sign + "): what pods answer passes netfilter by, so that redirects cannot work",
		Fix: `kubectl patch installation default --type merge -p '{"spec":{"calicoNetwork":{"linuxDataplane":"Iptables"}}}', ` +
			"and kube-proxy in iptables mode; without the operator bpfEnabled: false in the FelixConfiguration",
	}}
}

// status is what of the answer of Cilium's agent (GET /v1/healthz) matters here.
type status struct {
	Routing struct {
		Host string `json:"intra-host-routing-mode"` // Legacy, BPF, or one of netkit
	} `json:"routing"`
	KubeProxy struct {
		Mode string `json:"mode"` // True or False; before 1.16 also Strict, Partial, Probe and Disabled
	} `json:"kube-proxy-replacement"`
}

// cilium asks the agent.
func cilium(ctx context.Context, root string) []Finding {
	s, err := askCilium(ctx, root)
	if err != nil {
		return []Finding{{
			Plugin: "Cilium",
			What:   fmt.Sprintf("Cilium runs here, and its agent does not say whether it forwards past netfilter (eBPF host routing): %v", err),
			Fix:    "cilium-dbg status --verbose on this node: Routing must say Host: Legacy; mount /var/run/cilium to let Ravel ask",
		}}
	}
	return s.findings()
}

func (s status) findings() []Finding {
	var found []Finding
	switch s.Routing.Host {
	case "Legacy":
	case "":
		found = append(found, Finding{
			Plugin: "Cilium",
			What:   "Cilium runs here, and this version of its agent does not say whether it forwards past netfilter (eBPF host routing)",
			Fix:    "cilium-dbg status --verbose on this node: Routing must say Host: Legacy",
		})
	default:
		found = append(found, Finding{
			Plugin: "Cilium", Bypass: true,
			What: fmt.Sprintf("Cilium forwards by eBPF host routing here (%.20s): what pods answer passes netfilter by, so that redirects cannot work",
				s.Routing.Host),
			Fix: "helm upgrade cilium --reuse-values --set bpf.hostLegacyRouting=true (enable-host-legacy-routing in the ConfigMap " +
				"cilium-config; not with bpf.datapathMode=netkit), then restart the agents",
		})
	}
	switch s.KubeProxy.Mode {
	case "", "False", "Disabled":
	default:
		found = append(found, Finding{
			Plugin: "Cilium",
			What: "Cilium stands in for kube-proxy here: it takes the packets for a VIP that the cluster knows, by externalIPs or " +
				"the status of a Service, before netfilter and IPVS see them",
			Fix: "keep VIPs out of externalIPs and of the status of Services of Cilium's (spec.loadBalancerClass), or kubeProxyReplacement=false",
		})
	}
	return found
}

// askCilium asks the agent by its unix socket.
func askCilium(ctx context.Context, root string) (status, error) {
	ctx, cancel := context.WithTimeout(ctx, agentWait)
	defer cancel()
	socket := ""
	for _, path := range []string{"var/run/cilium/cilium.sock", "run/cilium/cilium.sock"} {
		if _, err := os.Stat(filepath.Join(root, path)); err == nil {
			socket = filepath.Join(root, path)
			break
		}
	}
	if socket == "" {
		return status{}, errors.New("there is no /var/run/cilium/cilium.sock here")
	}
	transport := &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return (&net.Dialer{}).DialContext(ctx, "unix", socket)
	}}
	defer transport.CloseIdleConnections()
	request, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://localhost/v1/healthz", nil)
	if err != nil {
		return status{}, err
	}
	answer, err := (&http.Client{Transport: transport}).Do(request)
	if err != nil {
		return status{}, fmt.Errorf("asking the agent: %w", err)
	}
	defer func() { _ = answer.Body.Close() }()
	if answer.StatusCode != http.StatusOK {
		return status{}, fmt.Errorf("asking the agent: %s", answer.Status)
	}
	b, err := io.ReadAll(io.LimitReader(answer.Body, maxAnswer))
	if err != nil {
		return status{}, fmt.Errorf("asking the agent: %w", err)
	}
	return parse(b)
}

func parse(answer []byte) (status, error) {
	var s status
	if err := json.Unmarshal(answer, &s); err != nil {
		return status{}, fmt.Errorf("reading the agent's answer: %w", err)
	}
	return s, nil
}

// Watcher keeps what Find found for a while, for a process that asks often. Its methods are safe for many goroutines.
type Watcher struct {
	Root string        // where the files of the host are; "" is "/"
	Keep time.Duration // how long an answer counts; 0 is a minute

	mu       sync.Mutex // guards the fields below
	at       time.Time
	problems []ravel.Problem
	bypass   []ravel.Problem // of them
}

// Problems returns what keeps this host from being a real server, as Problems.
func (w *Watcher) Problems(ctx context.Context) []ravel.Problem {
	problems, _ := w.look(ctx)
	return problems
}

// Bypass returns why packets of pods pass netfilter by, so that redirects cannot work; none where they do not, as far as
// can be known.
func (w *Watcher) Bypass(ctx context.Context) []ravel.Problem {
	_, bypass := w.look(ctx)
	return bypass
}

func (w *Watcher) look(ctx context.Context) (problems, bypass []ravel.Problem) {
	w.mu.Lock()
	defer w.mu.Unlock()
	keep := w.Keep
	if keep == 0 {
		keep = time.Minute
	}
	if !w.at.IsZero() && time.Since(w.at) < keep {
		return slices.Clone(w.problems), slices.Clone(w.bypass)
	}
	h := Host{Root: w.Root}
	links, err := net.Interfaces()
	if err != nil {
		return slices.Clone(w.problems), slices.Clone(w.bypass) // as last known; ravel check says that links cannot be read
	}
	for _, l := range links {
		h.Links = append(h.Links, l.Name)
	}
	w.problems, w.bypass = nil, nil
	for _, f := range Find(ctx, h) {
		p := ravel.Problem{Where: "network plugin " + f.Plugin, What: f.What, Fix: f.Fix}
		if w.problems = append(w.problems, p); f.Bypass {
			w.bypass = append(w.bypass, p)
		}
	}
	w.at = time.Now()
	return slices.Clone(w.problems), slices.Clone(w.bypass)
}
