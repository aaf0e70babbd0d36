package config

import (
	"log/slog"
	"maps"
	"os"
	"path/filepath"

	"github.com/fsnotify/fsnotify"
)

// watch waits for changes around a file: in the directories of its path and of every symbolic link on the way to it.
// It watches directories, because what is at a path changes by a rename there: editors do that, and Kubernetes swaps
// a link named ..data. Where a directory is missing, the nearest one above it is watched.
type watch struct {
	path    string
	log     *slog.Logger
	watcher *fsnotify.Watcher // nil where the kernel gives none; then there are no events
	events  <-chan fsnotify.Event
	errors  <-chan error
	dirs    map[string]os.FileInfo // watched, and which directory it was
	failed  map[string]bool        // logged
}

func newWatch(path string, log *slog.Logger) *watch {
	w := &watch{path: path, log: log, dirs: map[string]os.FileInfo{}, failed: map[string]bool{}}
	watcher, err := fsnotify.NewWatcher()
	if err != nil {
		log.Warn("no events for the file, it is looked at every few seconds", "error", err)
		return w
	}
	w.watcher, w.events, w.errors = watcher, watcher.Events, watcher.Errors
	return w
}

func (w *watch) close() {
	if w.watcher != nil {
		w.watcher.Close()
	}
}

// update makes the watches fit the path as it now is. What another directory took the place of is watched anew.
func (w *watch) update() {
	if w.watcher == nil {
		return
	}
	want := directories(w.path)
	for dir, was := range maps.Clone(w.dirs) {
		if is, wanted := want[dir]; !wanted || !os.SameFile(was, is) {
			// An error means that the kernel dropped the watch with the directory.
			_ = w.watcher.Remove(dir)
			delete(w.dirs, dir)
		}
	}
	for dir, info := range want {
		if _, watched := w.dirs[dir]; watched {
			continue
		}
		if err := w.watcher.Add(dir); err != nil {
			if !w.failed[dir] {
				w.log.Warn("no events for a directory, it is looked at every few seconds", "directory", dir, "error", err)
			}
			w.failed[dir] = true
			continue
		}
		delete(w.failed, dir)
		w.dirs[dir] = info
	}
}

// directories returns the directories whose entries say what is at path: those that hold a symbolic link on the way,
// and the one that holds the file in the end.
func directories(path string) map[string]os.FileInfo {
	dirs := map[string]os.FileInfo{}
	if abs, err := filepath.Abs(path); err == nil {
		path = abs
	}
	const most = 40 // links, as the kernel counts
	for range most {
		link, rest := firstLink(path)
		if link == "" {
			break
		}
		addNearest(dirs, filepath.Dir(link))
		target, err := os.Readlink(link)
		if err != nil {
			break
		}
		if !filepath.IsAbs(target) {
			target = filepath.Join(filepath.Dir(link), target)
		}
		path = filepath.Join(target, rest)
	}
	addNearest(dirs, filepath.Dir(path))
	return dirs
}

// firstLink returns the symbolic link on the way to path that is nearest to the root, and what of path comes after it.
func firstLink(path string) (link, rest string) {
	for i := 1; i <= len(path); i++ {
		if i < len(path) && path[i] != filepath.Separator {
			continue
		}
		info, err := os.Lstat(path[:i])
		if err != nil {
			return "", ""
		}
		if info.Mode()&os.ModeSymlink != 0 {
			return path[:i], path[i:]
		}
	}
	return "", ""
}

// addNearest adds a directory, or the nearest one above it that exists.
func addNearest(dirs map[string]os.FileInfo, dir string) {
	for {
		if info, err := os.Stat(dir); err == nil && info.IsDir() {
			dirs[dir] = info
			return
		}
		above := filepath.Dir(dir)
		if above == dir {
			return
		}
		dir = above
	}
}
