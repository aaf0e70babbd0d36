package settings

import (
	"fmt"
	"io"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/urfave/cli/v2"
)

func common() []cli.Flag {
	return Flags(
		&cli.StringFlag{Name: "config", Usage: "a YAML file of these settings"},
		&cli.StringFlag{Name: "log-level", Value: "info", Usage: "debug, info, warn or error"},
		&cli.StringFlag{Name: "node", Aliases: []string{"nodename"}, EnvVars: []string{"RAVEL_NODE"}, Usage: "this host's name"},
		&cli.BoolFlag{Name: "guard", Value: true, Usage: "reject packets"},
		&cli.IntFlag{Name: "mark", Value: 16384, Usage: "mark bit"},
	)
}

func director() []cli.Flag {
	return Flags(
		&cli.DurationFlag{Name: "stop-wait", Value: time.Second, Usage: "wait"},
		&cli.StringSliceFlag{Name: "bgp-listen", Value: cli.NewStringSlice("10.0.0.1"), Usage: "addresses"},
	)
}

func realserver() []cli.Flag {
	return Flags(&cli.DurationFlag{Name: "redirect-linger", Value: 5 * time.Second, Usage: "linger"})
}

// run starts the command director and returns what its settings are, or the error.
func run(args ...string) (string, error) {
	got := ""
	app := &cli.App{
		Writer: io.Discard, ErrWriter: io.Discard, ExitErrHandler: func(*cli.Context, error) {},
		Commands: []*cli.Command{{
			Name:  "director",
			Flags: append(common(), director()...),
			Action: func(c *cli.Context) error {
				err := Apply(c, append(common(), realserver()...)...)
				got = fmt.Sprintf("log-level %q node %q guard %v mark %d stop-wait %s bgp-listen %q", c.String("log-level"), c.String("node"),
					c.Bool("guard"), c.Int("mark"), c.Duration("stop-wait"), c.StringSlice("bgp-listen"))
				return err
			},
		}},
	}
	err := app.Run(append([]string{"ravel", "director"}, args...))
	return got, err
}

func file(t *testing.T, content string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "ravel.yaml")
	if err := os.WriteFile(path, []byte(content), 0o644); err != nil {
		t.Fatal(err)
	}
	return path
}

const defaults = `log-level "info" node "" guard true mark 16384 stop-wait 1s bgp-listen ["10.0.0.1"]`

func TestPrecedence(t *testing.T) {
	const full = `
log-level: debug
node: from-file
guard: false
mark: 0x10
stop-wait: 2s
bgp-listen: ["10.0.0.2", "a,b"]
redirect-linger: 7s
`
	for _, tt := range []struct {
		name, file string
		env        map[string]string
		args       []string
		want       string
	}{
		{name: "defaults", want: defaults},
		{name: "file", file: full,
			want: `log-level "debug" node "from-file" guard false mark 16 stop-wait 2s bgp-listen ["10.0.0.2" "a,b"]`},
		{name: "variables over file", file: full,
			env:  map[string]string{"RAVEL_LOG_LEVEL": "", "RAVEL_GUARD": "true", "RAVEL_MARK": "0x20", "RAVEL_STOP_WAIT": "3s", "RAVEL_BGP_LISTEN": "10.0.0.3, 10.0.0.4"},
			want: `log-level "" node "from-file" guard true mark 32 stop-wait 3s bgp-listen ["10.0.0.3" "10.0.0.4"]`},
		{name: "flags over variables over file", file: full,
			env:  map[string]string{"RAVEL_NODE": "from-env", "RAVEL_MARK": "1", "RAVEL_STOP_WAIT": "3s", "RAVEL_BGP_LISTEN": "10.0.0.3"},
			args: []string{"--nodename", "from-flag", "--guard=true", "--mark", "2", "--bgp-listen", "10.0.0.5", "--bgp-listen", "10.0.0.6"},
			want: `log-level "debug" node "from-flag" guard true mark 2 stop-wait 3s bgp-listen ["10.0.0.5" "10.0.0.6"]`},
		{name: "an alias in the file", file: "nodename: x", want: strings.Replace(defaults, `node ""`, `node "x"`, 1)},
		{name: "an empty list", file: "bgp-listen: []", want: strings.Replace(defaults, `["10.0.0.1"]`, "[]", 1)},
		{name: "empty variables of other types", env: map[string]string{"RAVEL_MARK": "", "RAVEL_GUARD": "", "RAVEL_STOP_WAIT": "", "RAVEL_BGP_LISTEN": ""},
			want: defaults},
		{name: "foreign variables", env: map[string]string{"RAVEL_PORT": "tcp://10.0.0.1:80", "RAVEL_REDIRECT_LINGER": "x"}, want: defaults},
		{name: "an empty file", file: "\n# nothing\n\n", want: defaults},
		{name: "an empty document", file: "---\n", want: defaults},
		{name: "an empty mapping", file: "{}\n", want: defaults},
	} {
		t.Run(tt.name, func(t *testing.T) {
			for k, v := range tt.env {
				t.Setenv(k, v)
			}
			args := tt.args
			if tt.file != "" {
				args = append([]string{"--config", file(t, tt.file)}, args...)
			}
			got, err := run(args...)
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(tt.want, got); diff != "" {
				t.Error(diff)
			}
		})
	}
}

