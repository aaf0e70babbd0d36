package main

import (
	"archive/tar"
	"fmt"
	"io"
	"maps"
	"os"
	"path"
	"path/filepath"
	"slices"
	"time"
)

// file is a file, a directory or a symbolic link. All belong to root.
type file struct {
	kind byte // of tar: TypeReg, TypeDir, TypeSymlink
	mode int64
	link string
	data []byte
}

// tree is the files of a root file system, by path without a slash at the begin. Directories that are needed and not
// named are there.
type tree map[string]file

func directory(mode int64) file            { return file{kind: tar.TypeDir, mode: mode} }
func regular(mode int64, data []byte) file { return file{kind: tar.TypeReg, mode: mode, data: data} }
func symlink(to string) file               { return file{kind: tar.TypeSymlink, mode: 0o777, link: to} }

// whole adds the directories that are needed.
func (t tree) whole() (tree, error) {
	all := maps.Clone(t)
	for name := range t {
		for dir := path.Dir(name); dir != "."; dir = path.Dir(dir) {
			switch f, there := all[dir]; {
			case !there:
				all[dir] = directory(0o755)
			case f.kind != tar.TypeDir:
				return nil, fmt.Errorf("/%s is no directory, and /%s is to be in it", dir, name)
			}
		}
	}
	return all, nil
}

// write makes a tar that is the same for the same files.
func (t tree) write(w io.Writer, when time.Time) error {
	all, err := t.whole()
	if err != nil {
		return err
	}
	out := tar.NewWriter(w)
	for _, name := range slices.Sorted(maps.Keys(all)) {
		f := all[name]
		header := &tar.Header{Typeflag: f.kind, Name: name, Linkname: f.link, Mode: f.mode, Size: int64(len(f.data)), ModTime: when,
			Format: tar.FormatUSTAR}
		if f.kind == tar.TypeDir {
			header.Name += "/"
		}
		if err := out.WriteHeader(header); err != nil {
			return fmt.Errorf("/%s: %w", name, err)
		}
		if _, err := out.Write(f.data); err != nil {
			return fmt.Errorf("/%s: %w", name, err)
		}
	}
	return out.Close()
}

// unpack makes the files in a new directory.
func (t tree) unpack(dir string) error {
	all, err := t.whole()
	if err != nil {
		return err
	}
	if err := os.Mkdir(dir, 0o755); err != nil {
		return err
	}
	for _, name := range slices.Sorted(maps.Keys(all)) {
		f, to := all[name], filepath.Join(dir, filepath.FromSlash(name))
		switch f.kind {
		case tar.TypeDir:
			err = os.Mkdir(to, 0o755)
		case tar.TypeSymlink:
			if err := os.Symlink(f.link, to); err != nil {
				return err
			}
			continue
		default:
			err = os.WriteFile(to, f.data, 0o644)
		}
		if err != nil {
			return err
		}
		// The umask has no say, and tar's bit for sticky is not Go's.
		mode := os.FileMode(f.mode & 0o777)
		if f.mode&0o1000 != 0 {
			mode |= os.ModeSticky
		}
		if err := os.Chmod(to, mode); err != nil {
			return err
		}
	}
	return nil
}
