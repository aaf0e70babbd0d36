package realserver

import (
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/ravel-lb/ravel"
)

// text prints a ruleset as "iptables -S" would, chains sorted.
func text(rules ruleset) string {
	var b strings.Builder
	for _, table := range tableOrder {
		if len(rules[table]) == 0 {
			continue
		}
		b.WriteString("*" + table + "\n")
		for _, chain := range slices.Sorted(maps.Keys(rules[table])) {
			b.WriteString("-N " + chain + "\n")
			for _, rule := range rules[table][chain] {
				b.WriteString("-A " + chain + " " + rule + "\n")
			}
		}
	}
	return b.String()
}

func want(v6 bool, redirects ...ravel.Redirect) wanted {
	n, err := newNames("")
	if err != nil {
		panic(err)
	}
	w := wanted{v6: v6, redirects: redirects, names: n}
	w.marks.setDefaults()
	return w
}

func TestBuild(t *testing.T) {
	tunnelled := redirect(ravel.TCP, vip4, 80, 0, 1, 2)
	tunnelled.Tunnelled = true
	masqueraded := redirect(ravel.UDP, vip6, 53, 0)
	masqueraded.Masquerade, masqueraded.Name = true, "dns"
	for _, tt := range []struct {
		name string
		w    wanted
		want string
	}{
		{name: "nothing", w: want(false), want: `*filter
-N RAVEL-FORWARD
-A RAVEL-FORWARD -m connmark --mark 0x1000/0x1000 -j ACCEPT
*nat
-N RAVEL
`},
		{name: "no pods", w: want(false, redirect(ravel.TCP, vip4, 80)), want: text(build(want(false), nil).rules)},
		{
			name: "tunnelled, three pods and two VIPs",
			w: func() wanted {
				w := want(false, tunnelled, redirect(ravel.UDP, netip.MustParseAddr("192.0.2.2"), 53, 0))
				w.directors = []netip.Addr{netip.MustParseAddr("10.0.0.1"), netip.MustParseAddr("10.0.0.2")}
				w.mtu = 1500
				return w
			}(),
			want: `*mangle
-N RAVEL-DECAP
-A RAVEL-DECAP -g RAVEL-KNOWN
-N RAVEL-KNOWN
-A RAVEL-KNOWN -m mark ! --mark 0x800/0x800 -j DROP
-A RAVEL-KNOWN -p tcp -j CONNMARK --set-xmark 0x800/0x800
-A RAVEL-KNOWN -j MARK --set-xmark 0x0/0x800
-N RAVEL-MSS
-A RAVEL-MSS -p tcp -m tcp --tcp-flags SYN,RST SYN -m connmark --mark 0x1800/0x1800 -m conntrack --ctdir REPLY -m tcpmss --mss 1441:65535 -j TCPMSS --set-mss 1440
-N RAVEL-TUNNEL
-A RAVEL-TUNNEL -i tunl0 -g RAVEL-DECAP
-A RAVEL-TUNNEL -s 10.0.0.1/32 -p ipencap -j MARK --set-xmark 0x800/0x800
-A RAVEL-TUNNEL -s 10.0.0.2/32 -p ipencap -j MARK --set-xmark 0x800/0x800
*filter
-N RAVEL-FORWARD
-A RAVEL-FORWARD -m connmark --mark 0x1000/0x1000 -j ACCEPT
-N RAVEL-OUTER
-A RAVEL-OUTER -s 10.0.0.1/32 -p ipencap -j ACCEPT
-A RAVEL-OUTER -s 10.0.0.2/32 -p ipencap -j ACCEPT
*nat
-N RAVEL
-A RAVEL -d 192.0.2.1/32 -j RAVEL-VIP-G76P6JF7MIBV
-A RAVEL -d 192.0.2.2/32 -j RAVEL-VIP-TJVSSNRZ3MPF
-N RAVEL-REST
-A RAVEL-REST -j ACCEPT
-N RAVEL-SVC-HBR7IH6577IZ
-A RAVEL-SVC-HBR7IH6577IZ -j CONNMARK --set-xmark 0x1000/0x1000
-A RAVEL-SVC-HBR7IH6577IZ -p udp -j DNAT --to-destination 10.2.1.2:8080
-N RAVEL-SVC-SE4WLJXNRS6S
-A RAVEL-SVC-SE4WLJXNRS6S -j CONNMARK --set-xmark 0x1000/0x1000
-A RAVEL-SVC-SE4WLJXNRS6S -p tcp -m statistic --mode random --probability 0.33333333349 -j DNAT --to-destination 10.2.1.2:8080
-A RAVEL-SVC-SE4WLJXNRS6S -p tcp -m statistic --mode random --probability 0.50000000000 -j DNAT --to-destination 10.2.2.2:8080
-A RAVEL-SVC-SE4WLJXNRS6S -p tcp -j DNAT --to-destination 10.2.3.2:8080
-N RAVEL-VIP-G76P6JF7MIBV
-A RAVEL-VIP-G76P6JF7MIBV -p tcp -m tcp --dport 80 -m comment --comment "default/web:http" -j RAVEL-SVC-SE4WLJXNRS6S
-A RAVEL-VIP-G76P6JF7MIBV -j RAVEL-REST
-N RAVEL-VIP-TJVSSNRZ3MPF
-A RAVEL-VIP-TJVSSNRZ3MPF -p udp -m udp --dport 53 -m comment --comment "default/web:http" -j RAVEL-SVC-HBR7IH6577IZ
-A RAVEL-VIP-TJVSSNRZ3MPF -j RAVEL-REST
`,
		},
		{
			name: "MTUs of two VIPs, one by a tunnel, and a VIP without",
			w: func() wanted {
				small := tunnelled
				small.MTU = 1400
				udp := redirect(ravel.UDP, netip.MustParseAddr("192.0.2.2"), 80, 0)
				large := redirect(ravel.TCP, netip.MustParseAddr("192.0.2.3"), 80, 0)
				large.MTU = 9000
				next := redirect(ravel.TCP, netip.MustParseAddr("192.0.2.4"), 80, 0)
				next.MTU = 1400
				last := redirect(ravel.TCP, netip.MustParseAddr("192.0.2.5"), 80, 0)
				last.MTU = 1400
				w := want(false, small, udp, large, next, last)
				w.mtu = 1500
				return w
			}(),
			want: `*mangle
-N RAVEL-DECAP
-A RAVEL-DECAP -g RAVEL-KNOWN
-N RAVEL-KNOWN
-A RAVEL-KNOWN -m mark ! --mark 0x800/0x800 -j DROP
-A RAVEL-KNOWN -p tcp -j CONNMARK --set-xmark 0x800/0x800
-A RAVEL-KNOWN -j MARK --set-xmark 0x0/0x800
-N RAVEL-MSS
-A RAVEL-MSS -p tcp -m tcp --tcp-flags SYN,RST SYN -m connmark --mark 0x1800/0x1800 -m conntrack --ctdir REPLY -m tcpmss --mss 1441:65535 -j TCPMSS --set-mss 1440
-A RAVEL-MSS -p tcp -m tcp --tcp-flags SYN,RST SYN -m connmark --mark 0x1000/0x1000 -m conntrack --ctdir REPLY -j RAVEL-MTU
-N RAVEL-MTU
-A RAVEL-MTU -p tcp -m tcp --tcp-flags SYN,RST SYN -m conntrack --ctorigdst 192.0.2.1 -m tcpmss --mss 1361:65535 -j TCPMSS --set-mss 1360
-A RAVEL-MTU -p tcp -m tcp --tcp-flags SYN,RST SYN -m conntrack --ctorigdst 192.0.2.4/31 -m tcpmss --mss 1361:65535 -j TCPMSS --set-mss 1360
-A RAVEL-MTU -p tcp -m tcp --tcp-flags SYN,RST SYN -m conntrack --ctorigdst 192.0.2.3 -m tcpmss --mss 8961:65535 -j TCPMSS --set-mss 8960
-N RAVEL-SYN
-A RAVEL-SYN -p tcp -m tcp --tcp-flags SYN,RST,ACK SYN -j RAVEL-MTU
-N RAVEL-TUNNEL
-A RAVEL-TUNNEL -i tunl0 -g RAVEL-DECAP
`,
		},
		{
			name: "the MTU of an IPv6 VIP, the smaller of two",
			w: func() wanted {
				a, b := redirect(ravel.TCP, vip6, 80, 0), redirect(ravel.TCP, vip6, 81, 0)
				a.MTU, b.MTU = 1500, 1280
				return want(true, a, b)
			}(),
			want: `*mangle
-N RAVEL-MSS
-A RAVEL-MSS -p tcp -m tcp --tcp-flags SYN,RST SYN -m connmark --mark 0x1000/0x1000 -m conntrack --ctdir REPLY -j RAVEL-MTU
-N RAVEL-MTU
-A RAVEL-MTU -p tcp -m tcp --tcp-flags SYN,RST SYN -m conntrack --ctorigdst 2001:db8::1 -m tcpmss --mss 1221:65535 -j TCPMSS --set-mss 1220
-N RAVEL-SYN
-A RAVEL-SYN -p tcp -m tcp --tcp-flags SYN,RST,ACK SYN -j RAVEL-MTU
`,
		},
		{
			name: "masqueraded, IPv6",
			w: func() wanted {
				w := want(true, masqueraded)
				w.noMasq = []netip.Prefix{netip.MustParsePrefix("fd00::/8")}
				return w
			}(),
			want: `*filter
-N RAVEL-FORWARD
-A RAVEL-FORWARD -m connmark --mark 0x1000/0x1000 -j ACCEPT
*nat
-N RAVEL
-A RAVEL -d 2001:db8::1/128 -j RAVEL-VIP-LL6RT2CW2HAY
-N RAVEL-MASQ
-A RAVEL-MASQ -s fd00::/8 -j RETURN
-A RAVEL-MASQ -j MARK --set-xmark 0x4000/0x4000
-N RAVEL-POST
-A RAVEL-POST -m mark --mark 0x4000/0x4000 -m connmark --mark 0x1000/0x1000 -j MASQUERADE
-N RAVEL-REST
-A RAVEL-REST -s fd00::/8 -j RETURN
-A RAVEL-REST -j ACCEPT
-N RAVEL-SVC-LPIL3GXLBI3G
-A RAVEL-SVC-LPIL3GXLBI3G -j CONNMARK --set-xmark 0x1000/0x1000
-A RAVEL-SVC-LPIL3GXLBI3G -j RAVEL-MASQ
-A RAVEL-SVC-LPIL3GXLBI3G -p udp -j DNAT --to-destination [fd02:1::2]:8080
-N RAVEL-VIP-LL6RT2CW2HAY
-A RAVEL-VIP-LL6RT2CW2HAY -p udp -m udp --dport 53 -m comment --comment dns -j RAVEL-SVC-LPIL3GXLBI3G
-A RAVEL-VIP-LL6RT2CW2HAY -j RAVEL-REST
`,
		},
	} {
		t.Run(tt.name, func(t *testing.T) {
			rules := build(tt.w, nil).rules
			if strings.HasPrefix(tt.want, "*mangle\n") && !strings.Contains(tt.want, "*nat\n") {
				rules = ruleset{"mangle": rules["mangle"]} // the others are as without
			}
			if diff := cmp.Diff(tt.want, text(rules)); diff != "" {
				t.Errorf("rules (-want +got):\n%s", diff)
			}
		})
	}
}

