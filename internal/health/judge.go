package health

import (
	"cmp"
	"fmt"
	"log/slog"
	"maps"
	"net/netip"
	"slices"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/ravel-lb/ravel"
)

// Node is a node that is a real server of some service.
type Node struct {
	Name  string       // by which gossip knows its agent
	Addrs []netip.Addr // at which directors reach it
}

// Settings say how a Judge judges. What is 0 is as written here.
type Settings struct {
	// Probes says that directors probe, and that probes decide. Else gossip does.
	Probes bool
	// FleetSize is the number of voting members; 0 learns it.
	FleetSize int
	// RefusedProblemAfter is how long an agent may not answer until a Problem says so; 60 s.
	RefusedProblemAfter time.Duration
	// RestartGrace is how long a node whose agent said "restarting" lives without it where gossip decides; 60 s.
	RestartGrace time.Duration
}

func (s Settings) orDefault() Settings {
	if s.RefusedProblemAfter <= 0 {
		s.RefusedProblemAfter = time.Minute
	}
	if s.RestartGrace <= 0 {
		s.RestartGrace = time.Minute
	}
	return s
}

// Verdict is what the fleet holds of the real servers, as far as one process knows. It is never changed after it is made.
type Verdict struct {
	// Dead maps each address that is to take no new flows to the reason, in words for people. No floor is applied.
	Dead map[netip.Addr]string
	// Problems are sorted and equal from one verdict to the next while nothing changed.
	Problems []ravel.Problem
	// Majority says that this process sees more than half of the fleet's voting members. Without it nobody becomes dead.
	Majority bool
	// Seen and Voters are the numbers behind it.
	Seen, Voters int
	// Alone says of which families this director fails to reach more than half of the real servers, which most of the
	// others reach: it should withdraw its VIPs of the family. Of directors that know the same, never all are alone.
	Alone Families
	// Hurry are the addresses that this director should probe at once, sorted: see Prober.Hurry.
	Hurry []netip.Addr
	// Wake is when another look may give another verdict, though nothing else changes; zero is never.
	Wake time.Time
}

// Families are address families. It is comparable.
type Families struct{ V4, V6 bool }

// Of reports whether the family of addr is one of them.
func (f Families) Of(addr netip.Addr) bool { return addr.Is4() && f.V4 || addr.Is6() && f.V6 }

// Judge judges which real servers are dead. It remembers only what time changes: how large the fleet was, who is dead
// since when, and who is being missed. Its methods are for one goroutine.
type Judge struct {
	log      *slog.Logger
	settings Settings
	metrics  *judgeMetrics

	electorate Electorate
	alone      Families
	nodes      map[string]acquaintance // members that are nodes, and since when they are in that state
	addrs      map[netip.Addr]*record
}

// record is what a Judge remembers of an address.
type record struct {
	dead     bool
	reason   string
	deaths   int       // within calmAfter of each other
	returned time.Time // when it last came back
	held     time.Time // until when it is held back for that
	ailment  string    // what else is wrong with it, and
	ailing   time.Time // since when
}

// NewJudge returns a Judge that knows nothing yet. A nil Registerer keeps its metrics to itself.
func NewJudge(log *slog.Logger, reg prometheus.Registerer, s Settings) *Judge {
	if log == nil {
		log = slog.New(slog.DiscardHandler)
	}
	return &Judge{
		log: log, settings: s.orDefault(), metrics: newJudgeMetrics(reg),
		nodes: map[string]acquaintance{}, addrs: map[netip.Addr]*record{},
	}
}

// Set changes the settings from the next verdict on.
func (j *Judge) Set(s Settings) { j.settings = s.orDefault() }

// Judge judges the nodes by what self, a director, knows of the fleet now. now never goes back. Two processes that know the same of
// the fleet come to the same verdict, except for what is written at Electorate, and for how long who died is held back.
func (j *Judge) Judge(now time.Time, self string, fleet ravel.Fleet, nodes []Node) Verdict {
	members := withSelf(fleet, self)
	electorate, wake := j.electorate.Next(now, members, j.settings.FleetSize, j.settings.RestartGrace)
	j.electorate = electorate
	c := &court{
		Judge: j, now: now, wake: wake,
		majority: fleet.Settled && electorate.Majority(),
		sound:    fleet.Settled && electorate.Sound(),
		members:  make(map[string]ravel.Member, len(members)),
		dead:     map[netip.Addr]string{},
		hurry:    map[netip.Addr]bool{},
		problems: map[ravel.Problem]bool{},
	}
	reports := []map[netip.Addr]ravel.Health{fleet.Reports[self].Health}
	for _, m := range members {
		c.members[m.Name] = m
		if m.Role == ravel.Director && m.State.Live() && m.Name != self {
			reports = append(reports, fleet.Reports[m.Name].Health)
		}
	}
	nodes = slices.SortedFunc(slices.Values(nodes), func(a, b Node) int { return cmp.Compare(a.Name, b.Name) })
	if j.settings.Probes {
		c.poll = take(reports, nodes)
		j.alone = Families{V4: c.isAlone(v4, j.alone.V4), V6: c.isAlone(v6, j.alone.V6)}
		c.poll.count([2]bool{v4: j.alone.V4, v6: j.alone.V6})
	} else {
		j.alone = Families{}
	}
	c.judge(nodes)
	c.fleetProblems()
	v := Verdict{
		Dead: c.dead, Majority: c.majority, Seen: electorate.Seen, Voters: electorate.Size, Alone: j.alone,
		Hurry: slices.SortedFunc(maps.Keys(c.hurry), netip.Addr.Compare), Wake: c.wake,
		Problems: slices.SortedFunc(maps.Keys(c.problems), ravel.Problem.Compare),
	}
	j.metrics.set(v, now, j.addrs)
	return v
}

