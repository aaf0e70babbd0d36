package main

import (
	"github.com/urfave/cli/v2"

	"github.com/ravel-lb/ravel/internal/config"
)

func hostLines(c *cli.Context, role string, document config.Static) []line { return nil }

// fromFile fills in the settings that neither a flag nor a variable gave.
func fromFile(c *cli.Context) error { return nil }
