package original

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/vishvananda/netlink"

	"github.com/ravel-lb/ravel/internal/nettest"
)

func TestNamed(t *testing.T) {
	for _, test := range []struct {
		name, vip string
		want      bool
	}{
		{"10_1_2_3", "10.1.2.3", true},
		{"10_1_2_3", "10.1.2.4", false},
		{"0_1_2_3", "10.1.2.3", false},
		{"ravel0", "10.1.2.3", false},
		{"1aaaabbbbcccc20", "2001:db8:77:1:aaaa:bbbb:cccc:20", true},
		{"1AAAABBBBCCCC20", "2001:db8:77:1:aaaa:bbbb:cccc:20", true},
		{"aaabbbbcccc0020", "2001:db8:77:1:aaaa:bbbb:cccc:20", true}, // its last group written in full
		{"1aaaabbbbcccc21", "2001:db8:77:1:aaaa:bbbb:cccc:20", false},
		{"aaaabbbbcccc20", "2001:db8:77:1:aaaa:bbbb:cccc:20", false}, // 14 characters
		{"200000000000001", "2001:db8:77:1:aaaa:bbbb:cccc:20", false},
		{"000000000000001", "2001:db8::1", true},           // in full
		{"1db8aaaabbbb001", "2001:db8:aaaa:bbbb::1", true}, // a run of zeros left out, the last group as "001"
		{"1db8aaaabbbb002", "2001:db8:aaaa:bbbb::1", false},
		{"d8aaaabbbbcccc1", "2001:db8:aaaa:bbbb::cccc:1", false},
		{"b8aaaabbbbcccc1", "2001:db8:aaaa:bbbb::cccc:1", true}, // a run of zeros left out
		{"aabbbb000cccc01", "2001:db8:aaaa:bbbb::cccc:1", true}, // a group of zeros as "000"
		{"nodelocaldns001", "2001:db8::1", false},
	} {
		if got := named(test.name, netip.MustParseAddr(test.vip)); got != test.want {
			t.Errorf("%s for %s: %v, want %v", test.name, test.vip, got, test.want)
		}
	}
}

// What the original makes of any way to write an address is known again.
func FuzzNamed(f *testing.F) {
	f.Add([]byte{0x20, 1, 0xd, 0xb8, 15: 1}, uint16(0b1010), byte(3))
	f.Add([]byte{0x20, 1, 0xd, 0xb8, 0, 1, 15: 0}, uint16(0), byte(0))
	f.Fuzz(func(t *testing.T, b []byte, long uint16, from byte) {
		if len(b) < 16 {
			return
		}
		a := netip.AddrFrom16([16]byte(b[:16]))
		var written []string
		for i := 0; i < 16; i += 2 {
			form := "%x"
			if long>>(i/2)&1 == 1 {
				form = "%04x"
			}
			written = append(written, fmt.Sprintf(form, int(b[i])<<8|int(b[i+1])))
		}
		// One run of zeros is left out.
		begin := int(from % 8)
		end := begin
		for end < 8 && b[2*end] == 0 && b[2*end+1] == 0 {
			end++
		}
		text := strings.Join(slices.Concat(written[:begin], written[end:]), "")
		if len(text) < 15 {
			return
		}
		if name := text[len(text)-15:]; !named(name, a) {
			t.Errorf("%s, of %s, is not known again in %s", name, text, a)
		}
	})
}

// fake is a small honest kernel.
type fake struct {
	list   []link
	failAt int // the removal that fails, from 1
	calls  int
}

func (f *fake) links() ([]link, error) { return slices.Clone(f.list), nil }

func (f *fake) remove(index int) error {
	if f.calls++; f.calls == f.failAt {
		return errors.New("input/output error")
	}
	n := len(f.list)
	if f.list = slices.DeleteFunc(f.list, func(l link) bool { return l.index == index }); len(f.list) == n {
		return errGone
	}
	return nil
}

func prefixes(list ...string) []netip.Prefix {
	var all []netip.Prefix
	for _, s := range list {
		all = append(all, netip.MustParsePrefix(s))
	}
	return all
}

func host() *fake {
	return &fake{list: []link{
		{1, "lo", "device", "", prefixes("127.0.0.1/8", "::1/128")},
		{2, "eth0", "veth", "", prefixes("10.0.0.11/24")},
		{3, "10_1_2_3", "dummy", "", prefixes("10.1.2.3/32")},
		{4, "10_1_2_4", "dummy", "", nil},                                    // without its address
		{5, "10_1_2_5", "dummy", "", prefixes("10.1.2.5/32", "10.1.2.9/32")}, // with one more
		{6, "10_1_2_6", "dummy", "", prefixes("10.1.2.7/32")},                // with another's
		{7, "10_1_2_7", "dummy", "", prefixes("10.1.2.7/24")},                // with a network
		{8, "10_1_2_8", "bridge", "", prefixes("10.1.2.8/32")},               // no dummy
		{9, "10_1_2_9", "dummy", "mine", prefixes("10.1.2.9/32")},            // somebody's by its alias
		{10, "ravel0", "dummy", "ravel", prefixes("10.1.2.3/32", "10.1.2.5/32")},
		{11, "dummy0", "dummy", "", prefixes("10.1.2.10/32")},
		{12, "kube-ipvs0", "dummy", "", prefixes("10.96.0.1/32")},
		{13, "nodelocaldns", "dummy", "", prefixes("169.254.20.10/32")},
		{14, "1aaaabbbbcccc20", "dummy", "", prefixes("2001:db8:77:1:aaaa:bbbb:cccc:20/128")},
		{15, "1aaaabbbbcccc21", "dummy", "", prefixes("2001:db8:77:1:aaaa:bbbb:cccc:20/128")},
	}}
}

