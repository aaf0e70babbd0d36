package maglev

import (
	"math"
	"math/rand/v2"
	"net/netip"
	"slices"
	"strconv"
	"testing"

	"github.com/ravel-lb/ravel"
	"github.com/ravel-lb/ravel/internal/nettest"
)

func TestMain(m *testing.M) { nettest.Main(m) }

// service returns a service on 192.0.2.1:80 with real servers of these weights, 10.8.0.1 and so on.
func service(weights ...int) ravel.VirtualService {
	v := ravel.VirtualService{
		Key:       ravel.ServiceKey{VIP: netip.MustParseAddr("192.0.2.1"), Proto: ravel.TCP, Port: 80},
		Scheduler: ravel.MH, Flags: ravel.HashPort | ravel.Fallback,
	}
	addr := netip.MustParseAddr("10.8.0.1")
	for _, w := range weights {
		v.RealServers = append(v.RealServers, ravel.RealServer{Addr: addr, Weight: w, LastWeight: w})
		addr = addr.Next()
	}
	return v
}

// even returns n equal weights.
func even(n, weight int) []int { return slices.Repeat([]int{weight}, n) }

// with returns the service with its real servers changed by fn.
func with(v ravel.VirtualService, fn func([]ravel.RealServer) []ravel.RealServer) ravel.VirtualService {
	v.RealServers = fn(slices.Clone(v.RealServers))
	return v
}

func TestSizes(t *testing.T) {
	for i, s := range Sizes() {
		if s.Index() != 8+i || SizeOf(8+i) != s {
			t.Errorf("size %d: index %d and back %d, want %d", s, s.Index(), SizeOf(s.Index()), 8+i)
		}
	}
	if DefaultSize.Index() != 12 {
		t.Errorf("index of the default %d, want 12", DefaultSize.Index())
	}
	for _, none := range []int{-1, 0, 7, 18} {
		if SizeOf(none) != 0 || Size(none).Index() != 0 {
			t.Errorf("%d is a size or the index of one", none)
		}
	}
	Sizes()[0] = 1
	if Sizes()[0] != 251 {
		t.Error("a caller changed the sizes")
	}
}

// While the turns add up to a quarter of the table at most, a real server's slots are its share of them, but for what
// the last round does not give everyone and for one slot.
func TestSharesAreEven(t *testing.T) {
	for _, size := range Sizes() {
		for range 20 {
			most, sum := 1<<(size.Index()/2)-1, 0
			var weights []int
			for {
				w := 1 + rand.IntN(most)
				if sum+w > int(size)/4 {
					break
				}
				weights, sum = append(weights, w), sum+w
			}
			weights[0] = 1 // so that nothing has a common divisor
			sum = 0
			for _, w := range weights {
				sum += w
			}
			rounds := int(size) / sum // that all have their turns in
			slots := Build(size, service(weights...)).Slots()
			for i, n := range slots {
				if n < rounds*weights[i] || n > (rounds+1)*weights[i] {
					t.Errorf("%d slots, weights %v: real server %d owns %d, want %d to %d",
						size, weights, i, n, rounds*weights[i], (rounds+1)*weights[i])
				}
			}
		}
	}
}

// 100 real servers of 62 and 63 pods: unscaled, the tail of the list owns nothing; scaled as Ravel scales them, all do.
func TestHundredOf62And63(t *testing.T) {
	var raw, scaled []int
	sum := 50*62 + 50*63
	for i := range 100 {
		raw = append(raw, 62+i%2)
		scaled = append(scaled, raw[i]*(4093/4)/sum)
	}
	empty := func(slots []int) (n int) {
		for _, s := range slots {
			if s == 0 {
				n++
			}
		}
		return n
	}
	if n := empty(Build(DefaultSize, service(raw...)).Slots()); n != 34 {
		t.Errorf("unscaled, %d real servers own nothing, want 34 as in the kernel", n)
	}
	slots := Build(DefaultSize, service(scaled...)).Slots()
	t.Logf("slots: %v", slots)
	if least, most := slices.Min(slots), slices.Max(slots); least < 40 || most > 41 {
		t.Errorf("scaled, real servers own %d to %d slots, want 40 or 41", least, most)
	}
}

