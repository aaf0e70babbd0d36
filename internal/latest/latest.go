// Package latest passes the newest value of something between goroutines: a slow reader misses only what no longer
// matters, and "not known yet" differs from any value.
package latest

import "sync"

// Value holds the newest of the values that it was given. The zero value is ready and knows nothing yet. Its methods
// are safe for use by many goroutines.
type Value[T any] struct {
	mu      sync.Mutex // guards the fields below
	value   T
	known   bool
	changed chan struct{}
}

// Set makes value the newest and wakes every reader that waits.
func (v *Value[T]) Set(value T) {
	v.mu.Lock()
	defer v.mu.Unlock()
	v.value, v.known = value, true
	if v.changed != nil {
		close(v.changed)
		v.changed = nil
	}
}

// Latest returns the newest value, and false while there was none.
func (v *Value[T]) Latest() (T, bool) {
	v.mu.Lock()
	defer v.mu.Unlock()
	return v.value, v.known
}

// Changed returns a channel that the next Set closes. Ask for it before Latest, so that no change is missed:
//
//	changed := v.Changed()
//	value, known := v.Latest()
//	…
//	<-changed
func (v *Value[T]) Changed() <-chan struct{} {
	v.mu.Lock()
	defer v.mu.Unlock()
	if v.changed == nil {
		v.changed = make(chan struct{})
	}
	return v.changed
}
