package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"net/netip"
	"os"
	"slices"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/ravel-lb/ravel/bgp"
	"github.com/ravel-lb/ravel/lab/stage"
	"github.com/ravel-lb/ravel/lab/traffic"
)

// holdTime is what the lab's directors and routers agree on: how long a director may be silent before routers forget it.
const holdTime = 3 * time.Second

// demo tells the story of the fleet: it comes up, takes traffic, and loses a director, a process and a router while
// every open flow goes on. It fails unless all of that held.
func demo(ctx context.Context, _ []string) error {
	ctx, cancel := context.WithTimeoutCause(ctx, 4*time.Minute, errors.New("the demo takes longer than 4 minutes"))
	defer cancel()
	s := &story{out: os.Stdout, vips: []netip.Addr{stage.VIP4, stage.VIP6}, began: time.Now()}
	err := s.tell(ctx)
	if s.stage != nil {
		err = errors.Join(err, s.stage.Down())
	}
	if err != nil {
		fmt.Fprintf(s.out, "\nThe demo stopped: %v\nThe logs are in build/lab-logs.\n", err)
		return errors.New("the demo did not end well")
	}
	if !s.summary() {
		return errors.New("not all of it held; the logs are in build/lab-logs")
	}
	return nil
}

type story struct {
	out     io.Writer
	began   time.Time
	stage   *stage.Stage
	vips    []netip.Addr
	clients []*stage.Client
	acts    []act
}

// act is one thing that happened to the fleet, and how the traffic fared meanwhile.
type act struct {
	title  string
	faults []string
	report traffic.Report
}

func (s *story) say(format string, args ...any) {
	fmt.Fprintf(s.out, "%5.1f s  %s\n", time.Since(s.began).Seconds(), fmt.Sprintf(format, args...))
}

func (s *story) tell(ctx context.Context) (err error) {
	s.say("Two top-of-rack routers (FRR) under a spine, three directors, four real servers, two clients, in network namespaces.")
	if s.stage, err = stage.Up(ctx, "build", "build"); err != nil {
		return err
	}
	s.say("The network is up, with %d pods. Starting ravel on every director and real server.", len(s.stage.Pods))
	if err := s.stage.StartAll(ctx); err != nil {
		return err
	}
	hops, err := s.stage.NextHops(ctx, "tor1", stage.VIP4)
	if err != nil {
		return err
	}
	s.say("Each router spreads %s and %s over three directors: %s.", stage.VIP4, stage.VIP6, strings.Join(hops, ", "))
	if err := s.show(ctx, "d1", "peers"); err != nil {
		return err
	}
	if err := s.show(ctx, "d1", "services"); err != nil {
		return err
	}
	if err := s.load(ctx); err != nil {
		return err
	}

	if err := s.act(ctx, "a director dies: power off, link dead", "d1", func(ctx context.Context) error {
		if err := s.stage.Fleet.CutLink("d1", "eth1"); err != nil {
			return err
		}
		if err := s.stage.Process("d1").Kill(); err != nil {
			return err
		}
		cut := time.Now()
		if err := s.stage.WaitHops(ctx, stage.Routers(), s.vips, 2); err != nil {
			return err
		}
		s.say("The routers forgot d1 after %.1f s (hold time %s).", time.Since(cut).Seconds(), holdTime)
		return nil
	}, func(ctx context.Context) error {
		s.say("d1 comes back.")
		if err := s.stage.Fleet.RestoreLink("d1", "eth1"); err != nil {
			return err
		}
		return s.restart(ctx, "d1")
	}, s.noFlowLost, s.answeredWithin(2*holdTime+time.Second)); err != nil {
		return err
	}

	if err := s.act(ctx, "a director is stopped in good order", "d2", func(ctx context.Context) error {
		return s.stage.Process("d2").Stop(ctx)
	}, func(ctx context.Context) error {
		return s.restart(ctx, "d2")
	}, s.noFlowLost, s.noRequestFailed); err != nil {
		return err
	}

	nothing := func(context.Context) error { return nil }
	if err := s.act(ctx, "a director's process is killed and restarted", "d3", func(ctx context.Context) error {
		if err := s.stage.Process("d3").Kill(); err != nil {
			return err
		}
		return s.restart(ctx, "d3")
	}, nothing, s.noFlowLost, s.noRequestFailed); err != nil {
		return err
	}

	return s.act(ctx, "a top-of-rack router dies", "tor1", func(ctx context.Context) error {
		return s.stage.Fleet.KillNode("tor1")
	}, nil, s.noFlowLost)
}

