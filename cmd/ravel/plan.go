package main

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"math"
	"net/netip"
	"os"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/urfave/cli/v2"

	"github.com/ravel-lb/ravel"
	"github.com/ravel-lb/ravel/internal/admin"
	"github.com/ravel-lb/ravel/internal/config"
	"github.com/ravel-lb/ravel/internal/desired"
)

// planWords are a change that is not made.
type planWords struct {
	Verb   string     `json:"verb"` // drain, add, remove, file or held
	Nodes  []planNode `json:"nodes,omitempty"`
	Static []byte     `json:"static,omitempty"` // the changed static file, of file
}

type planNode struct {
	Name string `json:"name"` // of a node, or of add the address of one that nobody knows yet
	// Weight is of add, the number of its pods of each service; 0 is as many as it has, else as the others have.
	Weight int `json:"weight,omitempty"`
}

// The verbs of a plan.
const (
	planDrain  = "drain"
	planAdd    = "add"
	planRemove = "remove"
	planFile   = "file"
	planHeld   = "held"
)

// planAnswer is what a change would move.
type planAnswer struct {
	Director  string        `json:"director"` // who answers: the connections are its own
	Services  []planService `json:"services"` // those for which the change makes a difference
	TableSize int           `json:"tableSize"`
	// Complete says that all connections were counted.
	Complete bool `json:"complete"`
	// Notes say what may make it come otherwise; Warnings what the change does harm to.
	Notes    []string        `json:"notes,omitempty"`
	Warnings []string        `json:"warnings,omitempty"`
	Problems []ravel.Problem `json:"problems,omitempty"` // that the change would bring
	standing
}

// planService is one service of a plan.
type planService struct {
	VIP   netip.Addr  `json:"vip"`
	Proto ravel.Proto `json:"protocol"`
	Port  uint16      `json:"port"`
	Name  string      `json:"name,omitempty"`
	// Begin is when drains begin and newcomers rise, End when the drains are over and who leaves is out of the list.
	Begin   planStep     `json:"begin"`
	End     planStep     `json:"end"`
	Leaving []netip.Addr `json:"leaving,omitempty"` // the real servers that take no new flows any more
	// Live are the open connections of this director, and OnLeaving those of them that are on real servers that leave.
	Live      int `json:"live"`
	OnLeaving int `json:"onLeaving"`
	// Exposed are the live connections that break if this director is lost, today as it is: others would send them to
	// another real server.
	Exposed int    `json:"exposed"`
	Remark  string `json:"remark,omitempty"`
}

type planStep struct {
	Slots   int     `json:"slots"`   // whose new flows go to another real server than before this step
	Share   float64 `json:"share"`   // of all new flows, 0 to 1, if clients hash evenly
	Moved   int     `json:"moved"`   // live connections that the table has at another real server than before this step
	Exposed int     `json:"exposed"` // live connections that break if this director is lost after this step
}

// countFor bounds the count of connections.
const countFor = 30 * time.Second

