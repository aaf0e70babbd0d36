package check

import (
	"bytes"
	"cmp"
	"compress/gzip"
	"context"
	"errors"
	"maps"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"github.com/ravel-lb/ravel"
)

// fake is a kernel whose answers are set.
type fake struct {
	linkList []link
	addrList []addr
	routes   map[netip.Addr]route
	entries  map[netip.Addr]entry
	svcs     []service
	chains   []chain
	saved    map[string]string // by table, "6" before that of IPv6
	programs map[string]string // what each prints as its version
	readonly bool
	alive    bool
	uname    string
	err      error // of all that can fail
}

func (k *fake) links() ([]link, error)       { return k.linkList, k.err }
func (k *fake) addrs() ([]addr, error)       { return k.addrList, k.err }
func (k *fake) services() ([]service, error) { return k.svcs, k.err }
func (k *fake) nft() ([]chain, error)        { return k.chains, k.err }
func (k *fake) answers(string) bool          { return k.alive }
func (k *fake) machine() (string, error)     { return k.uname, k.err }

func (k *fake) route(a netip.Addr) (route, error) {
	if r, known := k.routes[a]; known {
		return r, k.err
	}
	return route{}, cmp.Or(k.err, errNoRoute)
}

func (k *fake) entry(a netip.Addr) (entry, error) {
	if e, known := k.entries[a]; known {
		return e, k.err
	}
	return entry{}, cmp.Or(k.err, errNoRoute)
}

func (k *fake) legacy(_ context.Context, v6 bool, table string) (string, error) {
	if v6 {
		table = "6" + table
	}
	return k.saved[table], k.err
}

func (k *fake) program(name string) (string, error) {
	if _, there := k.programs[name]; there {
		return "/sbin/" + name, nil
	}
	return "", &exec.Error{Name: name, Err: exec.ErrNotFound}
}

func (k *fake) version(_ context.Context, path string) (string, error) {
	return k.programs[filepath.Base(path)], k.err
}

func (k *fake) writable(string) error {
	if k.readonly {
		return errors.New("read-only file system")
	}
	return nil
}

// files are a tree by path. A file that holds dir is a directory, which cannot be read as a file by anybody.
type files map[string]string

const dir = "\x00dir"

