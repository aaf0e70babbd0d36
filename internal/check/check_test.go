package check

import (
	"context"
	"encoding/json"
	"errors"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/ravel-lb/ravel"
)

func TestNothingToComplainAbout(t *testing.T) {
	h, _ := host()
	h.Root = healthy().write(t)
	lines := h.Run(t.Context())
	wellFormed(t, lines)
	seen := map[string]bool{}
	for _, l := range lines {
		seen[l.Name] = true
		if l.Status != OK {
			t.Errorf("%v", l)
		}
	}
	for _, name := range Names() {
		if !seen[name] {
			t.Errorf("no line of %s", name)
		}
	}
	b, err := json.Marshal([]Line{{OK, "link", "x", ""}, {Warn, "link", "x", "y"}})
	if want := `[{"status":"ok","name":"link","detail":"x"},{"status":"warn","name":"link","detail":"x","fix":"y"}]`; err != nil || string(b) != want {
		t.Errorf("%s, %v", b, err)
	}
	if got := Worst(lines); got != OK {
		t.Errorf("Worst = %s", got)
	}
}

func TestEachLine(t *testing.T) {
	const foreign = "  sl\n   0: 00000000:00B3 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 4711 1 0\n"
	tests := []struct {
		name  string // "check: what is wrong"
		files files
		role  string
		edit  func(*Host, *fake)
		want  []string // status|part of the detail|part of the fix
	}{
		{name: "kernel: before mh", files: files{"proc/sys/kernel/osrelease": "4.15.0-200-generic"}, want: []string{"fail|4.18|newer"}},
		{name: "kernel: before mh on a realserver", role: "realserver", files: files{"proc/sys/kernel/osrelease": "4.15.0"}, want: []string{"warn|4.15.0|newer"}},
		{name: "kernel: slow reuse", files: files{"proc/sys/kernel/osrelease": "5.4.0"}, want: []string{"warn|5.9|newer"}},
		{name: "kernel: missing", files: files{"proc/sys/kernel/osrelease": gone}, want: []string{"warn|cannot be read|uname"}},
		{name: "kernel: unreadable", files: files{"proc/sys/kernel/osrelease": dir}, want: []string{"warn|cannot be read|uname"}},
		{name: "kernel: garbage", files: files{"proc/sys/kernel/osrelease": "\xff../../etc"}, want: []string{"warn|cannot be read|uname"}},

		{name: "machine: 32 bits", edit: func(_ *Host, k *fake) { k.uname = "i686" }, want: []string{"fail|i686|64-bit"}},
		{name: "machine: unknown byte order", edit: func(_ *Host, k *fake) { k.uname = "mips64" }, want: []string{"warn|byte order|64-bit"}},
		{name: "machine: no answer", edit: func(_ *Host, k *fake) { k.err = errors.New("no") }, want: []string{"warn|no|uname -m"}},

		{name: "capabilities: none", files: files{"proc/self/status": "CapEff:\t0000000000000000\n"}, want: []string{"fail|NET_ADMIN (links, IPVS, rules) and NET_RAW|root"}},
		{name: "capabilities: no raw", files: files{"proc/self/status": "CapEff:\t0000000000001000\n"}, want: []string{"fail|lacks NET_RAW|root"}},
		{name: "capabilities: no modules", files: files{"proc/self/status": "CapEff:\t0000000000003000\n"}, want: []string{"ok|SYS_MODULE|"}},
		{name: "capabilities: missing", files: files{"proc/self/status": gone}, want: []string{"warn|cannot be read|root"}},
		{name: "capabilities: garbage", files: files{"proc/self/status": "CapEff: zz\n"}, want: []string{`warn|"zz"|root`}},

		{name: "user-namespace: one of its own", files: files{"proc/self/uid_map": "0 100000 65536\n"}, want: []string{"warn|not the host's|userns"}},
		{name: "user-namespace: none", files: files{"proc/self/uid_map": gone}, want: []string{"ok|none|"}},
		{name: "user-namespace: unreadable", files: files{"proc/self/uid_map": dir}, want: []string{"warn|cannot be read|userns"}},

		{name: "proc-sys: read-only", files: files{"proc/self/mountinfo": "1 0 0:1 / / rw - ext4 a rw\n2 1 0:2 / /proc rw - proc proc rw\n3 2 0:2 /sys /proc/sys ro,nosuid - proc proc rw\n"},
			edit: func(_ *Host, k *fake) { k.readonly = true },
			want: []string{"warn|read-only|/host/proc/sys/net/ipv4/vs/expire_nodest_conn"}},
		{name: "proc-sys: read-only but for what changes", files: files{"proc/self/mountinfo": "1 0 0:1 / / rw - ext4 a rw\n2 1 0:2 / /proc rw - proc proc rw\n3 2 0:2 /sys /proc/sys ro,nosuid - proc proc rw\n"},
			want: []string{"ok|read-only|"}},
		{name: "proc-sys: part of it read-only", files: files{"proc/self/mountinfo": "1 0 0:1 / / rw - ext4 a rw\n3 2 0:2 /sys/net /proc/sys/net ro - proc proc rw\n"},
			role: "realserver", edit: func(_ *Host, k *fake) { k.readonly = true },
			want: []string{"ok|read-only|"}},
		{name: "proc-sys: mounted again", files: files{"proc/self/mountinfo": "1 0 0:1 / /proc/sys ro - proc p rw\n2 1 0:1 / /proc/sys rw - proc p rw\n"}, want: []string{"ok|can be|"}},
		{name: "proc-sys: missing", files: files{"proc/self/mountinfo": gone}, want: []string{"warn|cannot tell|remount"}},
		{name: "proc-sys: garbage", files: files{"proc/self/mountinfo": "- - - -\n\x00\n"}, want: []string{"warn|no mount|remount"}},

		{name: "ipvs: can be loaded", files: files{"proc/self/net/ip_vs": gone, "proc/modules": "", "sys/module/ip_vs/parameters/conn_tab_bits": gone, moduleDir + "modules.dep": "kernel/ip_vs.ko.xz:\n"}, want: []string{"ok|modprobe ip_vs|"}},
		{name: "ipvs: not installed", files: files{"proc/self/net/ip_vs": gone, "proc/modules": "", "sys/module/ip_vs/parameters/conn_tab_bits": gone}, want: []string{"fail|does not have it|linux-modules-extra"}},
		{name: "ipvs: not built", files: files{"proc/self/net/ip_vs": gone, "proc/modules": "", "sys/module/ip_vs/parameters/conn_tab_bits": gone,
			"boot/config-" + release: "CONFIG_NET=y\n"}, want: []string{"fail|does not have it|kernel"}},
		{name: "ipvs: no modules", files: files{"proc/self/net/ip_vs": gone, "proc/modules": gone, "sys/module/ip_vs/parameters/conn_tab_bits": gone},
			want: []string{"fail|loads no modules|boot a kernel that has ip_vs"}},
		{name: "ipvs: may not be loaded", files: files{"proc/self/net/ip_vs": gone, "proc/modules": "", moduleDir + "modules.dep": "ip_vs.ko:\n",
			"proc/sys/kernel/modules_disabled": "1", "sys/module/ip_vs/parameters/conn_tab_bits": gone}, want: []string{"fail|modules_disabled|reboot"}},
		{name: "ipvs: loaded elsewhere", files: files{"proc/self/net/ip_vs": gone}, want: []string{"warn|is not there|modprobe ip_vs"}},
		{name: "ipvs: nothing is known", files: files{"proc/self/net/ip_vs": gone, "proc/modules": dir, moduleDir + "modules.dep": gone, moduleDir + "modules.builtin": gone,
			"boot/config-" + release: gone, "sys/module/ip_vs/parameters/conn_tab_bits": gone}, want: []string{"warn|cannot tell|modprobe ip_vs"}},

		{name: "ipvs-ipv6: not built", files: files{"boot/config-" + release: "CONFIG_IP_VS=m\n"}, want: []string{"fail|2001:db8::1|CONFIG_IP_VS_IPV6"}},
		{name: "ipvs-ipv6: not built, no VIP", files: files{"boot/config-" + release: "CONFIG_IP_VS=m\n"}, edit: func(h *Host, _ *fake) { h.VIPs = nil }, want: []string{"warn|without IPv6|CONFIG_IP_VS_IPV6"}},
		{name: "ipvs-ipv6: seen by its user", files: files{"boot/config-" + release: gone}, want: []string{"ok|nf_defrag_ipv6|"}},
		{name: "ipvs-ipv6: unknown", files: files{"boot/config-" + release: gone, "proc/modules": ""}, want: []string{"warn|cannot tell|zgrep CONFIG_IP_VS_IPV6"}},
		{name: "ipvs-ipv6: unknown, not needed", files: files{"boot/config-" + release: gone, "proc/modules": ""},
			edit: func(h *Host, _ *fake) { h.VIPs = addrsOf("192.0.2.1") }, want: []string{"ok|no VIP needs it|"}},

		{name: "scheduler-mh: not installed", files: files{"proc/modules": ""}, want: []string{"fail|does not have it|modprobe ip_vs_mh"}},
		{name: "scheduler-mh: on its way out", files: files{"proc/modules": "ip_vs_mh 1 0 - Unloading 0x0\n"}, want: []string{"fail|does not have it|ip_vs_mh"}},
		{name: "scheduler-mh: built in", files: files{"proc/modules": "", moduleDir + "modules.builtin": "kernel/ip_vs_mh.ko\n"}, want: []string{"ok|built in|"}},

		{name: "mh-table: larger", files: files{"boot/config-" + release: "CONFIG_IP_VS_MH=m\nCONFIG_IP_VS_MH_TAB_INDEX=16\n"}, want: []string{"warn|65521|TAB_INDEX=16"}},
		{name: "mh-table: in config.gz", files: files{"boot/config-" + release: gone, "proc/config.gz": gzipped(goodConfig)}, want: []string{"ok|4093 slots (/proc/config.gz)|"}},
		{name: "mh-table: garbage", files: files{"boot/config-" + release: "CONFIG_IP_VS_MH_TAB_INDEX=huge\n"}, want: []string{"warn|no kernel knows|same kernel"}},
		{name: "mh-table: not named", files: files{"boot/config-" + release: "CONFIG_IP_VS_MH=m\n"}, want: []string{"warn|does not name|same kernel"}},
		{name: "mh-table: unknown", files: files{"boot/config-" + release: gone}, want: []string{"warn|cannot tell|zgrep"}},
		{name: "mh-table: broken config.gz", files: files{"boot/config-" + release: gone, "proc/config.gz": "\x1f\x8bnonsense"}, want: []string{"warn|cannot tell|zgrep"}},
		{name: "mh-table: unreadable", files: files{"boot/config-" + release: dir}, want: []string{"warn|cannot tell|zgrep"}},

		{name: "conn-tab-bits: the default", files: files{"sys/module/ip_vs/parameters/conn_tab_bits": "12\n"}, want: []string{"warn|12 (as loaded): 4096|conn_tab_bits=20"}},
		{name: "conn-tab-bits: garbage", files: files{"sys/module/ip_vs/parameters/conn_tab_bits": "many\n"}, want: []string{"warn|no number|conn_tab_bits=20"}},
		{name: "conn-tab-bits: hidden", files: files{"sys/module/ip_vs/parameters/conn_tab_bits": gone}, want: []string{"warn|cannot be read|conn_tab_bits=20"}},
		{name: "conn-tab-bits: not loaded", files: files{"sys/module/ip_vs/parameters/conn_tab_bits": gone, "proc/self/net/ip_vs": gone}, want: []string{"warn|default|conn_tab_bits=20"}},
		{name: "conn-tab-bits: in modprobe.d", files: files{"sys/module/ip_vs/parameters/conn_tab_bits": gone, "proc/self/net/ip_vs": gone,
			"etc/modprobe.d/x.conf": "# options ip_vs conn_tab_bits=9\noptions ip-vs debug=1 conn_tab_bits=18\n"}, want: []string{"ok|18 (/etc/modprobe.d/x.conf)|"}},
		{name: "conn-tab-bits: on the command line", files: files{"sys/module/ip_vs/parameters/conn_tab_bits": gone, "proc/self/net/ip_vs": gone,
			"proc/cmdline": "quiet ip_vs.conn_tab_bits=20"}, want: []string{"ok|20 (/proc/cmdline)|"}},
		{name: "conn-tab-bits: by itself", files: files{"sys/module/ip_vs/parameters/conn_tab_bits": gone, "proc/sys/net/ipv4/vs/conn_lfactor": "-4"}, want: []string{"ok|by itself|"}},

		{name: "ipvs-sysctls: to be set", files: files{"proc/sys/net/ipv4/vs/sloppy_tcp": "0\n"}, want: []string{"ok|10 as they should be; ravel director sets sloppy_tcp from 0 to 1|"}},
		{name: "ipvs-sysctls: cannot be set", files: files{"proc/sys/net/ipv4/vs/sloppy_tcp": "0\n"}, edit: func(_ *Host, k *fake) { k.readonly = true },
			want: []string{"fail|sloppy_tcp is 0 and cannot be set to 1|sysctl -w net.ipv4.vs.sloppy_tcp=1"}},
		{name: "ipvs-sysctls: one is missing", files: files{"proc/sys/net/ipv4/vs/run_estimation": gone}, want: []string{"warn|run_estimation|newer"}},
		{name: "ipvs-sysctls: one is unreadable", files: files{"proc/sys/net/ipv4/vs/conntrack": dir}, want: []string{"warn|cannot be read|net.ipv4.vs.conntrack"}},
		{name: "ipvs-sysctls: garbage", files: files{"proc/sys/net/ipv4/vs/conntrack": "\x1b[2J"}, want: []string{"ok|conntrack from ?[2J to 0|"}},

		{name: "ipv6: disabled", files: files{"proc/sys/net/ipv6/conf/all/disable_ipv6": "1"}, want: []string{"fail|disabled|disable_ipv6=0"}},
		{name: "ipv6: disabled, not needed", files: files{"proc/sys/net/ipv6/conf/all/disable_ipv6": "1"}, edit: func(h *Host, _ *fake) { h.VIPs = addrsOf("192.0.2.1") }, want: []string{"ok|no VIP|"}},
		{name: "ipv6: none", files: files{"proc/sys/net/ipv6/conf/all/disable_ipv6": gone}, edit: func(h *Host, _ *fake) { h.VIPs = nil }, want: []string{"warn|does not do|ipv6.disable"}},
		{name: "ipv6: unreadable", files: files{"proc/sys/net/ipv6/conf/all/disable_ipv6": dir}, want: []string{"warn|cannot be read|sysctl"}},

		{name: "arp: raised", files: files{"proc/sys/net/ipv4/conf/all/arp_ignore": "0"}, want: []string{"ok|raises all.arp_ignore from 0 to 1|"}},
		{name: "arp: cannot be raised", files: files{"proc/sys/net/ipv4/conf/all/arp_announce": "1"}, edit: func(_ *Host, k *fake) { k.readonly = true }, want: []string{"fail|answers ARP|arp_announce=2"}},
		{name: "arp: missing", files: files{"proc/sys/net/ipv4/conf/all/arp_ignore": gone}, want: []string{"warn|cannot be read|arp_ignore=1"}},
		{name: "arp: garbage", files: files{"proc/sys/net/ipv4/conf/all/arp_ignore": "yes"}, want: []string{"warn|no number|arp_ignore=1"}},

		{name: "forwarding: off", files: files{"proc/sys/net/ipv4/ip_forward": "0", "proc/sys/net/ipv6/conf/all/forwarding": "0"},
			want: []string{"fail|IPv4|net.ipv4.ip_forward=1", "fail|IPv6|net.ipv6.conf.all.forwarding=1"}},
		{name: "forwarding: off, not needed", files: files{"proc/sys/net/ipv6/conf/all/forwarding": "0"}, edit: func(h *Host, _ *fake) { h.VIPs = addrsOf("192.0.2.1") }, want: []string{"ok|on|"}},
		{name: "forwarding: unreadable", files: files{"proc/sys/net/ipv4/ip_forward": dir}, want: []string{"warn|cannot be read|ip_forward=1"}},

		{name: "rp-filter: all", files: files{"proc/sys/net/ipv4/conf/all/rp_filter": "1"}, want: []string{"warn|all.rp_filter is 1|all.rp_filter=0"}},
		{name: "rp-filter: one link", files: files{"proc/sys/net/ipv4/conf/eth0/rp_filter": "1"}, want: []string{"warn|eth0 is strict|net/ipv4/conf/eth0/rp_filter=2"}},
		{name: "rp-filter: links by themselves", files: files{"proc/sys/net/ipv4/conf/eth1;reboot/rp_filter": "1", "proc/sys/net/ipv4/conf/lo/rp_filter": "1"},
			edit: func(h *Host, _ *fake) { h.Nodes, h.Directors, h.Peers = nil, nil, nil }, want: []string{"warn|eth1;reboot is strict|'net/ipv4/conf/eth1;reboot/rp_filter=2'"}},
		{name: "rp-filter: missing", files: files{"proc/sys/net/ipv4/conf/all/rp_filter": gone}, want: []string{"warn|cannot be read|sysctl"}},
		{name: "rp-filter: garbage", files: files{"proc/sys/net/ipv4/conf/eth0/rp_filter": "loose"}, want: []string{"warn|no number|eth0"}},

		{name: "conntrack: full", role: "realserver", files: files{"proc/sys/net/netfilter/nf_conntrack_count": "262000"}, want: []string{"fail|262000 of 262144|nf_conntrack_max=524288"}},
		{name: "conntrack: nearly full", role: "realserver", files: files{"proc/sys/net/netfilter/nf_conntrack_count": "220000"}, want: []string{"warn|220000|nf_conntrack_max=524288"}},
		{name: "conntrack: not loaded", role: "realserver", files: files{"proc/sys/net/netfilter/nf_conntrack_count": gone}, want: []string{"ok|load it|"}},
		{name: "conntrack: not loaded on a director", role: "director", files: files{"proc/sys/net/netfilter/nf_conntrack_count": gone}, want: []string{"ok|needs none|"}},
		{name: "conntrack: on a director", role: "director", files: files{"proc/sys/net/netfilter/nf_conntrack_count": "9"},
			want: []string{"ok|9 connections|"}},
		{name: "conntrack: of VIPs on a director", role: "director", files: files{"proc/sys/net/netfilter/nf_conntrack_count": "9", "proc/self/net/nf_conntrack": tracked},
			want: []string{"ok|2 connections|"}},
		{name: "conntrack: of others on a director", role: "director", files: files{"proc/sys/net/netfilter/nf_conntrack_count": "9", "proc/self/net/nf_conntrack": tracked},
			edit: func(h *Host, _ *fake) { h.VIPs = addrsOf("192.0.2.7") }, want: []string{"ok|no connection to a VIP|"}},
		{name: "conntrack: no maximum", role: "realserver", files: files{"proc/sys/net/netfilter/nf_conntrack_max": gone}, want: []string{"warn|cannot be read|nf_conntrack_max"}},
		{name: "conntrack: garbage", files: files{"proc/sys/net/netfilter/nf_conntrack_count": "?"}, want: []string{"warn|no number|sysctl"}},

		{name: "iptables: none", edit: func(_ *Host, k *fake) { k.programs = nil }, want: []string{"fail|no complete set|apt-get install iptables"}},
		{name: "iptables: not the one", edit: func(h *Host, k *fake) { h.IPTables = "legacy"; delete(k.programs, "iptables-legacy") }, want: []string{"fail|iptables-legacy is asked for|install"}},
		{name: "iptables: plain ones", edit: func(_ *Host, k *fake) {
			k.programs = map[string]string{}
			for _, n := range []string{"iptables", "iptables-save", "iptables-restore", "ip6tables", "ip6tables-save", "ip6tables-restore"} {
				k.programs[n] = "v1.8.9 (nf_tables)"
			}
		}, want: []string{"ok|iptables-nft|"}},

		{name: "iptables-variant: nft", edit: func(_ *Host, k *fake) {
			k.chains = []chain{{variant: "nft", family: "ip", table: "mangle", name: "KUBE-IPTABLES-HINT"}}
		}, want: []string{"ok|nft, as|"}},
		{name: "iptables-variant: both", files: files{"proc/self/net/ip_tables_names": "filter\n"}, edit: func(_ *Host, k *fake) {
			k.chains = []chain{{variant: "nft", family: "ip", table: "filter", name: "X", rules: 3}}
			k.saved = map[string]string{"filter": "*filter\n:INPUT ACCEPT [0:0]\n-A INPUT -j ACCEPT\n-A INPUT -j RAVEL-GUARD\nCOMMIT\n"}
		}, want: []string{"warn|3 rules of iptables-nft, 1 of iptables-legacy|iptables-legacy-save"}},
		{name: "iptables-variant: not the one in use", edit: func(h *Host, k *fake) {
			h.IPTables = "legacy"
			k.chains = []chain{{variant: "nft", family: "ip", table: "filter", name: "X", rules: 3}}
		}, want: []string{"warn|legacy is asked for, and this node uses nft|auto"}},
		{name: "iptables-variant: ours are not others'", edit: func(_ *Host, k *fake) {
			k.chains = []chain{{variant: "nft", family: "ip", table: "filter", name: "RAVEL-GUARD", rules: 3}, {variant: "nft", family: "inet", table: "firewalld", name: "X", rules: 3}}
		}, want: []string{"ok|no other program|"}},
		{name: "iptables-variant: unreadable", files: files{"proc/self/net/ip_tables_names": dir}, want: []string{"warn|not all rules|root"}},

		{name: "iptables-modules: one is missing", files: files{"boot/config-" + release: strings.Replace(goodConfig, "XT_MATCH_STATISTIC=y", "FOO=y", 1)},
			want: []string{"fail|xt_statistic|modprobe xt_statistic"}},
		{name: "iptables-modules: not a director's", role: "director", files: files{"boot/config-" + release: strings.Replace(goodConfig, "XT_MATCH_STATISTIC=y", "FOO=y", 1)}, want: []string{"ok|all there|"}},
		{name: "iptables-modules: registered", files: files{"boot/config-" + release: strings.Replace(goodConfig, "XT_MATCH_STATISTIC=y", "FOO=y", 1),
			"proc/self/net/ip_tables_matches": "tcp\nstatistic\n"}, want: []string{"ok|all there|"}},
		{name: "iptables-modules: unknown", role: "director", files: files{"boot/config-" + release: gone, moduleDir + "modules.dep": gone, moduleDir + "modules.builtin": gone},
			want: []string{"warn|cannot tell|modprobe -a"}},
		{name: "iptables-modules: no engine", edit: func(h *Host, _ *fake) { h.IPTables = "nft" },
			files: files{"boot/config-" + release: strings.Replace(goodConfig, "NFT_COMPAT=y", "FOO=y", 1)}, want: []string{"fail|nft_compat|modprobe nft_compat"}},
		{name: "iptables-modules: the other engine", files: files{"boot/config-" + release: strings.Replace(goodConfig, "NFT_COMPAT=y", "FOO=y", 1)}, want: []string{"ok|all there|"}},

		{name: "ipset: one is missing", files: files{"boot/config-" + release: strings.Replace(goodConfig, "IP_SET_HASH_IPPORT=y", "FOO=y", 1)}, want: []string{"fail|ip_set_hash_ipport|modprobe"}},

		{name: "policies: forward", role: "realserver", edit: func(_ *Host, k *fake) {
			k.chains = []chain{{variant: "nft", family: "ip", table: "filter", name: "FORWARD", hook: "forward", drops: true, rules: 2}}
		}, want: []string{"ok|ip filter FORWARD drops by policy|"}},
		{name: "policies: forward of others", role: "realserver", edit: func(_ *Host, k *fake) {
			k.chains = []chain{{variant: "nft", family: "inet", table: "fire wall", name: "forward", hook: "forward", drops: true}}
		}, want: []string{"warn|inet fire wall forward|nft insert rule inet 'fire wall' forward ct mark and 0x1000 == 0x1000 accept"}},
		{name: "policies: forward of the other variant", role: "realserver", files: files{"proc/self/net/ip_tables_names": "filter\n"}, edit: func(h *Host, k *fake) {
			h.IPTables = "nft"
			k.saved = map[string]string{"filter": "*filter\n:FORWARD DROP [0:0]\nCOMMIT\n"}
		}, want: []string{"warn|(legacy) drops by policy|iptables-legacy -t filter -A FORWARD -m connmark --mark 0x1000/0x1000 -j ACCEPT"}},
		{name: "policies: input of a director", role: "director", edit: func(_ *Host, k *fake) {
			k.chains = []chain{{variant: "nft", family: "ip6", table: "filter", name: "INPUT", hook: "input", drops: true}}
		}, want: []string{"warn|before IPVS|ip6tables-nft -t filter -A INPUT -d 2001:db8::1 -j ACCEPT"}},
		{name: "policies: input of a director, two VIPs", role: "director", edit: func(h *Host, k *fake) {
			h.VIPs = addrsOf("192.0.2.2", "192.0.2.1", "192.0.2.2")
			k.chains = []chain{{variant: "nft", family: "ip", table: "filter", name: "INPUT", hook: "input", drops: true}}
		}, want: []string{"warn|before IPVS|for a in 192.0.2.1 192.0.2.2; do iptables-nft -t filter -A INPUT -d $a -j ACCEPT; done"}},
		{name: "policies: input of both families", role: "director", edit: func(h *Host, k *fake) {
			h.VIPs = addrsOf("192.0.2.1", "2001:db8::1", "2001:db8::2")
			k.chains = []chain{{variant: "nft", family: "inet", table: "filter", name: "input", hook: "input", drops: true}}
		}, want: []string{"warn|inet filter input drops|nft insert rule inet filter input ip daddr 192.0.2.1 accept; for a in 2001:db8::1 2001:db8::2; do nft insert rule inet filter input ip6 daddr $a accept; done"}},
		{name: "policies: a family without VIPs", edit: func(h *Host, k *fake) {
			h.VIPs = addrsOf("192.0.2.1")
			k.chains = []chain{{variant: "nft", family: "ip6", table: "filter", name: "INPUT", hook: "input", drops: true}}
		}, want: []string{"ok|none drops|"}},
		{name: "policies: unreadable", edit: func(_ *Host, k *fake) { k.err = errors.New("no buffer space") }, want: []string{"warn|no buffer space|root"}},

		{name: "neighbours: harmless", role: "realserver", edit: func(_ *Host, k *fake) {
			k.chains = []chain{{variant: "nft", family: "ip", table: "nat", name: "KUBE-SERVICES"}, {variant: "nft", family: "ip", table: "filter", name: "DOCKER-USER"}}
		}, want: []string{"ok|Docker, kube-proxy|"}},
		{name: "neighbours: keepalived", files: files{"proc/77/comm": "keepalived\n"}, want: []string{"warn|keepalived runs here (process 77)|/proc/77/cmdline"}},

		{name: "kube-proxy: in IPVS mode", edit: func(_ *Host, k *fake) {
			k.linkList = append(k.linkList, link{index: 9, name: "kube-ipvs0", kind: "dummy"})
		},
			want: []string{"warn|kube-ipvs0|--ipvs-exclude-cidrs=192.0.2.1/32,2001:db8::1/128"}},
		{name: "kube-proxy: in IPVS mode on a realserver", role: "realserver", edit: func(_ *Host, k *fake) {
			k.linkList = append(k.linkList, link{index: 9, name: "kube-ipvs0", kind: "dummy"})
		}, want: []string{"ok|ipvs mode|"}},
		{name: "kube-proxy: in nftables mode", role: "realserver", edit: func(_ *Host, k *fake) {
			k.chains = []chain{{variant: "nft", family: "ip", table: "kube-proxy", name: "nat-prerouting", hook: "prerouting"}}
		}, want: []string{"ok|nftables mode: Ravel's redirects come before it|"}},
		{name: "kube-proxy: in nftables mode on a director", role: "director", edit: func(_ *Host, k *fake) {
			k.chains = []chain{{variant: "nft", family: "ip", table: "kube-proxy", name: "nat-prerouting", hook: "prerouting"}}
		}, want: []string{"ok|nftables mode|"}},
		{name: "kube-proxy: in iptables mode", edit: func(_ *Host, k *fake) {
			k.chains = []chain{{variant: "nft", family: "ip", table: "nat", name: "KUBE-SERVICES"}}
		}, want: []string{"ok|iptables mode|"}},
		{name: "kube-proxy: none", want: []string{"ok|none|"}},

		{name: "untracked: can be", role: "director", want: []string{"ok|can be|"}},
		{name: "untracked: is", role: "director", files: files{"boot/config-" + release: strings.Replace(goodConfig, "TARGET_CT=y", "FOO=y", 1)}, edit: func(_ *Host, k *fake) {
			k.chains = []chain{{variant: "nft", family: "ip", table: "raw", name: "RAVEL-UNTRACKED"}}
		}, want: []string{"ok|not tracked|"}},
		{name: "untracked: no target", role: "director", files: files{"boot/config-" + release: strings.Replace(goodConfig, "TARGET_CT=y", "FOO=y", 1)},
			want: []string{"warn|xt_CT: this kernel does not have it: packets for VIPs are tracked|modprobe xt_CT"}},
		{name: "untracked: no table", role: "director", files: files{"boot/config-" + release: strings.Replace(goodConfig, "IP_NF_RAW=y", "FOO=y", 1)},
			edit: func(h *Host, _ *fake) { h.IPTables = "legacy" }, want: []string{"warn|iptable_raw|modprobe iptable_raw"}},

		{name: "cni: none", want: []string{"ok|no network plugin|"}},
		{name: "cni: Calico's eBPF data plane", role: "realserver", edit: func(_ *Host, k *fake) {
			k.linkList = append(k.linkList, link{index: 9, name: "bpfin.cali", kind: "veth"})
		}, want: []string{"fail|Calico's eBPF|linuxDataplane"}},
		{name: "cni: the same on a director", role: "director", edit: func(_ *Host, k *fake) {
			k.linkList = append(k.linkList, link{index: 9, name: "bpfin.cali", kind: "veth"})
		}, want: []string{"warn|Calico's eBPF|linuxDataplane"}},
		{name: "cni: Cilium without an answer", role: "realserver", edit: func(_ *Host, k *fake) {
			k.linkList = append(k.linkList, link{index: 9, name: "cilium_host", kind: "veth"})
		},
			want: []string{"warn|eBPF host routing|cilium-dbg status"}},
		{name: "cni: unreadable", edit: func(_ *Host, k *fake) { k.err = errors.New("no") }, want: []string{"warn|no|ip link"}},

		{name: "tunnel: can be made", edit: func(_ *Host, k *fake) { k.linkList = k.linkList[:3] }, want: []string{"ok|tunl0 can be made, ip6tnl0 can be made|"}},
		{name: "tunnel: none", files: files{moduleDir + "modules.dep": "x.ko:\n"}, edit: func(_ *Host, k *fake) { k.linkList = k.linkList[:3] }, want: []string{"fail|ipip|modprobe ipip"}},
		{name: "tunnel: none, not asked for", files: files{moduleDir + "modules.dep": "x.ko:\n"}, edit: func(h *Host, k *fake) { k.linkList = k.linkList[:3]; h.Tunnel = false },
			want: []string{"warn|ipip|modprobe ipip"}},
		{name: "tunnel: of another kind", edit: func(_ *Host, k *fake) { k.linkList[3].kind = "gre" }, want: []string{"fail|tunl0 is a gre|ip link delete tunl0"}},
		{name: "tunnel: unreadable", edit: func(_ *Host, k *fake) { k.err = errors.New("no") }, want: []string{"warn|no|ip -d link"}},

		{name: "tunnel-others: external", edit: func(_ *Host, k *fake) {
			k.linkList = append(k.linkList, link{name: "a b", kind: "ipip", external: true})
		},
			want: []string{"fail|a b is an external ipip|ip link delete 'a b'"}},
		{name: "tunnel-others: to a director", edit: func(_ *Host, k *fake) {
			k.linkList = append(k.linkList, link{name: "t1", kind: "ipip", remote: addrOf("10.0.1.12")})
		}, want: []string{"fail|t1 is a tunnel to director 10.0.1.12|ip link delete t1"}},
		{name: "tunnel-others: from anywhere", edit: func(h *Host, k *fake) {
			h.Tunnel = false
			k.linkList = append(k.linkList, link{name: "t1", kind: "ip6tnl", local: addrOf("2001:db8:1::1"), up: true})
		}, want: []string{"warn|from anywhere|ip link delete t1"}},
		{name: "tunnel-others: of a CNI", edit: func(_ *Host, k *fake) {
			k.linkList = append(k.linkList, link{name: "t1", kind: "ipip", remote: addrOf("10.0.1.99")}, link{name: "g", kind: "gre", external: true})
		}, want: []string{"ok|no other|"}},

		{name: "mtu: short", edit: func(_ *Host, k *fake) { k.routes[addrOf("10.0.1.21")] = route{link: "eth1", mtu: 1400} }, want: []string{"warn|(eth1) carries 1400 bytes: a tunnel leaves 1380|ip link set eth1 mtu 1520"}},
		{name: "mtu: too short", edit: func(h *Host, k *fake) {
			h.Nodes = addrsOf("2001:db8:1::2")
			k.routes[addrOf("2001:db8:1::2")] = route{link: "eth1", mtu: 1300}
		}, want: []string{"fail|leaves 1260|mtu 1540"}},
		{name: "mtu: no tunnel", edit: func(h *Host, _ *fake) { h.Tunnel = false }},

		{name: "nodes: two ways", want: []string{"ok|1 on-link, 1 behind a router (10.0.9.24 by 10.0.1.1)|"}},
		{name: "nodes: no route", edit: func(h *Host, _ *fake) { h.Nodes = addrsOf("203.0.113.9") }, want: []string{"fail|203.0.113.9 cannot be reached|ip route get 203.0.113.9"}},
		{name: "nodes: this host", role: "director", edit: func(_ *Host, k *fake) { k.routes[addrOf("10.0.1.21")] = route{local: true} }, want: []string{"warn|is this host|different hosts"}},
		{name: "nodes: none", edit: func(h *Host, _ *fake) { h.Nodes = nil }},
		{name: "directors: no route", edit: func(_ *Host, k *fake) { k.routes = nil }, want: []string{"fail|director 10.0.1.12|ip route"}},

		{name: "peers: no route", edit: func(_ *Host, k *fake) { k.routes = nil }, want: []string{"fail|peer 10.0.1.1 cannot be reached|ip route"}},
		{name: "peers: behind a router", edit: func(h *Host, _ *fake) { h.Peers[0].Addr = addrOf("10.0.9.24") }, want: []string{"fail|10.0.9.24 is behind 10.0.1.1|multihop: 2"}},
		{name: "peers: iBGP behind a router", edit: func(h *Host, _ *fake) { h.Peers[0].Addr, h.Peers[0].LocalASN = addrOf("10.0.9.24"), 64512 }, want: []string{"ok|1 can be reached|"}},
		{name: "peers: no such password", edit: func(h *Host, _ *fake) { h.Peers[0].PasswordFile = "/etc/ravel/key" }, want: []string{"fail|password|install -m 600 KEYFILE /etc/ravel/key"}},
		{name: "peers: not our address", edit: func(h *Host, _ *fake) { h.Peers[0].LocalAddr = addrOf("10.0.1.99") }, want: []string{"fail|10.0.1.99, which this host does not have|ip addr add 10.0.1.99 dev eth0"}},
		{name: "peers: our address", edit: func(h *Host, _ *fake) { h.Peers[0].LocalAddr = addrOf("10.0.1.11") }, want: []string{"ok|1 can be reached|"}},
		{name: "peers: this host", edit: func(_ *Host, k *fake) { k.routes[addrOf("10.0.1.1")] = route{local: true} }, want: []string{"warn|this host itself|router's address"}},

		{name: "ports: taken", files: files{"proc/self/net/tcp": foreign}, want: []string{"fail|port 179: another program listens on 0.0.0.0:179|sport = :179"}},
		{name: "ports: missing", files: files{"proc/self/net/tcp": gone}, want: []string{"warn|cannot tell|ss -lnt"}},
		{name: "ports: no IPv6", files: files{"proc/self/net/tcp6": gone}, want: []string{"ok|2 free|"}},
		{name: "ports: unreadable", files: files{"proc/self/net/tcp": dir}, want: []string{"warn|cannot tell|ss -lnt"}},
		{name: "ports: garbage", files: files{"proc/self/net/tcp": "x 0:zz y 0A 1 2 3 4 5 6\n0: 0000:00B3 0 0A 1 2 3 4 5 6\n"}, want: []string{"ok|2 free|"}},

		{name: "socket: a file", files: files{"run/ravel/ravel.sock": "x"}, want: []string{"fail|no socket|rm /run/ravel/ravel.sock"}},
		{name: "socket: unreadable", files: files{"run": "x"}, want: []string{"warn|cannot be looked at|ls -l"}},

		{name: "link: none yet", edit: func(_ *Host, k *fake) { k.linkList = k.linkList[:2] }, want: []string{"ok|modprobe dummy|"}},
		{name: "link: no dummy", files: files{"boot/config-" + release: strings.Replace(goodConfig, "CONFIG_DUMMY=m", "CONFIG_FOO=m", 1)},
			edit: func(_ *Host, k *fake) { k.linkList = k.linkList[:2] }, want: []string{"fail|dummy|modprobe dummy"}},
		{name: "link: somebody else's", edit: func(_ *Host, k *fake) { k.linkList[2].alias = "mine" }, want: []string{`fail|"mine"|ip link delete ravel0`}},
		{name: "link: half made", edit: func(_ *Host, k *fake) { k.linkList[2].alias, k.linkList[2].up = "", false }, want: []string{"ok|takes it over|"}},
		{name: "link: unreadable", edit: func(_ *Host, k *fake) { k.err = errors.New("no") }, want: []string{"warn|no|ip -d link"}},

		{name: "vip-address: on another link", edit: func(_ *Host, k *fake) {
			k.addrList = append(k.addrList, addr{netip.MustParsePrefix("2001:db8::1/128"), 2, "eth0"})
		}, want: []string{"fail|VIP 2001:db8::1 is on eth0 too|ip addr del 2001:db8::1/128 dev eth0"}},
		{name: "vip-address: on lo", edit: func(_ *Host, k *fake) {
			k.addrList = append(k.addrList, addr{netip.MustParsePrefix("192.0.2.1/32"), 1, "lo"})
		}, want: []string{"fail|192.0.2.1 is on lo too: this host keeps it|ip addr del 192.0.2.1/32 dev lo"}},
		{name: "vip-address: the host's own", edit: func(h *Host, _ *fake) { h.VIPs = addrsOf("10.0.1.11") }, want: []string{"fail|10.0.1.11 is on eth0|choose another VIP"}},
		{name: "vip-address: a node's", edit: func(h *Host, _ *fake) { h.VIPs = addrsOf("10.0.1.21", "10.0.1.12", "10.0.1.1") },
			want: []string{"fail|10.0.1.1 is the address of a peer|choose", "fail|of a director|choose", "fail|of a node|choose"}},
		{name: "vip-address: on a link of our name that is not ours", edit: func(_ *Host, k *fake) { k.linkList[2].alias = "" }, want: []string{"fail|192.0.2.1 is on ravel0|ip addr del 192.0.2.1/32 dev ravel0"}},

		{name: "vip-subnet: inside", edit: func(h *Host, _ *fake) { h.VIPs = addrsOf("10.0.1.200") }, want: []string{"warn|subnet 10.0.1.0/24 of eth0|outside of 10.0.1.0/24"}},
		{name: "vip-route: static", edit: func(_ *Host, k *fake) {
			k.entries[addrOf("2001:db8::1")] = entry{prefix: netip.MustParsePrefix("2001:db8::1/128"), unicast: true, link: "eth0", gateway: addrOf("fe80::1")}
		}, want: []string{"warn|by fe80::1 through eth0|ip route del 2001:db8::1/128 via fe80::1"}},
		{name: "vip-route: by BGP", edit: func(_ *Host, k *fake) {
			k.entries[addrOf("2001:db8::1")] = entry{prefix: netip.MustParsePrefix("2001:db8::1/128"), unicast: true, link: "eth0", protocol: 186}
		}, want: []string{"ok|routing daemon|"}},
		{name: "vip-route: the default only", edit: func(_ *Host, k *fake) { k.entries[addrOf("2001:db8::1")] = entry{unicast: true, link: "eth0"} }, want: []string{"ok|no other|"}},

		{name: "vip-ipvs: somebody else's", edit: func(_ *Host, k *fake) {
			k.svcs = []service{
				{key: ravel.ServiceKey{VIP: addrOf("192.0.2.1"), Proto: ravel.TCP, Port: 80}},
				{key: ravel.ServiceKey{VIP: addrOf("2001:db8::1"), Proto: ravel.UDP, Port: 53}},
				{key: ravel.ServiceKey{VIP: addrOf("192.0.2.1"), Proto: ravel.TCP, Port: 81}, ours: true},
			}
		}, want: []string{"fail|tcp 192.0.2.1:80|ipvsadm -D -t 192.0.2.1:80", "fail|udp [2001:db8::1]:53|ipvsadm -D -u [2001:db8::1]:53"}},
		{name: "vip-ipvs: on a realserver", role: "realserver", edit: func(_ *Host, k *fake) {
			k.svcs = []service{
				{key: ravel.ServiceKey{VIP: addrOf("192.0.2.1"), Proto: ravel.TCP, Port: 80}},
				{key: ravel.ServiceKey{VIP: addrOf("192.0.2.1"), Proto: ravel.TCP, Port: 81}, ours: true},
			}
		}, want: []string{"warn|on a realserver|ipvsadm -D", "warn|of a director of Ravel's|ravel cleanup"}},
		{name: "vip-ipvs: by mark", edit: func(_ *Host, k *fake) { k.svcs = []service{{mark: 7}} }, want: []string{"warn|1 services are by firewall mark|ipvsadm -Ln"}},
		{name: "vip-ipvs: other addresses", edit: func(_ *Host, k *fake) {
			k.svcs = []service{{key: ravel.ServiceKey{VIP: addrOf("10.96.0.1"), Proto: ravel.TCP, Port: 443}}}
		}, want: []string{"ok|1 of others|"}},
		{name: "vip-ipvs: not loaded", files: files{"proc/self/net/ip_vs": gone}, edit: func(_ *Host, k *fake) { k.svcs = []service{{mark: 7}} }},
		{name: "vip-ipvs: unreadable", edit: func(_ *Host, k *fake) { k.err = errors.New("no") }, want: []string{"warn|no|ipvsadm"}},
	}
	tested := map[string]bool{}
	tree := healthy()
	root := tree.write(t)
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			h, k := host()
			h.Role = test.role
			h.Root = root
			defer tree.change(t, root, test.files)()
			if test.edit != nil {
				test.edit(&h, k)
			}
			lines := h.Run(t.Context())
			wellFormed(t, lines)
			name, _, _ := strings.Cut(test.name, ":")
			tested[name] = true
			got := find(lines, name)
			if len(got) != len(test.want) {
				t.Fatalf("got %d lines, want %d:\n%v", len(got), len(test.want), got)
			}
			for i, want := range test.want {
				part := strings.SplitN(want, "|", 3)
				if string(got[i].Status) != part[0] || !strings.Contains(got[i].Detail, part[1]) || !strings.Contains(got[i].Fix, part[2]) {
					t.Errorf("line %d is\n%v\nwant %s", i, got[i], want)
				}
			}
		})
	}
	for _, name := range Names() {
		if !tested[name] {
			t.Errorf("no test of %s", name)
		}
	}
}

