package e2e

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os/exec"
	"strings"
	"testing"
	"time"

	"github.com/ravel-lb/ravel/lab/stage"
	"github.com/ravel-lb/ravel/lab/traffic"
)

// steady is a load of which nothing may fail: requests from both clients to both VIPs.
type steady struct {
	clients []*stage.Client
}

// steadyRate is how many requests a second each client begins to each VIP.
const steadyRate = 12

// steadyPatience is how long a request waits: long enough for the pauses of a machine that has much else to do, and
// for several repeats of a lost packet, so that what fails was refused, reset, or led nowhere for good.
const steadyPatience = 10 * time.Second

// startSteady begins a steady load and waits until it is answered. It ends with the test.
func startSteady(t *testing.T, s *stage.Stage) *steady {
	t.Helper()
	ready(t, s)
	return startLoad(t, s)
}

// startLoad is startSteady for a fleet on whose nodes Ravel need not run.
func startLoad(t *testing.T, s *stage.Stage) *steady {
	t.Helper()
	l := &steady{}
	for _, node := range []string{"c1", "c2"} {
		c, err := s.StartClient(within(t, 20*time.Second), node, "steady", traffic.Load{Requests: []traffic.Requests{
			{Name: "v4", Target: netip.AddrPortFrom(stage.VIP4, 80), Rate: steadyRate, Timeout: steadyPatience},
			{Name: "v6", Target: netip.AddrPortFrom(stage.VIP6, 80), Rate: steadyRate, Timeout: steadyPatience},
		}})
		must(t, err)
		t.Cleanup(func() {
			if err := c.Stop(); err != nil {
				t.Error(err)
			}
		})
		l.clients = append(l.clients, c)
	}
	l.unbroken(t, "at first")
	return l
}

// unbroken waits for requests that began and were answered after the call, and fails the test for each that failed
// since the call before.
func (l *steady) unbroken(t *testing.T, when string) traffic.Report {
	t.Helper()
	before, err := stage.Reset(within(t, 20*time.Second), l.clients...)
	must(t, err)
	l.judge(t, before, when)
	eventually(t, 30*time.Second, func() error {
		r, err := stage.Report(t.Context(), l.clients...)
		if err != nil {
			return err
		}
		for _, q := range r.Requests {
			if q.Answered+q.Failures() < steadyRate {
				return fmt.Errorf("%s: of %d requests to %s %d were answered", when, q.Begun, q.Name, q.Answered)
			}
		}
		return nil
	})
	after, err := stage.Reset(within(t, 20*time.Second), l.clients...)
	must(t, err)
	l.judge(t, after, when)
	return traffic.Merge(before, after)
}

func (l *steady) judge(t *testing.T, r traffic.Report, when string) {
	t.Helper()
	for _, q := range r.Requests {
		if q.Failures() > 0 {
			t.Errorf("%s: of %d requests to %s %d failed: %v %q", when, q.Begun, q.Name, q.Failures(), q.Failed, q.Examples)
		}
	}
}

// stop ends the load.
func (l *steady) stop(t *testing.T) {
	t.Helper()
	for _, c := range l.clients {
		must(t, c.Stop())
	}
}

// ravelSays runs a command of ravel on a node, which must exit with code, and returns what it printed.
func ravelSays(t *testing.T, s *stage.Stage, node string, code int, args ...string) string {
	t.Helper()
	out, err := s.Ravel(within(t, 30*time.Second), node, args...)
	if got, err := exitCode(err); err != nil || got != code {
		t.Errorf("%s: ravel %s: exit code %d, %v, want %d:\n%s", node, strings.Join(args, " "), got, err, code, out)
	}
	return out
}

func exitCode(err error) (int, error) {
	var exit *exec.ExitError
	if errors.As(err, &exit) {
		return exit.ExitCode(), nil
	}
	return 0, err
}

// awaitApplied waits until the ravel of a node says that all its VIPs are as they should be.
func awaitApplied(t *testing.T, s *stage.Stage, node string) {
	t.Helper()
	eventually(t, time.Minute, func() error {
		out, err := s.Ravel(t.Context(), node, "vips")
		if err != nil {
			return fmt.Errorf("%s: ravel vips: %w\n%s", node, err, out)
		}
		return nil
	})
}

// ready waits for a fleet that has only just come up: routers beyond the rack hear of a VIP a moment after those in it,
// and a director that starts does not know whether the nodes have their redirects yet.
func ready(t *testing.T, s *stage.Stage) {
	t.Helper()
	for _, node := range append(s.Realservers(), s.Directors()...) {
		awaitApplied(t, s, node)
	}
	must(t, s.WaitHops(within(t, 30*time.Second), []string{"spine"}, vips, len(stage.Routers())))
}

// metric returns a metric without labels of the ravel of a node.
func metric(ctx context.Context, s *stage.Stage, node, name string) (string, error) {
	out, err := s.Output(ctx, node, "curl", "-sS", "--unix-socket", "/run/ravel/admin.sock", "http://ravel/metrics")
	if err != nil {
		return "", err
	}
	for line := range strings.Lines(out) {
		if value, found := strings.CutPrefix(line, name+" "); found {
			return strings.TrimSpace(value), nil
		}
	}
	return "", fmt.Errorf("%s: no metric %s", node, name)
}

// shell runs a script on a node and returns its standard output; the test ends if it fails.
func shell(t *testing.T, s *stage.Stage, node, script string) string {
	t.Helper()
	return on(t, s, node, "bash", "-c", script)
}
