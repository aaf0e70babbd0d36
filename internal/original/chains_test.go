package original

import (
	"context"
	"fmt"
	"log/slog"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/ravel-lb/ravel"
	"github.com/ravel-lb/ravel/internal/iptables"
	"github.com/ravel-lb/ravel/internal/nettest"
	"github.com/ravel-lb/ravel/internal/sysctl"
	"github.com/ravel-lb/ravel/realserver"
)

func TestMain(m *testing.M) { nettest.Main(m) }

// left is what the original leaves in nat under a base: one service by TCP and UDP with three local pods. The comments,
// the matches and the order are those of a real run.
func left(base string, family iptables.Family) string {
	vip, pods := "10.9.9.1/32", []string{"192.168.5.1", "192.168.5.2", "192.168.5.3"}
	if family == iptables.V6 {
		vip, pods = "2001:db8::9/128", []string{"2001:db8:5::1", "2001:db8:5::2", "2001:db8:5::3"}
	}
	sep := []string{"4ZIGKUTDV76XFVIU", "AAAAAAAAAAAAAAA2", "BBBBBBBBBBBBBBB3"}
	var b strings.Builder
	add := func(format string, args ...any) {
		b.WriteString(strings.ReplaceAll(fmt.Sprintf(format, args...), "CH", base) + "\n")
	}
	add("*nat")
	for _, chain := range []string{"", "-MASQ", "-SVC-CDGGSHYLG3RE2FKL", "-SVC-PVIUHHP45RD4PRVF", "-SEP-" + sep[0], "-SEP-" + sep[1], "-SEP-" + sep[2]} {
		add(":CH%s - [0:0]", chain)
	}
	add("-A PREROUTING -j CH")
	const comment = `-m comment --comment "default/web:http"`
	for proto, service := range map[string]string{"tcp": "CDGGSHYLG3RE2FKL", "udp": "PVIUHHP45RD4PRVF"} {
		add("-A CH -d %s -p %s -m %[2]s --dport 80 %s -j CH-MASQ", vip, proto, comment)
		add("-A CH -d %s -p %s -m %[2]s --dport 80 %s -j CH-SVC-%s", vip, proto, comment, service)
		add("-A CH-SVC-%s %s -m statistic --mode random --probability 0.33333333333 -j CH-SEP-%s", service, comment, sep[0])
		add("-A CH-SVC-%s %s -m statistic --mode random --probability 0.50000000000 -j CH-SEP-%s", service, comment, sep[1])
		add("-A CH-SVC-%s %s -j CH-SEP-%s", service, comment, sep[2])
	}
	add("-A CH-MASQ -j MARK --set-xmark 0x4000/0x4000")
	for i, pod := range pods {
		to, host := pod+":8080", pod+"/32"
		if family == iptables.V6 {
			to, host = "["+pod+"]:8080", pod+"/128"
		}
		add("-A CH-SEP-%s -d %s %s -j CH-MASQ", sep[i], host, comment)
		add("-A CH-SEP-%s -p tcp %s -m tcp -j DNAT --to-destination %s", sep[i], comment, to)
	}
	add("COMMIT")
	return b.String()
}

// others are chains and rules that are not the original's, some of which look much like it.
const others = `*nat
:KUBE-SERVICES - [0:0]
:KUBE-SVC-CDGGSHYLG3RE2FKL - [0:0]
:RAVEL-SVC-CDGGSHYLG3RE2F - [0:0]
:RAVEL-SEP-cdggshylg3re2fkl - [0:0]
:RAVEL-SVC-CCCCCCCCCCCCCCCC - [0:0]
:RAVEL2-SVC-CDGGSHYLG3RE2FKL - [0:0]
:RAVELLER - [0:0]
-A PREROUTING -j KUBE-SERVICES
-A PREROUTING -m comment --comment "-j RAVEL" -j RAVELLER
-A OUTPUT -j KUBE-SERVICES
-A KUBE-SERVICES -p tcp -j KUBE-SVC-CDGGSHYLG3RE2FKL
-A RAVEL-SVC-CCCCCCCCCCCCCCCC -p tcp -j RETURN
COMMIT
`

// eachTables runs a test for both families of both variants, each in a network namespace of its own.
func eachTables(t *testing.T, fn func(t *testing.T, tables *iptables.Tables)) {
	features := map[iptables.Variant]nettest.Feature{iptables.NFT: nettest.NftNAT, iptables.Legacy: nettest.LegacyNAT}
	for variant, feature := range features {
		for _, family := range []iptables.Family{iptables.V4, iptables.V6} {
			t.Run(string(variant)+"/"+family.String(), func(t *testing.T) {
				nettest.Need(t, feature)
				nettest.InNetns(t, func() {
					tables, err := iptables.Open(variant, family)
					if err != nil {
						t.Fatal(err)
					}
					fn(t, tables)
				})
			})
		}
	}
}

