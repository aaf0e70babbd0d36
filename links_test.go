package ravel_test

import (
	"io/fs"
	"net/url"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
)

// link finds the targets of Markdown's links and images: [text](target) and [name]: target.
var link = regexp.MustCompile(`\]\(<?([^()\s>]+)|(?m:^\[[^\]]+\]:\s+<?([^\s>]+))`)

// TestLinks holds that each relative link of the documents leads to a file of the repository.
func TestLinks(t *testing.T) {
	links := 0
	err := filepath.WalkDir(".", func(path string, entry fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if entry.IsDir() && path != "." && (path == "build" || strings.HasPrefix(entry.Name(), ".")) {
			return fs.SkipDir
		}
		if entry.IsDir() || filepath.Ext(path) != ".md" {
			return nil
		}
		text, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		for _, found := range link.FindAllStringSubmatch(string(text), -1) {
			target, err := url.Parse(found[1] + found[2])
			if err != nil {
				t.Errorf("%s: %v", path, err)
				continue
			}
			if target.Scheme != "" || target.Host != "" || target.Path == "" {
				continue
			}
			links++
			if _, err := os.Stat(filepath.Join(filepath.Dir(path), filepath.FromSlash(target.Path))); err != nil {
				t.Errorf("%s links to %s: %v", path, target.Path, err)
			}
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	if links == 0 {
		t.Error("no links were found")
	}
}
