package roster

import "github.com/ravel-lb/ravel"

// Predict returns what a roster becomes when all directors wish the same and nothing else changes: newcomers have said
// that they are ready, and drains that begin go on; with over, those that may end have ended. It writes as this director
// would, by the rules that a Keeper goes by.
func Predict(self string, r ravel.Roster, wishes []Wish, over bool) ravel.Roster {
	facts := Facts{
		Ready:     func(Wish, ravel.RosterState) bool { return true },
		DrainOver: func(ravel.RosterEntry) bool { return over },
	}
	// What one change makes room for, the next one does: a newcomer rises, and then another one drains, and then it goes.
	for range 8 {
		changes := next(self, r, wishes, Full, facts)
		if len(changes) == 0 {
			break
		}
		r = Merge(r, changes...)
	}
	return r
}
