package main

import (
	"fmt"
	"runtime"
	"runtime/debug"
	"strings"

	"github.com/urfave/cli/v2"
)

// Both are set by the linker: -ldflags "-X main.version=v1.2.3 -X main.revision=...". make build does.
var (
	version  = "dev"
	revision string
)

// build is what `ravel version` shows and ravel_build_info carries.
type build struct {
	Version  string `json:"version"`
	Revision string `json:"revision,omitempty"`
	Modified bool   `json:"modified,omitempty"` // built from a tree with changes that are in no revision
	Go       string `json:"go"`
	Platform string `json:"platform"`
}

func buildInfo() build {
	b := build{
		Version: version, Revision: revision, Modified: strings.HasSuffix(version, "-dirty"),
		Go: runtime.Version(), Platform: runtime.GOOS + "/" + runtime.GOARCH,
	}
	info, ok := debug.ReadBuildInfo()
	if !ok {
		return b
	}
	for _, s := range info.Settings {
		switch s.Key {
		case "vcs.revision":
			b.Revision = s.Value
		case "vcs.modified":
			b.Modified = s.Value == "true"
		}
	}
	return b
}

func versionCommand() *cli.Command {
	return &cli.Command{
		Name:  "version",
		Usage: "show which ravel this is",
		Flags: []cli.Flag{outputFlag()},
		Action: func(c *cli.Context) error {
			format, err := output(c)
			if err != nil {
				return err
			}
			b := buildInfo()
			if format == formatJSON {
				return printJSON(c.App.Writer, b)
			}
			revision := b.Revision
			if b.Modified {
				revision += " with changes"
			}
			_, err = fmt.Fprintf(c.App.Writer, "ravel %s\nrevision %s\n%s %s\n", b.Version, revision, b.Go, b.Platform)
			return err
		},
	}
}
