package main

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"strings"
	"unicode"

	"github.com/urfave/cli/v2"

	"github.com/ravel-lb/ravel"
	"github.com/ravel-lb/ravel/internal/admin"
	"github.com/ravel-lb/ravel/internal/desired"
	"github.com/ravel-lb/ravel/internal/roster"
)

// drainWords are what `ravel drain` tells.
type drainWords struct {
	Name  string `json:"name"` // of a director or node; empty is that of who answers
	Undo  bool   `json:"undo"`
	Force bool   `json:"force"`
}

// drain sets whether a director or node is drained.
func (p *process) drain(set func(name, value string) error) admin.Command {
	return func(_ context.Context, read func(any) error) (any, error) {
		var words drainWords
		if err := read(&words); err != nil {
			return nil, err
		}
		fleet, err := p.settled()
		if err != nil {
			return nil, err
		}
		if words.Name == "" {
			words.Name = p.settings.node
		}
		name := words.Name
		c, _ := p.computed.Latest()
		kinds := kindsOf(c.inputs, fleet)
		if err := nameable(name); err != nil {
			return nil, err
		}
		kind, known := kinds[name]
		register := ravel.DrainRegisterPrefix + name
		by := fleet.Registers[register].By
		switch {
		case words.Undo && !fleet.Drained(name):
			return setAnswer{Said: name + " is not drained"}, nil
		case !words.Undo && fleet.Drained(name):
			return setAnswer{By: by, Said: name + " is drained already, by " + by + "; undo it by: ravel drain --undo " + name}, nil
		case !words.Undo && !known && !words.Force:
			return nil, unknownName(name, kinds, "; --force drains it all the same")
		}
		var warnings []string
		if !words.Undo {
			warnings = lossesOf(name, c.inputs, fleet)
			if len(warnings) > 0 && !words.Force {
				return nil, &admin.Refusal{Reason: strings.Join(warnings, "; ") + "; nothing was done, --force drains it all the same"}
			}
			if !known {
				warnings = append(warnings, "nobody of the name "+name+" is known here")
			}
		}
		if fleet.Frozen() {
			warnings = append(warnings, "the fleet is frozen, so this has no effect before: ravel freeze off")
		}
		value := "on"
		if words.Undo {
			value = ""
		}
		if err := set(register, value); err != nil {
			return nil, &admin.Refusal{Reason: fmt.Sprintf("draining %q: %v", name, err), Usage: true}
		}
		p.settings.log.Info("the fleet was told", "drain", name, "on", !words.Undo)
		return setAnswer{Changed: true, Said: drainSaid(name, kind, words.Undo), Warnings: warnings}, nil
	}
}

// The kinds of names in a fleet.
const (
	aDirector   = "director"
	aRealserver = "node"
)

// kindsOf are the names that the documents and the fleet know.
func kindsOf(in desired.Inputs, fleet ravel.Fleet) map[string]string {
	kinds := map[string]string{}
	for _, m := range fleet.Members {
		kinds[m.Name] = aRealserver
		if m.Role == ravel.Director {
			kinds[m.Name] = aDirector
		}
	}
	for _, n := range in.Cluster.Nodes {
		kinds[n.Name] = aRealserver
	}
	for _, d := range in.Fleet.Directors {
		kinds[d.Name] = aDirector
	}
	return kinds
}

// unknownName says that nobody has a name, and who there is.
func unknownName(name string, kinds map[string]string, more string) error {
	by := map[string][]string{}
	for _, known := range slices.Sorted(maps.Keys(kinds)) {
		by[kinds[known]] = append(by[kinds[known]], known)
	}
	var there []string
	for _, kind := range []string{aDirector, aRealserver} {
		if len(by[kind]) > 0 {
			there = append(there, kind+"s "+strings.Join(by[kind], ", "))
		}
	}
	if len(there) == 0 {
		there = []string{"nobody"}
	}
	return &admin.Refusal{Reason: fmt.Sprintf("%q is no director and no node of this fleet; there are: %s%s", name, strings.Join(there, "; "), more), Usage: true}
}

// nameable refuses what can be no name.
func nameable(name string) error {
	if len(name) > 253 || strings.ContainsFunc(name, func(r rune) bool { return unicode.IsSpace(r) || !unicode.IsPrint(r) }) {
		return &admin.Refusal{Reason: fmt.Sprintf("%q: want a name of 253 characters at most, without spaces", name), Usage: true}
	}
	return nil
}