func TestFileFromVariable(t *testing.T) {
	t.Setenv("RAVEL_CONFIG", file(t, "node: x"))
	got, err := run()
	if err != nil || !strings.Contains(got, `node "x"`) {
		t.Errorf("got %s, %v", got, err)
	}
}

// Everything that is wrong is named at once, and nothing of it gets a value.
func TestFaults(t *testing.T) {
	t.Setenv("RAVEL_MARK", "many")
	t.Setenv("RAVEL_STOP_WAIT", "3")
	t.Setenv("RAVEL_GUARD", "perhaps")
	path := file(t, `log-level: 7
guard: "no"
mark: 1.5
stop-wait: 3
bgp-listen: 10.0.0.1
linger: 2s
Node: x
redirect-linger: soon
config: other.yaml
help: true
node: a
nodename: b
node: c
`)
	got, err := run("--config", path)
	if err == nil {
		t.Fatal("no error")
	}
	want := []string{
		`RAVEL_GUARD: want true or false, got "perhaps"`,
		`RAVEL_MARK: want a whole number, got "many"`,
		`RAVEL_STOP_WAIT: want a duration such as 3s, got "3"`,
		`FILE: log-level: want a string (put it in quotes), got 7 (line 1:12)`,
		`FILE: guard: want true or false, got the string "no" (line 2:8)`,
		`FILE: mark: want a whole number, got 1.5 (line 3:7)`,
		`FILE: stop-wait: want a duration such as "3s", got 3 (line 4:12)`,
		`FILE: bgp-listen: want a list, got the string "10.0.0.1" (line 5:13)`,
		`FILE: linger: unknown key: want log-level, node, nodename, guard, mark, stop-wait, bgp-listen, redirect-linger (line 6:1)`,
		`FILE: Node: unknown key: did you mean node? (line 7:1)`,
		`FILE: redirect-linger: duration "soon": want a number and a unit such as "3s" (line 8:18)`,
		`FILE: config: unknown key: want log-level, node, nodename, guard, mark, stop-wait, bgp-listen, redirect-linger (line 9:1)`,
		`FILE: help: unknown key: want log-level, node, nodename, guard, mark, stop-wait, bgp-listen, redirect-linger (line 10:1)`,
		`FILE: nodename: node and nodename are the same setting (line 12:1)`,
		`FILE: node: given twice, first at line 11:1 (line 13:1)`,
	}
	if diff := cmp.Diff(want, strings.Split(strings.ReplaceAll(err.Error(), path, "FILE"), "\n")); diff != "" {
		t.Error(diff)
	}
	if wanted := strings.Replace(defaults, `node ""`, `node "a"`, 1); got != wanted {
		t.Errorf("got %s", got)
	}
}

