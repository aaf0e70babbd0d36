package main

import (
	"github.com/urfave/cli/v2"

	"github.com/ravel-lb/ravel/internal/config"
)

func hostLines(c *cli.Context, role string, document config.Static) []line { return nil }
