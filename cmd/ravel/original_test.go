package main

import (
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/urfave/cli/v2"
)

const migrationFile = "../../docs/migration.md"

// clearOld unsets all variables that the original reads, until the test ends.
func clearOld(t *testing.T) {
	t.Helper()
	for _, v := range oldVariables {
		t.Setenv(v.name, "")
		if err := os.Unsetenv(v.name); err != nil {
			t.Fatal(err)
		}
	}
}

// translated is what becomes of a command line: its words but for the program, the notes and the faults.
func translated(args ...string) (ours, notes, fault string) {
	words, said, err := fromOriginal(append([]string{"/bin/ravel"}, args...), newApp(io.Discard, io.Discard).Commands)
	if err != nil {
		return "", strings.Join(said, "\n"), err.Error()
	}
	return strings.Join(words[1:], " "), strings.Join(said, "\n"), ""
}

// A line for each flag, as units have them, and what becomes of it on either role.
func TestEachFlagOfTheOriginal(t *testing.T) {
	clearOld(t)
	config := write(t, "ravel.yaml", "log-level: warn\n")
	for name, test := range map[string]struct{ value, director, realserver string }{
		"auto-configure-port":     {"70", "--auto-configure-port=70", "--auto-configure-port=70"},
		"auto-configure-service":  {"a/b:c", "--auto-configure-service=a/b:c", "--auto-configure-service=a/b:c"},
		"bgp-bin":                 {"/bin/gobgp", "", ""},
		"bgp-communities":         {"65000:1,65000:2", `! communities: ["65000:1", "65000:2"]`, ""},
		"calico-bin":              {"/usr/local/bin/calicoctl", "", ""},
		"calico-dir":              {"/etc/calico/ravel", "", ""},
		"calico-version":          {"2", "", ""},
		"cleanup-master":          {"", "", ""},
		"compute-iface":           {"eth0", "", ""},
		"compute-iface-local":     {"lo", "", ""},
		"config":                  {config, "--log-level=warn", "--log-level=warn"},
		"config-key":              {"green", "--config-key=green", "--config-key=green"},
		"config-name":             {"kube2ipvs", "--config-name=kube2ipvs", "--config-name=kube2ipvs"},
		"config-namespace":        {"platform-load-balancer", "--config-namespace=platform-load-balancer", "--config-namespace=platform-load-balancer"},
		"coordinator-port":        {"44444,44445", "", ""},
		"debug":                   {"", "--log-level=debug", "--log-level=debug"},
		"failover-timeout":        {"5", "", ""},
		"forced-reconfigure":      {"", "", ""},
		"gateway":                 {"10.0.0.1", "! peers of the fleet document", ""},
		"iptables-chain":          {"RAVEL2", "--iptables-chain=RAVEL2", "--iptables-chain=RAVEL2"},
		"iptables-masq":           {"", "", "--iptables-masq=true"},
		"ipvs-colocation-mode":    {"iptables", "! a host for each role", "! a host for each role"},
		"ipvs-ignore-node-cordon": {"", "--ipvs-ignore-node-cordon=true", ""},
		"ipvs-sysctl":             {"drop_entry=3", "! net.ipv4.vs.drop_entry=3", ""},
		"ipvs-weight-override":    {"", "--ipvs-weight-override=true", ""},
		"kubeconfig":              {"/etc/k", "--kubeconfig=/etc/k", "--kubeconfig=/etc/k"},
		"lo-announce":             {"2", "", ""},
		"lo-ignore":               {"1", "", ""},
		"nodename":                {"10.0.0.11", "--node=10.0.0.11", "--node=10.0.0.11"},
		"pod-cidr-masq":           {"10.42.0.0/16", "", "--pod-cidr-masq=10.42.0.0/16"},
		"primary-announce":        {"2", "", ""},
		"primary-ignore":          {"1", "", ""},
		"primary-ip":              {"10.0.0.11", "", ""},
		"stats-enabled":           {"", "", ""},
		"stats-interface":         {"eth0", "", ""},
		"stats-interval":          {"1s", "", ""},
		"stats-listen":            {"127.0.0.1", "--listen=127.0.0.1:10234", "--listen=127.0.0.1:10234"},
		"stats-port":              {"9100", "--listen=0.0.0.0:9100", "--listen=0.0.0.0:9100"},
	} {
		f := findOld(name)
		if f == nil {
			t.Errorf("%s is not in the table", name)
			continue
		}
		forms := [][]string{{"--" + name + "=" + test.value}, {"--" + name, test.value}}
		if f.kind == oldSwitch {
			forms = [][]string{{"--" + name}, {"--" + name + "=true"}, {"--" + name + "=1"}}
		}
		for _, form := range forms {
			for role, want := range map[string]string{directorRole: test.director, realserverRole: test.realserver} {
				// --coordinator-port is the original's alone, so that the whole line is.
				ours, _, fault := translated(append(slices.Concat(form, []string{"--coordinator-port=1"}), role)...)
				if needle, refused := strings.CutPrefix(want, "! "); refused {
					if !strings.Contains(fault, needle) {
						t.Errorf("%s %v: %q, faults %q, want %q", role, form, ours, fault, needle)
					}
					continue
				}
				rest := strings.TrimPrefix(ours, role)
				if name != "iptables-masq" {
					rest = strings.Replace(rest, " --iptables-masq=true", "", 1)
				}
				if name == "config-name" {
					rest = strings.Replace(rest, " --config-namespace=platform-load-balancer", "", 1)
				}
				if got := strings.TrimSpace(rest); fault != "" || got != want {
					t.Errorf("%s %v: %q, faults %q, want %q", role, form, got, fault, want)
				}
			}
		}
	}
	if !slices.IsSortedFunc(oldFlags, func(a, b oldFlag) int { return strings.Compare(a.name, b.name) }) || len(oldFlags) != 38 {
		t.Errorf("%d flags, or not in order", len(oldFlags))
	}
}

