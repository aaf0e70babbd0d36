package e2e

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"net/netip"
	"os"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/ravel-lb/ravel"
	"github.com/ravel-lb/ravel/director"
	"github.com/ravel-lb/ravel/lab/stage"
)

// nodeAddr is the address of a real server, of the VIP's family.
func nodeAddr(node string, vip netip.Addr) netip.Addr {
	v4, v6 := stage.NodeAddrs(node)
	if vip.Is4() {
		return v4
	}
	return v6
}

// dump is what the kernel of a director says of our services, as ravel reads it back: each service's scheduler, flags and
// real servers in the order of the kernel's list.
func dump(ctx context.Context, s *stage.Stage, node string) (map[ravel.ServiceKey]string, error) {
	var services []director.ServiceStatus
	if err := s.Ask(ctx, node, "services", &services); err != nil {
		return nil, fmt.Errorf("%s: %w", node, err)
	}
	table := map[ravel.ServiceKey]string{}
	for _, v := range services {
		if !v.Ours {
			continue
		}
		words := append([]string{v.Scheduler}, v.Flags...)
		if v.OnePacket {
			words = append(words, "ops")
		}
		for _, r := range v.Reals {
			words = append(words, fmt.Sprintf("%s=%d/%s", r.Addr, r.Weight, r.Forwarding))
		}
		table[v.Key()] = strings.Join(words, " ")
	}
	return table, nil
}

// proc is the same as the kernel's own file tells it, without flags: real servers and weights in the order of the list.
// It costs no process and no ravel, so it can be asked often.
func proc(s *stage.Stage, node string) (map[ravel.ServiceKey]string, error) {
	file, err := os.Open(fmt.Sprintf("/proc/%d/net/ip_vs", s.Fleet.Node(node).PID()))
	if err != nil {
		return nil, err
	}
	defer func() { _ = file.Close() }()
	table := map[ravel.ServiceKey]string{}
	var key ravel.ServiceKey
	lines := bufio.NewScanner(bufio.NewReaderSize(file, 1<<16))
	for lines.Scan() {
		words := strings.Fields(lines.Text())
		switch {
		case len(words) >= 3 && (words[0] == "TCP" || words[0] == "UDP"):
			at, err := procAddrPort(words[1])
			if err != nil {
				return nil, err
			}
			key = ravel.ServiceKey{VIP: at.Addr(), Port: at.Port(), Proto: ravel.TCP}
			if words[0] == "UDP" {
				key.Proto = ravel.UDP
			}
			// A director that starts finds out the size of its tables by a service of its own.
			if !key.VIP.IsLoopback() {
				table[key] = words[2]
			}
		case len(words) >= 4 && words[0] == "->" && key.VIP.IsValid() && !key.VIP.IsLoopback():
			at, err := procAddrPort(words[1])
			if err != nil {
				return nil, err
			}
			table[key] += fmt.Sprintf(" %s=%s", at.Addr(), words[3])
		}
	}
	return table, lines.Err()
}

// lines writes a table, a service a line.
func lines(table map[ravel.ServiceKey]string) string {
	var b strings.Builder
	for _, key := range slices.SortedFunc(maps.Keys(table), ravel.ServiceKey.Compare) {
		fmt.Fprintf(&b, "%s: %s\n", key, table[key])
	}
	return b.String()
}

// membersOf is what a test reads of `ravel members -o json`.
type membersOf struct {
	Settled  bool
	Majority bool
	Members  []struct {
		Name     string
		Role     string
		State    string
		Director *struct {
			Settled                                     bool
			WishDiffers, TableDiffers, AvailableDiffers int
		}
		Verdicts []struct {
			Address netip.Addr
			Health  string
			Dead    string
		}
	}
	Differs []struct{ Directors []string }
	Drained []struct{ Name string }
}

