package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/urfave/cli/v2"

	"github.com/ravel-lb/ravel"
	"github.com/ravel-lb/ravel/bgp"
	"github.com/ravel-lb/ravel/gossip"
	"github.com/ravel-lb/ravel/internal/admin"
	"github.com/ravel-lb/ravel/internal/agree"
	"github.com/ravel-lb/ravel/internal/check"
	"github.com/ravel-lb/ravel/internal/config"
	"github.com/ravel-lb/ravel/internal/desired"
	"github.com/ravel-lb/ravel/internal/latest"
	"github.com/ravel-lb/ravel/internal/node"
)

// Without its guard a VIP that is still held opens the host's own sockets.
func TestCleanupLeavesTheDoorClosedWhileAVIPMayBeHeld(t *testing.T) {
	for _, dryRun := range []bool{false, true} {
		var did []string
		step := func(name string, err error) removal {
			return func(_ context.Context, dry bool) ([]string, error) {
				if dry != dryRun {
					t.Errorf("%s: dry run %v", name, dry)
				}
				did = append(did, name)
				return []string{name + " removed"}, err
			}
		}
		broken := errors.New("device or resource busy")
		done, err := remove(t.Context(), dryRun, step("links", broken), step("ipvs", nil), step("guard", nil))
		if !errors.Is(err, broken) || !strings.Contains(err.Error(), "the guard and all else stay") {
			t.Errorf("error %v", err)
		}
		if diff := cmp.Diff([]string{"links removed"}, done); diff != "" || !slices.Equal(did, []string{"links"}) {
			t.Errorf("it did %v:\n%s", did, diff)
		}
		did = nil
		if _, err = remove(t.Context(), dryRun, step("links", nil), step("ipvs", broken), step("guard", nil)); !errors.Is(err, broken) {
			t.Errorf("error %v", err)
		}
		if !slices.Equal(did, []string{"links", "ipvs", "guard"}) {
			t.Errorf("it did %v: a fault of one must not spare the others once no VIP is held", did)
		}
	}
}

func TestStatusLine(t *testing.T) {
	report := node.Report{
		Held:      []ravel.ServiceKey{web, {VIP: web.VIP, Proto: ravel.UDP, Port: 80}, web6, dns},
		Announced: []netip.Addr{web.VIP, web6.VIP},
	}
	for _, test := range []struct {
		role   ravel.Role
		report node.Report
		err    error
		want   string
	}{
		{ravel.Director, report, nil, "serves 3 VIPs, announces 2"},
		{ravel.Realserver, report, nil, "serves 3 VIPs"},
		{ravel.Director, node.Report{}, errNotSettled, "serves 0 VIPs, announces 0; not ready: " + errNotSettled.Error()},
	} {
		if got := statusLine(test.role, test.report, test.err); got != test.want {
			t.Errorf("%q, want %q", got, test.want)
		}
	}
}