// plan answers what a change would move, and makes none.
func (p *process) plan(kernel kernelTable) admin.Command {
	return func(ctx context.Context, words func(any) error) (any, error) {
		var w planWords
		if err := words(&w); err != nil {
			return nil, err
		}
		c, any := p.computed.Latest()
		fleet := p.known()
		if !any || c.inputs.Agreed == nil || c.inputs.Agreed.Hold || !fleet.Settled {
			return nil, &admin.Refusal{Reason: "this director does not know yet what it should do: no document is in force, or it has not heard from the fleet"}
		}
		var changed desired.Inputs
		director := false
		var err error
		if w.Verb == planHeld {
			changed, err = p.heldInputs(c.inputs)
		} else {
			changed, director, err = w.apply(c.inputs, fleet, p.settings.defaultService)
		}
		if err != nil {
			return nil, err
		}
		if director && w.Nodes[0].Name != p.settings.node {
			return nil, &admin.Refusal{Reason: fmt.Sprintf("draining a director moves no slot; which of its connections are exposed it knows itself: "+
				"run ravel plan drain %s there", w.Nodes[0].Name)}
		}
		held, err := kernel.read(ctx)
		if err != nil {
			return nil, err
		}
		size, known := tableSize(fleet, p.settings.node)
		answer := planAnswer{Director: p.settings.node, TableSize: int(size), standing: p.standing(fleet), Notes: notesOf(p.settings.node, c, fleet)}
		if !known {
			answer.Notes = append(answer.Notes, fmt.Sprintf("the table size of this kernel is not known yet; %d is what most have", size))
		}
		forecast := predict(p.settings.node, size, held, c.inputs, changed)
		if director {
			for _, v := range held {
				same := layoutOf(size, held, v.Key)
				wanted, _ := serviceOf(c.state.Services, v.Key)
				same.v.Name = wanted.Name
				forecast.add(v.Key, same, same, same)
			}
			if soleAttractor(w.Nodes[0].Name, c.inputs, fleet) {
				answer.Warnings = append(answer.Warnings, "without "+w.Nodes[0].Name+" no director of the fleet attracts packets")
			}
		}
		bounded, cancel := context.WithTimeout(ctx, countFor)
		defer cancel()
		answer.Complete, err = kernel.connections(bounded, func(open connection) bool {
			forecast.count(open)
			return true
		})
		if err != nil {
			return nil, err
		}
		if !answer.Complete {
			answer.Notes = append(answer.Notes, fmt.Sprintf("not all connections could be counted in %s: there are more", countFor))
		}
		answer.fill(forecast)
		if w.Verb == planFile {
			answer.Warnings = append(answer.Warnings, p.wouldHold(changed)...)
		}
		return answer, nil
	}
}

// notesOf say why things may come otherwise than a plan says.
func notesOf(self string, c computed, fleet ravel.Fleet) []string {
	var notes []string
	if fleet.Frozen() {
		notes = append(notes, "the fleet is frozen: nothing comes before ravel freeze off")
	}
	own, pending := fleet.Reports[self].Services, 0
	for _, m := range fleet.Live(ravel.Director) {
		theirs, others := fleet.Reports[m.Name].Services, 0
		for key, s := range own {
			if theirs[key].Wish != s.Wish {
				others++
			}
		}
		if others > 0 && theirs != nil {
			notes = append(notes, fmt.Sprintf("%s asks for other real servers of %d services: tables wait until the directors agree", m.Name, others))
		}
	}
	for key := range own {
		for _, e := range c.inputs.Agreed.Rosters[key] {
			if e.State == ravel.Joining || e.State == ravel.Draining {
				pending++
				break
			}
		}
	}
	if pending > 0 {
		notes = append(notes, fmt.Sprintf("real servers join or drain already in %d services: where this change makes a difference, that is counted too", pending))
	}
	return notes
}

