// Package regular opens files in directories that others may write to, and is not led elsewhere: by a link, into a pipe
// that nobody writes to, or to a file that has another name too.
package regular

import (
	"fmt"
	"io"
	"os"
	"syscall"

	"golang.org/x/sys/unix"
)

// most bounds what Read reads.
const most = 16 << 20

// Open is os.OpenFile for a regular file of this name alone. Its errors are those of os.OpenFile, and one for any other
// file. A new file is made with mode 0600.
func Open(path string, flag int) (*os.File, error) {
	f, err := os.OpenFile(path, flag|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0o600)
	if err != nil {
		return nil, err
	}
	info, err := f.Stat()
	if err == nil {
		if s, ok := info.Sys().(*syscall.Stat_t); !info.Mode().IsRegular() || ok && s.Nlink > 1 {
			err = fmt.Errorf("%s is no regular file of this name alone: remove it", path)
		}
	}
	if err != nil {
		_ = f.Close()
		return nil, err
	}
	return f, nil
}

// Read is os.ReadFile for such a file, up to 16 MiB of it.
func Read(path string) ([]byte, error) {
	f, err := Open(path, os.O_RDONLY)
	if err != nil {
		return nil, err
	}
	defer func() { _ = f.Close() }()
	return io.ReadAll(io.LimitReader(f, most))
}
