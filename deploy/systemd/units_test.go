package systemd_test

import (
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/ravel-lb/ravel/internal/nettest"
)

const (
	director   = "ravel-director.service"
	realserver = "ravel-realserver.service"
)

// settingsOf are the lines of a unit, without comments.
func settingsOf(t *testing.T, unit string) []string {
	t.Helper()
	text, err := os.ReadFile(unit)
	if err != nil {
		t.Fatal(err)
	}
	return slices.DeleteFunc(strings.Split(string(text), "\n"), func(l string) bool { return l == "" || strings.HasPrefix(l, "#") })
}

// systemd finds nothing to remark on the units, and little that a process in their sandbox could do.
func TestUnits(t *testing.T) {
	nettest.Need(t, nettest.Systemd)
	dir := t.TempDir()
	var paths []string
	for _, unit := range []string{director, realserver} {
		text, err := os.ReadFile(unit)
		if err != nil {
			t.Fatal(err)
		}
		// The program need not be installed here.
		path := filepath.Join(dir, unit)
		if err := os.WriteFile(path, []byte(strings.ReplaceAll(string(text), "/usr/bin/ravel", "/usr/bin/env")), 0o644); err != nil {
			t.Fatal(err)
		}
		paths = append(paths, path)
	}
	out, err := exec.Command("systemd-analyze", append([]string{"verify", "--man=no", "--recursive-errors=no"}, paths...)...).CombinedOutput()
	if err != nil || len(out) > 0 {
		t.Errorf("systemd-analyze verify: %v\n%s", err, out)
	}
	for _, path := range paths {
		// Of 100, in tenths.
		out, err := exec.Command("systemd-analyze", "security", "--offline=true", "--threshold=27", "--no-pager", path).CombinedOutput()
		lines := strings.Split(strings.TrimSpace(string(out)), "\n")
		i := slices.IndexFunc(lines, func(l string) bool { return strings.Contains(l, "Overall exposure level") })
		if err != nil || i < 0 {
			t.Fatalf("systemd-analyze security: %v\n%s", err, out)
		}
		t.Log(strings.TrimSpace(lines[i]))
	}
}

// What the two units have in common is the same, word for word.
func TestUnitsDifferInTheirRoleOnly(t *testing.T) {
	d, r := settingsOf(t, director), settingsOf(t, realserver)
	for i, l := range d {
		d[i] = strings.NewReplacer("director", "ROLE", "realserver", "OTHER").Replace(l)
	}
	for i, l := range r {
		r[i] = strings.NewReplacer("director", "OTHER", "realserver", "ROLE").Replace(l)
	}
	own := func(l string) bool {
		return strings.HasPrefix(l, "Description=") || strings.HasPrefix(l, "CapabilityBoundingSet=") ||
			strings.HasPrefix(l, "ProtectKernelModules=") || l == "After=ravel-OTHER.service"
	}
	d, r = slices.DeleteFunc(d, own), slices.DeleteFunc(r, own)
	if !slices.Equal(d, r) {
		t.Errorf("the director has\n%s\nthe realserver\n%s", strings.Join(d, "\n"), strings.Join(r, "\n"))
	}
}