// restore has another program's iptables-restore write.
func restore(t *testing.T, tables *iptables.Tables, input string) {
	t.Helper()
	command := map[iptables.Family]string{iptables.V4: "iptables", iptables.V6: "ip6tables"}[tables.Family()]
	nettest.Shell(t, fmt.Sprintf("%s-%s-restore --noflush <<'END'\n%sEND", command, tables.Variant(), input))
}

// saved is the table without comments and counters, sorted: the kernel's variants print chains in different orders.
func saved(t *testing.T, tables *iptables.Tables) []string {
	t.Helper()
	lines, err := tables.Save(t.Context(), "nat")
	if err != nil {
		t.Fatal(err)
	}
	lines = slices.DeleteFunc(lines, func(l string) bool { return strings.HasPrefix(l, "#") })
	for i, l := range lines {
		lines[i], _, _ = strings.Cut(l, " [")
	}
	slices.Sort(lines)
	return lines
}

func remove(t *testing.T, tables *iptables.Tables, base string, keep, dryRun bool) []string {
	t.Helper()
	done, err := RemoveChains(t.Context(), tables, base, keep, dryRun)
	if err != nil {
		t.Fatal(err)
	}
	return done
}

func TestChainsGoAndOthersStay(t *testing.T) {
	eachTables(t, func(t *testing.T, tables *iptables.Tables) {
		for _, base := range []string{"RAVEL", "LB-1"} {
			// Tables come into being when they are first written to.
			restore(t, tables, others)
			before := saved(t, tables)
			restore(t, tables, left(base, tables.Family()))
			with := saved(t, tables)
			would := remove(t, tables, base, false, true)
			if diff := cmp.Diff(with, saved(t, tables)); diff != "" {
				t.Fatalf("a dry run changed (-before +after):\n%s", diff)
			}
			did := remove(t, tables, base, false, false)
			if diff := cmp.Diff(before, saved(t, tables)); diff != "" {
				t.Fatalf("%s: what is not the original's (-before +after):\n%s", base, diff)
			}
			if !slices.Equal(would, did) || len(did) != 8 || !strings.HasSuffix(did[0], "-t nat -D PREROUTING -j "+base) {
				t.Errorf("would:\n%s\ndid:\n%s", strings.Join(would, "\n"), strings.Join(did, "\n"))
			}
			if again := remove(t, tables, base, false, false); len(again) > 0 {
				t.Errorf("again: %q", again)
			}
			// The same others once more would double their rules.
			nettest.Shell(t, flushed(tables))
		}
	})
}

func flushed(tables *iptables.Tables) string {
	command := map[iptables.Family]string{iptables.V4: "iptables", iptables.V6: "ip6tables"}[tables.Family()] + "-" + string(tables.Variant())
	return command + " -t nat -F; " + command + " -t nat -X"
}

// A program's rule that leads into the original's chains keeps those it leads to, empty, and is named.
func TestChainsInUse(t *testing.T) {
	eachTables(t, func(t *testing.T, tables *iptables.Tables) {
		restore(t, tables, left("RAVEL", tables.Family()))
		restore(t, tables, "*nat\n-A OUTPUT -p tcp -j RAVEL\nCOMMIT\n")
		if done, err := RemoveChains(t.Context(), tables, "RAVEL", false, true); err != nil || !strings.Contains(strings.Join(done, "\n"), "-F RAVEL # stays, empty: in use by -A OUTPUT -p tcp -j RAVEL") {
			t.Errorf("a dry run: %q, %v", done, err)
		}
		_, err := RemoveChains(t.Context(), tables, "RAVEL", false, false)
		if err == nil || !strings.Contains(err.Error(), "-A OUTPUT -p tcp -j RAVEL") {
			t.Errorf("the rule is not named: %v", err)
		}
		var ours []string
		for _, l := range saved(t, tables) {
			if strings.Contains(l, "RAVEL") {
				ours = append(ours, l)
			}
		}
		if diff := cmp.Diff([]string{"-A OUTPUT -p tcp -j RAVEL", ":RAVEL -"}, ours); diff != "" {
			t.Errorf("left (-want +got):\n%s", diff)
		}
	})
}

