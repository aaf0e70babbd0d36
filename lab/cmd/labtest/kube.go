package main

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
)

// kubeFlag has Go build the tests that need a Kubernetes control plane, or Helm and kustomize: lab/kube and lab/tools take
// minutes to build the first time.
const kubeFlag = "-tags=kube"

// onlyKube builds the control plane and the tools, and keeps of all tests those that the tag adds.
func (t *tests) onlyKube(ctx context.Context) error {
	for _, script := range []string{"lab/kube/build", "lab/tools/build"} {
		build := exec.CommandContext(ctx, script)
		build.Stderr = os.Stderr
		if err := build.Run(); err != nil {
			return fmt.Errorf("%s: %w", script, err)
		}
	}
	without, err := testFiles(ctx)
	if err != nil {
		return err
	}
	with, err := testFiles(ctx, kubeFlag)
	if err != nil {
		return err
	}
	var all []string
	t.kube, t.names = true, map[string][]string{}
	for pkg, files := range with {
		here := isE2E(pkg) && len(t.lacks) == 0 // on this machine's kernel
		for _, file := range files {
			if slices.Contains(without[pkg], file) && !(here && t.all) {
				continue
			}
			names, err := testsOf(filepath.Join(t.dirs[pkg], file))
			if err != nil {
				return err
			}
			t.names[pkg] = append(t.names[pkg], names...)
		}
		if !isE2E(pkg) || here {
			all = append(all, t.names[pkg]...)
		}
	}
	t.only(func(pkg string) bool { return len(t.names[pkg]) > 0 })
	t.hostArgs = []string{"-run=" + oneOf(all)}
	return nil
}

// testFiles lists the files with tests of each package.
func testFiles(ctx context.Context, flags ...string) (map[string][]string, error) {
	const format = `{{.ImportPath}} {{join .TestGoFiles " "}} {{join .XTestGoFiles " "}}`
	out, err := exec.CommandContext(ctx, "go", slices.Concat([]string{"list", "-f", format}, flags, []string{"./..."})...).Output()
	if err != nil {
		return nil, fmt.Errorf("go list: %w", withStderr(err))
	}
	files := map[string][]string{}
	for line := range strings.Lines(string(out)) {
		words := strings.Fields(line)
		files[words[0]] = words[1:]
	}
	return files, nil
}

var testFunction = regexp.MustCompile(`(?m)^func (Test\w+)\(\w+ \*testing\.T\)`)

// testsOf lists the tests of a file.
func testsOf(path string) (names []string, err error) {
	text, err := os.ReadFile(path)
	for _, m := range testFunction.FindAllStringSubmatch(string(text), -1) {
		names = append(names, m[1])
	}
	return names, err
}

// oneOf is the expression that chooses tests by their names.
func oneOf(names []string) string { return "^(" + strings.Join(names, "|") + ")$" }

// kubeSource looks at the source of packages with the files that the tag adds.
func kubeSource(ctx context.Context, packages []string) error {
	return look(ctx, append([]string{"go", "vet", kubeFlag}, packages...),
		slices.Concat([]string{"go", "tool", "staticcheck", kubeFlag}, packages))
}
