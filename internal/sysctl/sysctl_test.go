package sysctl

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"syscall"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/ravel-lb/ravel/internal/nettest"
)

// tree is a /proc/sys of files.
func tree(t *testing.T, values map[string]string) string {
	t.Helper()
	root := t.TempDir()
	for name, value := range values {
		path := filepath.Join(root, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(value+"\n"), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	return root
}

func want(t *testing.T, s *Setter, name, value string) {
	t.Helper()
	if got, err := s.Get(name); err != nil || got != value {
		t.Fatalf("%s = %q, %v; want %q", name, got, err, value)
	}
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func TestRestorePutsBackWhatWasBeforeTheFirstChange(t *testing.T) {
	root := tree(t, map[string]string{"net/a": "0", "net/b": "7", "net/c": "x", "net/same": "1"})
	state := filepath.Join(t.TempDir(), "run", "sysctl.json")
	s := New(root, state)
	must(t, s.Set("net/a", "1"))
	must(t, s.Set("net/same", "1"))
	must(t, s.Set("net/b", "8"))

	// Another process of ours, later: the first value stays the one to go back to.
	s = New(root, state)
	must(t, s.Set("net/a", "2"))
	must(t, s.Set("net/c", "y"))
	// Somebody else changes b: it is his now.
	must(t, os.WriteFile(filepath.Join(root, "net/b"), []byte("9\n"), 0o644))

	would, err := s.Restore(true)
	must(t, err)
	wanted := []string{"sysctl net/a=0", "sysctl net/c=x"}
	if diff := cmp.Diff(wanted, would); diff != "" {
		t.Fatalf("dry run (-want +got):\n%s", diff)
	}
	want(t, s, "net/a", "2")

	did, err := New(root, state).Restore(false)
	must(t, err)
	if diff := cmp.Diff(wanted, did); diff != "" {
		t.Fatalf("restore (-want +got):\n%s", diff)
	}
	for name, value := range map[string]string{"net/a": "0", "net/b": "9", "net/c": "x", "net/same": "1"} {
		want(t, s, name, value)
	}
	if _, err := os.Stat(state); !errors.Is(err, fs.ErrNotExist) {
		t.Fatalf("the state file is still there: %v", err)
	}
}

func TestSetAtLeastNeverLowers(t *testing.T) {
	s := New(tree(t, map[string]string{"low": "0", "high": "3", "word": "x"}), "")
	must(t, s.SetAtLeast("low", 2))
	must(t, s.SetAtLeast("high", 2))
	want(t, s, "low", "2")
	want(t, s, "high", "3")
	if err := s.SetAtLeast("word", 1); err == nil {
		t.Fatal("a word passed for a number")
	}
}

func TestMissingSettingIsErrNotExist(t *testing.T) {
	s := New(tree(t, nil), "")
	if err := s.Set("net/ipv4/vs/sloppy_tcp", "1"); !errors.Is(err, fs.ErrNotExist) {
		t.Fatalf("err = %v, want fs.ErrNotExist", err)
	}
}

func TestDamagedStateFileStopsNothing(t *testing.T) {
	root := tree(t, map[string]string{"a": "0"})
	for _, damage := range []string{"", "null", "[]", "{", `{"../../etc/passwd":{"was":"x","set":"y"}}`} {
		state := filepath.Join(t.TempDir(), "sysctl.json")
		must(t, os.WriteFile(state, []byte(damage), 0o600))
		s := New(root, state)
		must(t, s.Set("a", "1"))
		did, err := s.Restore(false)
		must(t, err)
		if diff := cmp.Diff([]string{"sysctl a=0"}, did); diff != "" {
			t.Fatalf("after %q (-want +got):\n%s", damage, diff)
		}
	}
}

func TestTwoProcessesNoteBesideEachOther(t *testing.T) {
	root := tree(t, map[string]string{"net/a": "0", "net/b": "0"})
	state := filepath.Join(t.TempDir(), "sysctl.json")
	one, two := New(root, state), New(root, state)
	must(t, one.Set("net/a", "1"))
	must(t, two.Set("net/b", "1"))
	must(t, one.Set("net/a", "2"))
	would, err := New(root, state).Restore(true)
	must(t, err)
	if wanted := []string{"sysctl net/a=0", "sysctl net/b=0"}; !slices.Equal(would, wanted) {
		t.Errorf("%q, want %q", would, wanted)
	}
}

func TestElsewhereIsWrittenWhereTheRootIsReadOnly(t *testing.T) {
	nettest.InNetns(t, func() {
		must(t, syscall.Unshare(syscall.CLONE_NEWNS)) // of this thread, which ends with the function
		root, elsewhere := tree(t, map[string]string{"net/a": "0", "net/b": "0"}), t.TempDir()
		must(t, os.MkdirAll(filepath.Join(elsewhere, "net"), 0o755))
		must(t, os.WriteFile(filepath.Join(elsewhere, "net/a"), nil, 0o644))
		// One file of two is there, by a mount that can be written; the tree itself cannot.
		nettest.Shell(t, "mount --make-rprivate / && mount --bind "+root+"/net/a "+elsewhere+"/net/a && mount --bind "+root+" "+root+
			" && mount -o remount,bind,ro "+root)
		defer nettest.Shell(t, "umount "+root)
		var told []string
		s := New(root, "")
		s.Changed = func(name, was, value string) { told = append(told, name+": "+was+" -> "+value) }
		if err := s.Set("net/a", "1"); !errors.Is(err, syscall.EROFS) {
			t.Fatalf("a read-only setting was set: %v", err)
		}
		s.Elsewhere = elsewhere
		must(t, s.Set("net/a", "1"))
		want(t, s, "net/a", "1")
		if err := s.Set("net/b", "1"); !errors.Is(err, syscall.EROFS) {
			t.Errorf("a setting that is not elsewhere: %v, want %v", err, syscall.EROFS)
		}
		if _, err := os.Stat(filepath.Join(elsewhere, "net/b")); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("a file was made for a setting that is not there: %v", err)
		}
		if !slices.Equal(told, []string{"net/a: 0 -> 1"}) {
			t.Errorf("told %q", told)
		}
	})
}
