package realserver

import (
	"fmt"
	"net/netip"
	"testing"

	"github.com/ravel-lb/ravel"
	"github.com/ravel-lb/ravel/internal/iptables"
	"github.com/ravel-lb/ravel/internal/nettest"
)

// many returns redirects of a tenth as many VIPs, to three pods each.
func many(n int) []ravel.Redirect {
	list := make([]ravel.Redirect, n)
	for i := range list {
		vip := netip.AddrFrom4([4]byte{10, 200, byte(i / 10 >> 8), byte(i / 10)})
		list[i] = redirect(ravel.TCP, vip, uint16(80+i%10), 0, 1, 2)
		list[i].Name = fmt.Sprintf("namespace-%d/service-%d:http", i%50, i)
	}
	return list
}

func benchVariants(b *testing.B, fn func(b *testing.B, v iptables.Variant)) {
	for _, v := range []iptables.Variant{iptables.NFT, iptables.Legacy} {
		b.Run(string(v), func(b *testing.B) {
			nettest.Need(b, nettest.Root, features[v])
			flush(b, v)
			b.Cleanup(func() { flush(b, v) })
			fn(b, v)
		})
	}
}

// 5,000 redirects of 500 VIPs to 15,000 pods, from nothing.
func BenchmarkApplyAll(b *testing.B) {
	benchVariants(b, func(b *testing.B, v iptables.Variant) {
		all := many(5000)
		for b.Loop() {
			b.StopTimer()
			flush(b, v)
			r := newReal(b, v, nil)
			b.StartTimer()
			apply(b, r, all...)
		}
	})
}

// A process starts and finds 5,000 redirects as they should be.
func BenchmarkAdopt(b *testing.B) {
	benchVariants(b, func(b *testing.B, v iptables.Variant) {
		all := many(5000)
		apply(b, newReal(b, v, nil), all...)
		for b.Loop() {
			apply(b, newReal(b, v, nil), all...)
		}
	})
}

// One of 5,000 redirects gets other pods.
func BenchmarkApplyOne(b *testing.B) {
	benchVariants(b, func(b *testing.B, v iptables.Variant) { benchOne(b, newReal(b, v, nil)) })
}

// The same without a kernel: what Ravel itself needs.
func BenchmarkApplyOneRulesOnly(b *testing.B) {
	w := want(false, many(5000)...)
	before := build(w, nil)
	for i := 0; b.Loop(); i++ {
		w.redirects[2500].Pods = redirect(ravel.TCP, w.redirects[2500].Key.VIP, 80, i%3).Pods
		now := build(w, before)
		if tx := plan(before.rules, now.rules); tx.changed != 1 && i > 0 {
			b.Fatalf("%d chains change", tx.changed)
		}
		before = now
	}
}

func benchOne(b *testing.B, r *Realserver) {
	all := many(5000)
	apply(b, r, all...)
	for i := 0; b.Loop(); i++ {
		all[2500].Pods = redirect(ravel.TCP, all[2500].Key.VIP, 80, i%3).Pods
		apply(b, r, all...)
	}
}

// Nothing changes.
func BenchmarkApplySame(b *testing.B) {
	benchVariants(b, func(b *testing.B, v iptables.Variant) {
		all := many(5000)
		r := newReal(b, v, nil)
		apply(b, r, all...)
		for b.Loop() {
			apply(b, r, all...)
		}
	})
}
