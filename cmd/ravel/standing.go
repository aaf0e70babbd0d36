package main

import (
	"cmp"
	"context"
	"fmt"
	"maps"
	"slices"

	"github.com/urfave/cli/v2"

	"github.com/ravel-lb/ravel"
	"github.com/ravel-lb/ravel/internal/admin"
)

// standing are the settings of the whole fleet that an operator should not forget: every listing tells them.
type standing struct {
	FrozenBy string    `json:"frozenBy,omitempty"` // the member that froze the fleet
	Drained  []drained `json:"drained,omitempty"`  // by name
	// Changes are those of the documents that wait to be accepted, here or at other directors.
	Changes []heldStanding `json:"changes,omitempty"`
}

// drained is a director or node that is drained by hand.
type drained struct {
	Name string `json:"name"`
	By   string `json:"by"`
}

func standingOf(fleet ravel.Fleet) standing {
	var s standing
	if fleet.Frozen() {
		s.FrozenBy = cmp.Or(fleet.Registers[ravel.FreezeRegister].By, "nobody known")
	}
	all := fleet.AllDrained()
	for _, name := range slices.Sorted(maps.Keys(all)) {
		s.Drained = append(s.Drained, drained{Name: name, By: all[name]})
	}
	return s
}

// lines say it, one each.
func (s standing) lines() []string {
	var lines []string
	if s.FrozenBy != "" {
		lines = append(lines, "the fleet is frozen by "+s.FrozenBy+": changes have no effect")
	}
	for _, d := range s.Drained {
		lines = append(lines, d.Name+" is drained by "+d.By)
	}
	lines = append(lines, linesOf(s.Changes)...)
	return lines
}

// tell says it beside a listing.
func (s standing) tell(c *cli.Context) {
	for _, line := range s.lines() {
		fmt.Fprintln(c.App.ErrWriter, "ravel:", line)
	}
}

// tellStanding asks for it, for listings whose answer has no room for it. It is no fault where nobody knows.
func tellStanding(c *cli.Context, socket string) {
	var s standing
	if admin.Get(c.Context, socket, "standing", &s) == nil {
		s.tell(c)
	}
}

// known is what this process knows of its fleet.
func (p *process) known() ravel.Fleet {
	if c, any := p.computed.Latest(); any {
		return c.result.Fleet
	}
	if p.gossip == nil {
		return ravel.Fleet{}
	}
	fleet, _ := p.gossip.Latest()
	return fleet
}

// fleetQueries are what either role answers of its fleet.
func (p *process) fleetQueries(queries map[string]admin.Query) map[string]admin.Query {
	queries["standing"] = func(context.Context) (any, error) { return p.standing(p.known()), nil }
	queries["members"] = func(context.Context) (any, error) { return p.members(), nil }
	return queries
}

// fleetCommands are what either role does for its fleet.
func (p *process) fleetCommands(set func(name, value string) error) map[string]admin.Command {
	return map[string]admin.Command{"drain": p.drain(set), "freeze": p.freeze(set), "accept": p.accept(set)}
}