// lossesOf says what nobody does any more once a director or node is drained.
func lossesOf(name string, in desired.Inputs, fleet ravel.Fleet) []string {
	var losses []string
	if soleAttractor(name, in, fleet) {
		losses = append(losses, "without "+name+" no director of the fleet attracts packets")
	}
	in = withDrained(in, fleet)
	after, agreed := in, *in.Agreed
	after.Agreed, agreed.Drained = &agreed, withName(agreed.Drained, name, true)
	bare := bereft(in, after)
	for i, s := range bare {
		if i == 3 {
			losses = append(losses, fmt.Sprintf("and %d more services have none", len(bare)-i))
			break
		}
		losses = append(losses, "without "+name+" "+s.String()+" has no real server for new flows")
	}
	return losses
}

// soleAttractor reports whether a director is the only one that attracts packets: none of the other live ones, of which
// we know, has a session and is not drained.
func soleAttractor(name string, in desired.Inputs, fleet ravel.Fleet) bool {
	m, member := fleet.Member(name)
	is := member && m.Role == ravel.Director || listed(in.Fleet, name)
	if !is || member && !m.State.Live() {
		return false
	}
	if own := fleet.Reports[name]; own.Dark || own.Sessions != nil && !own.SessionUp() {
		return false // it attracts nothing now
	}
	for _, other := range fleet.Live(ravel.Director) {
		r := fleet.Reports[other.Name]
		attracts := r.Sessions == nil && !r.Dark || r.Attracts(true) || r.Attracts(false)
		if other.Name != name && !fleet.Drained(other.Name) && attracts {
			return false
		}
	}
	return true
}

// withDrained are inputs in which the nodes are drained that the fleet drains. A realserver knows of nobody that is dead.
func withDrained(in desired.Inputs, fleet ravel.Fleet) desired.Inputs {
	var agreed desired.Agreed
	if in.Agreed != nil {
		agreed = *in.Agreed
	}
	agreed.Drained = map[string]bool{}
	for name := range fleet.AllDrained() {
		agreed.Drained[name] = true
	}
	in.Agreed = &agreed
	return in
}

// withName is a set with a name in it, or without.
func withName(set map[string]bool, name string, in bool) map[string]bool {
	other := map[string]bool{}
	maps.Copy(other, set)
	delete(other, name)
	if in {
		other[name] = true
	}
	return other
}

// bereft are the services that have real servers for new flows before a change and none after it, sorted.
func bereft(before, after desired.Inputs) []ravel.ServiceKey {
	was, now := desired.Wishes(before), desired.Wishes(after)
	takes := func(w roster.Wish) bool { return w.Weight > 0 }
	var bare []ravel.ServiceKey
	for key, list := range was {
		if rest, stays := now[key]; stays && slices.ContainsFunc(list, takes) && !slices.ContainsFunc(rest, takes) {
			bare = append(bare, key)
		}
	}
	slices.SortFunc(bare, ravel.ServiceKey.Compare)
	return bare
}

// drainSaid is what was done, and how to undo it.
func drainSaid(name, kind string, undo bool) string {
	switch {
	case undo && kind == aDirector:
		return name + " is drained no more: it announces again what it serves"
	case undo:
		return name + " is drained no more: it comes back to its services"
	case kind == aDirector:
		return name + " is drained: it announces nothing and serves on; undo it by: ravel drain --undo " + name
	case kind == aRealserver:
		return name + " is drained: it takes no new flows, keeps those that it has, and leaves the tables when its drain is over; " +
			"undo it by: ravel drain --undo " + name
	}
	return name + " is drained from its first moment; undo it by: ravel drain --undo " + name
}

func drainCommand() *cli.Command {
	return &cli.Command{
		Name: "drain",
		Usage: "take a director out of the fleet's way, or a node out of its services, until --undo; " +
			"without a name the director or node that runs here",
		ArgsUsage: "[NAME]",
		Flags: append(askFlags(),
			&cli.BoolFlag{Name: "undo", Usage: "let it come back"},
			&cli.BoolFlag{Name: "force", Usage: "also a name that nobody knows, and where nothing would be left that serves"}),
		Action: func(c *cli.Context) error {
			socket, format, err := asks(c)
			if err != nil {
				return err
			}
			if c.NArg() > 1 {
				return usageError{fmt.Errorf("ravel drain: want one name at most, got %q; nothing was done", c.Args().Slice())}
			}
			if c.NArg() == 1 && c.Args().First() == "" {
				return usageError{fmt.Errorf("ravel drain: the name is empty; nothing was done")}
			}
			var answer setAnswer
			words := drainWords{Name: c.Args().First(), Undo: c.Bool("undo"), Force: c.Bool("force")}
			if err := admin.Post(c.Context, socket, "drain", words, &answer); err != nil {
				return err
			}
			return printSet(c, format, answer)
		},
	}
}
