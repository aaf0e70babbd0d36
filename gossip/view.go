package gossip

import (
	"maps"
	"net/netip"
	"slices"
	"strings"
	"time"

	"github.com/ravel-lb/ravel"
)

// view is the Fleet as it was last shown. A Fleet that was given away is never changed: what a change touches is copied
// first, so that its cost is in proportion to the change.
type view struct {
	me        string
	report    *ravel.Report // what we say of ourselves, as we were given it
	rosters   map[ravel.ServiceKey]ravel.Roster
	reports   map[string]ravel.Report
	registers map[string]ravel.Register
}

func newView(me string) view {
	return view{
		me:        me,
		rosters:   map[ravel.ServiceKey]ravel.Roster{},
		reports:   map[string]ravel.Report{},
		registers: map[string]ravel.Register{},
	}
}

// self sets our own report.
func (v *view) self(r ravel.Report) { v.report = &r }

// showLocked makes a Fleet of all that changed.
func (g *Gossip) showLocked(now time.Time) {
	g.shownAt, g.changed = now, false
	r := refresh{view: &g.view, store: g.store}
	for k := range g.store.dirty {
		if _, all := g.store.dirtyAuthors[k.author]; !all || k.author == "" {
			r.cell(k)
		}
	}
	for a := range g.store.dirtyAuthors {
		r.author(a)
	}
	clear(g.store.dirty)
	clear(g.store.dirtyAuthors)
	if g.view.report != nil {
		r.writeReports()
		g.view.reports[g.config.Name] = *g.view.report
	}
	for range r.bad {
		g.metrics.drop("value")
	}
	if g.others || g.shown == nil {
		g.shown, g.others = g.membersLocked(), false
	}
	g.fleet.Set(ravel.Fleet{
		Settled:   g.settle.settled,
		Members:   g.shown,
		Rosters:   g.view.rosters,
		Reports:   g.view.reports,
		Registers: g.view.registers,
	})
}

// refresh brings a view up to date with a store. It copies each map and roster once, before the first write to it.
type refresh struct {
	*view
	store  *store
	bad    int // cells whose value cannot be read
	fresh  struct{ rosters, reports, registers bool }
	roster map[ravel.ServiceKey]bool
	parts  map[part]bool
}

// part is one of the maps of an author's report.
type part struct {
	author string
	topic  uint32
}

func (r *refresh) writeReports() {
	if !r.fresh.reports {
		r.reports, r.fresh.reports = maps.Clone(r.reports), true
	}
}

// cell brings one cell into the view, or takes it out if it is not there.
func (r *refresh) cell(k key) {
	c := r.store.cells[k]
	switch {
	case k.author != "":
		if k.author != r.me {
			r.authored(k, c)
		}
	case k.topic == topicRoster:
		r.entry(k, c)
	case k.topic == topicRegister:
		if !r.fresh.registers {
			r.registers, r.fresh.registers = maps.Clone(r.registers), true
		}
		delete(r.registers, k.name)
		if c == nil {
			return
		}
		if v, ok := parseRegister(c); ok {
			r.registers[k.name] = v
		} else {
			r.bad++
		}
	}
}

func (r *refresh) entry(k key, c *cell) {
	at := c
	if at == nil {
		at = &cell{key: k}
	}
	service, e, ok := parseEntry(at)
	if !ok {
		r.bad++
		if service.VIP.IsValid() {
			c = nil // show nothing for what cannot be read
		} else {
			return
		}
	}
	if !r.fresh.rosters {
		r.rosters, r.fresh.rosters = maps.Clone(r.rosters), true
	}
	if !r.roster[service] {
		if r.roster == nil {
			r.roster = map[ravel.ServiceKey]bool{}
		}
		r.roster[service] = true
		r.rosters[service] = slices.Clone(r.rosters[service])
	}
	roster := slices.DeleteFunc(r.rosters[service], func(o ravel.RosterEntry) bool { return o.Addr == e.Addr })
	if c != nil {
		i, _ := slices.BinarySearchFunc(roster, e, ravel.RosterEntry.Compare)
		roster = slices.Insert(roster, i, e)
	}
	if len(roster) == 0 {
		delete(r.rosters, service)
		delete(r.roster, service)
		return
	}
	r.rosters[service] = roster
}

