package guard

import (
	"context"
	"fmt"
	"slices"
	"strings"

	"github.com/ravel-lb/ravel"
	"github.com/ravel-lb/ravel/internal/iptables"
)

// rules are one chain of ours in one family's tables, and the jump to it.
type rules struct {
	table, hook, chain string
	lines              []string // of the chain, as iptables prints them
	jump               []string // as the arguments of iptables
	// inTheWay reports whether a rule before the jump keeps packets from it.
	inTheWay func(rule string) bool
	// optional says that packets are served without these rules too, so that a kernel that cannot have them is a Problem.
	optional bool

	looked    bool   // they were seen to since the last Resync
	stamp     uint64 // of the table when the jump was last looked at; 0 is never
	inPlace   bool   // at the last look they were in place, or put there, or never can be
	putOff    int    // times in a row that the look at them was put off
	putOffFor error  // why, the last time
	never     error  // why this kernel cannot have them, as of the last look
}

// forget is for rules that are removed.
func (r *rules) forget() { r.looked, r.inPlace, r.putOff, r.never = false, false, 0, nil }

// guarding are the rules that reject what no service claims.
func (f *family) guarding() *rules {
	icmp, unreachable := "icmp", "icmp-port-unreachable"
	if f.tables.Family() == iptables.V6 {
		icmp, unreachable = "ipv6-icmp", "icmp6-port-unreachable"
	}
	hold, claimed := "-m set --match-set "+f.hold.name+" dst,dst", "-m set --match-set "+f.svc.name+" dst,dst"
	return &rules{
		table: table, hook: hook, chain: chain,
		jump: f.forVIPs(chain),
		lines: []string{
			// Dropped, not rejected, so that the client asks again. UDP has no first packet to tell by: all of the
			// moment's are dropped.
			"-A " + chain + " -p tcp -m tcp --tcp-flags FIN,SYN,RST,ACK SYN " + hold + " -j DROP",
			"-A " + chain + " -p udp " + hold + " -j DROP",
			// IPVS gives nobody a flow that comes from port 20 (ip_vs_schedule takes it for a data connection of FTP),
			// whatever the service: it would reach the node's own socket.
			"-A " + chain + " -p tcp -m tcp --sport 20 -j REJECT --reject-with tcp-reset",
			"-A " + chain + " -p udp -m udp --sport 20 -j REJECT --reject-with " + unreachable,
			"-A " + chain + " " + claimed + " -j RETURN",
			"-A " + chain + " -p " + icmp + " -j RETURN",
			"-A " + chain + " -p tcp -j REJECT --reject-with tcp-reset",
			"-A " + chain + " -j REJECT --reject-with " + unreachable,
		},
		// A realserver has a jump of its own there for the directors' tunnels, and the two would change places at every
		// Resync.
		inTheWay: func(rule string) bool { return !strings.Contains(rule, " -j "+iptables.Prefix) },
	}
}

// untracking are the rules that keep the packets of claimed services from conntrack. Errors by ICMP about them are not
// named: to conntrack, which has no such flow, they are invalid, and nat leaves those alone.
func (f *family) untracking() *rules {
	return &rules{
		table: rawTable, hook: rawHook, chain: rawChain,
		jump: f.forVIPs(rawChain),
		lines: []string{
			"-A " + rawChain + " -m set --match-set " + f.others.name + " dst,dst -j RETURN",
			"-A " + rawChain + " -m set --match-set " + f.svc.name + " dst,dst -j CT --notrack",
		},
		// It need not be first: other programs want to be (Calico's agent does), and would overtake it for ever.
		inTheWay: func(rule string) bool { return strings.HasSuffix(rule, " -j ACCEPT") },
		optional: true,
	}
}

// forVIPs is the rule that leads packets for a VIP to a chain.
func (f *family) forVIPs(to string) []string {
	return []string{"-m", "set", "--match-set", f.vip.name, "dst", "-j", to}
}

// impossible says what follows from rules that this kernel cannot have.
func (r *rules) impossible(f *family) ravel.Problem {
	module := "xt_CT"
	if f.tables.Variant() == iptables.Legacy {
		module = map[iptables.Family]string{iptables.V4: "iptable_raw xt_CT", iptables.V6: "ip6table_raw xt_CT"}[f.tables.Family()]
	}
	return ravel.Problem{
		Where: "conntrack of " + f.tables.Family().String(),
		What: fmt.Sprintf("packets for VIPs are tracked, so that a program that redirects them by nat, such as kube-proxy for "+
			"a VIP that it knows, takes them before IPVS: %v", r.never),
		Fix: "modprobe -a " + module,
	}
}

