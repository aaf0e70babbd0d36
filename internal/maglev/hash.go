package maglev

import "math/bits"

// The two hashes of ip_vs_mh.c are hsiphash of one 32-bit word with fixed keys (generate_hash_secret). On a 64-bit
// kernel hsiphash is SipHash-1-3, cut to 32 bits (lib/siphash.c); a 32-bit kernel has another.
func hash1(word uint32) uint32 { return hsiphash(word, 2654435761) }
func hash2(word uint32) uint32 { return hsiphash(word, 2654446892) }

// hsiphash is hsiphash_1u32 with a key whose two halves are alike.
func hsiphash(word uint32, key uint64) uint32 {
	v0, v1, v2, v3 := 0x736f6d6570736575^key, 0x646f72616e646f6d^key, 0x6c7967656e657261^key, 0x7465646279746573^key
	b := 4<<56 | uint64(word)
	v3 ^= b
	v0, v1, v2, v3 = sipRound(v0, v1, v2, v3)
	v0 ^= b
	v2 ^= 0xff
	v0, v1, v2, v3 = sipRound(v0, v1, v2, v3)
	v0, v1, v2, v3 = sipRound(v0, v1, v2, v3)
	v0, v1, v2, v3 = sipRound(v0, v1, v2, v3)
	return uint32(v0 ^ v1 ^ v2 ^ v3)
}

func sipRound(v0, v1, v2, v3 uint64) (uint64, uint64, uint64, uint64) {
	v0 += v1
	v1 = bits.RotateLeft64(v1, 13) ^ v0
	v0 = bits.RotateLeft64(v0, 32)
	v2 += v3
	v3 = bits.RotateLeft64(v3, 16) ^ v2
	v0 += v3
	v3 = bits.RotateLeft64(v3, 21) ^ v0
	v2 += v1
	v1 = bits.RotateLeft64(v1, 17) ^ v2
	v2 = bits.RotateLeft64(v2, 32)
	return v0, v1, v2, v3
}
