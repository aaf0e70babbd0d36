package health

import "time"

// Timing says when a real server is probed, and when it is silent.
type Timing struct {
	// Interval is the longest time between the starts of two probes of one address while nothing is wrong; each gap is
	// drawn from the fifth below it.
	Interval time.Duration
	// Timeout is how long one probe waits for an answer.
	Timeout time.Duration
	// Rapid is the time between the starts of two probes while silence is suspected. It may be shorter than Timeout:
	// then several are on their way.
	Rapid time.Duration
	// Failures is how many probes in a row make a real server silent, or end an opinion that nothing supports any more.
	Failures int
}

// LAN is the timing of the preset "lan".
func LAN() Timing {
	return Timing{Interval: 5 * time.Second, Timeout: time.Second, Rapid: 500 * time.Millisecond, Failures: 3}
}

// Fast is the timing of the preset "fast".
func Fast() Timing {
	return Timing{Interval: time.Second, Timeout: 250 * time.Millisecond, Rapid: 150 * time.Millisecond, Failures: 3}
}

// Confirm is the longest time from the hint that an address may be dead (Hurry, or a probe that is not answered within
// Rapid) until it is Silent, if it is: (Failures-1) × Rapid + Timeout. It holds while the process gets to run and
// Options.InFlight suffices.
func (t Timing) Confirm() time.Duration {
	return time.Duration(t.Failures-1)*t.Rapid + t.Timeout
}

// Detect is the longest time from the power cut until an address is Silent when nobody gives a hint: the first probe
// after the cut starts within Interval, so it is Interval + Confirm.
func (t Timing) Detect() time.Duration { return t.Interval + t.Confirm() }

// orDefault fills what is not set from LAN.
func (t Timing) orDefault() Timing {
	def := LAN()
	if t.Interval <= 0 {
		t.Interval = def.Interval
	}
	if t.Timeout <= 0 {
		t.Timeout = def.Timeout
	}
	if t.Rapid <= 0 {
		t.Rapid = def.Rapid
	}
	if t.Failures <= 0 {
		t.Failures = def.Failures
	}
	return t
}

// hold is how long a real server must be well before it returns from its nth death within calmAfter: 1 s, doubled each
// time, 60 s at most.
func hold(deaths int) time.Duration {
	if deaths >= 7 {
		return maxHold
	}
	return min(firstHold<<max(deaths-1, 0), maxHold)
}

const (
	firstHold = time.Second
	maxHold   = time.Minute
	// calmAfter is how long a real server must be alive for its deaths to be forgotten.
	calmAfter = 10 * time.Minute
)
