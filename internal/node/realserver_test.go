package node

import (
	"testing"
	"time"

	"github.com/ravel-lb/ravel"
)

// A redirect that is wanted no more stays while a director uses it, and for its time after that; also over a restart of
// the agent, and while the fleet was not heard.
func TestARedirectOutlivesItsUse(t *testing.T) {
	w := newWorld(t)
	w.director = false
	w.fail = func() bool { return false }
	begin := func() *realserverWalk {
		return &realserverWalk{RealserverConfig: RealserverConfig{
			Redirects: fakeRedirects{w}, Guard: fakeGuard{w}, Links: fakeLinks{w}, Linger: 5 * time.Second,
		}}
	}
	key := ravel.ServiceKey{VIP: vip1, Proto: ravel.TCP, Port: 80}
	wanted := ravel.State{Redirects: []ravel.Redirect{{Key: key}}, Addrs: []ravel.Addr{{VIP: vip1}}}
	used := ravel.State{InUse: []ravel.ServiceKey{key}}
	r, now := begin(), time.Unix(1_000_000, 0)
	is := func(what string, state ravel.State, after time.Duration, held bool) {
		t.Helper()
		now = now.Add(after)
		if _, err := r.step(t.Context(), state, now); err != nil {
			t.Fatal(err)
		}
		if got := w.redirects[key]; got != held {
			t.Fatalf("%s: held %v, want %v", what, got, held)
		}
	}
	is("wanted", wanted, 0, true)
	is("no pod is left, a director uses it", used, 0, true)
	is("and still does", used, time.Hour, true)
	r = begin()
	is("the agent restarted, and has not heard the fleet", ravel.State{Unheard: true}, 0, true)
	is("nor has it now", ravel.State{Unheard: true}, time.Hour, true)
	is("a director uses it still", used, time.Minute, true)
	is("no director uses it any more, as is heard long after", ravel.State{}, time.Minute, true)
	is("its time begins then", ravel.State{}, 4*time.Second, true)
	is("and is over", ravel.State{}, 2*time.Second, false)
}
