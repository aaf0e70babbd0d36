package main

import (
	"context"
	"fmt"
	"slices"
	"strings"

	"github.com/urfave/cli/v2"

	"github.com/ravel-lb/ravel/internal/admin"
	"github.com/ravel-lb/ravel/internal/hold"
)

// acceptWords are what `ravel accept` tells.
type acceptWords struct {
	Change string `json:"change"` // its name; empty is the one that waits here
}

// accept lets a change through that is held, in the whole fleet.
func (p *process) accept(set func(name, value string) error) admin.Command {
	return func(_ context.Context, read func(any) error) (any, error) {
		var words acceptWords
		if err := read(&words); err != nil {
			return nil, err
		}
		// Not known(): who doubts the documents is not to be told that it did not hear the fleet.
		fleet := p.known()
		if !fleet.Settled && !p.unconfirmed() {
			if _, err := p.settled(); err != nil {
				return nil, err
			}
		}
		list := p.heldOf(fleet)
		names := make([]string, len(list))
		for i, h := range list {
			names[i] = h.Name
		}
		switch {
		case words.Change == "" && len(list) == 0:
			return setAnswer{Said: "no change is held"}, nil
		case words.Change == "" && len(list[0].By) > 0:
			return nil, &admin.Refusal{Reason: "nothing was done, say which one: " + strings.Join(linesOf(list), "; "), Usage: true}
		case words.Change == "":
			words.Change = names[0]
		}
		if hold.Accepted(fleet, words.Change) {
			by := fleet.Registers[hold.AcceptPrefix+words.Change].By
			return setAnswer{By: by, Said: words.Change + " is accepted already, by " + by}, nil
		}
		at := slices.Index(names, words.Change)
		if at < 0 {
			held := "none is"
			if len(names) > 0 {
				held = "held is " + strings.Join(names, ", ")
			}
			return nil, &admin.Refusal{Reason: fmt.Sprintf("%q is no change that is held: %s; nothing was done", words.Change, held), Usage: true}
		}
		var warnings []string
		if fleet.Frozen() {
			warnings = append(warnings, "the fleet is frozen, so this has no effect before: ravel freeze off")
		}
		if err := set(hold.AcceptPrefix+words.Change, "on"); err != nil {
			return nil, fmt.Errorf("telling the fleet: %w", err)
		}
		p.settings.log.Info("the fleet was told", "accept", words.Change)
		said := words.Change + " is accepted: it takes effect now, everywhere"
		if takes := list[at].Takes(); takes != "" {
			said += ", and takes away " + takes
		}
		return setAnswer{Changed: true, Said: said, Warnings: warnings}, nil
	}
}

func linesOf(list []heldStanding) []string {
	lines := make([]string, len(list))
	for i, h := range list {
		lines[i] = h.line()
	}
	return lines
}

func acceptCommand() *cli.Command {
	return &cli.Command{
		Name: "accept",
		Usage: "let a change of the documents through that is held because it takes away too much at once, in the whole fleet; " +
			"without a name the one that the ravel that runs here holds",
		ArgsUsage: "[CHANGE]",
		Flags:     askFlags(),
		Action: func(c *cli.Context) error {
			socket, format, err := asks(c)
			if err != nil {
				return err
			}
			if c.NArg() > 1 || c.NArg() == 1 && c.Args().First() == "" {
				return usageError{fmt.Errorf("ravel accept: want the name of one change, or none, got %q; nothing was done", c.Args().Slice())}
			}
			var answer setAnswer
			if err := admin.Post(c.Context, socket, "accept", acceptWords{Change: c.Args().First()}, &answer); err != nil {
				return err
			}
			return printSet(c, format, answer)
		},
	}
}
