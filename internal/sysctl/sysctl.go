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

	"github.com/ravel-lb/ravel/internal/wholefile"
)

// Setter reads and writes settings. Names are paths below its root, such as "net/ipv4/vs/sloppy_tcp"; errors.Is finds
// fs.ErrNotExist in the error for a setting that this kernel does not have. Its methods are safe for many goroutines.
type Setter struct {
	root  string
	state string

	mu    sync.Mutex // guards the field below and the state file
	saved map[string]change
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
	if err := os.WriteFile(filepath.Join(s.root, filepath.FromSlash(name)), []byte(value), 0o644); err != nil {
		return fmt.Errorf("setting sysctl %s=%s: %w", name, value, err)
	}
	return nil
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
	if err := s.loadLocked(); err != nil {
		return nil, err
	}
	var done []string
	var errs []error
	for name, c := range s.saved {
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
			if err := os.WriteFile(filepath.Join(s.root, filepath.FromSlash(name)), []byte(c.Was), 0o644); err != nil {
				errs = append(errs, fmt.Errorf("restoring sysctl %s=%s: %w", name, c.Was, err))
				continue
			}
		}
		if !dryRun {
			delete(s.saved, name)
		}
	}
	slices.Sort(done)
	if !dryRun {
		errs = append(errs, s.storeLocked())
	}
	return done, errors.Join(errs...)
}

func (s *Setter) noteLocked(name, was, value string) error {
	if err := s.loadLocked(); err != nil {
		return err
	}
	c, changed := s.saved[name]
	if !changed || c.Set != was {
		// Never changed by us, or changed by another since: what stands there now is what to go back to.
		c.Was = was
	}
	c.Set = value
	if c.Was == value {
		delete(s.saved, name)
	} else {
		s.saved[name] = c
	}
	return s.storeLocked()
}

func (s *Setter) loadLocked() error {
	if s.saved != nil {
		return nil
	}
	saved := map[string]change{}
	if s.state != "" {
		b, err := os.ReadFile(s.state)
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("reading earlier sysctls: %w", err)
		}
		// A file that cannot be read as JSON says nothing worth stopping for.
		if err == nil && (json.Unmarshal(b, &saved) != nil || saved == nil) {
			saved = map[string]change{}
		}
		for name := range saved {
			if !filepath.IsLocal(filepath.FromSlash(name)) {
				delete(saved, name)
			}
		}
	}
	s.saved = saved
	return nil
}

func (s *Setter) storeLocked() error {
	if s.state == "" {
		return nil
	}
	if len(s.saved) == 0 {
		if err := os.Remove(s.state); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("removing the note of earlier sysctls: %w", err)
		}
		return nil
	}
	b, err := json.MarshalIndent(s.saved, "", "  ")
	if err != nil {
		return fmt.Errorf("noting earlier sysctls: %w", err)
	}
	if err := wholefile.Write(s.state, b); err != nil {
		return fmt.Errorf("noting earlier sysctls: %w", err)
	}
	return nil
}
