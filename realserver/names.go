package realserver

import (
	"crypto/sha256"
	"encoding/base32"
	"fmt"
	"maps"
	"net/netip"
	"regexp"
	"slices"
	"strings"

	"github.com/ravel-lb/ravel"
	"github.com/ravel-lb/ravel/internal/iptables"
)

// names are the chains of ours. With the base chain RAVEL:
//
//	nat     RAVEL, RAVEL-VIP-*, RAVEL-SVC-*, RAVEL-REST, RAVEL-MASQ, RAVEL-POST
//	filter  RAVEL-FORWARD, RAVEL-OUTER
//	mangle  RAVEL-TUNNEL, RAVEL-DECAP, RAVEL-KNOWN, RAVEL-MSS, RAVEL-SYN, RAVEL-MTU
//
// A chain of such a name in such a table is ours whoever made it; no other is.
type names struct {
	base string

	rest          string // nat: keeps from later rules what is for a VIP and no redirect
	masq, post    string // nat: marks flows to masquerade; masquerades them
	forward       string // filter: accepts redirected flows
	input         string // filter: accepts the tunnel's packets from directors
	tunnel, decap string // mangle: marks the tunnel's packets; looks at what came out of them
	known         string // mangle: what came out of a director's
	mss           string // mangle: clamps the segments that replies announce
	syn           string // mangle: clamps those that clients announce
	mtu           string // mangle: clamps by the MTU of VIPs
}

// hashLen is how many characters of a chain's name are a hash: 60 bits.
const hashLen = 12

// goodChain leaves room for the longest suffix in the 28 characters that iptables takes.
var goodChain = regexp.MustCompile(`^` + iptables.Prefix + `[A-Z0-9]{0,5}$`)

func newNames(base string) (names, error) {
	if base == "" {
		base = iptables.Prefix
	}
	if !goodChain.MatchString(base) {
		return names{}, fmt.Errorf("iptables chain %q: want %s and at most 5 upper case letters or digits after it", base, iptables.Prefix)
	}
	return names{
		base: base, rest: base + "-REST", masq: base + "-MASQ", post: base + "-POST",
		forward: base + "-FORWARD", input: base + "-OUTER",
		tunnel: base + "-TUNNEL", decap: base + "-DECAP", known: base + "-KNOWN", mss: base + "-MSS",
		syn: base + "-SYN", mtu: base + "-MTU",
	}, nil
}

// vip returns the chain of all redirects of one VIP.
func (n names) vip(vip netip.Addr) string { return n.base + "-VIP-" + hash(vip.String()) }

// service returns the chain that picks the pod of one redirect.
func (n names) service(key ravel.ServiceKey) string { return n.base + "-SVC-" + hash(key.String()) }

func hash(s string) string {
	sum := sha256.Sum256([]byte(s))
	return base32.StdEncoding.EncodeToString(sum[:])[:hashLen]
}

// kindOf splits the name of a chain into what may be a base and the rest.
var kindOf = regexp.MustCompile(`^(` + iptables.Prefix + `[A-Z0-9]{0,5})(-[A-Z0-9-]+)?$`)

// basesIn returns the bases of all chains of ours in a table, whatever the setting was when they were made. A chain
// without a suffix has a name that another program might think of too: it is taken for a base only if there is nothing
// in it but jumps to chains of its own.
func basesIn(table string, lines []string) []string {
	bases := map[string]bool{}
	all := parseSaved(lines, func(chain string) bool { return kindOf.MatchString(chain) })
	for chain, rules := range all {
		n, err := newNames(kindOf.FindStringSubmatch(chain)[1])
		if err != nil || !n.ours(table, chain) {
			continue
		}
		foreign := func(rule string) bool { return !strings.HasPrefix(argument(iptables.Words(rule), "-j"), n.base+"-") }
		if chain != n.base || chain == iptables.Prefix || !slices.ContainsFunc(rules, foreign) {
			bases[n.base] = true
		}
	}
	return slices.Sorted(maps.Keys(bases))
}

// ours reports whether a chain of a table is one that this package makes.
func (n names) ours(table, chain string) bool {
	switch table {
	case "nat":
		if chain == n.base || chain == n.rest || chain == n.masq || chain == n.post {
			return true
		}
		for _, kind := range []string{"-VIP-", "-SVC-"} {
			if tail, ok := strings.CutPrefix(chain, n.base+kind); ok {
				return len(tail) == hashLen
			}
		}
	case "filter":
		return chain == n.forward || chain == n.input
	case "mangle":
		return chain == n.tunnel || chain == n.decap || chain == n.known || chain == n.mss || chain == n.syn || chain == n.mtu
	}
	return false
}

// hook is a jump to a chain of ours from one of the kernel's.
type hook struct {
	table, chain, to string
	before           string // stands before the jump to this chain; empty stands first
}

// hooks returns the jumps in the order in which they are made: what lets packets pass stands before anything is
// redirected. In nat PREROUTING ours need not be first, only before kube-proxy's and before what takes packets for any
// address of the host (see stands): programs that each want to be first, as Calico's agent does, would overtake one
// another for ever.
func (n names) hooks() []hook {
	return []hook{
		{table: "mangle", chain: "PREROUTING", to: n.tunnel},
		{table: "mangle", chain: "PREROUTING", to: n.syn},
		{table: "mangle", chain: "POSTROUTING", to: n.mss},
		{table: "filter", chain: "INPUT", to: n.input},
		{table: "filter", chain: "FORWARD", to: n.forward},
		{table: "nat", chain: "POSTROUTING", to: n.post},
		n.redirecting(),
	}
}

// redirecting is the jump that leads packets to the redirects.
func (n names) redirecting() hook {
	return hook{table: "nat", chain: "PREROUTING", to: n.base, before: "KUBE-SERVICES"}
}

// maxComment is what of a redirect's name goes into its rule's comment; iptables takes 255 bytes.
const maxComment = 200

// comment makes a name safe as the text of a comment in iptables-restore's input: one line of plain characters that
// begins with a letter, a digit or an underscore.
func comment(name string) string {
	var b strings.Builder
	for _, c := range name {
		if b.Len() == maxComment {
			break
		}
		switch {
		case c >= 'a' && c <= 'z', c >= 'A' && c <= 'Z', c >= '0' && c <= '9', c == '_',
			b.Len() > 0 && strings.ContainsRune("-./:@ ", c):
			b.WriteRune(c)
		default:
			b.WriteByte('_')
		}
	}
	return strings.TrimRight(b.String(), " ")
}
