// Package nftnat keeps redirects before those of a kube-proxy that works with nftables.
//
// Such a kube-proxy has a hook of the same priority as the nat tables of iptables, and makes it anew whenever it starts;
// of two hooks of one priority the younger is called first. So for a VIP that kube-proxy knows too, rules of iptables come
// too late. Where it runs, redirects stand also in a table of nf_tables of our own, ravel, whose hook has a priority
// before it: what was redirected once meets no other rule of nat.
//
// What a change costs is in proportion to the change: rules are few and stay, and the pods are elements of maps. A
// redirect's pods have as many slots as it takes for shares that differ by an eighth at most; one is picked at random.
// All of a change takes effect at once.
package nftnat

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"net/netip"
	"os"
	"slices"

	"golang.org/x/sys/unix"

	"github.com/ravel-lb/ravel"
)

const (
	table    = "ravel"
	chain    = "prerouting"
	priority = -101 // before dstnat (NF_IP_PRI_NAT_DST), after mangle and conntrack

	// kubeProxy is the table of kube-proxy (pkg/proxy/nftables).
	kubeProxy = "kube-proxy"
)

// classes are how many slots redirects have: the first that is enough for eight a pod; one pod needs one.
var classes = []uint32{1, 16, 128, 1024}

// Table is the table of one address family. Its methods are for one goroutine at a time.
type Table struct {
	family     uint8
	inUse      bool   // nf_tables is
	flow, masq uint32 // bits of the connection's mark, and of the packet's to masquerade
	noMasq     []netip.Prefix
	known      bool // made and held are what the kernel holds
	made       bool // the table is there
	held       map[ravel.ServiceKey]ravel.Redirect
}

// New returns the table of a family, which touches nothing yet. Redirected flows get the bit flow in their connection's
// mark; those to masquerade the bit masq in the packet's, unless they come from one of noMasq, which are of the family.
// inUse says that this host's iptables are those of nf_tables; otherwise that is asked nothing unless it is loaded, for
// asking would load it.
func New(v6, inUse bool, flow, masq uint32, noMasq []netip.Prefix) *Table {
	t := &Table{family: unix.NFPROTO_IPV4, inUse: inUse, flow: flow, masq: masq, noMasq: noMasq}
	if v6 {
		t.family = unix.NFPROTO_IPV6
	}
	return t
}

// Needed reports whether a kube-proxy works with nftables in this network namespace.
func (t *Table) Needed() (bool, error) { return t.there(kubeProxy) }

// there reports whether a table of the family is in the kernel.
func (t *Table) there(name string) (bool, error) {
	if !t.inUse && !loaded() {
		return false, nil
	}
	return there(t.family, name)
}

// loaded reports whether nf_tables is in the kernel, for kernels that load modules.
func loaded() bool {
	if _, err := os.Stat("/sys/module/nf_tables"); err == nil {
		return true
	}
	_, err := os.Stat("/proc/modules")
	return errors.Is(err, fs.ErrNotExist)
}

// Held reports whether the table is in the kernel, as last known.
func (t *Table) Held() bool { return t.made }

// Lost reports whether somebody removed the table, as "nft flush ruleset" does; the next Apply then makes it again. What
// others change inside of it is not looked for.
func (t *Table) Lost() (bool, error) {
	if !t.made {
		return false, nil
	}
	found, err := t.there(table)
	if err == nil && !found {
		t.known, t.made = false, false
	}
	return err == nil && !found, err
}

// Apply makes the redirects true, each key of which is there once and of the family. A redirect without pods has none.
func (t *Table) Apply(redirects []ravel.Redirect) error {
	want := make(map[ravel.ServiceKey]ravel.Redirect, len(redirects))
	for _, r := range redirects {
		if len(r.Pods) > 0 {
			want[r.Key] = r
		}
	}
	b := newBatch(t.family)
	held := t.held
	if !t.known || !t.made {
		held = nil
		t.rebuild(b)
	}
	gone, come := map[string][]element{}, map[string][]element{}
	for key, old := range held {
		if now, stays := want[key]; !stays || !same(old, now) {
			difference(elementsOf(old), elementsOf(want[key]), gone)
		}
	}
	for key, now := range want {
		if old, was := held[key]; !was || !same(old, now) {
			difference(elementsOf(now), elementsOf(held[key]), come)
		}
	}
	if len(gone)+len(come) == 0 && t.known && t.made {
		return nil
	}
	t.elements(b, delElements, gone)
	t.elements(b, newElements, come)
	if err := b.send(); err != nil {
		t.known = false
		return fmt.Errorf("changing table %s of nf_tables: %w", table, err)
	}
	t.known, t.made, t.held = true, true, want
	return nil
}

