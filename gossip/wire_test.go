package gossip

import (
	"encoding/hex"
	"errors"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/ravel-lb/ravel"
)

// golden are messages as release 1 sends them. What they are is never changed: a later release adds its own.
func golden() map[string][]byte {
	me, from := "d1", netip.MustParseAddrPort("192.0.2.1:7946")
	var cells []byte
	for _, c := range goldenCells() {
		cells = appendCell(cells, 1, c)
	}
	meta, _ := marshalMeta(goldenMeta)
	return map[string][]byte{
		"delta":   seal(deltaKind, me, from, appendVarint(appendFixed(cells, 2, 77), 3, 1)),
		"ack":     seal(ackKind, me, from, appendFixed(nil, 1, 77)),
		"summary": seal(summaryKind, me, from, appendFixed(appendFixed(nil, 1, 0x0123456789abcdef), 2, 99)),
		"same":    seal(sameKind, me, netip.MustParseAddrPort("[2001:db8::1]:7946"), appendFixed(nil, 2, 99)),
		"digest":  seal(digestKind, me, from, marshalDigest(goldenDigest())),
		"hello":   seal(helloKind, me, from, nil),
		"meta":    meta,
	}
}

var goldenMeta = meta{
	role: ravel.Realserver, wire: 1, version: "v1.2.3", phase: restarting,
	addrs: []netip.Addr{netip.MustParseAddr("192.0.2.1"), netip.MustParseAddr("2001:db8::1")},
}

func goldenDigest() digest {
	n := node{span: span{1, 62}}
	for i := range fanout {
		n.sums = append(n.sums, uint64(i)<<56|uint64(i))
	}
	return digest{
		nodes:  []node{n},
		leaves: []leaf{{span{4, 1<<24 - 1}, []uint64{1, 2, 3}}, {span: span{2, 7}}},
		wants:  []leaf{{span{1, 5}, []uint64{1 << 63}}},
	}
}

func goldenReport() ravel.Report {
	v4, v6 := netip.MustParseAddr("192.0.2.9"), netip.MustParseAddr("2001:db8::9")
	tcp, udp := ravel.ServiceKey{VIP: v4, Proto: ravel.TCP, Port: 80}, ravel.ServiceKey{VIP: v6, Proto: ravel.UDP, Port: 53}
	return ravel.Report{
		Services:  map[ravel.ServiceKey]ravel.ServiceReport{tcp: {Wish: 1, Table: 2, Available: 3}},
		Uses:      map[netip.Addr][]ravel.ServiceKey{v4: {tcp, udp}},
		Health:    map[netip.Addr]ravel.Health{v6: ravel.Silent},
		Sessions:  map[netip.Addr]bool{v4: true, netip.MustParseAddr("fe80::1%eth0"): false},
		TableSize: 4093,
		Redirects: map[ravel.ServiceKey]bool{udp: true},
	}
}

func goldenCells() []*cell {
	addr := netip.MustParseAddr("192.0.2.10")
	k := ravel.ServiceKey{VIP: netip.MustParseAddr("2001:db8::9"), Proto: ravel.UDP, Port: 53}
	cells := []*cell{
		entryCell(serviceName(k), ravel.RosterEntry{Addr: addr, Birth: 300, Rev: 4, State: ravel.Draining, Weight: 63, By: "d2", Unknown: "\x4a\x02hi"}),
		entryCell(serviceName(k), ravel.RosterEntry{Addr: k.VIP, Birth: 1, State: ravel.Joining}),
		registerCell("freeze", ravel.Register{Stamp: 9, Value: "on", By: "d1"}),
		newCell(key{topicDirector, "d1", ""}, rank{5, 1}, lifeValue(up), ""),
		newCell(key{topicRealserver, "r1", ""}, rank{5, 1}, lifeValue(leaving), ""),
		newCell(key{topicUses, "d1", addrName(addr)}, rank{5, 300}, "", "\x4a\x01x"), // a tombstone with a field of a newer release
	}
	values := reportValues(goldenReport())
	n := uint64(1)
	for _, c := range []cellName{
		{topicService, serviceName(ravel.ServiceKey{VIP: netip.MustParseAddr("192.0.2.9"), Proto: ravel.TCP, Port: 80})},
		{topicUses, addrName(netip.MustParseAddr("192.0.2.9"))},
		{topicHealth, addrName(netip.MustParseAddr("2001:db8::9"))},
		{topicSelf, ""},
		{topicRedirect, serviceName(k)},
	} {
		n++
		cells = append(cells, newCell(key{c.topic, "d1", c.name}, rank{5, n}, values[c], ""))
	}
	return cells
}

