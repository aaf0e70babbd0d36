package main

import (
	"fmt"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/ravel-lb/ravel"
	"github.com/ravel-lb/ravel/internal/admin"
	"github.com/ravel-lb/ravel/internal/desired"
	"github.com/ravel-lb/ravel/internal/hold"
)

// inForce is the file in which a role keeps the documents in force, or nothing where none is to be kept. It is another
// than lastGood: documents that are good may wait.
func inForce(stateDir string, role ravel.Role) string {
	if stateDir == "" {
		return ""
	}
	return filepath.Join(stateDir, "in-force-"+role.String()+".json")
}

// newGate returns what decides which documents are in force, with what an earlier process knew.
func (p *process) newGate() *hold.Gate {
	s := p.settings
	o := hold.Options{Share: s.blastRadius, Fleet: s.gossip.Fleet, Boot: bootID()}
	if p.registry != nil {
		o.Registerer = p.registry
	}
	if p.role == ravel.Director {
		o.Self = s.node
	}
	gate := hold.New(o)
	path := inForce(s.stateDir, p.role)
	if path == "" {
		return gate
	}
	saved, any, err := hold.Load(path)
	switch {
	case err != nil:
		s.log.Error("which documents an earlier process had in force is not known", "err", err)
	case any:
		gate.Restore(saved)
		if p.cluster != nil && saved.Pending != "" {
			p.cluster.Also(saved.Documents.Cluster.Services) // from the start
		}
	}
	return gate
}

// offer puts documents in force, or holds them, and returns when to do so again though nothing changed. It is for read
// alone.
func (p *process) offer(newest hold.Documents) (again time.Time) {
	fleet, _ := p.gossip.Latest()
	before, any := p.decision.Latest()
	d := p.gate.Decide(time.Now(), newest, fleet)
	for name, value := range d.Tell {
		if err := p.gossip.SetRegister(name, value); err != nil {
			p.settings.log.Warn("telling the fleet which documents are in force", "err", err)
		}
	}
	if !any || d.Unconfirmed != before.Unconfirmed || !sameChange(d.Held, before.Held) || !d.InForce.Same(before.InForce) {
		p.decision.Set(d) // first: who is woken by the inputs asks for it
		p.inputs.Set(p.settings.original.into(desired.Inputs{
			Role: p.role, Node: p.settings.node, Cluster: d.InForce.Cluster, Fleet: d.InForce.Fleet.WithNodes(d.InForce.Cluster.Nodes), AttractNone: p.settings.attractNone,
		}))
		p.logHeld(before.Held, d.Held)
	} else if !d.Newest.Same(before.Newest) {
		p.decision.Set(d)
	}
	p.keepInForce()
	if p.cluster != nil {
		var also []desired.Service
		if d.Held != nil {
			also = d.InForce.Cluster.Services
		}
		p.cluster.Also(also)
	}
	return d.Wake
}

func sameChange(a, b *hold.Change) bool {
	return a == nil && b == nil || a != nil && b != nil && a.Name == b.Name && a.Empty == b.Empty && slices.EqualFunc(a.Parts, b.Parts, func(a, b hold.Part) bool {
		return a.What == b.What && a.Of == b.Of && slices.Equal(a.Lost, b.Lost)
	})
}

func (p *process) logHeld(before, now *hold.Change) {
	switch {
	case now != nil && now.Empty:
		p.settings.log.Warn("the documents name no VIP, and what was in force before is not known: this host stays as it was found")
	case now != nil && (before == nil || before.Name != now.Name):
		p.settings.log.Warn("a change of the documents is held: ravel plan held shows it, ravel accept lets it through",
			"change", now.Name, "takes", now.Takes())
	case now == nil && before != nil:
		p.settings.log.Info("no change of the documents is held any more", "change", before.Name)
	}
}

// keepAgain is how long after it failed the documents in force are not tried to be kept again.
const keepAgain = 10 * time.Second