// Each file of the tree is spoilt in each way: nothing breaks, and each line keeps to the rules.
func TestNoFileBreaksALook(t *testing.T) {
	h, _ := host()
	tree := healthy()
	h.Root = tree.write(t)
	for name := range tree {
		for what, text := range map[string]string{
			"missing": gone, "unreadable": dir, "empty": "", "garbage": "\x00\xff\x1b]0;x\x07 - : 0A 99999999999999999999 CONFIG_=\n", "negative": "-1\n",
		} {
			undo := tree.change(t, h.Root, files{name: text})
			wellFormed(t, h.Run(t.Context()))
			if t.Failed() {
				t.Fatalf("with %s %s", name, what)
			}
			undo()
		}
	}
}

func TestAnEmptyTree(t *testing.T) {
	h, k := host()
	h.Root = t.TempDir()
	*k = fake{err: errors.New("no answer"), readonly: true}
	lines := h.Run(t.Context())
	wellFormed(t, lines)
	good := map[string]bool{}
	for _, l := range lines {
		if l.Status == OK {
			good[l.Name] = true
		}
	}
	// That a socket is not there is good; nothing else may be taken for good.
	for name := range good {
		if name != "socket" {
			t.Errorf("%s is ok where nothing can be read: %v", name, find(lines, name))
		}
	}
}

