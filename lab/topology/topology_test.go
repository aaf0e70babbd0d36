package topology

import (
	"bytes"
	"context"
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/santhosh-tekuri/jsonschema/v6"
	"go.yaml.in/yaml/v3"
)

const file = "../ravel.clab.yml"

func TestTheLabsFile(t *testing.T) {
	topo, err := Load(file)
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, n := range topo.Nodes {
		names = append(names, n.Name)
		for _, b := range n.Binds {
			if _, err := os.Stat(b.Source); err != nil || !filepath.IsAbs(b.Source) {
				t.Errorf("%s binds %s: %v", n.Name, b.Source, err)
			}
		}
		if len(n.Exec) == 0 {
			t.Errorf("%s runs nothing", n.Name)
		}
	}
	want := "spine tor1 tor2 sw d1 d2 d3 r1 r2 r3 r4 k1 edge c1 c2"
	if got := strings.Join(names, " "); got != want {
		t.Errorf("nodes: got %s, want %s", got, want)
	}
	used := map[string]bool{}
	for _, l := range topo.Links {
		used[l[0].Node], used[l[1].Node] = true, true
	}
	if len(used) != len(topo.Nodes) {
		t.Errorf("%d nodes have links, want %d", len(used), len(topo.Nodes))
	}
}

// The file must be valid for containerlab too, by containerlab's own schema. The schema comes with its Go module.
func TestTheLabsFileIsContainerlabs(t *testing.T) {
	var module struct{ Dir, Error string }
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	defer cancel()
	download := exec.CommandContext(ctx, "go", "mod", "download", "-json", "github.com/srl-labs/containerlab@v0.60.0")
	download.Dir = t.TempDir() // outside of this module, which does not depend on containerlab
	download.Env = append(os.Environ(), "GOFLAGS=-mod=mod")
	if err := os.WriteFile(filepath.Join(download.Dir, "go.mod"), []byte("module schema\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	out, err := download.Output()
	if err != nil || json.Unmarshal(out, &module) != nil || module.Dir == "" {
		t.Fatalf("%s: %v: %s", download, err, out)
	}
	schema, err := jsonschema.NewCompiler().Compile(filepath.Join(module.Dir, "schemas", "clab.schema.json"))
	if err != nil {
		t.Fatal(err)
	}
	validate := func(text string) error {
		var value any
		if err := yaml.Unmarshal([]byte(text), &value); err != nil {
			t.Fatal(err)
		}
		b, err := json.Marshal(value)
		if err != nil {
			t.Fatal(err)
		}
		instance, err := jsonschema.UnmarshalJSON(bytes.NewReader(b))
		if err != nil {
			t.Fatal(err)
		}
		return schema.Validate(instance)
	}
	text, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	if err := validate(string(text)); err != nil {
		t.Errorf("%s: %v", file, err)
	}
	// And the schema does look.
	if err := validate(strings.Replace(string(text), "kind: linux", "kind: linnux", 1)); err == nil {
		t.Error("the schema takes a kind that there is not")
	}
}

const small = `name: small
topology:
  defaults: {kind: linux, image: x}
  nodes:
    a:
      network-mode: none
      binds: ["frr/a:/etc/frr:ro", "/x:/y"]
      exec: ["ip link set eth1 up", "sh -c 'echo \"a b\"  c'"]
    b: {network-mode: none, image: y}
  links:
    - endpoints: ["a:eth1", "b:eth1"]
`

func TestParse(t *testing.T) {
	got, err := Parse([]byte(small))
	if err != nil {
		t.Fatal(err)
	}
	want := &Topology{
		Name: "small",
		Nodes: []Node{
			{
				Name: "a", Image: "x",
				Binds: []Bind{{"frr/a", "/etc/frr", true}, {"/x", "/y", false}},
				Exec:  [][]string{{"ip", "link", "set", "eth1", "up"}, {"sh", "-c", `echo "a b"  c`}},
			},
			{Name: "b", Image: "y"},
		},
		Links: []Link{{{"a", "eth1"}, {"b", "eth1"}}},
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("(-want +got)\n%s", diff)
	}
}

func TestWhatTheRunnerDoesNotRealiseIsAnError(t *testing.T) {
	for _, c := range []struct{ name, old, new, want string }{
		{"unknown key of a node", "image: y", "image: y, ports: [x]", "topology.nodes.b.ports: the lab's runner does not realise this key"},
		{"unknown key of a default", "image: x", "image: x, env: {}", "topology.defaults.env: the lab's runner does not realise this key"},
		{"unknown key of the topology", "  defaults:", "  kinds: {}\n  defaults:", "topology.kinds: the lab's runner does not realise this key"},
		{"unknown key of a link", "    - endpoints", "    - mtu: 9\n      endpoints", "topology.links[0].mtu: the lab's runner does not realise this key"},
		{"unknown key at the top", "name: small", "name: small\nmgmt: {}", "mgmt: the lab's runner does not realise this key"},
		{"a key called *", "image: y", "image: y, '*': 1", "topology.nodes.b.*: the lab's runner does not realise this key"},
		{"another kind", "kind: linux", "kind: bridge", `topology.defaults.kind: the lab's runner realises "linux" only, not "bridge"`},
		{"another network", "network-mode: none, image", "network-mode: host, image", `topology.nodes.b.network-mode: the lab's runner realises "none" only, not "host"`},
		{"no network mode", "network-mode: none, image", "image", `topology.nodes.b.network-mode: missing: without "none" containerlab adds a network of its own`},
		{"no image", "image: x", "network-mode: none", "topology.nodes.a.image: missing"},
		{"no kind", "kind: linux, ", "", "topology.nodes.a.kind: missing\ntopology.nodes.b.kind: missing"},
		{"no name", "name: small", "", "name: missing"},
		{"a name that is none", "name: small", "name: [1]", "name: want a text, line 1\nname: missing"},
		{"a number for a text", "image: y", "image: 7", "topology.nodes.b.image: want a text, line 9"},
		{"a text for a list", `["a:eth1", "b:eth1"]`, "a:eth1", "topology.links[0].endpoints: want a list, line 11\ntopology.links[0]: want two endpoints, not 0"},
		{"three ends", `"b:eth1"]`, `"b:eth1", "b:eth2"]`, "topology.links[0]: want two endpoints, not 3"},
		{"an end of nothing", `"b:eth1"]`, `"z:eth1"]`, `topology.links[0]: there is no node "z"`},
		{"an end without interface", `"b:eth1"]`, `"b"]`, "topology.links[0].endpoints[1]: want NODE:INTERFACE, not \"b\""},
		{"an end at eth0", `"b:eth1"]`, `"b:eth0"]`, "topology.links[0].endpoints[1]: eth0 is not for links"},
		{"an end used twice", `"b:eth1"]`, `"a:eth1"]`, "topology.links[0]: a:eth1 is in topology.links[0] already"},
		{"a key twice", "image: y", "image: y, image: z", "topology.nodes.b.image: is there twice"},
		{"a bind of nothing", `"/x:/y"`, `"/x"`, `topology.nodes.a.binds[1]: want SOURCE:TARGET or SOURCE:TARGET:ro, not "/x"`},
		{"a bind to a relative path", `"/x:/y"`, `"/x:y"`, `topology.nodes.a.binds[1]: want SOURCE:TARGET, the target an absolute path, not "/x:y"`},
		{"a bind over the root", `"/x:/y"`, `"/x:/y/.."`, `topology.nodes.a.binds[1]: want SOURCE:TARGET, the target an absolute path, not "/x:/y/.."`},
		{"an open quote", `"ip link set eth1 up"`, `"echo 'x"`, "topology.nodes.a.exec[0]: a quote is not closed"},
		{"no command", `"ip link set eth1 up"`, `"  # x"`, "topology.nodes.a.exec[0]: no command"},
		{"a variable", "ip link set eth1 up", "ip link set ${X} up", "line 8: variables are not realised"},
		{"an anchor", "image: y", "image: &x y", "topology.nodes.b.image: the lab's runner does not realise anchors"},
		{"a node that is no mapping", "{network-mode: none, image: y}", "5", `topology.nodes.b: want a mapping, line 9
topology.nodes.b.network-mode: missing: without "none" containerlab adds a network of its own`},
		{"a name of a node that is none", "    b: {", "    ../b: {", "topology.nodes.../b: is no name of a node\ntopology.links[0]: there is no node \"b\""},
	} {
		t.Run(c.name, func(t *testing.T) {
			text := strings.Replace(small, c.old, c.new, 1)
			if text == small {
				t.Fatal("nothing replaced")
			}
			_, err := Parse([]byte(text))
			if err == nil || err.Error() != c.want {
				t.Errorf("got:\n%v\nwant:\n%s", err, c.want)
			}
		})
	}
	for _, text := range []string{"", "[]", "a: [", "# only a comment", "\x00"} {
		if _, err := Parse([]byte(text)); err == nil {
			t.Errorf("Parse(%q): no error", text)
		}
	}
}

func TestLoadOfNothing(t *testing.T) {
	if _, err := Load(filepath.Join(t.TempDir(), "none.yml")); !os.IsNotExist(err) {
		t.Errorf("got %v", err)
	}
}

// Whatever stands in a file, reading it does not panic, and what is read keeps the package's word.
func FuzzParse(f *testing.F) {
	text, err := os.ReadFile(file)
	if err != nil {
		f.Fatal(err)
	}
	f.Add(text)
	f.Add([]byte(small))
	f.Add([]byte("name: x\ntopology: {nodes: {a: {exec: ['\\']}}}"))
	f.Add([]byte("? [a]\n: b\n"))
	f.Add([]byte("a: &a [*a]"))
	f.Fuzz(func(t *testing.T, b []byte) {
		topo, err := Parse(b)
		if err != nil {
			return
		}
		ends := map[Endpoint]bool{}
		for _, l := range topo.Links {
			for _, e := range l {
				if _, known := topo.Node(e.Node); !known || ends[e] || e.Interface == "" || len(e.Interface) > 15 {
					t.Errorf("endpoint %s", e)
				}
				ends[e] = true
			}
		}
		names := map[string]bool{}
		for _, n := range topo.Nodes {
			if names[n.Name] || n.Name == "" || n.Image == "" {
				t.Errorf("node %q, image %q", n.Name, n.Image)
			}
			names[n.Name] = true
			for _, e := range n.Exec {
				if len(e) == 0 {
					t.Errorf("node %s: an empty command", n.Name)
				}
			}
			for _, b := range n.Binds {
				if b.Source == "" || !filepath.IsAbs(b.Target) || filepath.Clean(b.Target) != b.Target || b.Target == "/" {
					t.Errorf("node %s: bind %+v", n.Name, b)
				}
			}
		}
	})
}

func TestSplit(t *testing.T) {
	for _, c := range []struct {
		in   string
		want []string
	}{
		{"", nil},
		{"  a\tb  ", []string{"a", "b"}},
		{`a "b c" 'd "e' f\ g`, []string{"a", "b c", `d "e`, "f g"}},
		{`a'b'c ""`, []string{"abc", ""}},
		{`"a\"b" 'c\d'`, []string{`a"b`, `c\d`}},
		{"a #b\nc d#e", []string{"a", "c", "d#e"}},
	} {
		if got, err := split(c.in); err != nil || !cmp.Equal(got, c.want) {
			t.Errorf("split(%q) = %q, %v; want %q", c.in, got, err, c.want)
		}
	}
	for _, in := range []string{`a\`, `"a`, `'a`, `"a\"`} {
		if got, err := split(in); err == nil {
			t.Errorf("split(%q) = %q, no error", in, got)
		}
	}
}
