package ifaddr

import (
	"context"
	"net/netip"
)

// Read returns the VIPs that the link holds now, sorted: at start, those that outlived the last process. It changes
// nothing, and the next Apply reads the kernel again. A link that is not ours holds none.
func (l *Links) Read(context.Context) ([]netip.Addr, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if err := l.readLocked(false); err != nil {
		return nil, err
	}
	l.known = false // the settings for VIPs are made by Apply
	return l.heldLocked(), nil
}
