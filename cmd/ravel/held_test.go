package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/ravel-lb/ravel"
	"github.com/ravel-lb/ravel/gossip"
	"github.com/ravel-lb/ravel/gossip/gossiptest"
	"github.com/ravel-lb/ravel/internal/check"
	"github.com/ravel-lb/ravel/internal/config"
	"github.com/ravel-lb/ravel/internal/desired"
	"github.com/ravel-lb/ravel/internal/hold"
)

// hold has a change wait in the rig: one that takes all VIPs but dns.
func (r *rig) hold() *hold.Change {
	newest := hold.Documents{Cluster: r.in.Cluster, Fleet: r.in.Fleet}
	newest.Cluster.Services = r.in.Cluster.Services[2:]
	change := &hold.Change{Name: newest.Name(), Parts: []hold.Part{{What: "VIPs", Lost: []string{"192.0.2.80", "2001:db8::80"}, Of: 3}}}
	r.p.decision.Set(hold.Decision{InForce: hold.Documents{Cluster: r.in.Cluster, Fleet: r.in.Fleet}, Newest: newest, Held: change})
	return change
}

const heldTakes = "2 of 3 VIPs (192.0.2.80, 2001:db8::80)"

func TestAccept(t *testing.T) {
	const other = "00112233aabbccdd"
	d2Holds := func(r *rig, _ string) { _ = r.set("document/d2", "0 holds "+other); r.told = nil }
	for _, test := range []struct {
		name   string
		held   bool
		change func(r *rig, name string)
		args   string // %s is the name of the change
		code   int
		told   string
		stdout string
		stderr string
	}{
		{"nothing", false, nil, "", exitOK, "", "no change is held\n", ""},
		{"what waits here", true, nil, "", exitOK, "accept/%s=on", "%s is accepted: it takes effect now, everywhere, and takes away " + heldTakes + "\n", ""},
		{"by name", true, nil, "%s", exitOK, "accept/%s=on", "%s is accepted: it takes effect now, everywhere, and takes away " + heldTakes + "\n", ""},
		{"again", true, func(r *rig, name string) { _ = r.set("accept/"+name, "on"); r.told = nil }, "", exitOK, "", "%s is accepted already, by d1\n", ""},
		{"another name", true, nil, "1234", exitUsage, "", "", "ravel: \"1234\" is no change that is held: held is %s; nothing was done\n"},
		{"a name, and nothing is held", false, nil, "1234", exitUsage, "", "", "ravel: \"1234\" is no change that is held: none is; nothing was done\n"},
		{"two names", true, nil, "%s 1234", exitUsage, "", "", "ravel: ravel accept: want the name of one change, or none, got [\"%s\" \"1234\"]; nothing was done\n"},
		{"one that only another holds", false, d2Holds, "", exitUsage, "", "", "ravel: nothing was done, say which one: a change of the documents is held by d2 (" +
			other + "): ravel plan held there shows it, ravel accept " + other + " lets it through\n"},
		{"one that only another holds, by name", false, d2Holds, other, exitOK, "accept/" + other + "=on", other + " is accepted: it takes effect now, everywhere\n", ""},
		{"frozen", true, func(r *rig, _ string) { _ = r.set("freeze", "on"); r.told = nil }, "", exitOK, "accept/%s=on",
			"%s is accepted: it takes effect now, everywhere, and takes away " + heldTakes + "\n", "ravel: the fleet is frozen, so this has no effect before: ravel freeze off\n"},
		{"not settled", true, func(r *rig, _ string) { r.fleet.Settled = false }, "", exitFault, "", "",
			"ravel: this director has not heard from the fleet yet; nothing was done, try again in a moment\n"},
	} {
		t.Run(test.name, func(t *testing.T) {
			r := newRig(t, ravel.Director)
			name := ""
			if test.held {
				name = r.hold().Name
			}
			if test.change != nil {
				test.change(r, name)
			}
			r.know()
			full := func(s string) string { return strings.ReplaceAll(s, "%s", name) }
			args := append([]string{"accept"}, strings.Fields(full(test.args))...)
			code, stdout, stderr := ravelWith(append(args, "--admin-socket", r.socket())...)
			if told := strings.Join(r.told, " "); code != test.code || stdout != full(test.stdout) || stderr != full(test.stderr) || told != full(test.told) {
				t.Errorf("exit code %d, want %d; told %q, want %q\n%s%s", code, test.code, told, full(test.told), stdout, stderr)
			}
		})
	}
}