// author makes the report of an author anew.
func (r *refresh) author(name string) {
	if name == r.me {
		return
	}
	r.writeReports()
	delete(r.reports, name)
	for p := range r.parts {
		if p.author == name {
			delete(r.parts, p)
		}
	}
	a := r.store.authors[name]
	if a == nil || !a.present {
		return
	}
	for k, c := range a.cells {
		r.authored(k, c)
	}
}

// authored brings one cell of an author into its report.
func (r *refresh) authored(k key, c *cell) {
	a := r.store.authors[k.author]
	if a == nil || !a.present {
		return
	}
	value := ""
	if c != nil {
		value = c.value
	}
	r.writeReports()
	report := r.reports[k.author]
	p := part{k.author, k.topic}
	owned := r.parts[p]
	if r.parts == nil {
		r.parts = map[part]bool{}
	}
	ok := true
	switch k.topic {
	case topicService, topicRedirect:
		var service ravel.ServiceKey
		if service, ok = parseService(k.name); !ok {
			break
		}
		if k.topic == topicService {
			ok = put(&report.Services, owned, service, value, parseServiceReport)
			break
		}
		ok = put(&report.Redirects, owned, service, value, func(v string) (bool, bool) {
			n, ok := parseNumber(v)
			return n != 0, ok
		})
	case topicUses:
		var addr netip.Addr
		if addr, _, ok = parseUsesName(k.name); ok {
			// The parts of one value follow one another as they are.
			ok = put(&report.Uses, owned, addr, r.uses(k.author, addr), parseUses)
		}
	case topicHealth:
		var addr netip.Addr
		if addr, ok = parseAddr(k.name); !ok {
			break
		}
		ok = put(&report.Health, owned, addr, value, func(v string) (ravel.Health, bool) {
			n, ok := parseNumber(v)
			return ravel.Health(n), ok
		})
	case topicSelf:
		var s self
		if s, ok = parseSelf(value); !ok {
			break
		}
		report.TableSize, report.Sessions, report.Unheard = s.tableSize, s.sessions, s.unheard
		report.Dark = s.withdrawn == 4
		report.Withdrawn4 = s.withdrawn != 0 && s.withdrawn != 3 && !report.Dark
		report.Withdrawn6 = s.withdrawn != 0 && s.withdrawn != 2 && !report.Dark
		switch {
		case !s.redirects:
			report.Redirects = nil
		case report.Redirects == nil:
			report.Redirects = map[ravel.ServiceKey]bool{}
		}
	default:
		return
	}
	r.parts[p] = true
	if !ok {
		r.bad++
	}
	r.reports[k.author] = report
}

// uses is the value of all parts of what a director uses of an address.
func (r *refresh) uses(author string, a netip.Addr) string {
	var b strings.Builder
	for part := range usesParts {
		c := r.store.cells[key{topicUses, author, usesName(a, part)}]
		if c == nil {
			break
		}
		b.WriteString(c.value)
	}
	return b.String()
}

// put sets what a value says in a map of a report, or takes it out if the value is empty or cannot be read. The map is
// copied first unless it is owned.
func put[K comparable, V any](m *map[K]V, owned bool, k K, value string, parse func(string) (V, bool)) bool {
	if !owned {
		*m = maps.Clone(*m)
	}
	if *m == nil {
		*m = map[K]V{}
	}
	delete(*m, k)
	if value == "" {
		return true
	}
	v, ok := parse(value)
	if ok {
		(*m)[k] = v
	}
	return ok
}
