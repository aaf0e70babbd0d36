// Package labkernel knows whether this machine's kernel can carry the lab, and runs a command in one that can: user-mode
// Linux, by lab/lab-kernel.
package labkernel

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"slices"
	"strings"
	"syscall"
	"time"
)

// ExitError is the exit status, not 0, of a command that ran in the lab kernel.
type ExitError int

func (e ExitError) Error() string { return fmt.Sprintf("exit status %d in the lab kernel", int(e)) }

// Lacks returns what the lab needs and the running kernel has not, as lab/kernel-lacks says, by which lab/setup decides
// too. The script must be below the working directory.
func Lacks(ctx context.Context) ([]string, error) {
	out, err := exec.CommandContext(ctx, "lab/kernel-lacks").Output()
	if err != nil {
		return nil, fmt.Errorf("lab/kernel-lacks: %w", err)
	}
	lines := strings.Split(strings.TrimSpace(string(out)), "\n")
	return slices.DeleteFunc(lines, func(line string) bool { return line == "" }), nil
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
