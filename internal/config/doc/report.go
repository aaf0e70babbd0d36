package doc

import (
	"cmp"
	"fmt"
	"slices"

	"github.com/ravel-lb/ravel"
)

// maxProblems is how many faults, and how many warnings, a report keeps: nobody reads more, and a document of
// nonsense must not cost more memory than it has.
const maxProblems = 1000

// Report collects what is wrong with a document. The zero value is ready.
type Report struct {
	faults, warnings list
}

type list struct {
	entries []entry
	more    int
}

type entry struct {
	line, column int // 0 where not known
	problem      ravel.Problem
}

func (r *Report) add(l *list, e entry, where, what string) {
	if len(l.entries) == maxProblems {
		l.more++
		return
	}
	switch {
	case e.line > 0 && e.column > 0:
		what += fmt.Sprintf(" (line %d:%d)", e.line, e.column)
	case e.line > 0:
		what += fmt.Sprintf(" (line %d)", e.line)
	}
	e.problem = ravel.Problem{Where: where, What: what}
	l.entries = append(l.entries, e)
}

// Faults returns what makes the document unusable, in the order of the document.
func (r *Report) Faults() []ravel.Problem { return r.faults.problems("faults") }

// Warnings returns what was left out or means less than it seems to, in the order of the document.
func (r *Report) Warnings() []ravel.Problem { return r.warnings.problems("warnings") }

func (l list) problems(name string) []ravel.Problem {
	sorted := slices.Clone(l.entries)
	slices.SortStableFunc(sorted, func(a, b entry) int {
		return cmp.Or(cmp.Compare(a.line, b.line), cmp.Compare(a.column, b.column))
	})
	var problems []ravel.Problem
	for _, e := range sorted {
		problems = append(problems, e.problem)
	}
	if l.more > 0 {
		problems = append(problems, ravel.Problem{Where: documentWhere, What: fmt.Sprintf("%d more %s", l.more, name)})
	}
	return problems
}
