package main

import (
	"io"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

// Flags behind the arguments are flags, and behind "--" nothing is one.
func TestFlagsMayStandBehindArguments(t *testing.T) {
	commands := newApp(io.Discard, io.Discard).Commands
	for _, test := range []struct{ in, want string }{
		{"ravel drain r1 --undo", "ravel drain --undo -- r1"},
		{"ravel drain --undo r1", "ravel drain --undo -- r1"},
		{"ravel drain r1 -o json --force", "ravel drain -o json --force -- r1"},
		{"ravel drain r1 --admin-socket=/x --output wide", "ravel drain --admin-socket=/x --output wide -- r1"},
		{"ravel drain -- --undo", "ravel drain -- --undo"},
		{"ravel drain r1 -o", "ravel drain -o -- r1"},
		{"ravel trace 192.0.2.7 192.0.2.80:80 -o json", "ravel trace -o json -- 192.0.2.7 192.0.2.80:80"},
		{"ravel plan drain r1 --no-such", "ravel plan --no-such -- drain r1"},
		{"ravel vips all --dry-run", "ravel vips all --dry-run"},
		{"ravel nonsense drain --x", "ravel nonsense drain --x"},
		{"ravel", "ravel"},
	} {
		if got := strings.Join(flagsFirst(strings.Fields(test.in), commands), " "); got != test.want {
			t.Errorf("%s\nbecomes %s\nwant    %s", test.in, got, test.want)
		}
	}
}

// What an operator typed wrong is said before anybody is asked.
func TestWrongArguments(t *testing.T) {
	nobody := filepath.Join(t.TempDir(), "nobody.sock")
	for _, test := range []struct{ line, says string }{
		{"freeze", "want on, off or status"},
		{"freeze maybe", "maybe"},
		{"freeze on off", "want on, off or status"},
		{"drain r1 r2", `["r1" "r2"]`},
		{"drain r1 --nope", "nope"},
		{"drain r1 -o xml", `"xml"`},
		{"trace", "CLIENT[:PORT] VIP:PORT[/PROTO]"},
		{"trace 192.0.2.7", "CLIENT[:PORT] VIP:PORT[/PROTO]"},
		{"trace here 192.0.2.80:80", `"here"`},
		{"trace 192.0.2.7:0 192.0.2.80:80", `"192.0.2.7:0"`},
		{"trace 2001:db8::7 192.0.2.80:80", "two families"},
		{"trace fe80::1%eth0 [2001:db8::80]:80", "neither client nor VIP"},
		{"trace 192.0.2.7 192.0.2.80", "address with a port"},
		{"trace 192.0.2.7 192.0.2.80:0", "want a port"},
		{"trace 192.0.2.7 192.0.2.80:80/icmp", `"icmp"`},
		{"trace 0.0.0.0 192.0.2.80:80", "neither client nor VIP"},
		{"plan", "want drain NODE"},
		{"plan drain", "want one NODE"},
		{"plan drain a b", "want one NODE"},
		{"plan remove", "want one NODE"},
		{"plan add", "want NODE"},
		{"plan add r1=0", `"r1=0"`},
		{"plan add r1=x", `"r1=x"`},
		{"plan add =1", `"=1"`},
		{"plan add r1 r1=2", "twice"},
		{"plan /nowhere/static.yaml", "/nowhere/static.yaml"},
		{"plan a b", "want drain NODE"},
	} {
		code, stdout, stderr := ravelWith(append(strings.Fields(test.line), "--admin-socket", nobody)...)
		if code != exitUsage || stdout != "" || !strings.Contains(stderr, test.says) {
			t.Errorf("ravel %s: exit code %d, want %q:\n%s%s", test.line, code, test.says, stdout, stderr)
		}
	}
	good := [][]string{
		{"members"}, {"freeze", "on"}, {"freeze", "status"}, {"drain"}, {"drain", "r1", "--undo"}, {"plan", "drain", "r1"},
		{"plan", "add", "r1=3", "r2"}, {"plan", "../../deploy/example/ravel-static.yaml"},
		{"trace", "[2001:db8::7]", "[2001:db8::80]:53/UDP"}, {"trace", "2001:db8::7", "[2001:db8::80]:53"},
		{"trace", "::ffff:192.0.2.7", "192.0.2.80:80"}, {"trace", "192.0.2.7:9", "192.0.2.80:80/tcp"},
	}
	for _, args := range good {
		code, _, stderr := ravelWith(slices.Concat(args, []string{"--admin-socket", nobody})...)
		if code != exitNotRunning || !strings.Contains(stderr, nobody) {
			t.Errorf("ravel %s: exit code %d:\n%s", strings.Join(args, " "), code, stderr)
		}
	}
}
