package main

import (
	"cmp"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/urfave/cli/v2"

	"github.com/ravel-lb/ravel"
	"github.com/ravel-lb/ravel/internal/admin"
	"github.com/ravel-lb/ravel/internal/agree"
	"github.com/ravel-lb/ravel/internal/desired"
	"github.com/ravel-lb/ravel/internal/health"
)

// membersAnswer is what a process knows of its fleet.
type membersAnswer struct {
	Fleet string     `json:"fleet"` // its name
	Role  ravel.Role `json:"role"`  // of who answers
	Node  string     `json:"node"`
	// Unknown says that no document is in force.
	Unknown bool `json:"unknown,omitempty"`
	Settled bool `json:"settled"`
	// Majority, Seen and Voters are a director's; a realserver does not judge.
	Majority bool `json:"majority"`
	Seen     int  `json:"seen,omitempty"`
	Voters   int  `json:"voters,omitempty"`
	standing
	Members []memberStatus `json:"members"`
	// Absent are directors and nodes of the documents that gossip does not know.
	Absent []absent `json:"absent,omitempty"`
	// Differs are the services whose tables have not been alike for longer than news travels.
	Differs []agree.Difference `json:"differs,omitempty"`
}

type absent struct {
	Name string     `json:"name"`
	Role ravel.Role `json:"role"`
	// Verdicts are on its addresses.
	Verdicts []verdict `json:"verdicts,omitempty"`
}

// memberStatus is one member.
type memberStatus struct {
	ravel.Member
	Self      bool   `json:"self,omitempty"`
	DrainedBy string `json:"drainedBy,omitempty"`
	// Director is what a director says of itself; nil while it says nothing, and on a realserver, which does not hear it.
	Director *directorStatus `json:"director,omitempty"`
	// Redirects are, of a realserver, how many it says are in place; nil where it says nothing.
	Redirects *int `json:"redirects,omitempty"`
	// Verdicts are, of a realserver, those on its addresses that directors reach it by.
	Verdicts []verdict `json:"verdicts,omitempty"`
}

type directorStatus struct {
	Settled   bool `json:"settled"` // it says what it wishes
	Up        int  `json:"sessionsUp"`
	Sessions  int  `json:"sessions"`
	TableSize int  `json:"tableSize"` // slots of its kernel's Maglev tables; 0 is not known
	Services  int  `json:"services"`
	// The three count the services of which it says something else than who answers: what it wishes, the Maglev table that
	// its kernel holds, and which real servers take new flows there.
	Wish      int `json:"wishDiffers"`
	Table     int `json:"tableDiffers"`
	Available int `json:"availableDiffers"`
	// Dark says that it is not to attract packets; the next two that it announces nothing of a family though it could.
	Dark       bool `json:"dark,omitempty"`
	Withdrawn4 bool `json:"withdrawn4,omitempty"`
	Withdrawn6 bool `json:"withdrawn6,omitempty"`
	// Unheard says that the source of its inputs does not answer it.
	Unheard bool `json:"unheard,omitempty"`
}

// verdict is what is held of a real server's address.
type verdict struct {
	Addr   netip.Addr   `json:"address"`
	Health ravel.Health `json:"health"`         // by the probes of the director that answers
	Dead   string       `json:"dead,omitempty"` // why the fleet holds it for dead, so that it takes no new flows
}

// members joins what gossip knows with what the documents name.
func (p *process) members() membersAnswer {
	c, known := p.computed.Latest()
	fleet := p.known()
	v := c.result.Verdict
	answer := membersAnswer{
		Fleet: p.settings.gossip.Fleet, Role: p.role, Node: p.settings.node, Unknown: !known, Settled: fleet.Settled,
		Majority: v.Majority, Seen: v.Seen, Voters: v.Voters, standing: p.standing(fleet), Differs: c.result.Differs,
	}
	self := p.settings.node
	addrs := map[string][]netip.Addr{} // of nodes
	for _, n := range c.inputs.Cluster.Nodes {
		addrs[n.Name] = n.Addrs
	}
	seen := map[string]bool{}
	for _, m := range fleet.Members {
		seen[m.Name] = true
		s := memberStatus{Member: m, Self: m.Name == self}
		if fleet.Drained(m.Name) {
			s.DrainedBy = fleet.Registers[ravel.DrainRegisterPrefix+m.Name].By
		}
		report, says := fleet.Reports[m.Name]
		switch {
		case m.Role == ravel.Realserver:
			if report.Redirects != nil {
				n := len(report.Redirects)
				s.Redirects = &n
			}
			s.Verdicts = verdicts(v, fleet.Reports[self], addrs[m.Name])
		case says && p.role == ravel.Director:
			s.Director = statusOf(report, fleet.Reports[self])
		}
		answer.Members = append(answer.Members, s)
	}
	for _, d := range c.inputs.Fleet.Directors {
		if !seen[d.Name] {
			answer.Absent = append(answer.Absent, absent{Name: d.Name, Role: ravel.Director})
		}
	}
	for _, n := range desired.RealServers(c.inputs) {
		if !seen[n.Name] {
			answer.Absent = append(answer.Absent, absent{
				Name: n.Name, Role: ravel.Realserver, Verdicts: verdicts(v, fleet.Reports[self], n.Addrs),
			})
		}
	}
	slices.SortFunc(answer.Absent, func(a, b absent) int {
		return cmp.Or(cmp.Compare(a.Role, b.Role), cmp.Compare(a.Name, b.Name))
	})
	return answer
}

