package labkernel

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"syscall"
)

// GiveBack makes the owner of the working directory the owner of dir and all in it, so that what root leaves in a
// user's checkout is not in the user's way. What is gone meanwhile is no error.
func GiveBack(dir string) error {
	here, err := os.Stat(".")
	if err != nil {
		return err
	}
	owner := here.Sys().(*syscall.Stat_t)
	err = filepath.WalkDir(dir, func(path string, _ fs.DirEntry, err error) error {
		if err == nil {
			err = os.Lchown(path, int(owner.Uid), int(owner.Gid))
		}
		if errors.Is(err, fs.ErrNotExist) {
			return nil
		}
		return err
	})
	if err != nil {
		return fmt.Errorf("giving %s to its user: %w", dir, err)
	}
	return nil
}