// withSelf returns the members with self alive among them, as it may judge before gossip knows it.
func withSelf(fleet ravel.Fleet, self string) []ravel.Member {
	if m, there := fleet.Member(self); there && m.State == ravel.Alive {
		return fleet.Members
	}
	members := slices.DeleteFunc(slices.Clone(fleet.Members), func(m ravel.Member) bool { return m.Name == self })
	return append(members, ravel.Member{Name: self, Role: ravel.Director})
}

// court is one judgement.
type court struct {
	*Judge
	now, wake time.Time
	majority  bool
	sound     bool
	members   map[string]ravel.Member
	poll      poll
	dead      map[netip.Addr]string
	hurry     map[netip.Addr]bool
	problems  map[ravel.Problem]bool
}

func (c *court) problem(where, what, fix string) {
	c.problems[ravel.Problem{Where: where, What: what, Fix: fix}] = true
}

func (c *court) wakeAt(t time.Time) { c.wake = earliest(c.wake, t) }

// isAlone reports whether this director is alone in a family: see Verdict. Once it is, it stays so until it reaches half
// of them, or the others reach as little: also when it loses sight of the others, unless it is sure that these are gone.
func (c *court) isAlone(family int, was bool) bool {
	return c.poll.alone(0, family) || was && c.poll.cutOff(0, family) && !(c.poll.directors == 1 && c.sound)
}

// finding is what is known of an address, without memory.
type finding struct {
	votes  votes
	mine   ravel.Health
	member ravel.MemberState
	known  bool // gossip knows or knew an agent there
	// condemned is that it becomes dead; lost that it stays dead, if it is.
	condemned, lost bool
	reason          string
}

func (c *court) judge(nodes []Node) {
	seen := make(map[netip.Addr]bool, len(c.addrs))
	states := make(map[string]acquaintance, len(nodes))
	for _, n := range nodes {
		m, known := c.members[n.Name]
		known = known && m.Role == ravel.Realserver
		was, met := c.nodes[n.Name]
		switch {
		case known && (!met || was.state != m.State):
			states[n.Name] = acquaintance{state: m.State, since: c.now}
		case met: // gossip may have forgotten it since
			states[n.Name] = was
		}
		for _, addr := range n.Addrs {
			if seen[addr] {
				continue // an address of two nodes; the first by name speaks for it
			}
			seen[addr] = true
			r := c.addrs[addr]
			if r == nil {
				r = &record{}
				c.addrs[addr] = r
			}
			agent, met := states[n.Name]
			f := c.find(addr, agent, met)
			c.sentence(n.Name, addr, r, f)
			c.hint(addr, f)
			c.miss(n.Name, addr, r, f)
		}
	}
	c.nodes = states
	maps.DeleteFunc(c.addrs, func(addr netip.Addr, _ *record) bool { return !seen[addr] })
}

// find says what is known of an address now. agent is how gossip sees the node's, if it ever saw it.
func (c *court) find(addr netip.Addr, agent acquaintance, met bool) finding {
	f := finding{member: agent.state, known: met}
	if c.settings.Probes {
		f.votes, f.mine = c.poll.of(addr)
		c.byProbes(&f)
	} else if met {
		c.byGossip(&f, agent)
	}
	return f
}

// byProbes: dead becomes who is silent to a strict majority of the live directors that know. One that knows is not
// enough, unless it is the only one and this is sure. It stays dead until somebody finds it healthy and no majority finds
// it silent: the kernel of a node that boots refuses before the agent has put the redirects in place.
func (c *court) byProbes(f *finding) {
	v := f.votes
	switch {
	case v.silence():
		f.lost = true
		f.condemned = c.majority && (v.silent > 1 || v.directors == 1 && c.sound)
		f.reason = fmt.Sprintf("no answer to probes of %d of %d directors", v.silent, v.opinions())
	case v.healthy > 0:
	case v.refused > 0:
		f.lost, f.reason = true, "its kernel answers again and its agent does not yet"
	default:
		f.lost, f.reason = true, "died, and no director can say more of it now"
	}
}

