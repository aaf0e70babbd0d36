//go:build released

// These tests look at what make release made: build/release and build/image.

package main

import (
	"archive/tar"
	"bytes"
	"debug/elf"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"testing"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/layout"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/validate"
	spdxjson "github.com/spdx/tools-golang/json"
	"github.com/spdx/tools-golang/spdx/v2/common"
	"github.com/spdx/tools-golang/spdx/v2/v2_3"
)

const (
	releaseDir = "../../build/release"
	imageRoot  = "../../build/image/rootfs"
)

// Bounds in MB: who makes the image larger says so here.
const (
	mostArchive  = 50 // for all architectures
	mostUnpacked = 65 // for one
)

// programs are what ravel runs (internal/iptables, internal/check, realserver), and ipset for people.
func programs() []string {
	list := []string{"modprobe", "ipset"}
	for _, family := range []string{"iptables", "ip6tables"} {
		for _, variant := range []string{"", "-nft", "-legacy"} {
			for _, part := range []string{"", "-save", "-restore"} {
				list = append(list, family+variant+part)
			}
		}
	}
	return list
}

var machines = map[string]elf.Machine{"amd64": elf.EM_X86_64, "arm64": elf.EM_AARCH64}

func thisSource(t *testing.T) source {
	t.Helper()
	s, err := describe(t.Context(), "../..")
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// released returns the path of a file of the release; its name ends so.
func released(t *testing.T, end string) string {
	t.Helper()
	file, err := filepath.Abs(filepath.Join(releaseDir, "ravel-"+thisSource(t).version+end))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(file); err != nil {
		t.Fatalf("%v: run make release", err)
	}
	return file
}

// images reads the archive: the images of a version, by architecture.
func images(t *testing.T) map[string]v1.Image {
	t.Helper()
	dir := t.TempDir()
	if out, err := exec.Command("tar", "-xf", released(t, "-oci.tar"), "-C", dir).CombinedOutput(); err != nil {
		t.Fatalf("tar: %v: %s", err, out)
	}
	where, err := layout.FromPath(dir)
	if err != nil {
		t.Fatal(err)
	}
	top, err := where.ImageIndex()
	if err != nil {
		t.Fatal(err)
	}
	manifest, err := top.IndexManifest()
	if err != nil {
		t.Fatal(err)
	}
	if len(manifest.Manifests) != 1 || manifest.Manifests[0].Annotations["org.opencontainers.image.ref.name"] != thisSource(t).version {
		t.Fatalf("the archive has %v, want one entry with the version as its tag", manifest.Manifests)
	}
	index, err := top.ImageIndex(manifest.Manifests[0].Digest)
	if err != nil {
		t.Fatal(err)
	}
	if err := validate.Index(index); err != nil {
		t.Fatal(err)
	}
	if manifest, err = index.IndexManifest(); err != nil {
		t.Fatal(err)
	}
	found := map[string]v1.Image{}
	for _, m := range manifest.Manifests {
		if m.Platform == nil || m.Platform.OS != "linux" {
			t.Fatalf("an image of the archive is for %v", m.Platform)
		}
		if found[m.Platform.Architecture], err = index.Image(m.Digest); err != nil {
			t.Fatal(err)
		}
	}
	if got := slices.Sorted(maps.Keys(found)); !slices.Equal(got, architectures) {
		t.Fatalf("the archive is for %q, want %q", got, architectures)
	}
	return found
}

// root is the files of an image as a container sees them, by path without a slash at the begin.
type root struct {
	tree
	headers map[string]*tar.Header
}

func rootOf(t *testing.T, img v1.Image) root {
	t.Helper()
	r := root{tree{}, map[string]*tar.Header{}}
	stream := mutate.Extract(img)
	defer func() { _ = stream.Close() }()
	for in := tar.NewReader(stream); ; {
		h, err := in.Next()
		if errors.Is(err, io.EOF) {
			return r
		}
		if err != nil {
			t.Fatal(err)
		}
		data, err := io.ReadAll(in)
		if err != nil {
			t.Fatal(err)
		}
		name := path.Clean(h.Name)
		r.tree[name], r.headers[name] = file{h.Typeflag, h.Mode, h.Linkname, data}, h
	}
}

// resolve follows links.
func (r root) resolve(name string) (string, file, error) {
	const mostLinks = 40
	for range mostLinks {
		name = strings.TrimPrefix(path.Clean("/"+name), "/")
		// The first part of the path that is a link.
		link := ""
		for at := range name + "/" {
			if at < len(name) && name[at] != '/' || at == 0 {
				continue
			}
			if r.tree[name[:at]].kind == tar.TypeSymlink {
				link = name[:at]
				break
			}
		}
		if link == "" {
			f, there := r.tree[name]
			if !there {
				return "", file{}, fmt.Errorf("/%s: %w", name, fs.ErrNotExist)
			}
			return name, f, nil
		}
		to := r.tree[link].link
		if !path.IsAbs(to) {
			to = path.Join(path.Dir(link), to)
		}
		name = to + name[len(link):]
	}
	return "", file{}, fmt.Errorf("/%s: too many links", name)
}

// program finds one where a process of the image does.
func (r root) program(name string) (string, file, error) {
	for _, dir := range filepath.SplitList(strings.TrimPrefix(searchPath, "PATH=")) {
		if where, f, err := r.resolve(path.Join(dir, name)); err == nil && f.kind == tar.TypeReg && f.mode&0o111 != 0 {
			return where, f, nil
		}
	}
	return "", file{}, fmt.Errorf("%s: %w", name, exec.ErrNotFound)
}

// loadable tells why the loader could not load a program or a library: it or something that it needs is missing, or for
// another machine. What was looked at is in seen.
func (r root) loadable(name string, f file, arch string, seen map[string]bool) error {
	if seen[name] {
		return nil
	}
	seen[name] = true
	e, err := elf.NewFile(bytes.NewReader(f.data))
	if err != nil {
		return fmt.Errorf("/%s: %w", name, err)
	}
	if e.Machine != machines[arch] {
		return fmt.Errorf("/%s is for %v, want %v", name, e.Machine, machines[arch])
	}
	for _, p := range e.Progs {
		if p.Type != elf.PT_INTERP {
			continue
		}
		text, err := io.ReadAll(p.Open())
		if err != nil {
			return err
		}
		if _, _, err := r.resolve(strings.TrimRight(string(text), "\x00")); err != nil {
			return fmt.Errorf("/%s needs %w", name, err)
		}
	}
	libraries, err := e.ImportedLibraries()
	if err != nil {
		return fmt.Errorf("/%s: %w", name, err)
	}
	// Where Debian's loader looks without /etc/ld.so.cache.
	triplet := map[string]string{"amd64": "x86_64-linux-gnu", "arm64": "aarch64-linux-gnu"}[arch]
	for _, library := range libraries {
		var where string
		var found file
		err := fs.ErrNotExist
		for _, dir := range []string{"lib/" + triplet, "usr/lib/" + triplet, "lib", "usr/lib"} {
			if where, found, err = r.resolve(path.Join(dir, library)); err == nil {
				break
			}
		}
		if err != nil {
			return fmt.Errorf("/%s needs %s: %w", name, library, err)
		}
		if err := r.loadable(where, found, arch, seen); err != nil {
			return err
		}
	}
	return nil
}

// static tells why a file is no static program for an architecture.
func static(data []byte, arch string) error {
	e, err := elf.NewFile(bytes.NewReader(data))
	if err != nil {
		return err
	}
	if e.Machine != machines[arch] {
		return fmt.Errorf("it is for %v, want %v", e.Machine, machines[arch])
	}
	for _, p := range e.Progs {
		if p.Type == elf.PT_INTERP || p.Type == elf.PT_DYNAMIC {
			return fmt.Errorf("it is not static: it has a %v", p.Type)
		}
	}
	return nil
}

func TestReleasedPrograms(t *testing.T) {
	all := images(t)
	for _, arch := range architectures {
		data, err := os.ReadFile(released(t, "-linux-"+arch))
		if err != nil {
			t.Fatal(err)
		}
		if err := static(data, arch); err != nil {
			t.Errorf("the program for %s: %v", arch, err)
		}
		if _, f, err := rootOf(t, all[arch]).program("ravel"); err != nil || !bytes.Equal(f.data, data) {
			t.Errorf("the image for %s has not the same program (%v)", arch, err)
		}
	}
	s := thisSource(t)
	out, err := exec.Command(released(t, "-linux-"+runtime.GOARCH), "version", "-o", "json").Output()
	var told struct{ Version, Revision, Platform string }
	if err := errors.Join(err, json.Unmarshal(out, &told)); err != nil {
		t.Fatal(err)
	}
	if told.Version != s.version || told.Revision != s.revision || told.Platform != "linux/"+runtime.GOARCH {
		t.Errorf("the program says %+v, want version %s, revision %s", told, s.version, s.revision)
	}
}

func TestReleasedConfigs(t *testing.T) {
	s := thisSource(t)
	for arch, img := range images(t) {
		c, err := img.ConfigFile()
		if err != nil {
			t.Fatal(err)
		}
		if c.OS != "linux" || c.Architecture != arch || !c.Created.Equal(s.time) {
			t.Errorf("the image for %s is for %s/%s, of %v", arch, c.OS, c.Architecture, c.Created)
		}
		if !slices.Equal(c.Config.Entrypoint, []string{"/usr/bin/ravel"}) || c.Config.Cmd != nil || c.Config.User != "0:0" {
			t.Errorf("the image for %s runs %q %q as %q", arch, c.Config.Entrypoint, c.Config.Cmd, c.Config.User)
		}
		for _, name := range []string{"title", "version", "revision", "source", "licenses", "created"} {
			if c.Config.Labels["org.opencontainers.image."+name] == "" {
				t.Errorf("the image for %s has no label %s", arch, name)
			}
		}
		if got := c.Config.Labels["org.opencontainers.image.version"]; got != s.version {
			t.Errorf("the image for %s is labelled %s, want %s", arch, got, s.version)
		}
	}
}

// Skopeo takes the archive, for each architecture.
func TestReleasedArchiveIsRead(t *testing.T) {
	for _, arch := range architectures {
		var told struct {
			Architecture, Os string
			Layers           []string
		}
		out, err := exec.Command("skopeo", "inspect", "--override-os=linux", "--override-arch="+arch, "oci-archive:"+released(t, "-oci.tar")).Output()
		if err := errors.Join(err, json.Unmarshal(out, &told)); err != nil {
			t.Fatalf("skopeo inspect: %v", err)
		}
		if told.Architecture != arch || told.Os != "linux" || len(told.Layers) != 2 {
			t.Errorf("skopeo reads %+v, want two layers for linux/%s", told, arch)
		}
	}
	dir := filepath.Join(t.TempDir(), "copy")
	if out, err := exec.Command("skopeo", "copy", "--quiet", "--all", "oci-archive:"+released(t, "-oci.tar"), "oci:"+dir+":copied").CombinedOutput(); err != nil {
		t.Errorf("skopeo copy: %v: %s", err, out)
	}
}

func TestReleasedFiles(t *testing.T) {
	for arch, img := range images(t) {
		r := rootOf(t, img)
		seen := map[string]bool{}
		for _, name := range programs() {
			where, f, err := r.program(name)
			if err == nil {
				err = r.loadable(where, f, arch, seen)
			}
			if err != nil {
				t.Errorf("%s: %v", arch, err)
			}
		}
		// What iptables loads when it needs it.
		plugins := 0
		for name, f := range r.tree {
			if path.Base(path.Dir(name)) != "xtables" || f.kind != tar.TypeReg {
				continue
			}
			plugins++
			if err := r.loadable(name, f, arch, seen); err != nil {
				t.Errorf("%s: %v", arch, err)
			}
		}
		if plugins < 100 {
			t.Errorf("%s: only %d extensions of iptables", arch, plugins)
		}
		t.Logf("%s: %d programs and libraries load, of them %d extensions of iptables", arch, len(seen), plugins)

		for _, want := range []string{"usr/sbin/iptables", "sbin/iptables", "usr/sbin/ip6tables"} {
			if where, _, err := r.resolve(want); err != nil || where != "usr/sbin/xtables-nft-multi" {
				t.Errorf("%s: /%s is %s (%v), want iptables-nft", arch, want, where, err)
			}
		}
		for _, dir := range []string{"bin", "sbin", "lib"} {
			if to := r.tree[dir].link; to != "usr/"+dir {
				t.Errorf("%s: /%s is a link to %q, want usr/%s", arch, dir, to, dir)
			}
		}
		for _, dir := range append([]string{"lib/modules", "tmp"}, directories...) {
			if _, f, err := r.resolve(dir); err != nil || f.kind != tar.TypeDir {
				t.Errorf("%s: /%s is no directory (%v)", arch, dir, err)
			}
		}
		for _, name := range []string{"run/xtables.lock", "etc/passwd", "etc/group", "etc/os-release", "etc/protocols"} {
			if _, f, err := r.resolve(name); err != nil || f.kind != tar.TypeReg {
				t.Errorf("%s: /%s is no file (%v)", arch, name, err)
			}
		}
		for _, name := range []string{"sh", "bash", "dash", "busybox", "perl", "dpkg", "apt-get"} {
			if where, _, err := r.program(name); err == nil {
				t.Errorf("%s: there is a /%s", arch, where)
			}
		}
		size := int64(0)
		for name, h := range r.headers {
			size += h.Size
			if _, _, err := r.resolve(name); err != nil {
				t.Errorf("%s: %v", arch, err)
			}
			switch {
			case h.Mode&0o6000 != 0:
				t.Errorf("%s: /%s has another user's rights: %o", arch, name, h.Mode)
			case h.Typeflag == tar.TypeReg && h.Mode&0o022 != 0, h.Typeflag == tar.TypeDir && h.Mode&0o022 != 0 && h.Mode&0o1000 == 0:
				t.Errorf("%s: others may write /%s: %o", arch, name, h.Mode)
			case h.Uid != 0 || h.Gid != 0 || h.Uname != "" || h.Gname != "":
				t.Errorf("%s: /%s is not root's", arch, name)
			case !slices.Contains([]byte{tar.TypeReg, tar.TypeDir, tar.TypeSymlink}, h.Typeflag):
				t.Errorf("%s: /%s is of type %q", arch, name, h.Typeflag)
			}
			for _, not := range []string{"usr/share/man", "usr/share/locale", "usr/share/info", "var/lib/apt", "var/cache", "dev/"} {
				if strings.HasPrefix(name, not) {
					t.Errorf("%s: there is a /%s", arch, name)
				}
			}
			if strings.HasPrefix(name, "usr/share/doc/") && h.Typeflag == tar.TypeReg && path.Base(name) != "copyright" {
				t.Errorf("%s: there is a /%s", arch, name)
			}
		}
		packages, err := r.debianPackages()
		if err != nil {
			t.Fatal(err)
		}
		for _, p := range packages {
			if _, _, err := r.resolve("usr/share/doc/" + p.name + "/copyright"); err != nil {
				t.Errorf("%s: %v", arch, err)
			}
			if p.arch != arch && p.arch != "all" {
				t.Errorf("%s: %s is for %s", arch, p.name, p.arch)
			}
		}
		t.Logf("%s: %.1f MB unpacked, %d files, %d of Debian's packages", arch, float64(size)/1e6, len(r.tree), len(packages))
		if size > mostUnpacked*1e6 {
			t.Errorf("%s: more than %d MB", arch, mostUnpacked)
		}
	}
	info, err := os.Stat(released(t, "-oci.tar"))
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("the archive: %.1f MB", float64(info.Size())/1e6)
	if info.Size() > mostArchive*1e6 {
		t.Errorf("the archive has more than %d MB", mostArchive)
	}
}

// The directory has the files of the archive.
func TestReleasedDirectory(t *testing.T) {
	r := rootOf(t, images(t)[runtime.GOARCH])
	found := 0
	err := filepath.WalkDir(imageRoot, func(file string, entry fs.DirEntry, err error) error {
		if err != nil || file == imageRoot {
			return err
		}
		name, err := filepath.Rel(imageRoot, file)
		if err != nil {
			return err
		}
		f, there := r.tree[name]
		if !there {
			return fmt.Errorf("/%s is in %s and not in the archive", name, imageRoot)
		}
		found++
		switch f.kind {
		case tar.TypeSymlink:
			if to, err := os.Readlink(file); err != nil || to != f.link {
				return fmt.Errorf("/%s is a link to %q (%w), in the archive to %q", name, to, err, f.link)
			}
		case tar.TypeReg:
			if data, err := os.ReadFile(file); err != nil || !bytes.Equal(data, f.data) {
				return fmt.Errorf("/%s differs from the archive's (%w)", name, err)
			}
		}
		return nil
	})
	if err != nil {
		t.Error(err)
	}
	if found != len(r.tree) {
		t.Errorf("%s has %d files, the archive %d", imageRoot, found, len(r.tree))
	}
}

func TestReleasedProgramsRun(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("only root may change the root directory")
	}
	for command, want := range map[string]string{
		"/usr/bin/ravel version":              "ravel " + thisSource(t).version,
		"/usr/sbin/iptables --version":        "nf_tables",
		"/usr/sbin/ip6tables --version":       "nf_tables",
		"/usr/sbin/iptables-nft --version":    "nf_tables",
		"/usr/sbin/iptables-legacy --version": "legacy",
		"/usr/sbin/ipset --version":           "ipset v",
		"/usr/sbin/modprobe --version":        "kmod version",
		"/usr/sbin/iptables -m set --help":    "match-set",
	} {
		args := strings.Fields(command)
		cmd := exec.Command(args[0], args[1:]...)
		cmd.Dir, cmd.Env = "/", []string{searchPath}
		// A network of its own: nothing is asked of this machine's.
		cmd.SysProcAttr = &syscall.SysProcAttr{Chroot: imageRoot, Cloneflags: syscall.CLONE_NEWNET}
		out, err := cmd.CombinedOutput()
		if err != nil || !strings.Contains(string(out), want) {
			t.Errorf("%s: %v: %s", command, err, out)
		}
	}
}

