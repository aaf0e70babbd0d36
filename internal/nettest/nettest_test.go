package nettest

import (
	"fmt"
	"os"
	"strings"
	"testing"
)

func TestMain(m *testing.M) { Main(m) }

func TestMainIsInANamespaceOfItsOwn(t *testing.T) {
	Need(t, Root)
	mine, err := os.Readlink("/proc/self/ns/net")
	if err != nil {
		t.Fatal(err)
	}
	outer, err := os.Readlink(fmt.Sprintf("/proc/%d/ns/net", os.Getppid()))
	if err != nil {
		t.Fatal(err)
	}
	if mine == outer {
		t.Fatalf("the tests are in the machine's own namespace %s", mine)
	}
	if links := strings.TrimSpace(Run(t, "ip", "-o", "link", "show", "up")); !strings.Contains(links, "lo:") {
		t.Fatalf("lo is not up:\n%s", links)
	}
}

func TestEveryFeatureHasAProbe(t *testing.T) {
	for _, f := range []Feature{Root, IPVS, Dummy, IPIP, IPSet, LegacyNAT, NftNAT, FRR, Systemd, PlainClock} {
		t.Logf("%s: %v", f, Has(f))
	}
}

func TestInNetns(t *testing.T) {
	Need(t, Root)
	before := Run(t, "ip", "-o", "link")
	InNetns(t, func() { Run(t, "ip", "link", "add", "gone0", "type", "veth", "peer", "name", "gone1") })
	if after := Run(t, "ip", "-o", "link"); after != before {
		t.Fatalf("links before:\n%s\nafter:\n%s", before, after)
	}
}