// A realserver accepts, too, for all.
func TestAcceptOnARealserver(t *testing.T) {
	r := newRig(t, ravel.Realserver)
	change := r.hold()
	code, stdout, _ := ravelWith("accept", "-o", "json", "--admin-socket", r.socket())
	var answer setAnswer
	if err := json.Unmarshal([]byte(stdout), &answer); err != nil || code != exitOK || !answer.Changed || len(r.told) != 1 || r.told[0] != "accept/"+change.Name+"=on" {
		t.Errorf("exit code %d, %v, told %q:\n%s", code, err, r.told, stdout)
	}
}

// Every listing says that a change is held, and check fails by it.
func TestEveryListingTellsOfAHeldChange(t *testing.T) {
	r := newRig(t, ravel.Director)
	socket := r.socket()
	change := r.hold()
	line := "a change of the documents is held (" + change.Name + "): it would take away " + heldTakes + "; ravel plan held shows it, ravel accept lets it through"
	for _, args := range [][]string{{"vips"}, {"services"}, {"vips", "-o", "json"}, {"trace", "198.51.100.7:4000", "192.0.2.80:80"}, {"plan", "drain", "r3"}, {"members"}} {
		code, stdout, stderr := ravelWith(append(args, "--admin-socket", socket)...)
		if !strings.Contains(stdout+stderr, line+"\n") {
			t.Errorf("ravel %s does not say it:\n%s%s", args, stdout, stderr)
		}
		if args[0] == "members" && (code != exitNotWell || !strings.Contains(stderr, "ravel: change "+change.Name+" of the documents waits for: ravel accept\n")) {
			t.Errorf("ravel members: exit code %d\n%s", code, stderr)
		}
	}
	code, stdout, _ := ravelWith("check", "--admin-socket", socket)
	want := "fail  change: is held (" + change.Name + "), and what was in force before goes on: it would take away " + heldTakes + " at once\n" +
		"      mend it by: ravel plan held shows it, ravel accept lets it through; or change the documents\n"
	if code != exitFault || !strings.Contains(stdout, want) {
		t.Errorf("exit code %d; check prints\n%s", code, stdout)
	}
	// What others hold is told as well.
	r.p.decision.Set(hold.Decision{})
	_, _ = r.set("document/d2", "0 holds 1234"), r.set("document/d3", "0 holds 1234")
	_, _, stderr := ravelWith("vips", "--admin-socket", socket)
	if want := "ravel: a change of the documents is held by d2, d3 (1234): ravel plan held there shows it, ravel accept 1234 lets it through\n"; stderr != want {
		t.Errorf("vips says %q", stderr)
	}
	// And that nothing is known of what was before.
	r.p.decision.Set(hold.Decision{Unconfirmed: true, Held: &hold.Change{Name: "1234"}})
	_, _, stderr = ravelWith("vips", "--admin-socket", socket)
	if want := "ravel: the documents are a change that others hold (1234): this host stays as it was found; ravel accept lets it through\n"; stderr != want {
		t.Errorf("vips says %q", stderr)
	}
	if l := problemLine(r.p.heldProblems()[0], false); l.Status != check.Fail || !strings.Contains(l.Detail, "is not known here") {
		t.Errorf("%+v", l)
	}
}