func TestWeights(t *testing.T) {
	for _, test := range []struct {
		name    string
		weights []int
		same    []int // weights that give the same table
	}{
		{"only ratios count", []int{30, 60, 90}, []int{1, 2, 3}},
		{"63 is exact, 64 is halved", []int{64, 1, 33}, []int{32, 1, 16}},
		{"nobody is halved to nothing", []int{6500, 1}, []int{50, 1}},
		{"a negative weight is none", []int{5, -7, 1}, []int{5, 0, 1}},
	} {
		got, want := Build(DefaultSize, service(test.weights...)), Build(DefaultSize, service(test.same...))
		if !slices.Equal(got.owners, want.owners) {
			t.Errorf("%s: %v and %v differ: slots %v and %v", test.name, test.weights, test.same, got.Slots(), want.Slots())
		}
	}
}

// A real server that drains keeps its slots, and its flows go to the others; one that has never had a weight owns none.
func TestDrain(t *testing.T) {
	before := Build(DefaultSize, service(even(10, 5)...))
	drained := with(service(even(10, 5)...), func(reals []ravel.RealServer) []ravel.RealServer {
		reals[3].Weight = 0
		return reals
	})
	during := Build(DefaultSize, drained)
	if !slices.Equal(before.owners, during.owners) {
		t.Error("a drain moved slots")
	}
	drained.Flags &^= ravel.Fallback
	strict := Build(DefaultSize, drained)
	took := make([]int, 10)
	for port := range uint16(20000) {
		client := netip.AddrPortFrom(netip.MustParseAddr("198.51.100.7"), 1024+port)
		was, _ := before.Pick(client)
		is, ok := during.Pick(client)
		if next, _ := before.PickBut(client, 3); !ok || next != is {
			t.Fatalf("%s: %d takes it, PickBut said %d", client, is, next)
		}
		switch only, ok := strict.Pick(client); {
		case was == 3 && (ok || only != -1):
			t.Fatalf("%s: %d takes it without the flag Fallback", client, only)
		case was != 3 && (is != was || only != was):
			t.Fatalf("%s moved from %d to %d and %d", client, was, is, only)
		}
		if was == 3 {
			took[is]++
		}
	}
	if took[3] = slices.Max(took); slices.Min(took) < 2000/9/2 {
		t.Errorf("the flows of the one went to the others unevenly: %v", took)
	}

	never := Build(DefaultSize, with(drained, func(reals []ravel.RealServer) []ravel.RealServer {
		reals[3].LastWeight = 0
		return reals
	}))
	if n := never.Slots()[3]; n != 0 {
		t.Errorf("a real server that never had a weight owns %d slots", n)
	}
}

// A removal takes the slots of the one and moves few others; so does another order.
func TestChangesMoveFew(t *testing.T) {
	v := service(even(50, 1)...)
	before := Build(DefaultSize, v)
	for _, test := range []struct {
		name  string
		reals func([]ravel.RealServer) []ravel.RealServer
		most  int // slots
	}{
		{"removal", func(r []ravel.RealServer) []ravel.RealServer { return slices.Delete(r, 20, 21) }, 4093 / 20},
		{"one that comes back goes to the head", func(r []ravel.RealServer) []ravel.RealServer {
			return slices.Insert(slices.Delete(slices.Clone(r), 30, 31), 0, r[30])
		}, 4093 / 40},
		{"reverse order", func(r []ravel.RealServer) []ravel.RealServer { slices.Reverse(r); return r }, 4093 / 20},
	} {
		after := Build(DefaultSize, with(v, test.reals))
		slots, share := Moved(before, after)
		if slots == 0 || slots > test.most || math.Abs(share-float64(slots)/4093) > 1e-9 {
			t.Errorf("%s: %d slots moved (%.2f %% of the flows), want 1 to %d", test.name, slots, 100*share, test.most)
		}
	}
}

