package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"

	"github.com/ravel-lb/ravel/lab/fleet"
)

// prompt runs an interactive shell in which each node's name is a command that runs another one there: `d1 ravel peers`,
// and `r1 p1 ip address` for the pod p1 of r1. It returns when the user leaves.
func prompt(ctx context.Context, f *fleet.Fleet, banner string) error {
	dir, err := os.MkdirTemp("", "lab-prompt")
	if err != nil {
		return err
	}
	defer func() { _ = os.RemoveAll(dir) }()
	rc := filepath.Join(dir, "rc")
	if err := os.WriteFile(rc, []byte(promptRC(f)), 0o600); err != nil {
		return err
	}
	fmt.Print(banner)
	// The terminal's interrupts are for what the user runs, so only the end of this process ends the shell.
	shell := exec.CommandContext(context.WithoutCancel(ctx), "bash", "--rcfile", rc, "-i")
	shell.Stdin, shell.Stdout, shell.Stderr = os.Stdin, os.Stdout, os.Stderr
	err = shell.Run()
	var exit *exec.ExitError
	if errors.As(err, &exit) {
		return nil // the status of the user's last command
	}
	return err
}

// promptRC returns what the prompt's shell reads first.
func promptRC(f *fleet.Fleet) string {
	var b strings.Builder
	wd, _ := os.Getwd()
	fmt.Fprintf(&b, "PATH=%s:$PATH:/usr/sbin:/sbin\nPS1='lab> '\nunset PROMPT_COMMAND HISTFILE\n",
		"'"+strings.ReplaceAll(filepath.Join(wd, "build"), "'", `'\''`)+"'")
	b.WriteString(`enter() {
	local pid=$1 pod=; shift
	case ${1:-} in p[0-9]) pod=$1; shift ;; esac
	[ $# -gt 0 ] || set -- bash --norc
	nsenter -t "$pid" -m -u -i -n -p --wd="$PWD" -- ${pod:+ip netns exec $pod} "$@"
}
`)
	for _, n := range f.Topology().Nodes {
		fmt.Fprintf(&b, "%s() { enter %d \"$@\"; }\n", n.Name, f.Node(n.Name).PID())
	}
	return b.String()
}
