package config

import (
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
)

// keep writes the good content that is not kept yet, and tries again at the next look where that fails: a full disk is
// no reason to balance nothing.
func (f *File) keep() {
	if f.Keep == "" || f.toKeep == nil {
		return
	}
	err := writeAtomic(f.Keep, f.toKeep)
	f.mu.Lock()
	before := f.status.KeepFault
	f.status.KeepFault = err
	f.mu.Unlock()
	switch {
	case err == nil:
		f.toKeep = nil
	case before == nil || before.Error() != err.Error():
		f.log.Warn("this content cannot be kept for a later start at which the file is bad", "error", err)
	}
}

// restore makes the kept content of an earlier process the value in force, if there is one and it is good.
func (f *File) restore() bool {
	if f.Keep == "" {
		return false
	}
	b, info, err := read(f.Keep)
	if errors.Is(err, fs.ErrNotExist) {
		return false
	}
	var static Static
	if err == nil {
		static, err = Parse(b)
	}
	if err != nil {
		f.log.Error("the last good content of an earlier process cannot be used", "kept", f.Keep, "error", err)
		return false
	}
	content := sha256.Sum256(b)
	f.mu.Lock()
	f.status.LoadedAt, f.status.Hash, f.status.Kept = info.ModTime(), hex.EncodeToString(content[:]), true
	f.status.Warnings, f.status.Unknown = len(static.Warnings), len(static.Unknown)
	f.mu.Unlock()
	f.value.Set(static)
	return true
}

// writeAtomic puts content at path in one step, readable by the owner only: whoever reads sees all of the old or all of
// the new, also after a power cut.
func writeAtomic(path string, content []byte) error {
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		return fmt.Errorf("keeping the last good file: %w", err)
	}
	// CreateTemp makes it with mode 0600, and never opens what another left there.
	temporary, err := os.CreateTemp(filepath.Dir(path), "."+filepath.Base(path)+".*")
	if err != nil {
		return fmt.Errorf("keeping the last good file: %w", err)
	}
	_, err = temporary.Write(content)
	if err == nil {
		err = temporary.Sync()
	}
	err = errors.Join(err, temporary.Close())
	if err == nil {
		err = os.Rename(temporary.Name(), path)
	}
	if err != nil {
		return fmt.Errorf("keeping the last good file: %w", errors.Join(err, os.Remove(temporary.Name())))
	}
	return nil
}
