package config

import (
	"io/fs"

	"github.com/ravel-lb/ravel"
	"github.com/ravel-lb/ravel/internal/config/doc"
	"github.com/ravel-lb/ravel/internal/desired"
)

// Load reads and parses a static file. Its error is an *Error, also where the file cannot be read; errors.Is does
// find the cause of that, such as fs.ErrNotExist.
func Load(path string) (Static, error) { return LoadWith(path, nil) }

// LoadWith is Load, with a default service as ParseWith takes it.
func LoadWith(path string, d *desired.DefaultService) (Static, error) {
	b, _, err := read(path)
	if err != nil {
		return Static{}, err
	}
	return ParseWith(b, d)
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
		*t = &Error{Faults: []ravel.Problem{{Where: e.where, What: e.error.Error(), Fix: "put the file there, or correct the setting that names it"}}}
		return true
	}
	return false
}

// read is doc.ReadFile with an *Error in its error.
func read(path string) ([]byte, fs.FileInfo, error) {
	b, info, err := doc.ReadFile(path)
	if err != nil {
		return nil, nil, unreadable{err, path}
	}
	return b, info, nil
}
