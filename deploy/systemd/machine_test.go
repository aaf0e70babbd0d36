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
	for deadline := time.Now().Add(60 * time.Second); ; time.Sleep(500 * time.Millisecond) {
		err := is()
		if err == nil {
			return
		}
		if time.Now().After(deadline) {
			m.t.Fatalf("%s: %v", what, err)
		}
	}
}

// unit is the state of a unit: some of its properties, by their names.
type unit map[string]string

func (u unit) String() string { return fmt.Sprint(map[string]string(u)) }

// show returns the state of a unit.
func (m *machine) show(name string) unit {
	m.t.Helper()
	u := unit{}
	const properties = "ActiveState,Result,StatusText,MainPID,NRestarts,ExecMainStatus"
	for line := range strings.Lines(m.run("systemctl", "show", "--property", properties, name)) {
		key, value, _ := strings.Cut(strings.TrimSpace(line), "=")
		u[key] = value
	}
	return u
}

// shows waits until the state of a unit is as wanted, and returns it.
func (m *machine) shows(name string, wanted func(unit) bool) (u unit) {
	m.t.Helper()
	m.until(name, func() error {
		if u = m.show(name); !wanted(u) {
			return errors.New(u.String())
		}
		return nil
	})
	return u
}