func TestPlanOfAHeldChange(t *testing.T) {
	r := newRig(t, ravel.Director)
	r.connect(50)
	socket := r.socket()
	if code, _, stderr := ravelWith("plan", "held", "--admin-socket", socket); code != exitFault || stderr != "ravel: no change is held here\n" {
		t.Errorf("nothing is held: exit code %d: %s", code, stderr)
	}
	r.hold()
	code, stdout, stderr := ravelWith("plan", "held", "--admin-socket", socket)
	for _, want := range []string{"tcp 192.0.2.80:80      default/web:p   4093          100.0%  50       0           0.0%   0        50           0        50       the service goes",
		"tcp [2001:db8::80]:80  default/web6:p"} {
		if !strings.Contains(stdout, want) {
			t.Errorf("exit code %d; it prints\n%swithout %q", code, stdout, want)
		}
	}
	if !strings.Contains(stderr, "it would take away "+heldTakes) || strings.Contains(stdout, "dns") {
		t.Errorf("it prints\n%s%s", stdout, stderr)
	}
	if code, _, _ := ravelWith("plan", "held", "back", "--admin-socket", socket); code != exitUsage {
		t.Errorf("more words: exit code %d", code)
	}
	// A file that would be held says so beforehand.
	file := write(t, "changed.yaml", strings.ReplaceAll(planDocument, "192.0.2.81:", "192.0.2.80:"))
	r.p.settings.blastRadius = 50
	code, _, stderr = ravelWith("plan", file, "--admin-socket", socket)
	if code != exitNotWell || !strings.Contains(stderr, "ravel: it would take away 3 of 4 real servers (r2, r3, r4) at once, so it would wait for: ravel accept ") {
		t.Errorf("exit code %d: %s", code, stderr)
	}
}

// reader is a process that reads its documents and is in a fleet, and programs nothing.
type reader struct {
	*process
	t    *testing.T
	stop func()
}

// readerOf begins such a process, which reads a static file.
func readerOf(t *testing.T, network *gossiptest.Network, role ravel.Role, name string, host byte, file, stateDir string, seeds ...string) *reader {
	t.Helper()
	return readerWith(t, network, role, name, host, values{static: file, stateDir: stateDir}, seeds...)
}

// readerWith begins one that reads what its settings say.
func readerWith(t *testing.T, network *gossiptest.Network, role ravel.Role, name string, host byte, s values, seeds ...string) *reader {
	t.Helper()
	log := slog.New(slog.DiscardHandler)
	addr := netip.AddrPortFrom(netip.AddrFrom4([4]byte{10, 0, 0, host}), 7946)
	s.node, s.log, s.blastRadius, s.gossip = name, log, 50, gossip.Config{
		Name: name, Role: role, Fleet: "test", Insecure: true, Preset: gossip.Fast, Bind: addr, Advertise: addr, Addrs: []netip.Addr{addr.Addr()},
		Transport: network.Transport(addr), Settle: 300 * time.Millisecond, Seeds: seeds,
	}
	p := &process{role: role, settings: s}
	err := p.follow()
	if err != nil {
		t.Fatal(err)
	}
	if p.gossip, err = gossip.New(p.settings.gossip); err != nil {
		t.Fatal(err)
	}
	p.gate = p.newGate()
	ctx, cancel := context.WithCancel(t.Context())
	var work sync.WaitGroup
	work.Go(func() { _ = p.runDocuments(ctx) })
	work.Go(func() { _ = p.read(ctx) })
	work.Go(func() {
		if err := p.gossip.Run(ctx); err != nil {
			t.Errorf("%s: gossip: %v", name, err)
		}
	})
	r := &reader{process: p, t: t, stop: sync.OnceFunc(func() {
		cancel()
		work.Wait()
		if err := p.gossip.Close(); err != nil {
			t.Errorf("%s: gossip: %v", name, err)
		}
	})}
	t.Cleanup(r.stop)
	return r
}

// nothing is no change that is held.
const nothing = -1