func TestACheckThatBreaksIsALine(t *testing.T) {
	f := newFacts(t.Context(), Host{Root: t.TempDir(), kernel: &fake{}})
	lines := f.run(check{name: "kernel", run: func(*facts) []Line { panic("boom\n") }})
	if len(lines) != 1 || lines[0].Status != Fail || lines[0].Name != "kernel" || lines[0].Detail != "the check itself broke: boom?" || lines[0].Fix == "" {
		t.Errorf("got %v", lines)
	}
}

func TestALookThatIsCutShort(t *testing.T) {
	h, _ := host()
	h.Root = healthy().write(t)
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	lines := h.Run(ctx)
	wellFormed(t, lines)
	if len(lines) != len(Names()) {
		t.Errorf("%d lines, want %d", len(lines), len(Names()))
	}
	for _, l := range lines {
		if l.Status != Warn {
			t.Errorf("not a warning: %v", l)
		}
	}
}

func TestPortsSayWhoHasThem(t *testing.T) {
	for comm, want := range map[string]Status{"ravel": Warn, "bird": Fail} {
		h, _ := host()
		h.Root = with(healthy(), files{
			"proc/self/net/tcp6": "  sl\n   0: 00000000000000000000000000000000:251C 0:0 0A 0:0 0:0 0 0 0 99 1\n",
			"proc/33/comm":       comm + "\n",
			"proc/33/fd":         dir,
		}).write(t)
		if err := os.Symlink("socket:[99]", filepath.Join(h.Root, "proc/33/fd/5")); err != nil {
			t.Fatal(err)
		}
		got := find(h.Run(t.Context()), "ports")
		if len(got) != 1 || got[0].Status != want || !strings.Contains(got[0].Detail, "(process 33)") || !strings.Contains(got[0].Detail, comm) {
			t.Errorf("%s: %v", comm, got)
		}
	}
}