// statusOf compares what a director says with what this one does.
func statusOf(r, own ravel.Report) *directorStatus {
	s := &directorStatus{
		Settled: r.Services != nil, Sessions: len(r.Sessions), TableSize: r.TableSize, Services: len(r.Services),
		Dark: r.Dark, Withdrawn4: r.Withdrawn4, Withdrawn6: r.Withdrawn6, Unheard: r.Unheard > 0,
	}
	for _, up := range r.Sessions {
		if up {
			s.Up++
		}
	}
	if r.Services == nil || own.Services == nil {
		return s
	}
	count := func(key ravel.ServiceKey) {
		a, b := r.Services[key], own.Services[key]
		if a.Wish != b.Wish {
			s.Wish++
		}
		if a.Table != b.Table {
			s.Table++
		}
		if a.Available != b.Available {
			s.Available++
		}
	}
	for key := range own.Services {
		count(key)
	}
	for key := range r.Services {
		if _, both := own.Services[key]; !both {
			count(key)
		}
	}
	return s
}

// verdicts are those on a node's addresses.
func verdicts(v health.Verdict, own ravel.Report, addrs []netip.Addr) []verdict {
	var list []verdict
	for _, a := range addrs {
		found, probed := own.Health[a]
		if why, dead := v.Dead[a]; dead || probed {
			list = append(list, verdict{Addr: a, Health: found, Dead: why})
		}
	}
	return list
}

// healthOf says what is held of a member's addresses: one word where it is the same of all.
func healthOf(list []verdict) string {
	if len(list) > 0 && !slices.ContainsFunc(list, func(v verdict) bool { return v.Dead != "" || v.Health != list[0].Health }) {
		return list[0].Health.String()
	}
	var words []string
	for _, v := range list {
		word := v.Health.String()
		if v.Dead != "" {
			word = "dead: " + v.Dead
		}
		words = append(words, v.Addr.String()+" "+word)
	}
	return strings.Join(words, ", ")
}

func membersCommand() *cli.Command {
	return &cli.Command{
		Name:  "members",
		Usage: "show the fleet as the ravel that runs here sees it: who is there, and which directors hold other tables",
		Flags: append(askFlags(), watchFlag()),
		Action: func(c *cli.Context) error {
			socket, format, err := asks(c)
			if err != nil {
				return err
			}
			return watching(c, func() error {
				var answer membersAnswer
				if err := admin.Get(c.Context, socket, "members", &answer); err != nil {
					return err
				}
				if format == formatJSON {
					err = printJSON(c.App.Writer, answer)
				} else {
					err = printMembers(c, format, answer)
				}
				if err != nil {
					return err
				}
				return judgeMembers(c, answer)
			})
		},
	}
}

func watchFlag() cli.Flag {
	return &cli.BoolFlag{Name: "watch", Aliases: []string{"w"}, Usage: "show it again every two seconds, until it is interrupted"}
}

// watching shows something once, or with --watch again and again; then its end is the interrupt's, and no fault.
func watching(c *cli.Context, show func() error) error {
	if !c.Bool("watch") {
		return show()
	}
	for {
		fmt.Fprintf(c.App.Writer, "\n%s\n", time.Now().Format(time.TimeOnly))
		if err := show(); err != nil && !errors.Is(err, errNotWell) && c.Context.Err() == nil {
			return err
		}
		select {
		case <-c.Context.Done():
			return nil
		case <-time.After(2 * time.Second):
		}
	}
}

