package config

import (
	"github.com/ravel-lb/ravel"
	"github.com/ravel-lb/ravel/internal/config/doc"
	"github.com/ravel-lb/ravel/internal/desired"
)

// ParseCluster reads a cluster document that stands alone, as a key of a ConfigMap does, YAML or JSON: what a static file
// has under cluster, by the same rules and with the same places. Nodes and Endpoints of the value are empty. VIPs of
// the pool get the service d where the document has no default service; nil is none. Its error is an *Error.
func ParseCluster(b []byte, d *desired.DefaultService) (desired.Cluster, []ravel.Problem, error) {
	out, warnings, err := parsePart(b, "cluster", parser{standard: d}, (*parser).cluster)
	return out.Cluster, warnings, err
}

// ParseFleet reads a fleet document that stands alone: what a static file has under fleet, by the same rules and with the
// same places. Its error is an *Error.
func ParseFleet(b []byte) (desired.Fleet, []ravel.Problem, error) {
	out, warnings, err := parsePart(b, "fleet", parser{}, (*parser).fleet)
	return out.Fleet, warnings, err
}

func parsePart(b []byte, part string, p parser, read func(*parser, doc.Value)) (Static, []ravel.Problem, error) {
	var report doc.Report
	if root, ok := doc.ParsePart(b, part, &report); ok {
		if root.IsNull() {
			root.Fault("is nothing: want a mapping")
		} else {
			read(&p, root)
		}
		if len(report.Faults()) == 0 {
			return p.out, report.Warnings(), nil
		}
	}
	return Static{}, nil, &Error{Faults: report.Faults()}
}
