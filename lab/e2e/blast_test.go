package e2e

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/ravel-lb/ravel/lab/stage"
)

// A change that takes away too much is held by all of the fleet, over restarts, and no request fails. One accept, on any
// member, lets it through.
func TestAChangeThatTakesTooMuchIsHeld(t *testing.T) {
	share := []string{"--blast-radius", "50"}
	s := fleetWith(t, share, share)
	load := startSteady(t, s)
	good := string(shared.first.YAML())
	nodes := append(s.Directors(), s.Realservers()...)
	held := func(want string) {
		t.Helper()
		for _, node := range nodes {
			eventually(t, 20*time.Second, func() error {
				out, err := s.Ravel(t.Context(), node, "check")
				if code, err := exitCode(err); err != nil || code != 1 || !strings.Contains(out, want) || !strings.Contains(out, "ravel accept") {
					return fmt.Errorf("%s: ravel check: exit code %d, %w, without %q:\n%s", node, code, err, want, out)
				}
				if out, _ := s.Ravel(t.Context(), node, "vips"); !strings.Contains(out, "ravel: a change of the documents is held") {
					return fmt.Errorf("%s: ravel vips does not tell it:\n%s", node, out)
				}
				return nil
			})
		}
		load.unbroken(t, want)
	}
	mended := func() {
		t.Helper()
		must(t, s.SetDocument(shared.first))
		for _, node := range nodes {
			eventually(t, 20*time.Second, func() error {
				out, err := s.Ravel(t.Context(), node, "check")
				if strings.Contains(out, "is held") || err != nil {
					return fmt.Errorf("%s: %w: %s", node, err, out)
				}
				return nil
			})
		}
		load.unbroken(t, "mended")
	}

	must(t, s.WriteFile(spoil(t, good, "cluster:\n", "cluster:\n  labels: {example.net/pool: nobody}\n")))
	held("it would take away all 4 real servers (r1, r2, r3 and 1 more) at once")
	for _, node := range []string{"d1", "r1"} {
		must(t, s.Process(node).Kill())
		must(t, s.Start(node))
	}
	must(t, s.WaitHops(within(t, 20*time.Second), stage.Routers(), vips, 3))
	held("it would take away all 4 real servers")
	mended()

	must(t, s.WriteFile([]byte("cluster: {config: {}, config6: {}}\nfleet: {}\nnodes: []\nendpoints: []\n")))
	held("it would take away all 2 VIPs (198.51.100.20, 2001:db8:77::20), and all 4 real servers")
	// A director that lost all that it knew does not go by it either, and its kernel serves on.
	must(t, s.Process("d2").Kill())
	on(t, s, "d2", "bash", "-c", "rm /run/ravel/*.json /run/ravel/*.yaml")
	must(t, s.Start("d2"))
	must(t, s.WaitHops(within(t, 20*time.Second), stage.Routers(), vips, 2))
	eventually(t, 20*time.Second, func() error {
		out, err := s.Ravel(t.Context(), "d2", "check")
		if !strings.Contains(out, "what was in force before is not known here") {
			return fmt.Errorf("d2: %w: %s", err, out)
		}
		return nil
	})
	load.unbroken(t, "a director that knows of nothing before")
	mended()
	must(t, s.WaitHops(within(t, 20*time.Second), stage.Routers(), vips, 3))
	load.stop(t)

	must(t, s.Change(func(d *stage.Document) { d.Services = nil }))
	eventually(t, 20*time.Second, func() error {
		out := ravelSays(t, s, "d2", 0, "plan", "held")
		if strings.Count(out, "the service goes") != 4 {
			return errors.New(out)
		}
		return nil
	})
	if out := ravelSays(t, s, "r2", 0, "accept"); !strings.Contains(out, " is accepted: it takes effect now, everywhere, and takes away all 2 VIPs") {
		t.Error(out)
	}
	must(t, s.WaitHops(within(t, 20*time.Second), stage.Routers(), vips, 0))
	for _, node := range nodes {
		eventually(t, 30*time.Second, func() error {
			if out := on(t, s, node, "ip", "-o", "address", "show", "dev", "ravel0"); slices.ContainsFunc(vips, func(vip netip.Addr) bool { return strings.Contains(out, vip.String()+"/") }) {
				return fmt.Errorf("%s still holds a VIP: %s", node, out)
			}
			return nil
		})
	}
	must(t, s.SetDocument(shared.first))
	must(t, s.WaitHops(within(t, 30*time.Second), stage.Routers(), vips, 3))
}
