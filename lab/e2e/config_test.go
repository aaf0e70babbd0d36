package e2e

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/ravel-lb/ravel/lab/stage"
)

// broken is what an operator may do to the static file, and what ravel says of it.
var broken = []struct {
	name string
	// old is replaced by new in a good document; an empty old replaces all of it.
	old, new string
	place    string // what names the fault
	valid    bool   // the document can be used, although something is wrong in it
}{
	{"a syntax error", "nodes:\n", "nodes: [\n", "document: syntax error", false},
	{"an unknown service", "  config6:\n", "      \"81\": {namespace: shop, service: nobody, portName: http, tcpEnabled: true}\n  config6:\n",
		`cluster.config["198.51.100.20"]["81"]`, true},
	{"a VIP that is no address", "    198.51.100.20:\n", "    198.51.100.020:\n", `cluster.config["198.51.100.020"]: "198.51.100.020" is no IP address`, false},
	{"port 0", `      "80":`, `      "0":`, `cluster.config["198.51.100.20"]["0"]: port 0`, false},
	{"port 70000", `      "80":`, `      "70000":`, `cluster.config["198.51.100.20"]["70000"]: port 70000`, false},
	{"duplicate keys", "\nnodes:\n", "\nnodes: []\nnodes:\n", "nodes: given twice", false},
	{"a duplicate VIP", "  config6:\n", "    198.51.100.20: {}\n  config6:\n", `cluster.config["198.51.100.20"]: given twice`, false},
	{"an empty file", "", "", "document: is empty", false},
}

// spoil returns a good document with one thing wrong in it.
func spoil(t *testing.T, good, old, new string) []byte {
	t.Helper()
	if old == "" {
		return []byte(new)
	}
	if !strings.Contains(good, old) {
		t.Fatalf("the good document has no %q:\n%s", old, good)
	}
	return []byte(strings.Replace(good, old, new, 1))
}

