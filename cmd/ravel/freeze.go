package main

import (
	"context"
	"fmt"

	"github.com/urfave/cli/v2"

	"github.com/ravel-lb/ravel"
	"github.com/ravel-lb/ravel/internal/admin"
)

// freezeWords are what `ravel freeze` tells.
type freezeWords struct {
	On bool `json:"on"`
}

// setAnswer is what became of a setting of the fleet.
type setAnswer struct {
	Changed bool   `json:"changed"`
	By      string `json:"by,omitempty"` // who set it before, where nothing changed
	// Said is what was done, and Warnings what comes of it.
	Said     string   `json:"said"`
	Warnings []string `json:"warnings,omitempty"`
}

// settled refuses to change a setting of a fleet that was not heard of: what it has may be newer.
func (p *process) settled() (ravel.Fleet, error) {
	fleet := p.known()
	if !fleet.Settled {
		return fleet, &admin.Refusal{Reason: "this " + p.role.String() + " has not heard from the fleet yet; nothing was done, try again in a moment"}
	}
	return fleet, nil
}

// freeze sets whether the fleet holds its last state.
func (p *process) freeze(set func(name, value string) error) admin.Command {
	return func(_ context.Context, read func(any) error) (any, error) {
		var words freezeWords
		if err := read(&words); err != nil {
			return nil, err
		}
		fleet, err := p.settled()
		if err != nil {
			return nil, err
		}
		by := fleet.Registers[ravel.FreezeRegister].By
		switch {
		case words.On && fleet.Frozen():
			return setAnswer{By: by, Said: "the fleet is frozen already, by " + by}, nil
		case !words.On && !fleet.Frozen():
			return setAnswer{Said: "the fleet is not frozen"}, nil
		}
		value, said := "", "the fleet goes on: what changed meanwhile takes effect now"
		if words.On {
			value, said = "on", "the fleet is frozen: directors hold their last state, and changes have no effect; undo it by: ravel freeze off"
		}
		if err := set(ravel.FreezeRegister, value); err != nil {
			return nil, fmt.Errorf("telling the fleet: %w", err)
		}
		p.settings.log.Info("the fleet was told", "freeze", words.On)
		return setAnswer{Changed: true, Said: said}, nil
	}
}

func freezeCommand() *cli.Command {
	return &cli.Command{
		Name:      "freeze",
		Usage:     "have all directors of the fleet hold their last state, as during an incident: on, off or status",
		ArgsUsage: "on|off|status",
		Flags:     askFlags(),
		Action: func(c *cli.Context) error {
			socket, format, err := asks(c)
			if err != nil {
				return err
			}
			word := c.Args().First()
			if c.NArg() != 1 || word != "on" && word != "off" && word != "status" {
				return usageError{fmt.Errorf("ravel freeze: want on, off or status, got %q; nothing was done", c.Args().Slice())}
			}
			if word == "status" {
				return freezeStatus(c, socket, format)
			}
			var answer setAnswer
			if err := admin.Post(c.Context, socket, "freeze", freezeWords{On: word == "on"}, &answer); err != nil {
				return err
			}
			return printSet(c, format, answer)
		},
	}
}

// freezeStatus says whether the fleet is frozen; one that is, is not as it should be.
func freezeStatus(c *cli.Context, socket, format string) error {
	var s standing
	err := admin.Get(c.Context, socket, "standing", &s)
	if err != nil {
		return err
	}
	switch {
	case format == formatJSON:
		err = printJSON(c.App.Writer, s)
	case s.FrozenBy == "":
		_, err = fmt.Fprintln(c.App.Writer, "the fleet is not frozen")
	default:
		_, err = fmt.Fprintln(c.App.Writer, "the fleet is frozen by "+s.FrozenBy+"; undo it by: ravel freeze off")
	}
	if err == nil && s.FrozenBy != "" {
		return errNotWell
	}
	return err
}

// printSet prints what became of a setting.
func printSet(c *cli.Context, format string, answer setAnswer) error {
	for _, w := range answer.Warnings {
		fmt.Fprintln(c.App.ErrWriter, "ravel:", w)
	}
	if format == formatJSON {
		return printJSON(c.App.Writer, answer)
	}
	_, err := fmt.Fprintln(c.App.Writer, answer.Said)
	return err
}
