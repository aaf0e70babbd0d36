// Package setdiff says what turns one set into another.
package setdiff

import "slices"

// Diff is what has to happen to the set that there is, to become the set that is wanted. Its lists are sorted.
type Diff[K any] struct {
	Add    []K // wanted and not there
	Change []K // there, with another value
	Remove []K // there and not wanted
}

// Empty reports whether there is nothing to do.
func (d Diff[K]) Empty() bool { return len(d.Add)+len(d.Change)+len(d.Remove) == 0 }

// Maps compares two keyed sets. compare orders the keys in the result; equal compares values.
func Maps[K comparable, V any](have, want map[K]V, compare func(a, b K) int, equal func(have, want V) bool) Diff[K] {
	var d Diff[K]
	for k, w := range want {
		if h, there := have[k]; !there {
			d.Add = append(d.Add, k)
		} else if !equal(h, w) {
			d.Change = append(d.Change, k)
		}
	}
	for k := range have {
		if _, wanted := want[k]; !wanted {
			d.Remove = append(d.Remove, k)
		}
	}
	slices.SortFunc(d.Add, compare)
	slices.SortFunc(d.Change, compare)
	slices.SortFunc(d.Remove, compare)
	return d
}

// Keyed makes a map of a slice whose elements have a key. A later element with the same key replaces an earlier one.
func Keyed[K comparable, V any](list []V, key func(V) K) map[K]V {
	m := make(map[K]V, len(list))
	for _, v := range list {
		m[key(v)] = v
	}
	return m
}

// Same reports whether two slices are one in memory. It is how values that are never changed are compared in no time;
// those that are not the same may still be equal.
func Same[S ~[]E, E any](a, b S) bool {
	return len(a) == len(b) && (len(a) == 0 || &a[0] == &b[0])
}