func TestCleanupRemovesFiles(t *testing.T) {
	dir := t.TempDir()
	s := values{socket: filepath.Join(dir, "admin.sock"), stateDir: filepath.Join(dir, "state")}
	lockPath := filepath.Join(dir, "lock")
	listener, err := net.ListenUnix("unix", &net.UnixAddr{Name: s.socket})
	if err != nil {
		t.Fatal(err)
	}
	listener.SetUnlinkOnClose(false)
	if err := listener.Close(); err != nil {
		t.Fatal(err)
	}
	if err := os.Mkdir(s.stateDir, 0o700); err != nil {
		t.Fatal(err)
	}
	other := filepath.Join(s.stateDir, "other.yaml")
	for _, path := range []string{lockPath, other, lastGood(s.stateDir, ravel.Director), lastGood(s.stateDir, ravel.Realserver), inForce(s.stateDir, ravel.Director),
		lastGoodFleet(s.stateDir, ravel.Realserver), lastCluster(s.stateDir, ravel.Director)} {
		if err := os.WriteFile(path, nil, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	want := []string{
		"last good file " + s.stateDir + "/last-good-director.yaml", "what the cluster told " + s.stateDir + "/cluster-director.json",
		"documents in force " + s.stateDir + "/in-force-director.json", "last good file " + s.stateDir + "/last-good-realserver.yaml",
		"last good file " + s.stateDir + "/last-good-fleet-realserver.yaml",
		"socket " + s.socket,
	}
	for _, dryRun := range []bool{true, false} {
		done, err := removeFiles(dryRun, lockPath, s)
		if err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(want, done); diff != "" {
			t.Errorf("dry run %v:\n%s", dryRun, diff)
		}
		for _, path := range []string{lockPath, s.socket, lastGood(s.stateDir, ravel.Director)} {
			if _, err := os.Lstat(path); errors.Is(err, fs.ErrNotExist) == dryRun {
				t.Errorf("dry run %v: %s: %v", dryRun, path, err)
			}
		}
	}
	if _, err := os.Stat(other); err != nil {
		t.Errorf("another's file: %v", err)
	}
	// Again, and where --admin-socket names what is no socket.
	s.socket = other
	if done, err := removeFiles(false, lockPath, s); err != nil || len(done) > 0 {
		t.Errorf("again: %v, %v", done, err)
	}
}

func TestLock(t *testing.T) {
	path := filepath.Join(t.TempDir(), "run", "lock")
	release, err := lock(path, "director")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := lock(path, "realserver"); err == nil || !strings.Contains(err.Error(), "director, process") {
		t.Fatalf("a second one: %v", err)
	}
	if err := os.Remove(path); err != nil { // as cleanup does
		t.Fatal(err)
	}
	release()
	release, err = lock(path, "cleanup")
	if err != nil {
		t.Fatal(err)
	}
	release()
}

// A planned stop with --cleanup-on-exit leaves nothing, whatever the stop itself came to; an end by itself leaves all.
func TestCleanupOnExit(t *testing.T) {
	stopped, stop := context.WithCancel(t.Context())
	stop()
	fault := errors.New("a session did not end")
	for _, test := range []struct {
		name    string
		ctx     context.Context
		on      bool
		err     error
		cleaned bool
	}{
		{"a planned stop", stopped, true, nil, true},
		{"a planned stop with a fault", stopped, true, fault, true},
		{"an end by itself", t.Context(), true, fault, false},
		{"without the setting", stopped, false, fault, false},
	} {
		p := &process{settings: values{cleanupOnExit: test.on, log: slog.New(slog.DiscardHandler)}}
		cleaned := false
		err := p.end(test.ctx, test.err, func(ctx context.Context) ([]string, error) {
			cleaned = ctx.Err() == nil
			return nil, nil
		})
		if !errors.Is(err, test.err) || cleaned != test.cleaned {
			t.Errorf("%s: cleaned %v, error %v", test.name, cleaned, err)
		}
	}
}

func TestADirectorThatTheFleetDoesNotKnowIsNotReady(t *testing.T) {
	fleet := desired.Fleet{Directors: []desired.FleetDirector{{Name: "d1"}}}
	peers := ravel.State{Peers: []ravel.Peer{{}}}
	up, down := bgp.Status{Peers: []bgp.PeerStatus{{State: "Idle"}, {State: "Established"}}}, bgp.Status{Peers: []bgp.PeerStatus{{State: "Idle"}}}
	for _, test := range []struct {
		name   string
		c      computed
		status bgp.Status
		want   string
	}{
		{"well", computed{inputs: desired.Inputs{Node: "d1", Fleet: fleet}, state: peers}, up, ""},
		{"no session", computed{inputs: desired.Inputs{Node: "d1", Fleet: fleet}, state: peers}, down, "no BGP session is up"},
		{"no peers", computed{inputs: desired.Inputs{Node: "d1", Fleet: fleet}}, bgp.Status{}, ""},
		{"misnamed", computed{inputs: desired.Inputs{Node: "d2", Fleet: fleet}}, bgp.Status{}, "d2, is not in fleet.directors"},
		{"misnamed, attracts nothing", computed{inputs: desired.Inputs{Node: "d2", Fleet: fleet, AttractNone: true}}, bgp.Status{}, ""},
	} {
		got := ""
		if err := attracts(test.c, test.status); err != nil {
			got = err.Error()
		}
		if !strings.Contains(got, test.want) || (got == "") != (test.want == "") {
			t.Errorf("%s: %q, want %q", test.name, got, test.want)
		}
	}

	static := "../../deploy/example/ravel-static.yaml"
	nobody := filepath.Join(t.TempDir(), "admin.sock")
	for _, args := range [][]string{{}, {"--role", "director"}} {
		code, stdout, _ := ravelWith(append([]string{"check", "--admin-socket", nobody, "--static", static, "--node", "nobody"}, args...)...)
		if code != exitFault || !strings.Contains(stdout, "fail  fleet.directors: ") {
			t.Errorf("%v: exit code %d:\n%s", args, code, stdout)
		}
	}
}

func TestRunningLines(t *testing.T) {
	stale := []ravel.Problem{{Where: "document", What: "is empty"}}
	misnamed := []ravel.Problem{{Where: "fleet.directors", What: "this director is not in the list"}}
	at := time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)
	for _, test := range []struct {
		name   string
		answer checkAnswer
		want   []string
	}{
		{"well", checkAnswer{Role: "director", Node: "d1", LoadedAt: at}, []string{"ok director: runs as d1, and all is applied"}},
		{"stale", checkAnswer{Role: "director", Static: "/s.yaml", Stale: stale, LoadedAt: at}, []string{
			"fail /s.yaml: is stale: the running director goes on with the last good one, of 2026-01-02T03:04:05Z", "fail document: is empty"}},
		{"kept", checkAnswer{Role: "director", Static: "/s.yaml", Stale: stale, LoadedAt: at, Kept: "/k.yaml"}, []string{
			"fail /s.yaml: is stale: the running director goes on with the last good one, which an earlier process kept as /k.yaml, of 2026-01-02T03:04:05Z",
			"fail document: is empty"}},
		{"nothing good", checkAnswer{Role: "realserver", Static: "/s.yaml", Stale: stale, Unknown: true}, []string{
			"fail /s.yaml: cannot be used, and no good one is known from before: the running realserver leaves this host as it found it",
			"fail document: is empty"}},
		{"not yet", checkAnswer{Role: "director", Static: "/s.yaml", Unknown: true}, []string{"fail /s.yaml: is not loaded yet"}},
		{"misnamed", checkAnswer{Role: "director", Problems: misnamed}, []string{"fail fleet.directors: this director is not in the list"}},
		{"misnamed, attracts nothing", checkAnswer{Role: "director", Problems: misnamed, Attract: "none"}, []string{
			"warn fleet.directors: this director is not in the list"}},
	} {
		var got []string
		for _, l := range runningLines(test.answer) {
			got = append(got, fmt.Sprintf("%s %s: %s", l.Status, l.Name, l.Detail))
		}
		if diff := cmp.Diff(test.want, got); diff != "" {
			t.Errorf("%s (-want +got):\n%s", test.name, diff)
		}
	}
}

// logHook is told each record before it is written nowhere.
type logHook func(slog.Record)

func (logHook) Enabled(context.Context, slog.Level) bool        { return true }
func (h logHook) Handle(_ context.Context, r slog.Record) error { h(r); return nil }
func (h logHook) WithAttrs([]slog.Attr) slog.Handler            { return h }
func (h logHook) WithGroup(string) slog.Handler                 { return h }

// The state of a document is passed on before its problems are written, which may take a while.
func TestTheStateDoesNotWaitForTheLog(t *testing.T) {
	p := &process{role: ravel.Director}
	told := make(chan bool, 1)
	p.settings = values{node: "nobody", log: slog.New(logHook(func(r slog.Record) {
		if r.Message == "problem" {
			_, known := p.state.Latest()
			told <- known
		}
	}))}
	ctx, cancel := context.WithCancel(t.Context())
	var results latest.Value[agree.Result]
	results.Set(agree.Result{Problems: []ravel.Problem{{Where: "nowhere", What: "nothing"}}})
	ends := make(chan error, 1)
	go func() { ends <- p.take(ctx, &results) }()
	if !<-told {
		t.Error("a problem was logged before the state was known")
	}
	cancel()
	if err := <-ends; err != nil {
		t.Fatal(err)
	}
}

func TestListen(t *testing.T) {
	for text, want := range map[string]string{
		"127.0.0.1:9100": "127.0.0.1:9100", ":9100": "0.0.0.0:9100", "[::1]:9100": "[::1]:9100", "0.0.0.0:9100": "0.0.0.0:9100",
		"localhost:9100": "127.0.0.1:9100",
		"127.0.0.1:0":    "", "127.0.0.1:70000": "", "127.0.0.1:-1": "", "127.0.0.1": "", "127.0.0.1:": "", "no host:1": "", "127.0.0.1:x!": "",
	} {
		var f faults
		got := f.listenAddr(text)
		switch {
		case want == "" && (f.err() == nil || !strings.Contains(f.err().Error(), "--listen")):
			t.Errorf("%q: %v, %v; want a fault", text, got, f.err())
		case want != "" && (f.err() != nil || got.String() != want && !(text == "localhost:9100" && got.String() == "[::1]:9100")):
			t.Errorf("%q: %v, %v; want %s", text, got, f.err(), want)
		}
	}
	nobody := filepath.Join(t.TempDir(), "admin.sock")
	code, stdout, stderr := ravelWith("check", "--admin-socket", nobody, "--listen", "localhost:9100", "--static", "../../deploy/example/ravel-static.yaml")
	if code != exitOK {
		t.Errorf("exit code %d:\n%s%s", code, stdout, stderr)
	}
}

// A port in use is found before there is anything that could touch the kernel.
func TestAPortInUseIsFoundFirst(t *testing.T) {
	taken, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer taken.Close()
	s := values{socket: filepath.Join(t.TempDir(), "admin.sock"), listen: taken.Addr().String(), variant: "none", log: slog.New(slog.DiscardHandler)}
	if _, err := newProcess(t.Context(), s, ravel.Director); err == nil || !strings.Contains(err.Error(), "address already in use") {
		t.Errorf("error %v", err)
	}
}

// bgp.Options takes no wait at all for its default, so the setting must say it in other words.
func TestNoWaitAtAStopIsNotTheDefault(t *testing.T) {
	for text, want := range map[string]time.Duration{"0s": -1, "1s": time.Second, "300ms": 300 * time.Millisecond} {
		c := directorCommand()
		var got values
		c.Action = func(c *cli.Context) (err error) {
			got, err = readSettings(c, true)
			return err
		}
		app := &cli.App{Commands: []*cli.Command{c}}
		if err := app.Run([]string{"ravel", "director", "--static", "x", "--gossip-insecure", "--stop-wait", text}); err != nil {
			t.Fatal(err)
		}
		if got.stopWait != want {
			t.Errorf("--stop-wait %s: %s, want %s", text, got.stopWait, want)
		}
	}
}

// serve answers as a process that runs, until the test ends.
func serve(t *testing.T, queries map[string]admin.Query) (socket string) {
	t.Helper()
	return serveWith(t, queries, nil)
}

func serveWith(t *testing.T, queries map[string]admin.Query, commands map[string]admin.Command) (socket string) {
	t.Helper()
	s := &admin.Server{
		Log: slog.New(slog.DiscardHandler), Socket: filepath.Join(t.TempDir(), "admin.sock"), Gatherer: prometheus.NewRegistry(),
		Queries: queries, Commands: commands, Healthy: func() error { return nil }, Ready: func() error { return nil },
	}
	if err := s.Open(t.Context()); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- s.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("Run: %v", err)
		}
	})
	return s.Socket
}

