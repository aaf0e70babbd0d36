package config

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"io/fs"
	"log/slog"
	"slices"
	"sync"
	"syscall"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/ravel-lb/ravel"
	"github.com/ravel-lb/ravel/internal/desired"
	"github.com/ravel-lb/ravel/internal/latest"
)

// File watches a static file and holds its last good value. Its methods are safe for many goroutines.
type File struct {
	// Keep is the file in which the last good content is kept; empty keeps none. Run writes it with mode 0600, in one
	// step, and starts from it where the file at path cannot be used. It is set before Run.
	Keep string
	// Default is the default service for the VIPs of the pool where the file has none; nil is none. It is set before Run.
	Default *desired.DefaultService

	path     string
	parse    func([]byte, *desired.DefaultService) (Static, error)
	log      *slog.Logger
	value    latest.Value[Static]
	debounce time.Duration // of quiet before a changed file is read
	patience time.Duration // after which it is read without quiet
	poll     time.Duration // between looks at the file without any event

	mu     sync.Mutex // guards the field below
	status Status

	// The rest is Run's.
	toKeep  []byte // good content that is not kept yet
	seen    identity
	content [sha256.Size]byte // of what was last parsed
	fault   string            // last logged
	warned  []ravel.Problem   // of the value in force
}

// Status is how the loading of a file went.
type Status struct {
	Path string
	// LoadedAt is when the value in force was loaded, by whichever process; zero while there is none.
	LoadedAt time.Time
	// Kept reports that the value in force is the last good one of an earlier process.
	Kept bool
	// KeepFault is why the value in force could not be kept for a later process; nil while it was, or is not to be.
	KeepFault error
	// Hash is the SHA-256 of the content in force, in hexadecimal digits; empty while there is none.
	Hash string
	// Warnings and Unknown count the problems of the value in force.
	Warnings, Unknown int
	// Fault is why the file as it now is cannot be used, so that the value in force is stale; nil while it is not.
	// errors.As finds an *Error in it.
	Fault error
	// Failures counts the contents that could not be used.
	Failures int
}

// NewFile returns a File that Run will watch. It registers its metrics with reg, unless that is nil.
func NewFile(path string, log *slog.Logger, reg prometheus.Registerer) *File {
	f := &File{
		path: path, parse: ParseWith, log: log.With("file", path),
		debounce: 50 * time.Millisecond, patience: 500 * time.Millisecond, poll: 5 * time.Second,
	}
	f.status.Path = path
	f.register(reg)
	return f
}

// NewFleetFile returns a File for a fleet document that stands alone: of its value, only Fleet and Warnings are set.
func NewFleetFile(path string, log *slog.Logger, reg prometheus.Registerer) *File {
	f := NewFile(path, log, reg)
	f.parse = func(b []byte, _ *desired.DefaultService) (Static, error) {
		fleet, warnings, err := ParseFleet(b)
		return Static{Fleet: fleet, Warnings: warnings}, err
	}
	return f
}

// Latest returns the last good value, and false while there was none.
func (f *File) Latest() (Static, bool) { return f.value.Latest() }

// Changed returns a channel that is closed when there is another good value. Ask for it before Latest.
func (f *File) Changed() <-chan struct{} { return f.value.Changed() }

// Status returns how the loading went.
func (f *File) Status() Status {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.status
}

// Run loads the file, and again whenever it changes, until ctx is done; then it returns nil. It needs no event to see
// a change, but sees it at once with one.
func (f *File) Run(ctx context.Context) error {
	w := newWatch(f.path, f.log)
	defer w.close()
	w.update()
	f.load()

	poll := time.NewTicker(f.poll)
	defer poll.Stop()
	quiet := time.NewTimer(0)
	<-quiet.C
	defer quiet.Stop()
	var first time.Time // event that was not acted upon yet
	for {
		select {
		case <-ctx.Done():
			return nil
		case _, ok := <-w.events:
			now := time.Now()
			switch {
			case !ok:
				w.events = nil
			case first.IsZero():
				first = now
				quiet.Reset(f.debounce)
			case now.Sub(first)+f.debounce < f.patience:
				quiet.Reset(f.debounce)
			}
			continue
		case err, ok := <-w.errors:
			if !ok {
				w.errors = nil
				continue
			}
			f.log.Warn("events of the directory were lost, the file is read again", "error", err)
		case <-quiet.C:
		case <-poll.C:
			if !first.IsZero() {
				continue // somebody may be writing
			}
		}
		first = time.Time{}
		// The watches first: what changes after that makes an event.
		w.update()
		f.load()
	}
}

