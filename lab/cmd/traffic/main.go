// Traffic is the lab's pod and the lab's client, each a process for a node or pod of the fleet.
//
//	traffic pod NAME PORT               answers with its name
//	traffic client SOCKET LOAD          does the load (traffic.Load as JSON); answers at the socket; reports at its end
package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"strconv"
	"syscall"

	"github.com/ravel-lb/ravel/lab/traffic"
	"golang.org/x/sync/errgroup"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	defer stop()
	err := run(ctx, os.Args[1:])
	if err != nil {
		fmt.Fprintln(os.Stderr, "traffic:", err)
		stop()
		os.Exit(1)
	}
}

func run(ctx context.Context, args []string) error {
	switch {
	case len(args) == 3 && args[0] == "pod":
		port, err := strconv.ParseUint(args[2], 10, 16)
		if err != nil {
			return err
		}
		return traffic.ServePod(ctx, args[1], uint16(port))
	case len(args) == 3 && args[0] == "client":
		var load traffic.Load
		if err := json.Unmarshal([]byte(args[2]), &load); err != nil {
			return fmt.Errorf("reading the load: %w", err)
		}
		client, err := traffic.NewClient(load)
		if err != nil {
			return err
		}
		group, ctx := errgroup.WithContext(ctx)
		group.Go(func() error { return client.Control(ctx, args[1]) })
		group.Go(func() error { client.Run(ctx); return nil })
		err = group.Wait()
		return errors.Join(err, json.NewEncoder(os.Stdout).Encode(client.Report()))
	}
	return errors.New("usage: traffic pod NAME PORT | traffic client SOCKET LOAD")
}