func printMembers(c *cli.Context, format string, a membersAnswer) error {
	title := fmt.Sprintf("fleet %s, as %s sees it", a.Fleet, a.Node)
	switch {
	case !a.Settled:
		title += ": it has not heard from the fleet yet"
	case a.Role == ravel.Director:
		title += fmt.Sprintf(": %d of %d voting members", a.Seen, a.Voters)
		if !a.Majority {
			title += ", no majority"
		}
	}
	fmt.Fprintln(c.App.Writer, title)
	for _, line := range a.lines() {
		fmt.Fprintln(c.App.Writer, line)
	}
	fmt.Fprintln(c.App.Writer)
	header := []string{"NAME", "ROLE", "STATE", "ADDRESS", "VERSION", "SESSIONS", "DIFFERS", "HEALTH", "NOTES"}
	if format == formatWide {
		header = append(header, "TABLE SIZE", "SERVICES", "REDIRECTS", "WIRE", "KEYS", "ADDRESSES")
	}
	var rows [][]string
	for _, m := range a.Members {
		row := []string{m.Name, m.Role.String(), m.State.String(), m.Gossip.String(), m.Version, m.sessions(), m.differs(), healthOf(m.Verdicts), m.notes()}
		if format == formatWide {
			row = append(row, m.wide()...)
		}
		rows = append(rows, row)
	}
	for _, b := range a.Absent {
		row := []string{b.Name, b.Role.String(), "absent", "", "", "", "", healthOf(b.Verdicts)}
		rows = append(rows, pad(row, len(header)))
	}
	if err := table(c.App.Writer, header, rows); err != nil || len(a.Differs) == 0 {
		return err
	}
	fmt.Fprintln(c.App.Writer)
	rows = nil
	for _, d := range a.Differs {
		what := "who takes new flows"
		if d.Table {
			what = "Maglev table"
		}
		rows = append(rows, []string{d.Service.String(), what, strings.Join(d.Directors, ", "), ago(d.Since)})
	}
	return table(c.App.Writer, []string{"SERVICE", "WHAT DIFFERS", "ON", "SINCE"}, rows)
}

func (m memberStatus) sessions() string {
	if m.Director == nil {
		return ""
	}
	return fmt.Sprintf("%d of %d", m.Director.Up, m.Director.Sessions)
}

func (m memberStatus) differs() string {
	d := m.Director
	switch {
	case d == nil || m.Self || !d.Settled:
		return ""
	case d.Wish+d.Table+d.Available == 0:
		return "none"
	}
	return fmt.Sprintf("wish %d, table %d, flows %d", d.Wish, d.Table, d.Available)
}

func (m memberStatus) notes() string {
	var notes []string
	if m.Self {
		notes = append(notes, "this one")
	}
	if m.Director != nil && !m.Director.Settled {
		notes = append(notes, "has not settled")
	}
	if m.DrainedBy != "" {
		notes = append(notes, "drained by "+m.DrainedBy)
	}
	if d := m.Director; d != nil {
		switch {
		case d.Dark:
			notes = append(notes, "attracts nothing (--attract=none)")
		case m.DrainedBy != "":
		case d.Withdrawn4 && d.Withdrawn6:
			notes = append(notes, "announces nothing")
		case d.Withdrawn4:
			notes = append(notes, "announces no IPv4")
		case d.Withdrawn6:
			notes = append(notes, "announces no IPv6")
		}
		if d.Unheard {
			notes = append(notes, "does not hear its API server")
		}
	}
	return strings.Join(notes, ", ")
}

// wide are the columns of -o wide.
func (m memberStatus) wide() []string {
	slots, services, redirects := "", "", ""
	if d := m.Director; d != nil {
		services = strconv.Itoa(d.Services)
		if slots = strconv.Itoa(d.TableSize); d.TableSize == 0 {
			slots = "unknown"
		}
	}
	if m.Redirects != nil {
		redirects = strconv.Itoa(*m.Redirects)
	}
	addrs := make([]string, len(m.Addrs))
	for i, a := range m.Addrs {
		addrs[i] = a.String()
	}
	return []string{slots, services, redirects, strconv.FormatUint(uint64(m.Wire), 10), strings.Join(m.Keys, " "), strings.Join(addrs, " ")}
}

// judgeMembers says why the fleet is not well.
func judgeMembers(c *cli.Context, a membersAnswer) error {
	if a.Unknown {
		return notKnown(c, a.Role.String(), "who should be in the fleet")
	}
	why := a.unwell()
	for _, line := range why {
		fmt.Fprintln(c.App.ErrWriter, "ravel:", line)
	}
	if len(why) > 0 {
		return errNotWell
	}
	return nil
}

// unwell says what is not as it should be.
func (a membersAnswer) unwell() []string {
	var why []string
	switch {
	case !a.Settled:
		why = append(why, "this "+a.Role.String()+" has not heard from the fleet yet")
	case a.Role == ravel.Director && !a.Majority:
		why = append(why, fmt.Sprintf("no majority: %d of %d voting members are seen, so nobody is found dead", a.Seen, a.Voters))
	}
	if a.FrozenBy != "" {
		why = append(why, "the fleet is frozen by "+a.FrozenBy+"; end it by: ravel freeze off")
	}
	for _, h := range a.Changes {
		why = append(why, "change "+h.Name+" of the documents waits for: ravel accept")
	}
	for _, m := range a.Members {
		if m.Role == ravel.Director && m.State == ravel.Dead {
			why = append(why, "director "+m.Name+" is dead")
		}
	}
	for _, b := range a.Absent {
		if b.Role == ravel.Director {
			why = append(why, "director "+b.Name+" of fleet.directors is not in the fleet: start it, with this --fleet and these keys, and let UDP and TCP to its gossip port through")
		}
	}
	if len(a.Differs) > 0 {
		why = append(why, fmt.Sprintf("directors hold different tables of %d services; see ravel check", len(a.Differs)))
	}
	return why
}
