// A listening socket of Multipath TCP takes no MD5 key (RFC 2385), and Go would make one for passive BGP sessions.
//go:debug multipathtcp=0

// Command ravel is a layer-4 load balancer for bare-metal Kubernetes: the director, the realserver agent, and the
// commands by which an operator asks them.
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"slices"
	"syscall"

	"github.com/urfave/cli/v2"

	"github.com/ravel-lb/ravel/internal/admin"
)

// The exit codes of every command. docs/cli.md explains them.
const (
	exitOK         = 0
	exitFault      = 1 // it could not be done, or a check failed
	exitUsage      = 2 // the command or its settings are wrong, or it may not do this; nothing was touched
	exitNotRunning = 3 // no ravel runs here
	exitNotWell    = 4 // it runs, and what was asked about is not as it should be: a session down, a VIP not announced
)

// errNotWell ends a command that printed what is wrong already.
var errNotWell = errors.New("not all is well")

// usageError is a fault of what the operator typed.
type usageError struct{ error }

func main() { os.Exit(run(os.Args, os.Stdout, os.Stderr)) }

func run(args []string, stdout, stderr io.Writer) int {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, syscall.SIGINT)
	defer stop()
	app := newApp(stdout, stderr)
	args, notes, err := fromOriginal(args, app.Commands)
	warnOf(stderr, notes)
	if err == nil {
		err = app.RunContext(ctx, flagsFirst(args, app.Commands))
	}
	var usage usageError
	var refusal *admin.Refusal
	switch {
	case err == nil:
		return exitOK
	case errors.Is(err, errNotWell):
		return exitNotWell
	case errors.As(err, &usage), errors.Is(err, admin.ErrNoAccess), errors.As(err, &refusal) && refusal.Usage:
		fmt.Fprintln(stderr, "ravel:", err)
		return exitUsage
	case errors.Is(err, admin.ErrNotRunning):
		fmt.Fprintln(stderr, "ravel:", err)
		return exitNotRunning
	}
	fmt.Fprintln(stderr, "ravel:", err)
	return exitFault
}

// noArguments refuses to run a command that was given arguments: the flags behind the first one were not read, so that
// what they would have kept from happening would happen.
func noArguments(name string, action cli.ActionFunc) cli.ActionFunc {
	return func(c *cli.Context) error {
		if c.Args().Present() {
			return usageError{fmt.Errorf("%q: ravel %s takes no arguments, only flags; nothing was done", c.Args().First(), name)}
		}
		return action(c)
	}
}

func newApp(stdout, stderr io.Writer) *cli.App {
	usage := func(_ *cli.Context, err error, _ bool) error { return usageError{err} }
	commands := []*cli.Command{
		directorCommand(), realserverCommand(),
		peersCommand(), vipsCommand(), servicesCommand(),
		membersCommand(), traceCommand(), planCommand(), drainCommand(), freezeCommand(), acceptCommand(),
		checkCommand(), cleanupCommand(), gossipKeyCommand(), versionCommand(),
	}
	for _, c := range commands {
		c.OnUsageError, c.HideHelpCommand = usage, true
		if !slices.Contains(takesArguments, c.Name) {
			c.Action = noArguments(c.Name, c.Action)
		}
	}
	return &cli.App{
		Name:            "ravel",
		Usage:           "a layer-4 load balancer for bare-metal Kubernetes",
		Writer:          stdout,
		ErrWriter:       stderr,
		HideVersion:     true,
		HideHelpCommand: true,
		ExitErrHandler:  func(*cli.Context, error) {},
		OnUsageError:    usage,
		Commands:        commands,
		Action: func(c *cli.Context) error {
			if c.Args().Present() {
				return usageError{fmt.Errorf("%q is no command of ravel; see ravel --help", c.Args().First())}
			}
			return cli.ShowAppHelp(c)
		},
	}
}