func TestReleasedSBOM(t *testing.T) {
	f, err := os.Open(released(t, ".spdx.json"))
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = f.Close() }()
	doc, err := spdxjson.Read(f)
	if err != nil {
		t.Fatal(err)
	}
	if doc.SPDXVersion != v2_3.Version || doc.DocumentNamespace == "" || doc.CreationInfo.Created == "" {
		t.Errorf("the document is %s, of %q, %+v", doc.SPDXVersion, doc.DocumentNamespace, doc.CreationInfo)
	}
	urls := map[string]bool{}
	ids := map[common.ElementID]bool{"DOCUMENT": true}
	for _, p := range doc.Packages {
		ids[p.PackageSPDXIdentifier] = true
		for _, r := range p.PackageExternalReferences {
			urls[r.Locator] = true
		}
	}
	for _, r := range doc.Relationships {
		if !ids[r.RefA.ElementRefID] || !ids[r.RefB.ElementRefID] {
			t.Errorf("%v %s %v is about what is not there", r.RefA, r.Relationship, r.RefB)
		}
	}
	// By what go itself says of the programs.
	modules := map[string]bool{}
	for _, arch := range architectures {
		out, err := exec.Command("go", "version", "-m", released(t, "-linux-"+arch)).Output()
		if err != nil {
			t.Fatal(err)
		}
		for line := range strings.Lines(string(out)) {
			if words := strings.Fields(line); words[0] == "dep" {
				modules[words[1]+"@"+words[2]] = true
			}
		}
	}
	if len(modules) < 20 {
		t.Errorf("the programs tell of %d modules", len(modules))
	}
	for m := range modules {
		if want := "pkg:golang/" + strings.ReplaceAll(m, "+", "%2B"); !urls[want] {
			t.Errorf("the SBOM does not name %s", want)
		}
	}
	if want := "pkg:golang/stdlib@" + strings.TrimPrefix(runtime.Version(), "go"); !urls[want] {
		t.Errorf("the SBOM does not name %s", want)
	}
	count := 0
	for arch, img := range images(t) {
		packages, err := rootOf(t, img).debianPackages()
		if err != nil {
			t.Fatal(err)
		}
		for _, p := range packages {
			count++
			if !slices.ContainsFunc(doc.Packages, func(d *v2_3.Package) bool {
				return d.PackageName == p.name && d.PackageVersion == p.version && strings.HasPrefix(string(d.PackageSPDXIdentifier), "deb-"+arch+"-")
			}) {
				t.Errorf("%s: the SBOM does not name %s %s", arch, p.name, p.version)
			}
		}
	}
	t.Logf("%d Go modules, %d packages of Debian", len(modules), count)
}

