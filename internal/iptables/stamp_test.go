package iptables

import (
	"testing"

	"github.com/ravel-lb/ravel/internal/nettest"
)

// Every change of somebody else gives another stamp, and looking gives the same.
func TestStamp(t *testing.T) {
	for v, feature := range map[Variant]nettest.Feature{NFT: nettest.NftNAT, Legacy: nettest.LegacyNAT} {
		for _, f := range []Family{V4, V6} {
			t.Run(string(v)+" "+f.String(), func(t *testing.T) {
				nettest.Need(t, nettest.Root, feature)
				nettest.InNetns(t, func() {
					tables, err := Open(v, f)
					if err != nil {
						t.Fatal(err)
					}
					var before uint64
					stamp := func(changed bool, after string) {
						t.Helper()
						got, err := tables.Stamp("nat")
						if err != nil {
							t.Fatal(err)
						}
						if (got != before) != changed {
							t.Errorf("after %s the stamp is %d, was %d", after, got, before)
						}
						before = got
					}
					command := f.command() + "-" + string(v)
					if before, err = tables.Stamp("nat"); err != nil {
						t.Fatal(err)
					}
					nettest.Run(t, command, "-t", "nat", "-N", "KUBE-SERVICES")
					stamp(true, "a chain")
					stamp(false, "nothing")
					nettest.Run(t, command, "-t", "nat", "-I", "PREROUTING", "-j", "KUBE-SERVICES")
					stamp(true, "a jump")
					nettest.Run(t, command+"-save", "-t", "nat")
					nettest.Run(t, command, "-t", "nat", "-S", "PREROUTING")
					stamp(false, "looking")
					nettest.Run(t, command, "-t", "nat", "-D", "PREROUTING", "-j", "KUBE-SERVICES")
					stamp(true, "the end of the jump")
					nettest.Run(t, command, "-t", "nat", "-A", "OUTPUT", "-j", "KUBE-SERVICES")
					stamp(true, "a jump elsewhere")
				})
			})
		}
	}
}

func FuzzParseGeneration(f *testing.F) {
	f.Add([]byte{0, 0, 0, 0, 8, 0, 1, 0, 0, 0, 0, 7, 8, 0, 2, 0, 0, 0, 1, 2})
	f.Add([]byte{0, 0, 0, 0, 8, 0, 1})
	f.Fuzz(func(t *testing.T, m []byte) {
		if id, ok := parseGeneration(m); !ok && id != 0 {
			t.Errorf("no generation, and it is %d", id)
		}
	})
}

func BenchmarkStamp(b *testing.B) {
	for v, feature := range map[Variant]nettest.Feature{NFT: nettest.NftNAT, Legacy: nettest.LegacyNAT} {
		b.Run(string(v), func(b *testing.B) {
			nettest.Need(b, nettest.Root, feature)
			tables, err := Open(v, V4)
			if err != nil {
				b.Fatal(err)
			}
			nettest.Run(b, "iptables-"+string(v), "-t", "nat", "-S")
			for b.Loop() {
				if _, err := tables.Stamp("nat"); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}
