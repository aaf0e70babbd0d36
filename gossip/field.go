package gossip

import "google.golang.org/protobuf/encoding/protowire"

// field is one field of a message of protocol buffers.
type field struct {
	number protowire.Number
	kind   protowire.Type
	n      uint64 // of a varint or fixed64
	data   []byte // of bytes
	raw    []byte // all of it, the tag included
}

// eachField calls f for the fields of b in order, and reports whether b is well formed and f was pleased with all.
func eachField(b []byte, f func(field) bool) bool {
	for len(b) > 0 {
		number, kind, n := protowire.ConsumeTag(b)
		if n < 0 {
			return false
		}
		x := field{number: number, kind: kind}
		m := 0
		switch kind {
		case protowire.VarintType:
			x.n, m = protowire.ConsumeVarint(b[n:])
		case protowire.Fixed64Type:
			x.n, m = protowire.ConsumeFixed64(b[n:])
		case protowire.BytesType:
			x.data, m = protowire.ConsumeBytes(b[n:])
		case protowire.Fixed32Type:
			_, m = protowire.ConsumeFixed32(b[n:])
		default: // groups are no part of the format
			return false
		}
		if m < 0 {
			return false
		}
		x.raw = b[:n+m]
		if !f(x) {
			return false
		}
		b = b[n+m:]
	}
	return true
}

// varint and its siblings read the field, and report false if it is of another kind: that is malformed.
func (x field) varint(n *uint64) bool {
	*n = x.n
	return x.kind == protowire.VarintType
}

func (x field) fixed(n *uint64) bool {
	*n = x.n
	return x.kind == protowire.Fixed64Type
}

func (x field) text(s *string) bool {
	*s = string(x.data)
	return x.kind == protowire.BytesType
}

func (x field) hashes(h *[]uint64) bool {
	if x.kind != protowire.BytesType || len(x.data)%8 != 0 {
		return false
	}
	for b := x.data; len(b) > 0; b = b[8:] {
		n, _ := protowire.ConsumeFixed64(b)
		*h = append(*h, n)
	}
	return true
}

func appendVarint(b []byte, number protowire.Number, n uint64) []byte {
	return protowire.AppendVarint(protowire.AppendTag(b, number, protowire.VarintType), n)
}

func appendFixed(b []byte, number protowire.Number, n uint64) []byte {
	return protowire.AppendFixed64(protowire.AppendTag(b, number, protowire.Fixed64Type), n)
}

func appendText[T string | []byte](b []byte, number protowire.Number, s T) []byte {
	b = protowire.AppendTag(b, number, protowire.BytesType)
	b = protowire.AppendVarint(b, uint64(len(s)))
	return append(b, s...)
}

func appendHashes(b []byte, number protowire.Number, hashes []uint64) []byte {
	b = protowire.AppendTag(b, number, protowire.BytesType)
	b = protowire.AppendVarint(b, uint64(len(hashes)*8))
	for _, h := range hashes {
		b = protowire.AppendFixed64(b, h)
	}
	return b
}