// is waits until so many services are in force, and the change to so many is held or none, in doubt or not.
func (r *reader) is(what string, services, held int, doubt bool) {
	r.t.Helper()
	want := nameOf(r.t, held)
	for deadline := time.Now().Add(20 * time.Second); ; time.Sleep(time.Millisecond) {
		d, _ := r.decision.Latest()
		in, known := r.inputs.Latest()
		if known && len(in.Cluster.Services) == services && d.Unconfirmed == doubt && (d.Held == nil && want == "" || d.Held != nil && d.Held.Name == want) {
			return
		}
		if time.Now().After(deadline) {
			r.t.Fatalf("not in 20 s: %s: %s has %d services, known %t, held %+v, in doubt %t", what, r.settings.node, len(in.Cluster.Services), known, d.Held, d.Unconfirmed)
		}
	}
}

// says waits until a director is known to live and to hold the change to so many.
func (r *reader) says(director string, held int) {
	r.t.Helper()
	want := nameOf(r.t, held)
	for deadline := time.Now().Add(20 * time.Second); ; time.Sleep(time.Millisecond) {
		fleet, _ := r.gossip.Latest()
		m, there := fleet.Member(director)
		_, got := hold.Says(fleet, director)
		if fleet.Settled && there && m.State.Live() && got == want {
			return
		}
		if time.Now().After(deadline) {
			r.t.Fatalf("not in 20 s: of %s, %s knows that it holds %q: %+v", director, r.settings.node, got, m)
		}
	}
}

// nameOf is the name of documents with so many VIPs.
func nameOf(t *testing.T, vips int) string {
	t.Helper()
	if vips == nothing {
		return ""
	}
	static, err := config.Parse([]byte(staticWith(vips)))
	if err != nil {
		t.Fatal(err)
	}
	return hold.Documents{Cluster: static.Cluster, Fleet: static.Fleet}.Name()
}

// acceptThere is what `ravel accept` does.
func (r *reader) acceptThere() {
	r.t.Helper()
	// What agree makes known of the fleet.
	fleet, _ := r.gossip.Latest()
	c := computed{}
	c.result.Fleet = fleet
	r.computed.Set(c)
	answer, err := r.accept(r.gossip.SetRegister)(r.t.Context(), func(any) error { return nil })
	if err != nil || !answer.(setAnswer).Changed {
		r.t.Fatalf("accept: %+v, %v", answer, err)
	}
}

// staticWith is a static file with so many VIPs.
func staticWith(vips int) string {
	var b strings.Builder
	b.WriteString("cluster:\n  config:\n")
	if vips == 0 {
		b.Reset()
		b.WriteString("cluster:\n  config: {}\n")
	}
	for i := range vips {
		fmt.Fprintf(&b, "    192.0.2.%d:\n      80: {namespace: default, service: web, portName: p, tcpEnabled: true}\n", i+1)
	}
	b.WriteString(`fleet:
  asn: 65100
  directors:
    - {name: d1, addresses: [10.0.0.11]}
  peers:
    - {address: 10.0.0.254, asn: 65000}
nodes:
  - {name: r1, addresses: [10.0.0.1]}
endpoints:
  - {namespace: default, service: web, portName: p, address: 10.1.1.1, port: 8080, node: r1}
`)
	return b.String()
}

