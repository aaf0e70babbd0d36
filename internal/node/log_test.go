package node

import (
	"bytes"
	"fmt"
	"log/slog"
	"strings"
	"testing"

	"github.com/ravel-lb/ravel"
)

func someProblems(n int) []ravel.Problem {
	all := make([]ravel.Problem, n)
	for i := range all {
		all[i] = ravel.Problem{Where: fmt.Sprintf("endpoints[%d]", i), What: "no node"}
	}
	return all
}

func TestOnlyTheFirstOfManyProblemsAreLogged(t *testing.T) {
	for _, test := range []struct{ before, now, lines int }{{0, 3, 3}, {3, 3, 0}, {2, 5, 3}, {0, 20, 20}, {0, 21, 21}, {100, 5000, 21}} {
		var b bytes.Buffer
		LogNew(slog.New(slog.NewTextHandler(&b, nil)), someProblems(test.before), someProblems(test.now))
		if n := strings.Count(b.String(), "\n"); n != test.lines {
			t.Errorf("of %d and then %d: %d lines, want %d", test.before, test.now, n, test.lines)
		}
		if more := fmt.Sprintf("… and %d more", test.now-test.before-20); test.now-test.before > 20 && !strings.Contains(b.String(), more) {
			t.Errorf("no %q in:\n%s", more, b.String())
		}
	}
}

// 10,000 endpoints of a node that is gone are 10,000 problems, at each change of the file.
func BenchmarkLogNew(b *testing.B) {
	before, now := someProblems(10_000), someProblems(10_001)
	for b.Loop() {
		LogNew(slog.New(slog.DiscardHandler), before, now)
	}
}
