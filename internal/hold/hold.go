// Package hold keeps a change of the documents that takes away too much at once from taking effect, until an operator
// accepts it.
//
// What counts is what the documents take away: VIPs, and real servers that they let be such. What a cluster reports of
// itself, that a node died or is cordoned and that pods went, always takes effect: to hold it would send flows to who is
// not there. Processes that had the same documents in force and are given the same new ones decide alike.
package hold

import (
	"cmp"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"hash"
	"maps"
	"net/netip"
	"reflect"
	"slices"
	"strings"

	"github.com/ravel-lb/ravel"
	"github.com/ravel-lb/ravel/internal/desired"
)

// Documents are what a process goes by. They are never changed after they are made.
type Documents struct {
	Cluster desired.Cluster
	Fleet   desired.Fleet
	// Reported says that the nodes and endpoints are not an operator's words but what a cluster tells of itself.
	Reported bool
	// Also are services that Cluster does not name, and of which all endpoints are told all the same.
	Also []desired.Service `json:"-"`
}

// Same reports whether two are alike, where lists count as alike only if they are the very same in memory.
func (d Documents) Same(other Documents) bool {
	return d.Reported == other.Reported && slices.EqualFunc(d.Also, other.Also, samePods) && alike(d.Cluster, other.Cluster) && alike(d.Fleet, other.Fleet)
}

// sameWishes is Same without nodes and endpoints, and whose they are.
func (d Documents) sameWishes(other Documents) bool {
	for _, x := range []*Documents{&d, &other} {
		x.Cluster.Nodes, x.Cluster.Endpoints, x.Also = nil, nil, nil
	}
	return d.Same(other)
}

// alike compares the fields of two structs, those too that this package knows nothing of.
func alike[T any](a, b T) bool {
	x, y := reflect.ValueOf(a), reflect.ValueOf(b)
	for i := range x.NumField() {
		f, g := x.Field(i), y.Field(i)
		same := false
		if f.Kind() == reflect.Slice {
			same = f.Len() == g.Len() && (f.Len() == 0 || f.Pointer() == g.Pointer())
		} else {
			same = reflect.DeepEqual(f.Interface(), g.Interface())
		}
		if !same {
			return false
		}
	}
	return true
}

// pods is how a service names its endpoints.
type pods struct{ namespace, service, port string }

func podsOf(s desired.Service) pods      { return pods{s.Namespace, s.Service, s.PortName} }
func endpointOf(e desired.Endpoint) pods { return pods{e.Namespace, e.Service, e.PortName} }

func samePods(a, b desired.Service) bool { return podsOf(a) == podsOf(b) }

// Name is a name for what documents want, as far as this package goes: the VIPs and what they lead to, who may be a real
// server, who announces. It does not depend on the order of anything, nor on pods that come and go.
func (d Documents) Name() string {
	var lines []string
	line := func(words ...any) { lines = append(lines, fmt.Sprintf("%q", words)) }
	there := map[pods]bool{}
	for _, e := range d.Cluster.Endpoints {
		there[endpointOf(e)] = true
	}
	for _, s := range d.Cluster.Services {
		p := podsOf(s)
		line("service", s.Key.String(), p.namespace, p.service, p.port, !d.Reported && there[p])
	}
	for key, value := range d.Cluster.Labels {
		line("label", key, value)
	}
	if !d.Reported {
		for _, n := range d.Cluster.Nodes {
			words := []any{"node", n.Name, fmt.Sprint(n.Addrs)}
			for _, key := range slices.Sorted(maps.Keys(n.Labels)) {
				words = append(words, key, n.Labels[key])
			}
			line(words...)
		}
	}
	for _, own := range d.Fleet.Directors {
		line("director", own.Name, fmt.Sprint(own.Addrs))
	}
	for key, value := range d.Fleet.DirectorNodes {
		line("director label", key, value)
	}
	line("peers", len(d.Fleet.Peers) > 0)
	return nameOf(sha256.New(), lines)
}

