package gossip

import (
	"errors"
	"fmt"

	"google.golang.org/protobuf/encoding/protowire"
)

// A saved state is a magic number, the version of its form, the fleet's name, the cells, and last a hash of all that.
const (
	magic     = "ravel-gossip"
	savedForm = 1
)

// Save returns what the fleet agreed on, as this process knows it: the rosters and registers, for Restore.
func (g *Gossip) Save() []byte {
	g.mu.Lock()
	defer g.mu.Unlock()
	b := appendText(nil, 1, magic)
	b = appendVarint(b, 2, savedForm)
	b = appendText(b, 3, g.config.Fleet)
	for _, bucket := range g.store.fleet {
		for _, c := range bucket.cells {
			b = appendCell(b, 4, c)
		}
	}
	return appendFixed(b, 5, newHash().text(string(b)).sum())
}

// Restore merges what an earlier life saved into what is known, best before Run. If it cannot be read, is of another
// fleet or of a newer form, nothing is taken.
func (g *Gossip) Restore(saved []byte) error {
	var cells []*cell
	var want, form uint64
	body := saved[:max(0, len(saved)-len(appendFixed(nil, 5, 0)))]
	sealed := false // the hash is there, and last
	var head, fleet string
	ok := eachField(saved, func(x field) bool {
		sealed = x.number == 5
		switch x.number {
		case 1:
			return x.text(&head)
		case 2:
			return x.varint(&form)
		case 3:
			return x.text(&fleet)
		case 4:
			c, ok := parseCell(x.data)
			if !ok || x.kind != protowire.BytesType || c.author != "" {
				return false
			}
			cells = append(cells, c)
		case 5:
			return x.fixed(&want)
		}
		return true
	})
	switch {
	case head != magic:
		return errors.New("saved gossip: it is none")
	case form != savedForm:
		return fmt.Errorf("saved gossip: form %d, want %d", form, savedForm)
	case !ok || !sealed || newHash().text(string(body)).sum() != want:
		return errors.New("saved gossip: damaged")
	case fleet != g.config.Fleet:
		return fmt.Errorf("saved gossip: of fleet %q, this is %q", fleet, g.config.Fleet)
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	for _, c := range cells {
		switch o := g.store.merge(c); o {
		case tooWild, tooBig, full:
			g.metrics.drop(outcomes[o])
		}
	}
	g.changed = true
	g.soonLocked()
	return nil
}
