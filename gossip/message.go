package gossip

import (
	"net/netip"

	"google.golang.org/protobuf/encoding/protowire"
)

// wireVersion is the newest version of the wire format that this release speaks, and oldestVersion what a reader must
// know at least to read what it sends. A message says the latter of itself.
const (
	wireVersion   = 1
	oldestVersion = 1
)

// kind is what a message is. One of a kind that is not known here is dropped and counted.
type kind uint32

const (
	deltaKind   kind = 1 // cells
	ackKind     kind = 2 // a delta has come
	summaryKind kind = 3 // the sum of all that concerns both: is yours the same?
	sameKind    kind = 4 // it is
	digestKind  kind = 5 // it is not: sums of parts
	helloKind   kind = 6 // I am new here
)

var kinds = [...]string{deltaKind: "delta", ackKind: "ack", summaryKind: "summary", sameKind: "same", digestKind: "digest", helloKind: "hello"}

func (k kind) String() string {
	if int(k) < len(kinds) && k != 0 {
		return kinds[k]
	}
	return "unknown"
}

const (
	maxMessage = 512 << 10 // bytes that are taken in
	maxDelta   = 256 << 10 // bytes of cells that are sent at once
	maxPacket  = 1200      // bytes that go as a packet; more goes as a stream
)

// envelope is what every message is in.
type envelope struct {
	version uint64
	kind    kind
	sender  string
	from    netip.AddrPort // where the sender gossips; of two with one name only one is heard
	body    []byte
}

func seal(k kind, sender string, from netip.AddrPort, body []byte) []byte {
	b := make([]byte, 0, len(body)+len(sender)+40)
	b = appendVarint(b, 1, oldestVersion)
	b = appendVarint(b, 2, uint64(k))
	b = appendText(b, 3, sender)
	b = appendText(b, 4, body)
	return appendText(b, 5, addrPortName(from))
}

func open(b []byte) (e envelope, ok bool) {
	ok = eachField(b, func(x field) bool {
		var n uint64
		switch x.number {
		case 1:
			return x.varint(&e.version)
		case 2:
			ok := x.varint(&n) && n < 1<<31
			e.kind = kind(n)
			return ok
		case 3:
			return x.text(&e.sender)
		case 4:
			e.body = x.data
			return x.kind == protowire.BytesType
		case 5:
			var ok bool
			e.from, ok = parseAddrPort(x.data)
			return ok && x.kind == protowire.BytesType
		}
		return true
	})
	return e, ok && e.version > 0 && e.kind > 0 && e.sender != "" && len(e.sender) <= maxName
}

// appendCell writes a cell as a field.
func appendCell(b []byte, number protowire.Number, c *cell) []byte {
	return appendText(b, number, marshalCell(c))
}

func marshalCell(c *cell) []byte {
	b := make([]byte, 0, 32+len(c.author)+len(c.name)+len(c.value)+len(c.unknown))
	b = appendVarint(b, 1, uint64(c.topic))
	if c.author != "" {
		b = appendText(b, 2, c.author)
	}
	b = appendText(b, 3, c.name)
	b = appendVarint(b, 4, c.hi)
	b = appendVarint(b, 5, c.lo)
	if c.value != "" {
		b = appendText(b, 6, c.value)
	}
	return append(b, c.unknown...)
}

func parseCell(b []byte) (*cell, bool) {
	var k key
	var r rank
	var value string
	var unknown []byte
	ok := eachField(b, func(x field) bool {
		var n uint64
		switch x.number {
		case 1:
			ok := x.varint(&n) && n < 1<<31
			k.topic = uint32(n)
			return ok
		case 2:
			return x.text(&k.author)
		case 3:
			return x.text(&k.name)
		case 4:
			return x.varint(&r.hi)
		case 5:
			return x.varint(&r.lo)
		case 6:
			return x.text(&value)
		}
		unknown = append(unknown, x.raw...)
		return true
	})
	if !ok || k.topic == 0 || k.author != "" && r.hi == 0 {
		return nil, false
	}
	return newCell(k, r, value, string(unknown)), true
}

// delta carries cells.
type delta struct {
	cells []*cell
	bad   int    // cells that could not be read
	seq   uint64 // to be acknowledged, if not 0
	// answer says that this ends an exchange: all that was asked for is sent.
	answer bool
	more   bool // the sender had not room for all
}