// drained are the names that are drained by hand.
func (m membersOf) drained() map[string]bool {
	names := map[string]bool{}
	for _, d := range m.Drained {
		names[d.Name] = true
	}
	return names
}

// dead lists whom a director holds for dead.
func (m membersOf) dead() (addrs []string) {
	for _, member := range m.Members {
		for _, v := range member.Verdicts {
			if v.Dead != "" {
				addrs = append(addrs, fmt.Sprintf("%s %s: %s", member.Name, v.Address, v.Dead))
			}
		}
	}
	return addrs
}

// alike returns the table that all of the directors hold and who they know to be drained by hand, or an error that says
// how they differ: in what their kernels hold, or by their own account of it.
func alike(ctx context.Context, s *stage.Stage, directors ...string) (table map[ravel.ServiceKey]string, drained map[string]bool, err error) {
	var first map[ravel.ServiceKey]string
	for _, d := range directors {
		table, err := dump(ctx, s, d)
		if err != nil {
			return nil, nil, err
		}
		if first == nil {
			first = table
		}
		if !maps.Equal(first, table) {
			return nil, nil, fmt.Errorf("%s and %s hold different tables:\n%s", directors[0], d, diff(lines(first), lines(table)))
		}
	}
	for _, d := range directors {
		var m membersOf
		if err := s.Ask(ctx, d, "members", &m); err != nil {
			return nil, nil, fmt.Errorf("%s: %w", d, err)
		}
		seen := 0
		for _, member := range m.Members {
			of := member.Director
			if of == nil || !slices.Contains(directors, member.Name) {
				continue
			}
			if member.State != "alive" || !of.Settled || of.WishDiffers+of.TableDiffers+of.AvailableDiffers > 0 {
				return nil, nil, fmt.Errorf("%s sees %s %s, %+v", d, member.Name, member.State, *of)
			}
			seen++
		}
		if !m.Settled || seen != len(directors) || len(m.Differs) > 0 {
			return nil, nil, fmt.Errorf("%s: settled %t, sees %d directors, differs %v", d, m.Settled, seen, m.Differs)
		}
		if drained == nil {
			drained = m.drained()
		}
		if !maps.Equal(drained, m.drained()) {
			return nil, nil, fmt.Errorf("%s knows %v to be drained, %s %v", directors[0], drained, d, m.drained())
		}
	}
	return first, drained, nil
}

// takers are the real servers with their weights that should take new flows of each service, by a document: those with
// a ready pod that are not drained by hand.
func takers(d stage.Document, drained map[string]bool) map[ravel.ServiceKey]map[netip.Addr]int {
	want := map[ravel.ServiceKey]map[netip.Addr]int{}
	for _, v := range d.Services {
		for proto, on := range map[ravel.Proto]bool{ravel.TCP: v.TCP, ravel.UDP: v.UDP} {
			if !on {
				continue
			}
			weights := map[netip.Addr]int{}
			for _, e := range d.Endpoints {
				if e.Service == v.Name && !e.Terminating && e.Addr.Is4() == v.VIP.Is4() && !drained[e.Node] && slices.Contains(d.Nodes, e.Node) {
					weights[nodeAddr(e.Node, v.VIP)]++
				}
			}
			want[ravel.ServiceKey{VIP: v.VIP, Proto: proto, Port: uint16(v.Port)}] = weights
		}
	}
	return want
}

// asWanted checks that just those real servers have a weight in a table that should.
func asWanted(table map[ravel.ServiceKey]string, want map[ravel.ServiceKey]map[netip.Addr]int) error {
	var errs []error
	for key, weights := range want {
		text, there := table[key]
		if !there && len(weights) > 0 {
			errs = append(errs, fmt.Errorf("%s is not there", key))
			continue
		}
		got := map[netip.Addr]int{}
		for _, word := range strings.Fields(text) {
			addr, rest, is := strings.Cut(word, "=")
			weight, _, _ := strings.Cut(rest, "/")
			if n, err := strconv.Atoi(weight); is && err == nil && n > 0 {
				got[netip.MustParseAddr(addr)] = n
			}
		}
		if len(weights) > 0 && !maps.Equal(got, weights) {
			errs = append(errs, fmt.Errorf("%s: %s, want the weights %v", key, text, weights))
		}
	}
	return errors.Join(errs...)
}

