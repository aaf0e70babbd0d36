package config

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"syscall"

	"github.com/ravel-lb/ravel"
)

// MaxSize is the size in bytes of the largest document that is read: several times what 1,000 services with 20,000
// endpoints need.
const MaxSize = 16 << 20

// Load reads and parses a static file. Its error is an *Error, also where the file cannot be read; errors.Is does
// find the cause of that, such as fs.ErrNotExist.
func Load(path string) (Static, error) {
	b, _, err := read(path)
	if err != nil {
		return Static{}, err
	}
	return Parse(b)
}

// unreadable is an *Error that has a cause.
type unreadable struct {
	error // what os said
	where string
}

func (e unreadable) Error() string { return e.where + ": " + e.error.Error() }
func (e unreadable) Unwrap() error { return e.error }
func (e unreadable) As(target any) bool {
	if t, ok := target.(**Error); ok {
		*t = &Error{Faults: []ravel.Problem{{Where: e.where, What: e.error.Error()}}}
		return true
	}
	return false
}

// read returns the content of a file, and what stat said just before. It never waits for a pipe and never reads more
// than MaxSize.
func read(path string) ([]byte, fs.FileInfo, error) {
	fail := func(err error) ([]byte, fs.FileInfo, error) {
		if p := (*fs.PathError)(nil); errors.As(err, &p) {
			err = p.Err // the place says the path
		}
		return nil, nil, unreadable{fmt.Errorf("reading the file: %w", err), path}
	}
	f, err := os.OpenFile(path, os.O_RDONLY|syscall.O_NONBLOCK, 0)
	if err != nil {
		return fail(err)
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return fail(err)
	}
	if info.IsDir() {
		return fail(syscall.EISDIR)
	}
	if !info.Mode().IsRegular() {
		return fail(errors.New("is not a regular file"))
	}
	b, err := io.ReadAll(io.LimitReader(f, MaxSize+1))
	if err != nil {
		return fail(err)
	}
	if len(b) > MaxSize {
		return fail(fmt.Errorf("is larger than %d MiB", MaxSize>>20))
	}
	return b, info, nil
}
