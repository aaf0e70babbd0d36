// Package e2e holds Ravel to its promises on a whole fleet: real routers, a real IPVS kernel, real packets. Its tests
// share one fleet, which each of them gets in its first state again.
package e2e

import (
	"cmp"
	"context"
	"fmt"
	"net/netip"
	"os"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/ravel-lb/ravel/internal/nettest"
	"github.com/ravel-lb/ravel/lab/stage"
)

func TestMain(m *testing.M) {
	// The topology's paths are relative to the repository. Main runs this process again, from there.
	if _, err := os.Stat("lab/ravel.clab.yml"); err != nil {
		if err := os.Chdir("../.."); err != nil {
			fmt.Fprintln(os.Stderr, "e2e:", err)
			os.Exit(1)
		}
	}
	// Main ends the process; the fleet ends with it.
	nettest.Main(m)
}

var shared struct {
	once  sync.Once
	stage *stage.Stage
	first stage.Document
	err   error
}

// vips are those of the stage's first document.
var vips = []netip.Addr{stage.VIP4, stage.VIP6}

// fleet returns the shared fleet in its first state: the first document in force, ravel running on every node without
// special arguments, three next hops for each VIP in each router's kernel.
func fleet(t *testing.T) *stage.Stage {
	t.Helper()
	return fleetWith(t, nil, nil)
}

// fleetWith is fleet with more arguments for all directors, and for all realservers.
func fleetWith(t *testing.T, directorArgs, realserverArgs []string) *stage.Stage {
	t.Helper()
	s := stageOf(t)
	must(t, s.SetDocument(shared.first))
	runAll(t, s, []string{"--static", s.File()}, directorArgs, realserverArgs)
	must(t, s.WaitHops(within(t, time.Minute), stage.Routers(), vips, len(s.Directors())))
	must(t, s.WaitTaking(within(t, 30*time.Second)))
	return s
}

// seenByAll are directories that all nodes of the fleet see, beside their own.
var seenByAll []string

// stageOf returns the shared fleet, on which ravel may run or not.
func stageOf(t *testing.T) *stage.Stage {
	t.Helper()
	nettest.Need(t, nettest.IPVS, nettest.Dummy, nettest.IPIP, nettest.IPSet, nettest.FRR)
	shared.once.Do(func() {
		for _, program := range []string{"build/ravel", "build/traffic"} {
			if _, err := os.Stat(program); err != nil {
				shared.err = fmt.Errorf("%w; run make build", err)
				return
			}
		}
		for _, dir := range seenByAll {
			if shared.err = os.MkdirAll(dir, 0o700); shared.err != nil {
				return
			}
		}
		shared.stage, shared.err = stage.Up(context.Background(), "build", cmp.Or(os.Getenv("RAVEL_TEST_DIR"), "build"), seenByAll...)
		if shared.err == nil {
			shared.first = shared.stage.Document()
		}
	})
	if shared.err != nil {
		t.Fatal(shared.err)
	}
	return shared.stage
}

// runAll has ravel run on all nodes, with documents from source. Those that run with other arguments are stopped in good
// order and started again, so tests with equal arguments had best follow one another.
func runAll(t *testing.T, s *stage.Stage, source, directorArgs, realserverArgs []string) {
	t.Helper()
	var changed []string
	if !slices.Equal(s.Source, source) || !slices.Equal(s.DirectorArgs, directorArgs) {
		changed = append(changed, s.Directors()...)
	}
	if !slices.Equal(s.Source, source) || !slices.Equal(s.RealserverArgs, realserverArgs) {
		changed = append(changed, s.Realservers()...)
	}
	changed = slices.DeleteFunc(changed, func(node string) bool { return !running(s, node) })
	for _, node := range changed {
		must(t, s.Process(node).Signal(syscall.SIGTERM))
	}
	for _, node := range changed {
		must(t, s.Process(node).Stop(within(t, 30*time.Second)))
	}
	s.Source, s.DirectorArgs, s.RealserverArgs = source, directorArgs, realserverArgs
	for _, node := range append(s.Realservers(), s.Directors()...) {
		if !running(s, node) {
			must(t, s.Start(node))
		}
	}
}

// running reports whether the ravel of a node runs with the stage's ordinary arguments.
func running(s *stage.Stage, node string) bool {
	p := s.Process(node)
	if p == nil {
		return false
	}
	select {
	case <-p.Done():
		return false
	default:
		return true
	}
}

// restart stops the ravel of a node in good order and starts it with more arguments; the next test gets it without.
func restart(t *testing.T, s *stage.Stage, node string, args ...string) {
	t.Helper()
	must(t, s.Process(node).Stop(within(t, 20*time.Second)))
	must(t, s.Start(node, args...))
	t.Cleanup(func() {
		if running(s, node) {
			if err := s.Process(node).Stop(within(t, 20*time.Second)); err != nil {
				t.Error(err)
			}
		}
	})
}

// within returns a context that ends after d.
func within(t *testing.T, d time.Duration) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeoutCause(context.Background(), d, fmt.Errorf("not within %s", d))
	t.Cleanup(cancel)
	return ctx
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// on runs a command on a node and returns its standard output; the test ends if it fails.
func on(t *testing.T, s *stage.Stage, node string, args ...string) string {
	t.Helper()
	out, err := s.Output(within(t, time.Minute), node, args...)
	must(t, err)
	return out
}

// eventually waits for check to return nil.
func eventually(t *testing.T, d time.Duration, check func() error) {
	t.Helper()
	must(t, stage.Wait(within(t, d), check))
}

func TestFleetIsUp(t *testing.T) {
	s := fleet(t)
	ready(t, s)
	for _, router := range stage.Routers() {
		for _, vip := range vips {
			hops, err := s.NextHops(t.Context(), router, vip)
			must(t, err)
			if len(hops) != 3 {
				t.Errorf("%s has the next hops %v for %s, want three", router, hops, vip)
			}
		}
	}
	for _, d := range s.Directors() {
		var out string
		eventually(t, 20*time.Second, func() (err error) {
			out, err = s.Ravel(t.Context(), d, "peers")
			return err
		})
		if n := strings.Count(out, "Established"); n != 2 {
			t.Errorf("%s: %d sessions, want 2:\n%s", d, n, out)
		}
		if out, err := s.Ravel(t.Context(), d, "vips"); err != nil {
			t.Errorf("%s: ravel vips: %v\n%s", d, err, out)
		}
		// auto chooses direct where the node is on-link, else the tunnel.
		out, err := s.Ravel(t.Context(), d, "services")
		must(t, err)
		for line := range strings.Lines(out) {
			far := strings.Contains(line, "10.2.0.24") || strings.Contains(line, "fd00:2::24")
			near := strings.Contains(line, "10.1.0.2") || strings.Contains(line, "fd00:1::2")
			if far && !strings.Contains(line, "tunnel") || near && !strings.Contains(line, "direct") {
				t.Errorf("%s: the wrong way: %s", d, line)
			}
		}
	}
}
