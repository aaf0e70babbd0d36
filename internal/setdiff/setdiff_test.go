package setdiff

import (
	"cmp"
	"maps"
	"math/rand/v2"
	"testing"

	gocmp "github.com/google/go-cmp/cmp"
)

func equal(a, b int) bool { return a == b }

func TestMaps(t *testing.T) {
	have := map[string]int{"kept": 1, "gone": 1, "other": 1}
	want := map[string]int{"kept": 1, "other": 2, "b": 1, "a": 1}
	got := Maps(have, want, cmp.Compare[string], equal)
	wanted := Diff[string]{Add: []string{"a", "b"}, Change: []string{"other"}, Remove: []string{"gone"}}
	if diff := gocmp.Diff(wanted, got); diff != "" {
		t.Fatalf("Maps (-want +got):\n%s", diff)
	}
	if got.Empty() || !Maps(want, want, cmp.Compare[string], equal).Empty() {
		t.Fatal("Empty is wrong")
	}
}

// Applying the difference to what there is gives what is wanted, from any set to any other.
func TestDiffLeadsFromAnyToAny(t *testing.T) {
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	rng := rand.New(rand.NewPCG(seed, 0))
	random := func() map[int]int {
		m := map[int]int{}
		for range rng.IntN(20) {
			m[rng.IntN(12)] = rng.IntN(3)
		}
		return m
	}
	for range 1000 {
		have, want := random(), random()
		d := Maps(have, want, cmp.Compare[int], equal)
		got := maps.Clone(have)
		for _, k := range d.Remove {
			delete(got, k)
		}
		for _, k := range append(d.Add, d.Change...) {
			if v, there := got[k]; there && v == want[k] {
				t.Fatalf("%d is in the difference and has not changed", k)
			}
			got[k] = want[k]
		}
		if !maps.Equal(got, want) {
			t.Fatalf("from %v to %v: got %v", have, want, got)
		}
	}
}

func TestKeyed(t *testing.T) {
	got := Keyed([]string{"a1", "b1", "a2"}, func(s string) byte { return s[0] })
	if diff := gocmp.Diff(map[byte]string{'a': "a2", 'b': "b1"}, got); diff != "" {
		t.Fatalf("Keyed (-want +got):\n%s", diff)
	}
}