// keepInForce writes what is in force for a later process. What fails is tried again later, with other news.
func (p *process) keepInForce() {
	path := inForce(p.settings.stateDir, p.role)
	if path == "" || time.Now().Before(p.keepAfter) {
		return
	}
	saved, due := p.gate.Save()
	if !due {
		return
	}
	err := saved.Store(path)
	if err == nil {
		p.gate.Kept()
	} else {
		p.keepAfter = time.Now().Add(keepAgain)
	}
	if was := p.unkept.Swap(&err); err != nil && (was == nil || *was == nil) {
		p.settings.log.Warn("the documents in force cannot be kept for a later start", "err", err)
	}
}

// held is the change that waits here, and nil where none does.
func (p *process) held() *hold.Change {
	d, _ := p.decision.Latest()
	return d.Held
}

func (p *process) heldProblems() []ravel.Problem {
	var problems []ravel.Problem
	if change := p.held(); change != nil {
		problems = append(problems, change.Problem())
	}
	if err := p.unkept.Load(); err != nil && *err != nil {
		problems = append(problems, ravel.Problem{
			Where: "--state-dir", What: (*err).Error() + "; a start while a change is held would not know what was before",
			Fix: "make it writable, or set --state-dir to what is; an empty one keeps nothing",
		})
	}
	return problems
}

// unconfirmed reports whether the documents may be held by others, and what was in force before is not known.
func (p *process) unconfirmed() bool {
	d, _ := p.decision.Latest()
	return d.Unconfirmed
}

// heldStanding is a change that waits, as listings tell it.
type heldStanding struct {
	hold.Change
	// By are the directors that hold it; empty is the process that answers.
	By []string `json:"by,omitempty"`
}

func (h heldStanding) line() string {
	switch {
	case len(h.By) > 0:
		return "a change of the documents is held by " + strings.Join(h.By, ", ") + " (" + h.Name + "): ravel plan held there shows it, ravel accept " + h.Name + " lets it through"
	case h.Empty:
		return "the documents name no VIP, and what was in force before is not known: this host stays as it was found; ravel accept lets them through (" + h.Name + ")"
	case len(h.Parts) == 0:
		return "the documents are a change that others hold (" + h.Name + "): this host stays as it was found; ravel accept lets it through"
	}
	return "a change of the documents is held (" + h.Name + "): it would take away " + h.Takes() + "; ravel plan held shows it, ravel accept lets it through"
}

// heldOf are the changes that wait, the one that waits here before those that only wait at other directors.
func (p *process) heldOf(fleet ravel.Fleet) []heldStanding {
	var list []heldStanding
	if own := p.held(); own != nil {
		list = append(list, heldStanding{Change: *own})
	}
	for _, m := range fleet.Live(ravel.Director) {
		_, held := hold.Says(fleet, m.Name)
		if held == "" || m.Name == p.settings.node {
			continue
		}
		at := slices.IndexFunc(list, func(h heldStanding) bool { return h.Name == held })
		switch {
		case at < 0:
			list = append(list, heldStanding{Change: hold.Change{Name: held}, By: []string{m.Name}})
		case len(list[at].By) > 0:
			list[at].By = append(list[at].By, m.Name)
		}
	}
	return list
}

// standing are the settings of the fleet that an operator should not forget, and what waits for him.
func (p *process) standing(fleet ravel.Fleet) standing {
	s := standingOf(fleet)
	s.Changes = p.heldOf(fleet)
	return s
}

// heldInputs are inputs as they would be if the change that waits here came.
func (p *process) heldInputs(in desired.Inputs) (desired.Inputs, error) {
	d, _ := p.decision.Latest()
	if d.Held == nil {
		return in, &admin.Refusal{Reason: "no change is held here"}
	}
	in.Cluster, in.Fleet = d.Newest.Cluster, d.Newest.Fleet.WithNodes(d.Newest.Cluster.Nodes)
	return p.settings.original.into(in), nil
}

// wouldHold says that a change would be held, were it made.
func (p *process) wouldHold(changed desired.Inputs) []string {
	d, _ := p.decision.Latest()
	to := hold.Documents{Cluster: changed.Cluster, Fleet: changed.Fleet, Reported: d.InForce.Reported}
	change := hold.Change{Name: to.Name(), Parts: hold.Weigh(d.InForce, to, p.settings.blastRadius)}
	if len(change.Parts) == 0 {
		return nil
	}
	return []string{fmt.Sprintf("it would take away %s at once, so it would wait for: ravel accept %s", change.Takes(), change.Name)}
}
