package iptables

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os/exec"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	goiptables "github.com/coreos/go-iptables/iptables"
	"github.com/google/go-cmp/cmp"
	"github.com/vishvananda/netns"

	"github.com/ravel-lb/ravel/internal/nettest"
)

func TestMain(m *testing.M) { nettest.Main(m) }

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// eachTables runs a test for both families of both variants, each in a network namespace of its own.
func eachTables(t *testing.T, fn func(t *testing.T, tables *Tables)) {
	features := map[Variant]nettest.Feature{NFT: nettest.NftNAT, Legacy: nettest.LegacyNAT}
	for _, v := range []Variant{NFT, Legacy} {
		for _, f := range []Family{V4, V6} {
			t.Run(string(v)+"/"+f.String(), func(t *testing.T) {
				nettest.Need(t, features[v])
				nettest.InNetns(t, func() {
					tables, err := Open(v, f)
					must(t, err)
					fn(t, tables)
				})
			})
		}
	}
}

// foreign runs another program's iptables command.
func foreign(t *testing.T, tables *Tables, args string) {
	t.Helper()
	nettest.Shell(t, fmt.Sprintf("%s-%s -w %s", tables.family.command(), tables.variant, args))
}

// rules returns a chain's rules without "-A CHAIN ", one a line.
func rules(t *testing.T, tables *Tables, table, chain string) string {
	t.Helper()
	list, err := tables.Rules(t.Context(), table, chain)
	must(t, err)
	for i := range list {
		list[i] = strings.TrimPrefix(list[i], "-A "+chain+" ")
	}
	return strings.Join(list, "\n")
}

func TestEnsureFirst(t *testing.T) {
	jump := []string{"-m", "comment", "--comment", "ravel: not \"first\"", "-j", "RAVEL-X"}
	other := "-p tcp -m tcp --dport 9 -j RETURN"
	eachTables(t, func(t *testing.T, tables *Tables) {
		must(t, tables.EnsureChain(t.Context(), "nat", "RAVEL-X"))
		must(t, tables.EnsureChain(t.Context(), "nat", "RAVEL-X"))
		printed := quote(jump)
		for _, step := range []struct{ what, foreign, want string }{
			{"into an empty chain", "", printed},
			{"again", "", printed},
			{"behind another", "-t nat -I PREROUTING " + other, printed + "\n" + other},
			{"twice", "-t nat -A PREROUTING " + printed, printed + "\n" + other},
			{"another's text", "-t nat -R PREROUTING 1 -p tcp -m tcp --dport 7 -j RAVEL-X", printed + "\n" + other},
			{"gone", "-t nat -D PREROUTING 1", printed + "\n" + other},
		} {
			if step.foreign != "" {
				foreign(t, tables, step.foreign)
			}
			must(t, tables.EnsureFirst(t.Context(), "nat", "PREROUTING", jump))
			if diff := cmp.Diff(step.want, rules(t, tables, "nat", "PREROUTING")); diff != "" {
				t.Fatalf("%s: (-want +got):\n%s", step.what, diff)
			}
		}
		must(t, tables.Remove(t.Context(), "nat", "PREROUTING", jump))
		must(t, tables.Remove(t.Context(), "nat", "PREROUTING", jump))
		if diff := cmp.Diff(other, rules(t, tables, "nat", "PREROUTING")); diff != "" {
			t.Fatalf("removed: (-want +got):\n%s", diff)
		}
	})
}

