package doc

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"syscall"
)

// MaxSize is the size in bytes of the largest file that ReadFile reads: several times what 1,000 services with 20,000
// endpoints need.
const MaxSize = 16 << 20

// ReadFile returns the content of a file, and what the kernel said of it just before. It never waits for a pipe and
// never reads more than MaxSize. Its error does not name the path; errors.Is finds the cause, such as fs.ErrNotExist.
func ReadFile(path string) ([]byte, fs.FileInfo, error) {
	b, info, err := readFile(path)
	if err != nil {
		if p := (*fs.PathError)(nil); errors.As(err, &p) {
			err = p.Err
		}
		return nil, nil, fmt.Errorf("reading the file: %w", err)
	}
	return b, info, nil
}

func readFile(path string) ([]byte, fs.FileInfo, error) {
	f, err := os.OpenFile(path, os.O_RDONLY|syscall.O_NONBLOCK, 0)
	if err != nil {
		return nil, nil, err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return nil, nil, err
	}
	if info.IsDir() {
		return nil, nil, syscall.EISDIR
	}
	if !info.Mode().IsRegular() {
		return nil, nil, errors.New("is not a regular file")
	}
	b, err := io.ReadAll(io.LimitReader(f, MaxSize+1))
	if err != nil {
		return nil, nil, err
	}
	if len(b) > MaxSize {
		return nil, nil, fmt.Errorf("is larger than %d MiB", MaxSize>>20)
	}
	return b, info, nil
}