// Messages of release 1 are read as what they were meant to say, and written to the bit.
func TestGolden(t *testing.T) {
	for name, b := range golden() {
		path := filepath.Join("testdata", "release-1", name+".hex")
		text, err := os.ReadFile(path)
		if errors.Is(err, fs.ErrNotExist) && os.Getenv("GOSSIP_WRITE_GOLDEN") != "" {
			var lines strings.Builder
			for h := hex.EncodeToString(b); len(h) > 0; {
				n := min(96, len(h))
				lines.WriteString(h[:n] + "\n")
				h = h[n:]
			}
			if err := os.WriteFile(path, []byte(lines.String()), 0o644); err != nil {
				t.Fatal(err)
			}
			continue
		}
		if err != nil {
			t.Fatal(err)
		}
		old, err := hex.DecodeString(strings.ReplaceAll(string(text), "\n", ""))
		if err != nil {
			t.Fatal(err)
		}
		if !reflect.DeepEqual(old, b) {
			t.Errorf("%s is written otherwise than by release 1:\n%x\nwant\n%x", name, b, old)
		}
		if name == "meta" {
			if m, ok := parseMeta(old); !ok || !reflect.DeepEqual(m, goldenMeta) {
				t.Errorf("meta reads %+v", m)
			}
			continue
		}
		e, ok := open(old)
		if !ok || e.sender != "d1" || e.version != 1 || e.kind.String() != name || e.from.Port() != 7946 {
			t.Fatalf("%s opens as %+v", name, e)
		}
		switch e.kind {
		case deltaKind:
			d, ok := parseDelta(e.body)
			if !ok || d.seq != 77 || !d.answer || d.bad != 0 || !reflect.DeepEqual(d.cells, goldenCells()) {
				t.Errorf("delta reads %+v", d)
			}
			s := newStore(100, true)
			s.setPresent("d1", true)
			for _, c := range d.cells {
				if c.author != "r1" {
					s.put(c)
				}
			}
			v := newView("")
			r := refresh{view: &v, store: s}
			for k := range s.dirty {
				r.cell(k)
			}
			if diff := cmp.Diff(goldenReport(), v.reports["d1"], exact); diff != "" || r.bad != 0 {
				t.Errorf("the report reads (-want +got), %d bad:\n%s", r.bad, diff)
			}
			roster := v.rosters[ravel.ServiceKey{VIP: netip.MustParseAddr("2001:db8::9"), Proto: ravel.UDP, Port: 53}]
			want := ravel.Roster{
				{Addr: netip.MustParseAddr("192.0.2.10"), Birth: 300, Rev: 4, State: ravel.Draining, Weight: 63, By: "d2", Unknown: "\x4a\x02hi"},
				{Addr: netip.MustParseAddr("2001:db8::9"), Birth: 1, State: ravel.Joining},
			}
			if diff := cmp.Diff(want, roster, exact); diff != "" || !(ravel.Fleet{Registers: v.registers}).Frozen() {
				t.Errorf("the roster reads (-want +got):\n%s; registers %v", diff, v.registers)
			}
		case ackKind, summaryKind, sameKind:
			want := map[kind][2]uint64{ackKind: {77, 0}, summaryKind: {0x0123456789abcdef, 99}, sameKind: {0, 99}}
			if n, m, ok := parseSums(e.body); !ok || [2]uint64{n, m} != want[e.kind] {
				t.Errorf("%s reads %x, %x", name, n, m)
			}
		case digestKind:
			if d, ok := parseDigest(e.body); !ok || !reflect.DeepEqual(d, goldenDigest()) {
				t.Errorf("digest reads %+v", d)
			}
		}
	}
}

