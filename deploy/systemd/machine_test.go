package systemd_test

import (
	"bytes"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/ravel-lb/ravel/internal/nettest"
)

func TestMain(m *testing.M) {
	// Machines mostly wait: for a watchdog, for a restart.
	flag.Parse()
	if err := flag.Set("test.parallel", "5"); err != nil {
		panic(err)
	}
	nettest.Main(m)
}

const program = "../../build/ravel"

// machine is a systemd that runs as process 1 in namespaces of its own, on a copy of this machine's files, with the units
// and a ravel installed.
type machine struct {
	t   *testing.T
	pid int // of process 1, here
}

// boot starts a machine with the files in /etc/ravel. It ends with the test.
func boot(t *testing.T, files map[string]string) *machine {
	t.Helper()
	nettest.Need(t, nettest.Root, nettest.IPVS, nettest.Dummy, nettest.IPSet, nettest.Systemd)
	if _, err := os.Stat(program); err != nil {
		t.Fatalf("%v: make build makes it", err)
	}
	configuration := t.TempDir()
	for name, text := range files {
		if err := os.WriteFile(filepath.Join(configuration, name), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	cgroup, err := os.MkdirTemp("/sys/fs/cgroup", "ravel-systemd-")
	if err != nil {
		t.Fatal(err)
	}
	here, err := os.Getwd()
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(filepath.Join(here, "testdata/boot"), cgroup, filepath.Join(here, program), configuration, here)
	var said bytes.Buffer
	cmd.Stdout, cmd.Stderr = &said, &said
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags: syscall.CLONE_NEWPID | syscall.CLONE_NEWNS | syscall.CLONE_NEWNET | syscall.CLONE_NEWUTS | syscall.CLONE_NEWIPC,
		Pdeathsig:  syscall.SIGKILL,
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	ended := make(chan error, 1)
	go func() { ended <- cmd.Wait() }()
	m := &machine{t: t, pid: cmd.Process.Pid}
	t.Cleanup(func() {
		if t.Failed() {
			journal, err := m.try("journalctl", "--no-pager", "-o", "short-monotonic", "-n", "200")
			t.Logf("the journal (%v):\n%s", err, journal)
		}
		// The end of process 1 is the end of all processes of its namespace.
		_ = cmd.Process.Kill()
		<-ended
		if t.Failed() {
			t.Logf("the machine said:\n%s", said.String())
		}
		if err := removeCgroups(cgroup); err != nil {
			t.Error(err)
		}
	})
	m.until("the machine is up", func() error {
		select {
		case err := <-ended:
			ended <- err
			t.Fatalf("process 1 ended: %v", err)
		default:
		}
		if state, err := m.try("systemctl", "is-system-running"); state != "running\n" {
			return fmt.Errorf("%s (%v)", strings.TrimSpace(state), err)
		}
		return nil
	})
	return m
}

// removeCgroups removes a group and those below it, which have no processes any more.
func removeCgroups(top string) error {
	for deadline := time.Now().Add(10 * time.Second); ; time.Sleep(10 * time.Millisecond) {
		var dirs []string
		err := filepath.WalkDir(top, func(path string, d os.DirEntry, err error) error {
			if err == nil && d.IsDir() {
				dirs = append(dirs, path)
			}
			return err
		})
		for i := range dirs {
			err = errors.Join(err, os.Remove(dirs[len(dirs)-1-i]))
		}
		if err == nil || time.Now().After(deadline) {
			return err
		}
	}
}

// try runs a command on the machine and returns what it printed.
func (m *machine) try(args ...string) (string, error) {
	cmd := exec.Command("nsenter", append([]string{"--target", strconv.Itoa(m.pid), "--all", "--root", "--wd", "--"}, args...)...)
	cmd.Env = []string{"PATH=/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL=C.UTF-8", "SYSTEMD_PAGER="}
	var out, errs bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errs
	err := cmd.Run()
	if err != nil {
		err = fmt.Errorf("%w: %s", err, errs.String())
	}
	return out.String(), err
}

// run is try for a command that must succeed.
func (m *machine) run(args ...string) string {
	m.t.Helper()
	out, err := m.try(args...)
	if err != nil {
		m.t.Fatalf("%s: %v\n%s", strings.Join(args, " "), err, out)
	}
	return out
}

// shell runs a script of bash.
func (m *machine) shell(script string) string {
	m.t.Helper()
	return m.run("bash", "-euc", script)
}

// until waits for something to be true.
func (m *machine) until(what string, is func() error) {
	m.t.Helper()
	for deadline := time.Now().Add(60 * time.Second); ; time.Sleep(200 * time.Millisecond) {
		err := is()
		if err == nil {
			return
		}
		if time.Now().After(deadline) {
			m.t.Fatalf("%s: %v", what, err)
		}
	}
}

// show returns a property of a unit.
func (m *machine) show(unit, property string) string {
	m.t.Helper()
	return strings.TrimSpace(m.run("systemctl", "show", "--value", "-p", property, unit))
}

// shows waits until a property of a unit has a value that does.
func (m *machine) shows(unit, property string, does func(value string) bool) (value string) {
	m.t.Helper()
	m.until(unit, func() error {
		if value = m.show(unit, property); !does(value) {
			return fmt.Errorf("%s=%s", property, value)
		}
		return nil
	})
	return value
}

func is(want string) func(string) bool { return func(s string) bool { return s == want } }

func has(part string) func(string) bool {
	return func(s string) bool { return strings.Contains(s, part) }
}