// A client that cannot be one of the service, a list that no kernel takes: nothing panics, nobody takes the flow.
func TestOddities(t *testing.T) {
	v4, v6 := netip.MustParseAddrPort("198.51.100.7:4000"), netip.MustParseAddrPort("[2001:db8::7%eth0]:4000")
	mapped := netip.AddrPortFrom(netip.MustParseAddr("::ffff:198.51.100.7"), 4000)
	table := Build(DefaultSize, service(1, 2, 3))
	if table.Slot(v4) < 0 || table.Slot(v4) != table.Slot(mapped) {
		t.Errorf("slots %d and %d of an IPv4 client", table.Slot(v4), table.Slot(mapped))
	}
	for _, client := range []netip.AddrPort{v6, {}} {
		if i, ok := table.Pick(client); ok || i != -1 || table.Slot(client) != -1 {
			t.Errorf("%s: %d takes it (slot %d)", client, i, table.Slot(client))
		}
	}
	if i, ok := table.Pick(netip.AddrPortFrom(v4.Addr(), 20)); ok || i != -1 {
		t.Errorf("%d takes a flow from port 20, which IPVS does not schedule", i)
	}
	six := sample(true)
	if a, b := Build(DefaultSize, six).Slot(v6), Build(DefaultSize, six).Slot(netip.AddrPortFrom(v6.Addr().WithZone(""), 4000)); a < 0 || a != b {
		t.Errorf("slots %d and %d of an IPv6 client with and without a zone", a, b)
	}

	for name, table := range map[string]*Table{
		"no real server":                 Build(DefaultSize, service()),
		"no weight":                      Build(DefaultSize, service(0, 0)),
		"more real servers than slots":   Build(251, service(even(252, 1)...)),
		"a size that no kernel has":      Build(4096, service(1)),
		"a negative size":                Build(-1, service(1)),
		"no size, and a service of none": Build(0, ravel.VirtualService{}),
	} {
		for _, slot := range []int{-1, 0, 250, 1 << 20} {
			if table.Owner(slot) != -1 {
				t.Errorf("%s: slot %d has an owner", name, slot)
			}
		}
		if i, ok := table.Pick(v4); ok || i != -1 {
			t.Errorf("%s: %d takes a flow", name, i)
		}
		Moved(table, Build(DefaultSize, service(1, 2)))
		Moved(Build(251, service(1, 2)), table)
		table.Slots()
	}
	if full := Build(251, service(even(251, 1)...)); slices.Min(full.Slots()) != 1 {
		t.Error("as many real servers as slots: one has none")
	}

	random := rand.New(rand.NewPCG(1, 2))
	for range 300 {
		v := sample(random.IntN(2) == 0)
		for i := range v.RealServers {
			rs := &v.RealServers[i]
			rs.Weight, rs.LastWeight = random.IntN(200000)-100000, random.IntN(200000)-100000
			rs.Addr = []netip.Addr{{}, v4.Addr(), v6.Addr(), mapped.Addr(), rs.Addr}[random.IntN(5)]
		}
		if random.IntN(10) == 0 {
			v.Key.VIP = netip.Addr{}
		}
		table := Build(251, v)
		for _, client := range []netip.AddrPort{v4, v6, mapped, {}} {
			if i, ok := table.Pick(client); ok && v.RealServers[i].Weight <= 0 {
				t.Errorf("one of weight %d takes a flow", v.RealServers[i].Weight)
			}
		}
		Moved(table, table)
		Digest(251, v)
	}
}

func TestPickDoesNotAllocate(t *testing.T) {
	table := Build(DefaultSize, sample(true))
	flows := clients(true)
	n := testing.AllocsPerRun(10, func() {
		for _, client := range flows {
			table.Pick(client)
			table.PickBut(client, 1, 2, 3)
		}
	})
	if n != 0 {
		t.Errorf("%v allocations", n)
	}
}

func BenchmarkBuild(b *testing.B) {
	var weights []int
	for i := range 100 {
		weights = append(weights, 10+i%2)
	}
	for _, size := range []Size{4093, 65521} {
		b.Run(strconv.Itoa(int(size)), func(b *testing.B) {
			b.ReportAllocs()
			v := service(weights...)
			for b.Loop() {
				Build(size, v)
			}
		})
	}
}

func BenchmarkPick(b *testing.B) {
	for _, drained := range []bool{false, true} {
		name := "owner"
		if drained {
			name = "fallback"
		}
		b.Run(name, func(b *testing.B) {
			v := service(even(100, 1)...)
			for i := range v.RealServers {
				if drained && i%2 == 0 {
					v.RealServers[i].Weight = 0
				}
			}
			table, flows := Build(DefaultSize, v), clients(false)
			b.ReportAllocs()
			for i := 0; b.Loop(); i++ {
				table.Pick(flows[i%len(flows)])
			}
		})
	}
}

func BenchmarkDigest(b *testing.B) {
	v := service(even(100, 1)...)
	b.ReportAllocs()
	for b.Loop() {
		Digest(DefaultSize, v)
	}
}

func BenchmarkMoved(b *testing.B) {
	before, after := Build(DefaultSize, service(even(100, 1)...)), Build(DefaultSize, service(even(99, 1)...))
	for b.Loop() {
		Moved(before, after)
	}
}