// A process that knows no document is not one that wants nothing.
func TestNothingKnownIsNotWell(t *testing.T) {
	log := slog.New(slog.DiscardHandler)
	p := &process{role: ravel.Director, settings: values{node: "d1", static: "/nowhere.yaml", log: log}, file: config.NewFile("/nowhere.yaml", log, nil)}
	n := node.NewDirector(node.Options{Log: log, Source: &p.state}, node.DirectorConfig{})
	socket := serve(t, map[string]admin.Query{
		"vips":  func(context.Context) (any, error) { return p.vips(n), nil },
		"peers": func(context.Context) (any, error) { return peersAnswer{Unknown: true}, nil },
		"check": p.check(n),
	})
	for _, command := range []string{"vips", "peers"} {
		code, _, stderr := ravelWith(command, "--admin-socket", socket)
		if code != exitNotWell || !strings.Contains(stderr, "no static file was good yet") {
			t.Errorf("ravel %s: exit code %d:\n%s", command, code, stderr)
		}
	}
	if code, stdout, _ := ravelWith("check", "--admin-socket", socket); code != exitFault || strings.Contains(stdout, "last good one") {
		t.Errorf("ravel check: exit code %d:\n%s", code, stdout)
	}
	p.computed.Set(computed{})
	if code, _, stderr := ravelWith("vips", "--admin-socket", socket); code != exitOK {
		t.Errorf("ravel vips with nothing wanted: exit code %d:\n%s", code, stderr)
	}
}

