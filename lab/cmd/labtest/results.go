package main

import (
	"bufio"
	"cmp"
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"regexp"
	"slices"
	"strings"

	"github.com/ravel-lb/ravel/internal/nettest"
)

// event is a line of `go test -json` (go doc test2json).
type event struct {
	Action     string
	Package    string
	ImportPath string // of a build's output
	Test       string
	Elapsed    float64 // seconds
	Output     string
}

// testName names a test, or a package as a whole if Test is empty.
type testName struct{ Package, Test string }

func (n testName) String() string {
	if n.Test == "" {
		return n.Package
	}
	return n.Package + " " + n.Test
}

// result is what one run of a test came to.
type result struct {
	ended   bool
	action  string // pass, fail or skip, if ended
	elapsed float64
	output  []string // its own lines
}

// run is what came of one run of some packages, on one kernel.
type run struct {
	kernel  string
	results map[testName]*result
}

func newRun(kernel string) *run { return &run{kernel: kernel, results: map[testName]*result{}} }

func (r *run) result(n testName) *result {
	if r.results[n] == nil {
		r.results[n] = &result{}
	}
	return r.results[n]
}

// read takes in the events of in, copies what the tests printed to log, and calls ended for each package that ends.
func (r *run) read(in io.Reader, log io.Writer, ended func(pkg string, res *result)) error {
	lines := bufio.NewScanner(in)
	lines.Buffer(nil, 16<<20)
	for lines.Scan() {
		var e event
		if err := json.Unmarshal(lines.Bytes(), &e); err != nil {
			// Not an event: go itself speaks.
			fmt.Fprintln(log, lines.Text())
			continue
		}
		if e.Action == "build-output" {
			e.Package, _, _ = strings.Cut(e.ImportPath, " ")
		}
		n := testName{e.Package, e.Test}
		switch e.Action {
		case "output", "build-output":
			_, _ = io.WriteString(log, e.Output)
			res := r.result(n)
			res.output = append(res.output, e.Output)
		case "run":
			r.result(n)
		case "pass", "fail", "skip":
			res := r.result(n)
			res.ended, res.action, res.elapsed = true, e.Action, e.Elapsed
			if e.Test == "" {
				ended(e.Package, res)
			}
		}
	}
	return lines.Err()
}

// skipReason returns why a test was skipped: what its output says beside the frame of the testing package.
func (r *result) skipReason() string {
	var reason []string
	for _, line := range r.output {
		line = strings.TrimSpace(line)
		if line == "" || strings.HasPrefix(line, "=== ") || strings.HasPrefix(line, "--- ") {
			continue
		}
		reason = append(reason, line)
	}
	return strings.Join(reason, " ")
}

// short returns the lines that a test logged itself, on one line that ends somewhere.
func (r *result) short() string {
	var lines []string
	for _, line := range r.output {
		if line = strings.TrimSpace(line); logged.MatchString(line) {
			lines = append(lines, line)
		}
	}
	text := strings.Join(lines, " | ")
	return text[:min(len(text), 1000)]
}

var logged = regexp.MustCompile(`^\w+_test\.go:\d+: `)

// lacksFeature reports whether the test was skipped because its kernel lacks something.
func (r *result) lacksFeature() bool { return strings.Contains(r.skipReason(), nettest.SkipPrefix) }

// toolCrashed lists the packages, sorted, whose tests were ended by Go's race detector itself: it sometimes crashes below
// testing/synctest (https://github.com/golang/go/issues/78156). What a program does wrong is a panic, which looks different.
func (r *run) toolCrashed() (packages []string) {
	for n, res := range r.results {
		text := strings.Join(res.output, "")
		crashed := strings.Contains(text, "ThreadSanitizer: CHECK failed") ||
			strings.Contains(text, "\nSIGSEGV: segmentation violation\nPC=") && strings.Contains(text, "synctest bubble")
		if crashed && !slices.Contains(packages, n.Package) {
			packages = append(packages, n.Package)
		}
	}
	slices.Sort(packages)
	return packages
}

// forget drops what came of packages.
func (r *run) forget(packages []string) {
	maps.DeleteFunc(r.results, func(n testName, _ *result) bool { return slices.Contains(packages, n.Package) })
}

// top returns the name of the function that a test or subtest belongs to.
func top(test string) string {
	name, _, _ := strings.Cut(test, "/")
	return name
}

