package gossip

import (
	"bytes"
	"crypto/rand"
	"encoding/base64"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"

	"github.com/hashicorp/memberlist"
	"github.com/ravel-lb/ravel"
)

// NewKey returns a new key for a key file: 32 random bytes in base64 (RFC 4648 section 4).
func NewKey() string {
	b := make([]byte, 32)
	_, _ = rand.Read(b) // never fails: crypto/rand
	return base64.StdEncoding.EncodeToString(b)
}

// parseKeys reads a key file: a key in base64 per line, the first one encrypts and all decrypt. Empty lines and what
// follows a # do not count.
func parseKeys(file []byte) ([][]byte, error) {
	var keys [][]byte
	for i, line := range strings.Split(string(file), "\n") {
		line, _, _ = strings.Cut(line, "#")
		line = strings.TrimSpace(line)
		if line == "" {
			continue
		}
		k, err := base64.StdEncoding.DecodeString(line)
		if err != nil {
			return nil, fmt.Errorf("line %d: not base64", i+1)
		}
		if memberlist.ValidateKey(k) != nil {
			return nil, fmt.Errorf("line %d: a key of %d bytes: want 16, 24 or 32", i+1, len(k))
		}
		if !slices.ContainsFunc(keys, func(j []byte) bool { return bytes.Equal(j, k) }) {
			keys = append(keys, k)
		}
	}
	if len(keys) == 0 {
		return nil, errors.New("no key in it")
	}
	return keys, nil
}

// keyring is the keys of a file. Its methods are for one goroutine, except those of the ring.
type keyring struct {
	path string
	last []byte // the file as it was last read
	ring *memberlist.Keyring
	keys int
}

// openKeys reads a key file for the first time.
func openKeys(path string) (*keyring, error) {
	b, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	keys, err := parseKeys(b)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	ring, err := memberlist.NewKeyring(keys, keys[0])
	if err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	return &keyring{path: path, last: b, ring: ring, keys: len(keys)}, nil
}

// reload reads the file again and turns the ring to what it says. A file that cannot be used changes nothing.
func (k *keyring) reload() (changed bool, err error) {
	b, err := os.ReadFile(k.path)
	if err != nil {
		return false, err
	}
	if bytes.Equal(b, k.last) {
		return false, nil
	}
	keys, err := parseKeys(b)
	if err != nil {
		return false, fmt.Errorf("%s: %w", k.path, err)
	}
	if err := turn(k.ring, keys); err != nil {
		return false, fmt.Errorf("%s: %w", k.path, err)
	}
	k.last, k.keys = b, len(keys)
	return true, nil
}

// turn makes the keys those of the ring: first the new ones are added, then the first one encrypts, then the old ones
// go.
func turn(ring *memberlist.Keyring, keys [][]byte) error {
	for _, key := range keys {
		if err := ring.AddKey(key); err != nil {
			return err
		}
	}
	if err := ring.UseKey(keys[0]); err != nil {
		return err
	}
	has := func(key []byte) bool {
		return slices.ContainsFunc(keys, func(k []byte) bool { return bytes.Equal(k, key) })
	}
	for {
		now := ring.GetKeys()
		i := len(now) - 1
		for i >= 0 && has(now[i]) {
			i--
		}
		if i < 0 {
			return nil
		}
		// RemoveKey moves the keys behind the removed one within the slice that readers of the ring hold. UseKey makes a
		// new slice with its key first: so what goes is brought to the end before.
		old := now[i]
		for _, key := range slices.Backward(now[i+1:]) {
			if err := ring.UseKey(key); err != nil {
				return err
			}
		}
		if err := ring.UseKey(keys[0]); err != nil {
			return err
		}
		if err := ring.RemoveKey(old); err != nil {
			return err
		}
	}
}

// problems tells who may read the file that should not.
func (k *keyring) problems() []ravel.Problem {
	info, err := os.Stat(k.path)
	if err != nil || info.Mode().Perm()&0o077 == 0 {
		return nil
	}
	return []ravel.Problem{{
		Where: k.path,
		What:  fmt.Sprintf("the gossip key may be read by others (mode %#o)", info.Mode().Perm()),
		Fix:   "chmod 600 " + k.path,
	}}
}

// reloadLocked looks whether the key file changed.
func (g *Gossip) reloadLocked() {
	if g.keys == nil {
		return
	}
	changed, err := g.keys.reload()
	if err != nil {
		if _, known := g.problems["keys"]; !known {
			g.log.Warn("the gossip keys stay as they were", "err", err)
		}
		g.problems["keys"] = ravel.Problem{Where: "gossip keys", What: err.Error() + "; the keys stay as they were"}
		return
	}
	delete(g.problems, "keys")
	if changed {
		g.log.Info("gossip keys changed", "keys", g.keys.keys)
	}
}
