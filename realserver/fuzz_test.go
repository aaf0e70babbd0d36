package realserver

import (
	"strings"
	"testing"

	"github.com/ravel-lb/ravel"
	"github.com/ravel-lb/ravel/internal/iptables"
)

// A name, whatever is in it, stays one argument on one line, and is read back as it was written.
func FuzzComment(f *testing.F) {
	for _, seed := range []string{
		"", "default/web:http", `a" -j ACCEPT`, "a\nCOMMIT\n*nat", "-t", "! x", `\`, `'`, "ünïcode", "\x00", strings.Repeat("long ", 100), " ", "#",
	} {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, name string) {
		x := redirect(ravel.TCP, vip4, 80, 0)
		x.Name = name
		b := build(want(false, x), nil)
		o, _ := b.find(x.Key)
		jump := o.jump
		c := comment(name)
		if len(c) > maxComment || strings.ContainsAny(jump, "\n\r\x00\\'") {
			t.Fatalf("jump %q", jump)
		}
		w := iptables.Words(jump)
		if argument(w, "-j") != o.chain || argument(w, "--dport") != "80" || argument(w, "--comment") != c {
			t.Fatalf("jump %q reads as %q", jump, w)
		}
		if normal(jump) != jump {
			t.Fatalf("%q is not normal: %q", jump, normal(jump))
		}
		if c != "" && (c[0] == '-' || c[0] == '!' || c[0] == ' ' || c[len(c)-1] == ' ') {
			t.Fatalf("comment %q", c)
		}
	})
}

// Whatever the kernel's programs print, reading it does not panic, is the same for what is read and written again, and
// takes in no chain that is not ours.
func FuzzParseSaved(f *testing.F) {
	w := want(false, redirect(ravel.UDP, vip4, 53, 0, 1), redirect(ravel.TCP, vip4, 80, 0))
	f.Add(plan(nil, build(w, nil).rules).text(true))
	f.Add(":RAVEL - [0:0]\n-A RAVEL -d 192.0.2.1/32 -j RAVEL\n[1:2] -A RAVEL -p 4 -m comment --comment \"a \\\" b\" -j X\n:\n-A\n-A RAVEL\n[\n[] \n")
	f.Add("-A RAVEL -d ::/0 -j RAVEL-VIP-AAAAAAAAAAAA\n-A RAVEL-VIP-AAAAAAAAAAAA -p tcp --dport 99999 -j")
	n, _ := newNames("")
	f.Fuzz(func(t *testing.T, input string) {
		ours := func(chain string) bool { return n.ours("nat", chain) }
		lines := strings.Split(input, "\n")
		chains := parseSaved(lines, ours)
		for chain := range chains {
			if !strings.HasPrefix(chain, "RAVEL") {
				t.Fatalf("chain %q", chain)
			}
		}
		for key, pods := range redirectsIn(chains, n) {
			if !key.VIP.IsValid() || len(pods) > len(lines) {
				t.Fatalf("%v goes to %v", key, pods)
			}
		}
		statusOf(lines, n)
	})
}