// What cannot be kept is a warning of the process, and no failure.
func TestAStateDirectoryThatCannotBeWrittenIsSaid(t *testing.T) {
	log := slog.New(slog.DiscardHandler)
	inTheWay := write(t, "state", "")
	p := &process{role: ravel.Director, settings: values{log: log, stateDir: inTheWay}}
	p.file = config.NewFile("../../deploy/example/ravel-static.yaml", log, nil)
	p.file.Keep = lastGood(inTheWay, ravel.Director)
	alone(t, p, nil)
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- p.file.Run(ctx) }()
	for deadline := time.Now().Add(10 * time.Second); len(p.problems()) == 0; time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatal("never a problem")
		}
	}
	if l := problemLine(p.problems()[0], false); l.Status != check.Warn || l.Name != "--state-dir" || l.Fix == "" {
		t.Errorf("%+v", l)
	}
	if _, known := p.file.Latest(); !known {
		t.Error("the file is not in force")
	}
	cancel()
	if err := <-done; err != nil {
		t.Fatal(err)
	}
}

// The router ID is that of the document in force, which may be one that was kept, and is set before its peers are.
func TestTheRouterIDComesWithTheDocument(t *testing.T) {
	fleet := desired.Fleet{Directors: []desired.FleetDirector{
		{Name: "d1", Addrs: []netip.Addr{netip.MustParseAddr("2001:db8::1"), netip.MustParseAddr("192.0.2.1")}},
		{Name: "d2", Addrs: []netip.Addr{netip.MustParseAddr("192.0.2.2")}, RouterID: netip.MustParseAddr("192.0.2.22")},
		{Name: "d3", Addrs: []netip.Addr{netip.MustParseAddr("2001:db8::3")}},
	}}
	for name, want := range map[string]string{"d1": "192.0.2.1", "d2": "192.0.2.22", "d3": "invalid IP", "d4": "invalid IP"} {
		if got := routerID(fleet, name).String(); got != want {
			t.Errorf("%s: %s, want %s", name, got, want)
		}
	}

	log := slog.New(slog.DiscardHandler)
	p := &process{role: ravel.Director, settings: values{log: log}}
	p.file = config.NewFile(filepath.Join(t.TempDir(), "none.yaml"), log, nil)
	p.file.Keep = "../../deploy/example/ravel-static.yaml"
	learnt := make(chan netip.Addr, 1)
	p.learn = func(fleet desired.Fleet) {
		if _, known := p.state.Latest(); known {
			t.Error("the state was passed on before")
		}
		learnt <- routerID(fleet, fleet.Directors[0].Name)
	}
	ctx, cancel := context.WithCancel(t.Context())
	var work sync.WaitGroup
	alone(t, p, nil).begin(ctx, &work)
	if id := <-learnt; !id.IsValid() {
		t.Error("no router ID")
	}
	cancel()
	work.Wait()

	if got := routerIDChange(bgp.Status{RouterID: netip.MustParseAddr("192.0.2.1")}); len(got) != 0 {
		t.Errorf("nothing changed, and yet %v", got)
	}
	changed := bgp.Status{RouterID: netip.MustParseAddr("192.0.2.1"), RouterIDWanted: netip.MustParseAddr("192.0.2.22")}
	got := routerIDChange(changed)
	if len(got) != 1 || problemLine(got[0], false).Status != check.Warn || !strings.Contains(got[0].What, "192.0.2.22") {
		t.Errorf("%v", got)
	}
}

