package config

import (
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/prometheus/client_golang/prometheus"

	"github.com/ravel-lb/ravel/internal/desired"
)

// The default service that a process was told of is in every value of its file, also in the one kept from an earlier
// process, and is checked as one of the file's.
func TestFileHasTheDefaultServiceOfItsProcess(t *testing.T) {
	unicorn := &desired.DefaultService{Namespace: "ops", Service: "unicorn", Port: 70}
	path, keep := filepath.Join(t.TempDir(), "static.yaml"), filepath.Join(t.TempDir(), "last-good.yaml")
	put(t, path, cluster("{config: {}, vipPool: [192.0.2.1, 192.0.2.2]}"))
	for _, spoilt := range []bool{false, true} {
		if spoilt {
			put(t, path, "cluster: [")
		}
		f := NewFile(path, slog.New(slog.DiscardHandler), prometheus.NewPedanticRegistry())
		f.Keep, f.Default = keep, unicorn
		f.load()
		s, known := f.Latest()
		if !known || len(s.Cluster.Services) != 2 || len(s.Unknown) != 2 || f.Status().Kept != spoilt {
			t.Fatalf("spoilt %v: %+v, %v, %+v", spoilt, s, known, f.Status())
		}
	}
	if _, err := ParseWith([]byte(static("{config: {}, vipPool: [10.0.0.7]}", "", "[{name: n, addresses: [10.0.0.7]}]", "")), unicorn); err == nil ||
		err.Error() != "nodes[0].addresses[0]: 10.0.0.7 is the VIP of cluster.vipPool[0] (line 3:31)" {
		t.Errorf("a node's address as a VIP: %v", err)
	}
	put(t, path, cluster(`{config: {}, vipPool: [192.0.2.1], defaultService: {namespace: a, service: b, port: 71}}`))
	s, err := LoadWith(path, unicorn)
	if err != nil {
		t.Fatal(err)
	}
	var got []string
	for _, v := range s.Cluster.Services {
		got = append(got, v.Key.String()+" "+v.Name())
	}
	if !slices.Equal(got, []string{"tcp 192.0.2.1:71 a/b"}) {
		t.Errorf("with one in the document: %v", got)
	}
}

// Who has the same flags has the same services, whether the flags are given to the parser or to its value.
func TestDefaultServiceByEitherWay(t *testing.T) {
	b, err := os.ReadFile("testdata/original.json")
	if err != nil {
		t.Fatal(err)
	}
	b = []byte(`{"cluster": ` + string(b) + `, "fleet": {}, "nodes": [], "endpoints": []}`)
	d, err := DefaultService("OPS/unicorn:www", 70)
	if err != nil {
		t.Fatal(err)
	}
	with, err := ParseWith(b, d)
	if err != nil {
		t.Fatal(err)
	}
	without, err := Parse(b)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(write(Static{Cluster: with.Cluster}), write(Static{Cluster: without.Cluster.WithDefault(d)})); diff != "" {
		t.Error(diff)
	}
}
