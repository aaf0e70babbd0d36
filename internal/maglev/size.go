package maglev

import "slices"

// Size is a number of slots. It is a property of the kernel, chosen when that was built (CONFIG_IP_VS_MH_TAB_INDEX): all
// services have tables of one size.
type Size int

// DefaultSize is what a kernel has unless it was built otherwise, as those of distributions are.
const DefaultSize Size = 4093

// sizes are the primes of ip_vs_mh.c.
var sizes = [...]Size{251, 509, 1021, 2039, DefaultSize, 8191, 16381, 32749, 65521, 131071}

const firstIndex = 8

// Sizes returns the ten sizes that a kernel can be built with, ascending.
func Sizes() []Size { return slices.Clone(sizes[:]) }

// SizeOf returns the size of a CONFIG_IP_VS_MH_TAB_INDEX, 8 to 17; 0 for any other.
func SizeOf(index int) Size {
	if i := index - firstIndex; i >= 0 && i < len(sizes) {
		return sizes[i]
	}
	return 0
}

// Index returns the CONFIG_IP_VS_MH_TAB_INDEX of a size, 8 to 17; 0 if no kernel has it.
func (s Size) Index() int {
	if i := slices.Index(sizes[:], s); i >= 0 {
		return i + firstIndex
	}
	return 0
}
