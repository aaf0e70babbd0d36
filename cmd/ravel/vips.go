package main

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"

	"github.com/urfave/cli/v2"

	"github.com/ravel-lb/ravel"
	"github.com/ravel-lb/ravel/internal/admin"
	"github.com/ravel-lb/ravel/internal/desired"
	"github.com/ravel-lb/ravel/internal/node"
)

// vipStatus is one VIP as `ravel vips` shows it.
type vipStatus struct {
	VIP       netip.Addr `json:"vip"`
	Wanted    bool       `json:"wanted"`    // the documents have it
	Held      bool       `json:"held"`      // our link holds it
	Announced bool       `json:"announced"` // its route is in the RIB; routers have it once their session is up
	// Services are those of the VIP, wanted or still there; Serving those with a real server for new flows, or on a
	// realserver with a pod.
	Services int `json:"services"`
	Serving  int `json:"serving"`
	// NextHop and the communities are of the route that is wanted.
	NextHop     netip.Addr `json:"nextHop,omitzero"`
	Communities []string   `json:"communities,omitempty"`
	// Why says what keeps it from being announced, or held.
	Why string `json:"why,omitempty"`
}

// vipsAnswer is what a running process says of its VIPs.
type vipsAnswer struct {
	Role string      `json:"role"`
	Node string      `json:"node"`
	VIPs []vipStatus `json:"vips"`
	// Unknown says that no document is in force, so that nothing is wanted yet.
	Unknown bool `json:"unknown,omitempty"`
	// Unlisted says that the document knows no node of the realserver's name.
	Unlisted bool `json:"unlisted,omitempty"`
	// Fleet are its settings that an operator should not forget.
	Fleet standing `json:"fleet,omitzero"`
}

// vips joins what is wanted with what the last walk left.
func (p *process) vips(n *node.Node) vipsAnswer {
	c, known := p.computed.Latest()
	report, _ := n.Reports().Latest()
	byVIP := map[netip.Addr]*vipStatus{}
	at := func(vip netip.Addr) *vipStatus {
		if byVIP[vip] == nil {
			byVIP[vip] = &vipStatus{VIP: vip}
		}
		return byVIP[vip]
	}
	for _, a := range c.state.Addrs {
		at(a.VIP).Wanted = true
	}
	for _, vip := range report.HeldVIPs {
		at(vip).Held = true
	}
	for _, vip := range report.Announced {
		at(vip).Announced = true
	}
	for _, s := range report.Effective.Services {
		v := at(s.Key.VIP)
		v.Services++
		if s.TakesNewFlows() {
			v.Serving++
		}
	}
	for _, r := range report.Effective.Redirects {
		v := at(r.Key.VIP)
		v.Services++
		v.Serving++
	}
	routes := map[netip.Addr]bool{}
	for _, r := range c.state.Routes {
		v := at(r.Prefix.Addr())
		routes[v.VIP] = true
		v.NextHop = r.NextHop
		for _, community := range r.Communities {
			v.Communities = append(v.Communities, community.String())
		}
		for _, community := range r.LargeCommunities {
			v.Communities = append(v.Communities, community.String())
		}
	}
	answer := vipsAnswer{Role: p.role.String(), Node: p.settings.node, Unknown: !known, Fleet: p.standing(p.known())}
	answer.Unlisted = known && p.role == ravel.Realserver && !c.inputs.Listed()
	for _, v := range byVIP {
		v.Why = p.why(*v, routes[v.VIP], c, report)
		answer.VIPs = append(answer.VIPs, *v)
	}
	slices.SortFunc(answer.VIPs, func(a, b vipStatus) int { return a.VIP.Compare(b.VIP) })
	return answer
}

// Reasons for which a VIP that is wanted is not announced, and that are as it should be.
const (
	whyAttractNone = "--attract=none"
	whyNoReal      = "no real server takes new flows"
	whySomeNoReal  = "not every service takes new flows"
	whyRise        = "its real servers wait to rise"
	whyDrained     = "this director is drained"
	whyWithdrawn   = "this director holds back: see ravel members"
)

// failed reports whether a VIP is wanted and for a fault is not announced, or on a realserver not held.
func (v vipStatus) failed() bool {
	switch v.Why {
	case "", whyAttractNone, whyNoReal, whySomeNoReal, whyRise, whyDrained:
		return false
	}
	return v.Wanted
}