// elsewhere returns, by package, the test functions that were skipped here, or have a subtest that was, because the
// kernel lacks something. Both are sorted.
func (r *run) elsewhere() map[string][]string {
	found := map[string][]string{}
	for n, res := range r.results {
		if n.Test != "" && res.action == "skip" && res.lacksFeature() && !slices.Contains(found[n.Package], top(n.Test)) {
			found[n.Package] = append(found[n.Package], top(n.Test))
		}
	}
	for _, tests := range found {
		slices.Sort(tests)
	}
	return found
}

// verdict is what all runs together came to.
type verdict struct {
	passed, failed, skipped int
	problems                []string // why the tests as a whole failed, sorted by package
	why                     []string // of each test that failed, on one line
	slowest                 []string
}

// judge looks at all runs. A test passes if it passed on a kernel and failed on none. Each package of withTests must
// have run a test. Where mayLack, a test may be skipped because the kernel lacks something.
func judge(runs []*run, withTests []string, mayLack bool) verdict {
	names := map[testName]bool{}
	ran := map[string]bool{}
	for _, r := range runs {
		for n := range r.results {
			names[n] = true
		}
	}
	type timed struct {
		name    string
		elapsed float64
	}
	var v verdict
	var times []timed
	sorted := slices.SortedFunc(maps.Keys(names), func(a, b testName) int {
		return cmp.Or(cmp.Compare(a.Package, b.Package), cmp.Compare(a.Test, b.Test))
	})
	// A package that failed says something of its own only if none of its tests failed.
	failedIn := map[string]bool{}
	for _, n := range sorted {
		if n.Test == "" {
			continue
		}
		var passed, failed bool
		var skips []string
		for _, r := range runs {
			res := r.results[n]
			switch {
			case res == nil:
				continue
			case !res.ended || res.action == "fail":
				failed = true
				what := "failed"
				if !res.ended {
					what = "did not end"
				}
				v.problems = append(v.problems, fmt.Sprintf("%s %s on %s\n%s", n, what, r.kernel, tail(res.output)))
				v.why = append(v.why, fmt.Sprintf("%s %s: %s", n.Test, what, res.short()))
				failedIn[n.Package] = true
			case res.action == "pass":
				passed = true
			case !res.lacksFeature():
				failed = true
				failedIn[n.Package] = true
				v.problems = append(v.problems,
					fmt.Sprintf("%s was skipped without a reason that names a feature: %s", n, res.skipReason()))
			default:
				skips = append(skips, r.kernel+": "+res.skipReason())
			}
			if !strings.Contains(n.Test, "/") {
				times = append(times, timed{fmt.Sprintf("%s (%s)", n, r.kernel), res.elapsed})
			}
		}
		switch {
		case failed:
			v.failed++
		case passed:
			v.passed++
			ran[n.Package] = true
		default:
			v.skipped++
			ran[n.Package] = ran[n.Package] || mayLack
			if !mayLack {
				v.problems = append(v.problems, fmt.Sprintf("%s ran nowhere: %s", n, strings.Join(skips, "; ")))
			}
		}
	}
	for _, n := range sorted {
		if n.Test != "" || failedIn[n.Package] {
			continue
		}
		for _, r := range runs {
			if res := r.results[n]; res != nil && res.action == "fail" {
				v.failed++
				v.problems = append(v.problems, fmt.Sprintf("%s failed on %s\n%s", n, r.kernel, tail(res.output)))
				ran[n.Package] = true
			}
		}
	}
	for _, pkg := range withTests {
		if !ran[pkg] && !failedIn[pkg] {
			v.failed++
			v.problems = append(v.problems, pkg+" has tests, and none of them passed anywhere")
		}
	}
	slices.SortFunc(times, func(a, b timed) int { return cmp.Compare(b.elapsed, a.elapsed) })
	for _, t := range times[:min(len(times), 10)] {
		if t.elapsed >= 1 {
			v.slowest = append(v.slowest, fmt.Sprintf("%6.1f s  %s", t.elapsed, t.name))
		}
	}
	return v
}

// tail returns the last lines of an output, indented.
func tail(output []string) string {
	text := strings.TrimRight(strings.Join(output, ""), "\n")
	lines := strings.Split(text, "\n")
	if len(lines) > 60 {
		lines = append([]string{"..."}, lines[len(lines)-60:]...)
	}
	return "    " + strings.Join(lines, "\n    ")
}