// lone is a process without a fleet.
type lone struct {
	*process
	agreed *agree.Realserver
}

// alone gives a process a fleet in which nobody else is. n may be nil.
func alone(t *testing.T, p *process, n *node.Node) lone {
	t.Helper()
	var err error
	if p.settings.blastRadius == 0 {
		p.settings.blastRadius = 50
	}
	p.gate = p.newGate()
	if p.gossip, err = gossip.New(gossip.Config{Name: "alone", Fleet: "test", Insecure: true, Addrs: []netip.Addr{netip.MustParseAddr("192.0.2.9")}}); err != nil {
		t.Fatal(err)
	}
	if n == nil {
		n = node.NewRealserver(node.Options{Log: p.settings.log, Source: &p.state}, node.RealserverConfig{})
	}
	return lone{p, agree.NewRealserver(agree.RealserverOptions{
		Log: p.settings.log, Fleet: p.gossip, Inputs: &p.inputs, Reports: n.Reports(), SeedPort: gossip.DefaultPort,
		Read: func(context.Context) ([]ravel.Redirect, error) { return nil, nil },
	})}
}

// begin turns documents into states until ctx ends.
func (l lone) begin(ctx context.Context, work *sync.WaitGroup) {
	work.Go(func() { _ = l.file.Run(ctx) })
	work.Go(func() { _ = l.read(ctx) })
	work.Go(func() { _ = l.agreed.Run(ctx) })
	work.Go(func() { _ = l.take(ctx, l.agreed.Results()) })
}

