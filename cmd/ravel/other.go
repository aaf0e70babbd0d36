package main

import (
	"context"
	"fmt"
	"os"

	"github.com/ravel-lb/ravel"
	"github.com/ravel-lb/ravel/director"
	"github.com/ravel-lb/ravel/realserver"
)

// endOther ends what a run of the other role left in this kernel: a host may have changed its role. The redirects of a
// realserver would take every packet before IPVS sees it, and the services of a director those that no redirect takes.
// Of a host that did not there is nothing to end. What cannot be ended is a problem, and stops nothing.
func (p *process) endOther(ctx context.Context) {
	done, err := p.otherLeft(ctx)
	for _, line := range done {
		p.settings.log.Info("a run of the other role left this, and it is removed", "what", line)
	}
	if err != nil {
		p.settings.log.Warn("ending what a run of the other role left", "err", err)
		p.other = []ravel.Problem{{
			Where: "this host", What: fmt.Sprintf("what a run of the other role left could not be removed, and may take packets: %v", err),
			Fix: "mend that and restart, or reboot the host",
		}}
	}
}

func (p *process) otherLeft(ctx context.Context) ([]string, error) {
	ctx, cancel := context.WithTimeout(ctx, cleanupTimeout)
	defer cancel()
	if p.role == ravel.Director {
		rs, err := realserver.New(realserver.Options{V4: p.v4, V6: p.v6, Sysctl: p.sysctl, Chain: p.settings.chain})
		if err != nil {
			return nil, err
		}
		return rs.Cleanup(ctx, false)
	}
	if _, err := os.Stat("/proc/net/ip_vs"); err != nil {
		return nil, nil // to ask would load it
	}
	ipvs, err := director.New(director.Options{})
	if err != nil {
		return nil, err
	}
	defer func() { _ = ipvs.Close() }()
	return ipvs.Cleanup(ctx, false)
}