// restart runs a director again and waits until both routers send to it.
func (s *story) restart(ctx context.Context, director string) error {
	if err := s.stage.Start(director); err != nil {
		return err
	}
	return s.stage.WaitHops(ctx, stage.Routers(), s.vips, len(s.stage.Directors()))
}

// sessionsLost counts the BGP sessions that directors lost without being the part of the fleet that something happens to.
func (s *story) sessionsLost(ctx context.Context, but string) (uint64, error) {
	var lost uint64
	for _, director := range s.stage.Directors() {
		if director == but {
			continue
		}
		var status bgp.Status
		if err := s.stage.Ask(ctx, director, "peers", &status); err != nil {
			return 0, err
		}
		for _, p := range status.Peers {
			lost += p.Flaps
		}
	}
	return lost, nil
}

// show prints what a command of ravel says, as an operator sees it.
func (s *story) show(ctx context.Context, node string, args ...string) error {
	var out string
	// A session to the other router may still be coming up.
	err := stage.Wait(ctx, func() (err error) {
		out, err = s.stage.Ravel(ctx, node, args...)
		return err
	})
	fmt.Fprintf(s.out, "\n  %s# ravel %s\n", node, strings.Join(args, " "))
	for line := range strings.Lines(out) {
		fmt.Fprint(s.out, "  ", line)
	}
	fmt.Fprintln(s.out)
	return err
}

// load starts the clients and waits until every flow was answered.
func (s *story) load(ctx context.Context) error {
	v4, v6 := netip.AddrPortFrom(stage.VIP4, 80), netip.AddrPortFrom(stage.VIP6, 80)
	for _, node := range []string{"c1", "c2"} {
		client, err := s.stage.StartClient(ctx, node, "load", traffic.Load{
			Flows: []traffic.Flows{
				{Name: "TCP flows", Target: v4, Count: 300, Every: 4 * time.Second},
				{Name: "TCP flows over IPv6", Target: v6, Count: 30, Every: 2 * time.Second},
			},
			Requests: []traffic.Requests{
				{Name: "requests", Target: v4, Rate: 6, Timeout: 10 * time.Second},
				{Name: "requests over IPv6", Target: v6, Rate: 3, Timeout: 10 * time.Second},
			},
			Streams: []traffic.Streams{
				{Name: "UDP streams", Target: v4, Count: 10, Every: 500 * time.Millisecond},
				{Name: "UDP streams over IPv6", Target: v6, Count: 10, Every: 500 * time.Millisecond},
			},
		})
		if err != nil {
			return err
		}
		s.clients = append(s.clients, client)
	}
	var report traffic.Report
	err := stage.Wait(ctx, func() (err error) {
		if report, err = stage.Report(ctx, s.clients...); err != nil {
			return err
		}
		for _, f := range report.Flows {
			if f.Open != f.Count {
				return fmt.Errorf("%d of %d %s are open, broken: %v %v", f.Open, f.Count, f.Name, f.Broken, f.Examples)
			}
		}
		for _, u := range report.Streams {
			answered := 0
			for _, n := range u.Pods {
				answered += n
			}
			if answered != u.Count {
				return fmt.Errorf("%d of %d %s are answered", answered, u.Count, u.Name)
			}
		}
		return nil
	})
	if err != nil {
		return err
	}
	for _, f := range report.Flows {
		s.say("%d %s, spread over %d pods: %s", f.Open, f.Name, len(f.Pods), spread(f.Pods))
		if strings.HasSuffix(f.Name, "flows") && len(f.Pods) != len(s.stage.Pods) {
			return fmt.Errorf("the flows reached %d of %d pods", len(f.Pods), len(s.stage.Pods))
		}
	}
	for _, u := range report.Streams {
		s.say("%d %s, spread over %d pods", u.Count, u.Name, len(u.Pods))
	}
	return nil
}

