package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"

	"github.com/ravel-lb/ravel/lab/labkernel"
	"golang.org/x/sync/errgroup"
)

// tests are the packages that have tests, and what came of running them.
type tests struct {
	withTests []string          // import paths, sorted
	dirs      map[string]string // by import path
	runs      []*run

	screen sync.Mutex // one line at a time
}

// list finds the packages.
func (t *tests) list(ctx context.Context) error {
	const format = `{{if or .TestGoFiles .XTestGoFiles}}{{.ImportPath}} {{.Dir}}{{end}}`
	out, err := exec.CommandContext(ctx, "go", "list", "-f", format, "./...").Output()
	if err != nil {
		return fmt.Errorf("go list: %w", withStderr(err))
	}
	t.dirs = map[string]string{}
	for _, line := range strings.Split(strings.TrimSpace(string(out)), "\n") {
		pkg, dir, _ := strings.Cut(line, " ")
		t.withTests = append(t.withTests, pkg)
		t.dirs[pkg] = dir
	}
	return nil
}

func withStderr(err error) error {
	var exit *exec.ExitError
	if errors.As(err, &exit) {
		return fmt.Errorf("%w: %s", err, exit.Stderr)
	}
	return err
}

// only drops the packages that keep says no to.
func (t *tests) only(keep func(pkg string) bool) {
	t.withTests = slices.DeleteFunc(t.withTests, func(pkg string) bool { return !keep(pkg) })
}

// isE2E reports whether a package tests the whole fleet.
func isE2E(pkg string) bool { return strings.Contains(pkg+"/", "/lab/e2e/") }

// host runs the tests on this machine's kernel, with the race detector.
func (t *tests) host(ctx context.Context) error {
	if len(t.withTests) == 0 {
		return errors.New("there are no tests")
	}
	log, err := os.Create("build/test/host.log")
	if err != nil {
		return err
	}
	defer func() { _ = log.Close() }()
	cmd := exec.CommandContext(ctx, "go", append([]string{"test", "-json", "-race", "-count=1", "-timeout=20m"}, t.withTests...)...)
	cmd.Env = append(os.Environ(), "CGO_ENABLED=1")
	cmd.Stderr = log
	out, err := cmd.StdoutPipe()
	if err != nil {
		return err
	}
	if err := cmd.Start(); err != nil {
		return err
	}
	r := newRun("this kernel")
	t.runs = append(t.runs, r)
	err = r.read(out, log, func(pkg string, res *result) { t.say(pkg, res.action, res.elapsed, "") })
	if failed := cmd.Wait(); failed != nil && err == nil && !slices.ContainsFunc(t.withTests, func(pkg string) bool {
		res := r.results[testName{pkg, ""}]
		return res != nil && res.action == "fail"
	}) {
		err = fmt.Errorf("go test: %w (build/test/host.log)", failed)
	}
	return err
}

func (t *tests) say(pkg, action string, seconds float64, where string) {
	t.screen.Lock()
	defer t.screen.Unlock()
	word := map[string]string{"pass": "ok", "fail": "FAIL", "skip": "-"}[action]
	name := strings.TrimPrefix(strings.TrimPrefix(pkg, "github.com/ravel-lb/ravel"), "/")
	if name == "" {
		name = "."
	}
	fmt.Printf("%-5s %-50s %6.1f s%s\n", word, name, seconds, where)
}

// lab runs in the lab kernel what the machine's kernel could not carry. The tests of the whole fleet have a kernel of
// their own, beside that of all others.
func (t *tests) lab(ctx context.Context) error {
	var unit, e2e []job
	if len(t.runs) == 0 {
		return nil
	}
	for pkg, names := range t.runs[0].elsewhere() {
		j := job{pkg: pkg, dir: t.dirs[pkg], args: []string{
			"-test.v=test2json", "-test.timeout=20m", "-test.run=^(" + strings.Join(names, "|") + ")$"}}
		if isE2E(pkg) {
			e2e = append(e2e, j)
		} else {
			unit = append(unit, j)
		}
	}
	var group errgroup.Group
	for name, jobs := range map[string][]job{"lab": unit, "lab-e2e": e2e} {
		if len(jobs) == 0 {
			continue
		}
		slices.SortFunc(jobs, func(a, b job) int { return strings.Compare(a.pkg, b.pkg) })
		r := newRun("the lab kernel")
		t.runs = append(t.runs, r)
		group.Go(func() error { return t.boot(ctx, name, jobs, r) })
	}
	return group.Wait()
}

// job is a test binary to run in the lab kernel.
type job struct {
	pkg, dir string
	args     []string
}

// binary returns where the test binary of a package is built.
func (j job) binary() string {
	return filepath.Join("build/test", strings.ReplaceAll(strings.TrimPrefix(j.pkg, "github.com/ravel-lb/"), "/", "-")+".test")
}

// build makes the test binary.
func (j job) build(ctx context.Context) error {
	cmd := exec.CommandContext(ctx, "go", "test", "-c", "-o", j.binary(), j.pkg)
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("building the tests of %s: %w\n%s", j.pkg, err, out)
	}
	return nil
}