// What cli itself would stop at is named like all else.
func TestFaultsOfTheCommandLine(t *testing.T) {
	t.Setenv("RAVEL_MARK", "7") // the flag would win
	t.Setenv("RAVEL_STOP_WAIT", "")
	path := file(t, "log-level: 7\n")
	for _, tt := range []struct {
		args []string
		want []string
		got  string
	}{
		{[]string{"--stop-wait", "abc", "--mark=many", "--guard=perhaps", "--config", path, "--node", "a"},
			[]string{`--guard: want true or false, got "perhaps"`, `--mark: want a whole number, got "many"`,
				`--stop-wait: want a duration such as 3s, got "abc"`,
				`FILE: log-level: want a string (put it in quotes), got 7 (line 1:12)`},
			strings.Replace(defaults, `node ""`, `node "a"`, 1)},
		{[]string{"--mark", "0x1", "--mark", "1.5", "--mark", ""},
			[]string{`--mark: want a whole number, got "1.5"`, `--mark: want a whole number, got ""`},
			strings.Replace(defaults, "mark 16384", "mark 1", 1)},
	} {
		got, err := run(tt.args...)
		if err == nil {
			t.Fatalf("%q: no error", tt.args)
		}
		if diff := cmp.Diff(tt.want, strings.Split(strings.ReplaceAll(err.Error(), path, "FILE"), "\n")); diff != "" {
			t.Error(diff)
		}
		if got != tt.got {
			t.Errorf("%q: got %s, want %s", tt.args, got, tt.got)
		}
	}
	// A switch needs no value.
	t.Setenv("RAVEL_MARK", "")
	t.Setenv("RAVEL_GUARD", "false")
	for _, args := range [][]string{{"--guard", "--stop-wait", "1s"}, {"--guard=true"}} {
		if got, err := run(args...); err != nil || got != defaults {
			t.Errorf("%q: got %s, %v", args, got, err)
		}
	}
	if _, err := run("--no-such-flag"); err == nil {
		t.Error("an unknown flag is no fault")
	}
}

func TestUnreadableFile(t *testing.T) {
	for path, want := range map[string]string{
		"/nowhere/ravel.yaml":            "/nowhere/ravel.yaml: reading the file: no such file or directory",
		"/":                              "/: reading the file: is a directory",
		file(t, "node: {"):               "FILE: document: syntax error: did not find expected node content (line 1)",
		file(t, "[node]"):                "FILE: document: want a mapping, got a list (line 1:1)",
		file(t, "node: \xff"):            "FILE: document: byte 0xff is not UTF-8 (line 1)",
		file(t, "node: x\n---\nnode: y"): "FILE: document: a second document begins here: want one (line 2)",
	} {
		_, err := run("--config", path)
		if err == nil || strings.ReplaceAll(err.Error(), path, "FILE") != want && err.Error() != want {
			t.Errorf("got %v, want %s", err, want)
		}
	}
}

func TestHelpShowsVariables(t *testing.T) {
	var b strings.Builder
	app := &cli.App{Writer: &b, Commands: []*cli.Command{{Name: "director", Flags: append(common(), director()...)}}}
	if err := app.Run([]string{"ravel", "director", "--help"}); err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{
		"--node value, --nodename value", "this host's name [$RAVEL_NODE]", "(default: 1s) [$RAVEL_STOP_WAIT]",
		"--bgp-listen value [ --bgp-listen value ]", "--guard", "(default: true) [$RAVEL_GUARD]",
	} {
		if !strings.Contains(b.String(), want) {
			t.Errorf("no %q in\n%s", want, b.String())
		}
	}
}

func TestExample(t *testing.T) {
	long := Flags(&cli.StringFlag{Name: "odd", Value: "yes, a: #b", Usage: strings.Repeat("many words ", 12)},
		&cli.StringSliceFlag{Name: "none"})
	got := Example(Section{"Both roles.", common()}, Section{"Directors.", append(director(), common()...)}, Section{"Odd.", long})
	want := `# Both roles.

# debug, info, warn or error
#log-level: info

# this host's name
#node: ""

# reject packets
#guard: true

# mark bit
#mark: 16384

# Directors.

# wait
#stop-wait: 1s

# addresses
#bgp-listen: [10.0.0.1]

# Odd.

# many words many words many words many words many words many words many words many words many words many words many
# words many words
#odd: "yes, a: #b"

#none: []
`
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error(diff)
	}
	// As it is, it changes nothing; without the signs, nothing either.
	_, foreign, _ := strings.Cut(got, "# Odd.")
	ours := strings.TrimSuffix(got, foreign)
	for _, content := range []string{got, regexp.MustCompile(`(?m)^#(\w)`).ReplaceAllString(ours, "$1")} {
		settings, err := run("--config", file(t, content))
		if err != nil || settings != defaults {
			t.Errorf("got %s, %v from\n%s", settings, err, content)
		}
	}
}