// The hash of a cell is part of the format: members of all releases compare them.
func TestHashIsTheFormats(t *testing.T) {
	c := goldenCells()[0]
	if c.hash != 0x0f96bc02ae2b0947 || c.spot != 0x1f8eec10ff5e9993 {
		t.Errorf("hash %#x, spot %#x", c.hash, c.spot)
	}
}

// At equal rank the higher state of a roster's entry counts.
func TestHigherStateCounts(t *testing.T) {
	for state := ravel.Joining; state < ravel.Gone; state++ {
		lower := entryCell("s", ravel.RosterEntry{Addr: at(1).Addr(), Birth: 1, Rev: 1, State: state, Weight: 65535, By: "zzz"})
		higher := entryCell("s", ravel.RosterEntry{Addr: at(1).Addr(), Birth: 1, Rev: 1, State: state + 1})
		if higher.compare(lower) <= 0 {
			t.Errorf("%s counts more than %s", state, state+1)
		}
	}
}

// A member of the next release adds fields to cells, values, messages and its meta data, a topic of the fleet's and one
// of its own, and a kind of message. They form one fleet, and nothing is lost on its way through the older release.
func TestNextRelease(t *testing.T) {
	virtual(t, func(t *testing.T, w *world) {
		one := w.director(1)
		w.seeds = []string{one.addr.String()}
		c := w.config(2, ravel.Director)
		c.Transport = w.net.Transport(c.Bind)
		g, err := New(c)
		if err != nil {
			t.Fatal(err)
		}
		g.newer = string(appendText(appendVarint(nil, 1, 2), 99, "new")) // wire version 2 and a field
		two := w.run(g)
		three := w.director(3)
		for _, p := range []*process{one, two, three} {
			until(t, "they are one fleet", 10*time.Second, func() bool { return p.fleet().Settled && len(p.fleet().Members) == 3 })
		}
		if m, _ := three.fleet().Member("d2"); m.Wire != 2 {
			t.Errorf("d2 speaks %d", m.Wire)
		}
		// From now on 2 and 3 hear each other only by way of 1.
		w.net.Cut(func(a, b netip.AddrPort) bool { return a == at(2) && b == at(3) || a == at(3) && b == at(2) })
		two.Report(report(1))
		extra := string(appendText(nil, 50, "of release 2"))
		e := entry(5, 7, ravel.Active)
		e.Unknown = extra
		two.Write(service(1), []ravel.RosterEntry{e})
		until(t, "2 speaks", time.Second, func() bool { return two.fleet().Reports["d2"].TableSize != 0 })
		two.mu.Lock()
		life := two.store.author("d2").incarnation
		news := []*cell{
			newCell(key{99, "", "of the fleet"}, rank{1, 1}, "v", extra),
			newCell(key{100, "d2", "of its own"}, rank{life, 1000}, "v", extra),
			newCell(key{topicService, "d2", serviceName(service(3))}, rank{life, 1001}, string(appendFixed(nil, 1, 5))+extra, extra),
			newCell(key{topicRoster, "", "a name of another form"}, rank{1, 1}, "v", ""),
			newCell(key{topicRegister, "", "new"}, rank{1, 0}, string(appendText(nil, 1, "x"))+extra, extra),
		}
		for _, c := range news {
			two.writeLocked(c)
		}
		to := two.members["d1"].node
		two.mu.Unlock()
		two.send([]outgoing{
			{to, 77, seal(77, "d2", two.addr, []byte(extra))},
			{to, summaryKind, append(seal(sameKind, "d2", two.addr, []byte(extra)), extra...)},
			{to, deltaKind, append(appendVarint(nil, 1, 2), seal(deltaKind, "d2", two.addr, nil)[2:]...)},
		})
		for _, c := range news {
			until(t, "it comes by way of 1 as it was", 5*time.Second, func() bool {
				three.mu.Lock()
				defer three.mu.Unlock()
				got := three.store.cells[c.key]
				return got != nil && *got == *c && string(marshalCell(got)) == string(marshalCell(c))
			})
		}
		until(t, "3 shows what it can read", time.Second, func() bool {
			f := three.fleet()
			return f.Reports["d2"].Services[service(3)].Wish == 5 && f.Registers["new"].Value == "x" && len(f.Rosters[service(1)]) == 1
		})
		if one.dropped("kind") != 1 || one.dropped("version") != 1 || one.dropped("malformed") != 0 {
			t.Errorf("dropped for their kind %v, version %v, form %v", one.dropped("kind"), one.dropped("version"), one.dropped("malformed"))
		}
		// The older release writes about the entry, and keeps what it does not understand.
		e = three.fleet().Rosters[service(1)][0]
		e.Rev, e.State, e.By = e.Rev+1, ravel.Draining, "d3"
		three.Write(service(1), []ravel.RosterEntry{e})
		until(t, "2 hears of it", 5*time.Second, func() bool {
			r := two.fleet().Rosters[service(1)]
			return len(r) == 1 && r[0].State == ravel.Draining && r[0].Unknown == extra
		})
	})
}

