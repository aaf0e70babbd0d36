package agree

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"reflect"
	"slices"
	"time"

	"github.com/ravel-lb/ravel"
	"github.com/ravel-lb/ravel/internal/wholefile"
)

// saved is what a director keeps over a restart.
type saved struct {
	Boot      string                    `json:"boot"` // the life of the kernel that the rosters were programmed into
	Rosters   []savedRoster             `json:"rosters"`
	Registers map[string]ravel.Register `json:"registers"`
}

type savedRoster struct {
	Service string           `json:"service"` // as ServiceKey prints it, for people
	Key     ravel.ServiceKey `json:"key"`
	Entries ravel.Roster     `json:"entries"`
}

func (s saved) roster(key ravel.ServiceKey) ravel.Roster {
	i, found := slices.BinarySearchFunc(s.Rosters, key, func(r savedRoster, key ravel.ServiceKey) int { return r.Key.Compare(key) })
	if !found {
		return nil
	}
	return s.Rosters[i].Entries
}

// saver keeps the file with the rosters. It writes seldom: a file that lags behind does not fit the kernel any more, and
// then the kernel's own order counts.
type saver struct {
	file, boot string
	saved      saved // as loaded at the start
	fleet      ravel.Fleet
	due        time.Time // zero while the file is up to date
	fault      error     // of the last time
}

// saveAfter is how long a change waits for others.
const saveAfter = 2 * time.Second

// load reads what an earlier process kept. Rosters of another life of the kernel are left out; registers are not.
func (s *saver) load() error {
	if s.file == "" {
		return nil
	}
	b, err := os.ReadFile(s.file)
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	var read saved
	if err := json.Unmarshal(b, &read); err != nil {
		return fmt.Errorf("%s: %w", s.file, err)
	}
	if read.Boot != s.boot {
		read.Rosters = nil
	}
	for _, r := range read.Rosters {
		slices.SortFunc(r.Entries, ravel.RosterEntry.Compare)
	}
	slices.SortFunc(read.Rosters, func(a, b savedRoster) int { return a.Key.Compare(b.Key) })
	s.saved = read
	return nil
}

// note sees to it that what the fleet agreed on is written, and returns when.
func (s *saver) note(now time.Time, fleet ravel.Fleet) time.Time {
	if s.file == "" || !fleet.Settled {
		return time.Time{}
	}
	if !sameMap(fleet.Rosters, s.fleet.Rosters) || !sameMap(fleet.Registers, s.fleet.Registers) {
		s.fleet = fleet
		if s.due.IsZero() {
			s.due = now.Add(saveAfter)
		}
	}
	if !s.due.IsZero() && !now.Before(s.due) {
		if s.fault = s.flush(); s.fault != nil {
			s.due = now.Add(10 * time.Second)
		}
	}
	return s.due
}

// problems are what keeps it from saving.
func (s *saver) problems() []ravel.Problem {
	if s.fault == nil {
		return nil
	}
	return []ravel.Problem{{
		Where: "--state-dir", What: s.fault.Error() + "; a restart of the whole fleet may move flows",
		Fix: "make it writable, or set --state-dir to what is; an empty one keeps nothing",
	}}
}

// sameMap reports whether two maps are one in memory.
func sameMap[K comparable, V any](a, b map[K]V) bool {
	return reflect.ValueOf(a).Pointer() == reflect.ValueOf(b).Pointer()
}

// flush writes what is due.
func (s *saver) flush() error {
	if s.due.IsZero() {
		return nil
	}
	out := saved{Boot: s.boot, Registers: s.fleet.Registers}
	for key, r := range s.fleet.Rosters {
		out.Rosters = append(out.Rosters, savedRoster{Service: key.String(), Key: key, Entries: r})
	}
	slices.SortFunc(out.Rosters, func(a, b savedRoster) int { return a.Key.Compare(b.Key) })
	b, err := json.Marshal(out)
	if err != nil {
		return fmt.Errorf("saving the rosters: %w", err)
	}
	if err := wholefile.Write(s.file, b); err != nil {
		return fmt.Errorf("saving the rosters: %w", err)
	}
	s.due = time.Time{}
	return nil
}
