package ifaddr

import (
	"net/netip"
	"testing"
)

func TestRead(t *testing.T) {
	k := newFake()
	l, _ := newLinks(t, k)
	_, err := l.Apply(t.Context(), addrs("192.0.2.1 2001:db8::1"))
	must(t, err)
	again, _ := newLinks(t, k)
	k.log = nil
	held, err := again.Read(t.Context())
	must(t, err)
	if text(held) != "192.0.2.1 2001:db8::1" || len(k.log) != 0 {
		t.Fatalf("held %v, changed %q", held, k.log)
	}
	// What a process reads at its start it may still remove.
	_, err = again.Apply(t.Context(), addrs("192.0.2.1"))
	must(t, err)
	if len(k.links["ravel0"].addrs) != 1 || !k.routes[netip.MustParseAddr("2001:db8::1")] {
		t.Fatalf("addresses %v, blackholes %v", k.links["ravel0"].addrs, k.routes)
	}
	k = newFake()
	k.foreign("ravel0", "veth", netip.MustParseAddr("203.0.113.9"))
	l, _ = newLinks(t, k)
	if held, err := l.Read(t.Context()); err != nil || len(held) != 0 {
		t.Fatalf("a foreign link: held %v, %v", held, err)
	}
}