func nameOf(h hash.Hash, lines []string) string {
	slices.Sort(lines)
	h.Write([]byte(strings.Join(lines, "\n")))
	return hex.EncodeToString(h.Sum(nil))[:16]
}

// told tells whose pods the cluster tells all of.
func (d Documents) told() map[pods]bool {
	named := map[pods]bool{}
	for _, e := range d.Cluster.Endpoints {
		named[endpointOf(e)] = true
	}
	for _, s := range slices.Concat(d.Cluster.Services, d.Also) {
		named[podsOf(s)] = true
	}
	return named
}

// instead returns what is in force while newest is held: these documents, and of nodes and endpoints what a cluster
// reports. Of pods that the new ones do not name, and so nothing may be told of, the last that was known stays.
func (d Documents) instead(newest Documents) Documents {
	if !d.Reported && !newest.Reported {
		return d
	}
	named := newest.told()
	wanted := map[pods]bool{}
	for _, s := range d.Cluster.Services {
		wanted[podsOf(s)] = !named[podsOf(s)]
	}
	var stay []desired.Endpoint
	for _, e := range d.Cluster.Endpoints {
		if wanted[endpointOf(e)] {
			stay = append(stay, e)
		}
	}
	if d.Reported = newest.Reported; len(stay) > 0 {
		stay = append(slices.Clip(newest.Cluster.Endpoints), stay...)
	} else {
		stay = newest.Cluster.Endpoints
	}
	d.Cluster.Nodes, d.Cluster.Endpoints = newest.Cluster.Nodes, stay
	return d
}

// Part is what a change takes away of one kind.
type Part struct {
	What string   `json:"what"` // VIPs, VIPs with endpoints, real servers or announced VIPs
	Lost []string `json:"lost"` // sorted
	Of   int      `json:"of"`   // how many there are
}

// few is as many of a kind as may go in one change, as long as one stays.
const few = 3

// tooMuch reports whether more goes than a share, in percent, of all. Where there are only a few, any number may go but
// all.
func (p Part) tooMuch(share int) bool {
	return len(p.Lost) > 0 && share < 100 && (p.Of > few || len(p.Lost) == p.Of) && 100*len(p.Lost) > share*p.Of
}

// String is "5 of 6 VIPs (192.0.2.1, 192.0.2.2, 192.0.2.3 and 2 more)".
func (p Part) String() string {
	const most = 3
	names := strings.Join(p.Lost[:min(most, len(p.Lost))], ", ")
	if more := len(p.Lost) - most; more > 0 {
		names += fmt.Sprintf(" and %d more", more)
	}
	many := fmt.Sprintf("%d of %d", len(p.Lost), p.Of)
	if len(p.Lost) == p.Of {
		many = fmt.Sprintf("all %d", p.Of)
	}
	return many + " " + p.What + " (" + names + ")"
}

// Weigh returns of what more than a share, in percent, goes where to takes the place of from; nil is a change that need
// not wait. With a share of 100 none does.
func Weigh(from, to Documents, share int) []Part {
	if share >= 100 {
		return nil
	}
	from = from.instead(to)
	var parts []Part
	add := func(what string, before, after map[string]bool) {
		p := Part{What: what, Of: len(before)}
		for name := range before {
			if !after[name] {
				p.Lost = append(p.Lost, name)
			}
		}
		slices.SortFunc(p.Lost, compareNames)
		if p.tooMuch(share) && !slices.ContainsFunc(parts, func(o Part) bool { return slices.Equal(o.Lost, p.Lost) }) {
			parts = append(parts, p)
		}
	}
	all := func(desired.Service) bool { return true }
	add("VIPs", from.vips(all), to.vips(all))
	add("VIPs with endpoints", from.vips(from.hasPods()), to.vips(to.hasPods()))
	add("announced VIPs", from.vips(from.announces()), to.vips(to.announces()))

	// A node without pods is no real server either; but that its pods went is not what a document did.
	still := to
	still.Cluster.Endpoints = from.Cluster.Endpoints
	after := still.realServers()
	maps.Copy(after, to.realServers())
	add("real servers", from.realServers(), after)
	return parts
}

