// Package labkernel knows whether this machine's kernel can carry the lab, and runs a command in one that can: user-mode
// Linux, by lab/lab-kernel.
package labkernel

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"time"

	"github.com/ravel-lb/ravel/internal/nettest"
)

// ExitError is the exit status, not 0, of a command that ran in the lab kernel.
type ExitError int

func (e ExitError) Error() string { return fmt.Sprintf("exit status %d in the lab kernel", int(e)) }

// Lacks returns what a director or realserver needs and the running kernel has not.
func Lacks() []string {
	var lacks []string
	for _, f := range []nettest.Feature{nettest.IPVS, nettest.Dummy, nettest.IPIP, nettest.IPSet} {
		if !nettest.Has(f) {
			lacks = append(lacks, string(f))
		}
	}
	return lacks
}

// Inside reports whether the running kernel is user-mode Linux.
func Inside() bool {
	cpu, err := os.ReadFile("/proc/cpuinfo")
	return err == nil && strings.Contains(string(cpu), "User Mode Linux")
}

// Command prepares lab/lab-kernel, which must be below the working directory, to run a command. The end of ctx ends the
// kernel and all in it.
func Command(ctx context.Context, args []string) *exec.Cmd {
	cmd := exec.CommandContext(ctx, "lab/lab-kernel", args...)
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGTERM}
	cmd.Cancel = func() error { return cmd.Process.Signal(syscall.SIGTERM) }
	cmd.WaitDelay = 10 * time.Second
	return cmd
}

// Run runs a command in the lab kernel, on this process's inputs and outputs.
func Run(ctx context.Context, args []string) error {
	cmd := Command(ctx, args)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	err := cmd.Run()
	var exit *exec.ExitError
	if errors.As(err, &exit) && exit.ExitCode() > 0 {
		return ExitError(exit.ExitCode())
	}
	return err
}