// seeToRulesLocked looks at one family's rules, once after each Resync, and mends them. Rules that were in place at the
// last look, and are, wait for the lock only as long as patience says; then the work is put off to the next Apply.
// Others wait as long as ctx does.
func (g *Guard) seeToRulesLocked(ctx context.Context, f *family, r *rules) error {
	if r.looked {
		return nil
	}
	hurried, err := g.rulesLocked(ctx, f, r)
	if err != nil && r.inPlace && ctx.Err() == nil && (iptables.Busy(err) || hurried) {
		r.putOff++
		r.putOffFor = err
		if r.putOff == late {
			g.log.Warn("mending our rules is put off again and again", "family", f.tables.Family(), "table", r.table, "err", err)
		}
		return nil
	}
	r.putOff, r.never = 0, nil
	if err != nil && r.optional && ctx.Err() == nil && !iptables.Locked(err) {
		// Trying again at once does not mend it; the next Resync asks again, in case that a module was loaded.
		r.never, err = err, nil
	}
	r.looked, r.inPlace = err == nil, err == nil
	return err
}

// rulesLocked sees to the chain and then to the jump. Where both are as they should be it needs no lock. What it finds
// missing is not in place any more, also if it cannot be mended. An error with hurried came when patience was over.
func (g *Guard) rulesLocked(ctx context.Context, f *family, r *rules) (hurried bool, err error) {
	lines, err := f.tables.Save(ctx, r.table)
	if err != nil {
		return false, err
	}
	var have, before []string
	for _, line := range lines {
		switch {
		case strings.HasPrefix(line, "-A "+r.chain+" "):
			have = append(have, line)
		case strings.HasPrefix(line, "-A "+r.hook+" "):
			before = append(before, line)
		}
	}
	jump := r.hooked()
	whole := slices.Equal(have, r.lines)
	if whole && r.leads(before) {
		return false, nil
	}
	if r.inPlace && r.never == nil {
		if r.putOff == 0 {
			g.metrics.drift.WithLabelValues("rule").Inc()
			g.log.Warn("rules changed behind our back", "family", f.tables.Family(), "table", r.table)
		}
		short, cancel := context.WithTimeout(ctx, patience)
		defer cancel()
		ctx = short
	}
	if !whole || !slices.Contains(before, jump) {
		r.inPlace = false
	}
	if !whole {
		input := "*" + r.table + "\n:" + r.chain + " - [0:0]\n" + strings.Join(r.lines, "\n") + "\nCOMMIT\n"
		if err := f.tables.Restore(ctx, input); err != nil {
			return ctx.Err() != nil, fmt.Errorf("writing chain %s: %w", r.chain, err)
		}
	}
	err = f.tables.EnsureFirst(ctx, r.table, r.hook, r.jump)
	return ctx.Err() != nil, err
}

// Look reports whether a jump of ours is gone, as after another program flushed the tables: the next Apply then mends it.
// One that stands where it should not is left to the next Resync, because others want to be first too. While nobody
// changes rules a Look costs some microseconds, otherwise the reading of one chain of a table.
func (g *Guard) Look(ctx context.Context) bool {
	g.mu.Lock()
	defer g.mu.Unlock()
	mend := false
	for _, f := range g.families {
		for _, r := range []*rules{f.guard, f.raw} {
			if !r.looked || !r.inPlace || r.never != nil {
				continue
			}
			stamp, err := f.tables.Stamp(r.table)
			if err != nil || stamp == r.stamp {
				continue // the next Resync looks
			}
			hooked, err := f.tables.Rules(ctx, r.table, r.hook)
			if err != nil {
				continue
			}
			r.stamp = stamp // of before the rules were read, so that what changed meanwhile is looked at again
			if !slices.Contains(hooked, r.hooked()) {
				r.looked, mend = false, true
			}
		}
	}
	return mend
}

// hooked is the jump as iptables prints it.
func (r *rules) hooked() string { return "-A " + r.hook + " " + strings.Join(r.jump, " ") }

// leads reports whether the jump stands once among the rules of its hook, and nothing before it is in its way.
func (r *rules) leads(hooked []string) bool {
	jump := r.hooked()
	other := func(rule string) bool { return strings.HasSuffix(rule, "-j "+r.chain) }
	at := slices.Index(hooked, jump)
	if at < 0 || slices.ContainsFunc(hooked[at+1:], other) {
		return false
	}
	return !slices.ContainsFunc(hooked[:at], func(rule string) bool { return r.inTheWay(rule) || other(rule) })
}