// A flag that is taken under a name must be there under it, of a role that it is for.
func TestWhatTheTableNamesIsThere(t *testing.T) {
	have := map[string]bool{}
	for _, f := range others() {
		for _, name := range f.Names() {
			have[name] = true
		}
	}
	have["config"], have["iptables"] = true, true
	for _, f := range oldFlags {
		name, ours := strings.CutPrefix(f.to, "--")
		name, _, _ = strings.Cut(name, "=")
		if ours && !have[name] {
			t.Errorf("--%s becomes --%s, which is not there", f.name, name)
		}
		if (f.fate == kept || f.fate == renamed) != ours || f.fate == idle && f.to != "" || f.fate == refused && f.to == "" || f.fate != kept && f.why == "" && f.name != "debug" {
			t.Errorf("--%s: %+v", f.name, f)
		}
	}
}

func TestCommandLinesOfTheOriginal(t *testing.T) {
	for name, test := range map[string]struct {
		args  []string
		env   map[string]string
		want  string // the words; or after "! ", part of the fault
		notes []string
	}{
		"ours is left alone": {args: []string{"director", "--static", "x", "--iptables-chain", "RAVEL", "--node=a", "--nodename", "b"},
			want: "director --static x --iptables-chain RAVEL --node=a --nodename b"},
		"other commands are left alone": {args: []string{"check", "--debug", "--gateway", "x"}, want: "check --debug --gateway x"},
		"a unit of a node": {
			args: []string{"realserver", "--compute-iface", "eth0", "--nodename=10.0.0.11", "--lo-ignore", "1", "--static", "/etc/s.yaml", "--debug"},
			want: "realserver --log-level=debug --node=10.0.0.11 --iptables-masq=true --static /etc/s.yaml", notes: []string{
				"--iptables-masq=true is added", "without effect here: --compute-iface, --lo-ignore"}},
		"before the subcommand": {args: []string{"--compute-iface", "director", "--debug", "realserver", "--iptables-masq=false"},
			want: "realserver --log-level=debug --iptables-masq=false", notes: []string{"without effect here: --compute-iface"}},
		"a switch in two words": {args: []string{"realserver", "--iptables-masq", "false", "--static", "x"},
			want: "realserver --iptables-masq=true --static x", notes: []string{"--iptables-masq false: the original read this as true"}},
		"a switch in two words, on": {args: []string{"realserver", "--iptables-masq", "true"}, want: "realserver --iptables-masq=true"},
		"a switch off":              {args: []string{"director", "--debug=false", "--ipvs-weight-override=0"}, want: "director --ipvs-weight-override=false"},
		"the last one counts":       {args: []string{"director", "--compute-iface=a", "--stats-port", "1", "--stats-port=2"}, want: "director --listen=0.0.0.0:2"},
		"lists": {args: []string{"director", "--bgp-communities", "1:1,2:2", "--bgp-communities=3:3", "--ipvs-sysctl", "a=1", "--ipvs-sysctl", "b=2"},
			want: `! communities: ["1:1", "2:2", "3:3"]`},
		"more lists":             {args: []string{"director", "--ipvs-sysctl", "a=1", "--ipvs-sysctl", "b=2"}, want: "! net.ipv4.vs.a=1, net.ipv4.vs.b=2"},
		"values that say naught": {args: []string{"director", "--bgp-communities=", "--gateway", "", "--ipvs-colocation-mode=disabled"}, want: "director"},
		"both addresses":         {args: []string{"director", "--stats-listen", "::1", "--stats-port", "9", "--debug"}, want: "director --log-level=debug --listen=[::1]:9"},
		"ours for the address": {args: []string{"director", "--stats-port", "9", "--listen", "[::1]:9"}, want: "director --listen [::1]:9",
			notes: []string{"--listen counts"}},
		"no value":          {args: []string{"director", "--gateway"}, want: "! --gateway: has no value"},
		"no switch":         {args: []string{"director", "--debug=loud"}, want: "! want true or false"},
		"another chain":     {args: []string{"realserver", "--debug", "--iptables-chain", "LB"}, want: "! ravel cleanup --original --iptables-chain LB"},
		"all faults":        {args: []string{"director", "--gateway", "x", "--bgp-communities", "1:1"}, want: "! --bgp-communities: write communities: [\"1:1\"]"},
		"another namespace": {args: []string{"director", "--debug", "--config-namespace", "lb", "--config-name", "x"}, want: "director --config-name=x --config-namespace=lb --log-level=debug", notes: []string{"--config-namespace=lb counts here"}},
		"behind --":         {args: []string{"director", "--debug", "--", "--gateway", "x"}, want: "director --log-level=debug -- --gateway x"},
		"the image's environment": {args: []string{"director", "--static=x"}, env: map[string]string{
			"RAVEL_EARLYLATE": "Y", "RAVEL_LOGRULE": "N", "SKIP_MASTER_NODE": "N", "IPTABLES_CLI": "iptables-nft", "RAVEL_DELAY": "500", "HOSTNAME": "d1"},
			want: "director --node=d1 --iptables=nft --static=x", notes: []string{"without effect here: RAVEL_DELAY, RAVEL_EARLYLATE, RAVEL_LOGRULE, SKIP_MASTER_NODE"}},
		"a program with its path": {args: []string{"director", "--debug"}, env: map[string]string{"IPTABLES_CLI": "/usr/sbin/iptables-legacy"},
			want: "director --log-level=debug --iptables=legacy"},
		"the plain program":   {args: []string{"director", "--debug"}, env: map[string]string{"IPTABLES_CLI": "iptables"}, want: "director --log-level=debug"},
		"another program":     {args: []string{"director", "--debug"}, env: map[string]string{"IPTABLES_CLI": "xtables"}, want: "! --iptables to nft or legacy"},
		"ours for the name":   {args: []string{"director", "--debug", "--node", "d2"}, env: map[string]string{"HOSTNAME": "d1"}, want: "director --log-level=debug --node d2"},
		"theirs for the name": {args: []string{"director", "--debug", "--nodename", "d2"}, env: map[string]string{"HOSTNAME": "d1"}, want: "director --log-level=debug --node=d2"},
		"our own host name":   {args: []string{"director", "--static", "x"}, env: map[string]string{"HOSTNAME": "d1"}, want: "director --static x"},
	} {
		t.Run(name, func(t *testing.T) {
			clearOld(t)
			for k, v := range test.env {
				t.Setenv(k, v)
			}
			ours, notes, fault := translated(test.args...)
			if needle, refused := strings.CutPrefix(test.want, "! "); refused {
				if !strings.Contains(fault, needle) {
					t.Errorf("%q, faults %q; want %q", ours, fault, needle)
				}
				return
			}
			if ours != test.want || fault != "" {
				t.Errorf("%q\nwant %q\nfaults %q", ours, test.want, fault)
			}
			for _, n := range test.notes {
				if !strings.Contains(notes, n) {
					t.Errorf("%q does not say %q", notes, n)
				}
			}
		})
	}
}

