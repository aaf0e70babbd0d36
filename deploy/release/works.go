package main

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"

	"golang.org/x/sync/errgroup"
)

// works is where things are made.
type works struct {
	top    string
	source source
}

// part is what the image is of for one architecture.
type part struct {
	arch          string
	program       string // the file
	debian, ravel tree   // the layers
}

func (w works) path(parts ...string) string {
	return filepath.Join(append([]string{w.top, "build"}, parts...)...)
}

// lock has one make things, and others wait.
func (w works) lock() (unlock func(), err error) {
	if err := os.MkdirAll(w.path("image"), 0o755); err != nil {
		return nil, err
	}
	f, err := os.OpenFile(w.path("image", "lock"), os.O_CREATE|os.O_RDWR, 0o644)
	if err != nil {
		return nil, err
	}
	if err := syscall.Flock(int(f.Fd()), syscall.LOCK_EX); err != nil {
		return nil, errors.Join(fmt.Errorf("locking %s: %w", f.Name(), err), f.Close())
	}
	return func() { _ = f.Close() }, nil
}

// part makes what an architecture needs. With anew Debian's packages are fetched, whatever was fetched before.
func (w works) part(ctx context.Context, arch string, anew bool) (part, error) {
	p := part{arch: arch, program: w.path("image", "ravel-linux-"+arch)}
	packages := w.path("image", "debian-"+arch+".tar")
	if err := w.fetch(ctx, arch, packages, anew); err != nil {
		return part{}, err
	}
	f, err := os.Open(packages)
	if err != nil {
		return part{}, err
	}
	defer func() { _ = f.Close() }()
	if p.debian, err = debianTree(f); err != nil {
		return part{}, fmt.Errorf("%s: %w", packages, err)
	}
	p.debian.complete()
	if err := compile(ctx, w.top, arch, w.source, p.program); err != nil {
		return part{}, err
	}
	program, err := os.ReadFile(p.program)
	if err != nil {
		return part{}, err
	}
	p.ravel = ravelTree(program)
	return p, nil
}

// fetch has deploy/image/debian write a file, unless the same was asked of it before.
func (w works) fetch(ctx context.Context, arch, file string, anew bool) error {
	inputs := sha256.New()
	for _, name := range []string{"debian", "packages"} {
		text, err := os.ReadFile(filepath.Join(w.top, "deploy/image", name))
		if err != nil {
			return err
		}
		_, _ = inputs.Write(text)
	}
	for _, name := range []string{"DEBIAN_MIRROR", "DEBIAN_SECURITY_MIRROR"} {
		value, set := os.LookupEnv(name)
		_, _ = fmt.Fprintf(inputs, "%s %v %q\n", name, set, value)
	}
	asked := hex.EncodeToString(inputs.Sum(nil))
	before, err := os.ReadFile(file + ".asked")
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	if _, err := os.Stat(file); err == nil && string(before) == asked && !anew {
		return nil
	}
	fmt.Fprintln(os.Stderr, "fetching Debian's packages for", arch)
	cmd := exec.CommandContext(ctx, filepath.Join(w.top, "deploy/image/debian"), arch, file)
	cmd.Stdout, cmd.Stderr = os.Stderr, os.Stderr
	// A signal reaches all of it, and mmdebstrap takes away what it unpacked.
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	cmd.Cancel = func() error { return syscall.Kill(-cmd.Process.Pid, syscall.SIGTERM) }
	if err := cmd.Run(); err != nil {
		return fmt.Errorf("deploy/image/debian %s: %w", arch, err)
	}
	return os.WriteFile(file+".asked", []byte(asked), 0o644)
}