// A realserver takes the place of the original's rules in one transaction, whether it masquerades or not; what it does not
// use goes afterwards, while it runs, and what it uses stays.
func TestARealserverTakesOver(t *testing.T) {
	eachTables(t, func(t *testing.T, tables *iptables.Tables) {
		for _, masquerade := range []bool{false, true} {
			restore(t, tables, left("RAVEL", tables.Family()))
			o := realserver.Options{Log: slog.New(slog.DiscardHandler), Sysctl: sysctl.New("/proc/sys", "")}
			vip, pod := netip.MustParseAddr("10.9.9.1"), netip.MustParseAddrPort("192.168.5.1:8080")
			if o.V4 = tables; tables.Family() == iptables.V6 {
				o.V4, o.V6 = nil, tables
				vip, pod = netip.MustParseAddr("2001:db8::9"), netip.MustParseAddrPort("[2001:db8:5::1]:8080")
			}
			apply := func(keep bool) []string {
				t.Helper()
				rs, err := realserver.New(o)
				if err != nil {
					t.Fatal(err)
				}
				key := ravel.ServiceKey{VIP: vip, Proto: ravel.TCP, Port: 80}
				held, err := rs.Apply(t.Context(), []ravel.Redirect{{Key: key, Name: "default/web:http", Pods: []netip.AddrPort{pod}, Masquerade: masquerade}}, nil)
				if err != nil || !slices.Equal(held, []ravel.ServiceKey{key}) {
					t.Fatalf("taking over: %v, %v", held, err)
				}
				did := remove(t, tables, "RAVEL", keep, false)
				lines := saved(t, tables)
				// What is left works as if the original had never been there. A chain that it does not need it could not remove
				// while the original's led there: it is empty, and goes now.
				if !masquerade {
					lines = slices.DeleteFunc(lines, func(l string) bool { return l == ":RAVEL-MASQ -" })
				}
				rs.Resync()
				if _, err := rs.Apply(t.Context(), []ravel.Redirect{{Key: key, Name: "default/web:http", Pods: []netip.AddrPort{pod}, Masquerade: masquerade}}, nil); err != nil {
					t.Fatal(err)
				}
				if diff := cmp.Diff(lines, saved(t, tables)); diff != "" {
					t.Errorf("a later look mends (-before +after):\n%s", diff)
				}
				return did
			}
			did := apply(true)
			for _, line := range saved(t, tables) {
				if strings.Contains(line, "-SEP-") || strings.Contains(line, "CDGGSHYLG3RE2FKL") {
					t.Errorf("left: %s", line)
				}
			}
			if len(did) == 0 {
				t.Error("nothing of the original's was found")
			}
			for _, line := range did {
				if strings.HasSuffix(line, " RAVEL") || strings.HasSuffix(line, " RAVEL-MASQ") {
					t.Errorf("masquerade %v: %s took what is in use", masquerade, line)
				}
			}
			// Nobody says that Ravel runs, and it is seen all the same.
			if again := apply(false); len(again) > 0 {
				t.Errorf("again: %q", again)
			}
			rs, err := realserver.New(o)
			if err != nil {
				t.Fatal(err)
			}
			if _, err := rs.Cleanup(t.Context(), false); err != nil {
				t.Fatal(err)
			}
		}
	})
}

func TestCheckChain(t *testing.T) {
	for name, good := range map[string]bool{
		"RAVEL": true, "RDEI-LB": true, "lb": true, "": false, "KUBE": false, "TOOLONG8": false, "A B": false, "PREROUTING": false, "DOCKER": false, "-A;": false,
	} {
		if err := CheckChain(name); (err == nil) != good {
			t.Errorf("%q: %v", name, err)
		}
	}
	if _, err := RemoveChains(context.Background(), nil, "KUBE", false, false); err == nil {
		t.Error("KUBE was looked for")
	}
}

// Whatever a table holds, what is to be done touches nothing but chains of the original's names, and no panic comes of it.
func FuzzLook(f *testing.F) {
	f.Add(left("RAVEL", iptables.V4), false)
	f.Add(others, true)
	f.Add(":\n:RAVEL\n-A\n-A RAVEL\n-A RAVEL -j\n-A \"\" -j RAVEL\n", false)
	c := newChains("RAVEL")
	f.Fuzz(func(t *testing.T, text string, keep bool) {
		r := c.look(strings.Split(text, "\n"), keep)
		for _, chain := range r.chains {
			if chain != c.base && chain != c.masq && !c.service.MatchString(chain) && !c.pod.MatchString(chain) {
				t.Fatalf("%q is not the original's", chain)
			}
			if keep && (chain == c.base || chain == c.masq) {
				t.Fatalf("%s was to stay", chain)
			}
		}
		_, _ = r.said(iptables.V4, false)
		_ = r.input()
	})
}
