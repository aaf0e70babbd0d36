package gossip

import "time"

// store holds cells and merges what arrives. It is not safe for use by many goroutines.
type store struct {
	limit     int // number of cells
	maxGraves int
	cells     map[key]*cell
	authors   map[string]*author
	fleet     map[string]*bucket // the fleet's cells: rosters by service, all else by topic
	graves    map[key]grave
	// trusting takes whatever rank a fact has: this process has not heard the others yet.
	trusting bool
	tree     *tree // of all that directors share; nil on a realserver

	dirty        map[key]struct{}    // what changed since it was last taken
	dirtyAuthors map[string]struct{} // whose cells changed in bulk
}

// bucket is a group of cells that know each other's ranks.
type bucket struct {
	cells map[key]*cell
	max   rank // the highest hi and the highest lo ever taken
}

// author is what one author says. Only its newest life counts: rank.hi of its cells is its incarnation, and a higher
// one deletes the cells of all lower ones.
type author struct {
	bucket
	incarnation uint64
	tombstones  int
	present     bool // is, or lately was, a member: others may hear of it
}

// grave remembers a forgotten cell for a while, so that those who did not forget it yet do not bring it back.
type grave struct {
	cell  *cell
	until time.Time
}

// outcome is what became of a cell that arrived.
type outcome uint8

const (
	taken  outcome = iota // it is news
	same                  // held already
	stale                 // we hold a higher one
	buried                // we forgot it, or a higher one, on purpose
	tooWild
	tooBig
	full
)

// refused reports whether the cell is held neither as it came nor in a higher version.
func (o outcome) refused() bool { return o >= buried }

// outcomes are the reasons of refusal for the metrics.
var outcomes = [...]string{stale: "stale", buried: "forgotten", tooWild: "wild", tooBig: "oversized", full: "full"}

func newStore(limit int, director bool) *store {
	s := &store{
		limit:        limit,
		maxGraves:    maxGraves,
		cells:        map[key]*cell{},
		authors:      map[string]*author{},
		fleet:        map[string]*bucket{},
		graves:       map[key]grave{},
		dirty:        map[key]struct{}{},
		dirtyAuthors: map[string]struct{}{},
	}
	if director {
		s.tree = new(tree)
	}
	return s
}

// merge takes a cell in if it beats what is held. Cells that are not wild, oversized or buried may come in any order
// and any number of times: the end is the same.
func (s *store) merge(c *cell) outcome {
	o := s.judge(c)
	if o == taken {
		s.put(c)
	}
	return o
}

// judge says what merge would do.
func (s *store) judge(c *cell) outcome {
	if len(c.author)+len(c.name) > maxKey || len(c.value)+len(c.unknown) > maxValue {
		return tooBig
	}
	a := s.authors[c.author] // nil for the fleet
	if a != nil && c.hi < a.incarnation {
		return stale
	}
	old := s.cells[c.key]
	if old != nil {
		switch n := old.compare(c); {
		case n == 0:
			return same
		case n > 0:
			return stale
		}
	}
	if g, ok := s.graves[c.key]; ok && c.compare(g.cell) <= 0 {
		return buried
	}
	if c.hi > utmost || c.lo > utmost {
		return tooWild
	}
	// Who knows nothing yet cannot tell what is wild from what all others hold.
	if b := s.bucket(c.key); b != nil && b.max != (rank{}) && !s.trusting &&
		(above(c.hi, b.max.hi) > wild || above(c.lo, b.max.lo) > wild) {
		return tooWild
	}
	if old == nil && len(s.cells) >= s.limit && (a == nil || c.hi == a.incarnation) {
		return full
	}
	return taken
}

func above(a, b uint64) uint64 {
	if a <= b {
		return 0
	}
	return a - b
}

// bucketName is where a cell of the fleet belongs.
func bucketName(k key) string {
	if k.topic == topicRoster {
		return "r" + serviceOf(k)
	}
	return string(appendUint32([]byte{'t'}, k.topic))
}

func appendUint32(b []byte, n uint32) []byte {
	return append(b, byte(n>>24), byte(n>>16), byte(n>>8), byte(n))
}

