package main

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"time"
)

// source is what is built.
type source struct {
	version, revision string
	time              time.Time // of the commit, or SOURCE_DATE_EPOCH; all that is made carries it
}

// tag is what a tag in a registry may be, and so a version.
var tag = regexp.MustCompile(`^[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}$`)

// describe asks git. A tree without git is version dev of 1970, unless SOURCE_DATE_EPOCH says when it was made.
func describe(ctx context.Context, top string) (source, error) {
	// git looks also at a checkout that another user owns.
	git := func(args ...string) string {
		out, err := exec.CommandContext(ctx, "git", append([]string{"-c", "safe.directory=*", "-C", top}, args...)...).Output()
		if err != nil {
			return ""
		}
		return strings.TrimSpace(string(out))
	}
	s := source{version: git("describe", "--tags", "--always", "--dirty"), revision: git("rev-parse", "HEAD")}
	if s.version == "" {
		s.version = "dev"
	}
	if !tag.MatchString(s.version) {
		return source{}, fmt.Errorf("the version is %q by git describe --tags: a registry takes letters, digits, _, . and -; name the tag so", s.version)
	}
	epoch := os.Getenv("SOURCE_DATE_EPOCH")
	if epoch == "" {
		epoch = git("log", "-1", "--format=%ct")
	}
	if epoch == "" {
		epoch = "0"
	}
	seconds, err := strconv.ParseInt(epoch, 10, 64)
	if err != nil {
		return source{}, fmt.Errorf("SOURCE_DATE_EPOCH is %q: it must be a number of seconds since 1970", epoch)
	}
	s.time = time.Unix(seconds, 0).UTC()
	return s, nil
}

// compile builds a static ravel.
func compile(ctx context.Context, top, arch string, s source, out string) error {
	cmd := exec.CommandContext(ctx, "go", "build", "-trimpath", "-mod=readonly", "-buildvcs=false",
		"-ldflags", "-s -w -X main.version="+s.version+" -X main.revision="+s.revision, "-o", out, "./cmd/ravel")
	cmd.Dir = top
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0", "GOOS=linux", "GOARCH="+arch, "GOAMD64=v1", "GOARM64=v8.0", "GOWORK=off")
	cmd.Stdout, cmd.Stderr = os.Stderr, os.Stderr
	if err := cmd.Run(); err != nil {
		return fmt.Errorf("building %s for %s: %w", filepath.Base(out), arch, err)
	}
	return nil
}