func spread(pods map[string]int) string {
	var parts []string
	for _, name := range slices.Sorted(maps.Keys(pods)) {
		parts = append(parts, fmt.Sprintf("%s %d", name, pods[name]))
	}
	return strings.Join(parts, ", ")
}

// quiet is how long the traffic is watched before and after something happens.
const quiet = 3 * time.Second

// tries is how often an act is played where the machine is too slow for it.
const tries = 3

// act does something to a part of the fleet under load, waits until all flows answer again, and judges how they fared.
// undo brings the part back; an act without undo is the last one. If meanwhile sessions of other parts were lost, this
// machine gave the whole fleet no time for as long as the hold time, and what was seen says nothing: it is played again.
func (s *story) act(ctx context.Context, title, part string, do, undo func(context.Context) error, checks ...func(traffic.Report) []string) error {
	for try := 1; ; try++ {
		before, err := s.sessionsLost(ctx, part)
		if err != nil {
			return err
		}
		played, err := s.play(ctx, title, do, checks)
		if err != nil {
			return err
		}
		starved := false
		if undo != nil {
			after, err := s.sessionsLost(ctx, part)
			if err != nil {
				return err
			}
			starved = after != before
			if err := undo(ctx); err != nil {
				return err
			}
		}
		if len(played.faults) == 0 || !starved || try == tries {
			for _, fault := range played.faults {
				s.say("NOT AS PROMISED: %s", fault)
			}
			s.acts = append(s.acts, played)
			return nil
		}
		s.say("This machine was too busy: directors that nothing happened to lost their sessions. Once more.")
	}
}

// play plays an act once.
func (s *story) play(ctx context.Context, title string, do func(context.Context) error, checks []func(traffic.Report) []string) (act, error) {
	fmt.Fprintln(s.out)
	s.say("%s%s.", strings.ToUpper(title[:1]), title[1:])
	if _, err := stage.Reset(ctx, s.clients...); err != nil {
		return act{}, err
	}
	if err := do(ctx); err != nil {
		return act{}, err
	}
	if err := sleep(ctx, quiet); err != nil {
		return act{}, err
	}
	settled, cancel := context.WithTimeoutCause(ctx, 20*time.Second, errors.New("20 s later"))
	defer cancel()
	var report traffic.Report
	var faults []string
	err := stage.Wait(settled, func() (err error) {
		if report, err = stage.Report(ctx, s.clients...); err != nil {
			return err
		}
		for _, f := range report.Flows {
			if f.Silent > 0 {
				return fmt.Errorf("%d %s are silent", f.Silent, f.Name)
			}
		}
		return nil
	})
	if err == nil {
		// Requests that had begun are answered by now, or never.
		if err = sleep(ctx, quiet); err == nil {
			report, err = stage.Report(ctx, s.clients...)
		}
		if err != nil {
			return act{}, err
		}
	} else if ctx.Err() != nil {
		return act{}, err
	} else {
		faults = append(faults, err.Error())
	}
	for _, check := range checks {
		faults = append(faults, check(report)...)
	}
	t := total(report)
	s.say("%d flows open, %d broken, %d answered by another pod; the longest wait for an answer %.1f s.", t.open, t.broken, t.moved, t.wait.Seconds())
	s.say("%d short requests, %d failed; %d datagrams, %d unanswered.", t.requests, t.failed, t.sent, t.lost)
	return act{title, faults, report}, nil
}

func sleep(ctx context.Context, d time.Duration) error {
	select {
	case <-ctx.Done():
		return context.Cause(ctx)
	case <-time.After(d):
		return nil
	}
}

// totals adds up the groups of a report.
type totals struct {
	count, open, broken, moved   int
	wait                         time.Duration
	requests, failed, sent, lost int
}

