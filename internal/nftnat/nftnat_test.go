package nftnat

import (
	"encoding/binary"
	"fmt"
	"math/rand/v2"
	"net"
	"net/netip"
	"runtime"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"

	"github.com/ravel-lb/ravel"
	"github.com/ravel-lb/ravel/internal/nettest"
)

func TestMain(m *testing.M) { nettest.Main(m) }

const (
	flow, masq = 0x1000, 0x4000
	theirs     = 9000 // where kube-proxy's rules lead
)

var (
	vips  = []netip.Addr{netip.MustParseAddr("192.0.2.1"), netip.MustParseAddr("2001:db8:2::1")}
	hosts = []netip.Addr{netip.MustParseAddr("198.51.100.1"), netip.MustParseAddr("2001:db8:1::1")}
)

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// wire makes a client beside this namespace, which holds the VIPs.
func wire(t *testing.T) (client string) {
	client = fmt.Sprintf("client%d", rand.Uint32())
	nettest.Shell(t, fmt.Sprintf(`
		ip link set lo up
		ip netns add %[1]s
		ip link add wire0 type veth peer name wire0 netns %[1]s
		ip addr add 198.51.100.1/24 dev wire0
		ip addr add 2001:db8:1::1/64 dev wire0 nodad
		ip addr add 192.0.2.1/32 dev lo
		ip addr add 2001:db8:2::1/128 dev lo nodad
		ip link set wire0 up
		ip -n %[1]s addr add 198.51.100.2/24 dev wire0
		ip -n %[1]s addr add 2001:db8:1::2/64 dev wire0 nodad
		ip -n %[1]s link set lo up
		ip -n %[1]s link set wire0 up
		ip -n %[1]s route add 192.0.2.0/24 via 198.51.100.1
		ip -n %[1]s route add 2001:db8:2::/64 via 2001:db8:1::1`, client))
	t.Cleanup(func() { nettest.Run(t, "ip", "netns", "del", client) })
	return client
}

// serve answers on a port of both of this host's addresses, by TCP and UDP, with the port.
func serve(t *testing.T, port uint16) {
	var wg sync.WaitGroup
	t.Cleanup(wg.Wait)
	for _, a := range hosts {
		at := netip.AddrPortFrom(a, port)
		l, err := net.Listen("tcp", at.String())
		must(t, err)
		t.Cleanup(func() { _ = l.Close() })
		wg.Go(func() {
			for {
				c, err := l.Accept()
				if err != nil {
					return
				}
				_, _ = fmt.Fprint(c, port)
				_ = c.Close()
			}
		})
		u, err := net.ListenUDP("udp", net.UDPAddrFromAddrPort(at))
		must(t, err)
		t.Cleanup(func() { _ = u.Close() })
		wg.Go(func() {
			b := make([]byte, 100)
			for {
				_, from, err := u.ReadFromUDP(b)
				if err != nil {
					return
				}
				_, _ = u.WriteToUDP(fmt.Append(nil, port), from)
			}
		})
	}
}

// ask asks a key from the client's namespace, and returns the port that answered.
func ask(t *testing.T, client string, key ravel.ServiceKey) (answer string) {
	t.Helper()
	done := make(chan error)
	go func() {
		runtime.LockOSThread() // and never unlocked: the thread goes
		ns, err := netns.GetFromName(client)
		if err == nil {
			err = netns.Set(ns)
			_ = ns.Close()
		}
		if err == nil {
			err = func() error {
				c, err := net.DialTimeout(key.Proto.String(), netip.AddrPortFrom(key.VIP, key.Port).String(), 5*time.Second)
				if err != nil {
					return err
				}
				defer func() { _ = c.Close() }()
				_ = c.SetDeadline(time.Now().Add(5 * time.Second))
				if key.Proto == ravel.UDP {
					if _, err := c.Write([]byte("?")); err != nil {
						return err
					}
				}
				b := make([]byte, 20)
				n, err := c.Read(b)
				answer = string(b[:n])
				return err
			}()
		}
		done <- err
	}()
	if err := <-done; err != nil {
		t.Fatalf("asking %s: %v", key, err)
	}
	return answer
}