// Remove removes the table, and returns what it did, or with dryRun would do, in the words of nft.
func (t *Table) Remove(dryRun bool) ([]string, error) {
	if t.known && !t.made {
		return nil, nil
	}
	found, err := t.there(table)
	if err != nil {
		return nil, err
	}
	family := map[uint8]string{unix.NFPROTO_IPV4: "ip", unix.NFPROTO_IPV6: "ip6"}[t.family]
	did := []string{"nft delete table " + family + " " + table}
	if !found {
		did = nil
	}
	if dryRun {
		return did, nil
	}
	if found {
		b := newBatch(t.family)
		b.add(delTable, 0, text(1, table))
		if err := b.send(); err != nil {
			return nil, fmt.Errorf("removing table %s of nf_tables: %w", table, err)
		}
	}
	t.known, t.made, t.held = true, false, nil
	return did, nil
}

// same reports whether two redirects of a key are the same here.
func same(a, b ravel.Redirect) bool {
	return a.Masquerade == b.Masquerade && slices.Equal(a.Pods, b.Pods)
}

// rebuild begins anew, whatever there was.
func (t *Table) rebuild(b *batch) {
	b.add(newTable, unix.NLM_F_CREATE, text(1, table))
	b.add(delTable, 0, text(1, table))
	b.add(newTable, unix.NLM_F_CREATE, text(1, table))
	before := int32(priority)
	b.add(newChain, unix.NLM_F_CREATE, text(1, table), text(3, chain),
		nest(4, number(1, 0), number(2, uint32(before))), text(7, "nat"))
	size := t.size()
	for id, m := range t.maps() {
		b.add(newSet, unix.NLM_F_CREATE, text(1, table), text(2, m.name), number(3, 0x8), // NFT_SET_MAP
			number(4, 0), number(5, size+12), number(6, 0), number(7, size+4), number(10, uint32(1+id)))
	}
	for id, m := range t.maps() {
		for _, conditions := range t.conditions(m.masquerade) {
			b.add(newRule, unix.NLM_F_CREATE|unix.NLM_F_APPEND, text(1, table), text(2, chain),
				nest(4, slices.Concat(conditions.match, t.redirect(m, uint32(1+id), conditions.mark))...))
		}
	}
}

// size is how many bytes an address has.
func (t *Table) size() uint32 {
	if t.family == unix.NFPROTO_IPV6 {
		return 16
	}
	return 4
}

// podMap is one map from VIP, protocol, port and slot to a pod.
type podMap struct {
	name       string
	slots      uint32
	masquerade bool
}

func (t *Table) maps() (all []podMap) {
	for _, masquerade := range []bool{false, true} {
		for _, slots := range classes {
			all = append(all, podMap{mapName(slots, masquerade), slots, masquerade})
		}
	}
	return all
}

func mapName(slots uint32, masquerade bool) string {
	if masquerade {
		return fmt.Sprintf("masquerade-%d", slots)
	}
	return fmt.Sprintf("pods-%d", slots)
}

// condition is what a rule matches besides its map, and whether it marks packets to be masqueraded.
type condition struct {
	match [][]byte
	mark  bool
}

// conditions are those of the rules of one map, in order.
func (t *Table) conditions(masquerade bool) (all []condition) {
	if !masquerade {
		return []condition{{}}
	}
	offset := uint32(12) // of the source address
	if t.family == unix.NFPROTO_IPV6 {
		offset = 8
	}
	for _, p := range t.noMasq {
		mask := make([]byte, t.size())
		for i := range p.Bits() {
			mask[i/8] |= 0x80 >> (i % 8)
		}
		all = append(all, condition{match: [][]byte{
			expr("payload", number(1, regKey), number(2, 1), number(3, offset), number(4, t.size())),
			expr("bitwise", number(1, regKey), number(2, regKey), number(3, t.size()), value(4, mask), value(5, make([]byte, t.size()))),
			expr("cmp", number(1, regKey), number(2, 0), value(3, p.Masked().Addr().AsSlice())),
		}})
	}
	return append(all, condition{mark: true})
}