// compareNames orders addresses as such, and before other names.
func compareNames(a, b string) int {
	x, errX := netip.ParseAddr(a)
	y, errY := netip.ParseAddr(b)
	switch {
	case errX == nil && errY == nil:
		return x.Compare(y)
	case errX == nil || errY == nil:
		return cmp.Compare(b2i(errX != nil), b2i(errY != nil))
	}
	return cmp.Compare(a, b)
}

func b2i(b bool) int {
	if b {
		return 1
	}
	return 0
}

func (d Documents) vips(that func(desired.Service) bool) map[string]bool {
	vips := map[string]bool{}
	for _, s := range d.Cluster.Services {
		if that(s) {
			vips[s.Key.VIP.String()] = true
		}
	}
	return vips
}

// hasPods tells whether a service has any endpoint, in whatever state.
func (d Documents) hasPods() func(desired.Service) bool {
	there := map[pods]bool{}
	for _, e := range d.Cluster.Endpoints {
		there[endpointOf(e)] = true
	}
	return func(s desired.Service) bool { return there[podsOf(s)] }
}

// announces tells whether there is a director that can announce a service's VIP, and a router to hear of it.
func (d Documents) announces() func(desired.Service) bool {
	families := map[bool]bool{}
	for _, own := range d.Fleet.Directors {
		for _, a := range own.Addrs {
			families[a.Is4()] = len(d.Fleet.Peers) > 0
		}
	}
	if len(d.Fleet.DirectorNodes) > 0 { // which nodes have the labels, the cluster reports
		families[true], families[false] = len(d.Fleet.Peers) > 0, len(d.Fleet.Peers) > 0
	}
	return func(s desired.Service) bool { return families[s.Key.VIP.Is4()] }
}

func (d Documents) realServers() map[string]bool {
	names := map[string]bool{}
	for _, n := range desired.RealServers(desired.Inputs{Cluster: d.Cluster, Fleet: d.Fleet.WithNodes(d.Cluster.Nodes)}) {
		names[n.Name] = true
	}
	return names
}

// Change is one that waits.
type Change struct {
	Name  string `json:"name"`  // of the documents that it leads to
	Parts []Part `json:"parts"` // what it would take away, and too much of it; empty where that is not known here
	// Empty says that the documents name no VIP, and nothing is known of before: nobody else need hold them.
	Empty bool `json:"empty,omitempty"`
}

// Takes says what it would take away.
func (c Change) Takes() string {
	words := make([]string, len(c.Parts))
	for i, p := range c.Parts {
		words[i] = p.String()
	}
	return strings.Join(words, ", and ")
}

// Where is the place of the Problem that a change waits.
const Where = "change"

// Problem says that the change waits, and what to do.
func (c Change) Problem() ravel.Problem {
	switch {
	case c.Empty:
		return ravel.Problem{
			Where: "documents", What: "they name no VIP, and what was in force before is not known here: this host stays as it was found",
			Fix: "documents with a VIP take effect at once; ravel accept lets these through",
		}
	case len(c.Parts) == 0:
		return ravel.Problem{
			Where: Where, What: "the documents are a change that others hold (" + c.Name + "), and what was in force before is not known here: " +
				"this host stays as it was found",
			Fix: "ravel accept lets it through; or change the documents",
		}
	}
	return ravel.Problem{
		Where: Where, What: "is held (" + c.Name + "), and what was in force before goes on: it would take away " + c.Takes() + " at once",
		Fix: "ravel plan held shows it, ravel accept lets it through; or change the documents",
	}
}
