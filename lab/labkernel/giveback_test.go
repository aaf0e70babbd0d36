package labkernel

import (
	"os"
	"path/filepath"
	"syscall"
	"testing"

	"github.com/ravel-lb/ravel/internal/nettest"
)

// What root left in a user's checkout is the user's afterwards, links themselves and not what they lead to.
func TestGiveBack(t *testing.T) {
	nettest.Need(t, nettest.Root)
	const user, group = 12345, 23456
	t.Chdir(t.TempDir())
	outside := filepath.Join(t.TempDir(), "outside")
	for _, err := range []error{
		os.Chown(".", user, group),
		os.MkdirAll("build/test", 0o755),
		os.WriteFile("build/test/log", nil, 0o600),
		os.WriteFile(outside, nil, 0o600),
		os.Symlink(outside, "build/link"),
		GiveBack("build"),
		GiveBack("gone"),
	} {
		if err != nil {
			t.Fatal(err)
		}
	}
	for path, want := range map[string]uint32{
		"build": user, "build/test": user, "build/test/log": user, "build/link": user, outside: 0,
	} {
		info, err := os.Lstat(path)
		if err != nil {
			t.Fatal(err)
		}
		if got := info.Sys().(*syscall.Stat_t).Uid; got != want {
			t.Errorf("%s is of user %d, want %d", path, got, want)
		}
	}
}