func TestSocketOfALiveAndOfADeadRavel(t *testing.T) {
	h, k := host()
	h.Root = healthy().write(t)
	h.Socket = "/s"
	listener, err := net.Listen("unix", filepath.Join(h.Root, "s"))
	if err != nil {
		t.Fatal(err)
	}
	defer listener.Close()
	if got := find(h.Run(t.Context()), "socket"); len(got) != 1 || got[0].Status != OK || !strings.Contains(got[0].Detail, "taken over") {
		t.Errorf("nobody answers: %v", got)
	}
	k.alive = true
	if got := find(h.Run(t.Context()), "socket"); len(got) != 1 || got[0].Status != Warn {
		t.Errorf("one answers: %v", got)
	}
	if !(live{}).answers(filepath.Join(h.Root, "s")) || (live{}).answers(filepath.Join(h.Root, "none")) {
		t.Error("the kernel's own answer differs")
	}
}

func TestRolesHaveTheirOwnLines(t *testing.T) {
	lines := map[string][]string{}
	for _, role := range []string{"director", "realserver", ""} {
		h, _ := host()
		h.Role, h.Root = role, healthy().write(t)
		for _, l := range h.Run(t.Context()) {
			if !slices.Contains(lines[role], l.Name) {
				lines[role] = append(lines[role], l.Name)
			}
		}
	}
	if slices.Contains(lines["director"], "forwarding") || slices.Contains(lines["director"], "directors") || !slices.Contains(lines["director"], "mh-table") {
		t.Errorf("director: %v", lines["director"])
	}
	if slices.Contains(lines["realserver"], "ipvs") || slices.Contains(lines["realserver"], "peers") || !slices.Contains(lines["realserver"], "tunnel") {
		t.Errorf("realserver: %v", lines["realserver"])
	}
	if diff := cmp.Diff(Names(), lines[""]); diff != "" {
		t.Errorf("both (-names +lines):\n%s", diff)
	}
}

