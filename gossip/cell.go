package gossip

import (
	"cmp"
	"strings"
)

// cell is the unit of what travels. Of two with one key that with the higher rank counts; of equal ranks that with the
// greater bytes. So a set of cells is a join semilattice: in whatever order, however often and by whatever way cells
// arrive, those who saw the same hold the same. A cell is never changed after it is made.
type cell struct {
	key
	rank
	value   string // empty in an author's cell is a tombstone
	unknown string // fields of newer versions, as they came
	spot    uint64 // hash of the key: its place in a digest
	hash    uint64 // of all of it
}

// key names a cell. An empty author is the fleet: everybody writes.
type key struct {
	topic  uint32
	author string
	name   string
}

// rank orders the versions of one cell.
type rank struct{ hi, lo uint64 }

func (r rank) compare(q rank) int { return cmp.Or(cmp.Compare(r.hi, q.hi), cmp.Compare(r.lo, q.lo)) }

// The limits of a cell. Whatever is beyond is refused.
const (
	maxKey   = 256      // bytes of author and name
	maxValue = 64 << 10 // bytes of value and unknown fields
	// wild is how far a rank may be above all that is known of its kind: honest writers raise by one.
	wild = 1 << 40
	// utmost is above all that an honest writer will ever reach.
	utmost = 1 << 62
)

func newCell(k key, r rank, value, unknown string) *cell {
	c := &cell{key: k, rank: r, value: value, unknown: unknown}
	h := newHash().number(uint64(k.topic)).text(k.author).text(k.name)
	c.spot = h.sum()
	c.hash = h.number(r.hi).number(r.lo).text(value).text(unknown).sum()
	return c
}

// compare orders versions of one cell; 0 means that they are the same.
func (c *cell) compare(d *cell) int {
	return cmp.Or(c.rank.compare(d.rank), strings.Compare(c.value, d.value), strings.Compare(c.unknown, d.unknown))
}

// fnv is FNV-1a of 64 bits, whose end is mixed (MurmurHash3's finalizer), for the hashes of many cells are put together
// by XOR. It is part of the wire format.
type fnv uint64

func newHash() fnv { return 0xcbf29ce484222325 }

func (h fnv) byte(b byte) fnv { return (h ^ fnv(b)) * 0x100000001b3 }

func (h fnv) number(n uint64) fnv {
	for range 8 {
		h = h.byte(byte(n))
		n >>= 8
	}
	return h
}

func (h fnv) text(s string) fnv {
	h = h.number(uint64(len(s)))
	for i := range len(s) {
		h = h.byte(s[i])
	}
	return h
}

func (h fnv) sum() uint64 {
	x := uint64(h)
	x ^= x >> 33
	x *= 0xff51afd7ed558ccd
	x ^= x >> 33
	x *= 0xc4ceb9fe1a85ec53
	return x ^ x>>33
}
