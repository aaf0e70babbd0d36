// Lab runs the fleet of lab/ravel.clab.yml in network namespaces. Where the machine's kernel lacks IPVS it boots the lab
// kernel by itself and runs there.
package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"syscall"

	"github.com/ravel-lb/ravel/lab/fleet"
	"github.com/ravel-lb/ravel/lab/labkernel"
	"github.com/ravel-lb/ravel/lab/topology"
)

// command is a subcommand. It runs as root, on a kernel that has all that the lab needs, with the repository as its
// working directory.
type command struct {
	name, help string
	run        func(ctx context.Context, args []string) error
}

func commands() []command {
	return []command{
		{"demo", "the story: a fleet that carries traffic past the loss of a director, a process and a router", demo},
		{"shell", "the fleet with ravel, and a prompt with five things to try", shell},
		{"up", "the fleet without ravel: a prompt, or the commands given as NODE COMMAND", up},
	}
}

func main() { os.Exit(run()) }

func run() int {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM, syscall.SIGHUP)
	defer stop()
	if len(os.Args) > 1 {
		for _, c := range commands() {
			if c.name != os.Args[1] {
				continue
			}
			done, err := prepare(ctx)
			if err == nil && !done {
				err = c.run(ctx, os.Args[2:])
			}
			if os.Geteuid() == 0 {
				err = errors.Join(err, labkernel.GiveBack("build"))
			}
			return status(err)
		}
	}
	fmt.Fprintln(os.Stderr, "usage: lab COMMAND [ARGUMENT ...]")
	for _, c := range commands() {
		fmt.Fprintf(os.Stderr, "  %-8s %s\n", c.name, c.help)
	}
	return 2
}

// status prints an error and turns it into an exit status.
func status(err error) int {
	if err == nil {
		return 0
	}
	var code labkernel.ExitError
	if errors.As(err, &code) {
		return int(code) // the one in the lab kernel has said why
	}
	fmt.Fprintln(os.Stderr, "lab:", err)
	return 1
}

// prepare goes to the repository, and sees to a kernel that has what the lab needs: it runs this very command there and
// reports done, or returns in it.
func prepare(ctx context.Context) (done bool, err error) {
	self, err := os.Executable()
	if err != nil {
		return false, err
	}
	// build/lab
	if err := os.Chdir(filepath.Dir(filepath.Dir(self))); err != nil {
		return false, err
	}
	if os.Geteuid() != 0 {
		return false, errors.New("the lab needs root: use make demo, or sudo")
	}
	lacks, err := labkernel.Lacks(ctx)
	if err != nil || len(lacks) == 0 {
		return false, err
	}
	if labkernel.Inside() {
		return false, fmt.Errorf("the lab kernel lacks %v", lacks)
	}
	return true, labkernel.Run(ctx, append([]string{self}, os.Args[1:]...))
}

// bringUp realises the topology of the repository.
func bringUp(ctx context.Context) (*fleet.Fleet, error) {
	topo, err := topology.Load("lab/ravel.clab.yml")
	if err != nil {
		return nil, err
	}
	return fleet.Up(ctx, topo, fleet.Options{LogDir: "build/lab-logs"})
}

func up(ctx context.Context, args []string) error {
	f, err := bringUp(ctx)
	if err != nil {
		return err
	}
	defer func() { _ = f.Down() }()
	if len(args) == 0 {
		return prompt(ctx, f, "The fleet is up.\n")
	}
	if _, known := f.Topology().Node(args[0]); !known || len(args) < 2 {
		return errors.New("usage: lab up [NODE COMMAND ...]")
	}
	cmd := f.Node(args[0]).Command(ctx, args[1:]...)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	return cmd.Run()
}