func FuzzDecode(f *testing.F) {
	for _, b := range golden() {
		f.Add(b)
	}
	g, err := New(Config{Name: "me", Fleet: "f", Insecure: true, Bind: at(1), Addrs: []netip.Addr{at(1).Addr()}, MaxCells: 1000})
	if err != nil {
		f.Fatal(err)
	}
	for i, role := range []ravel.Role{ravel.Director, ravel.Director, ravel.Realserver} {
		m := &member{meta: meta{role: role, addrs: []netip.Addr{at(i).Addr()}}, name: []string{"me", "d1", "r1"}[i]}
		g.members[m.name] = m
		if role == ravel.Director {
			g.directors[m.name] = m
		}
		g.store.setPresent(m.name, true)
	}
	g.Report(report(1))
	g.settle.heard = true
	g.Report(report(2))
	f.Fuzz(func(t *testing.T, b []byte) {
		g.handle(b)
		g.handle(seal(deltaKind, "d1", netip.AddrPort{}, b))
		g.handle(seal(digestKind, "d1", netip.AddrPort{}, b))
		g.handle(seal(digestKind, "r1", netip.AddrPort{}, b))
		g.handle(seal(summaryKind, "r1", netip.AddrPort{}, b))
		g.handle(seal(deltaKind, "r1", netip.AddrPort{}, appendText(nil, 1, b)))
		g.mu.Lock()
		g.showLocked(time.Now())
		g.mu.Unlock()
		parseMeta(b)
		parseLife(string(b))
		parseSelf(string(b))
		parseKeys(b)
		if c, ok := parseCell(b); ok {
			again, ok := parseCell(marshalCell(c))
			if !ok || *again != *c {
				t.Fatalf("a cell changes on its way: %+v, %+v", c, again)
			}
			if k, e, ok := parseEntry(c); ok && c.topic == topicRoster && len(c.name) <= maxKey {
				k2, e2, ok := parseEntry(entryCell(serviceName(k), e))
				if !ok || k2 != k || e2 != e {
					t.Fatalf("an entry changes when it is rewritten: %+v, %+v", e, e2)
				}
			}
		}
	})
}