func TestRestore(t *testing.T) {
	eachTables(t, func(t *testing.T, tables *Tables) {
		ctx := t.Context()
		must(t, tables.Restore(ctx, "*nat\n:RAVEL-X - [0:0]\n-A RAVEL-X -p tcp -j RETURN\n-I PREROUTING -j RAVEL-X\nCOMMIT\n"))
		if got := rules(t, tables, "nat", "RAVEL-X"); got != "-p tcp -j RETURN" {
			t.Fatalf("rules: %s", got)
		}
		for _, bad := range []struct{ line, input string }{
			{"-A RAVEL-X -j NOWHERE", "*nat\n:RAVEL-X - [0:0]\n-A RAVEL-X -j ACCEPT\n-A RAVEL-X -j NOWHERE\nCOMMIT\n"},
			{"-A RAVEL-X --no-such-option", "*nat\n:RAVEL-X - [0:0]\n-A RAVEL-X --no-such-option\nCOMMIT\n"},
		} {
			err := tables.Restore(ctx, bad.input)
			var failed *CommandError
			if !errors.As(err, &failed) || failed.Stderr == "" || failed.Status <= 0 {
				t.Fatalf("%q: %#v", bad.line, err)
			}
			// iptables-legacy names the COMMIT for what only the kernel finds.
			if failed.Line != bad.line && failed.Line != "COMMIT" || !strings.Contains(err.Error(), failed.Line) {
				t.Fatalf("%q: the error names %q: %v", bad.line, failed.Line, err)
			}
			if got := rules(t, tables, "nat", "RAVEL-X"); got != "-p tcp -j RETURN" {
				t.Fatalf("a transaction that failed left: %s", got)
			}
		}
		foreign(t, tables, "-t nat -N OTHER")
		foreign(t, tables, "-t nat -A OTHER -j RETURN")
		before, err := tables.Save(ctx, "nat")
		must(t, err)
		for _, line := range []string{
			":PREROUTING ACCEPT [0:0]", ":PREROUTING DROP", ":OTHER - [0:0]", "-F OTHER", "-X OTHER", "-F", "-A OTHER -j ACCEPT",
			"-A PREROUTING -j ACCEPT", "-A PREROUTING -m comment --comment \"-j RAVEL-X\" -j ACCEPT", "-P PREROUTING DROP", "[0:0] -A OTHER -j ACCEPT",
			"-R PREROUTING 1 -j RAVEL-X", "\"\"", "-t filter -A INPUT -j RAVEL-X", "--append OTHER -j RAVEL-X", "-Z", "-E OTHER RAVEL-Y",
		} {
			err := tables.Restore(ctx, "*nat\n"+line+"\nCOMMIT\n")
			if err == nil || !strings.Contains(err.Error(), "line 2 ") {
				t.Errorf("%q: %v", line, err)
			}
		}
		after, err := tables.Save(ctx, "nat")
		must(t, err)
		keep := func(l string) bool { return strings.HasPrefix(l, "#") }
		if diff := cmp.Diff(slices.DeleteFunc(before, keep), slices.DeleteFunc(after, keep)); diff != "" {
			t.Fatalf("refused, and changed (-before +after):\n%s", diff)
		}
	})
}

func TestRemoveChains(t *testing.T) {
	eachTables(t, func(t *testing.T, tables *Tables) {
		ctx := t.Context()
		if went, err := tables.RemoveChains(ctx, "nat", "RAVEL", false); err != nil || len(went) != 0 {
			t.Fatalf("nothing is there: %q, %v", went, err)
		}
		foreign(t, tables, "-t nat -N OTHER")
		foreign(t, tables, "-t nat -A PREROUTING -j OTHER")
		must(t, tables.Restore(ctx, strings.Join([]string{
			"*nat", ":RAVEL-X - [0:0]", ":RAVEL-Y - [0:0]", ":RAVELLER - [0:0]", "-A RAVEL-X -g RAVEL-Y", "-A RAVEL-Y -j RETURN",
			"-I PREROUTING -m comment --comment \"a b\" -j RAVEL-X", "-A OTHER -p udp -j RAVEL-Y", "-A OTHER -j RAVELLER", "COMMIT", "",
		}, "\n")))
		would, err := tables.RemoveChains(ctx, "nat", "RAVEL-", true)
		must(t, err)
		went, err := tables.RemoveChains(ctx, "nat", "RAVEL-", false)
		must(t, err)
		command := tables.family.command() + " -t nat "
		slices.Sort(went)
		want := []string{
			command + "-D OTHER -p udp -j RAVEL-Y", command + `-D PREROUTING -m comment --comment "a b" -j RAVEL-X`,
			command + "-X RAVEL-X", command + "-X RAVEL-Y",
		}
		if diff := cmp.Diff(want, went); diff != "" {
			t.Fatalf("went (-want +got):\n%s", diff)
		}
		slices.Sort(would)
		if !slices.Equal(would, went) {
			t.Fatalf("would remove %q, removed %q", would, went)
		}
		if got := rules(t, tables, "nat", "PREROUTING") + "; " + rules(t, tables, "nat", "OTHER"); got != "-j OTHER; -j RAVELLER" {
			t.Fatalf("left: %s", got)
		}
		if _, err := tables.RemoveChains(ctx, "nat", "OTHER", false); err == nil {
			t.Fatal("removed what is not ours")
		}
		for _, call := range []func() error{
			func() error { return tables.EnsureChain(ctx, "nat", "OTHER") },
			func() error { return tables.EnsureFirst(ctx, "nat", "PREROUTING", []string{"-j", "OTHER"}) },
			func() error { return tables.Remove(ctx, "nat", "PREROUTING", []string{"-j", "OTHER"}) },
		} {
			if call() == nil {
				t.Fatal("touched what is not ours")
			}
		}
	})
}