// kubeProxyStarts makes kube-proxy's hook, anew if it is there, with a rule that takes all that is for a VIP.
func kubeProxyStarts(t testing.TB) {
	t.Helper()
	for i, family := range []uint8{unix.NFPROTO_IPV4, unix.NFPROTO_IPV6} {
		of := New(i == 1, true, flow, masq, nil)
		b := newBatch(family)
		b.add(newTable, unix.NLM_F_CREATE, text(1, kubeProxy))
		b.add(delTable, 0, text(1, kubeProxy))
		b.add(newTable, unix.NLM_F_CREATE, text(1, kubeProxy))
		dstnat := int32(-100)
		b.add(newChain, unix.NLM_F_CREATE, text(1, kubeProxy), text(3, "nat-prerouting"),
			nest(4, number(1, 0), number(2, uint32(dstnat))), text(7, "nat"))
		offset := []uint32{16, 24}[i]
		b.add(newRule, unix.NLM_F_CREATE|unix.NLM_F_APPEND, text(1, kubeProxy), text(2, "nat-prerouting"), nest(4,
			expr("payload", number(1, regKey), number(2, 1), number(3, offset), number(4, of.size())),
			expr("cmp", number(1, regKey), number(2, 0), value(3, vips[i].AsSlice())),
			expr("immediate", number(1, regKey), value(2, hosts[i].AsSlice())),
			expr("immediate", number(1, regMark), value(2, binary.BigEndian.AppendUint16(nil, theirs))),
			expr("nat", number(1, 1), number(2, uint32(family)), number(3, regKey), number(5, regMark))))
		must(t, b.send())
	}
}

func tables(noMasq ...netip.Prefix) []*Table {
	var all []*Table
	for _, v6 := range []bool{false, true} {
		var of []netip.Prefix
		for _, p := range noMasq {
			if p.Addr().Is6() == v6 {
				of = append(of, p)
			}
		}
		all = append(all, New(v6, true, flow, masq, of))
	}
	return all
}

// redirect leads a port of a VIP to ports of this host.
func redirect(family int, proto ravel.Proto, port uint16, pods ...uint16) ravel.Redirect {
	r := ravel.Redirect{Key: ravel.ServiceKey{VIP: vips[family], Proto: proto, Port: port}}
	for _, p := range pods {
		r.Pods = append(r.Pods, netip.AddrPortFrom(hosts[family], p))
	}
	return r
}

