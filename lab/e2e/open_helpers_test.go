//go:build e2e_open

package e2e

import (
	"encoding/hex"
	"fmt"
	"maps"
	"net/netip"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/ravel-lb/ravel"
)

var (
	sets   = regexp.MustCompile(`\bravel[46]-(vip|svc|hold)\b`) // also an entry that lets another's service pass
	theirs = regexp.MustCompile(`:9999\b`)
	// tunnels are the kernel's own devices, which a real server sets up.
	tunnels = regexp.MustCompile(`\b(tunl0|ip6tnl0)\b|^/proc/sys/`)
)

// wordsOf writes a table on one line, so that it can be compared.
func wordsOf(table map[ravel.ServiceKey]virtual) string {
	var b strings.Builder
	for _, key := range slices.SortedFunc(maps.Keys(table), ravel.ServiceKey.Compare) {
		v := table[key]
		fmt.Fprintf(&b, "%s %s", key, v.scheduler)
		for _, a := range slices.SortedFunc(maps.Keys(v.servers), netip.Addr.Compare) {
			fmt.Fprintf(&b, " %s=%d/%s", a, v.servers[a].weight, v.servers[a].forward)
		}
		b.WriteString("; ")
	}
	return b.String()
}

// procAddr reads C6336414 or [2001:0db8::] or 2001:0db8::, as the files of IPVS show addresses.
func procAddr(text string) (netip.Addr, bool) {
	if b, err := hex.DecodeString(text); err == nil && len(b) == 4 {
		return netip.AddrFrom4([4]byte(b)), true
	}
	a, err := netip.ParseAddr(strings.Trim(text, "[]"))
	return a, err == nil
}

// stop ends the load.
func (l *steady) stop(t *testing.T) {
	t.Helper()
	for _, c := range l.clients {
		must(t, c.Stop())
	}
}

func isOurs(line string) bool {
	return sets.MatchString(line) || ours.MatchString(line) && !theirs.MatchString(line)
}

// foreign is what is neither ours nor meant to change while ravel runs.
func foreign(line string) bool { return !isOurs(line) && !tunnels.MatchString(line) }
