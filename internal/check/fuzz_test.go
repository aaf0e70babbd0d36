package check

import (
	"encoding/binary"
	"encoding/hex"
	"maps"
	"net/netip"
	"slices"
	"strings"
	"testing"
)

func FuzzRelease(f *testing.F) {
	for _, s := range []string{"6.1.0-28-amd64", "5", "4.18", "", ".", "-1.2", "6.1", "99999999999999999999.1"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		major, minor, known := parseRelease(s)
		if known && (major < 1 || minor < 0) || !known && (major != 0 || minor != 0) {
			t.Errorf("%q: %d.%d, %t", s, major, minor, known)
		}
	})
}

func FuzzCaps(f *testing.F) {
	for _, s := range []string{"Name:\tx\nCapEff:\t000001ffffffffff\n", "CapEff:", "CapEff: zz", "", "xCapEff: 1"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		if caps, err := parseCaps(s); err != nil && caps != 0 || err == nil && !strings.Contains(s, "CapEff:") {
			t.Errorf("%q: %x, %v", s, caps, err)
		}
	})
}

func FuzzMountinfo(f *testing.F) {
	f.Add("27 1 254:0 / / rw,relatime - ext4 /dev/vda rw\n", "/proc/sys")
	f.Add("1 2 3 4 /proc/sys ro - a b rw,ro", "/proc/sys")
	f.Add("- - - - - -", "")
	f.Fuzz(func(t *testing.T, s, dir string) {
		if readonly, found := parseMountinfo(s, dir); readonly && !found {
			t.Errorf("%q: read-only and not found", s)
		}
	})
}

func FuzzKernelConfig(f *testing.F) {
	for _, s := range []string{goodConfig, "CONFIG_=y", "CONFIG_A", "CONFIG_A=\"b\"", gzipped(goodConfig)} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		for _, config := range []kernelConfig{parseConfig(s), parseConfig(gunzip(s))} {
			if config != nil && len(config) == 0 {
				t.Error("known, and nothing in it")
			}
			if _, empty := config[""]; empty {
				t.Error("a symbol without a name")
			}
		}
	})
}

func FuzzModules(f *testing.F) {
	for _, s := range []string{"ip_vs 1 2 a,b, Live 0x0\n", "x", "x 1 0 - Unloading 0\n", "kernel/a-b.ko.zst: c.ko\n", ".ko", "/:", "y 1 1 [permanent], Live"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		loaded, users := parseModules(s)
		for name := range users {
			if !loaded[name] {
				t.Errorf("%q is used and not loaded", name)
			}
		}
		for name := range parseModuleFiles(s) {
			if name == "" || strings.ContainsAny(name, "/-\n:") {
				t.Errorf("module %q", name)
			}
		}
	})
}

func FuzzTabBits(f *testing.F) {
	for _, s := range []string{"options ip_vs conn_tab_bits=20", "options ip-vs a=b conn_tab_bits=x", "install ip_vs conn_tab_bits=1 2", strings.Repeat("x", 70000)} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		if bits, found := parseTabBits(s); found && !strings.Contains(s, "conn_tab_bits=") || !found && bits != 0 {
			t.Errorf("%q: %d, %t", s, bits, found)
		}
	})
}

func FuzzListeners(f *testing.F) {
	for _, s := range []string{
		tcpHeader + "   0: 0100007F:1F90 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 12345 1 0 100 0 0 10 0\n",
		"0: 00000000000000000000000001000000:0050 0 0A 1 2 3 4 5 6", "0: :: 0 0A 1 2 3 4 5 6", "0: 01:0 0 0A 1 2 3 4 5 6",
	} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		all, err := parseListeners(strings.NewReader(s))
		if err != nil {
			return
		}
		if len(all) > strings.Count(s, "0A") {
			t.Errorf("%d listeners in %q", len(all), s)
		}
		for _, l := range all {
			if !l.addr.IsValid() || l.inode == "" {
				t.Errorf("%v", l)
			}
		}
	})
}

// What the kernel would print of an address is read as that address.
func FuzzSocketAddr(f *testing.F) {
	f.Add([]byte{127, 0, 0, 1}, uint16(80))
	f.Add(netip.MustParseAddr("2001:db8::1").AsSlice(), uint16(179))
	f.Fuzz(func(t *testing.T, raw []byte, port uint16) {
		addr, valid := netip.AddrFromSlice(raw)
		var text []byte
		for i := 0; i+4 <= len(raw); i += 4 {
			text = binary.BigEndian.AppendUint32(text, binary.NativeEndian.Uint32(raw[i:]))
		}
		s := strings.ToUpper(hex.EncodeToString(text)) + ":" + hex.EncodeToString([]byte{byte(port >> 8), byte(port)})
		got, good := parseSocketAddr(s)
		if valid && (!good || got != netip.AddrPortFrom(addr, port)) {
			t.Errorf("%s: %v, %t; want %v", s, got, good, addr)
		}
	})
}

const tracked = "ipv4     2 tcp      6 431999 ESTABLISHED src=192.0.2.1 dst=10.0.0.1 sport=1 dport=2 src=10.0.0.1 dst=192.0.2.1 sport=2 dport=1 use=2\n" +
	"ipv4     2 tcp      6 431999 ESTABLISHED src=10.0.0.9 dst=192.0.2.1 sport=1 dport=2 src=192.0.2.1 dst=10.0.0.9 sport=2 dport=1 use=2\n" +
	"ipv6     10 udp      17 29 src=2001:0db8:0000:0000:0000:0000:0000:0009 dst=2001:0db8:0000:0000:0000:0000:0000:0001 sport=1 dport=2\n"

