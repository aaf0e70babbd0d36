package check

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
)

// maxFile bounds what is read of one file.
const maxFile = 16 << 20

// facts are what several checks need to know, each read when it is first asked for.
type facts struct {
	Host
	ctx context.Context

	release func() string // of the kernel, "" if it cannot be read
	config  func() (kernelConfig, string)
	modules func() modules
	links   func() ([]link, error)
	addrs   func() ([]addr, error)
	chains  func() ([]chain, error)
	comms   func() map[string]int // a process's id by its name

	loadable []string // modules that a check looked for and found loadable, not loaded
}

func newFacts(ctx context.Context, h Host) *facts {
	f := &facts{Host: h, ctx: ctx}
	f.release = sync.OnceValue(func() string {
		release, err := f.read("proc/sys/kernel/osrelease")
		if err != nil || strings.ContainsAny(release, "/\x00") || release == ".." || release == "." {
			return ""
		}
		return release
	})
	f.config = sync.OnceValues(f.readConfig)
	f.modules = sync.OnceValue(f.readModules)
	f.links = sync.OnceValues(h.kernel.links)
	f.addrs = sync.OnceValues(h.kernel.addrs)
	f.chains = sync.OnceValues(f.readChains)
	f.comms = sync.OnceValue(f.readComms)
	return f
}

func (f *facts) path(name string) string { return filepath.Join(f.Root, filepath.FromSlash(name)) }

// given is path for a name that the user gave: a relative one is so to where he is.
func (f *facts) given(name string) string {
	if f.Root == "/" && !filepath.IsAbs(name) {
		return name
	}
	return f.path(name)
}

// read returns the text of a file below the root, without the white space around it.
func (f *facts) read(name string) (string, error) {
	file, err := os.Open(f.path(name))
	if err != nil {
		return "", err
	}
	defer file.Close()
	b, err := io.ReadAll(io.LimitReader(file, maxFile))
	if err != nil {
		return "", err
	}
	return strings.TrimSpace(string(b)), nil
}

// exists reports whether a file is there; a file that cannot be looked at is not.
func (f *facts) exists(name string) bool {
	_, err := os.Stat(f.path(name))
	return err == nil
}

// number reads a file that holds one number.
func (f *facts) number(name string) (int, error) {
	text, err := f.read(name)
	if err != nil {
		return 0, err
	}
	n, err := strconv.Atoi(text)
	if err != nil {
		return 0, fmt.Errorf("%s holds %q, which is no number", name, short(text))
	}
	return n, nil
}

// self is the directory of this thread, or of this process in a tree that has no threads.
func (f *facts) self() string {
	if f.exists("proc/thread-self") {
		return "proc/thread-self"
	}
	return "proc/self"
}

// net is the directory of this thread's network namespace.
func (f *facts) net() string {
	if dir := f.self() + "/net"; f.exists(dir) {
		return dir
	}
	return "proc/net"
}

// readComms returns the processes that can be seen here, by their names.
func (f *facts) readComms() map[string]int {
	comms := map[string]int{}
	entries, err := os.ReadDir(f.path("proc"))
	if err != nil {
		return comms
	}
	for _, e := range entries {
		pid, err := strconv.Atoi(e.Name())
		if err != nil {
			continue
		}
		if comm, err := f.read("proc/" + e.Name() + "/comm"); err == nil {
			comms[comm] = pid
		}
	}
	return comms
}

func missing(err error) bool { return errors.Is(err, fs.ErrNotExist) }

// short cuts a foreign text.
func short(s string) string {
	const most = 40
	if len(s) > most {
		return s[:most] + "…"
	}
	return s
}