func (s *store) bucket(k key) *bucket {
	if k.author == "" {
		return s.fleet[bucketName(k)]
	}
	if a := s.authors[k.author]; a != nil {
		return &a.bucket
	}
	return nil
}

// put makes c the cell of its key, whatever was.
func (s *store) put(c *cell) {
	b := s.bucket(c.key)
	if b == nil {
		if c.author == "" {
			b = &bucket{cells: map[key]*cell{}}
			s.fleet[bucketName(c.key)] = b
		} else {
			b = &s.author(c.author).bucket
		}
	}
	if a := s.authors[c.author]; a != nil && c.hi > a.incarnation {
		s.drop(a)
		a.incarnation = c.hi
		s.dirtyAuthors[c.author] = struct{}{}
	}
	if old := s.cells[c.key]; old != nil {
		s.unlink(old)
	}
	s.cells[c.key], b.cells[c.key] = c, c
	b.max = rank{max(b.max.hi, c.hi), max(b.max.lo, c.lo)}
	if a := s.authors[c.author]; a != nil && c.value == "" {
		a.tombstones++
	}
	if s.tree != nil && s.shared(c.key) {
		s.tree.add(c)
	}
	s.dirty[c.key] = struct{}{}
}

// author returns the record of an author and makes it if there is none.
func (s *store) author(name string) *author {
	a := s.authors[name]
	if a == nil {
		a = &author{bucket: bucket{cells: map[key]*cell{}}}
		s.authors[name] = a
	}
	return a
}

// shared reports whether directors tell each other of a cell.
func (s *store) shared(k key) bool {
	if k.author == "" {
		return true
	}
	a := s.authors[k.author]
	return k.topic != topicUses && a != nil && a.present
}

// unlink undoes what put did for c, except in the maps of cells.
func (s *store) unlink(c *cell) {
	if s.tree != nil && s.shared(c.key) {
		s.tree.remove(c)
	}
	if a := s.authors[c.author]; a != nil && c.value == "" {
		a.tombstones--
	}
}

// remove deletes one cell.
func (s *store) remove(c *cell) {
	s.unlink(c)
	delete(s.cells, c.key)
	delete(s.bucket(c.key).cells, c.key)
	s.dirty[c.key] = struct{}{}
}

// drop deletes all cells of an author.
func (s *store) drop(a *author) {
	for _, c := range a.cells {
		s.remove(c)
	}
}

// forgetAuthor deletes an author with all that it said.
func (s *store) forgetAuthor(name string) {
	a := s.authors[name]
	if a == nil {
		return
	}
	s.drop(a)
	delete(s.authors, name)
	s.dirtyAuthors[name] = struct{}{}
}

// setPresent says whether others may hear of an author.
func (s *store) setPresent(name string, present bool) {
	a := s.authors[name]
	if a == nil && present {
		a = s.author(name)
	}
	if a == nil || a.present == present {
		return
	}
	a.present = present
	s.dirtyAuthors[name] = struct{}{}
	if s.tree == nil {
		return
	}
	for _, c := range a.cells {
		switch {
		case c.topic == topicUses:
		case present:
			s.tree.add(c)
		default:
			s.tree.remove(c)
		}
	}
}

const (
	// buryFor is longer than anybody keeps a real server that is gone in its roster.
	buryFor   = 3 * time.Hour
	maxGraves = 200_000
)

// bury deletes a cell and keeps it from coming back, unless it is raised. When there are too many graves an old one is
// opened.
func (s *store) bury(c *cell, until time.Time) {
	s.remove(c)
	if len(s.graves) >= s.maxGraves {
		var oldest key
		n := 0
		for k, g := range s.graves {
			if o := s.graves[oldest]; o.cell == nil || g.until.Before(o.until) {
				oldest = k
			}
			if n++; n == 32 {
				break
			}
		}
		delete(s.graves, oldest)
	}
	s.graves[c.key] = grave{c, until}
}

// openGraves forgets what was buried long ago.
func (s *store) openGraves(now time.Time) {
	for k, g := range s.graves {
		if now.After(g.until) {
			delete(s.graves, k)
		}
	}
}