// apply returns the inputs as the change makes them. director says that it is a director that is drained.
func (w planWords) apply(in desired.Inputs, fleet ravel.Fleet, fallback *desired.DefaultService) (changed desired.Inputs, director bool, err error) {
	agreed := *in.Agreed
	changed = in
	changed.Agreed = &agreed
	usage := func(format string, args ...any) error {
		return &admin.Refusal{Reason: fmt.Sprintf(format, args...), Usage: true}
	}
	if w.Verb == planFile {
		static, err := config.ParseWith(w.Static, fallback)
		if err != nil {
			return in, false, usage("the changed static file cannot be used: %v", err)
		}
		changed.Cluster, changed.Fleet = static.Cluster, static.Fleet
		return changed, false, nil
	}
	if len(w.Nodes) == 0 || w.Verb != planAdd && len(w.Nodes) > 1 {
		return in, false, usage("%s: want one node, or of add one at least", w.Verb)
	}
	kinds := kindsOf(in, fleet)
	name := w.Nodes[0].Name
	switch w.Verb {
	case planDrain, planRemove:
		kind, known := kinds[name]
		if !known || kind == aDirector && w.Verb == planRemove {
			return in, false, unknownName(name, kinds, "")
		}
		if kind == aDirector {
			return changed, true, nil
		}
		if w.Verb == planDrain {
			agreed.Drained = withName(agreed.Drained, name, true)
		} else {
			changed.Cluster.Nodes = slices.DeleteFunc(slices.Clone(in.Cluster.Nodes), func(n desired.Node) bool { return n.Name == name })
		}
		return changed, false, nil
	case planAdd:
		for _, n := range w.Nodes {
			if n.Weight < 0 || n.Weight > maxPlanWeight {
				return in, false, usage("%s=%d: want a weight of 1 to %d", n.Name, n.Weight, maxPlanWeight)
			}
			if err := addNode(&changed, fleet, n, kinds); err != nil {
				return in, false, err
			}
		}
		return changed, false, nil
	}
	return in, false, usage("%q: want drain, add, remove, a file or held", w.Verb)
}

// maxPlanWeight is as many pods as a plan gives a node.
const maxPlanWeight = 1000

// addNode makes a node a real server of all services of its families.
func addNode(in *desired.Inputs, fleet ravel.Fleet, add planNode, kinds map[string]string) error {
	at := slices.IndexFunc(in.Cluster.Nodes, func(n desired.Node) bool { return n.Name == add.Name })
	node := desired.Node{Name: add.Name}
	addr, err := netip.ParseAddr(add.Name)
	m, member := fleet.Member(add.Name)
	switch {
	case at >= 0:
		node = in.Cluster.Nodes[at]
	case member && m.Role == ravel.Realserver:
		node.Addrs = m.Addrs
	case err == nil && addr.IsGlobalUnicast() && addr.Zone() == "":
		node.Addrs = []netip.Addr{addr.Unmap()}
	default:
		refusal := unknownName(add.Name, kinds, "; a node that nobody knows yet is added by its address")
		return refusal
	}
	node.Ready, node.Labels = true, maps.Clone(node.Labels)
	if node.Labels == nil {
		node.Labels = map[string]string{}
	}
	maps.Copy(node.Labels, in.Cluster.Labels)
	nodes := slices.Clone(in.Cluster.Nodes)
	if at >= 0 {
		nodes[at] = node
	} else {
		nodes = append(nodes, node)
	}
	in.Cluster.Nodes = nodes
	in.Agreed.Drained = withName(in.Agreed.Drained, add.Name, false)

	type pods struct {
		namespace, service, port string
		proto                    ravel.Proto
		v4                       bool
	}
	done := map[pods]bool{}
	endpoints := slices.Clone(in.Cluster.Endpoints)
	for _, s := range in.Cluster.Services {
		if !slices.ContainsFunc(node.Addrs, func(a netip.Addr) bool { return a.Is4() == s.Key.VIP.Is4() }) {
			continue
		}
		of := pods{s.Namespace, s.Service, s.PortName, podProto(in.Cluster.Endpoints, s), s.Key.VIP.Is4()}
		if done[of] {
			continue
		}
		done[of] = true
		is := func(e desired.Endpoint) bool {
			return e.Namespace == of.namespace && e.Service == of.service && e.PortName == of.port && e.Proto == of.proto && e.Addr.Is4() == of.v4
		}
		has, others, total := 0, map[string]bool{}, 0
		for _, e := range endpoints {
			switch {
			case !is(e) || !e.Ready || e.Terminating:
			case e.Node == add.Name:
				has++
			default:
				others[e.Node] = true
				total++
			}
		}
		weight := add.Weight
		if weight == 0 && has > 0 {
			continue
		}
		if weight == 0 {
			weight = max(1, int(math.Round(float64(total)/float64(max(1, len(others))))))
		}
		endpoints = slices.DeleteFunc(endpoints, func(e desired.Endpoint) bool { return is(e) && e.Node == add.Name })
		pod := netip.IPv4Unspecified()
		if !of.v4 {
			pod = netip.IPv6Unspecified()
		}
		for range weight {
			endpoints = append(endpoints, desired.Endpoint{
				Namespace: of.namespace, Service: of.service, PortName: of.port, Proto: of.proto, Addr: pod, Port: 1, Node: add.Name, Ready: true,
			})
		}
	}
	in.Cluster.Endpoints = endpoints
	return nil
}