func total(r traffic.Report) totals {
	var t totals
	for _, f := range r.Flows {
		t.count += f.Count
		t.open += f.Open
		t.moved += f.OtherPod
		t.wait = max(t.wait, f.LongestWait)
		for _, n := range f.Broken {
			t.broken += n
		}
	}
	for _, q := range r.Requests {
		t.requests += q.Begun
		t.failed += q.Failures()
	}
	for _, u := range r.Streams {
		t.sent += u.Sent
		t.lost += u.Lost
	}
	return t
}

func (s *story) noFlowLost(r traffic.Report) (faults []string) {
	for _, f := range r.Flows {
		if f.Open != f.Count {
			faults = append(faults, fmt.Sprintf("%d of %d %s live on: %v %s", f.Open, f.Count, f.Name, f.Broken, strings.Join(f.Examples, "; ")))
		}
		if f.OtherPod > 0 {
			faults = append(faults, fmt.Sprintf("%d answers to %s came from another pod", f.OtherPod, f.Name))
		}
		if f.Answered == 0 {
			faults = append(faults, "no answer to "+f.Name)
		}
	}
	for _, u := range r.Streams {
		if u.Answered == 0 {
			faults = append(faults, "no answer to "+u.Name)
		}
		if u.OtherPod > 0 {
			faults = append(faults, fmt.Sprintf("%d of the %s came to another pod", u.OtherPod, u.Name))
		}
	}
	return faults
}

func (s *story) noRequestFailed(r traffic.Report) (faults []string) {
	for _, q := range r.Requests {
		if q.Failures() > 0 {
			faults = append(faults, fmt.Sprintf("of %d %s, %v failed: %s", q.Begun, q.Name, q.Failed, strings.Join(q.Examples, "; ")))
		}
		if q.Answered == 0 {
			faults = append(faults, "no answer to "+q.Name)
		}
	}
	for _, u := range r.Streams {
		if u.Lost > 0 {
			faults = append(faults, fmt.Sprintf("of %d datagrams of the %s %d were lost", u.Sent, u.Name, u.Lost))
		}
	}
	return faults
}

// answeredWithin allows a request or a stream just so long a wait. TCP repeats a lost packet after twice the time of the
// time before, so a request may wait for twice as long as its packets had nowhere to go.
func (s *story) answeredWithin(d time.Duration) func(traffic.Report) []string {
	return func(r traffic.Report) (faults []string) {
		for _, f := range r.Flows {
			if f.LongestWait > d {
				faults = append(faults, fmt.Sprintf("one of the %s waited %.1f s for an answer, more than %s", f.Name, f.LongestWait.Seconds(), d))
			}
		}
		for _, u := range r.Streams {
			if u.LongestGap > d {
				faults = append(faults, fmt.Sprintf("one of the %s was silent for %.1f s, more than %s", u.Name, u.LongestGap.Seconds(), d))
			}
		}
		return faults
	}
}

// summary prints what happened in a table and reports whether all of it held.
func (s *story) summary() bool {
	held := len(s.acts) == 4
	fmt.Fprintf(s.out, "\nWhat happened, in %.0f s:\n\n", time.Since(s.began).Seconds())
	t := tabwriter.NewWriter(s.out, 0, 4, 2, ' ', 0)
	fmt.Fprintln(t, "\tflows\tlived on\tother pod\tlongest wait\trequests\tfailed\tas promised")
	for _, a := range s.acts {
		sum := total(a.report)
		verdict := "yes"
		if len(a.faults) > 0 {
			verdict, held = "NO", false
		}
		fmt.Fprintf(t, "%s\t%d\t%d\t%d\t%.1f s\t%d\t%d\t%s\n", a.title, sum.count, sum.open, sum.moved, sum.wait.Seconds(), sum.requests, sum.failed, verdict)
	}
	_ = t.Flush()
	fmt.Fprintln(s.out)
	if held {
		fmt.Fprintln(s.out, "Every open flow lived through all of it and kept its pod. make demo-shell leaves the fleet up for you to try.")
	}
	return held
}