// A kube-proxy that knows the VIP has the younger hook after each of its starts, and takes what iptables would redirect;
// with our table ours are redirected all the same, and what is not ours is left to it.
func TestBeforeKubeProxy(t *testing.T) {
	nettest.Need(t, nettest.Root, nettest.NftNAT)
	nettest.InNetns(t, func() {
		client := wire(t)
		for _, port := range []uint16{8001, 8002, 8003, theirs} {
			serve(t, port)
		}
		for i, command := range []string{"iptables-nft", "ip6tables-nft"} {
			for _, proto := range []string{"tcp", "udp"} {
				nettest.Shell(t, fmt.Sprintf("%s -t nat -A PREROUTING -d %s -p %s --dport 80 -j DNAT --to-destination %s", command, vips[i], proto,
					netip.AddrPortFrom(hosts[i], 8001)))
			}
		}
		both := tables()
		asks := func(when string, port uint16, times int, want ...string) {
			t.Helper()
			// A datagram from a port that was used before would belong to that flow.
			nettest.Shell(t, "conntrack -F 2>/dev/null; conntrack -F -f ipv6 2>/dev/null; true")
			for i := range both {
				for _, proto := range []ravel.Proto{ravel.TCP, ravel.UDP} {
					seen := map[string]int{}
					for range times {
						seen[ask(t, client, ravel.ServiceKey{VIP: vips[i], Proto: proto, Port: port})]++
					}
					for _, w := range want {
						if seen[w] == 0 {
							t.Fatalf("%s: %s port %d of %s is answered by %v, want each of %v", when, proto, port, vips[i], seen, want)
						}
						delete(seen, w)
					}
					if len(seen) > 0 {
						t.Fatalf("%s: %s port %d of %s is answered by %v too", when, proto, port, vips[i], seen)
					}
				}
			}
		}
		apply := func(port uint16, pods ...uint16) {
			t.Helper()
			for i, one := range both {
				must(t, one.Apply([]ravel.Redirect{redirect(i, ravel.TCP, port, pods...), redirect(i, ravel.UDP, port, pods...)}))
			}
		}
		needed := func(want bool) {
			t.Helper()
			for _, one := range both {
				if got, err := one.Needed(); got != want || err != nil {
					t.Fatalf("needed is %t, %v", got, err)
				}
			}
		}
		needed(false)
		asks("without kube-proxy", 80, 1, "8001")
		kubeProxyStarts(t)
		needed(true)
		asks("iptables alone", 80, 1, "9000") // this is why
		apply(80, 8001)
		asks("one pod", 80, 3, "8001")
		asks("another port", 81, 1, "9000")
		kubeProxyStarts(t)
		asks("kube-proxy started again", 80, 3, "8001")
		apply(80, 8002, 8003)
		asks("two other pods", 80, 40, "8002", "8003")
		apply(80, 8001, 8002, 8003)
		asks("three", 80, 60, "8001", "8002", "8003")
		for i, one := range both {
			if lost, err := one.Lost(); lost || err != nil {
				t.Fatalf("lost is %t, %v", lost, err)
			}
			b := newBatch([]uint8{unix.NFPROTO_IPV4, unix.NFPROTO_IPV6}[i]) // as nft flush ruleset
			b.add(delTable, 0, text(1, table))
			must(t, b.send())
			if lost, err := one.Lost(); !lost || err != nil {
				t.Fatalf("flushed: lost is %t, %v", lost, err)
			}
		}
		asks("flushed", 80, 1, "9000")
		apply(80, 8001, 8002, 8003)
		asks("made again", 80, 60, "8001", "8002", "8003")
		apply(81, 8003)
		asks("another key", 81, 2, "8003")
		asks("the key before", 80, 1, "9000")
		for _, one := range both {
			would, err := one.Remove(true)
			must(t, err)
			did, err := one.Remove(false)
			must(t, err)
			if len(did) != 1 || did[0] != would[0] || one.Held() {
				t.Fatalf("would %q, did %q", would, did)
			}
			if again, err := one.Remove(false); err != nil || len(again) != 0 {
				t.Fatalf("removed again: %q, %v", again, err)
			}
		}
		asks("removed", 81, 1, "9000")
		nettest.Run(t, "iptables-nft-save")
	})
}

// A masqueraded flow's packets carry both marks, but not those of sources that are exempt.
func TestMarks(t *testing.T) {
	nettest.Need(t, nettest.Root, nettest.NftNAT)
	nettest.InNetns(t, func() {
		client := wire(t)
		serve(t, 8001)
		for _, command := range []string{"iptables-nft", "ip6tables-nft"} {
			nettest.Shell(t, command+" -t mangle -A INPUT -m mark --mark 0x4000/0x4000 -m connmark --mark 0x1000/0x1000; "+
				command+" -t mangle -A INPUT -m mark ! --mark 0x4000/0x4000 -m connmark --mark 0x1000/0x1000")
		}
		for exempt, list := range map[bool][]netip.Prefix{
			false: {netip.MustParsePrefix("10.0.0.0/9"), netip.MustParsePrefix("fd00::/9")},
			true:  {netip.MustParsePrefix("10.0.0.0/9"), netip.MustParsePrefix("198.51.100.0/25"), netip.MustParsePrefix("2001:db8:1::/63")},
		} {
			for i, one := range tables(list...) {
				r := redirect(i, ravel.TCP, 80, 8001)
				r.Masquerade = true
				must(t, one.Apply([]ravel.Redirect{r}))
				command := []string{"iptables-nft", "ip6tables-nft"}[i]
				nettest.Run(t, command, "-t", "mangle", "-Z")
				if got := ask(t, client, r.Key); got != "8001" {
					t.Fatalf("answered by %s", got)
				}
				rules := nettest.Run(t, command+"-save", "-c", "-t", "mangle")
				marked := !strings.Contains(rules, "[0:0] -A INPUT -m mark --mark")
				plain := !strings.Contains(rules, "[0:0] -A INPUT -m mark ! --mark")
				if marked == exempt || !marked && !plain {
					t.Errorf("exempt %t: to masquerade %t, not to %t\n%s", exempt, marked, plain, rules)
				}
			}
		}
	})
}

