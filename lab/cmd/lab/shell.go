package main

import (
	"context"
	"fmt"
	"time"

	"github.com/ravel-lb/ravel/lab/stage"
)

// banner is what the prompt begins with.
const banner = `
The fleet is up: routers spine, tor1, tor2, edge; directors d1, d2, d3; real servers r1 to r4 with pods p1, p2, …;
clients c1, c2. A node's name runs a command there. Five things to try:

  d1 ravel peers                               the sessions of a director; ravel vips, services and check say more
  c1 curl -s http://198.51.100.20/             which pod answers, and whom it sees; again, or from c2, or [2001:db8:77::20]
  tor1 ip route show 198.51.100.20             three directors, one route; tor1 vtysh -c 'show bgp summary'
  d2 pkill -9 -f 'ravel director'              then look at tor1's route again; c1 curl still works
  sed -i s/100.20/100.30/ build/static.yaml    another VIP: d1 ravel vips shows the old one linger and the new one come

Leave with exit. Logs are in build/lab-logs.

`

// shell leaves the fleet up at a prompt.
func shell(ctx context.Context, _ []string) error {
	fmt.Println("Bringing up the fleet: some 20 seconds.")
	s, err := stage.Up(ctx, "build", "build")
	if err != nil {
		return err
	}
	defer func() { _ = s.Down() }()
	wait, cancel := context.WithTimeoutCause(ctx, 2*time.Minute, fmt.Errorf("the fleet is not up after 2 minutes"))
	defer cancel()
	if err := s.StartAll(wait); err != nil {
		return err
	}
	return prompt(ctx, s.Fleet, banner)
}