// agree waits until all directors of the document hold the same table and say so, and the table is what the document and
// the drains by hand ask for. It returns the table.
func agree(t *testing.T, s *stage.Stage, patience time.Duration) map[ravel.ServiceKey]string {
	t.Helper()
	var table map[ravel.ServiceKey]string
	began := time.Now()
	eventually(t, patience, func() error {
		found, drained, err := alike(t.Context(), s, s.Directors()...)
		if table = found; err == nil {
			err = asWanted(table, takers(s.Document(), drained))
		}
		return err
	})
	t.Logf("all tables are alike after %s", time.Since(began).Round(10*time.Millisecond))
	for _, d := range s.Directors() {
		n, err := metric(t.Context(), s, d, "ravel_services_differing")
		must(t, err)
		if n != "0" {
			t.Errorf("%s: ravel_services_differing is %s while all tables are alike", d, n)
		}
	}
	return table
}

// gossipPort is where members listen, by UDP and TCP.
const gossipPort = "7946"

// gossipRules adds or deletes (-I, -D) the rules that drop all gossip between a node and others, or everybody.
func gossipRules(way string, others ...netip.Addr) string {
	var b strings.Builder
	one := func(from, to string) {
		for _, proto := range []string{"udp", "tcp"} {
			for chain, other := range map[string]string{"PREROUTING": from, "OUTPUT": to} {
				fmt.Fprintf(&b, "iptables -w -t raw %s %s -p %s %s -m multiport --ports %s -j DROP\n", way, chain, proto, other, gossipPort)
			}
		}
	}
	if len(others) == 0 {
		one("", "")
	}
	for _, a := range others {
		one("-s "+a.String(), "-d "+a.String())
	}
	return b.String()
}

// deafen cuts a node off from gossip, with some others or with everybody, until the returned function is called or the
// test ends.
func deafen(t *testing.T, s *stage.Stage, node string, others ...string) (heal func()) {
	t.Helper()
	var addrs []netip.Addr
	for _, o := range others {
		addrs = append(addrs, memberAddr(o))
	}
	shell(t, s, node, "set -e\n"+gossipRules("-I", addrs...))
	healed := false
	heal = func() {
		t.Helper()
		if !healed {
			healed = true
			shell(t, s, node, "set -e\n"+gossipRules("-D", addrs...))
		}
	}
	t.Cleanup(heal)
	return heal
}

// memberAddr is where a member gossips.
func memberAddr(node string) netip.Addr {
	if strings.HasPrefix(node, "d") {
		return netip.MustParseAddr("10.1.0.1" + strings.TrimPrefix(node, "d"))
	}
	return nodeAddr(node, stage.VIP4)
}

// number reads a number of the environment.
func number(t *testing.T, name string, otherwise int) int {
	t.Helper()
	text := os.Getenv(name)
	if text == "" {
		return otherwise
	}
	n, err := strconv.Atoi(text)
	if err != nil {
		t.Fatalf("%s: %v", name, err)
	}
	return n
}

// random returns a source of random numbers whose seed is printed, and repeated by RAVEL_TEST_SEED.
func random(t *testing.T) (*rand.Rand, uint64) {
	t.Helper()
	seed := rand.Uint64()
	if text := os.Getenv("RAVEL_TEST_SEED"); text != "" {
		var err error
		seed, err = strconv.ParseUint(text, 10, 64)
		must(t, err)
	}
	t.Logf("RAVEL_TEST_SEED=%d", seed)
	return rand.New(rand.NewPCG(seed, 0)), seed
}
