package desired

import "fmt"

// The kernel's Maglev table has 4093 slots unless it was built otherwise (CONFIG_IP_VS_MH_TAB_INDEX 12). Weights up
// to 2^(12/2)-1 are exact (ip_vs_mh.c, ip_vs_mh_shift_weight); larger ones are halved until they fit. In each round
// of the filling every real server takes as many slots as its weight, so when the weights' sum exceeds the table, the
// tail of the list gets nothing; a quarter of the table keeps the shares even.
const (
	maxWeight    = 63
	maxWeightSum = 4093 / 4
)

// scaleWeights brings the weights of one service into the range that the Maglev table keeps exactly, in place. It is
// a pure rule, so that all directors agree. It returns a sentence about what cannot be made even, or "".
func scaleWeights(servers []wish) string {
	largest, sum := 0, 0
	for _, s := range servers {
		w := max(s.Weight, s.last)
		largest = max(largest, w)
		sum += w
	}
	if largest <= maxWeight && sum <= maxWeightSum {
		return ""
	}
	// The smaller of the two factors 63/largest and 1023/sum, as a fraction, so that no rounding differs anywhere.
	num, den := maxWeight, largest
	if sum*num > maxWeightSum*den {
		num, den = maxWeightSum, sum
	}
	scale := func(w int) int {
		if w == 0 {
			return 0
		}
		return max(1, w*num/den)
	}
	sum = 0
	for i := range servers {
		s := &servers[i]
		s.Weight, s.last = scale(s.Weight), scale(s.last)
		sum += max(s.Weight, s.last)
	}
	if sum > maxWeightSum {
		return fmt.Sprintf("%d real servers share 4093 slots of the Maglev table: shares differ by up to %d %%",
			len(servers), 100*sum/4093)
	}
	return ""
}
