package desired

import (
	"maps"
	"net/netip"
	"slices"
	"strings"
)

// WithNodes returns the fleet with those nodes as directors that have all labels of DirectorNodes: by their names, with
// the first address of each family and their labels. A node that is a director of the list by its name or by an address,
// and one without an address, adds nothing. f is not changed, and the order of nodes does not matter.
func (f Fleet) WithNodes(nodes []Node) Fleet {
	if len(f.DirectorNodes) == 0 {
		return f
	}
	names, owners := map[string]bool{}, map[netip.Addr]bool{}
	know := func(d FleetDirector) {
		names[d.Name] = true
		for _, a := range d.Addrs {
			owners[a] = true
		}
	}
	for _, d := range f.Directors {
		know(d)
	}
	var chosen []Node
	for _, n := range nodes {
		if f.HasDirectorLabels(n) {
			chosen = append(chosen, n)
		}
	}
	slices.SortFunc(chosen, func(a, b Node) int { return strings.Compare(a.Name, b.Name) })
	directors := slices.Clip(f.Directors)
	for _, n := range chosen {
		d := FleetDirector{Name: n.Name, Labels: maps.Clone(n.Labels)}
		for _, unspecified := range []netip.Addr{netip.IPv4Unspecified(), netip.IPv6Unspecified()} {
			if a, has := firstOf(n.Addrs, unspecified); has {
				d.Addrs = append(d.Addrs, a)
			}
		}
		if len(d.Addrs) == 0 || names[n.Name] || slices.ContainsFunc(d.Addrs, func(a netip.Addr) bool { return owners[a] }) {
			continue
		}
		know(d)
		directors = append(directors, d)
	}
	f.Directors = directors
	return f
}

// HasDirectorLabels reports whether a node has all labels of DirectorNodes, of which there is one at least.
func (f Fleet) HasDirectorLabels(n Node) bool {
	return len(f.DirectorNodes) > 0 && hasAll(n.Labels, f.DirectorNodes)
}
