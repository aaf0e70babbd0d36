package guard

import (
	"encoding/hex"
	"errors"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/ravel-lb/ravel"
	"github.com/ravel-lb/ravel/internal/iptables"
	"github.com/ravel-lb/ravel/internal/nettest"
)

// message is part of a dump, with a TCP and a UDP entry.
const message = "02000000" + // struct nfgenmsg
	"0500010007000000" + // protocol 7
	"0f00020072617665" + "6c342d7376630000" + // ravel4-svc, padded
	"1200030068617368" + "3a69702c706f7274" + "00000000" + // hash:ip,port
	"0500050002000000" + // AF_INET
	"44000880" +
	"20000780" + "0c000180" + "08000140c0000201" + "0600044000500000" + "0500070006000000" +
	"20000780" + "0c000180" + "08000140c0000202" + "0600044000350000" + "0500070011000000"

func TestParse(t *testing.T) {
	b, err := hex.DecodeString(message)
	must(t, err)
	var c contents
	must(t, c.parse(b))
	want := contents{"hash:ip,port", 2, []ravel.ServiceKey{
		key(ravel.TCP, vips[0], 80), key(ravel.UDP, vips[0].Next(), 53),
	}}
	if diff := cmp.Diff(want, c, cmp.AllowUnexported(contents{}), cmp.Comparer(func(a, b ravel.ServiceKey) bool { return a == b })); diff != "" {
		t.Fatalf("parsed (-want +got):\n%s", diff)
	}
	for size := range 4 {
		if err := new(contents).parse(b[:size]); !errors.Is(err, errShort) {
			t.Fatalf("%d bytes: %v", size, err)
		}
	}
}

// Reading a message never panics, and reads no more entries than bytes can hold.
func FuzzParse(f *testing.F) {
	b, err := hex.DecodeString(message)
	if err != nil {
		f.Fatal(err)
	}
	f.Add(b)
	f.Add(b[:len(b)-9])
	f.Add([]byte{2, 0, 0, 0, 3, 0, 8, 0})
	f.Fuzz(func(t *testing.T, b []byte) {
		var c contents
		_ = c.parse(b)
		if len(c.entries) > len(b)/4 {
			t.Fatalf("%d entries in %d bytes", len(c.entries), len(b))
		}
	})
}

// Adding what is there and removing what is gone are no errors; a full list comes back, in both families.
func TestSetsOfTheKernel(t *testing.T) {
	nettest.Need(t, nettest.IPSet)
	nettest.InNetns(t, func() {
		k := New(Options{}).sets
		for i, f := range []iptables.Family{iptables.V4, iptables.V6} {
			for _, s := range []set{{"ravel-t1", false, f, 0}, {"ravel-t2", true, f, 0}, {"ravel-t3", true, f, 10}} {
				if list, there, err := k.list(s); err != nil || there || len(list) != 0 {
					t.Fatalf("a set that is not there: %v, %v, %v", list, there, err)
				}
				must(t, k.destroy(s))
				must(t, k.create(s))
				must(t, k.create(s))
				want := map[ravel.ServiceKey]bool{}
				a := vips[i]
				for p := range 2000 {
					e := ravel.ServiceKey{VIP: a}
					if s.ports {
						e = key([]ravel.Proto{ravel.TCP, ravel.UDP}[p%2], a, uint16(65535-p))
					}
					a = a.Next()
					must(t, k.add(s, e))
					must(t, k.add(s, e))
					if p%3 == 0 {
						must(t, k.del(s, e))
						must(t, k.del(s, e))
						continue
					}
					want[e] = true
				}
				list, there, err := k.list(s)
				must(t, err)
				if !there || len(list) != len(want) {
					t.Fatalf("there %v, %d entries, want %d", there, len(list), len(want))
				}
				for _, e := range list {
					if !want[e] {
						t.Fatalf("%s is in set %s", keyText(e), s.kind())
					}
				}
				other := s
				other.ports = !s.ports
				if err := k.create(other); err == nil {
					t.Fatal("a set of another kind was taken for ours")
				}
				must(t, k.destroy(s))
			}
		}
	})
}