// beside runs fn on a thread of its own in the network namespace of this one, until stop is called.
func beside(t *testing.T, fn func(ctx context.Context)) (stop func()) {
	here, err := netns.Get()
	must(t, err)
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan struct{})
	go func() {
		defer close(done)
		runtime.LockOSThread() // and never unlocked: the thread goes
		if err := netns.Set(here); err != nil {
			t.Error(err)
			return
		}
		fn(ctx)
	}()
	return func() { cancel(); <-done; _ = here.Close() }
}

// While another program adds and removes rules all the time, none of its rules is lost, and our jump is there at every
// moment once it was put there.
func TestBesideAnotherWriter(t *testing.T) {
	count := 60
	if !nettest.Has(nettest.PlainClock) {
		count = 8 // one CPU: who waits for the lock of the legacy tables waits long
	}
	jump := []string{"-j", "RAVEL-X"}
	eachTables(t, func(t *testing.T, tables *Tables) {
		must(t, tables.EnsureChain(t.Context(), "nat", "RAVEL-X"))
		must(t, tables.EnsureFirst(t.Context(), "nat", "PREROUTING", jump))
		// It keeps the even rules and takes the odd ones away again.
		script := fmt.Sprintf(`for i in $(seq 1 %d); do
			until %[2]s -w -t nat -I PREROUTING -p tcp --dport $i -j RETURN; do :; done
			[ $((i%%2)) = 0 ] || until %[2]s -w -t nat -D PREROUTING -p tcp --dport $i -j RETURN; do :; done
		done`, count, tables.family.command()+"-"+string(tables.variant))
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		defer cancel()
		writer := exec.CommandContext(ctx, "bash", "-c", script)
		must(t, writer.Start())
		finished := make(chan error, 1)
		go func() { finished <- writer.Wait() }()
		looks := 0
		stop := beside(t, func(ctx context.Context) {
			for ; ctx.Err() == nil; looks++ {
				list, err := tables.Rules(context.WithoutCancel(ctx), "nat", "PREROUTING")
				if err != nil {
					t.Errorf("looking: %v", err)
				}
				if n := strings.Count(strings.Join(list, "\n")+"\n", "-j RAVEL-X\n"); n != 1 {
					t.Errorf("our jump is there %d times:\n%s", n, strings.Join(list, "\n"))
				}
			}
		})
		moves := 0
		for running := true; running; moves++ {
			select {
			case err := <-finished:
				must(t, err)
				running = false
			default:
			}
			must(t, tables.EnsureFirst(t.Context(), "nat", "PREROUTING", jump))
			var input strings.Builder
			input.WriteString("*nat\n:RAVEL-X - [0:0]\n")
			for p := range 1 + moves%20 {
				fmt.Fprintf(&input, "-A RAVEL-X -p tcp -m tcp --dport %d -j RETURN\n", 1+p)
			}
			must(t, tables.Restore(t.Context(), input.String()+"COMMIT\n"))
		}
		stop()
		must(t, tables.EnsureFirst(t.Context(), "nat", "PREROUTING", jump))
		want := []string{"-j RAVEL-X"}
		for i := count; i > 0; i -= 2 {
			want = append(want, fmt.Sprintf("-p tcp -m tcp --dport %d -j RETURN", i))
		}
		if diff := cmp.Diff(strings.Join(want, "\n"), rules(t, tables, "nat", "PREROUTING")); diff != "" {
			t.Fatalf("rules (-want +got):\n%s", diff)
		}
		t.Logf("moved or left %d times, looked %d times", moves, looks)
		if moves < 2 || looks < 2 {
			t.Fatal("that is too few: the test shows nothing")
		}
	})
}

