package main

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"errors"
	"io"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/layout"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
	"github.com/google/go-containerregistry/pkg/v1/types"
)

// entrypoint is what runs.
var entrypoint = []string{"/usr/bin/ravel"}

// searchPath is where programs are.
const searchPath = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

// labels say what an image is.
func labels(s source) map[string]string {
	return map[string]string{
		"org.opencontainers.image.title":       "ravel",
		"org.opencontainers.image.description": "Layer-4 load balancer for bare-metal Kubernetes: director and realserver",
		"org.opencontainers.image.version":     s.version,
		"org.opencontainers.image.revision":    s.revision,
		"org.opencontainers.image.source":      "https://github.com/ravel-lb/ravel",
		"org.opencontainers.image.licenses":    "Apache-2.0",
		"org.opencontainers.image.created":     s.time.Format(time.RFC3339),
	}
}

// layer is one of an image.
func layer(t tree, when time.Time) (v1.Layer, error) {
	var b bytes.Buffer
	if err := t.write(&b, when); err != nil {
		return nil, err
	}
	return tarball.LayerFromOpener(func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(b.Bytes())), nil },
		tarball.WithMediaType(types.OCILayer), tarball.WithCompressionLevel(gzip.BestCompression), tarball.WithCompressedCaching)
}

// newImage has two layers: Debian's files, which stay the same from one version to the next while the packages do, and
// ravel.
func newImage(p part, s source) (v1.Image, error) {
	debian, err := layer(p.debian, time.Unix(0, 0))
	if err != nil {
		return nil, err
	}
	ravel, err := layer(p.ravel, s.time)
	if err != nil {
		return nil, err
	}
	created := v1.Time{Time: s.time}
	img := mutate.ConfigMediaType(mutate.MediaType(empty.Image, types.OCIManifestSchema1), types.OCIConfigJSON)
	img, err = mutate.Append(img,
		mutate.Addendum{Layer: debian, MediaType: types.OCILayer, History: v1.History{Created: created, CreatedBy: "deploy/image/debian " + p.arch}},
		mutate.Addendum{Layer: ravel, MediaType: types.OCILayer, History: v1.History{Created: created, CreatedBy: "go build ./cmd/ravel"}})
	if err != nil {
		return nil, err
	}
	config, err := img.ConfigFile()
	if err != nil {
		return nil, err
	}
	config = config.DeepCopy()
	config.OS, config.Architecture, config.Created = "linux", p.arch, created
	config.Config = v1.Config{User: "0:0", Env: []string{searchPath}, Entrypoint: entrypoint, WorkingDir: "/", Labels: labels(s)}
	return mutate.ConfigFile(img, config)
}

// newIndex is one image for several architectures.
func newIndex(parts []part, s source) (v1.ImageIndex, error) {
	index := mutate.IndexMediaType(empty.Index, types.OCIImageIndex)
	for _, p := range parts {
		img, err := newImage(p, s)
		if err != nil {
			return nil, err
		}
		index = mutate.AppendManifests(index, mutate.IndexAddendum{Add: img,
			Descriptor: v1.Descriptor{Platform: &v1.Platform{OS: "linux", Architecture: p.arch}}})
	}
	return mutate.Annotations(index, labels(s)).(v1.ImageIndex), nil
}

// writeArchive writes an OCI archive: a tar of an image layout, whose one entry has the version as its tag.
func writeArchive(file string, index v1.ImageIndex, s source) (err error) {
	dir, err := os.MkdirTemp(filepath.Dir(file), "layout-")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	where, err := layout.Write(dir, empty.Index)
	if err != nil {
		return err
	}
	err = where.AppendIndex(index, layout.WithAnnotations(map[string]string{"org.opencontainers.image.ref.name": s.version}))
	if err != nil {
		return err
	}
	files := tree{}
	err = filepath.WalkDir(dir, func(path string, entry fs.DirEntry, err error) error {
		if err != nil || entry.IsDir() {
			return err
		}
		name, err := filepath.Rel(dir, path)
		if err != nil {
			return err
		}
		data, err := os.ReadFile(path)
		files[filepath.ToSlash(name)] = regular(0o644, data)
		return err
	})
	if err != nil {
		return err
	}
	out, err := os.Create(file)
	if err != nil {
		return err
	}
	return errors.Join(files.write(out, s.time), out.Close())
}

// merged is what a container sees.
func (p part) merged() tree {
	t := maps.Clone(p.debian)
	maps.Copy(t, p.ravel)
	return t
}

// ravelTree is the layer with the program.
func ravelTree(program []byte) tree {
	return tree{"usr/bin/ravel": file{kind: tar.TypeReg, mode: 0o755, data: program}}
}
