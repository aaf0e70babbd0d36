package main

import (
	"bytes"
	"os"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/ravel-lb/ravel/internal/settings"
)

const exampleFile = "../../deploy/ravel.yaml"

// deploy/ravel.yaml names every setting. RAVEL_TEST_UPDATE=1 writes it anew.
func TestExampleNamesEverySetting(t *testing.T) {
	want := settings.Example(
		settings.Section{Title: "The settings of one ravel process (--config). Every one can be a flag or a variable, too.", Flags: settings.Flags(commonFlags()...)},
		settings.Section{Title: "Directors.", Flags: settings.Flags(directorFlags()...)},
		settings.Section{Title: "Realservers.", Flags: settings.Flags(realserverFlags()...)},
	)
	if os.Getenv("RAVEL_TEST_UPDATE") != "" {
		if err := os.WriteFile(exampleFile, []byte(want), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	got, err := os.ReadFile(exampleFile)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(want, string(got)); diff != "" {
		t.Fatalf("%s (-want +got):\n%s", exampleFile, diff)
	}
}

// ravelWith runs the program as main does.
func ravelWith(args ...string) (code int, stdout, stderr string) {
	var out, errs bytes.Buffer
	code = run(append([]string{"ravel"}, args...), &out, &errs)
	return code, out.String(), errs.String()
}

func TestEveryFaultOfTheSettingsIsNamedAtOnce(t *testing.T) {
	file := t.TempDir() + "/ravel.yaml"
	if err := os.WriteFile(file, []byte("drain: tomorrow\nno-such-setting: 1\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	t.Setenv("RAVEL_RISE", "soon")
	code, _, stderr := ravelWith("director", "--config", file, "--attract", "x", "--linger", "99h", "--router-id", "fd00::1",
		"--bgp-port", "70000", "--listen", "nowhere", "--link", "a/b", "--log-level", "loud")
	if code != exitUsage {
		t.Errorf("exit code %d, want %d", code, exitUsage)
	}
	for _, name := range []string{"drain", "no-such-setting", "RAVEL_RISE", "--attract", "--linger", "--router-id", "--bgp-port",
		"--listen", "--link", "--log-level", "--static"} {
		if !strings.Contains(stderr, name) {
			t.Errorf("%s is not named in:\n%s", name, stderr)
		}
	}
	code, _, stderr = ravelWith("director", "--stop-wait", "abc", "--bgp-port", "x", "--attract", "arp")
	if code != exitUsage {
		t.Errorf("exit code %d, want %d", code, exitUsage)
	}
	for _, fault := range []string{`--stop-wait: want a duration`, `--bgp-port: want a whole number, got "x"`, `--attract: "arp"`, "--static"} {
		if !strings.Contains(stderr, fault) {
			t.Errorf("%s is not in:\n%s", fault, stderr)
		}
	}
	code, _, stderr = ravelWith("realserver", "--static", "x", "--iptables-chain", "much too long", "--mark", "3", "--pod-cidr-masq", "x", "--mtu", "9")
	if code != exitUsage {
		t.Errorf("exit code %d, want %d", code, exitUsage)
	}
	for _, name := range []string{"much too long", "--mark", "--pod-cidr-masq", "--mtu"} {
		if !strings.Contains(stderr, name) {
			t.Errorf("%s is not named in:\n%s", name, stderr)
		}
	}
}

func TestExitCodes(t *testing.T) {
	nobody := t.TempDir() + "/admin.sock"
	for _, test := range []struct {
		args []string
		want int
		says string
	}{
		{[]string{"version"}, exitOK, "ravel dev"},
		{[]string{"peers", "--admin-socket", nobody}, exitNotRunning, "no director runs here"},
		{[]string{"vips", "--admin-socket", nobody}, exitNotRunning, "no ravel runs here"},
		{[]string{"services", "--admin-socket", nobody}, exitNotRunning, "no ravel runs here"},
		{[]string{"check", "--admin-socket", nobody}, exitNotRunning, "nothing to check"},
		{[]string{"check", "--admin-socket", nobody, "--static", "/nowhere/ravel.yaml"}, exitFault, "/nowhere/ravel.yaml"},
		{[]string{"check", "--admin-socket", nobody, "--static", "../../deploy/example/ravel-static.yaml"}, exitOK, "ok "},
		{[]string{"peers", "-o", "xml"}, exitUsage, "xml"},
		{[]string{"peer"}, exitUsage, "peer"},
		{[]string{"director", "--no-such-flag"}, exitUsage, "no-such-flag"},
	} {
		code, stdout, stderr := ravelWith(test.args...)
		if code != test.want || !strings.Contains(stdout+stderr, test.says) {
			t.Errorf("ravel %s: exit code %d, want %d and %q:\n%s%s", strings.Join(test.args, " "), code, test.want, test.says, stdout, stderr)
		}
	}
}
