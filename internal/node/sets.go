package node

import "slices"

// union returns the elements of two lists, sorted and without duplicates.
func union[T any](a, b []T, compare func(T, T) int) []T {
	all := slices.Concat(a, b)
	slices.SortFunc(all, compare)
	return slices.CompactFunc(all, func(x, y T) bool { return compare(x, y) == 0 })
}

// intersection returns the elements of a that are in b, in a's order.
func intersection[T comparable](a, b []T) []T {
	in := make(map[T]bool, len(b))
	for _, v := range b {
		in[v] = true
	}
	var both []T
	for _, v := range a {
		if in[v] {
			both = append(both, v)
		}
	}
	return both
}
