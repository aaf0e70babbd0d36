package gossip

import (
	"bytes"
	"crypto/rand"
	"crypto/sha256"
	"encoding/base64"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
	"time"

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
	switch {
	case len(keys) == 0:
		return nil, errors.New("no key in it")
	case len(keys) > maxKeys:
		return nil, fmt.Errorf("%d keys: want %d at most, as a member tells of no more", len(keys), maxKeys)
	}
	return keys, nil
}

// keyring is the keys of a file. Its methods are for one goroutine, except those of the ring.
type keyring struct {
	path  string
	last  []byte // the file as it was last read
	ring  *memberlist.Keyring
	keys  [][]byte  // in the order of the file
	since time.Time // members cannot read the first key; zero if all can
	tries int       // of keys, while nobody else was known
}

// fingerprintSize is the bytes of a fingerprint: too few to tell anything of a key, enough to tell keys apart.
const fingerprintSize = 4

// fingerprint names a key without giving it away.
func fingerprint(key []byte) string {
	sum := sha256.Sum256(append([]byte("ravel gossip key "), key...))
	return string(sum[:fingerprintSize])
}

// fingerprints are those of all keys, in the order of the file; of no keys where gossip is in the clear.
func (k *keyring) fingerprints() (list []string) {
	if k == nil {
		return nil
	}
	for _, key := range k.keys {
		list = append(list, fingerprint(key))
	}
	return list
}

// choose has the ring encrypt with the first key of the file that all members can read, and leaves it as it is where there
// is none such: so a new key may come first in the file before all members have it. Who knows of no member tries one key
// after the other, because those to be joined may not have all of them yet. It reports whether the key changed, and names who cannot
// read the first one.
func (k *keyring) choose(now time.Time, all []*member) (changed bool, lack []string, err error) {
	lacking := func(key []byte) (names []string) {
		for _, m := range all {
			if !slices.Contains(m.keys, fingerprint(key)) {
				names = append(names, m.name)
			}
		}
		slices.Sort(names)
		return names
	}
	chosen := k.ring.GetPrimaryKey()
	if len(all) == 0 {
		k.tries++
		chosen = k.keys[k.tries%len(k.keys)]
	} else if i := slices.IndexFunc(k.keys, func(key []byte) bool { return len(lacking(key)) == 0 }); i >= 0 {
		chosen = k.keys[i]
	}
	if lack = lacking(k.keys[0]); len(lack) == 0 {
		k.since = time.Time{}
	} else if k.since.IsZero() {
		k.since = now
	}
	if bytes.Equal(k.ring.GetPrimaryKey(), chosen) {
		return false, lack, nil
	}
	return true, lack, k.ring.UseKey(chosen)
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
	return &keyring{path: path, last: b, ring: ring, keys: keys}, nil
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
	k.last, k.keys = b, keys
	return true, nil
}

// turn makes the keys those of the ring: first the new ones are added, then the old ones go. The one that encrypts stays,
// or is the first one where it goes.
func turn(ring *memberlist.Keyring, keys [][]byte) error {
	for _, key := range keys {
		if err := ring.AddKey(key); err != nil {
			return err
		}
	}
	has := func(key []byte) bool {
		return slices.ContainsFunc(keys, func(k []byte) bool { return bytes.Equal(k, key) })
	}
	first := ring.GetPrimaryKey()
	if !has(first) {
		first = keys[0]
	}
	if err := ring.UseKey(first); err != nil {
		return err
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
		if err := ring.UseKey(first); err != nil {
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
		g.log.Info("gossip keys changed", "keys", len(g.keys.keys))
		g.renewSoon()
	}
	now := time.Now()
	used, lack, err := g.keys.choose(now, g.othersLocked())
	switch {
	case err != nil: // the ring knows what the file has
		g.log.Warn("choosing the gossip key that encrypts", "err", err)
	case used && len(g.members) > 1:
		g.log.Info("gossip is encrypted with another key")
	}
	if len(lack) > 0 && now.Sub(g.keys.since) > keysWait {
		g.problems["keys"] = ravel.Problem{
			Where: g.keys.path, What: "the first key of the file may not be used, because members do not say that they can read it: " + strings.Join(lack, ", "),
			Fix: "give them the key too, or end those that are no more",
		}
	}
}

// keysWait is how long a new key may take to come to all members before somebody should look: a kubelet takes a minute or
// two to bring a changed Secret.
const keysWait = 3 * time.Minute

// othersLocked are the other members that are there.
func (g *Gossip) othersLocked() (all []*member) {
	for _, m := range g.members {
		if m.live() && m.name != g.config.Name {
			all = append(all, m)
		}
	}
	return all
}
