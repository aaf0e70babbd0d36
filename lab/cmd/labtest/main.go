// Labtest runs all tests, and sees to it that each of them ran: on this machine's kernel, and in the lab kernel those
// that this one cannot carry. A test that was skipped on both, or for any reason of its own, fails the whole.
//
//	labtest          formatting, vet, staticcheck, all tests
//	labtest -check   the same without the lab kernel; tests may lack features of the kernel
//	labtest -e2e     the tests of the whole fleet only; with -kube, all of them
//	labtest -kube    the tests that need a Kubernetes control plane, which is built first, and no others
//	labtest -histories   of the tests of the whole fleet the ones with random histories, partitions and plans, at length;
//	                     with -kube, what those do that take long
//	labtest -bench   benchmarks
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/ravel-lb/ravel/lab/labkernel"
)

func main() {
	check := flag.Bool("check", false, "only what needs neither root nor the lab kernel")
	e2e := flag.Bool("e2e", false, "only the tests of the whole fleet")
	histories := flag.Bool("histories", false, "what takes long, at length")
	kube := flag.Bool("kube", false, "only the tests that need a Kubernetes control plane")
	bench := flag.Bool("bench", false, "benchmarks")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM, syscall.SIGHUP)
	ok, err := labtest(ctx, *check, *e2e || *histories && !*kube, *bench, *histories, *kube)
	stop()
	if os.Geteuid() == 0 {
		err = errors.Join(err, labkernel.GiveBack("build"))
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "labtest:", err)
	}
	if err != nil || !ok {
		os.Exit(1)
	}
}

func labtest(ctx context.Context, check, e2e, bench, histories, kube bool) (ok bool, err error) {
	self, err := os.Executable()
	if err != nil {
		return false, err
	}
	// build/labtest
	if err := os.Chdir(filepath.Dir(filepath.Dir(self))); err != nil {
		return false, err
	}
	if err := os.MkdirAll("build/test", 0o755); err != nil {
		return false, err
	}
	t := &tests{args: []string{fleetTimeout, "-test.skip=" + oneOf(atLength)}}
	if histories {
		if err := long(); err != nil {
			return false, err
		}
		t.args = []string{"-test.timeout=2h"}
		if !kube {
			t.args = append(t.args, "-test.run="+oneOf(append([]string{"TestTablesAgreeWhateverTheHistory", "TestNoIntervalWithoutRules", "TestForeignThingsSurvive"}, atLength...)))
		}
	}
	if err := t.list(ctx); err != nil {
		return false, err
	}
	if !check {
		if t.lacks, err = labkernel.Lacks(ctx); err != nil {
			return false, err
		}
	}
	switch {
	case kube:
		t.all = e2e
		if err := t.onlyKube(ctx); err != nil {
			return false, err
		}
	case bench:
		return true, t.bench(ctx)
	case histories:
		// Beside the whole fleet, what takes long on this machine's kernel.
		const many = "/realserver"
		t.only(func(pkg string) bool { return isE2E(pkg) || strings.HasSuffix(pkg, many) })
		t.hostArgs = []string{"-run=^TestBesideManyRules$"}
	case e2e:
		t.only(isE2E)
	}
	began := time.Now()
	var source error
	switch {
	case kube:
		source = kubeSource(ctx, t.withTests)
	case !e2e:
		fmt.Println("looking at the source, then all tests: some 12 minutes on two cores, more the first time")
		source = static(ctx)
	}
	errs := []error{source}
	var fleet errgroup.Group
	if !check {
		errs = append(errs, t.fleet(ctx, &fleet))
	}
	errs = append(errs, t.host(ctx))
	if !check {
		errs = append(errs, t.lab(ctx))
	}
	errs = append(errs, fleet.Wait())
	if !check && !histories && !kube {
		fmt.Printf("\nnot run, for they take long: %s; see make histories\n", strings.Join(atLength, ", "))
	}
	v := judge(t.runs, t.withTests, check)
	fmt.Println()
	broken := errors.Join(errs...)
	if broken != nil {
		fmt.Println("FAIL", broken)
	}
	for _, p := range v.problems {
		fmt.Println("FAIL", p)
	}
	if len(v.slowest) > 0 {
		fmt.Println("slowest:")
		for _, s := range v.slowest {
			fmt.Println(s)
		}
	}
	fmt.Printf("all that was said is in build/test/*.log; %v\n", time.Since(began).Round(time.Second))
	fmt.Printf("%d passed, %d failed, %d skipped\n", v.passed, v.failed, v.skipped)
	for _, why := range v.why {
		fmt.Println("FAIL:", why)
	}
	return broken == nil && v.failed == 0 && len(v.problems) == 0, ctx.Err()
}

