package main

import (
	"bytes"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

// flag stops at the first argument: what stands behind it, such as --dry-run, is not read, so nothing may be done.
func TestEveryCommandRefusesArguments(t *testing.T) {
	for _, c := range newApp(io.Discard, io.Discard).Commands {
		if slices.Contains(takesArguments, c.Name) {
			continue // arguments_test.go
		}
		code, stdout, stderr := ravelWith(c.Name, "all", "--dry-run", "--help")
		if code != exitUsage || stdout != "" || !strings.Contains(stderr, `"all"`) {
			t.Errorf("ravel %s all: exit code %d:\n%s%s", c.Name, code, stdout, stderr)
		}
	}
}

func write(t *testing.T, name, content string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), name)
	if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

// What a role was told in ravel.yaml, the commands that ask it and clean up after it are told by the same file.
func TestCommandsReadTheFileOfTheRole(t *testing.T) {
	nobody := filepath.Join(t.TempDir(), "nobody.sock")
	good := write(t, "ravel.yaml", "admin-socket: "+nobody+"\nlink: vips0\nbgp-port: 179\nmtu: 1400\nstate-dir: "+t.TempDir()+"\n")
	for _, name := range []string{"peers", "vips", "services", "check"} {
		for _, args := range [][]string{{name, "--config", good}, {name}} {
			t.Setenv("RAVEL_CONFIG", "")
			if len(args) == 1 {
				t.Setenv("RAVEL_CONFIG", good)
			}
			code, _, stderr := ravelWith(args...)
			if code != exitNotRunning || !strings.Contains(stderr, nobody) {
				t.Errorf("ravel %s: exit code %d:\n%s", strings.Join(args, " "), code, stderr)
			}
		}
	}
	bad := write(t, "ravel.yaml", "link: much-too-long-for-a-link\niptables: best\niptables-chain: Ravel!\noutput: json\n")
	for name, faults := range map[string][]string{
		"cleanup": {"much-too-long-for-a-link", "best", "Ravel!", "output"},
		"check":   {"much-too-long-for-a-link", "best", "output"},
		"peers":   {"output"},
	} {
		code, _, stderr := ravelWith(name, "--config", bad)
		if code != exitUsage {
			t.Errorf("ravel %s: exit code %d", name, code)
		}
		for _, fault := range faults {
			if !strings.Contains(stderr, fault) {
				t.Errorf("ravel %s does not name %q:\n%s", name, fault, stderr)
			}
		}
	}
	var help bytes.Buffer
	if err := newApp(&help, io.Discard).Run([]string{"ravel", "cleanup", "--help"}); err != nil || !strings.Contains(help.String(), "RAVEL_LINK") {
		t.Errorf("%v:\n%s", err, help.String())
	}
}
