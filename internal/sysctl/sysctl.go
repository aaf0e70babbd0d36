// Package sysctl sets kernel settings under /proc/sys and remembers what they were, so that cleanup can put back what
// nobody changed since.
package sysctl

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"

	"github.com/ravel-lb/ravel/internal/regular"
	"github.com/ravel-lb/ravel/internal/wholefile"
)

// Setter reads and writes settings. Names are paths below its root, such as "net/ipv4/vs/sloppy_tcp"; errors.Is finds
// fs.ErrNotExist in the error for a setting that this kernel does not have. Its methods are safe for many goroutines.
type Setter struct {
	// Elsewhere is where single settings can be written too, by the same names: where root is read-only, as in a
	// container, a file of it may be mounted there. Empty is nowhere. It is set before the first call.
	Elsewhere string
	// Only says which notes of earlier values are gone by: the file may lie where others can write. nil is all.
	Only func(name, was string) bool
	// Changed is told of each setting that was changed; nil tells nobody. It is set before the first call.
	Changed func(name, was, value string)

	root  string
	state string

	mu sync.Mutex // guards the state file
}

// change is one setting that we changed.
type change struct {
	Was string `json:"was"`
	Set string `json:"set"`
}

// New returns a Setter for the settings below root, normally /proc/sys. What it changes it first notes in the file
// state, which should lie where a reboot empties it, as a reboot resets the settings; an empty name notes nothing.
func New(root, state string) *Setter {
	return &Setter{root: root, state: state}
}

// Get returns a setting, without the white space around it.
func (s *Setter) Get(name string) (string, error) {
	b, err := os.ReadFile(filepath.Join(s.root, filepath.FromSlash(name)))
	if err != nil {
		return "", fmt.Errorf("reading sysctl %s: %w", name, err)
	}
	return strings.TrimSpace(string(b)), nil
}

// Set gives a setting a value. It writes nothing where the setting has that value already.
func (s *Setter) Set(name, value string) error {
	was, err := s.Get(name)
	if err != nil || was == value {
		return err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if err := s.noteLocked(name, was, value); err != nil {
		return err
	}
	if err := s.write(name, value); err != nil {
		return fmt.Errorf("setting sysctl %s=%s: %w", name, value, err)
	}
	if s.Changed != nil {
		s.Changed(name, was, value)
	}
	return nil
}

// write writes a setting where that can be done.
func (s *Setter) write(name, value string) error {
	err := os.WriteFile(filepath.Join(s.root, filepath.FromSlash(name)), []byte(value), 0o644)
	if err == nil || s.Elsewhere == "" || !errors.Is(err, syscall.EROFS) {
		return err
	}
	// Not made where it is not there: a file of that name would be taken for the setting.
	f, elsewhere := os.OpenFile(filepath.Join(s.Elsewhere, filepath.FromSlash(name)), os.O_WRONLY, 0)
	if elsewhere != nil {
		return err // the one that tells the cause
	}
	_, err = f.WriteString(value)
	return errors.Join(err, f.Close())
}

// SetAtLeast raises a number to value where it is lower, and never lowers it.
func (s *Setter) SetAtLeast(name string, value int) error {
	was, err := s.Get(name)
	if err != nil {
		return err
	}
	n, err := strconv.Atoi(was)
	if err != nil {
		return fmt.Errorf("reading sysctl %s: %q is no number", name, was)
	}
	if n >= value {
		return nil
	}
	return s.Set(name, strconv.Itoa(value))
}

// Restore puts back every setting that still has the value it was given and returns what it did, or with dryRun what
// it would do, a line each, sorted. Settings that are gone, as those of a removed link, are forgotten.
func (s *Setter) Restore(dryRun bool) ([]string, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	saved, err := s.loadLocked()
	if err != nil {
		return nil, err
	}
	var done []string
	var errs []error
	for name, c := range saved {
		now, err := s.Get(name)
		switch {
		case errors.Is(err, fs.ErrNotExist):
		case err != nil:
			errs = append(errs, err)
			continue
		case now == c.Set:
			done = append(done, fmt.Sprintf("sysctl %s=%s", name, c.Was))
			if dryRun {
				continue
			}
			if err := s.write(name, c.Was); err != nil {
				errs = append(errs, fmt.Errorf("restoring sysctl %s=%s: %w", name, c.Was, err))
				continue
			}
		}
		if !dryRun {
			delete(saved, name)
		}
	}
	slices.Sort(done)
	if !dryRun {
		errs = append(errs, s.storeLocked(saved))
	}
	return done, errors.Join(errs...)
}

func (s *Setter) noteLocked(name, was, value string) error {
	saved, err := s.loadLocked()
	if err != nil {
		return err
	}
	c, changed := saved[name]
	if !changed || c.Set != was {
		// Never changed by us, or changed by another since: what stands there now is what to go back to.
		c.Was = was
	}
	c.Set = value
	if c.Was == value {
		delete(saved, name)
	} else {
		saved[name] = c
	}
	return s.storeLocked(saved)
}

// loadLocked reads the notes, each time: another process of ours may have made some since.
func (s *Setter) loadLocked() (map[string]change, error) {
	saved := map[string]change{}
	if s.state != "" {
		b, err := regular.Read(s.state)
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return nil, fmt.Errorf("reading earlier sysctls: %w", err)
		}
		// A file that cannot be read as JSON says nothing worth stopping for.
		if err == nil && (json.Unmarshal(b, &saved) != nil || saved == nil) {
			saved = map[string]change{}
		}
		for name := range saved {
			if !filepath.IsLocal(filepath.FromSlash(name)) || s.Only != nil && !s.Only(name, saved[name].Was) {
				delete(saved, name)
			}
		}
	}
	return saved, nil
}

func (s *Setter) storeLocked(saved map[string]change) error {
	if s.state == "" {
		return nil
	}
	if len(saved) == 0 {
		if err := os.Remove(s.state); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("removing the note of earlier sysctls: %w", err)
		}
		return nil
	}
	b, err := json.MarshalIndent(saved, "", "  ")
	if err != nil {
		return fmt.Errorf("noting earlier sysctls: %w", err)
	}
	if err := wholefile.Write(s.state, b); err != nil {
		return fmt.Errorf("noting earlier sysctls: %w", err)
	}
	return nil
}