// The registers of 4 bytes each that rules use: the map's key from the first on, what it leads to right after, and a
// last one for marks.
const (
	regKey  = 8  // NFT_REG32_00
	regMark = 23 // NFT_REG32_15
)

// redirect are the expressions that look a packet up in a map and, if it is there, mark it and redirect it.
func (t *Table) redirect(m podMap, id uint32, mark bool) [][]byte {
	offset, words := uint32(16), t.size()/4
	if t.family == unix.NFPROTO_IPV6 {
		offset = 24
	}
	proto := regKey + words
	port, slot, pod := proto+1, proto+2, proto+3
	list := [][]byte{
		expr("payload", number(1, regKey), number(2, 1), number(3, offset), number(4, t.size())),
		expr("meta", number(1, proto), number(2, 16)), // NFT_META_L4PROTO
		expr("payload", number(1, port), number(2, 2), number(3, 2), number(4, 2)),
		expr("numgen", number(1, slot), number(2, m.slots), number(3, 1)), // NFT_NG_RANDOM
		expr("lookup", text(1, m.name), number(2, regKey), number(3, pod), number(4, id)),
		expr("counter"),
		expr("ct", number(1, regMark), number(2, 3)), // NFT_CT_MARK
		setBit(t.flow),
		expr("ct", number(2, 3), number(4, regMark)),
	}
	if mark {
		list = append(list,
			expr("meta", number(1, regMark), number(2, 3)), // NFT_META_MARK
			setBit(t.masq),
			expr("meta", number(2, 3), number(3, regMark)))
	}
	return append(list, expr("nat", number(1, 1), number(2, uint32(t.family)), // NFT_NAT_DNAT
		number(3, pod), number(5, pod+words)))
}

// setBit sets a bit of the register for marks.
func setBit(bit uint32) []byte {
	return expr("bitwise", number(1, regMark), number(2, regMark), number(3, 4),
		value(4, binary.NativeEndian.AppendUint32(nil, ^bit)), value(5, binary.NativeEndian.AppendUint32(nil, bit)))
}

// element is one slot of one redirect, in the form of the kernel's registers.
type element struct{ key, data string }

// elementsOf returns the slots of a redirect by the name of their map; the zero redirect has none.
func elementsOf(r ravel.Redirect) map[string][]element {
	if len(r.Pods) == 0 {
		return nil
	}
	slots := classes[len(classes)-1]
	for _, c := range slices.Backward(classes) {
		if int(c) >= 8*len(r.Pods) || len(r.Pods) == 1 {
			slots = c
		}
	}
	list := make([]element, slots)
	for i := range list {
		pod := r.Pods[i*len(r.Pods)/int(slots)]
		key := append(r.Key.VIP.AsSlice(), byte(r.Key.Proto), 0, 0, 0)
		key = append(binary.BigEndian.AppendUint16(key, r.Key.Port), 0, 0)
		key = binary.NativeEndian.AppendUint32(key, uint32(i))
		data := append(binary.BigEndian.AppendUint16(pod.Addr().AsSlice(), pod.Port()), 0, 0)
		list[i] = element{string(key), string(data)}
	}
	return map[string][]element{mapName(slots, r.Masquerade): list}
}

// difference adds to out what is in a and not in b.
func difference(a, b map[string][]element, out map[string][]element) {
	for name, list := range a {
		other := map[element]bool{}
		for _, e := range b[name] {
			other[e] = true
		}
		for _, e := range list {
			if !other[e] {
				out[name] = append(out[name], e)
			}
		}
	}
}

// perMessage is how many elements a message has: the length of an attribute has 16 bits.
const perMessage = 500

func (t *Table) elements(b *batch, kind uint16, lists map[string][]element) {
	for _, name := range slices.Sorted(maps.Keys(lists)) {
		for part := range slices.Chunk(lists[name], perMessage) {
			var all [][]byte
			for _, e := range part {
				parts := [][]byte{value(1, []byte(e.key))}
				if kind == newElements {
					parts = append(parts, value(2, []byte(e.data)))
				}
				all = append(all, nest(listElem, parts...))
			}
			b.add(kind, unix.NLM_F_CREATE, text(1, table), text(2, name), nest(3, all...))
		}
	}
}