// From any state to any other, in steps and anew: what leads where is what was asked for last.
func TestWalk(t *testing.T) {
	nettest.Need(t, nettest.Root, nettest.NftNAT)
	nettest.InNetns(t, func() {
		client := wire(t)
		ports := []uint16{8001, 8002, 8003}
		for _, port := range append(ports, theirs) {
			serve(t, port)
		}
		kubeProxyStarts(t)
		seed := rand.Uint64()
		t.Logf("seed %d", seed)
		rng := rand.New(rand.NewPCG(seed, 0))
		both := tables()
		for range 25 {
			i := rng.IntN(2)
			var list []ravel.Redirect
			for port := range uint16(3) {
				r := redirect(i, ravel.TCP, 80+port, ports[:rng.IntN(4)]...)
				r.Masquerade = rng.IntN(3) == 0
				list = append(list, r)
			}
			if rng.IntN(5) == 0 {
				both[i] = tables()[i] // another process
			}
			must(t, both[i].Apply(list))
			for _, r := range list {
				want := map[string]bool{"9000": len(r.Pods) == 0}
				for _, pod := range r.Pods {
					want[fmt.Sprint(pod.Port())] = true
				}
				for range 4 {
					if got := ask(t, client, r.Key); !want[got] {
						t.Fatalf("%s is answered by %s, want one of %v", r.Key, got, want)
					}
				}
			}
		}
	})
}

// Each pod has its share, within an eighth, and one slot at least.
func TestShares(t *testing.T) {
	for n := 1; n <= 250; n++ {
		r := redirect(0, ravel.TCP, 80)
		for i := range n {
			r.Pods = append(r.Pods, netip.AddrPortFrom(netip.AddrFrom4([4]byte{10, 0, 0, byte(i)}), 80))
		}
		for name, list := range elementsOf(r) {
			shares := map[string]int{}
			for _, e := range list {
				shares[e.data]++
			}
			least, most := len(list), 0
			for _, s := range shares {
				least, most = min(least, s), max(most, s)
			}
			if len(shares) != n || n <= 128 && float64(most) > 1.13*float64(least) {
				t.Errorf("%d pods in %s: %d have slots, %d to %d each", n, name, len(shares), least, most)
			}
		}
	}
}

func FuzzParseAnswers(f *testing.F) {
	good := make([]byte, 36)
	binary.NativeEndian.PutUint32(good, 36)
	binary.NativeEndian.PutUint16(good[4:], unix.NLMSG_ERROR)
	binary.NativeEndian.PutUint32(good[8:], 7)
	f.Add(good, uint32(7))
	f.Add(good[:18], uint32(7))
	f.Fuzz(func(t *testing.T, b []byte, last uint32) {
		if done, err := parseAnswers(b, last); done && err != nil {
			t.Errorf("done with %v", err)
		}
	})
}

// One of 1,000 redirects gets another pod; and all anew.
func BenchmarkApply(b *testing.B) {
	nettest.Need(b, nettest.Root, nettest.NftNAT)
	var list []ravel.Redirect
	for i := range 1000 {
		r := redirect(0, ravel.TCP, uint16(1+i), 1, 2, 3)
		list = append(list, r)
	}
	for _, anew := range []bool{false, true} {
		b.Run(fmt.Sprintf("anew=%t", anew), func(b *testing.B) {
			one := tables()[0]
			must(b, one.Apply(list))
			for n := 0; b.Loop(); n++ {
				list[500].Pods = redirect(0, ravel.TCP, 1, 1, 2, uint16(3+n%2)).Pods
				if anew {
					one = tables()[0]
				}
				must(b, one.Apply(list))
			}
			_, err := one.Remove(false)
			must(b, err)
		})
	}
}
