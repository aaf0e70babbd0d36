package ifaddr

import (
	"context"
	"encoding/binary"
	"net/netip"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ravel-lb/ravel/internal/nettest"
	"github.com/ravel-lb/ravel/internal/sysctl"
)

// signalled waits for the word that somebody changed something.
func signalled(t *testing.T, l *Links, what string, limit time.Duration) {
	t.Helper()
	select {
	case <-l.Changed():
	case <-time.After(limit):
		t.Fatalf("%s: no word of it in %s", what, limit)
	}
}

// message is what rtnetlink says of an address.
func message(kind uint16, index int, a netip.Addr) syscall.NetlinkMessage {
	data := make([]byte, unix.SizeofIfAddrmsg+unix.SizeofRtAttr)
	data[0], data[1] = unix.AF_INET, byte(a.BitLen())
	binary.NativeEndian.PutUint32(data[4:], uint32(index))
	binary.NativeEndian.PutUint16(data[8:], uint16(unix.SizeofRtAttr+len(a.AsSlice())))
	binary.NativeEndian.PutUint16(data[10:], unix.IFA_LOCAL)
	return syscall.NetlinkMessage{Header: syscall.NlMsghdr{Type: kind}, Data: append(data, a.AsSlice()...)}
}

func TestWatch(t *testing.T) {
	k := newFake()
	k.told = make(chan any)
	k.foreign("eth0", "veth")
	l, _ := newLinks(t, k)
	vips := addrs("192.0.2.1 192.0.2.2")
	apply := func() {
		t.Helper()
		held, err := l.Apply(t.Context(), vips)
		must(t, err)
		if len(held) != len(vips) {
			t.Fatalf("held %v", held)
		}
	}
	apply()
	index := l.index
	quiet := func(what string, messages ...syscall.NetlinkMessage) {
		t.Helper()
		k.told <- messages
		select {
		case <-l.Changed():
			t.Fatalf("%s: a word of it", what)
		case <-time.After(3 * gather):
		}
	}
	// change changes the fake as another program does: not while Links look at it.
	change := func(fn func()) {
		l.mu.Lock()
		defer l.mu.Unlock()
		fn()
	}
	quiet("our own addition", message(unix.RTM_NEWADDR, index, vips[0].VIP))
	quiet("another link's address", message(unix.RTM_DELADDR, index+1, vips[0].VIP))
	quiet("what was so for a moment", message(unix.RTM_DELADDR, index, vips[0].VIP))
	quiet("no message at all", syscall.NetlinkMessage{Header: syscall.NlMsghdr{Type: unix.RTM_DELADDR}, Data: []byte("x")})

	change(func() { delete(k.links["ravel0"].addrs, vips[0].VIP) })
	k.told <- []syscall.NetlinkMessage{message(unix.RTM_DELADDR, index, vips[0].VIP)}
	signalled(t, l, "an address gone", time.Second)
	apply()
	if !k.links["ravel0"].addrs[vips[0].VIP] {
		t.Fatal("the address is not put back")
	}
	change(func() { delete(k.links["ravel0"].addrs, vips[1].VIP) })
	k.told <- error(unix.ENOBUFS)
	signalled(t, l, "messages lost", 2*time.Second)
	apply()
	change(func() { delete(k.links, "ravel0") })
	k.told <- error(unix.EBADF)
	signalled(t, l, "a socket that failed", 3*again)
	apply()
	must(t, l.Close())
	must(t, l.Close())
	l.Resync()
	apply()
	if l.watch != nil || !l.closed {
		t.Fatal("watched after Close")
	}
}

// In the real kernel: whatever others do to the link is told within a second and mended, and our own changes are not.
func TestWatchInTheKernel(t *testing.T) {
	nettest.Need(t, nettest.Dummy)
	l := New(Options{Sysctl: sysctl.New("/proc/sys", "")})
	t.Cleanup(func() {
		must(t, l.Close())
		_, err := l.Cleanup(context.Background(), false)
		must(t, err)
	})
	many := addrs("192.0.2.1 192.0.2.2 2001:db8:2::1")
	for n := range 300 {
		many = append(many, addrs(netip.AddrFrom4([4]byte{198, 18, byte(n >> 8), byte(n)}).String())...)
	}
	apply := func(n int) {
		t.Helper()
		held, err := l.Apply(t.Context(), many[:n])
		must(t, err)
		if len(held) != n {
			t.Fatalf("held %d, want %d", len(held), n)
		}
	}
	silent := func(what string) {
		t.Helper()
		select {
		case <-l.Changed():
			t.Fatalf("%s: a word of it", what)
		case <-time.After(time.Second):
		}
	}
	for _, n := range []int{3, len(many), 2, 3} {
		apply(n)
	}
	silent("our own changes")
	for _, script := range []string{
		"ip addr flush dev ravel0",
		"ip addr del 192.0.2.2/32 dev ravel0",
		"ip -6 addr del 2001:db8:2::1/128 dev ravel0",
		"ip addr add 203.0.113.7/32 dev ravel0",
		"ip link del ravel0",
		"ip link set ravel0 down",
		"ip link set ravel0 down; ip link set ravel0 name other0",
	} {
		nettest.Shell(t, script)
		signalled(t, l, script, time.Second)
		apply(3)
		out := nettest.Shell(t, "ip addr show dev ravel0")
		for _, a := range many[:3] {
			if !strings.Contains(out, a.VIP.String()+"/") {
				t.Fatalf("after %s: %s is not there:\n%s", script, a.VIP, out)
			}
		}
		if strings.Contains(out, "203.0.113.7") || !slices.Contains(strings.FieldsFunc(out, func(r rune) bool {
			return strings.ContainsRune("<,> ", r)
		}), "UP") {
			t.Fatalf("after %s:\n%s", script, out)
		}
	}
	silent("what was mended")
}

// Without the kernel's messages all goes on, and nobody looks without being asked.
func TestNoWatch(t *testing.T) {
	k := newFake()
	l, _ := newLinks(t, k)
	_, err := l.Apply(t.Context(), addrs("192.0.2.1"))
	must(t, err)
	delete(k.links["ravel0"].addrs, netip.MustParseAddr("192.0.2.1"))
	select {
	case <-l.Changed():
		t.Fatal("a word of what nobody told")
	case <-time.After(again + 4*gather):
	}
	l.Resync()
	_, err = l.Apply(t.Context(), addrs("192.0.2.1"))
	must(t, err)
	if len(k.links["ravel0"].addrs) != 1 {
		t.Fatal("the address is not put back")
	}
}

// No message of rtnetlink, however cut off, is a panic.
func FuzzNews(f *testing.F) {
	for _, kind := range []uint16{unix.RTM_NEWADDR, unix.RTM_DELLINK} {
		f.Add(kind, message(kind, 3, netip.MustParseAddr("192.0.2.1")).Data)
		f.Add(kind, message(kind, 3, netip.MustParseAddr("2001:db8::1")).Data)
	}
	f.Fuzz(func(t *testing.T, kind uint16, data []byte) {
		n := newNews()
		n.add(kind, data)
		if len(n.addrs)+len(n.links) > 1 {
			t.Fatalf("one message, and %d addresses and %d links", len(n.addrs), len(n.links))
		}
	})
}
