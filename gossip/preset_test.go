package gossip

import (
	"testing"
	"time"
)

// The figures that stand in the doc comment, and the bounds that were promised.
func TestDetectWithin(t *testing.T) {
	for _, test := range []struct {
		preset  Preset
		members int
		want    time.Duration
	}{
		{Fast, 1, 0},
		{Fast, 2, 660*time.Millisecond + tell}, {Fast, 3, 880*time.Millisecond + tell},
		{Fast, 10, 1470 * time.Millisecond}, {LAN, 10, 5850 * time.Millisecond},
		{Fast, 100, 1930 * time.Millisecond}, {LAN, 100, 7750 * time.Millisecond},
		{Fast, 1000, 2390 * time.Millisecond}, {LAN, 1000, 9650 * time.Millisecond},
		{"none", 10, 0},
	} {
		if got := test.preset.DetectWithin(test.members); got.Round(time.Millisecond) != test.want {
			t.Errorf("%s, %d members: %s, want %s", test.preset, test.members, got, test.want)
		}
	}
}