// image makes build/image, unless it is of this part already.
func (w works) image(p part) error {
	archive, root, madeOf := w.path("image", "ravel-oci.tar"), w.path("image", "rootfs"), w.path("image", "made-of")
	// Compressing takes seconds, this does not.
	contents := sha256.New()
	if err := p.merged().write(contents, w.source.time); err != nil {
		return err
	}
	wanted := fmt.Sprintf("%x of %s", contents.Sum(nil), w.source.version)
	before, err := os.ReadFile(madeOf)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	if _, err := os.Stat(root); err == nil && string(before) == wanted {
		fmt.Println(root, "is up to date")
		return nil
	}
	for _, old := range []string{madeOf, root + ".new", root + ".old"} {
		if err := os.RemoveAll(old); err != nil {
			return err
		}
	}
	index, err := newIndex([]part{p}, w.source)
	if err != nil {
		return err
	}
	if err := writeArchive(archive, index, w.source); err != nil {
		return err
	}
	if err := p.merged().unpack(root + ".new"); err != nil {
		return err
	}
	if err := os.Rename(root, root+".old"); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	if err := errors.Join(os.Rename(root+".new", root), os.RemoveAll(root+".old")); err != nil {
		return err
	}
	fmt.Printf("%s\n%s, for %s\n", archive, root, p.arch)
	return os.WriteFile(madeOf, []byte(wanted), 0o644)
}

// release makes build/release and build/image. What was released before is there until all is made.
func (w works) release(ctx context.Context) error {
	parts := make([]part, len(architectures))
	// Compilers use all processors by themselves; what is fetched meanwhile needs none.
	group, groupCtx := errgroup.WithContext(ctx)
	for i, arch := range architectures {
		group.Go(func() (err error) {
			parts[i], err = w.part(groupCtx, arch, true)
			return err
		})
	}
	if err := group.Wait(); err != nil {
		return err
	}
	for _, p := range parts {
		if p.arch == runtime.GOARCH {
			if err := w.image(p); err != nil {
				return err
			}
		}
	}
	out, temporary := w.path("release"), w.path("release.new")
	if err := os.RemoveAll(temporary); err != nil {
		return err
	}
	if err := os.Mkdir(temporary, 0o755); err != nil {
		return err
	}
	if err := writeRelease(temporary, parts, w.source); err != nil {
		return err
	}
	if err := errors.Join(os.RemoveAll(out), os.Rename(temporary, out)); err != nil {
		return err
	}
	files, err := os.ReadDir(out)
	if err != nil {
		return err
	}
	fmt.Println(out)
	for _, f := range files {
		info, err := f.Info()
		if err != nil {
			return err
		}
		fmt.Printf("%8.1f MB  %s\n", float64(info.Size())/1e6, f.Name())
	}
	return nil
}

// writeRelease fills an empty directory.
func writeRelease(dir string, parts []part, s source) error {
	name := "ravel-" + s.version
	for _, p := range parts {
		if err := os.WriteFile(filepath.Join(dir, name+"-linux-"+p.arch), p.ravel["usr/bin/ravel"].data, 0o755); err != nil {
			return err
		}
	}
	index, err := newIndex(parts, s)
	if err != nil {
		return err
	}
	if err := writeArchive(filepath.Join(dir, name+"-oci.tar"), index, s); err != nil {
		return err
	}
	sbom, err := os.Create(filepath.Join(dir, name+".spdx.json"))
	if err != nil {
		return err
	}
	if err := errors.Join(writeSBOM(sbom, parts, s), sbom.Close()); err != nil {
		return err
	}
	return writeSums(dir)
}

// writeSums writes SHA256SUMS of all files of a directory, as sha256sum -c reads it.
func writeSums(dir string) error {
	files, err := os.ReadDir(dir)
	if err != nil {
		return err
	}
	var b strings.Builder
	for _, f := range files {
		data, err := os.ReadFile(filepath.Join(dir, f.Name()))
		if err != nil {
			return err
		}
		fmt.Fprintf(&b, "%x  %s\n", sha256.Sum256(data), f.Name())
	}
	return os.WriteFile(filepath.Join(dir, "SHA256SUMS"), []byte(b.String()), 0o644)
}
