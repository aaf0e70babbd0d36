// Lab runs the fleet of lab/ravel.clab.yml in network namespaces. Where the machine's kernel has no IPVS it boots the
// lab kernel and runs there.
package main

import (
	"context"
	"fmt"
	"log/slog"
	"os"
	"os/signal"
	"strings"
	"syscall"

	"github.com/ravel-lb/ravel/lab/fleet"
	"github.com/ravel-lb/ravel/lab/topology"
)

func main() { os.Exit(run()) }

func run() int {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	defer stop()
	if len(os.Args) < 2 {
		fmt.Fprintln(os.Stderr, "usage: lab up -- COMMAND")
		return 2
	}
	topo, err := topology.Load("lab/ravel.clab.yml")
	if err != nil {
		fmt.Fprintln(os.Stderr, "lab:", err)
		return 1
	}
	log := slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: slog.LevelDebug}))
	f, err := fleet.Up(ctx, topo, fleet.Options{Log: log, LogDir: "build/logs"})
	if err != nil {
		fmt.Fprintln(os.Stderr, "lab:", err)
		return 1
	}
	defer f.Down()
	for _, a := range os.Args[2:] {
		name, script, _ := strings.Cut(a, ":")
		n := f.Node(name)
		a = script
		out, err := n.Command(ctx, "bash", "-c", a).CombinedOutput()
		fmt.Printf("== %s: %s\n%s%v\n", n.Name(), a, out, err)
	}
	return 0
}