// podProto is the protocol that the pods of a service have: its own, unless they have another one only.
func podProto(endpoints []desired.Endpoint, s desired.Service) ravel.Proto {
	proto := s.Key.Proto
	for _, e := range endpoints {
		if e.Namespace == s.Namespace && e.Service == s.Service && e.PortName == s.PortName {
			if e.Proto == s.Key.Proto {
				return e.Proto
			}
			proto = e.Proto
		}
	}
	return proto
}

// fill takes over what was predicted and counted.
func (a *planAnswer) fill(p *prediction) {
	for _, s := range p.services {
		v := planService{
			VIP: s.key.VIP, Proto: s.key.Proto, Port: s.key.Port, Name: s.name, Remark: s.remark(),
			Leaving: slices.SortedFunc(maps.Keys(s.leaving), netip.Addr.Compare),
			Live:    s.live, OnLeaving: s.on, Exposed: s.exposed[0],
			Begin: planStep{Moved: s.moved[0], Exposed: s.exposed[1]}, End: planStep{Moved: s.moved[1], Exposed: s.exposed[2]},
		}
		v.Begin.Slots, v.Begin.Share = moved(s.today, s.begin)
		v.End.Slots, v.End.Share = moved(s.begin, s.end)
		a.Services = append(a.Services, v)
	}
	for i, key := range p.bereft {
		if i == 3 {
			a.Warnings = append(a.Warnings, fmt.Sprintf("and %d more services would have none", len(p.bereft)-i))
			break
		}
		a.Warnings = append(a.Warnings, key.String()+" would have no real server for new flows")
	}
	a.Problems = p.problems
}

func planCommand() *cli.Command {
	return &cli.Command{
		Name:      "plan",
		Usage:     "say what a change would move before it is made: slots of the Maglev tables, and live connections of the director that runs here",
		ArgsUsage: "drain NODE | remove NODE | add NODE[=WEIGHT]... | FILE | held",
		Flags:     askFlags(),
		Action: func(c *cli.Context) error {
			socket, format, err := asks(c)
			if err != nil {
				return err
			}
			words, err := planOf(c.Args().Slice())
			if err != nil {
				return usageError{fmt.Errorf("ravel plan: %w", err)}
			}
			var answer planAnswer
			if err := askDirector(c, socket, "plan", words, &answer); err != nil {
				return err
			}
			if format == formatJSON {
				err = printJSON(c.App.Writer, answer)
			} else {
				err = printPlan(c, format, answer)
			}
			if err != nil {
				return err
			}
			for _, line := range slices.Concat(answer.lines(), answer.Notes, answer.Warnings) {
				fmt.Fprintln(c.App.ErrWriter, "ravel:", line)
			}
			if len(answer.Warnings) > 0 {
				return errNotWell
			}
			return nil
		},
	}
}

