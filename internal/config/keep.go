package config

import (
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"

	"github.com/ravel-lb/ravel/internal/wholefile"
)

// keep writes the good content that is not kept yet, and tries again at the next look where that fails: a full disk is
// no reason to balance nothing.
func (f *File) keep() {
	if f.Keep == "" || f.toKeep == nil {
		return
	}
	err := wholefile.Write(f.Keep, f.toKeep)
	if err != nil {
		err = fmt.Errorf("keeping the last good file: %w", err)
	}
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
		static, err = f.parse(b, f.Default)
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