func TestLinksGoAndOthersStay(t *testing.T) {
	k := host()
	want := []string{
		"ip link delete 10_1_2_3 # VIP 10.1.2.3: ravel0 holds it too",
		"ip link delete 1aaaabbbbcccc20 # VIP 2001:db8:77:1:aaaa:bbbb:cccc:20: 1aaaabbbbcccc21 holds it too",
	}
	would, err := removeLinks(t.Context(), k, true)
	if err != nil || !slices.Equal(would, want) || len(k.list) != 15 {
		t.Errorf("would: %q, %v", would, err)
	}
	did, err := removeLinks(t.Context(), k, false)
	if diff := cmp.Diff(want, did); err != nil || diff != "" {
		t.Errorf("%v, did (-want +got):\n%s", err, diff)
	}
	var names []string
	for _, l := range k.list {
		names = append(names, l.name)
	}
	if diff := cmp.Diff(strings.Fields("lo eth0 10_1_2_4 10_1_2_5 10_1_2_6 10_1_2_7 10_1_2_8 10_1_2_9 ravel0 dummy0 kube-ipvs0 nodelocaldns 1aaaabbbbcccc21"), names); diff != "" {
		t.Errorf("left (-want +got):\n%s", diff)
	}
	if again, err := removeLinks(t.Context(), k, false); err != nil || len(again) > 0 {
		t.Errorf("again: %q, %v", again, err)
	}
}

// A link that does not go stops no other, and is named.
func TestALinkThatDoesNotGo(t *testing.T) {
	k := host()
	k.failAt = 1
	did, err := removeLinks(t.Context(), k, false)
	if err == nil || !strings.Contains(err.Error(), "10_1_2_3") || len(did) != 1 {
		t.Errorf("%q, %v", did, err)
	}
	if did, err = removeLinks(t.Context(), k, false); err != nil || len(did) != 1 {
		t.Errorf("once more: %q, %v", did, err)
	}
	ended, end := context.WithCancel(t.Context())
	end()
	if did, err := removeLinks(ended, host(), false); !errors.Is(err, context.Canceled) || len(did) > 0 {
		t.Errorf("%q, %v", did, err)
	}
}

// The kernel answers as the fake does, and what it shows of its links is read right.
func TestLinksOfTheKernel(t *testing.T) {
	nettest.Need(t, nettest.Dummy)
	nettest.Shell(t, `
		for l in 10_1_2_3 10_1_2_4 ravel0 dummy9 1aaaabbbbcccc20; do ip link add $l type dummy; done
		ip link add 10_1_2_8 type bridge
		ip addr add 10.1.2.3 dev 10_1_2_3
		ip addr add 10.1.2.3 dev ravel0; ip link set ravel0 alias ravel; ip link set ravel0 up; ip link set 10_1_2_3 up
		ip addr add 10.1.2.8 dev 10_1_2_8
		ip addr add 10.1.2.9 dev dummy9
		ip -6 addr add 2001:db8:77:1:aaaa:bbbb:cccc:20 dev 1aaaabbbbcccc20; ip link set 1aaaabbbbcccc20 up`)
	t.Cleanup(func() { nettest.Shell(t, "for l in 10_1_2_4 10_1_2_8 ravel0 dummy9; do ip link del $l; done") })
	want := []string{
		"ip link delete 10_1_2_3 # VIP 10.1.2.3: ravel0 holds it too",
		"ip link delete 1aaaabbbbcccc20 # VIP 2001:db8:77:1:aaaa:bbbb:cccc:20: no other link holds it",
	}
	did, err := RemoveLinks(t.Context(), false)
	if diff := cmp.Diff(want, did); err != nil || diff != "" {
		t.Fatalf("%v, did (-want +got):\n%s", err, diff)
	}
	shown := nettest.Shell(t, "ip -o link; ip route get 10.1.2.3; ip route get 10.1.2.9")
	for _, left := range []string{"10_1_2_4", "10_1_2_8", "ravel0", "dummy9", "local 10.1.2.3", "local 10.1.2.9"} {
		if !strings.Contains(shown, left) {
			t.Errorf("%s is gone:\n%s", left, shown)
		}
	}
	if again, err := RemoveLinks(t.Context(), false); err != nil || len(again) > 0 {
		t.Errorf("again: %q, %v", again, err)
	}
	k := netlinkKernel{&netlink.Handle{}}
	if err := k.remove(1 << 20); !errors.Is(err, errGone) {
		t.Errorf("a link that is not there: %v", err)
	}
}