// The original's file is a mapping by the names of its flags, in any case; keys of ours may stand beside them.
func TestFilesOfTheOriginal(t *testing.T) {
	clearOld(t)
	for name, test := range map[string]struct{ file, args, want string }{
		"the original's": {"compute-iface: eth0\nDebug: true\nstats-port: 10234\nnodename: 10.0.0.1\niptables-masq: \"false\"\n", "",
			"realserver --log-level=debug --iptables-masq=false --node=10.0.0.1 --listen=0.0.0.0:10234"},
		"the command line wins": {"compute-iface: eth0\nnodename: a\n", "--nodename b --iptables-masq", "realserver --iptables-masq=true --node=b"},
		"a mixed one": {"compute-iface: eth0\nstatic: /etc/s\ndrain: 3s\nlinger: 9s\nseeds: [a, b]\niptables-masq: false\n", "",
			"realserver --seeds=a --seeds=b --static=/etc/s --iptables-masq=false"},
		"a list and a number":           {"coordinator-port: [1, 2]\nbgp-communities: [\"1:1\"]\nstats-port: 1\niptables-masq: false\n", "", "realserver --iptables-masq=false --listen=0.0.0.0:1"},
		"neither's":                     {"compute-iface: eth0\ncompute-face: eth0\n", "", "! compute-face: is no setting"},
		"refused":                       {"ipvs-colocation-mode: ipvs\n", "", "! --ipvs-colocation-mode"},
		"ours":                          {"log-level: debug\n", "", "realserver --config FILE"},
		"no YAML":                       {"a: [", "", "realserver --config FILE"},
		"ours by keys, theirs by flags": {"log-level: debug\n", "--compute-iface x --iptables-masq=0", "realserver --log-level=debug --iptables-masq=false"},
	} {
		t.Run(name, func(t *testing.T) {
			path := write(t, "ravel.yaml", test.file)
			args := append([]string{"realserver", "--config", path}, strings.Fields(test.args)...)
			ours, _, fault := translated(args...)
			if needle, refused := strings.CutPrefix(test.want, "! "); refused {
				if !strings.Contains(fault, needle) {
					t.Errorf("%q, faults %q; want %q", ours, fault, needle)
				}
				return
			}
			if want := strings.Replace(test.want, "FILE", path, 1); ours != want || fault != "" {
				t.Errorf("%q\nwant %q\nfaults %q", ours, want, fault)
			}
			if strings.Contains(test.want, "FILE") {
				return
			}
			// By the variable it is the same, and the file is not read as ours again.
			t.Setenv("RAVEL_CONFIG", path)
			ours, _, fault = translated(append([]string{"realserver"}, strings.Fields(test.args)...)...)
			if strings.HasPrefix(test.want, "realserver --") && !strings.HasPrefix(ours, "realserver --config= ") {
				t.Errorf("by the variable: %q, faults %q", ours, fault)
			}
		})
	}
}

