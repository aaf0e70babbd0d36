package agree

import (
	"maps"
	"net/netip"
	"slices"
	"testing"

	"github.com/ravel-lb/ravel"
)

// A redirect is told to be in place when new flows find none but wanted pods there, and from then on as long as it is
// wanted.
func TestWhatIsInPlace(t *testing.T) {
	redirect := func(pods ...string) []ravel.Redirect {
		r := ravel.Redirect{Key: web}
		for _, p := range pods {
			r.Pods = append(r.Pods, netip.MustParseAddrPort(p+":8080"))
		}
		return []ravel.Redirect{r}
	}
	var said map[ravel.ServiceKey]bool // by the step before
	const one, two, gone = "10.1.0.1", "10.1.0.2", "10.1.0.9"
	for _, step := range []struct {
		name       string
		want, held []ravel.Redirect
		in         bool
	}{
		{"wanted, not held", redirect(one), nil, false},
		{"held", redirect(one), redirect(one), true},
		{"a pod comes, of which the kernel does not know yet", redirect(one, two), redirect(one), true},
		{"another takes its place", redirect(two), redirect(one), true},
		{"no pod is left, and the redirect lingers", nil, redirect(two), false},
		{"pods come back, and the redirect leads to one that is gone", redirect(one), redirect(two), false},
		{"also to one that is gone", redirect(one), redirect(one, gone), false},
		{"to one that came back", redirect(one, two), redirect(one), true},
		{"the kernel lost it", redirect(one), nil, false},
		{"of one that failed to be changed nobody knows where it leads", redirect(one), redirect(gone), false},
	} {
		t.Run(step.name, func(t *testing.T) {
			held := map[ravel.ServiceKey]ravel.Redirect{}
			for _, x := range step.held {
				held[x.Key] = x
			}
			said = inPlace(step.want, held, said)
			want := map[ravel.ServiceKey]bool{}
			if step.in {
				want[web] = true
			}
			if !maps.Equal(said, want) {
				t.Errorf("said %v, want %v", slices.Collect(maps.Keys(said)), want)
			}
		})
	}
}
