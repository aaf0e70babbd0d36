package ravel_test

import (
	"encoding/json"
	"errors"
	"io"
	"os/exec"
	"slices"
	"strings"
	"testing"
)

const module = "github.com/ravel-lb/ravel"

// may says which packages of ours each package may import. A package that is not listed may not be there: whoever adds
// one says where it stands. "nouns" is the root package.
var may = map[string]string{
	"nouns": "",

	// What knows nothing of the host.
	"internal/latest":     "",
	"internal/setdiff":    "",
	"internal/wholefile":  "",
	"internal/systemd":    "",
	"internal/desired":    "nouns internal/roster internal/setdiff",
	"internal/config/doc": "nouns",
	"internal/settings":   "internal/config/doc",
	"internal/config":     "nouns internal/config/doc internal/desired internal/latest internal/wholefile",

	"internal/hold": "nouns internal/desired internal/wholefile",

	"internal/kube": "nouns internal/config internal/desired internal/latest internal/setdiff internal/wholefile",

	// Appliers never import each other, and nothing that decides.
	"internal/sysctl":   "internal/regular internal/wholefile",
	"internal/iptables": "",
	"internal/ifaddr":   "nouns internal/setdiff internal/sysctl",
	"internal/guard":    "nouns internal/iptables internal/setdiff",
	"director":          "nouns internal/maglev internal/setdiff internal/sysctl",
	"bgp":               "nouns internal/setdiff",
	"realserver":        "nouns internal/iptables internal/nftnat internal/setdiff internal/sysctl",
	"internal/nftnat":   "nouns",

	// What directors agree on.
	"gossip":          "nouns internal/latest",
	"internal/roster": "nouns internal/setdiff",
	"internal/maglev": "nouns",
	"internal/health": "nouns internal/latest",

	"internal/agree": "nouns internal/desired internal/health internal/latest internal/maglev internal/node internal/roster " +
		"internal/setdiff internal/wholefile",

	// The loop knows its appliers by what they do.
	"internal/node":  "nouns director internal/desired internal/latest",
	"internal/admin": "",
	"internal/check": "nouns internal/cni internal/iptables",
	"internal/cni":   "nouns",

	// What users come from.
	"internal/original": "internal/iptables",

	// What is deployed has tests only.
	"deploy": "",

	"internal/nettest":  "",
	"internal/regular":  "",
	"deploy/systemd":    "", // tests of units
	"gossip/gossiptest": "",
}

// only says which packages may import a big library directly; everything else takes it through them.
var only = map[string]string{
	"github.com/osrg/gobgp/v3":        "bgp",
	"github.com/moby/ipvs":            "director internal/check",
	"github.com/vishvananda/netlink":  "director realserver internal/ifaddr internal/guard internal/iptables internal/nftnat internal/check internal/original lab/fleet lab/stage",
	"github.com/hashicorp/memberlist": "gossip gossip/gossiptest",
	"google.golang.org/protobuf":      "gossip",
	"github.com/coreos/go-iptables":   "internal/iptables",
	"github.com/urfave/cli/v2":        "cmd/ravel internal/settings",
	"github.com/fsnotify/fsnotify":    "internal/config",
	"go.yaml.in/yaml/v3":              "cmd/ravel internal/config internal/config/doc internal/settings lab/topology",
	"sigs.k8s.io/yaml":                "lab/stage",
	"k8s.io":                          "internal/kube lab/kubelet",
}

type listed struct {
	ImportPath string
	Imports    []string
}

func packages(t *testing.T) []listed {
	t.Helper()
	out, err := exec.Command("go", "list", "-json=ImportPath,Imports", "./...").Output()
	if err != nil {
		t.Fatalf("go list: %v", err)
	}
	var all []listed
	for d := json.NewDecoder(strings.NewReader(string(out))); ; {
		var p listed
		err := d.Decode(&p)
		if errors.Is(err, io.EOF) {
			return all
		}
		if err != nil {
			t.Fatal(err)
		}
		all = append(all, p)
	}
}

// short is a package's path below the module.
func short(path string) string {
	if path == module {
		return "nouns"
	}
	return strings.TrimPrefix(path, module+"/")
}

// Arrows between packages point one way: nouns ← desired ← cmd; nouns ← appliers ← cmd.
func TestArrows(t *testing.T) {
	seen := map[string]bool{}
	for _, p := range packages(t) {
		name := short(p.ImportPath)
		seen[name] = true
		free := strings.HasPrefix(name, "cmd/") || strings.HasPrefix(name, "lab/")
		allowed, known := may[name]
		if !known && !free {
			t.Errorf("%s is new: say in arrows_test.go what it may import", name)
		}
		for _, i := range p.Imports {
			for library, who := range only {
				if (i == library || strings.HasPrefix(i, library+"/")) && !slices.Contains(strings.Fields(who), name) {
					t.Errorf("%s imports %s, which is for %s", name, i, who)
				}
			}
			if i != module && !strings.HasPrefix(i, module+"/") {
				continue
			}
			other := short(i)
			switch {
			case free && strings.HasPrefix(other, "lab/") && !strings.HasPrefix(name, "lab/"):
				t.Errorf("%s imports the lab", name)
			case !free && !slices.Contains(strings.Fields(allowed), other):
				t.Errorf("%s imports %s; it may import %q", name, other, allowed)
			}
		}
	}
	for name := range may {
		if !seen[name] {
			t.Errorf("arrows_test.go knows %s, which is not there", name)
		}
	}
}