// atLength are tests of the whole fleet that take minutes: make histories runs them, and nothing else does.
var atLength = []string{
	"TestARealserverNodeDies", "TestAgentsComeAndGo", "TestAPartitionHeals", "TestAFleetOfTwo", "TestTheWholeFleetRestarts",
	"TestPlanIsWhatHappens", "TestFlowsSurviveAfterARestartInADrain", "TestScaleUpsAndDowns", "TestTraceIsTheKernel",
	"TestAChangeThatTakesTooMuchIsHeld", "TestTakingOverFromTheOriginal",
}

// long has the tests of the whole fleet that take a number from the environment do all that they are for, unless it is
// set already.
func long() (err error) {
	for name, value := range map[string]string{
		"RAVEL_TEST_HISTORIES": "50", "RAVEL_TEST_SCALES": "200", "RAVEL_TEST_PARTITION": "180", "RAVEL_TEST_QUIET": "30", "RAVEL_TEST_PLANS": "3",
		"RAVEL_TEST_ENDPOINTS": "200", "RAVEL_TEST_SILENCE": "60", "RAVEL_TEST_PROXIES": "3", "RAVEL_TEST_CHANGES": "300", "RAVEL_TEST_STRANGERS": "3", "RAVEL_TEST_SETTINGS": "3",
		"RAVEL_FOREIGN_RULES": "20000", "RAVEL_FOREIGN_CHANGES": "200",
	} {
		if os.Getenv(name) == "" {
			err = errors.Join(err, os.Setenv(name, value))
		}
	}
	return err
}

// static looks at the source without running it.
func static(ctx context.Context) error {
	// Not build/, where the modules of who has no home are.
	sources, err := filepath.Glob("[!.]*")
	if err != nil {
		return err
	}
	sources = slices.DeleteFunc(sources, func(name string) bool {
		info, err := os.Stat(name)
		return name == "build" || err != nil || !info.IsDir() && filepath.Ext(name) != ".go"
	})
	// What makes releases is a module of its own. Its tests here are those that need no release: make release has the rest.
	const release = "deploy/release"
	return look(ctx, append([]string{"gofmt", "-l"}, sources...), []string{"go", "vet", "./..."}, []string{"go", "tool", "staticcheck", "./..."},
		[]string{"go", "-C", release, "vet", "-tags=released", "./..."},
		[]string{"go", "-C", release, "tool", "staticcheck", "-tags=released", "./..."},
		[]string{"go", "-C", release, "test", "-count=1", "./..."})
}

// look runs commands that look at the source.
func look(ctx context.Context, commands ...[]string) error {
	var errs []error
	for _, c := range commands {
		began := time.Now()
		out, err := exec.CommandContext(ctx, c[0], c[1:]...).CombinedOutput()
		words := 3
		switch {
		case c[0] == "gofmt":
			words = 2
		case c[1] == "-C":
			words = 5
		}
		name := strings.Join(c[:min(len(c), words)], " ")
		if err == nil && c[0] == "gofmt" && len(out) > 0 {
			err = errors.New("these files are not formatted")
		}
		if err != nil {
			errs = append(errs, fmt.Errorf("%s: %w\n%s", name, err, out))
			continue
		}
		fmt.Printf("ok    %-50s %6.1f s\n", name, time.Since(began).Seconds())
	}
	return errors.Join(errs...)
}
