package hold

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"

	"github.com/ravel-lb/ravel/internal/wholefile"
)

// Load reads what an earlier process saved; false where there is no such file.
func Load(path string) (Saved, bool, error) {
	b, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return Saved{}, false, nil
	}
	if err != nil {
		return Saved{}, false, err
	}
	var s Saved
	if err := json.Unmarshal(b, &s); err != nil {
		return Saved{}, false, fmt.Errorf("%s: %w", path, err)
	}
	return s, true, nil
}

// Store keeps it for a later process.
func (s Saved) Store(path string) error {
	b, err := json.Marshal(s)
	if err != nil {
		return fmt.Errorf("keeping the documents in force: %w", err)
	}
	if err := wholefile.Write(path, b); err != nil {
		return fmt.Errorf("keeping the documents in force: %w", err)
	}
	return nil
}
