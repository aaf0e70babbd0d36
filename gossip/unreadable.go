package gossip

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"time"

	"github.com/ravel-lb/ravel"
)

// unreadable are the senders of what could not be read, by our reason for it, and when that was last: members with
// another key, or of another fleet.
type unreadable map[string]map[netip.Addr]time.Time

const (
	tellOfUnreadable = time.Minute // how long a sender is a problem after its last message
	maxUnreadable    = 64          // senders that are kept for each reason
)

// unreadableFrom notes who sent what memberlist dropped. Its line ends with "from=ADDRESS:PORT".
func (g *Gossip) unreadableFrom(reason, line string, now time.Time) {
	// A stream that was closed before anything was said has no label, either: a connection that came too late.
	if reason != "key" && reason != "fleet" || strings.Contains(line, `stream with unacceptable label "":`) {
		return
	}
	_, from, _ := strings.Cut(line, "from=")
	at, err := netip.ParseAddrPort(from)
	if err != nil {
		return
	}
	addr := at.Addr().Unmap().WithZone("")
	g.unreadMu.Lock()
	defer g.unreadMu.Unlock()
	senders := g.unread[reason]
	if senders == nil {
		senders = map[netip.Addr]time.Time{}
		g.unread[reason] = senders
	}
	if _, known := senders[addr]; known || len(senders) < maxUnreadable {
		senders[addr] = now
	}
}

// unreadableProblems tells of those who sent such a thing lately: one problem for each reason.
func (g *Gossip) unreadableProblems(now time.Time) []ravel.Problem {
	g.unreadMu.Lock()
	defer g.unreadMu.Unlock()
	var problems []ravel.Problem
	for reason, senders := range g.unread {
		var from []netip.Addr
		for addr, at := range senders {
			if now.Sub(at) > tellOfUnreadable {
				delete(senders, addr)
				continue
			}
			from = append(from, addr)
		}
		if len(from) == 0 {
			continue
		}
		slices.SortFunc(from, netip.Addr.Compare)
		who := strings.Trim(fmt.Sprint(from[:min(len(from), 5)]), "[]")
		if len(from) > 5 {
			who += fmt.Sprintf(" and %d others", len(from)-5)
		}
		p := ravel.Problem{
			Where: "gossip", What: "cannot decrypt what comes from " + who + ": it is encrypted with another key, or not at all",
			Fix: "give all members of the fleet the same keys: --gossip-key-file " + g.config.KeyFile,
		}
		switch {
		case reason == "fleet":
			p.What = fmt.Sprintf("what comes from %s is of another fleet than this one, %q, or of none", who, g.config.Fleet)
			p.Fix = "start all members with the same --fleet"
		case g.keys == nil:
			p.What = "what comes from " + who + " is encrypted, and this member has no key"
			p.Fix = "start all members with the same --gossip-key-file, or all with --gossip-insecure"
		}
		problems = append(problems, p)
	}
	return problems
}