// Promise P6: whatever becomes of the static file, traffic goes on, and ravel says what is wrong and where.
func TestABadFileBreaksNothing(t *testing.T) {
	s := fleet(t)
	nodes := []string{"d1", "d3", "r1", "r4"}
	good := string(s.Document().YAML())
	load := startSteady(t, s)

	// stale waits until the ravel of each node says so, or says that it is not.
	stale := func(t *testing.T, want string) {
		t.Helper()
		for _, node := range nodes {
			eventually(t, 20*time.Second, func() error {
				got, err := metric(t.Context(), s, node, "ravel_config_stale")
				if err == nil && got != want {
					err = fmt.Errorf("%s: ravel_config_stale is %s, want %s", node, got, want)
				}
				return err
			})
		}
	}
	checks := func(t *testing.T, place string) {
		t.Helper()
		for _, node := range nodes {
			if out := ravelSays(t, s, node, 1, "check"); !strings.Contains(out, place) {
				t.Errorf("%s: ravel check does not name %q:\n%s", node, place, out)
			}
		}
		// Where none runs it checks the file alone.
		if out := ravelSays(t, s, "c1", 1, "check", "--static", s.File()); !strings.Contains(out, place) {
			t.Errorf("ravel check --static does not name %q:\n%s", place, out)
		}
	}
	heals := func(t *testing.T) {
		t.Helper()
		must(t, s.WriteFile([]byte(good)))
		stale(t, "0")
		for _, node := range nodes {
			eventually(t, 20*time.Second, func() error {
				out, err := s.Ravel(t.Context(), node, "check")
				if err != nil {
					return fmt.Errorf("%s: the file is good again, and ravel check: %w\n%s", node, err, out)
				}
				return nil
			})
		}
	}
	stale(t, "0")

	for _, b := range broken {
		t.Run(b.name, func(t *testing.T) {
			must(t, s.WriteFile(spoil(t, good, b.old, b.new)))
			if b.valid {
				eventually(t, 20*time.Second, func() error {
					out, err := s.Ravel(t.Context(), "d1", "check")
					if code, err := exitCode(err); err != nil || code != 1 {
						return fmt.Errorf("ravel check: %d, %w: %s", code, err, out)
					}
					return nil
				})
			}
			stale(t, "1")
			checks(t, b.place)
			load.unbroken(t, "with "+b.name)
			heals(t)
			load.unbroken(t, "after "+b.name)
		})
	}

	t.Run("a file that vanishes", func(t *testing.T) {
		must(t, os.Remove(s.File()))
		stale(t, "1")
		checks(t, s.File())
		load.unbroken(t, "without a file")
		// Processes that never saw a file go on with the last good one, which outlives them.
		for _, node := range []string{"d1", "r1"} {
			must(t, s.Process(node).Kill())
			must(t, s.Start(node))
		}
		stale(t, "1")
		must(t, s.WaitHops(within(t, 20*time.Second), stage.Routers(), vips, 3))
		load.unbroken(t, "without a file, after a restart")
		for node, want := range map[string]string{"d1": stage.VIP4.String() + ":80", "r1": "RAVEL-SVC-"} {
			var out string
			if node == "r1" {
				out = on(t, s, node, "iptables-save", "-t", "nat")
			} else {
				var err error
				out, err = s.Ravel(t.Context(), node, "services")
				must(t, err)
			}
			if !strings.Contains(out, want) {
				t.Errorf("%s: a restart without a file emptied the table:\n%s", node, out)
			}
		}
		heals(t)
		must(t, s.WaitHops(within(t, 20*time.Second), stage.Routers(), vips, 3))
		load.unbroken(t, "with the file again")
	})

	t.Run("a link to a file that is swapped", func(t *testing.T) {
		// As Kubernetes shows a ConfigMap: the content changes by the rename of a link.
		dir := filepath.Join(filepath.Dir(s.File()), "swapped")
		must(t, os.MkdirAll(dir, 0o755))
		t.Cleanup(func() { _ = os.RemoveAll(dir) })
		must(t, os.WriteFile(filepath.Join(dir, "good"), []byte(good), 0o644))
		must(t, os.WriteFile(filepath.Join(dir, "bad"), []byte("cluster: ["), 0o644))
		point := func(to string) {
			t.Helper()
			temporary := filepath.Join(dir, "next")
			must(t, os.Symlink(to, temporary))
			must(t, os.Rename(temporary, filepath.Join(dir, "data")))
		}
		point("good")
		must(t, os.Remove(s.File()))
		must(t, os.Symlink(filepath.Join("swapped", "data"), s.File()))
		stale(t, "0")
		point("bad")
		stale(t, "1")
		load.unbroken(t, "with a link to a bad file")
		point("good")
		stale(t, "0")
		must(t, s.SetDocument(shared.first)) // a plain file in the place of the link
		stale(t, "0")
		load.unbroken(t, "with a plain file again")
	})
}

// Wrong settings are all named at once, and nothing is touched.
func TestBadSettingsTouchNothing(t *testing.T) {
	s := fleet(t)
	common := []string{"--static", s.File(), "--log-level", "loud", "--log-format", "xml", "--iptables", "ebtables",
		"--link", "a-name-that-is-too-long", "--resync", "0s", "--blackhole", "-1s", "--listen", "here"}
	for role, more := range map[string][]string{
		"director": {"--attract", "magnets", "--router-id", "2001:db8::1", "--bgp-port", "70000", "--stop-wait", "1h", "--linger", "-1s",
			"--drain", "-1s", "--rise", "-1s", "--bgp-listen", "nowhere"},
		"realserver": {"--mark", "3", "--tunnel-mark", "0", "--mtu", "9", "--pod-cidr-masq", "10.0.0.1", "--redirect-linger", "-1s"},
	} {
		// c2 is a host on which no ravel ever ran.
		before := hostState(t, s, "c2", everything)
		args := append(append([]string{role}, common...), more...)
		out := ravelSays(t, s, "c2", 2, args...)
		for _, a := range args {
			if name, isFlag := strings.CutPrefix(a, "--"); isFlag && name != "static" && !strings.Contains(out, name) {
				t.Errorf("ravel %s does not name the fault of --%s:\n%s", role, name, out)
			}
		}
		if after := hostState(t, s, "c2", everything); after != before {
			t.Errorf("ravel %s with bad settings changed the host:\n%s", role, diff(before, after))
		}
	}
	if out := on(t, s, "c2", "ls", "/run"); strings.Contains(out, "ravel") {
		t.Errorf("it left files in /run: %s", out)
	}
}
