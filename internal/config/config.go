// Package config turns documents into values: the static file, which is the cluster document, the fleet document, the
// nodes and the endpoints in one, becomes a desired.Cluster and a desired.Fleet.
//
// Parse is strict and names every fault of a document at once, each with its place. What it returns keeps all that
// the fields of package desired promise. File watches a file and holds the last good value: a file that turns bad, or
// vanishes, is logged and counted, and changes nothing else.
package config

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"

	"github.com/ravel-lb/ravel"
	"github.com/ravel-lb/ravel/internal/config/doc"
	"github.com/ravel-lb/ravel/internal/desired"
)

// Static is what a static file says.
type Static struct {
	Cluster desired.Cluster
	Fleet   desired.Fleet
	// Warnings are parts of the document that were left out, or that mean less than they seem to.
	Warnings []ravel.Problem
	// Unknown are the services of the cluster that no endpoint names, ready or not. The document is valid, since a
	// service may have lost its last pod, but in a file this is most often a misspelt name: `ravel check` fails.
	Unknown []ravel.Problem
}

// Error is why a document was refused.
type Error struct {
	Faults []ravel.Problem // in the order of the document, never empty
}

// Error returns the faults, one a line.
func (e *Error) Error() string {
	lines := make([]string, len(e.Faults))
	for i, f := range e.Faults {
		lines[i] = f.String()
	}
	return strings.Join(lines, "\n")
}

// Parse reads a static file, YAML or JSON. Its error is an *Error.
func Parse(b []byte) (Static, error) { return ParseWith(b, nil) }

// ParseWith is Parse, with a default service for the VIPs of the pool where the document has none; nil is none.
func ParseWith(b []byte, d *desired.DefaultService) (Static, error) {
	var report doc.Report
	if root, ok := doc.Parse(b, &report); ok {
		p := parser{standard: d}
		p.static(root)
		if faults := report.Faults(); len(faults) == 0 {
			p.out.Warnings = report.Warnings()
			return p.out, nil
		}
	}
	return Static{}, &Error{Faults: report.Faults()}
}

// hop is a director's address.
type hop struct {
	director string
	place    doc.Value
}

// parser fills in what a document says. Where it reports a fault the value is not used.
type parser struct {
	out      Static
	standard *desired.DefaultService // where the document has none
	vips     map[string]doc.Value    // by canonical address: where the VIP stands
	hops     map[netip.Addr]hop      // the addresses of directors
}

func (p *parser) static(root doc.Value) {
	o, ok := root.Object("cluster", "fleet", "nodes", "endpoints")
	if !ok {
		return
	}
	// All four must be there, if only as {} or []: a file that was cut off, or is half written, is likely to lack one,
	// and must not be taken for the wish to have nothing.
	if v, ok := part(o, "cluster", "{}"); ok {
		p.cluster(v)
	}
	if v, ok := part(o, "fleet", "{}"); ok {
		p.fleet(v)
	}
	if v, ok := part(o, "nodes", "[]"); ok {
		p.nodes(v)
	}
	if v, ok := part(o, "endpoints", "[]"); ok {
		p.endpoints(v)
	}
	p.unknown()
	p.out.Fleet = p.out.Fleet.WithNodes(p.out.Cluster.Nodes)
}

func part(o *doc.Object, key, empty string) (doc.Value, bool) {
	v, ok := o.Get(key)
	switch {
	case !ok:
		o.Fault("%s is missing: where none is meant, write %s: %s", key, key, empty)
		return v, false
	case v.IsNull():
		v.KeyFault("is nothing: where none is meant, write %s: %s", key, empty)
		return v, false
	}
	return v, true
}

// unknown finds the services that no endpoint names.
func (p *parser) unknown() {
	type ref struct{ namespace, service, port string }
	known := map[ref]bool{}
	ports := map[ref][]string{} // by namespace and service
	for _, e := range p.out.Cluster.Endpoints {
		if r := (ref{e.Namespace, e.Service, e.PortName}); !known[r] {
			known[r] = true
			r.port = ""
			ports[r] = append(ports[r], fmt.Sprintf("%q", e.PortName))
		}
	}
	for _, s := range p.out.Cluster.Services {
		if known[ref{s.Namespace, s.Service, s.PortName}] {
			continue
		}
		what := fmt.Sprintf("service %s is unknown: no endpoint names it, so it gets no traffic", s.Name())
		if names := ports[ref{s.Namespace, s.Service, ""}]; names != nil {
			slices.Sort(names)
			what += fmt.Sprintf("; %s/%s has the port names %s", s.Namespace, s.Service, strings.Join(names, ", "))
		}
		problem := ravel.Problem{Where: s.Where, What: what}
		if !slices.Contains(p.out.Unknown, problem) {
			p.out.Unknown = append(p.out.Unknown, problem)
		}
	}
}