// What the original's own words say is to be run instead, with the flags of whoever runs it.
func TestOldNames(t *testing.T) {
	clearOld(t)
	for _, test := range []struct{ args, want string }{
		{"/bin/ravel bgp --bgp-bin /bin/gobgp --config-key green --debug", "  ravel director --config-key=green --log-level=debug\n"},
		{"/bin/ravel bgp --bgp-communities 65000:100 --debug", `write communities: ["65000:100"] into the fleet document`},
		{"/bin/ravel bgp", "  ravel director"},
		{"/bin/kube2ipvs bgp --debug", "  ravel director --log-level=debug"},
		{"kube2ipvs --debug realserver --iptables-masq=false", "  ravel realserver --log-level=debug --iptables-masq=false"},
		{"kube2ipvs realserver --kubeconfig '/etc/my", `  ravel realserver '--kubeconfig='\''/etc/my' --iptables-masq=true`},
		{"kube2ipvs version", "ravel --help"},
		{"kube2ipvs", "ravel --help"},
	} {
		var stdout, stderr strings.Builder
		if code := run(strings.Fields(test.args), &stdout, &stderr); code != exitUsage || stdout.Len() > 0 || !strings.Contains(stderr.String(), test.want) {
			t.Errorf("%s: exit code %d, want %d and %q:\n%s%s", test.args, code, exitUsage, test.want, stdout.String(), stderr.String())
		}
	}
}

