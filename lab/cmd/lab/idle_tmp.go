package main

import (
	"context"
	"os"
	"os/exec"

	"github.com/ravel-lb/ravel/lab/stage"
	"net/netip"
)

func idle(ctx context.Context, _ []string) error {
	s, err := stage.Up(ctx, "build")
	if err != nil { return err }
	defer s.Down()
	if err := s.StartAll(); err != nil { return err }
	if err := s.WaitHops(ctx, stage.Routers(), []netip.Addr{stage.VIP4, stage.VIP6}, 3); err != nil { return err }
	run := func() { cmd := exec.Command("bash", "/var/lib/x/idle.sh"); cmd.Stdout, cmd.Stderr = os.Stdout, os.Stderr; cmd.Run() }
	run()
	st := &story{out: os.Stdout, vips: []netip.Addr{stage.VIP4, stage.VIP6}}
	st.stage = s
	if err := st.load(ctx); err != nil { return err }
	run()
	return nil
}