// byGossip: dead becomes whose agent is dead, or left, or said "restarting" and was not back within the grace. What
// gossip never knew it does not judge, and what it forgot stays as it was.
func (c *court) byGossip(f *finding, agent acquaintance) {
	switch agent.state {
	case ravel.Dead:
		f.lost, f.reason = true, "its agent is gone without a goodbye"
	case ravel.Left:
		f.lost, f.reason = true, "its agent said goodbye for good"
	case ravel.Restarting:
		end := agent.since.Add(c.settings.RestartGrace)
		if c.now.Before(end) {
			c.wakeAt(end)
			return
		}
		f.lost, f.reason = true, fmt.Sprintf("its agent said that it restarts and was not back within %s", c.settings.RestartGrace)
	case ravel.Suspect:
		f.lost = true // who was dead has not come back
		return
	}
	f.condemned = f.lost && c.majority && c.sound
}

// sentence keeps who is dead. What becomes of an address depends on what was known, never on when; time only adds that who
// is back is held back for a while.
func (c *court) sentence(node string, addr netip.Addr, r *record, f finding) {
	switch {
	case !r.dead && f.condemned:
		if !r.returned.IsZero() && c.now.Sub(r.returned) >= calmAfter {
			r.deaths = 0
		}
		if r.deaths > 0 {
			c.metrics.flaps.Inc()
		}
		r.dead, r.deaths = true, r.deaths+1
		c.metrics.deaths.Inc()
		c.log.Warn("real server is dead", "node", node, "addr", addr, "reason", f.reason, "deaths", r.deaths)
	case r.dead && !f.lost:
		r.dead, r.returned, r.held = false, c.now, c.now.Add(hold(r.deaths))
		c.log.Info("real server is back", "node", node, "addr", addr, "held", hold(r.deaths))
	}
	switch {
	case r.dead && f.reason != "":
		r.reason = f.reason
	case !r.dead && c.now.Before(r.held):
		r.reason = fmt.Sprintf("is back, and held back for %s after death %d", hold(r.deaths), r.deaths)
		c.wakeAt(r.held)
	case !r.dead:
		r.reason = ""
		return
	}
	c.dead[addr] = r.reason
}

// hint says whom this director should ask at once.
func (c *court) hint(addr netip.Addr, f finding) {
	if !c.settings.Probes || f.mine == ravel.Silent {
		return
	}
	if f.known && (f.member == ravel.Suspect || f.member == ravel.Dead) || f.votes.silent > 0 {
		c.hurry[addr] = true
	}
}

// miss tells of what is wrong and kills nobody: agents that are away while their node lives, and what only this director
// does not reach.
func (c *court) miss(node string, addr netip.Addr, r *record, f finding) {
	v := f.votes
	var what, fix string
	switch {
	case !c.settings.Probes:
	case r.dead && v.opinions() == 0:
		what, fix = "is dead, and no director probes it any more", "let directors probe it, or take it out of the nodes"
	case r.dead:
	case v.refused > 0 && v.refused >= v.healthy && !v.silence():
		what = "its kernel answers and its agent does not, so its redirects stand as they were"
		fix = "start ravel realserver there"
	case f.mine == ravel.Silent && !c.alone.Of(addr):
		what, fix = "does not answer this director's probes, and is not dead to the fleet", "check the path to it"
	case v.healthy > 0 && f.known && f.member == ravel.Dead:
		what, fix = "its agent answers probes and is dead to gossip", "check that its gossip port is open, TCP and UDP"
	}
	if what != r.ailment {
		r.ailment, r.ailing = what, c.now
	}
	if what == "" {
		return
	}
	if end := r.ailing.Add(c.settings.RefusedProblemAfter); c.now.Before(end) {
		c.wakeAt(end)
		return
	}
	c.problem(fmt.Sprintf("node %s (%s)", node, addr), what, fix)
}

// fleetProblems tells of what keeps this director from judging.
func (c *court) fleetProblems() {
	e := c.electorate
	switch {
	case !e.Majority():
		c.problem("fleet", fmt.Sprintf("%d of %d voting members are seen, no majority: nobody becomes dead", e.Seen, e.Size),
			"if the others are gone for good: set fleet-size, or restart this director")
	case !c.settings.Probes && !e.Sound():
		c.problem("fleet", "many members are suspected: nobody becomes dead until that is settled", "")
	}
	if fixed := c.settings.FleetSize; fixed > 0 && e.Seen > fixed {
		c.problem("fleet", fmt.Sprintf("%d voting members are seen and fleet-size is %d: a majority of it means nothing", e.Seen, fixed),
			"set fleet-size to the number of directors and realservers, or to 0")
	}
	for family, alone := range map[string]bool{"IPv4": c.alone.V4, "IPv6": c.alone.V6} {
		if alone {
			c.problem("this director", "does not reach more than half of the real servers by "+family+", which others reach",
				"check its links and routes")
		}
	}
}
