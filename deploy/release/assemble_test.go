package main

import (
	"archive/tar"
	"bytes"
	"context"
	"maps"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"
)

// packed is what deploy/image/debian might write: these files in this order, of a time and an owner of their own.
func packed(t *testing.T, when time.Time, uid int, headers ...tar.Header) []byte {
	t.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for _, h := range headers {
		data := "the contents of " + h.Name
		if strings.Contains(h.Name, statusDir) {
			data = "Package: " + path.Base(h.Name) + "\nArchitecture: amd64\nSource: src (1)\nVersion: 1:2+b\nDescription: some\n Version: none\n"
		}
		h.ModTime, h.Uid = when, uid
		if h.Typeflag == tar.TypeReg {
			h.Size = int64(len(data))
		}
		if err := w.WriteHeader(&h); err != nil {
			t.Fatal(err)
		}
		if h.Typeflag == tar.TypeReg {
			if _, err := w.Write([]byte(data)); err != nil {
				t.Fatal(err)
			}
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

var some = []tar.Header{
	{Typeflag: tar.TypeDir, Name: "./usr/sbin/", Mode: 0o700},
	{Typeflag: tar.TypeReg, Name: "./usr/sbin/program", Mode: 0o4755},
	{Typeflag: tar.TypeLink, Name: "./usr/sbin/other", Linkname: "./usr/sbin/program", Mode: 0o4755},
	{Typeflag: tar.TypeSymlink, Name: "./sbin", Linkname: "usr/sbin", Mode: 0o777},
	{Typeflag: tar.TypeReg, Name: "./usr/share/man/man8/program.8", Mode: 0o644},
	{Typeflag: tar.TypeReg, Name: "./usr/share/doc/a/copyright", Mode: 0o666},
	{Typeflag: tar.TypeSymlink, Name: "./usr/share/doc/b", Linkname: "a", Mode: 0o777},
	{Typeflag: tar.TypeReg, Name: "./usr/share/doc/a/changelog.gz", Mode: 0o644},
	{Typeflag: tar.TypeReg, Name: "./usr/lib/x/gconv/CP1.so", Mode: 0o644},
	{Typeflag: tar.TypeReg, Name: "./var/lib/dpkg/status", Mode: 0o644},
	{Typeflag: tar.TypeReg, Name: "./var/lib/dpkg/status.d/a", Mode: 0o644},
	{Typeflag: tar.TypeReg, Name: "./var/lib/dpkg/status.d/b", Mode: 0o644},
	{Typeflag: tar.TypeChar, Name: "./dev/null", Mode: 0o666},
}

func someTree(t *testing.T) tree {
	t.Helper()
	files, err := debianTree(bytes.NewReader(packed(t, time.Now(), 0, some...)))
	if err != nil {
		t.Fatal(err)
	}
	return files
}

func TestWhatIsTakenOfDebian(t *testing.T) {
	files := someTree(t)
	want := []string{"sbin", "usr/sbin/other", "usr/sbin/program", "usr/share/doc/a/copyright", "usr/share/doc/b",
		"var/lib/dpkg/status.d/a", "var/lib/dpkg/status.d/b"}
	if got := slices.Sorted(maps.Keys(files)); !slices.Equal(got, want) {
		t.Errorf("taken are %q, want %q", got, want)
	}
	if mode := files["usr/sbin/program"].mode; mode != 0o755 {
		t.Errorf("a program with another user's rights has mode %o", mode)
	}
	if mode := files["usr/share/doc/a/copyright"].mode; mode != 0o644 {
		t.Errorf("a file that all may write has mode %o", mode)
	}
	packages, err := files.debianPackages()
	if err != nil {
		t.Fatal(err)
	}
	if want := []debianPackage{{"a", "1:2+b", "amd64", "src"}, {"b", "1:2+b", "amd64", "src"}}; !slices.Equal(packages, want) {
		t.Errorf("packages are %v, want %v", packages, want)
	}
}

func TestNothingOfDebian(t *testing.T) {
	if _, err := debianTree(bytes.NewReader(packed(t, time.Now(), 0))); err == nil {
		t.Error("an empty tar is no error")
	}
	if _, err := (tree{"usr/bin/x": regular(0o755, nil)}).debianPackages(); err == nil {
		t.Error("a tree that tells of no package is no error")
	}
}

// The same files in another order, of another time and another owner are the same release, to the byte.
func TestSameInputsSameRelease(t *testing.T) {
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	s := source{version: "v1", revision: "abc", time: time.Unix(1e9, 0)}
	backwards := slices.Clone(some)
	slices.Reverse(backwards)
	// A link comes after what it links to.
	backwards = append(slices.DeleteFunc(backwards, func(h tar.Header) bool { return h.Typeflag == tar.TypeLink }), some[2])
	var sums []string
	for _, packedFiles := range [][]byte{
		packed(t, time.Unix(1e9, 0), 0, some...),
		packed(t, time.Unix(2e9, 5), 1000, backwards...),
	} {
		var parts []part
		for _, arch := range architectures {
			files, err := debianTree(bytes.NewReader(packedFiles))
			if err != nil {
				t.Fatal(err)
			}
			files.complete()
			parts = append(parts, part{arch: arch, program: self, debian: files, ravel: ravelTree([]byte("ravel for " + arch))})
		}
		dir := t.TempDir()
		if err := writeRelease(dir, parts, s); err != nil {
			t.Fatal(err)
		}
		text, err := os.ReadFile(filepath.Join(dir, "SHA256SUMS"))
		if err != nil {
			t.Fatal(err)
		}
		sums = append(sums, string(text))
	}
	if sums[0] != sums[1] {
		t.Errorf("the first time it is\n%s, the second\n%s", sums[0], sums[1])
	}
	if got := strings.Count(sums[0], "\n"); got != 4 {
		t.Errorf("%d files in SHA256SUMS, want 4:\n%s", got, sums[0])
	}
}

func TestNothingIsInALink(t *testing.T) {
	files := tree{"lib": symlink("usr/lib"), "lib/x": regular(0o644, nil)}
	if err := files.write(&bytes.Buffer{}, time.Now()); err == nil || !strings.Contains(err.Error(), "/lib is no directory") {
		t.Errorf("a file in a link: %v", err)
	}
}

// What is unpacked is what the tar says, whatever the umask.
func TestUnpack(t *testing.T) {
	files := someTree(t)
	files.complete()
	dir := filepath.Join(t.TempDir(), "root")
	if err := files.unpack(dir); err != nil {
		t.Fatal(err)
	}
	for name, mode := range map[string]os.FileMode{
		"tmp": os.ModeDir | os.ModeSticky | 0o777, "run/xtables.lock": 0o600, "usr/sbin/program": 0o755, "usr": os.ModeDir | 0o755,
		"usr/sbin/iptables": os.ModeSymlink | 0o777, "run/ravel": os.ModeDir | 0o755,
	} {
		info, err := os.Lstat(filepath.Join(dir, name))
		if err != nil {
			t.Error(err)
		} else if info.Mode() != mode {
			t.Errorf("/%s is %v, want %v", name, info.Mode(), mode)
		}
	}
}

// Debian's packages are fetched again when something else is asked for, and not before.
func TestFetch(t *testing.T) {
	top := t.TempDir()
	if err := os.MkdirAll(filepath.Join(top, "deploy/image"), 0o755); err != nil {
		t.Fatal(err)
	}
	script := "#!/bin/sh\necho \"$1\" >>\"${0%/*}/runs\"; echo packages >\"$2\"\n"
	for name, text := range map[string]string{"debian": script, "packages": "ipset\n"} {
		if err := os.WriteFile(filepath.Join(top, "deploy/image", name), []byte(text), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	w := works{top: top}
	runs := func(anew bool, want int) {
		t.Helper()
		if err := w.fetch(context.Background(), "arm64", filepath.Join(top, "arm64.tar"), anew); err != nil {
			t.Fatal(err)
		}
		text, err := os.ReadFile(filepath.Join(top, "deploy/image/runs"))
		if err != nil {
			t.Fatal(err)
		}
		if got := strings.Count(string(text), "arm64\n"); got != want {
			t.Errorf("fetched %d times, want %d", got, want)
		}
	}
	runs(false, 1)
	runs(false, 1)
	runs(true, 2)
	t.Setenv("DEBIAN_SECURITY_MIRROR", "")
	runs(false, 3)
	if err := os.WriteFile(filepath.Join(top, "deploy/image/packages"), []byte("ipset\nkmod\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	runs(false, 4)
}

func TestVersions(t *testing.T) {
	for version, good := range map[string]bool{"v1.2.3": true, "v1.2.3-4-gabcdef-dirty": true, "v1+b": false, "": false, "-x": false, "a/b": false} {
		if got := tag.MatchString(version); got != good {
			t.Errorf("%q is taken: %v", version, got)
		}
	}
	// Without git there is a version all the same.
	t.Setenv("SOURCE_DATE_EPOCH", "1000000000")
	s, err := describe(t.Context(), t.TempDir())
	if want := (source{version: "dev", time: time.Unix(1e9, 0).UTC()}); err != nil || s != want {
		t.Errorf("a tree without git is %v, %v; want %v", s, err, want)
	}
	t.Setenv("SOURCE_DATE_EPOCH", "yesterday")
	if _, err := describe(t.Context(), t.TempDir()); err == nil {
		t.Error("SOURCE_DATE_EPOCH=yesterday is no error")
	}
}

// The Dockerfile makes the same image on another base.
func TestDockerfile(t *testing.T) {
	text, err := os.ReadFile("../image/Dockerfile")
	if err != nil {
		t.Fatal(err)
	}
	list, err := os.ReadFile("../image/packages")
	if err != nil {
		t.Fatal(err)
	}
	joined := regexp.MustCompile(`\\\n\s*`).ReplaceAllString(string(text), "")
	find := func(expression string) string {
		t.Helper()
		found := regexp.MustCompile(expression).FindStringSubmatch(joined)
		if found == nil {
			t.Fatalf("the Dockerfile has no %s", expression)
		}
		return found[1]
	}
	installed := strings.Fields(find(`--no-install-recommends ([^&]*)&&`))
	if want := strings.Fields(string(list)); !slices.Equal(installed, want) {
		t.Errorf("the Dockerfile installs %q, deploy/image/packages has %q", installed, want)
	}
	if got, want := find(`(?m)^ENTRYPOINT \["(.*)"\]$`), strings.Join(entrypoint, `", "`); got != want {
		t.Errorf("the Dockerfile's entry point is %q, the image's %q", got, want)
	}
	made := strings.Fields(find(`mkdir -p ([^&]*)&&`))
	for _, dir := range directories {
		// The others every base has.
		if strings.Contains(dir, "/") && !slices.Contains(made, "/"+dir) {
			t.Errorf("the Dockerfile does not make /%s", dir)
		}
	}
	for name, value := range labels(source{}) {
		if path.Ext(name) == ".created" {
			continue // not known to a Dockerfile
		}
		if got := find(regexp.QuoteMeta(name) + `="([^"]*)"`); value != "" && got != value {
			t.Errorf("the Dockerfile's label %s is %q, the image's %q", name, got, value)
		}
	}
	needed, err := os.ReadFile("../../go.mod")
	if err != nil {
		t.Fatal(err)
	}
	version := regexp.MustCompile(`(?m)^go (\d+\.\d+)`).FindStringSubmatch(string(needed))[1]
	if got := find(`FROM golang:([0-9.]+)-`); got != version {
		t.Errorf("the Dockerfile builds with Go %s, go.mod needs %s", got, version)
	}
}

// The scripts are such that bash reads them.
func TestScript(t *testing.T) {
	if out, err := exec.Command("bash", "-n", "../image/debian").CombinedOutput(); err != nil {
		t.Errorf("%v: %s", err, out)
	}
}
