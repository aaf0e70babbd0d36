package iptables

import (
	"slices"
	"strings"
	"testing"
)

func TestWords(t *testing.T) {
	for line, want := range map[string][]string{
		`-A INPUT -j X`: {"-A", "INPUT", "-j", "X"},
		`-m comment --comment "say \"a b\" \\ c" -j X`: {"-m", "comment", "--comment", `say "a b" \ c`, "-j", "X"},
		"  \t ": nil,
		`""`:    {""},
		`"open`: {"open"},
	} {
		if got := Words(line); !slices.Equal(got, want) {
			t.Errorf("%q: got %q, want %q", line, got, want)
		}
	}
	for line, want := range map[string]string{
		`-A INPUT -j X`: "X", `-A INPUT -g X`: "X", `-A INPUT --comment "-j" -j X`: "X", `-A INPUT --comment -j X`: "", `-A INPUT -j`: "",
	} {
		if got := target(Words(line)); got != want {
			t.Errorf("%q jumps to %q, want %q", line, got, want)
		}
	}
}

func TestFailedLine(t *testing.T) {
	input := "*nat\n:RAVEL-X - [0:0]\n-A RAVEL-X -j NOWHERE\nCOMMIT\n"
	for stderr, want := range map[string]string{
		"iptables-restore: line 4 failed\n": "COMMIT",
		"iptables-restore v1.8.9 (nf_tables): Chain 'NOWHERE' does not exist\nError occurred at line: 3\nTry `iptables-restore -h'\n": "-A RAVEL-X -j NOWHERE",
		"iptables-restore v1.8.9 (nf_tables): \nline 3: RULE_APPEND failed (No such file or directory): rule in chain RAVEL-X\n":      "-A RAVEL-X -j NOWHERE",
		"line 0 failed": "", "line 7 failed": "", "line 99999999999999999999 failed": "", "out of order": "",
	} {
		if got := failedLine(stderr, input); got != want {
			t.Errorf("%q: got %q, want %q", stderr, got, want)
		}
	}
}

// Whatever stands in a line, reading it does not panic, quote is the reverse of words, and input that is not refused
// writes to no chain but ours.
func FuzzWords(f *testing.F) {
	for _, seed := range []string{
		"-A RAVEL-X -j RETURN", ":RAVEL-X - [0:0]", `-A INPUT -m comment --comment "a \"b" -j RAVEL-X`, `""`, "[1:2]", `[1:2] -A "RAVEL-X"`,
		"*nat", "-F", "\\", "\"\\", ":", "-I INPUT 1 -j RAVEL-X",
	} {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, line string) {
		split := Words(line)
		if !strings.ContainsAny(line, "\n\r") {
			if again := Words(quote(split)); !slices.Equal(again, split) {
				t.Fatalf("%q: %q, quoted and read again %q", line, split, again)
			}
		}
		_ = target(split)
		_ = failedLine(line, line)
		var s seen
		s.count(line)
		if err := checkOurs(line, ours); err == nil {
			for l := range strings.Lines(line) {
				w := Words(strings.TrimSpace(l))
				if len(w) > 1 && slices.Contains([]string{"-F", "-X", "-P", "-Z", "-N"}, w[0]) && !ours(w[1]) {
					t.Fatalf("let pass: %q", l)
				}
			}
		}
	})
}