// why says what keeps a VIP from being announced by a director, or held by a realserver.
func (p *process) why(v vipStatus, routed bool, c computed, report node.Report) string {
	fault := "the last walk through the appliers did not end well: see ravel check"
	switch {
	case !v.Wanted:
		return "removed; served until its linger is over"
	case p.role == ravel.Realserver && v.Held, v.Announced:
		return ""
	case p.role == ravel.Realserver && report.Err != nil:
		return fault
	case p.role == ravel.Realserver:
		return "a problem keeps its redirect from work: see ravel check"
	case c.inputs.AttractNone:
		return whyAttractNone
	case !routed && withdrawn(c.inputs, v.VIP) && c.result.Fleet.Drained(c.inputs.Node):
		return whyDrained
	case !routed && withdrawn(c.inputs, v.VIP):
		return whyWithdrawn
	case !routed && !slices.ContainsFunc(c.state.Services, func(s ravel.VirtualService) bool {
		return s.Key.VIP == v.VIP && s.TakesNewFlows()
	}):
		return whyNoReal
	case !routed && !listed(c.inputs.Fleet, c.inputs.Node):
		return "this director is not in fleet.directors: see ravel check"
	case !routed && !nextHop(c.inputs.Fleet, c.inputs.Node, v.VIP):
		return "this director has no next hop for it: see ravel check"
	case !routed:
		return whySomeNoReal
	case report.Err != nil:
		return fault
	case v.Serving == 0:
		return whyRise
	case slices.ContainsFunc(report.Effective.Routes, func(r ravel.Route) bool { return r.Prefix.Addr() == v.VIP }):
		return "a problem of this host or of BGP keeps it from that: see ravel check"
	}
	return "comes with the next walk"
}

// withdrawn reports whether a director announces no VIP of a family, whatever it serves.
func withdrawn(in desired.Inputs, vip netip.Addr) bool {
	return in.Agreed != nil && (vip.Is4() && in.Agreed.Withdraw4 || vip.Is6() && in.Agreed.Withdraw6)
}

// nextHop reports whether a director has an address of a VIP's family.
func nextHop(fleet desired.Fleet, name string, vip netip.Addr) bool {
	return slices.ContainsFunc(fleet.Directors, func(d desired.FleetDirector) bool {
		return d.Name == name && slices.ContainsFunc(d.Addrs, func(a netip.Addr) bool { return a.Is4() == vip.Is4() })
	})
}

func vipsCommand() *cli.Command {
	return &cli.Command{
		Name:  "vips",
		Usage: "show the VIPs of this host: wanted, held, announced, and why not",
		Flags: askFlags(),
		Action: func(c *cli.Context) error {
			socket, format, err := asks(c)
			if err != nil {
				return err
			}
			var answer vipsAnswer
			if err := admin.Get(c.Context, socket, "vips", &answer); err != nil {
				return err
			}
			if err := printVIPs(c, format, answer); err != nil {
				return err
			}
			answer.Fleet.tell(c)
			if answer.Unknown {
				return notKnown(c, answer.Role, "which VIPs it should hold")
			}
			if answer.Unlisted {
				fmt.Fprintf(c.App.ErrWriter, "ravel: nodes.%s: %s; is --node right?\n", answer.Node, desired.NotListed)
				return errNotWell
			}
			for _, v := range answer.VIPs {
				if v.Why != "" && v.Why != whyAttractNone {
					return errNotWell
				}
			}
			return nil
		},
	}
}

// notKnown says that a process has nothing to go by.
func notKnown(c *cli.Context, role, what string) error {
	fmt.Fprintf(c.App.ErrWriter, "ravel: the %s that runs here does not know %s: no static file was good yet; see ravel check\n", role, what)
	return errNotWell
}

func printVIPs(c *cli.Context, format string, answer vipsAnswer) error {
	if format == formatJSON {
		return printJSON(c.App.Writer, answer)
	}
	director := answer.Role == ravel.Director.String()
	header := []string{"VIP", "HELD", "SERVICES", "SERVING", "WHY NOT"}
	if director {
		header = []string{"VIP", "ANNOUNCED", "HELD", "SERVICES", "SERVING", "WHY NOT"}
	}
	if format == formatWide {
		header = append(header, "NEXT HOP", "COMMUNITIES")
	}
	var rows [][]string
	for _, v := range answer.VIPs {
		row := []string{v.VIP.String()}
		if director {
			row = append(row, yes(v.Announced))
		}
		row = append(row, yes(v.Held), fmt.Sprint(v.Services), fmt.Sprint(v.Serving), v.Why)
		if format == formatWide {
			nextHop := ""
			if v.NextHop.IsValid() {
				nextHop = v.NextHop.String()
			}
			row = append(row, nextHop, strings.Join(v.Communities, " "))
		}
		rows = append(rows, row)
	}
	return table(c.App.Writer, header, rows)
}

func yes(b bool) string {
	if b {
		return "yes"
	}
	return "no"
}
