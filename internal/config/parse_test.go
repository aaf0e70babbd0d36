package config

import (
	"bytes"
	"errors"
	"os"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

func TestExampleParses(t *testing.T) {
	b, err := os.ReadFile("../../deploy/example/ravel-static.yaml")
	if err != nil {
		t.Fatal(err)
	}
	s, err := Parse(b)
	if err != nil {
		t.Fatal(err)
	}
	if len(s.Warnings)+len(s.Unknown) > 0 {
		t.Errorf("warnings %v, unknown %v", s.Warnings, s.Unknown)
	}
	if len(s.Cluster.Services) != 5 || len(s.Cluster.Endpoints) != 8 || len(s.Fleet.Peers) != 2 {
		t.Errorf("got %+v", s)
	}
}

// bad parses a document that must be refused and returns its faults, one a line.
func bad(t *testing.T, b string) string {
	t.Helper()
	s, err := Parse([]byte(b))
	var e *Error
	if !errors.As(err, &e) {
		t.Fatalf("parsed %q to %+v, %v", b, s, err)
	}
	return e.Error()
}

func TestPlaceOfAFault(t *testing.T) {
	got := bad(t, `cluster:
  config:
    198.51.100.20:
      70000: {namespace: a, service: b, tcpEnabled: true}
fleet: {}
nodes: []
endpoints: []
`)
	want := `cluster.config["198.51.100.20"]["70000"]: port 70000: want 1 to 65535 (line 4:14)`
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error(diff)
	}
}

func TestOriginal(t *testing.T) {
	b, err := os.ReadFile("testdata/original.json")
	if err != nil {
		t.Fatal(err)
	}
	b = bytes.TrimSpace(b)
	s, err := Parse([]byte(`{"cluster": ` + string(b) + `, "fleet": {}, "nodes": [], "endpoints": []}`))
	if err != nil {
		t.Fatal(err)
	}
	t.Log(strings.Join(strings.Fields(cmp.Diff(Static{}, s)), " "))
}