// boot runs jobs one after the other in one lab kernel, and reads what they say.
func (t *tests) boot(ctx context.Context, name string, jobs []job, r *run) error {
	script, err := t.script(ctx, name, jobs)
	if err != nil {
		return err
	}
	log, err := os.Create(filepath.Join("build/test", name+".log"))
	if err != nil {
		return err
	}
	defer func() { _ = log.Close() }()
	kernel := labkernel.Command(ctx, []string{"bash", script})
	kernel.Stderr = log
	out, err := kernel.StdoutPipe()
	if err != nil {
		return err
	}
	if err := kernel.Start(); err != nil {
		return err
	}
	var errs []error
	lines := bufio.NewScanner(out)
	for lines.Scan() {
		var i, seconds int
		if _, err := fmt.Sscanf(lines.Text(), "labtest: job %d ended after %d", &i, &seconds); err != nil {
			fmt.Fprintln(log, lines.Text())
			continue
		}
		if i < 0 || i >= len(jobs) {
			continue
		}
		errs = append(errs, t.readJob(ctx, jobs[i], float64(seconds), r, log))
	}
	errs = append(errs, lines.Err())
	if err := kernel.Wait(); err != nil {
		errs = append(errs, fmt.Errorf("the lab kernel: %w (build/test/%s.log)", err, name))
	}
	for _, j := range jobs {
		if r.results[testName{j.pkg, ""}] == nil {
			errs = append(errs, fmt.Errorf("the tests of %s did not run to their end in the lab kernel (build/test/%s.log)", j.pkg, name))
		}
	}
	return errors.Join(errs...)
}

// readJob reads what a test binary said.
func (t *tests) readJob(ctx context.Context, j job, seconds float64, r *run, log io.Writer) error {
	said, err := os.Open(j.binary() + ".out")
	if err != nil {
		return err
	}
	defer func() { _ = said.Close() }()
	convert := exec.CommandContext(ctx, "go", "tool", "test2json", "-p", j.pkg)
	convert.Stdin = said
	events, err := convert.Output()
	if err != nil {
		return fmt.Errorf("test2json: %w", withStderr(err))
	}
	return r.read(strings.NewReader(string(events)), log, func(pkg string, res *result) {
		t.say(pkg, res.action, seconds, " (lab kernel)")
	})
}

// script writes what runs in the kernel: each binary in its package's directory, its output in a file.
func (t *tests) script(ctx context.Context, name string, jobs []job) (string, error) {
	wd, err := os.Getwd()
	if err != nil {
		return "", err
	}
	var b strings.Builder
	for i, j := range jobs {
		if err := j.build(ctx); err != nil {
			return "", err
		}
		binary := filepath.Join(wd, j.binary())
		fmt.Fprintf(&b, "SECONDS=0; cd %s && %s", quote(j.dir), quote(binary))
		for _, a := range j.args {
			b.WriteString(" " + quote(a))
		}
		// The last line is what go test would say of the package.
		fmt.Fprintf(&b, " >%[1]s 2>&1 </dev/null || echo \"exit status $?\" >>%[1]s\n", quote(binary+".out"))
		fmt.Fprintf(&b, "echo labtest: job %d ended after $SECONDS\n", i)
	}
	path := filepath.Join("build/test", name+".sh")
	return path, os.WriteFile(path, []byte(b.String()), 0o644)
}

func quote(s string) string { return "'" + strings.ReplaceAll(s, "'", `'\''`) + "'" }

// bench runs the benchmarks on this machine's kernel and on the lab kernel.
func (t *tests) bench(ctx context.Context) error {
	host := exec.CommandContext(ctx, "go", append([]string{"test", "-run=^$", "-bench=.", "-benchmem", "-timeout=30m"}, t.withTests...)...)
	host.Stdout, host.Stderr = os.Stdout, os.Stderr
	err := host.Run()
	if len(labkernel.Lacks()) == 0 || err != nil {
		return err
	}
	fmt.Println("in the lab kernel:")
	var b strings.Builder
	for _, pkg := range t.withTests {
		sources, err := filepath.Glob(filepath.Join(t.dirs[pkg], "*_test.go"))
		if err != nil {
			return err
		}
		if !slices.ContainsFunc(sources, func(path string) bool {
			text, err := os.ReadFile(path)
			return err == nil && strings.Contains(string(text), "\nfunc Benchmark") && strings.Contains(string(text), "nettest.Need(")
		}) {
			continue
		}
		j := job{pkg: pkg, dir: t.dirs[pkg]}
		if err := j.build(ctx); err != nil {
			return err
		}
		wd, err := os.Getwd()
		if err != nil {
			return err
		}
		fmt.Fprintf(&b, "echo pkg: %s; cd %s && %s '-test.run=^$' -test.bench=. -test.benchmem 2>&1 || status=1\n",
			pkg, quote(j.dir), quote(filepath.Join(wd, j.binary())))
	}
	b.WriteString("exit ${status:-0}\n")
	if err := os.WriteFile("build/test/bench.sh", []byte(b.String()), 0o644); err != nil {
		return err
	}
	return labkernel.Run(ctx, []string{"bash", "build/test/bench.sh"})
}
