package main

import (
	"archive/tar"
	"cmp"
	"errors"
	"fmt"
	"io"
	"path"
	"slices"
	"strings"
)

// keep are the files that the image takes of Debian's packages, with all that is below them, and drop what of it it does
// not: the longest name decides.
var (
	keep = []string{
		"bin", "sbin", "lib", "lib64", "usr/bin", "usr/sbin", "usr/lib", "usr/lib64",
		"etc/debian_version", "etc/os-release", "etc/ld.so.conf.d", "etc/modprobe.d", "etc/protocols", "etc/services", "etc/ethertypes",
		"usr/share/common-licenses", "usr/share/doc/*/copyright", statusDir,
	}
	drop = []string{
		"usr/lib/*/gconv", "usr/lib/*/engines-3", // character sets, and OpenSSL's engines
		"usr/sbin/iptables-apply", "usr/sbin/ip6tables-apply", // scripts, and there is no shell
		"usr/share/doc",
	}
)

// statusDir has what each of Debian's packages says of itself: where scanners look for it in images without dpkg.
const statusDir = "var/lib/dpkg/status.d"

// kept reports whether the image takes a file.
func kept(name string) bool { return longest(keep, name) > longest(drop, name) }

// longest returns how many parts the longest of the names has that are name or above it, -1 if none is.
func longest(names []string, name string) int {
	parts := strings.Split(name, "/")
	most := -1
	for _, n := range names {
		count := strings.Count(n, "/") + 1
		if count > len(parts) {
			continue
		}
		if ok, _ := path.Match(n, strings.Join(parts[:count], "/")); ok {
			most = max(most, count)
		}
	}
	return most
}

// debianTree reads what deploy/image/debian wrote. When a file was made and whose it is, is forgotten.
func debianTree(r io.Reader) (tree, error) {
	t := tree{}
	for in := tar.NewReader(r); ; {
		h, err := in.Next()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return nil, err
		}
		name := strings.TrimPrefix(path.Clean(h.Name), "/")
		// A package's copyright may be its neighbour's.
		if !kept(name) && (h.Typeflag != tar.TypeSymlink || path.Dir(name) != "usr/share/doc") {
			continue
		}
		switch h.Typeflag {
		case tar.TypeDir:
			// Those that are needed come by themselves.
		case tar.TypeSymlink:
			t[name] = symlink(h.Linkname)
		case tar.TypeLink:
			f, there := t[path.Clean(h.Linkname)]
			if !there {
				return nil, fmt.Errorf("/%s is a link to %s, which the image does not take", name, h.Linkname)
			}
			t[name] = f
		case tar.TypeReg:
			data, err := io.ReadAll(in)
			if err != nil {
				return nil, err
			}
			// No program of the image needs another user's rights.
			t[name] = regular(h.Mode&0o755, data)
		default:
			return nil, fmt.Errorf("/%s is of type %q, which no file of the image can be", name, h.Typeflag)
		}
	}
	if len(t) == 0 {
		return nil, errors.New("nothing that the image takes is in it")
	}
	return t, nil
}

// complete adds what scripts of Debian's packages would make, and the places where Ravel and Kubernetes mount something
// in a root file system that is only to be read.
func (t tree) complete() {
	// /etc/alternatives has no other choices here.
	for _, family := range []string{"iptables", "ip6tables"} {
		for _, part := range []string{"", "-save", "-restore"} {
			t["usr/sbin/"+family+part] = symlink(family + "-nft" + part)
		}
	}
	t["etc/passwd"] = regular(0o644, []byte("root:x:0:0:root:/root:/sbin/nologin\nnobody:x:65534:65534:nobody:/nonexistent:/sbin/nologin\n"))
	t["etc/group"] = regular(0o644, []byte("root:x:0:\nnogroup:x:65534:\n"))
	for _, dir := range directories {
		t[dir] = directory(0o755)
	}
	t["root"] = directory(0o700)
	t["tmp"], t["var/tmp"] = directory(0o1777), directory(0o1777)
	t["run/xtables.lock"] = regular(0o600, nil)
	for _, name := range []string{"hosts", "hostname", "resolv.conf"} {
		t["etc/"+name] = regular(0o644, nil)
	}
	t["var/run"] = symlink("/run")
}

// directories are empty ones.
var directories = []string{"dev", "etc/ravel", "proc", "run/ravel", "sys", "usr/lib/modules", "var/lib/ravel"}

// debianPackage is what a package says of itself.
type debianPackage struct{ name, version, arch, source string }

// debianPackages lists the packages of an image, by name.
func (t tree) debianPackages() ([]debianPackage, error) {
	var list []debianPackage
	for name, f := range t {
		if path.Dir(name) != statusDir {
			continue
		}
		fields := map[string]string{}
		for line := range strings.Lines(string(f.data)) {
			if key, value, found := strings.Cut(line, ":"); found && line[0] != ' ' {
				fields[key] = strings.TrimSpace(value)
			}
		}
		p := debianPackage{name: fields["Package"], version: fields["Version"], arch: fields["Architecture"], source: fields["Package"]}
		if s, _, _ := strings.Cut(fields["Source"], " "); s != "" {
			p.source = s
		}
		if p.name == "" || p.version == "" || p.arch == "" {
			return nil, fmt.Errorf("/%s: Package, Version or Architecture is missing", name)
		}
		list = append(list, p)
	}
	if len(list) == 0 {
		return nil, fmt.Errorf("/%s tells of no package", statusDir)
	}
	slices.SortFunc(list, func(a, b debianPackage) int { return cmp.Compare(a.name, b.name) })
	return list, nil
}