// vips says what ravel check can tell more of, and names no fault where there is none.
func TestWhyARealserverHoldsNot(t *testing.T) {
	p := &process{role: ravel.Realserver}
	v := vipStatus{VIP: netip.MustParseAddr("192.0.2.80"), Wanted: true}
	for _, test := range []struct {
		held bool
		err  error
		want string
	}{{true, nil, ""}, {false, nil, "a problem"}, {false, errors.New("EBUSY"), "the last walk"}} {
		v.Held = test.held
		got := p.why(v, false, computed{}, node.Report{Err: test.err})
		if !strings.HasPrefix(got, test.want) || (got == "") != (test.want == "") {
			t.Errorf("held %v, error %v: %q, want %q", test.held, test.err, got, test.want)
		}
	}
}

// A realserver under a name that nobody knows wants not nothing; one that leaves the list does.
func TestAnUnknownNameIsNotANodeWithoutPods(t *testing.T) {
	log := slog.New(slog.DiscardHandler)
	example, err := os.ReadFile("../../deploy/example/ravel-static.yaml")
	if err != nil {
		t.Fatal(err)
	}
	listed, unlisted := string(example), strings.ReplaceAll(string(example), "node1", "node9")
	if listed == unlisted {
		t.Fatal("the example has no node1")
	}
	path := write(t, "static.yaml", unlisted)
	p := &process{role: ravel.Realserver, settings: values{node: "node1", static: path, log: log}, file: config.NewFile(path, log, nil)}
	n := node.NewRealserver(node.Options{Log: log, Source: &p.state}, node.RealserverConfig{})
	lone := alone(t, p, n)
	socket := serve(t, map[string]admin.Query{
		"vips":  func(context.Context) (any, error) { return p.vips(n), nil },
		"check": p.check(n),
	})
	ctx, cancel := context.WithCancel(t.Context())
	var work sync.WaitGroup
	defer work.Wait()
	defer cancel()
	lone.begin(ctx, &work)
	is := func(what string, holds func(c computed, state ravel.State, known bool) bool) {
		t.Helper()
		for deadline := time.Now().Add(10 * time.Second); ; time.Sleep(time.Millisecond) {
			c, _ := p.computed.Latest()
			state, known := p.state.Latest()
			if holds(c, state, known) {
				return
			}
			if time.Now().After(deadline) {
				t.Fatalf("not in 10 s: %s; listed %t, state known %t, %d redirects", what, c.inputs.Listed(), known, len(state.Redirects))
			}
		}
	}
	is("an unknown name", func(c computed, _ ravel.State, known bool) bool {
		return len(c.problems) > 0 && !c.inputs.Listed() && !known
	})
	if code, _, stderr := ravelWith("vips", "--admin-socket", socket); code != exitNotWell || !strings.Contains(stderr, "nodes.node1: "+desired.NotListed) {
		t.Errorf("ravel vips: exit code %d:\n%s", code, stderr)
	}
	if code, stdout, _ := ravelWith("check", "--admin-socket", socket); code != exitFault || !strings.Contains(stdout, desired.NotListed) {
		t.Errorf("ravel check: exit code %d:\n%s", code, stdout)
	}
	rewrite := func(text string) {
		t.Helper()
		if err := errors.Join(os.WriteFile(path+".new", []byte(text), 0o644), os.Rename(path+".new", path)); err != nil {
			t.Fatal(err)
		}
	}
	rewrite(listed)
	is("a known name", func(_ computed, state ravel.State, known bool) bool { return known && len(state.Redirects) > 0 })
	rewrite(unlisted)
	is("a name that left", func(_ computed, state ravel.State, known bool) bool { return known && len(state.Redirects) == 0 })
}