// planOf reads the words of a plan.
func planOf(args []string) (planWords, error) {
	if len(args) == 0 {
		return planWords{}, errors.New("want drain NODE, remove NODE, add NODE[=WEIGHT]..., held or a changed static file")
	}
	w := planWords{Verb: args[0]}
	switch w.Verb {
	case planHeld:
		if len(args) != 1 {
			return w, fmt.Errorf("held: want nothing more, got %q", args[1:])
		}
		return w, nil
	case planDrain, planRemove:
		if len(args) != 2 || args[1] == "" {
			return w, fmt.Errorf("%s: want one NODE, got %q", w.Verb, args[1:])
		}
		w.Nodes = []planNode{{Name: args[1]}}
		return w, nil
	case planAdd:
		if len(args) == 1 {
			return w, errors.New("add: want NODE or NODE=WEIGHT, as many as are to be added")
		}
		for _, arg := range args[1:] {
			n := planNode{}
			name, weight, given := strings.Cut(arg, "=")
			n.Name = name
			if given {
				var err error
				if n.Weight, err = strconv.Atoi(weight); err != nil || n.Weight < 1 || n.Weight > maxPlanWeight {
					return w, fmt.Errorf("add %q: want a weight of 1 to %d behind the =", arg, maxPlanWeight)
				}
			}
			if name == "" {
				return w, fmt.Errorf("add %q: want a name before the =", arg)
			}
			if slices.ContainsFunc(w.Nodes, func(other planNode) bool { return other.Name == name }) {
				return w, fmt.Errorf("add: %s is named twice", name)
			}
			w.Nodes = append(w.Nodes, n)
		}
		return w, nil
	}
	if len(args) != 1 {
		return w, fmt.Errorf("want drain NODE, remove NODE, add NODE[=WEIGHT]..., held or one changed static file, got %q", args)
	}
	// What is wrong with it is the operator's fault, so it is looked at here first.
	if _, err := config.Load(args[0]); err != nil {
		return w, fmt.Errorf("%q is no verb, and no static file that can be used: %w", args[0], err)
	}
	b, err := os.ReadFile(args[0])
	if err != nil {
		return w, err
	}
	return planWords{Verb: planFile, Static: b}, nil
}

func printPlan(c *cli.Context, format string, a planAnswer) error {
	w := c.App.Writer
	if len(a.Services) == 0 {
		fmt.Fprintln(w, "no slot moves, and no connection")
	} else {
		header := []string{"SERVICE", "NAME", "BEGIN: SLOTS", "SHARE", "EXPOSED", "END: SLOTS", "SHARE", "EXPOSED", "TODAY: LIVE", "EXPOSED", "LEAVING", "REMARK"}
		if format == formatWide {
			header = append(header, "MOVED AT BEGIN", "MOVED AT END", "WHO LEAVES")
		}
		var rows [][]string
		for _, s := range a.Services {
			key := ravel.ServiceKey{VIP: s.VIP, Proto: s.Proto, Port: s.Port}
			row := []string{
				key.String(), s.Name, strconv.Itoa(s.Begin.Slots), percent(s.Begin.Share), strconv.Itoa(s.Begin.Exposed),
				strconv.Itoa(s.End.Slots), percent(s.End.Share), strconv.Itoa(s.End.Exposed),
				strconv.Itoa(s.Live), strconv.Itoa(s.Exposed), strconv.Itoa(s.OnLeaving), s.Remark,
			}
			if format == formatWide {
				var leaving []string
				for _, addr := range s.Leaving {
					leaving = append(leaving, addr.String())
				}
				row = append(row, strconv.Itoa(s.Begin.Moved), strconv.Itoa(s.End.Moved), strings.Join(leaving, " "))
			}
			rows = append(rows, row)
		}
		if err := table(w, header, rows); err != nil {
			return err
		}
		fmt.Fprintf(w, "\nOf %d slots. Begin: drains begin, newcomers rise. End: the drains are over. Connections are those of %s:\n"+
			"live today, exposed if they break should it be lost, leaving if their real server is gone at the end.\n", a.TableSize, a.Director)
	}
	for _, p := range a.Problems {
		fmt.Fprintln(w, "it brings a problem:", p)
	}
	return nil
}

func percent(share float64) string { return fmt.Sprintf("%.1f%%", 100*share) }
