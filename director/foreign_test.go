package director

import (
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/ravel-lb/ravel"
)

// TestForeign follows what others put into the table and take from it, read by read.
func TestForeign(t *testing.T) {
	kernels(t, func(t *testing.T, open func() (kernel, error)) {
		k := opened(t, open)
		foreigners(t, k)
		d := start(t, Options{open: open})
		want := func(when string, keys ...ravel.ServiceKey) {
			t.Helper()
			if diff := cmp.Diff(keys, d.Foreign(), equalAddrs); diff != "" {
				t.Errorf("foreign %s (-want +got):\n%s", when, diff)
			}
		}
		web, dns, six := key("tcp 192.0.2.1:443"), key("udp 192.0.2.9:53"), key("tcp [2001:db8::1]:80")
		mine := vs("tcp 192.0.2.1:80", rs("10.0.0.1", 1))
		want("before any read")
		if _, err := d.Read(t.Context()); err != nil {
			t.Fatal(err)
		}
		want("after Read", web, dns)
		apply(t, d, mine)
		want("after Apply", web, dns)

		if err := k.NewService(id{ServiceKey: six}.full(service{scheduler: "rr", netmask: 128})); err != nil {
			t.Fatal(err)
		}
		if err := k.DelService(id{ServiceKey: web}.request()); err != nil {
			t.Fatal(err)
		}
		apply(t, d, mine)
		want("before the next read", web, dns)
		d.Resync()
		apply(t, d, mine)
		want("after a resync", dns, six)

		// One that takes the place of ours is met when that is edited.
		i := id{ServiceKey: mine.Key}
		if err := k.DelService(i.request()); err != nil {
			t.Fatal(err)
		}
		if err := k.NewService(i.full(service{scheduler: "rr", netmask: 0xffffffff})); err != nil {
			t.Fatal(err)
		}
		if _, err := d.Apply(t.Context(), nil); err != nil {
			t.Fatal(err)
		}
		want("after one took our place", mine.Key, dns, six)
		d.Foreign()[0] = six
		want("is a copy", mine.Key, dns, six)
	})
}