// Reading what is not there makes no legacy table.
func TestReadingMakesNoTable(t *testing.T) {
	nettest.Need(t, nettest.LegacyNAT)
	nettest.InNetns(t, func() {
		tables, err := Open(Legacy, V4)
		must(t, err)
		ctx := t.Context()
		if list, err := tables.Save(ctx, "nat"); err != nil || list != nil {
			t.Fatalf("saved %q, %v", list, err)
		}
		if list, err := tables.Rules(ctx, "nat", "RAVEL-X"); err != nil || list != nil {
			t.Fatalf("rules %q, %v", list, err)
		}
		if list, err := tables.Chains(ctx, "nat"); err != nil || list != nil {
			t.Fatalf("chains %q, %v", list, err)
		}
		_, err = tables.RemoveChains(ctx, "nat", "RAVEL", false)
		must(t, err)
		if _, err := Detect(ctx); err != nil {
			t.Fatal(err)
		}
		if names, err := legacyTables(V4); err != nil || len(names) != 0 {
			t.Fatalf("tables %q, %v", names, err)
		}
	})
}

func TestContextEndsACommand(t *testing.T) {
	eachTables(t, func(t *testing.T, tables *Tables) {
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		for _, err := range []error{
			tables.Restore(ctx, "*nat\n:RAVEL-X - [0:0]\nCOMMIT\n"),
			tables.EnsureChain(ctx, "nat", "RAVEL-X"),
			tables.EnsureFirst(ctx, "nat", "PREROUTING", []string{"-j", "RAVEL-X"}),
		} {
			if !errors.Is(err, context.Canceled) && !strings.Contains(fmt.Sprint(err), "RAVEL-X") {
				t.Errorf("got %v", err)
			}
		}
		ctx, cancel = context.WithTimeout(t.Context(), 50*time.Millisecond)
		defer cancel()
		start := time.Now()
		_, err := execute(ctx, "", "/bin/sleep", "60")
		if !errors.Is(err, context.DeadlineExceeded) || time.Since(start) > 20*time.Second {
			t.Errorf("after %s: %v", time.Since(start), err)
		}
	})
}

// A fault that passes is tried again; another is not.
func TestTry(t *testing.T) {
	tables := &Tables{}
	for _, c := range []struct {
		err   error
		calls int
	}{
		{&CommandError{Status: 4}, tries},
		{&CommandError{Status: 1, Stderr: "iptables: Resource temporarily unavailable.\n"}, tries},
		{&CommandError{Status: 2, Stderr: "unknown option"}, 1},
		{errors.New("other"), 1},
	} {
		calls := 0
		err := tables.try(t.Context(), func(*goiptables.IPTables) error { calls++; return c.err })
		if err != c.err || calls != c.calls {
			t.Errorf("%v: %d calls, want %d; %v", c.err, calls, c.calls, err)
		}
	}
	calls := 0
	must(t, tables.try(t.Context(), func(*goiptables.IPTables) error {
		if calls++; calls < 3 {
			return &CommandError{Status: 4}
		}
		return nil
	}))
}

func TestOpenNamesWhatIsMissing(t *testing.T) {
	_, err := Open("other", V6)
	if !errors.Is(err, exec.ErrNotFound) || !strings.Contains(err.Error(), "ip6tables-other is missing: install the package") {
		t.Fatalf("got %v", err)
	}
}

func TestFamilyOf(t *testing.T) {
	for a, want := range map[string]Family{"192.0.2.1": V4, "2001:db8::1": V6} {
		if got := FamilyOf(netip.MustParseAddr(a)); got != want {
			t.Errorf("%s: %s, want %s", a, got, want)
		}
	}
}

// BenchmarkRestore writes a chain of 5,000 rules.
func BenchmarkRestore(b *testing.B) {
	v, err := Detect(b.Context())
	if err != nil {
		b.Skip(err)
	}
	tables, err := Open(v, V4)
	if err != nil {
		b.Fatal(err)
	}
	var input strings.Builder
	input.WriteString("*nat\n:RAVEL-X - [0:0]\n")
	for p := range 5000 {
		fmt.Fprintf(&input, "-A RAVEL-X -p tcp -m tcp --dport %d -j RETURN\n", 1+p)
	}
	input.WriteString("COMMIT\n")
	for b.Loop() {
		if err := tables.Restore(b.Context(), input.String()); err != nil {
			b.Fatal(err)
		}
	}
}
