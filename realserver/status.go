package realserver

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"github.com/ravel-lb/ravel"
	"github.com/ravel-lb/ravel/internal/iptables"
)

// RedirectStatus is a redirect that the kernel holds, or one that was asked for and is not held.
type RedirectStatus struct {
	VIP        netip.Addr  `json:"vip"`
	Proto      ravel.Proto `json:"protocol"`
	Port       uint16      `json:"port"`
	Name       string      `json:"name,omitempty"`
	Held       bool        `json:"held"` // the kernel's rules hold it; whether anything leads to them is for Problems
	Tunnelled  bool        `json:"tunnelled"`
	Masquerade bool        `json:"masquerade"`
	MTU        int         `json:"mtu,omitempty"` // of its flows' packets; 0 is no limit of ours
	Flows      uint64      `json:"flows"`         // new flows since the redirect was last changed; later packets are not counted
	Pods       []PodStatus `json:"pods"`          // in the order of the rules
}

// PodStatus is a pod behind a redirect.
type PodStatus struct {
	Addr        netip.AddrPort `json:"address"`
	Probability float64        `json:"probability"` // of a new flow to go there
	Flows       uint64         `json:"flows"`       // new flows that went there since the redirect was last changed
	Bytes       uint64         `json:"bytes"`       // in the first packets of those flows
}

// Key returns the redirect's key.
func (s RedirectStatus) Key() ravel.ServiceKey {
	return ravel.ServiceKey{VIP: s.VIP, Proto: s.Proto, Port: s.Port}
}

// Status returns all redirects that the kernel holds and those that the last Apply was asked for, by key, with the
// kernel's counters.
func (r *Realserver) Status(ctx context.Context) ([]RedirectStatus, error) {
	r.mu.Lock()
	applied := r.applied
	r.mu.Unlock()
	found := map[ravel.ServiceKey]RedirectStatus{}
	var errs []error
	for _, f := range r.families {
		lines, err := f.counters(ctx)
		if err != nil {
			errs = append(errs, fmt.Errorf("reading counters of %s: %w", f.name(), err))
			continue
		}
		for _, s := range statusOf(lines, r.names) {
			found[s.Key()] = s
		}
	}
	for _, x := range applied {
		s, held := found[x.Key]
		if !held {
			s = RedirectStatus{VIP: x.Key.VIP, Proto: x.Key.Proto, Port: x.Key.Port, Pods: []PodStatus{}}
		}
		s.Name, s.Tunnelled, s.Masquerade, s.MTU = x.Name, x.Tunnelled, x.Masquerade, x.MTU
		found[x.Key] = s
	}
	list := make([]RedirectStatus, 0, len(found))
	for _, s := range found {
		list = append(list, s)
	}
	slices.SortFunc(list, func(a, b RedirectStatus) int { return a.Key().Compare(b.Key()) })
	return list, errors.Join(errs...)
}

// Read returns the redirects that the kernel holds, sorted by key: at start those that outlived the last process. The
// rules do not tell whether a redirect is for a tunnel, so each is taken to be.
func (r *Realserver) Read(ctx context.Context) ([]ravel.Redirect, error) {
	list, err := r.Status(ctx)
	if err != nil {
		return nil, err
	}
	var redirects []ravel.Redirect
	for _, s := range list {
		x := ravel.Redirect{Key: s.Key(), Name: s.Name, Tunnelled: true, Masquerade: s.Masquerade}
		for _, p := range s.Pods {
			x.Pods = append(x.Pods, p.Addr)
		}
		if slices.SortFunc(x.Pods, netip.AddrPort.Compare); len(x.Pods) > 0 {
			redirects = append(redirects, x)
		}
	}
	return redirects, nil
}

// statusOf reads the lines of iptables-save -c for the nat table.
func statusOf(lines []string, n names) []RedirectStatus {
	type count struct{ packets, bytes uint64 }
	chains := map[string][]string{}
	counts := map[string][]count{}
	for _, line := range lines {
		counter, rest, ok := strings.Cut(line, "] -A ")
		packets, octets, ok2 := strings.Cut(strings.TrimPrefix(counter, "["), ":")
		chain, rule, ok3 := strings.Cut(rest, " ")
		if !ok || !ok2 || !ok3 || !n.ours("nat", chain) {
			continue
		}
		var c count
		c.packets, _ = strconv.ParseUint(packets, 10, 64)
		c.bytes, _ = strconv.ParseUint(octets, 10, 64)
		chains[chain] = append(chains[chain], normal(rule))
		counts[chain] = append(counts[chain], c)
	}
	var list []RedirectStatus
	for key, pods := range redirectsIn(chains, n) {
		s := RedirectStatus{VIP: key.VIP, Proto: key.Proto, Port: key.Port, Held: len(pods) > 0, Pods: []PodStatus{}}
		chain := n.service(key)
		for i, rule := range chains[chain] {
			w := iptables.Words(rule)
			switch pod, err := netip.ParseAddrPort(argument(w, "--to-destination")); {
			case err == nil:
				c := counts[chain][i]
				s.Flows += c.packets
				s.Pods = append(s.Pods, PodStatus{Addr: pod, Probability: 1 / float64(len(pods)), Flows: c.packets, Bytes: c.bytes})
			case argument(w, "-j") == n.masq:
				s.Masquerade = true
			}
		}
		list = append(list, s)
	}
	return list
}

// saveCounters returns the lines of iptables-save -c for the nat table.
func saveCounters(ctx context.Context, t *iptables.Tables) ([]string, error) {
	name := map[iptables.Family]string{iptables.V4: "iptables", iptables.V6: "ip6tables"}[t.Family()]
	path := name + "-save" // not found: the error says so
	found := false
	for _, try := range []string{name + "-" + string(t.Variant()) + "-save", name + "-save"} {
		for _, dir := range append(filepath.SplitList(os.Getenv("PATH")), "/usr/sbin", "/sbin") {
			full := filepath.Join(dir, try)
			if info, err := os.Stat(full); !found && err == nil && info.Mode().IsRegular() {
				path, found = full, true
			}
		}
	}
	out, err := exec.CommandContext(ctx, path, "-c", "-t", "nat").Output()
	if err != nil {
		return nil, err
	}
	return strings.Split(string(bytes.TrimSpace(out)), "\n"), nil
}
