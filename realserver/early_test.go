package realserver

import (
	"errors"
	"slices"
	"testing"

	"github.com/ravel-lb/ravel"
)

// fakeEarly is nf_tables as one kube-proxy and one table of ours.
type fakeEarly struct {
	kubeProxy, held bool
	redirects       []ravel.Redirect
	fail            error // of Apply
	asked           error // of Needed
}

var _ early = (*fakeEarly)(nil)

func (f *fakeEarly) Needed() (bool, error) { return f.kubeProxy, f.asked }
func (f *fakeEarly) Held() bool            { return f.held }

func (f *fakeEarly) Lost() (bool, error) {
	lost := f.held && f.redirects == nil
	f.held = f.held && !lost
	return lost, nil
}

func (f *fakeEarly) Apply(redirects []ravel.Redirect) error {
	if f.fail != nil {
		return f.fail
	}
	f.held, f.redirects = true, slices.Clone(redirects)
	return nil
}

func (f *fakeEarly) Remove(dryRun bool) ([]string, error) {
	if !f.held {
		return nil, nil
	}
	if !dryRun {
		f.held, f.redirects = false, nil
	}
	return []string{"nft delete table ip ravel"}, nil
}

// Redirects stand before a kube-proxy with nftables while one is here, of which a look tells, and only then; what keeps
// them from it is a Problem, and iptables' rules are held all the same.
func TestBeforeNftables(t *testing.T) {
	r, _, _ := fakeReal(t)
	k := &fakeEarly{}
	r.families[0].early = k
	all := everyKind(0)
	look := func(when string, want bool) {
		t.Helper()
		_ = r.Look(t.Context()) // may have iptables to read
		if got := r.families[0].forestalls(r.names); got != want {
			t.Fatalf("%s: there is work: %t", when, got)
		}
		if want {
			apply(t, r, all...)
		}
	}
	apply(t, r, all...)
	if k.held {
		t.Fatal("no kube-proxy, and a table was made")
	}
	look("nothing changed", false)
	k.kubeProxy = true
	look("kube-proxy came", true)
	if !k.held || len(k.redirects) == 0 || slices.ContainsFunc(k.redirects, func(x ravel.Redirect) bool { return x.Key.VIP.Is6() }) {
		t.Fatalf("held %t: %v", k.held, k.redirects)
	}
	look("nothing changed", false)
	k.redirects = nil // nft flush ruleset
	look("flushed", true)
	if len(k.redirects) == 0 {
		t.Fatal("flushed, and not made again")
	}
	k.asked = errors.New("no answer")
	look("not known", false)
	k.asked = nil
	would, err := r.Cleanup(t.Context(), true)
	if err != nil || !slices.Contains(would, "nft delete table ip ravel") || !k.held {
		t.Fatalf("would clean up %q, %v; held %t", would, err, k.held)
	}
	apply(t, r)
	if k.held {
		t.Fatal("nothing is wanted, and the table is there")
	}
	apply(t, r, all...)
	k.kubeProxy = false
	look("kube-proxy went", true)
	if k.held {
		t.Fatal("kube-proxy went, and the table is there")
	}

	k.kubeProxy, k.fail = true, errors.New("no numgen")
	apply(t, r, all...)
	if p := r.Problems(); len(p) != 1 || p[0].Where != "nf_tables of ipv4" || p[0].Fix == "" {
		t.Fatalf("problems %v", p)
	}
	look("it cannot be, which the next resync looks at", false)
	k.fail = nil
	r.Resync()
	apply(t, r, all...)
	if p := r.Problems(); len(p) != 0 || !k.held {
		t.Fatalf("problems %v, held %t", p, k.held)
	}
}