func (f files) write(t testing.TB) string {
	t.Helper()
	root := t.TempDir()
	for name, text := range f {
		path := filepath.Join(root, name)
		var err error
		if text == dir {
			err = os.MkdirAll(path, 0o755)
		} else if err = os.MkdirAll(filepath.Dir(path), 0o755); err == nil {
			err = os.WriteFile(path, []byte(text), 0o644)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	return root
}

// change makes the tree below root differ from f, and returns what undoes that. Directories that become empty go.
func (f files) change(t testing.TB, root string, other files) (undo func()) {
	t.Helper()
	put := func(name, text string) {
		path := filepath.Join(root, name)
		err := os.RemoveAll(path)
		switch text {
		case gone:
			for up := filepath.Dir(path); up != root && os.Remove(up) == nil; up = filepath.Dir(up) {
			}
		case dir:
			err = errors.Join(err, os.MkdirAll(path, 0o755))
		default:
			err = errors.Join(err, os.MkdirAll(filepath.Dir(path), 0o755), os.WriteFile(path, []byte(text), 0o644))
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	for name, text := range other {
		put(name, text)
	}
	return func() {
		for name := range other {
			put(name, gone)
		}
		for name := range other {
			if text, was := f[name]; was {
				put(name, text)
			}
		}
	}
}

func with(base, other files) files {
	all := maps.Clone(base)
	maps.Copy(all, other)
	return all
}

// gone takes a file away from a tree.
const gone = "\x00gone"

func gzipped(s string) string {
	var b bytes.Buffer
	w := gzip.NewWriter(&b)
	_, _ = w.Write([]byte(s))
	_ = w.Close()
	return b.String()
}

func addrOf(s string) netip.Addr { return netip.MustParseAddr(s) }

func addrsOf(list ...string) (all []netip.Addr) {
	for _, s := range list {
		all = append(all, addrOf(s))
	}
	return all
}

const release = "6.1.0-test"

const moduleDir = "lib/modules/" + release + "/"

// healthy is a tree that has nothing to complain about.
func healthy() files {
	f := files{
		"proc/sys/kernel/osrelease":                 release + "\n",
		"proc/sys/kernel/modules_disabled":          "0\n",
		"proc/cmdline":                              "quiet\n",
		"proc/self/status":                          "Name:\travel\nCapEff:\t000001ffffffffff\n",
		"proc/self/uid_map":                         "         0          0 4294967295\n",
		"proc/self/mountinfo":                       "27 1 254:0 / / rw,relatime - ext4 /dev/vda rw\n22 27 0:21 / /proc rw,relatime - proc proc rw\n",
		"proc/self/net/ip_vs":                       "IP Virtual Server version 1.2.1 (size=1048576)\n",
		"proc/self/net/tcp":                         tcpHeader,
		"proc/self/net/tcp6":                        tcpHeader,
		"proc/self/net/ip_tables_names":             "",
		"proc/modules":                              "ip_vs_mh 5503 0 - Live 0x0\nip_vs 162529 2 ip_vs_mh, Live 0x0\nnf_defrag_ipv6 7483 2 ip_vs,nf_conntrack, Live 0x0\n",
		"boot/config-" + release:                    goodConfig,
		moduleDir + "modules.dep":                   "kernel/net/netfilter/xt_set.ko.zst: kernel/net/netfilter/x_tables.ko.zst\nkernel/drivers/net/dummy.ko:\nkernel/net/ipv4/ipip.ko:\n",
		moduleDir + "modules.builtin":               "kernel/net/ipv4/netfilter/ip_tables.ko\n",
		"sys/module/ip_vs/parameters/conn_tab_bits": "20\n",
		"proc/sys/net/ipv6/conf/all/disable_ipv6":   "0\n",
		"proc/sys/net/ipv6/conf/all/forwarding":     "1\n",
		"proc/sys/net/ipv4/ip_forward":              "1\n",
		"proc/sys/net/ipv4/conf/all/arp_ignore":     "1\n",
		"proc/sys/net/ipv4/conf/all/arp_announce":   "2\n",
		"proc/sys/net/ipv4/conf/all/rp_filter":      "0\n",
		"proc/sys/net/ipv4/conf/eth0/rp_filter":     "2\n",
		"proc/sys/net/netfilter/nf_conntrack_count": "0\n",
		"proc/sys/net/netfilter/nf_conntrack_max":   "262144\n",
	}
	for _, s := range ipvsSettings {
		f["proc/sys/net/ipv4/vs/"+s.name] = s.value + "\n"
	}
	return f
}

const tcpHeader = "  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode\n"

const goodConfig = `# Linux/x86 6.1 Kernel Configuration
CONFIG_IP_VS=m
CONFIG_IP_VS_IPV6=y
CONFIG_IP_VS_MH=m
CONFIG_IP_VS_MH_TAB_INDEX=12
CONFIG_NETFILTER_XT_SET=m
CONFIG_IP_NF_TARGET_REJECT=y
CONFIG_IP6_NF_TARGET_REJECT=y
CONFIG_NETFILTER_XT_MATCH_STATISTIC=y
CONFIG_NETFILTER_XT_MATCH_CONNTRACK=y
CONFIG_NETFILTER_XT_CONNMARK=y
CONFIG_NETFILTER_XT_MARK=y
CONFIG_NETFILTER_XT_MATCH_COMMENT=y
CONFIG_NETFILTER_XT_NAT=y
CONFIG_NETFILTER_XT_TARGET_MASQUERADE=y
CONFIG_NETFILTER_XT_MATCH_TCPMSS=y
CONFIG_NETFILTER_XT_TARGET_TCPMSS=y
CONFIG_IP_SET=y
CONFIG_IP_SET_HASH_IP=y
CONFIG_IP_SET_HASH_IPPORT=y
CONFIG_NF_TABLES=y
CONFIG_NFT_COMPAT=y
CONFIG_NFT_NAT=y
CONFIG_IP_NF_FILTER=y
CONFIG_IP_NF_NAT=y
CONFIG_IP_NF_RAW=y
CONFIG_NETFILTER_XT_TARGET_CT=y
CONFIG_DUMMY=m
CONFIG_NET_IPIP=m
CONFIG_IPV6_TUNNEL=y
# CONFIG_IP_VS_DEBUG is not set
`

// both are the families' plain programs and those of both variants.
func bothVariants() map[string]string {
	all := map[string]string{}
	for _, name := range []string{"iptables", "ip6tables"} {
		for _, part := range []string{"", "-save", "-restore"} {
			all[name+"-nft"+part] = "v1.8.9 (nf_tables)"
			all[name+"-legacy"+part] = "v1.8.9 (legacy)"
		}
	}
	return all
}

// host is one that has nothing to complain about.
func host() (Host, *fake) {
	k := &fake{
		linkList: []link{
			{index: 1, name: "lo", kind: "device", up: true},
			{index: 2, name: "eth0", kind: "device", up: true, mtu: 1500},
			{index: 3, name: "ravel0", kind: "dummy", alias: "ravel", up: true},
			{index: 4, name: "tunl0", kind: "ipip", up: true},
			{index: 5, name: "ip6tnl0", kind: "ip6tnl", up: true},
		},
		addrList: []addr{
			{netip.MustParsePrefix("127.0.0.1/8"), 1, "lo"},
			{netip.MustParsePrefix("10.0.1.11/24"), 2, "eth0"},
			{netip.MustParsePrefix("192.0.2.1/32"), 3, "ravel0"},
		},
		routes: map[netip.Addr]route{
			addrOf("10.0.1.21"): {link: "eth0", mtu: 1500},
			addrOf("10.0.9.24"): {link: "eth0", mtu: 1500, gateway: addrOf("10.0.1.1")},
			addrOf("10.0.1.12"): {link: "eth0", mtu: 1500},
			addrOf("10.0.1.1"):  {link: "eth0", mtu: 1500},
		},
		entries:  map[netip.Addr]entry{addrOf("192.0.2.1"): {prefix: netip.MustParsePrefix("192.0.2.1/32"), local: true}},
		programs: bothVariants(),
		uname:    "x86_64",
	}
	return Host{
		VIPs: addrsOf("192.0.2.1", "2001:db8::1"), Nodes: addrsOf("10.0.1.21", "10.0.9.24"), Directors: addrsOf("10.0.1.12"),
		Peers:  []ravel.Peer{{Addr: addrOf("10.0.1.1"), ASN: 64512, LocalASN: 64513}},
		Listen: []netip.AddrPort{netip.MustParseAddrPort("[::]:179"), netip.MustParseAddrPort("127.0.0.1:9500")},
		Socket: "/run/ravel/ravel.sock", Tunnel: true, kernel: k,
	}, k
}
