package main

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// Without --node a check looks as this host would, as a role does; a document for other hosts is no fault.
func TestCheckLooksAsThisHost(t *testing.T) {
	host, err := os.Hostname()
	if err != nil {
		t.Fatal(err)
	}
	example, err := os.ReadFile("../../deploy/example/ravel-static.yaml")
	if err != nil {
		t.Fatal(err)
	}
	replaced := func(old, new string) string {
		if !strings.Contains(string(example), "name: "+old) {
			t.Fatalf("no %s in the example", old)
		}
		return write(t, "static.yaml", strings.ReplaceAll(string(example), old, new))
	}
	nobody := filepath.Join(t.TempDir(), "admin.sock")
	for _, test := range []struct {
		name, file string
		args       []string
		code       int
		says       string
	}{
		{"a director", replaced("director1", host), nil, exitOK, "; looked at as the director " + host},
		{"a node", replaced("node2", host), nil, exitOK, "; looked at as the realserver " + host},
		{"neither", replaced("node2", "n-other"), nil, exitOK, "this host, " + host + ", is neither director nor node there"},
		{"neither, in a role", replaced("node2", "n-other"), []string{"--role", "director"}, exitOK, "is neither director nor node there"},
		{"another by name", replaced("node2", "n-other"), []string{"--node", "n-other"}, exitOK, "; looked at as the realserver n-other"},
		{"nobody by name", replaced("node2", "n-other"), []string{"--node", host}, exitFault, "fail  fleet.directors: "},
	} {
		code, stdout, stderr := ravelWith(append([]string{"check", "--admin-socket", nobody, "--static", test.file}, test.args...)...)
		if code != test.code || !strings.Contains(stdout, test.says) || strings.Count(stdout, "warn") > 1 {
			t.Errorf("%s: exit code %d, want %d and %q:\n%s%s", test.name, code, test.code, test.says, stdout, stderr)
		}
	}
}
