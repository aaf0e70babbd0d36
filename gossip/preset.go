package gossip

import (
	"fmt"
	"math"
	"time"
)

// Preset is a set of timings: how soon the death of a member is seen, and what that costs. All members of a fleet
// should have the same.
//
//	                         lan      fast
//	probe interval           400 ms   100 ms   each member probes one other per interval
//	probe timeout            200 ms    60 ms   then three others and TCP are tried until the interval ends
//	suspicion                4 intervals, times log10 of the members from ten on
//	gossip interval          100 ms    20 ms   to three members, while there is news
//	exchange of digests        1 s    500 ms   with one member
//	joining what is lost       5 s      2 s   and more seldom after 15 min, until 7 days are over
//
// The suspicion never lasts longer for lack of confirmation, nor is probing slowed by a member that thinks itself
// unwell (memberlist's SuspicionMaxTimeoutMult and AwarenessMaxMultiplier are 1), for both would lengthen the bound
// just when it matters.
type Preset string

// The presets.
const (
	LAN  Preset = "lan"
	Fast Preset = "fast"
)

// timing is a preset's figures.
type timing struct {
	probe, timeout time.Duration
	gossip         time.Duration
	exchange       time.Duration
	join           time.Duration
	pushPull       time.Duration
	stream         time.Duration // the longest that a TCP connection may take
}

const (
	suspicionMult = 4
	// firstProbe is after how many intervals a silent member was probed by somebody, in 99.97 % of all cases.
	firstProbe = 8
	// tell is for what this process itself takes to have it in a Fleet.
	tell = 50 * time.Millisecond
)

func (p Preset) timing() (timing, error) {
	const ms = time.Millisecond
	switch p {
	case LAN, "":
		return timing{400 * ms, 200 * ms, 100 * ms, time.Second, 5 * time.Second, 20 * time.Second, 5 * time.Second}, nil
	case Fast:
		return timing{100 * ms, 60 * ms, 20 * ms, 500 * ms, 2 * time.Second, 10 * time.Second, 2 * time.Second}, nil
	}
	return timing{}, fmt.Errorf("preset %q: want lan or fast", p)
}

// DetectWithin is the time within which every member has seen that one of members fell silent without a goodbye:
//
//	interval × (F + 1 + 4 × max(1, log10 members)) + gossip interval × (2 + log2 members) + 50 ms
//
// F is how many intervals pass at most until somebody probes it: 2×members - 3, for each other member walks through
// all in an order that it shuffles each time, but no more than 8: that none of many probed it for m intervals has the
// probability e^-m. One more interval is the probe itself, and 50 ms are for telling it here. For ten members that is
// 1.5 s and 5.9 s, for a hundred 1.9 s and 7.8 s, for a thousand 2.4 s and 9.7 s. A fleet of one sees nothing: 0.
func (p Preset) DetectWithin(members int) time.Duration {
	t, err := p.timing()
	if err != nil || members < 2 {
		return 0
	}
	n := float64(members)
	intervals := math.Min(2*n-3, firstProbe) + 1 + suspicionMult*math.Max(1, math.Log10(n))
	rounds := 2 + math.Ceil(math.Log2(n))
	return time.Duration(intervals*float64(t.probe)+rounds*float64(t.gossip)) + tell
}
