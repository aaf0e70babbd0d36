package realserver

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/ravel-lb/ravel"
	"github.com/ravel-lb/ravel/internal/iptables"
)

// fakeTables are one family's tables in memory, with the laws of the real ones that matter here: a table changes whole
// or not at all, a rule may jump to chains that are there only, and a chain that is jumped to cannot go.
type fakeTables struct {
	mu       sync.Mutex
	tables   map[string]map[string][]string
	restores []string // each transaction's text
	failNext int      // the nth call from now fails; 0 none does
}

var _ tables = (*fakeTables)(nil)

var errFake = errors.New("the fake kernel fails")

func newFakeTables() *fakeTables {
	return &fakeTables{tables: map[string]map[string][]string{
		"mangle": {"PREROUTING": nil, "INPUT": nil, "FORWARD": nil, "OUTPUT": nil, "POSTROUTING": nil},
		"filter": {"INPUT": nil, "FORWARD": nil, "OUTPUT": nil},
		"nat":    {"PREROUTING": nil, "INPUT": nil, "OUTPUT": nil, "POSTROUTING": nil},
	}}
}

func (f *fakeTables) failing() bool {
	if f.failNext > 0 {
		f.failNext--
		return f.failNext == 0
	}
	return false
}

// Restore implements tables.
func (f *fakeTables) Restore(_ context.Context, input string) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.failing() {
		return errFake
	}
	f.restores = append(f.restores, input)
	var table string
	var chains map[string][]string
	for line := range strings.Lines(input) {
		line = strings.TrimSuffix(line, "\n")
		command, rest, _ := strings.Cut(line, " ")
		chain, rule, _ := strings.Cut(rest, " ")
		switch {
		case line[0] == '*':
			table, chains = line[1:], maps.Clone(f.tables[line[1:]])
		case line[0] == ':':
			chains[command[1:]] = nil
		case line == "COMMIT":
			f.tables[table] = chains
		case command == "-A":
			if _, there := chains[chain]; !there {
				return fmt.Errorf("%s: no chain %s", line, chain)
			}
			if to := argument(iptables.Words(rule), "-j"); strings.HasPrefix(to, "RAVEL") {
				if _, there := chains[to]; !there {
					return fmt.Errorf("%s: no chain %s", line, to)
				}
			}
			chains[chain] = append(slices.Clip(chains[chain]), rule)
		case command == "-X":
			if rules, there := chains[chain]; !there || len(rules) > 0 {
				return fmt.Errorf("%s: no such empty chain", line)
			}
			for from, rules := range chains {
				if slices.ContainsFunc(rules, func(r string) bool {
					w := iptables.Words(r)
					return argument(w, "-j") == chain || argument(w, "-g") == chain
				}) {
					return fmt.Errorf("%s: %s jumps there", line, from)
				}
			}
			delete(chains, chain)
		default:
			return fmt.Errorf("bad line %q", line)
		}
	}
	return nil
}

// Save implements tables.
func (f *fakeTables) Save(_ context.Context, table string) ([]string, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.failing() {
		return nil, errFake
	}
	var lines []string
	for _, chain := range slices.Sorted(maps.Keys(f.tables[table])) {
		lines = append(lines, ":"+chain+" - [0:0]")
	}
	for _, chain := range slices.Sorted(maps.Keys(f.tables[table])) {
		for _, rule := range f.tables[table][chain] {
			lines = append(lines, "-A "+chain+" "+rule)
		}
	}
	return lines, nil
}

// Rules implements tables.
func (f *fakeTables) Rules(_ context.Context, table, chain string) ([]string, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.failing() {
		return nil, errFake
	}
	var lines []string
	for _, rule := range f.tables[table][chain] {
		lines = append(lines, "-A "+chain+" "+rule)
	}
	return lines, nil
}

// EnsureFirst implements tables.
func (f *fakeTables) EnsureFirst(_ context.Context, table, chain string, rule []string) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.failing() {
		return errFake
	}
	if _, there := f.tables[table][rule[1]]; !there {
		return fmt.Errorf("no chain %s", rule[1])
	}
	jump := strings.Join(rule, " ")
	rest := slices.DeleteFunc(slices.Clone(f.tables[table][chain]), func(r string) bool { return r == jump })
	f.tables[table][chain] = append([]string{jump}, rest...)
	return nil
}

// Stamp implements tables: with the worst of the real ones it tells just how many rules there are.
func (f *fakeTables) Stamp(table string) (uint64, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.failing() {
		return 0, errFake
	}
	n := uint64(1)
	for _, rules := range f.tables[table] {
		n += 1 + uint64(len(rules))
	}
	return n, nil
}

// Remove implements tables.
func (f *fakeTables) Remove(_ context.Context, table, chain string, rule []string) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.failing() {
		return errFake
	}
	f.tables[table][chain] = slices.DeleteFunc(slices.Clone(f.tables[table][chain]),
		func(r string) bool { return r == strings.Join(rule, " ") })
	return nil
}

// fakeNetwork is the rest of the kernel.
type fakeNetwork struct {
	routes    map[netip.Addr]route // others are on-link
	tunnel    error                // of prepareTunnel
	shared    bool                 // an overlay uses the tunnel devices
	sharedErr error
	up        map[string]bool
	flows     map[ravel.ServiceKey][]netip.AddrPort // UDP, by what answers
	deletes   int                                   // how often conntrack was looked through
	fail      error                                 // of deleteFlows
}

var _ network = (*fakeNetwork)(nil)

func (n *fakeNetwork) route(to netip.Addr) (route, error) {
	if r, there := n.routes[to]; there {
		return r, nil
	}
	return route{link: "eth0", mtu: 1500, onLink: true}, nil
}

func (n *fakeNetwork) prepareTunnel(string, bool) error { return n.tunnel }

func (n *fakeNetwork) tunnelShared(string) (bool, error) { return n.shared, n.sharedErr }

func (n *fakeNetwork) startTunnel(device string) error {
	n.up[device] = true
	return nil
}

func (n *fakeNetwork) stopTunnel(device string, dryRun bool) ([]string, error) {
	if !n.up[device] {
		return nil, nil
	}
	if !dryRun {
		delete(n.up, device)
	}
	return []string{"ip link set " + device + " down"}, nil
}

func (n *fakeNetwork) deleteFlows(v6 bool, match func(ravel.ServiceKey, netip.AddrPort) bool) (int, error) {
	n.deletes++
	if n.fail != nil {
		return 0, n.fail
	}
	count := 0
	for key, servers := range n.flows {
		left := slices.DeleteFunc(slices.Clone(servers), func(s netip.AddrPort) bool { return key.VIP.Is6() == v6 && match(key, s) })
		count += len(servers) - len(left)
		n.flows[key] = left
	}
	return count, nil
}

// fakeReal returns a Realserver on two fake families.
func fakeReal(t testing.TB) (*Realserver, [2]*fakeTables, *fakeNetwork) {
	t.Helper()
	r, _ := fakeOptions(t, Options{})
	v4, v6 := newFakeTables(), newFakeTables()
	n := &fakeNetwork{up: map[string]bool{}, flows: map[ravel.ServiceKey][]netip.AddrPort{}}
	r.net = n
	r.families = []*family{newFamily(nil, false), newFamily(nil, true)}
	r.families[0].tables, r.families[1].tables = v4, v6
	return r, [2]*fakeTables{v4, v6}, n
}