func parseDelta(b []byte) (d delta, ok bool) {
	ok = eachField(b, func(x field) bool {
		var n uint64
		switch x.number {
		case 1:
			if x.kind != protowire.BytesType {
				return false
			}
			c, ok := parseCell(x.data)
			if !ok {
				d.bad++
				return true
			}
			d.cells = append(d.cells, c)
		case 2:
			return x.fixed(&d.seq)
		case 3:
			ok := x.varint(&n)
			d.answer = n != 0
			return ok
		case 4:
			ok := x.varint(&n)
			d.more = n != 0
			return ok
		}
		return true
	})
	return d, ok
}

// parseSums reads what a summary, its answer and an acknowledgement are: two numbers, each 0 where it is not there.
func parseSums(b []byte) (first, second uint64, ok bool) {
	ok = eachField(b, func(x field) bool {
		switch x.number {
		case 1:
			return x.fixed(&first)
		case 2:
			return x.fixed(&second)
		}
		return true
	})
	return first, second, ok
}

// digest tells sums of spans, and what they hold.
type digest struct {
	nodes []node
	// leaves say which cells the sender holds in a span: what it lacks is to be sent, what the reader lacks to be asked
	// for.
	leaves []leaf
	// wants are cells that the sender asks for.
	wants []leaf
	more  bool // the sender had not room for all
	room  int  // bytes that it may still grow
}

func (d *digest) fits(hashes []uint64) bool {
	n := 24 + 8*len(hashes)
	if d.room < n {
		d.more = true
		return false
	}
	d.room -= n
	return true
}

func (d *digest) node(n node) {
	if d.fits(n.sums) {
		d.nodes = append(d.nodes, n)
	}
}

func (d *digest) leaf(l leaf) {
	if d.fits(l.hashes) {
		d.leaves = append(d.leaves, l)
	}
}

func (d *digest) want(l leaf) {
	if d.fits(l.hashes) {
		d.wants = append(d.wants, l)
	}
}

// node is a span and the sums of its children.
type node struct {
	span
	sums []uint64 // fanout of them
}

// leaf is cells of a span by their hashes.
type leaf struct {
	span
	hashes []uint64
}

// set is the hashes, to look them up.
func (l leaf) set() map[uint64]struct{} {
	m := make(map[uint64]struct{}, len(l.hashes))
	for _, h := range l.hashes {
		m[h] = struct{}{}
	}
	return m
}

func (d digest) empty() bool { return len(d.nodes)+len(d.leaves)+len(d.wants) == 0 }

func marshalDigest(d digest) []byte {
	var b []byte
	part := func(number protowire.Number, s span, hashes []uint64) {
		p := appendVarint(nil, 1, uint64(s.depth))
		p = appendVarint(p, 2, s.prefix)
		b = appendText(b, number, appendHashes(p, 3, hashes))
	}
	for _, n := range d.nodes {
		part(1, n.span, n.sums)
	}
	for _, l := range d.leaves {
		part(2, l.span, l.hashes)
	}
	for _, l := range d.wants {
		part(3, l.span, l.hashes)
	}
	if d.more {
		b = appendVarint(b, 4, 1)
	}
	return b
}

func parseDigest(b []byte) (d digest, ok bool) {
	var spans []span
	ok = eachField(b, func(x field) bool {
		if x.number == 4 {
			var n uint64
			ok := x.varint(&n)
			d.more = n != 0
			return ok
		}
		if x.number < 1 || x.number > 3 {
			return true
		}
		if x.kind != protowire.BytesType {
			return false
		}
		l, ok := parseLeaf(x.data)
		spans = append(spans, l.span)
		switch {
		case !ok:
			return false
		case x.number == 1:
			d.nodes = append(d.nodes, node{l.span, l.hashes})
			return len(l.hashes) == fanout && l.depth < maxDepth
		case x.number == 2:
			d.leaves = append(d.leaves, l)
		default:
			d.wants = append(d.wants, l)
		}
		return true
	})
	return d, ok && disjoint(spans)
}

func parseLeaf(b []byte) (l leaf, ok bool) {
	ok = eachField(b, func(x field) bool {
		var n uint64
		switch x.number {
		case 1:
			ok := x.varint(&n) && n <= maxDepth
			l.depth = int(n)
			return ok
		case 2:
			return x.varint(&l.prefix)
		case 3:
			return x.hashes(&l.hashes)
		}
		return true
	})
	return l, ok && l.valid()
}
