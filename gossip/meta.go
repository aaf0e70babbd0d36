package gossip

import (
	"fmt"
	"net/netip"

	"github.com/hashicorp/memberlist"
	"github.com/ravel-lb/ravel"
	"google.golang.org/protobuf/encoding/protowire"
)

// meta is what memberlist tells everybody of a member, at most memberlist.MetaMaxSize bytes.
type meta struct {
	role    ravel.Role
	wire    uint32
	version string
	addrs   []netip.Addr
	phase   phase
	keys    []string // fingerprints of those that it can read
}

const (
	maxName    = 128 // bytes of a member's name
	maxVersion = 64  // bytes of the program's version
	maxAddrs   = 16
	maxKeys    = 4 // that a member tells of
)

func marshalMeta(m meta) ([]byte, error) {
	b := appendVarint(nil, 1, uint64(m.wire))
	b = appendVarint(b, 2, uint64(m.role))
	b = appendText(b, 3, m.version[:min(len(m.version), maxVersion)])
	for _, a := range m.addrs {
		b = appendText(b, 4, addrName(a))
	}
	b = appendVarint(b, 5, uint64(m.phase))
	for _, k := range m.keys[:min(len(m.keys), maxKeys)] {
		b = appendText(b, 6, k)
	}
	if len(b) > memberlist.MetaMaxSize {
		return nil, fmt.Errorf("%d addresses are more than fit", len(m.addrs))
	}
	return b, nil
}

// parseMeta reads what another member says of itself. A role that is not known here is taken for a realserver's: it
// gets what concerns it and decides nothing.
func parseMeta(b []byte) (m meta, ok bool) {
	m.role = ravel.Realserver
	ok = eachField(b, func(x field) bool {
		var n uint64
		switch x.number {
		case 1:
			ok := x.varint(&n) && n < 1<<31
			m.wire = uint32(n)
			return ok
		case 2:
			ok := x.varint(&n)
			if n == uint64(ravel.Director) {
				m.role = ravel.Director
			}
			return ok
		case 3:
			return x.text(&m.version)
		case 4:
			a, ok := parseAddr(string(x.data))
			m.addrs = append(m.addrs, a)
			return ok && x.kind == protowire.BytesType
		case 5:
			ok := x.varint(&n) && n < 256
			m.phase = phase(n)
			return ok
		case 6:
			if len(x.data) == fingerprintSize && len(m.keys) < maxKeys {
				m.keys = append(m.keys, string(x.data))
			}
			return x.kind == protowire.BytesType
		}
		return true
	})
	return m, ok && m.wire > 0
}
