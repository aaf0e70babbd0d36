package cluster

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"runtime"
	"strconv"
	"syscall"
)

// process is a program of the cluster, and all that it started. A nil one is one that does not run.
type process struct {
	name string
	log  string
	cmd  *exec.Cmd
	done chan struct{} // closed when it has ended
	told bool          // that it ended was asked for, or has been said
}

// spawn starts the binary. What it says goes to the end of NAME.log.
func (c *Cluster) spawn(name string, args ...string) (*process, error) {
	p := &process{name: name, log: c.file(name + ".log"), cmd: exec.Command(c.opts.Binary, args...), done: make(chan struct{})}
	log, err := os.OpenFile(p.log, os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o644)
	if err != nil {
		return nil, err
	}
	defer func() { _ = log.Close() }()
	p.cmd.Stdout, p.cmd.Stderr = log, log
	p.cmd.Dir = c.dir
	p.cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	if c.opts.Place == (here{}) {
		// The child dies with the thread that started it: that one waits for it. In a node of the fleet, whose first
		// process does this, os/exec would take the parent that the child cannot see for dead.
		p.cmd.SysProcAttr.Pdeathsig = syscall.SIGKILL
	}
	started := make(chan error)
	go func() {
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		err := c.opts.Place.Do(p.cmd.Start)
		started <- err
		if err == nil {
			_ = p.cmd.Wait() // cmd.ProcessState says how it ended
			close(p.done)
		}
	}()
	if err := <-started; err != nil {
		return nil, fmt.Errorf("starting %s: %w", name, err)
	}
	return p, nil
}

func (p *process) runs() bool {
	if p == nil {
		return false
	}
	select {
	case <-p.done:
		return false
	default:
		return true
	}
}

// kill ends the process and those that it started, and waits for it. It is an error, once, if the process had ended by
// itself.
func (p *process) kill() error {
	if p == nil || p.told {
		return nil
	}
	p.told = true
	if !p.runs() {
		return p.ended()
	}
	if err := syscall.Kill(-p.cmd.Process.Pid, syscall.SIGKILL); err != nil && !errors.Is(err, syscall.ESRCH) {
		return fmt.Errorf("killing %s: %w", p.name, err)
	}
	<-p.done
	return nil
}

// ended says how a process ended that nobody ended, in its last words.
func (p *process) ended() error {
	const enough = 1500
	text, err := os.ReadFile(p.log)
	if err != nil {
		text = []byte(err.Error())
	}
	return fmt.Errorf("%s ended by itself: %v\n%s", p.name, p.cmd.ProcessState, text[max(0, len(text)-enough):])
}

// memory is the resident memory in bytes.
func (p *process) memory() (int, error) {
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/statm", p.cmd.Process.Pid))
	if err != nil {
		return 0, err
	}
	fields := bytes.Fields(text)
	if len(fields) < 2 {
		return 0, fmt.Errorf("statm is %q", text)
	}
	pages, err := strconv.Atoi(string(fields[1]))
	return pages * os.Getpagesize(), err
}