// load reads the file if it may have changed, and makes it the value in force if it is good.
func (f *File) load() {
	f.keep()
	if f.seen.still(f.path) {
		return
	}
	now := time.Now()
	b, info, err := read(f.path)
	if err != nil {
		f.seen, f.content = identity{}, [sha256.Size]byte{}
		f.refuse(err)
		return
	}
	f.seen = identify(info, now)
	content := sha256.Sum256(b)
	if content == f.content {
		return
	}
	f.content = content
	hash := hex.EncodeToString(content[:])
	if f.Status().Hash == hash {
		f.accept(hash, nil)
		return
	}
	static, err := f.parse(b, f.Default)
	if err != nil {
		f.refuse(err)
		return
	}
	f.accept(hash, &static)
	f.toKeep = b
	f.keep()
}

// accept takes a good file; static is nil where it is the one in force already.
func (f *File) accept(hash string, static *Static) {
	f.mu.Lock()
	f.status.LoadedAt, f.status.Hash, f.status.Fault, f.status.Kept = time.Now(), hash, nil, false
	if static != nil {
		f.status.Warnings, f.status.Unknown = len(static.Warnings), len(static.Unknown)
	}
	f.mu.Unlock()
	if f.fault != "" {
		f.log.Info("the file is good again")
		f.fault = ""
	}
	if static == nil {
		return
	}
	f.value.Set(*static)
	f.log.Info("loaded", "sha256", hash[:12], "services", len(static.Cluster.Services), "nodes", len(static.Cluster.Nodes),
		"endpoints", len(static.Cluster.Endpoints), "peers", len(static.Fleet.Peers))
	known := make(map[ravel.Problem]bool, len(f.warned))
	for _, p := range f.warned {
		known[p] = true
	}
	problems := slices.Concat(static.Warnings, static.Unknown)
	f.warned = problems
	f.tell(slog.LevelWarn, slices.DeleteFunc(slices.Clone(problems), func(p ravel.Problem) bool { return known[p] }))
}

// refuse leaves the value in force, and says why the file is not.
func (f *File) refuse(err error) {
	again := err.Error() == f.fault
	f.mu.Lock()
	f.status.Fault = err
	if !again {
		f.status.Failures++
	}
	f.mu.Unlock()
	if again {
		return
	}
	first := f.fault == ""
	f.fault = err.Error()
	what := "the file cannot be used: the last good one stays in force"
	if _, known := f.value.Latest(); !known {
		what = "the file cannot be used, and none was loaded before"
		if first && f.restore() {
			what = "the file cannot be used: the last good one, from an earlier process, is in force"
		}
	}
	faults := []ravel.Problem{{Where: f.path, What: err.Error()}}
	if e := (*Error)(nil); errors.As(err, &e) {
		faults = e.Faults
	}
	f.log.Error(what, "faults", len(faults))
	f.tell(slog.LevelError, faults)
}

// tell logs problems, the first of them if there are many.
func (f *File) tell(level slog.Level, problems []ravel.Problem) {
	const most = 20
	for i, p := range problems {
		if i == most {
			f.log.Log(context.Background(), level, "and more; ravel check shows all", "more", len(problems)-most)
			return
		}
		f.log.Log(context.Background(), level, p.What, "where", p.Where)
	}
}

// identity is what the kernel says of a file's content without reading it.
type identity struct {
	dev, ino, size   uint64
	modified, change syscall.Timespec
	sure             bool
}

// identify returns the identity of a file that was read after now. Where it changed only just before, the same
// identity may yet get another content, within one tick of the kernel's clock.
func identify(info fs.FileInfo, now time.Time) identity {
	s, ok := info.Sys().(*syscall.Stat_t)
	if !ok {
		return identity{}
	}
	const tick = 2 * time.Second
	return identity{
		dev: s.Dev, ino: s.Ino, size: uint64(s.Size), modified: s.Mtim, change: s.Ctim,
		sure: now.Sub(time.Unix(s.Ctim.Unix())) > tick,
	}
}

// still reports whether the file at path is sure to be the one that was read.
func (id identity) still(path string) bool {
	if !id.sure {
		return false
	}
	var s syscall.Stat_t
	if err := syscall.Stat(path, &s); err != nil {
		return false
	}
	return id == identity{dev: s.Dev, ino: s.Ino, size: uint64(s.Size), modified: s.Mtim, change: s.Ctim, sure: true}
}
