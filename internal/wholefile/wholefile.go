// Package wholefile writes small files that are there as a whole or not at all: whoever reads one sees all of the old
// content or all of the new, also after a power cut.
package wholefile

import (
	"errors"
	"os"
	"path/filepath"
)

// Write puts content at path, readable by the owner only. It makes the folder if need be (mode 0755), and leaves nothing
// beside the file when it fails.
func Write(path string, content []byte) error {
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return err
	}
	// CreateTemp makes it with mode 0600, and never opens what another left there.
	temporary, err := os.CreateTemp(filepath.Dir(path), "."+filepath.Base(path)+".*")
	if err != nil {
		return err
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
		return errors.Join(err, os.Remove(temporary.Name()))
	}
	return nil
}
