package main

import (
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/urfave/cli/v2"
)

// The settings in deploy/systemd are good ones, each line that is commented out as well.
func TestSettingsForSystemd(t *testing.T) {
	for role, command := range map[string]*cli.Command{"director": directorCommand(), "realserver": realserverCommand()} {
		text, err := os.ReadFile("../../deploy/systemd/" + role + ".yaml")
		if err != nil {
			t.Fatal(err)
		}
		dir := t.TempDir()
		if err := os.WriteFile(filepath.Join(dir, "gossip.key"), []byte("MDEyMzQ1Njc4OWFiY2RlZjAxMjM0NTY3ODlhYmNkZWY=\n"), 0o600); err != nil {
			t.Fatal(err)
		}
		base := strings.ReplaceAll(string(text), "/etc/ravel", dir)
		without := func(keys string) string {
			return regexp.MustCompile(`(?m)^(`+keys+`):.*\n`).ReplaceAllString(base, "")
		}
		read := func(what, settings string) (s values) {
			t.Helper()
			path := filepath.Join(dir, role+".yaml")
			if err := os.WriteFile(path, []byte(settings), 0o600); err != nil {
				t.Fatal(err)
			}
			command.Action = func(c *cli.Context) (err error) {
				s, err = readSettings(c, role == "director")
				return err
			}
			app := &cli.App{Commands: []*cli.Command{command}, ExitErrHandler: func(*cli.Context, error) {}}
			if err := app.Run([]string{"ravel", role, "--config", path}); err != nil {
				t.Errorf("%s.yaml, %s: %v", role, what, err)
			}
			return s
		}
		s := read("as it is", base)
		if s.kube == nil || s.kube.kubeconfig != dir+"/kubeconfig" || s.kube.name != "ravel" || s.node == "" {
			t.Errorf("%s.yaml is read as %+v", role, s)
		}
		options := regexp.MustCompile(`(?m)^#([a-z-]+): .*$`).FindAllStringSubmatch(base, -1)
		if !slices.ContainsFunc(options, func(o []string) bool { return o[1] == "static" }) {
			t.Errorf("the lines that are commented out: %q", options)
		}
		for _, o := range options {
			with := base
			switch o[1] {
			case "static":
				with = without("kubeconfig|config-.*|fleet-key")
			case "fleet-file":
				with = without("fleet-key")
			}
			read(o[0], with+o[0][1:]+"\n")
		}
	}
}
