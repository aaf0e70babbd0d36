package main

import (
	"fmt"
	"io"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/ravel-lb/ravel/internal/nettest"
)

// said makes a run from a short form: "package test action reason" a line.
func said(t *testing.T, kernel, text string) *run {
	t.Helper()
	var b strings.Builder
	for _, line := range strings.Split(strings.TrimSpace(text), "\n") {
		f := append(strings.SplitN(strings.TrimSpace(line), " ", 4), "", "", "")
		pkg, test, action, output := f[0], f[1], f[2], f[3]
		if test == "-" {
			test = ""
		} else {
			fmt.Fprintf(&b, `{"Action":"run","Package":%q,"Test":%q}`+"\n", pkg, test)
		}
		if output != "" {
			fmt.Fprintf(&b, `{"Action":"output","Package":%q,"Test":%q,"Output":%q}`+"\n", pkg, test, output+"\n")
		}
		if action != "hangs" {
			fmt.Fprintf(&b, `{"Action":%q,"Package":%q,"Test":%q,"Elapsed":2}`+"\n", action, pkg, test)
		}
	}
	r := newRun(kernel)
	if err := r.read(strings.NewReader(b.String()), io.Discard, func(string, *result) {}); err != nil {
		t.Fatal(err)
	}
	return r
}

func TestJudge(t *testing.T) {
	lacks := "    x_test.go:7: " + nettest.SkipPrefix + "ipvs"
	for _, c := range []struct {
		name, host, lab   string
		mayLack           bool
		wantCounts        string
		wantProblems      []string // how each begins
		wantWhy           string
		wantInTheLab      string
		packagesWithTests []string
	}{
		{
			name:       "all is well",
			host:       "p A pass\np B pass\np - pass",
			wantCounts: "2 0 0", wantInTheLab: "map[]",
		},
		{
			name:       "skipped here, passed there",
			host:       "p A pass\np B skip " + lacks + "\np C pass\np C/x skip " + lacks + "\np - pass",
			lab:        "p B pass\np C pass\np C/x pass\np - pass",
			wantCounts: "4 0 0", wantInTheLab: "map[p:[B C]]",
		},
		{
			name:       "skipped here and there",
			host:       "p A pass\np B skip " + lacks + "\np - pass",
			lab:        "p B skip " + lacks + "\np - pass",
			wantCounts: "1 0 1", wantInTheLab: "map[p:[B]]",
			wantProblems: []string{"p B ran nowhere: this kernel: x_test.go:7: nettest: this kernel lacks: ipvs; lab: "},
		},
		{
			name:       "skipped for a reason of its own",
			host:       "p A pass\np B skip     x_test.go:9: not today\np - pass",
			wantCounts: "1 1 0", wantInTheLab: "map[]",
			wantProblems: []string{"p B was skipped without a reason that names a feature: x_test.go:9: not today"},
		},
		{
			name:       "skipped for a reason of its own, passed there",
			host:       "p B skip     x_test.go:9: not today\np - pass",
			lab:        "p B pass\np - pass",
			wantCounts: "0 1 0", wantInTheLab: "map[]",
			wantProblems: []string{"p B was skipped without a reason"},
		},
		{
			name:       "passed here, failed there",
			host:       "p B pass\np B/x skip " + lacks + "\np - pass",
			lab:        "p B fail\np B/x fail     b_test.go:3: it broke\np - fail",
			wantCounts: "0 2 0", wantInTheLab: "map[p:[B]]", wantWhy: "B failed: ; B/x failed: b_test.go:3: it broke",
			wantProblems: []string{"p B failed on lab", "p B/x failed on lab\n        b_test.go:3: it broke"},
		},
		{
			name:       "began and never ended",
			host:       "p A hangs\np - pass",
			wantCounts: "0 1 0", wantInTheLab: "map[]", wantProblems: []string{"p A did not end on this kernel"},
		},
		{
			name:       "does not build",
			host:       "p - fail x.go:1: syntax error",
			wantCounts: "0 1 0", wantInTheLab: "map[]", wantProblems: []string{"p failed on this kernel\n    x.go:1: syntax error"},
		},
		{
			name:       "never ran",
			host:       "p A pass\np - pass",
			wantCounts: "1 1 0", wantInTheLab: "map[]", packagesWithTests: []string{"p", "q"},
			wantProblems: []string{"q has tests, and none of them passed anywhere"},
		},
		{
			name:       "may lack",
			host:       "p A skip " + lacks + "\np - pass",
			mayLack:    true,
			wantCounts: "0 0 1", wantInTheLab: "map[p:[A]]",
		},
	} {
		t.Run(c.name, func(t *testing.T) {
			host := said(t, "this kernel", c.host)
			runs := []*run{host}
			if c.lab != "" {
				runs = append(runs, said(t, "lab", c.lab))
			}
			with := c.packagesWithTests
			if with == nil {
				with = []string{"p"}
			}
			if got := fmt.Sprint(host.elsewhere()); got != c.wantInTheLab {
				t.Errorf("for the lab kernel: %s, want %s", got, c.wantInTheLab)
			}
			v := judge(runs, with, c.mayLack)
			if got := fmt.Sprintf("%d %d %d", v.passed, v.failed, v.skipped); got != c.wantCounts {
				t.Errorf("passed, failed, skipped: %s, want %s", got, c.wantCounts)
			}
			same := cmp.Comparer(func(a, b string) bool { return strings.HasPrefix(a, b) || strings.HasPrefix(b, a) })
			if got := strings.Join(v.why, "; "); c.wantWhy != "" && got != c.wantWhy {
				t.Errorf("why: %s, want %s", got, c.wantWhy)
			}
			if diff := cmp.Diff(c.wantProblems, v.problems, same); diff != "" {
				t.Errorf("problems (-want +got)\n%s", diff)
			}
		})
	}
}

// Only a crash of the race detector is the tool's own; a panic is the program's.
func TestWhoseCrashItIs(t *testing.T) {
	r := newRun("this kernel")
	for pkg, output := range map[string][]string{
		"tool":    {"=== RUN   TestA\n", "SIGSEGV: segmentation violation\n", "PC=0x437870 m=5 sigcode=1 addr=0x7f7800100000\n", "goroutine 0 gp=0xc0 m=5 [idle, synctest bubble 36]:\n"},
		"checks":  {"ThreadSanitizer: CHECK failed: tsan_clock.cpp:1\n"},
		"program": {"panic: runtime error: invalid memory address or nil pointer dereference\n", "[signal SIGSEGV: segmentation violation code=0x1 addr=0x0 pc=0x1]\n", "goroutine 7 [running, synctest bubble 3]:\n"},
		"cgo":     {"\nSIGSEGV: segmentation violation\n", "PC=0x437870 m=5 sigcode=1 addr=0x0\n", "goroutine 9 [running]:\n"},
	} {
		r.results[testName{pkg, "TestA"}] = &result{output: output}
		r.results[testName{pkg, ""}] = &result{ended: true, action: "fail"}
	}
	got := r.toolCrashed()
	if diff := cmp.Diff([]string{"checks", "tool"}, got); diff != "" {
		t.Error(diff)
	}
	r.forget(got)
	if len(r.results) != 4 {
		t.Errorf("%d results are left, want those of two packages", len(r.results))
	}
}