func FuzzTracked(f *testing.F) {
	for _, s := range []string{tracked, " dst=", "dst=192.0.2.1", " dst=192.0.2.1%a dst=192.0.2.1"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		if n, err := parseTracked(strings.NewReader(s), addrsOf("192.0.2.1", "2001:db8::1")); n > strings.Count(s, " dst=") {
			t.Errorf("%q: %d, %v", s, n, err)
		}
	})
}

func FuzzSaved(f *testing.F) {
	for _, s := range []string{
		"*filter\n:INPUT DROP [0:0]\n:X - [0:0]\n-A INPUT -j X\n-A INPUT -j RAVEL-GUARD\nCOMMIT\n", ": \n", "-A ", "*\n:\n-A  \n", ":A",
	} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		rules := 0
		for _, c := range parseSaved("ip", s) {
			if c.name == "" || c.drops && c.hook == "" {
				t.Errorf("%+v", c)
			}
			rules += c.rules
		}
		if rules > strings.Count(s, "-A ") {
			t.Errorf("%d rules in %q", rules, s)
		}
	})
}

// attribute makes one netlink attribute, padded.
func attribute(kind uint16, value []byte) []byte {
	b := binary.NativeEndian.AppendUint16(nil, uint16(4+len(value)))
	b = binary.NativeEndian.AppendUint16(b, kind)
	b = append(b, value...)
	return append(b, make([]byte, (4-len(b)%4)%4)...)
}

func nftChain(family byte, table, name string, hook, policy []byte) []byte {
	b := []byte{family, 0, 0, 0}
	b = append(b, attribute(chainTable, []byte(table+"\x00"))...)
	b = append(b, attribute(chainName, []byte(name+"\x00"))...)
	if hook != nil {
		b = append(b, attribute(chainHook|0x8000, attribute(hookNumber, hook))...)
	}
	if policy != nil {
		b = append(b, attribute(chainPolicy, policy)...)
	}
	return b
}

func FuzzNft(f *testing.F) {
	rule := slices.Concat([]byte{2, 0, 0, 0}, attribute(ruleTable, []byte("filter\x00")), attribute(ruleChain, []byte("INPUT\x00")))
	f.Add(nftChain(2, "filter", "INPUT", []byte{0, 0, 0, 1}, []byte{0, 0, 0, 0}), rule)
	f.Add(nftChain(77, "", "", []byte{255, 255, 255, 255}, []byte{1}), rule[:7])
	f.Add([]byte{1, 0, 0, 0, 255, 255, 1, 0}, []byte{})
	f.Add([]byte{1, 0, 0, 0, 5, 0, 3, 0, 65}, []byte{2, 0, 0, 0, 0, 0, 0, 0})
	f.Fuzz(func(t *testing.T, chains, rules []byte) {
		for _, c := range parseNft([][]byte{chains, chains}, [][]byte{rules, rules}) {
			if c.variant != "nft" || c.family == "" || c.drops && c.hook == "" || c.rules > 2 || c.rules < 0 {
				t.Errorf("%+v", c)
			}
		}
	})
}

func TestParseNft(t *testing.T) {
	rule := slices.Concat([]byte{2, 0, 0, 0}, attribute(ruleTable, []byte("filter\x00")), attribute(ruleChain, []byte("INPUT\x00")))
	jump := slices.Concat(rule, attribute(4, attribute(1, []byte("\x00RAVEL-GUARD\x00"))))
	got := parseNft([][]byte{
		nftChain(2, "filter", "INPUT", []byte{0, 0, 0, 1}, []byte{0, 0, 0, 0}),
		nftChain(1, "firewalld", "fwd", []byte{0, 0, 0, 2}, []byte{0, 0, 0, 1}),
		nftChain(5, "t", "in", []byte{0, 0, 0, 0}, []byte{0, 0, 0, 0}),
		nftChain(10, "filter", "X", nil, []byte{0, 0, 0, 0}), {2, 0},
	}, [][]byte{rule, rule, jump, {2}})
	want := []chain{
		{"nft", "ip", "filter", "INPUT", "input", true, 2},
		{"nft", "inet", "firewalld", "fwd", "forward", false, 0},
		{"nft", "netdev", "t", "in", "hook 0", true, 0},
		{"nft", "ip6", "filter", "X", "", false, 0},
	}
	if !slices.Equal(got, want) {
		t.Errorf("got  %+v\nwant %+v", got, want)
	}
}

// Whatever stands in any file: nothing breaks, each line keeps to the rules.
func FuzzRun(f *testing.F) {
	names := slices.Sorted(maps.Keys(healthy()))
	for i := range names {
		f.Add(uint8(i), healthy()[names[i]])
	}
	f.Add(uint8(3), "\x1b[2J\n\n1\x00")
	tree := healthy()
	root := tree.write(f)
	f.Fuzz(func(t *testing.T, which uint8, text string) {
		h, _ := host()
		h.Root = root
		defer tree.change(t, root, files{names[int(which)%len(names)]: text})()
		wellFormed(t, h.Run(t.Context()))
	})
}

func FuzzWord(f *testing.F) {
	for _, s := range []string{"eth0", "a b", "'", "-x", "$(x)", ""} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		got := word(s)
		if got == s {
			if s == "" || s[0] == '-' || strings.ContainsAny(s, " \t\n'\"\\$`;&|<>(){}[]*?!#~%^") {
				t.Errorf("%q is not quoted", s)
			}
			return
		}
		if back := strings.ReplaceAll(got[1:len(got)-1], `'\''`, "'"); got[0] != '\'' || got[len(got)-1] != '\'' || back != s {
			t.Errorf("%q became %s", s, got)
		}
	})
}