// What a director sets stands in its own package, which this one does not import.
func TestSettingsAreTheDirectors(t *testing.T) {
	source, err := os.ReadFile("../../director/sysctls.go")
	if err != nil {
		t.Fatal(err)
	}
	var want []string
	for _, m := range regexp.MustCompile(`(?m)^\t\{"([a-z_]+)", "([0-9]+)"\},`).FindAllStringSubmatch(string(source), -1) {
		want = append(want, m[1]+"="+m[2])
	}
	var got []string
	for _, s := range ipvsSettings {
		got = append(got, s.name+"="+s.value)
	}
	if diff := cmp.Diff(want, got); diff != "" || len(want) == 0 {
		t.Errorf("-director +check:\n%s", diff)
	}
}

func TestDocsNameEveryLine(t *testing.T) {
	text, err := os.ReadFile("../../docs/check.md")
	if err != nil {
		t.Fatal(err)
	}
	var documented []string
	for _, m := range regexp.MustCompile("(?m)^\\| `([a-z0-9-]+)` \\|").FindAllStringSubmatch(string(text), -1) {
		documented = append(documented, m[1])
	}
	if diff := cmp.Diff(Names(), documented); diff != "" {
		t.Errorf("-code +docs/check.md:\n%s", diff)
	}
}

func TestWords(t *testing.T) {
	for in, want := range map[string]string{
		"eth0.100": "eth0.100", "": "''", "-f": "'-f'", "a b": "'a b'", "$(reboot)": "'$(reboot)'", "it's": `'it'\''s'`, "x`y`": "'x`y`'",
	} {
		if got := word(in); got != want {
			t.Errorf("word(%q) = %s, want %s", in, got, want)
		}
	}
	if got := some([]int{1, 2, 3, 4, 5, 6, 7}); got != "1, 2, 3, 4, 5 and 2 more" {
		t.Error(got)
	}
	if got := tidy([]netip.Addr{addrOf("::1"), {}, addrOf("::ffff:192.0.2.1"), addrOf("192.0.2.1"), addrOf("fe80::1%eth0")}); !slices.Equal(got, addrsOf("192.0.2.1", "::1", "fe80::1")) {
		t.Error(got)
	}
	if got := (Line{Fail, "link", "x", "y"}).String(); got != "fail link: x\n     fix: y" {
		t.Errorf("%q", got)
	}
	b, err := json.Marshal([]Line{{OK, "link", "x", ""}, {Warn, "link", "x", "y"}})
	if want := `[{"status":"ok","name":"link","detail":"x"},{"status":"warn","name":"link","detail":"x","fix":"y"}]`; err != nil || string(b) != want {
		t.Errorf("%s, %v", b, err)
	}
	if got := Worst([]Line{{Status: OK}, {Status: Fail}, {Status: Warn}}); got != Fail {
		t.Error(got)
	}
}

// The modules that are to be loaded are found by all checks that look for one.
func TestModules(t *testing.T) {
	h, _ := host()
	h.Root = healthy().write(t)
	_, all := h.run(t.Context(), checks())
	needed, wished := h.Modules(t.Context())
	if got, want := slices.Concat(needed, wished), all.loadable; len(want) == 0 || !slices.Equal(slices.Sorted(slices.Values(got)), slices.Sorted(slices.Values(want))) {
		t.Errorf("modules %v, and all checks look for %v", got, want)
	}
}