// A change is held by all of a fleet, over restarts and lost files, until it is accepted anywhere.
func TestAChangeIsHeldByTheFleet(t *testing.T) {
	var network gossiptest.Network
	file := write(t, "static.yaml", staticWith(8))
	rewrite := func(vips int) {
		t.Helper()
		if err := errors.Join(os.WriteFile(file+".new", []byte(staticWith(vips)), 0o644), os.Rename(file+".new", file)); err != nil {
			t.Fatal(err)
		}
	}
	const seed = "10.0.0.11:7946"
	stateOfD1 := t.TempDir()
	d1 := readerOf(t, &network, ravel.Director, "d1", 11, file, stateOfD1)
	d2 := readerOf(t, &network, ravel.Director, "d2", 12, file, t.TempDir(), seed)
	r1 := readerOf(t, &network, ravel.Realserver, "r1", 1, file, "", seed)
	all := func(what string, services, held int) {
		t.Helper()
		for _, r := range []*reader{d1, d2, r1} {
			r.is(what, services, held, false)
		}
	}
	all("the first file", 8, nothing)
	rewrite(3)
	all("5 of 8 VIPs go", 8, 3)
	d1.stop()
	d1 = readerOf(t, &network, ravel.Director, "d1", 11, file, stateOfD1, "10.0.0.12:7946")
	d1.is("another life", 8, 3, false)
	d1.says("d1", 3)
	d1.says("d2", 3)
	d2.stop()
	d2 = readerOf(t, &network, ravel.Director, "d2", 12, file, t.TempDir(), seed)
	d2.is("another life, of which all is lost", 3, 3, true)
	rewrite(0)
	d1.is("an emptied file", 8, 0, false)
	r1.is("an emptied file", 8, 0, false)
	r1.acceptThere()
	all("accepted", 0, nothing)
	rewrite(8)
	all("more", 8, nothing)
	rewrite(4)
	all("half of the VIPs go", 4, nothing)
	rewrite(1)
	all("3 of 4 go", 4, 1)
	rewrite(2)
	all("one more stays", 2, nothing)

	// What is in force stands in the state directory, and who cannot write there says so.
	saved, any, err := hold.Load(inForce(stateOfD1, ravel.Director))
	if err != nil || !any || len(saved.Documents.Cluster.Services) == 0 {
		t.Errorf("%t, %v: %+v", any, err, saved)
	}
}

// Without a fleet, `ravel accept` works where the change is held.
func TestARealserverAlone(t *testing.T) {
	var network gossiptest.Network
	file, state := write(t, "static.yaml", staticWith(4)), t.TempDir()
	r1 := readerOf(t, &network, ravel.Realserver, "r1", 1, file, state)
	r1.is("the first file", 4, nothing, false)
	if err := os.WriteFile(file, []byte(staticWith(1)), 0o600); err != nil {
		t.Fatal(err)
	}
	r1.is("3 of 4 VIPs go", 4, 1, false)
	r1.acceptThere()
	r1.is("accepted", 1, nothing, false)
	r1.stop()
	r1 = readerOf(t, &network, ravel.Realserver, "r1", 1, file, state)
	r1.is("another life", 1, nothing, false)
}

// What cannot be kept is a warning of check.
func TestDocumentsThatCannotBeKept(t *testing.T) {
	inTheWay := write(t, "state", "")
	p := &process{role: ravel.Director, settings: values{node: "d1", log: slog.New(slog.DiscardHandler), stateDir: inTheWay}}
	alone(t, p, nil)
	p.settings.blastRadius = 100 // nothing waits, and all is kept
	p.gate = p.newGate()
	p.offer(hold.Documents{Cluster: desired.Cluster{Services: []desired.Service{{Key: web}}}})
	problems := p.heldProblems()
	if len(problems) != 1 || problemLine(problems[0], false).Status != check.Warn || problems[0].Where != "--state-dir" {
		t.Fatalf("%+v", problems)
	}
	p.keepAfter = time.Time{}
	if err := os.Remove(inTheWay); err != nil {
		t.Fatal(err)
	}
	p.offer(hold.Documents{Cluster: desired.Cluster{Services: []desired.Service{{Key: web}, {Key: dns}}}})
	if problems := p.heldProblems(); len(problems) != 0 {
		t.Errorf("%+v", problems)
	}
	if _, any, err := hold.Load(filepath.Join(inTheWay, "in-force-director.json")); !any || err != nil {
		t.Errorf("%t, %v", any, err)
	}
	// One that cannot be read is no reason not to start.
	if err := os.WriteFile(filepath.Join(inTheWay, "in-force-director.json"), []byte("{"), 0o600); err != nil {
		t.Fatal(err)
	}
	p.gate = p.newGate()
	p.offer(hold.Documents{Cluster: desired.Cluster{Services: []desired.Service{{Key: dns}}}})
	if in, _ := p.inputs.Latest(); len(in.Cluster.Services) != 1 {
		t.Errorf("in force are %+v", in.Cluster)
	}
}
