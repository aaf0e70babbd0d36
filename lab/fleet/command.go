package fleet

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"time"
)

// Place is where commands run: a node, or a pod of a node.
type Place struct {
	thread *thread
	node   *Node
}

// Do runs fn on a thread that is in the place. Sockets that fn opens belong to the place for good; goroutines that fn
// starts are not in it. Other commands of the place wait for fn.
func (p *Place) Do(fn func() error) error { return p.thread.do(fn) }

// Cmd is an exec.Cmd that starts in a node or pod. The fields of exec.Cmd mean what they always do.
type Cmd struct {
	*exec.Cmd
	place *Place
}

// Command prepares a command; Start, Run, Output or CombinedOutput run it. Its working directory is this process's, its
// files are the node's. The end of ctx kills it, and so does the end of this process.
func (p *Place) Command(ctx context.Context, args ...string) *Cmd {
	cmd := exec.CommandContext(ctx, args[0], args[1:]...)
	if errors.Is(cmd.Err, exec.ErrNotFound) {
		// An ordinary user's PATH, kept by sudo, has no sbin.
		for _, dir := range []string{"/usr/sbin", "/sbin", "/usr/local/sbin"} {
			if path := filepath.Join(dir, args[0]); exec.Command(path).Err == nil && executable(path) {
				cmd.Path, cmd.Err = path, nil
				break
			}
		}
	}
	// A child of the command that lives on does not hold up its end.
	cmd.WaitDelay = 2 * time.Second
	cmd.Dir, _ = os.Getwd()
	// No Pdeathsig: os/exec takes a parent outside of the child's processes for dead. Process 1 of the node has it.
	return &Cmd{Cmd: cmd, place: p}
}

func executable(path string) bool {
	info, err := os.Stat(path)
	return err == nil && info.Mode().IsRegular() && info.Mode()&0o111 != 0
}

// Start starts the command; see exec.Cmd.
func (c *Cmd) Start() error {
	if c.place.node.dead() {
		return fmt.Errorf("%s: %w", c.place.node.name, errEnded)
	}
	return c.place.Do(func() error { return c.Cmd.Start() })
}

// Run starts the command and waits for its end; see exec.Cmd.
func (c *Cmd) Run() error {
	if err := c.Start(); err != nil {
		return err
	}
	return c.Wait()
}

// Output runs the command and returns what it wrote to standard output; see exec.Cmd.
func (c *Cmd) Output() ([]byte, error) {
	var out, problems bytes.Buffer
	c.Stdout = &out
	if c.Stderr == nil {
		c.Stderr = &problems
	}
	err := c.Run()
	var exit *exec.ExitError
	if errors.As(err, &exit) {
		exit.Stderr = problems.Bytes()
	}
	return out.Bytes(), err
}

// CombinedOutput runs the command and returns what it wrote to both outputs; see exec.Cmd.
func (c *Cmd) CombinedOutput() ([]byte, error) {
	var out bytes.Buffer
	c.Stdout, c.Stderr = &out, &out
	err := c.Run()
	return out.Bytes(), err
}

// Process is a long-lived process of a node.
type Process struct {
	Log  string // the file that it writes both outputs to
	name string
	cmd  *Cmd
	done chan struct{} // closed when it has ended
	err  error         // how it ended; set before done is closed
}

// Spawn starts a process that runs until it ends or the fleet does. What it says goes to the end of the file
// NODE-NAME.log in Options.LogDir.
func (p *Place) Spawn(name string, args ...string) (*Process, error) {
	proc := &Process{
		Log:  filepath.Join(p.node.opts.LogDir, p.node.name+"-"+name+".log"),
		name: p.node.name + " " + name,
		cmd:  p.Command(context.Background(), args...),
		done: make(chan struct{}),
	}
	log, err := os.OpenFile(proc.Log, os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o644)
	if err != nil {
		return nil, err
	}
	defer func() { _ = log.Close() }()
	proc.cmd.Stdout, proc.cmd.Stderr = log, log
	if err := proc.cmd.Start(); err != nil {
		return nil, fmt.Errorf("starting %s: %w", proc.name, err)
	}
	go func() {
		proc.err = proc.cmd.Wait()
		close(proc.done)
	}()
	return proc, nil
}

// Done is closed when the process has ended.
func (p *Process) Done() <-chan struct{} { return p.done }

// Signal sends a signal to the process. It is no error if the process is gone.
func (p *Process) Signal(s syscall.Signal) error {
	if err := p.cmd.Process.Signal(s); err != nil && !errors.Is(err, os.ErrProcessDone) {
		return fmt.Errorf("%s: %w", p.name, err)
	}
	return nil
}

// Kill ends the process at once, by SIGKILL, and waits until it is gone.
func (p *Process) Kill() error {
	err := p.Signal(syscall.SIGKILL)
	if err == nil {
		<-p.done
	}
	return err
}

// Stop asks the process to end, by SIGTERM, and waits until it has. Its error is nil if the process exited with 0 or
// died of the signal. When ctx ends first the process is killed.
func (p *Process) Stop(ctx context.Context) error {
	if err := p.Signal(syscall.SIGTERM); err != nil {
		return err
	}
	select {
	case <-p.done:
	case <-ctx.Done():
		return errors.Join(fmt.Errorf("%s: %w", p.name, ctx.Err()), p.Kill())
	}
	var exit *exec.ExitError
	if errors.As(p.err, &exit) {
		if status, ok := exit.Sys().(syscall.WaitStatus); ok && status.Signaled() && status.Signal() == syscall.SIGTERM {
			return nil
		}
	}
	if p.err != nil {
		return fmt.Errorf("%s: %w", p.name, p.err)
	}
	return nil
}