// On a device that an overlay uses, strangers are kept from every VIP of ours, not only from those that tunnels lead to.
func TestSharedTunnelRules(t *testing.T) {
	tunnelled := redirect(ravel.TCP, vip4, 80, 0)
	tunnelled.Tunnelled = true
	w := want(false, tunnelled, redirect(ravel.UDP, netip.MustParseAddr("192.0.2.2"), 53, 0))
	w.shared = true
	got := build(w, nil).rules["mangle"][w.names.decap]
	want := []string{"-d 192.0.2.1/32 -g RAVEL-KNOWN", "-d 192.0.2.2/32 -g RAVEL-KNOWN", "-j MARK --set-xmark 0x0/0x800"}
	if !slices.Equal(got, want) {
		t.Errorf("rules are %q, want %q", got, want)
	}
}

func TestMerge(t *testing.T) {
	for in, want := range map[string]string{
		"":                  "[]",
		"10.0.0.1":          "[10.0.0.1/32]",
		"10.0.0.0 10.0.0.1": "[10.0.0.0/31]",
		"10.0.0.1 10.0.0.2": "[10.0.0.1/32 10.0.0.2/32]",
		"10.0.0.0 10.0.0.1 10.0.0.2 10.0.0.3 10.0.0.4": "[10.0.0.0/30 10.0.0.4/32]",
		"2001:db8::2 2001:db8::3":                      "[2001:db8::2/127]",
	} {
		var list []netip.Prefix
		for _, a := range strings.Fields(in) {
			addr := netip.MustParseAddr(a)
			list = append(list, netip.PrefixFrom(addr, addr.BitLen()))
		}
		if got := fmt.Sprint(merge(list)); got != want {
			t.Errorf("merge(%s) = %s, want %s", in, got, want)
		}
	}
}
