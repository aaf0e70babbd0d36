// Package traffic makes the lab's traffic and says exactly what became of it: pods that answer with their name, and
// clients that keep long flows, short requests and datagram streams going and count every failure by its kind.
package traffic

import (
	"maps"
	"net/netip"
	"slices"
	"time"
)

// Load is what one client process does.
type Load struct {
	Flows    []Flows
	Requests []Requests
	Streams  []Streams
}

// Flows are TCP connections that stay open, each with one request at a time. A flow that breaks stays broken.
type Flows struct {
	Name   string // of the group in reports
	Target netip.AddrPort
	Count  int
	Every  time.Duration // between two requests of a flow
	// Timeout is how long a flow waits for a connection or an answer before it counts as broken; 30 s unless set.
	Timeout time.Duration
}

// Requests are connections that carry one request each: connect, send, read, close.
type Requests struct {
	Name   string
	Target netip.AddrPort
	Rate   float64 // begun per second, however slow the answers are
	// Timeout is for all of a request; 5 s unless set. Below 3 s a lost SYN, repeated after 1 s, would be a failure.
	Timeout time.Duration
}

// Streams are UDP sockets that send numbered datagrams.
type Streams struct {
	Name   string
	Target netip.AddrPort
	Count  int
	Every  time.Duration // between two datagrams of a stream
}

// Report is what happened since the start or the last reset.
type Report struct {
	Flows    []FlowReport
	Requests []RequestReport
	Streams  []StreamReport
}

// FlowReport says how a group of flows fared.
type FlowReport struct {
	Name     string
	Count    int // flows wanted
	Open     int // connected, answered at least once ever, and not broken
	Answered int // requests answered
	// Silent are open flows whose request has waited for its answer for over 1 s.
	Silent int
	// OtherPod counts answers that came from another pod than the flow's first answer did.
	OtherPod int
	// Broken are the flows that broke, by kind: refused, reset, closed, timeout, unreachable, garbled, other.
	Broken map[string]int
	// LongestWait is the longest time that a request of an open flow waited for its answer, until now if it still does.
	LongestWait time.Duration
	Pods        map[string]int // open flows by pod
	Examples    []string       // what a few of the failures said
}

// RequestReport says how a group of requests fared.
type RequestReport struct {
	Name     string
	Begun    int
	Answered int
	Failed   map[string]int // by kind, as for flows
	Slowest  time.Duration  // of those that were answered
	Pods     map[string]int // answers by pod
	Examples []string
}

// Failures returns the sum of Failed.
func (r RequestReport) Failures() int { return sum(r.Failed) }

// StreamReport says how a group of streams fared.
type StreamReport struct {
	Name     string
	Count    int
	Sent     int
	Answered int
	// Lost were not answered within 3 s; a late answer is not taken back.
	Lost int
	// OtherPod counts answers that came from another pod than the stream's last answer did.
	OtherPod   int
	LongestGap time.Duration // the longest time that a stream was without an answer, until now if it still is
	Errors     map[string]int
	Pods       map[string]int // streams by the pod that answered last
}

// Merge adds reports of several clients together, group by group as they are named.
func Merge(reports ...Report) Report {
	var all Report
	for _, r := range reports {
		for _, f := range r.Flows {
			i := slices.IndexFunc(all.Flows, func(g FlowReport) bool { return g.Name == f.Name })
			if i < 0 {
				all.Flows = append(all.Flows, FlowReport{Name: f.Name})
				i = len(all.Flows) - 1
			}
			g := &all.Flows[i]
			g.Count += f.Count
			g.Open += f.Open
			g.Answered += f.Answered
			g.Silent += f.Silent
			g.OtherPod += f.OtherPod
			g.Broken = added(g.Broken, f.Broken)
			g.LongestWait = max(g.LongestWait, f.LongestWait)
			g.Pods = added(g.Pods, f.Pods)
			g.Examples = examples(g.Examples, f.Examples...)
		}
		for _, q := range r.Requests {
			i := slices.IndexFunc(all.Requests, func(g RequestReport) bool { return g.Name == q.Name })
			if i < 0 {
				all.Requests = append(all.Requests, RequestReport{Name: q.Name})
				i = len(all.Requests) - 1
			}
			g := &all.Requests[i]
			g.Begun += q.Begun
			g.Answered += q.Answered
			g.Failed = added(g.Failed, q.Failed)
			g.Slowest = max(g.Slowest, q.Slowest)
			g.Pods = added(g.Pods, q.Pods)
			g.Examples = examples(g.Examples, q.Examples...)
		}
		for _, s := range r.Streams {
			i := slices.IndexFunc(all.Streams, func(g StreamReport) bool { return g.Name == s.Name })
			if i < 0 {
				all.Streams = append(all.Streams, StreamReport{Name: s.Name})
				i = len(all.Streams) - 1
			}
			g := &all.Streams[i]
			g.Count += s.Count
			g.Sent += s.Sent
			g.Answered += s.Answered
			g.Lost += s.Lost
			g.OtherPod += s.OtherPod
			g.LongestGap = max(g.LongestGap, s.LongestGap)
			g.Errors = added(g.Errors, s.Errors)
			g.Pods = added(g.Pods, s.Pods)
		}
	}
	return all
}

func added(a, b map[string]int) map[string]int {
	out := maps.Clone(a)
	if out == nil {
		out = map[string]int{}
	}
	for k, n := range b {
		out[k] += n
	}
	return out
}

// examples keeps the first few.
func examples(have []string, more ...string) []string {
	have = append(have, more...)
	return have[:min(len(have), 5)]
}

func sum(m map[string]int) (total int) {
	for _, n := range m {
		total += n
	}
	return total
}
