package main

import (
	"bytes"
	"context"
	"errors"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/ravel-lb/ravel/internal/admin"
	"github.com/ravel-lb/ravel/internal/nettest"
)

const programArgs = "RAVEL_TEST_ARGS"

// TestMain is the program itself, in a process of its own, for the test that starts it.
func TestMain(m *testing.M) {
	if args := os.Getenv(programArgs); args != "" {
		os.Exit(run(append([]string{"ravel"}, strings.Fields(args)...), os.Stdout, os.Stderr))
	}
	os.Exit(m.Run())
}

// runAsNobody runs the program as a user without any rights.
func runAsNobody(t *testing.T, program, args string) (code int, output string) {
	t.Helper()
	command := exec.CommandContext(t.Context(), program)
	command.Env = []string{programArgs + "=" + args, "PATH=" + os.Getenv("PATH")}
	command.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 65534, Gid: 65534}}
	command.Dir = "/"
	var out bytes.Buffer
	command.Stdout, command.Stderr = &out, &out
	err := command.Run()
	if exit := (*exec.ExitError)(nil); err != nil && !errors.As(err, &exit) {
		t.Fatal(err)
	}
	return command.ProcessState.ExitCode(), out.String()
}

// Who lacks the rights is told what to do, and nothing is touched.
func TestWithoutRights(t *testing.T) {
	nettest.Need(t, nettest.Root) // to run the program as somebody else
	dir, err := os.MkdirTemp("", "ravel")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := os.RemoveAll(dir); err != nil {
			t.Error(err)
		}
	})
	self, err := os.ReadFile("/proc/self/exe")
	if err != nil {
		t.Fatal(err)
	}
	program := filepath.Join(dir, "ravel.test")
	if err := errors.Join(os.Chmod(dir, 0o755), os.WriteFile(program, self, 0o755), os.Chmod(program, 0o755)); err != nil {
		t.Fatal(err)
	}
	socket := serve(t, map[string]admin.Query{"check": func(context.Context) (any, error) { return checkAnswer{}, nil }})
	for path := filepath.Dir(socket); path != os.TempDir() && path != "/"; path = filepath.Dir(path) {
		if err := os.Chmod(path, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	noAccess := "ravel: run as root (the admin socket " + socket + " is root's)\n"
	for _, name := range []string{"peers", "vips", "services", "check"} {
		if code, out := runAsNobody(t, program, name+" --admin-socket "+socket); code != exitUsage || out != noAccess {
			t.Errorf("ravel %s: exit code %d:\n%s", name, code, out)
		}
	}
	// A file can be checked nevertheless.
	static := filepath.Join(dir, "static.yaml")
	example, err := os.ReadFile("../../deploy/example/ravel-static.yaml")
	if err := errors.Join(err, os.WriteFile(static, example, 0o644)); err != nil {
		t.Fatal(err)
	}
	code, out := runAsNobody(t, program, "check --node director1 --static "+static+" --admin-socket "+socket)
	if code != exitFault || !strings.Contains(out, "fail  process: run as root (") || !strings.Contains(out, "looked at as the director director1") {
		t.Errorf("ravel check --static: exit code %d:\n%s", code, out)
	}

	_, before := os.Stat(lockFile)
	state := filepath.Join(dir, "state")
	for _, args := range []string{"director --gossip-insecure --static " + static, "realserver --gossip-insecure --static " + static, "cleanup", "cleanup --dry-run"} {
		name, _, _ := strings.Cut(args, " ")
		code, out := runAsNobody(t, program, args+" --state-dir "+state)
		if code != exitUsage || !strings.HasPrefix(out, "ravel: ravel "+name+" lacks CAP_NET_ADMIN") || strings.Count(out, "\n") != 1 {
			t.Errorf("ravel %s: exit code %d:\n%s", args, code, out)
		}
	}
	// What is wrong with the settings comes first, as for everybody.
	if code, out := runAsNobody(t, program, "director --stop-wait abc"); code != exitUsage || !strings.Contains(out, "--stop-wait") {
		t.Errorf("exit code %d:\n%s", code, out)
	}
	if _, after := os.Stat(lockFile); (after == nil) != (before == nil) {
		t.Errorf("the lock: %v, and before %v", after, before)
	}
	if _, err := os.Stat(state); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("the state directory: %v", err)
	}
}