// The settings that a whole command line comes to are right for their command.
func TestAnOldCommandLineStarts(t *testing.T) {
	clearOld(t)
	dir := t.TempDir()
	for _, role := range []string{directorRole, realserverRole} {
		var got values
		app := newApp(io.Discard, io.Discard)
		for _, c := range app.Commands {
			if c.Name == role {
				c.Action = func(c *cli.Context) (err error) {
					got, err = readSettings(c, role == directorRole)
					return err
				}
			}
		}
		args, _, err := fromOriginal([]string{"ravel", role, "--compute-iface", "eth0", "--nodename", "n1", "--stats-port", "10234",
			"--ipvs-weight-override", "--ipvs-ignore-node-cordon", "--pod-cidr-masq=10.42.0.0/16", "--debug", "--gossip-insecure", "--static=" + filepath.Join(dir, "s")}, app.Commands)
		if err == nil {
			err = app.Run(args)
		}
		if err != nil {
			t.Fatalf("%s: %v", role, err)
		}
		director := role == directorRole
		if got.node != "n1" || got.listen != "0.0.0.0:10234" || got.original.equalWeights != director || got.original.ignoreCordon != director ||
			director != (got.original.masquerade == nil) || director != (len(got.noMasquerade) == 0) {
			t.Errorf("%s: %+v", role, got)
		}
	}
}

// docs/migration.md has the tables of the code. RAVEL_TEST_UPDATE=1 writes them anew.
func TestMigrationTables(t *testing.T) {
	b, err := os.ReadFile(migrationFile)
	if err != nil {
		t.Fatal(err)
	}
	want := string(b)
	flags, variables := oldTables()
	for name, table := range map[string]string{"flags": flags, "variables": variables} {
		begin, end := "<!-- "+name+" -->\n", "<!-- end of "+name+" -->"
		from, to := strings.Index(want, begin), strings.Index(want, end)
		if from < 0 || to < from {
			t.Fatalf("%s has no place for the table of %s", migrationFile, name)
		}
		want = want[:from+len(begin)] + table + want[to:]
	}
	if os.Getenv("RAVEL_TEST_UPDATE") != "" {
		if err := os.WriteFile(migrationFile, []byte(want), 0o644); err != nil {
			t.Fatal(err)
		}
		return
	}
	if diff := cmp.Diff(want, string(b)); diff != "" {
		t.Fatalf("%s (-want +got):\n%s", migrationFile, diff)
	}
}

// Whatever the words are, reading them does not panic, and what is ours alone comes back as it is.
func FuzzOldCommandLine(f *testing.F) {
	for _, seed := range []string{
		"director\x00--compute-iface\x00eth0", "bgp\x00--bgp-communities\x00\"a,b", "--debug\x00false\x00realserver\x00--iptables-masq\x00false",
		"director\x00--\x00--gateway", "realserver\x00-debug=", "director\x00--stats-listen=[\x00--stats-port=:", "--config\x00/dev/null\x00director",
	} {
		f.Add(seed)
	}
	commands := newApp(io.Discard, io.Discard).Commands
	f.Fuzz(func(t *testing.T, line string) {
		args := append([]string{"ravel"}, strings.Split(line, "\x00")...)
		before := slices.Clone(args)
		ours, _, err := fromOriginal(args, commands)
		if !slices.Equal(args, before) {
			t.Fatalf("the words were changed: %q, before %q", args, before)
		}
		if err != nil {
			return
		}
		if again, _, err := fromOriginal(ours, commands); err == nil && len(ours) > 1 && ours[1] == before[1] && !slices.Equal(again, ours) {
			for _, w := range ours {
				if strings.Contains(w, "iptables-masq") || strings.Contains(w, "config") {
					return // kept names that are not there yet
				}
			}
			t.Fatalf("%q once more is %q", ours, again)
		}
	})
}
