package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"

	"github.com/ravel-lb/ravel/lab/labkernel"
	"golang.org/x/sync/errgroup"
)

// tests are the packages that have tests, and what came of running them.
type tests struct {
	withTests []string            // import paths, sorted
	dirs      map[string]string   // by import path
	lacks     []string            // what the lab needs and this machine's kernel has not
	onHost    *run                // the run on this machine's kernel
	args      []string            // of the tests of the whole fleet
	hostArgs  []string            // of those on this machine's kernel, beside
	kube      bool                // with those that need a Kubernetes control plane, and
	names     map[string][]string // these, by package
	all       bool                // and the others of the whole fleet
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

// The longest that one package may take. The tests of the whole fleet take some 8 minutes on two quiet cores.
const (
	unitTimeout  = "-test.timeout=20m"
	fleetTimeout = "-test.timeout=40m"
)

// host runs the tests on this machine's kernel, with the race detector; those of the whole fleet only if it can carry
// the fleet.
func (t *tests) host(ctx context.Context) error {
	if len(t.withTests) == 0 {
		return errors.New("there are no tests")
	}
	pkgs := slices.DeleteFunc(slices.Clone(t.withTests), func(pkg string) bool { return isE2E(pkg) && len(t.lacks) > 0 })
	r := newRun("this kernel")
	t.onHost = r
	t.runs = append(t.runs, r)
	if len(pkgs) == 0 {
		return nil
	}
	fmt.Println("on this kernel, with the race detector:")
	log, err := os.Create("build/test/host.log")
	if err != nil {
		return err
	}
	defer func() { _ = log.Close() }()
	err = t.goTest(ctx, r, log, pkgs)
	if again := r.toolCrashed(); len(again) > 0 {
		// Once: the second time it counts.
		fmt.Println("the race detector crashed below testing/synctest (golang/go issue 78156); again:", strings.Join(again, " "))
		r.forget(again)
		err = t.goTest(ctx, r, log, again)
	}
	return err
}

// goTest runs the tests of packages with the race detector.
func (t *tests) goTest(ctx context.Context, r *run, log io.Writer, pkgs []string) error {
	// The whole fleet runs beside, and must not wait for these.
	cmd := exec.CommandContext(ctx, "nice", slices.Concat([]string{"-n", "10", "go", "test"}, t.flags(),
		[]string{"-json", "-race", "-count=1"}, t.args, t.hostArgs, pkgs)...)
	cmd.Env = append(os.Environ(), "CGO_ENABLED=1")
	cmd.Stderr = log
	out, err := cmd.StdoutPipe()
	if err != nil {
		return err
	}
	if err := cmd.Start(); err != nil {
		return err
	}
	err = r.read(out, log, func(pkg string, res *result) { t.say(pkg, res.action, res.elapsed, "") })
	if failed := cmd.Wait(); failed != nil && err == nil && !slices.ContainsFunc(pkgs, func(pkg string) bool {
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

// note tells that a test ended, in the words of the testing package: "PASS: TestX (1.00s)".
func (t *tests) note(test string) {
	t.screen.Lock()
	defer t.screen.Unlock()
	fmt.Printf("      %s\n", test)
}

// byItself are tests of the whole fleet that have a kernel of their own, so that another processor carries them.
var byItself = []string{"TestInstallUpgradeUninstall"}

// fleet begins with the tests of the whole fleet, in a lab kernel of their own, where this machine's kernel cannot carry
// them; with those that need a Kubernetes control plane as well, these in others. They take the longest, and an
// emulated kernel's clock runs on while others have the processor: what runs beside them gives way. There are no more of
// them at a time than processors; on a single one they are alone.
func (t *tests) fleet(ctx context.Context, group *errgroup.Group) error {
	var jobs []job
	for _, pkg := range t.withTests {
		if !isE2E(pkg) || len(t.lacks) == 0 {
			continue
		}
		names := t.names[pkg]
		if len(names) == 0 {
			jobs = append(jobs, t.job(pkg, t.args...))
			continue
		}
		isLong := func(name string) bool { return slices.Contains(byItself, name) }
		for part, names := range map[string][]string{
			"kube":   slices.DeleteFunc(slices.Clone(names), isLong),
			"deploy": slices.DeleteFunc(slices.Clone(names), func(name string) bool { return !isLong(name) }),
		} {
			if len(names) == 0 {
				continue
			}
			own := t.job(pkg, append(slices.Clone(t.args), "-test.run="+oneOf(names))...)
			own.part = part
			jobs = append(jobs, own)
		}
		if t.all {
			jobs = append(jobs, t.job(pkg, append(slices.Clone(t.args), "-test.skip="+oneOf(append(slices.Clone(atLength), names...)))...))
		}
	}
	if len(jobs) == 0 {
		return nil
	}
	for _, j := range jobs {
		if err := j.build(ctx); err != nil {
			return err
		}
	}
	fmt.Println("the whole fleet, in the lab kernel; this one lacks", strings.Join(t.lacks, ", "))
	group.SetLimit(runtime.NumCPU())
	ended := make(chan struct{}, len(jobs))
	for _, j := range jobs {
		r := newRun("the lab kernel")
		t.runs = append(t.runs, r)
		group.Go(func() error {
			defer func() { ended <- struct{}{} }()
			return t.boot(ctx, "lab-e2e"+j.part, 0, []job{j}, r)
		})
	}
	if runtime.NumCPU() < 2 {
		return group.Wait()
	}
	for range len(jobs) - runtime.NumCPU() + 1 { // until a processor is free
		<-ended
	}
	return nil
}

// lab runs in the lab kernel what the machine's kernel could not carry.
func (t *tests) lab(ctx context.Context) error {
	var jobs []job
	for pkg, names := range t.onHost.elsewhere() {
		jobs = append(jobs, t.job(pkg, unitTimeout, "-test.run="+oneOf(names)))
	}
	if len(jobs) == 0 {
		return nil
	}
	slices.SortFunc(jobs, func(a, b job) int { return strings.Compare(a.pkg, b.pkg) })
	for _, j := range jobs {
		if err := j.build(ctx); err != nil {
			return err
		}
	}
	fmt.Println("in the lab kernel; this one lacks", strings.Join(t.lacks, ", ")+":")
	r := newRun("the lab kernel")
	t.runs = append(t.runs, r)
	return t.boot(ctx, "lab", 10, jobs, r)
}

// job makes the job of a package.
func (t *tests) job(pkg string, args ...string) job {
	return job{pkg: pkg, dir: t.dirs[pkg], flags: t.flags(), args: append([]string{"-test.v=test2json"}, args...)}
}

// flags are Go's, for building tests.
func (t *tests) flags() []string {
	if t.kube {
		return []string{kubeFlag}
	}
	return nil
}

// job is a test binary to run in the lab kernel.
type job struct {
	pkg, dir    string
	flags, args []string
	part        string // a name, where several jobs are of one package, each in a kernel and with files of its own
}

// binary returns where the test binary of a package is built.
func (j job) binary() string {
	return filepath.Join("build/test", strings.ReplaceAll(strings.TrimPrefix(j.pkg, "github.com/ravel-lb/"), "/", "-")+".test")
}

// out returns where it writes what it says.
func (j job) out() string { return j.binary() + j.part + ".out" }

// build makes the test binary.
func (j job) build(ctx context.Context) error {
	cmd := exec.CommandContext(ctx, "go", slices.Concat([]string{"test", "-c"}, j.flags, []string{"-o", j.binary(), j.pkg})...)
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("building the tests of %s: %w\n%s", j.pkg, err, out)
	}
	return nil
}

// boot runs jobs one after the other in one lab kernel, and reads what they say.
func (t *tests) boot(ctx context.Context, name string, nice int, jobs []job, r *run) error {
	script, err := script(name, jobs)
	if err != nil {
		return err
	}
	log, err := os.Create(filepath.Join("build/test", name+".log"))
	if err != nil {
		return err
	}
	defer func() { _ = log.Close() }()
	kernel := labkernel.Command(ctx, []string{"bash", script})
	kernel.Args = append([]string{"nice", "-n", strconv.Itoa(nice)}, kernel.Args...)
	if kernel.Path, err = exec.LookPath("nice"); err != nil {
		return err
	}
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
		if _, test, found := strings.Cut(lines.Text(), "--- "); found {
			t.note(test)
			continue
		}
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
	said, err := os.Open(j.out())
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

// script writes what runs in the kernel: each binary in its package's directory, its output in a file. The tests of the
// whole fleet take long: of these, the end of each is told as well.
func script(name string, jobs []job) (string, error) {
	wd, err := os.Getwd()
	if err != nil {
		return "", err
	}
	var b strings.Builder
	for i, j := range jobs {
		binary, out := filepath.Join(wd, j.binary()), filepath.Join(wd, j.out())
		if err := os.Remove(out); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return "", err
		}
		fmt.Fprintf(&b, "SECONDS=0; { cd %s && ", quote(j.dir))
		if j.part != "" {
			fmt.Fprintf(&b, "RAVEL_TEST_DIR=%s ", quote(filepath.Join("build", "lab-"+j.part)))
		}
		b.WriteString(quote(binary))
		for _, a := range j.args {
			b.WriteString(" " + quote(a))
		}
		// The last line is what go test would say of the package.
		b.WriteString(" 2>&1 </dev/null || echo \"exit status $?\"; }")
		if isE2E(j.pkg) {
			fmt.Fprintf(&b, " | tee %s | grep --line-buffered -aE '^.?--- '\n", quote(out))
		} else {
			fmt.Fprintf(&b, " >%s\n", quote(out))
		}
		fmt.Fprintf(&b, "echo labtest: job %d ended after $SECONDS\n", i)
	}
	path := filepath.Join("build/test", name+".sh")
	return path, os.WriteFile(path, []byte(b.String()), 0o644)
}

func quote(s string) string { return "'" + strings.ReplaceAll(s, "'", `'\''`) + "'" }

// bench runs the benchmarks on this machine's kernel, and on the lab kernel those that need what this one lacks. What
// they print is in build/test/bench.txt too.
func (t *tests) bench(ctx context.Context) (err error) {
	file, err := os.Create("build/test/bench.txt")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, file.Close()) }()
	out := io.MultiWriter(os.Stdout, file)
	var all, kernel []job
	for _, pkg := range t.withTests {
		measures, needs, err := t.benchmarks(pkg)
		if err != nil {
			return err
		}
		if measures {
			all = append(all, t.job(pkg))
		}
		if needs {
			kernel = append(kernel, t.job(pkg))
		}
	}
	args := []string{"test", "-run=^$", "-bench=.", "-benchmem", "-timeout=30m"}
	for _, j := range all {
		args = append(args, j.pkg)
	}
	host := exec.CommandContext(ctx, "go", args...)
	host.Stdout, host.Stderr = out, out
	if err := host.Run(); err != nil {
		return fmt.Errorf("go test: %w", err)
	}
	if len(t.lacks) == 0 || len(kernel) == 0 {
		return nil
	}
	wd, err := os.Getwd()
	if err != nil {
		return err
	}
	var b strings.Builder
	for _, j := range kernel {
		if err := j.build(ctx); err != nil {
			return err
		}
		fmt.Fprintf(&b, "echo pkg: %s; cd %s && %s '-test.run=^$' -test.bench=. -test.benchmem 2>&1 || status=1\n",
			j.pkg, quote(j.dir), quote(filepath.Join(wd, j.binary())))
	}
	b.WriteString("exit ${status:-0}\n")
	if err := os.WriteFile("build/test/bench.sh", []byte(b.String()), 0o644); err != nil {
		return err
	}
	fmt.Fprintln(out, "in the lab kernel:")
	lab := labkernel.Command(ctx, []string{"bash", "build/test/bench.sh"})
	lab.Stdout, lab.Stderr = out, out
	if err := lab.Run(); err != nil {
		return fmt.Errorf("the lab kernel: %w", err)
	}
	return nil
}

// benchmarks reports whether a package has benchmarks, and whether a file with one needs something of the kernel.
func (t *tests) benchmarks(pkg string) (measures, needs bool, err error) {
	sources, err := filepath.Glob(filepath.Join(t.dirs[pkg], "*_test.go"))
	if err != nil {
		return false, false, err
	}
	for _, path := range sources {
		text, err := os.ReadFile(path)
		if err != nil {
			return false, false, err
		}
		if strings.Contains(string(text), "\nfunc Benchmark") {
			measures = true
			needs = needs || strings.Contains(string(text), "nettest.Need(")
		}
	}
	return measures, needs, nil
}
