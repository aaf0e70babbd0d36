package node

import (
	"context"
	"errors"
	"net/netip"
	"slices"
	"time"

	"github.com/ravel-lb/ravel"
)

// redirects is the applier that only a realserver has; package realserver has the real one.
type redirects interface {
	Apply(ctx context.Context, want []ravel.Redirect, directors []netip.Addr) (held []ravel.ServiceKey, err error)
	Read(ctx context.Context) ([]ravel.Redirect, error) // what an earlier process left
	Problems() []ravel.Problem
	Resync()
	Look(ctx context.Context) bool // whether rules must be mended, by the next Apply
}

// RealserverConfig is what a realserver's loop works with.
type RealserverConfig struct {
	Redirects redirects
	Guard     vipGuard
	Links     vipLinks
	// Linger is how long a redirect without pods is kept as it was: directors still send for a while.
	Linger time.Duration
}

// realserverWalk brings a node's iptables to a state.
type realserverWalk struct {
	RealserverConfig
	last      []ravel.Redirect
	lingering map[ravel.ServiceKey]leaving // redirects that are wanted no more
	vips      []netip.Addr
	read      bool // vips were read from the kernel once
}

// leaving is a redirect that is wanted no more.
type leaving struct {
	used  bool      // a director uses it still
	until time.Time // when it goes, unless it is used
}

// step takes one walk: addresses that go, then redirects, then addresses that come. A redirect is there before its
// VIP and stays after it.
func (r *realserverWalk) step(ctx context.Context, want ravel.State, now time.Time) (Report, error) {
	if !r.read {
		vips, err := r.Links.Read(ctx)
		if err != nil {
			return Report{}, err
		}
		if r.last, err = r.Redirects.Read(ctx); err != nil {
			return Report{}, err
		}
		masquerade := slices.ContainsFunc(want.Redirects, func(x ravel.Redirect) bool { return x.Masquerade })
		for i := range r.last {
			r.last[i].Masquerade = masquerade
		}
		r.vips, r.read = vips, true
	}
	eff, wake := want, time.Time{}
	eff.Redirects, wake = r.linger(want, now)
	eff.Addrs = nil
	for _, redirect := range eff.Redirects {
		if a := (ravel.Addr{VIP: redirect.Key.VIP}); len(eff.Addrs) == 0 || eff.Addrs[len(eff.Addrs)-1] != a {
			eff.Addrs = append(eff.Addrs, a)
		}
	}
	var errs []error

	effVIPs := make([]netip.Addr, 0, len(eff.Addrs))
	for _, a := range eff.Addrs {
		effVIPs = append(effVIPs, a.VIP)
	}
	all := union(r.vips, effVIPs, netip.Addr.Compare)
	// What a redirect claims never reaches INPUT, so no service is claimed there.
	guarded, err := r.Guard.Apply(ctx, all, nil, nil)
	errs = append(errs, err)

	staying := make([]ravel.Addr, 0, len(eff.Addrs))
	for _, a := range eff.Addrs {
		if slices.Contains(r.vips, a.VIP) {
			staying = append(staying, a)
		}
	}
	if len(r.vips) != len(staying) {
		_, err := r.Links.Apply(ctx, staying)
		errs = append(errs, err)
	}

	held, err := r.Redirects.Apply(ctx, eff.Redirects, eff.Directors)
	errs = append(errs, err)
	r.last = eff.Redirects

	redirected := map[netip.Addr]bool{}
	for _, key := range held {
		redirected[key.VIP] = true
	}
	addrs := slices.DeleteFunc(slices.Clone(eff.Addrs), func(a ravel.Addr) bool {
		return !slices.Contains(staying, a) && !(redirected[a.VIP] && slices.Contains(guarded, a.VIP))
	})
	heldVIPs, err := r.Links.Apply(ctx, addrs)
	errs = append(errs, err)
	r.vips = heldVIPs
	if vips := union(heldVIPs, effVIPs, netip.Addr.Compare); len(vips) != len(all) {
		_, err := r.Guard.Apply(ctx, vips, nil, nil)
		errs = append(errs, err)
	}

	if expiry, any := r.Links.NextExpiry(); any && (wake.IsZero() || expiry.Before(wake)) {
		wake = expiry
	}
	report := Report{Effective: eff, Held: held, HeldVIPs: heldVIPs, Wake: wake, Lingering: len(r.lingering)}
	report.Problems = slices.Concat(r.Redirects.Problems(), r.Links.Problems(), r.Guard.Problems())
	return report, errors.Join(errs...)
}

// linger adds the redirects that are wanted no more and that are needed still: as long as a director's kernel has this
// node for the service, and then until its time is over. Of directors that say nothing only the time counts.
func (r *realserverWalk) linger(state ravel.State, now time.Time) ([]ravel.Redirect, time.Time) {
	want := state.Redirects
	wanted := make(map[ravel.ServiceKey]bool, len(want))
	for _, redirect := range want {
		wanted[redirect.Key] = true
	}
	var next time.Time
	lingering := map[ravel.ServiceKey]leaving{}
	eff := slices.Clone(want)
	for _, redirect := range r.last {
		if wanted[redirect.Key] {
			continue
		}
		l, lingers := r.lingering[redirect.Key]
		_, used := slices.BinarySearchFunc(state.InUse, redirect.Key, ravel.ServiceKey.Compare)
		used = used || state.Unheard
		if !lingers || used || l.used {
			l.until = now.Add(r.Linger) // from the moment on that nobody uses it
		}
		l.used = used
		if !now.Before(l.until) {
			continue
		}
		lingering[redirect.Key] = l
		eff = append(eff, redirect)
		if used {
			continue // the directors' next word, or a resync, asks again
		}
		if next.IsZero() || l.until.Before(next) {
			next = l.until
		}
	}
	r.lingering = lingering
	slices.SortFunc(eff, func(a, b ravel.Redirect) int { return a.Key.Compare(b.Key) })
	return eff, next
}

// stop leaves everything as it is: an agent that is down is not a node that is down.
func (r *realserverWalk) stop(context.Context) error { return nil }

func (r *realserverWalk) resync() {
	r.Redirects.Resync()
	r.Guard.Resync()
	r.Links.Resync()
}

func (r *realserverWalk) look(ctx context.Context) bool {
	redirects := r.Redirects.Look(ctx)
	return r.Guard.Look(ctx) || redirects
}

func (r *realserverWalk) changed() (ipvs, links <-chan struct{}) { return nil, r.Links.Changed() }