func TestReleasedSums(t *testing.T) {
	cmd := exec.Command("sha256sum", "--strict", "-c", "SHA256SUMS")
	cmd.Dir = releaseDir
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Errorf("%v: %s", err, out)
	}
	files, err := os.ReadDir(releaseDir)
	if err != nil {
		t.Fatal(err)
	}
	if got := strings.Count(string(out), ": OK\n"); got != len(files)-1 || got != 3+len(architectures)-1 {
		t.Errorf("%d files of %d have a sum: %s", got, len(files)-1, out)
	}
}

// The same once more, with packages fetched anew and in another directory, is the same to the byte.
func TestReleasedTwice(t *testing.T) {
	s := thisSource(t)
	var parts []part
	for _, arch := range architectures {
		p := part{arch: arch, program: filepath.Join(t.TempDir(), "ravel")}
		packages := filepath.Join(t.TempDir(), "debian.tar")
		if out, err := exec.Command("../image/debian", arch, packages).CombinedOutput(); err != nil {
			t.Fatalf("%v: %s", err, out)
		}
		data, err := os.ReadFile(packages)
		if err != nil {
			t.Fatal(err)
		}
		if p.debian, err = debianTree(bytes.NewReader(data)); err != nil {
			t.Fatal(err)
		}
		p.debian.complete()
		if err := compile(t.Context(), "../..", arch, s, p.program); err != nil {
			t.Fatal(err)
		}
		program, err := os.ReadFile(p.program)
		if err != nil {
			t.Fatal(err)
		}
		p.ravel = ravelTree(program)
		parts = append(parts, p)
	}
	again := t.TempDir()
	if err := writeRelease(again, parts, s); err != nil {
		t.Fatal(err)
	}
	want, err := os.ReadFile(filepath.Join(releaseDir, "SHA256SUMS"))
	if err != nil {
		t.Fatal(err)
	}
	got, err := os.ReadFile(filepath.Join(again, "SHA256SUMS"))
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(got, want) {
		t.Errorf("the release is\n%s, and once more\n%s", want, got)
	}
}
