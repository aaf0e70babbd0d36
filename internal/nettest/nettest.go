// Package nettest gives a test a network namespace of its own and says honestly what its kernel can do.
//
// A test that needs the kernel calls Need with the features that it leans on. Where the kernel has one of them not,
// the test is skipped with a reason of fixed form, and the test runner (lab/cmd/labtest) sees to it that every such
// test then ran in the lab kernel: a test that runs nowhere fails the build.
package nettest

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"runtime"
	"strings"
	"sync"
	"syscall"
	"testing"
)

// Feature is something that a test needs of the machine.
type Feature string

// The features that Need knows. Each is probed by doing it, in a namespace that is thrown away.
const (
	Root       Feature = "root"        // may make network namespaces
	IPVS       Feature = "ipvs"        // net/netfilter/ipvs with the mh scheduler
	Dummy      Feature = "dummy"       // dummy links
	IPIP       Feature = "ipip"        // tunl0 and ip6tnl0
	IPSet      Feature = "ipset"       // hash:ip and hash:ip,port sets, matched by iptables
	LegacyNAT  Feature = "legacy-nat"  // iptables-legacy's nat table, both families
	NftNAT     Feature = "nft-nat"     // iptables-nft's nat table, both families
	FRR        Feature = "frr"         // FRR's zebra and bgpd are installed
	Systemd    Feature = "systemd"     // systemd is installed, and may be process 1 of a namespace
	PlainClock Feature = "plain-clock" // not an emulated kernel: more than one CPU may run at once
)

// SkipPrefix begins the reason of every skip that Need makes; a list of features follows.
const SkipPrefix = "nettest: this kernel lacks: "

const child = "RAVEL_NETTEST_CHILD"

// Main runs m in a process of its own with a new network and mount namespace and a private /run, so that every
// goroutine of the tests is in it and nothing of the machine is touched. Without root it runs m as it is. Use it as
//
//	func TestMain(m *testing.M) { nettest.Main(m) }
func Main(m *testing.M) {
	if os.Geteuid() != 0 || os.Getenv(child) != "" {
		if os.Getenv(child) != "" {
			if err := private(); err != nil {
				fmt.Fprintln(os.Stderr, "nettest:", err)
				os.Exit(1)
			}
		}
		os.Exit(m.Run())
	}
	cmd := exec.Command("/proc/self/exe", os.Args[1:]...)
	cmd.Env = append(os.Environ(), child+"=1")
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags: syscall.CLONE_NEWNET | syscall.CLONE_NEWNS,
		Pdeathsig:  syscall.SIGKILL,
	}
	signals := make(chan os.Signal, 1)
	signal.Notify(signals, syscall.SIGQUIT, syscall.SIGTERM, syscall.SIGINT)
	if err := cmd.Start(); err != nil {
		fmt.Fprintln(os.Stderr, "nettest: starting in a new namespace:", err)
		os.Exit(1)
	}
	go func() {
		for s := range signals {
			_ = cmd.Process.Signal(s)
		}
	}()
	err := cmd.Wait()
	var exit *exec.ExitError
	switch {
	case err == nil:
		os.Exit(0)
	case errors.As(err, &exit) && exit.ExitCode() > 0:
		os.Exit(exit.ExitCode())
	}
	fmt.Fprintln(os.Stderr, "nettest:", err)
	os.Exit(1)
}

// private makes the child's mounts its own, with an empty /run (xtables.lock, netns) and a /sys of this namespace.
func private() error {
	if err := syscall.Mount("", "/", "", syscall.MS_REC|syscall.MS_PRIVATE, ""); err != nil {
		return fmt.Errorf("making mounts private: %w", err)
	}
	if err := syscall.Mount("tmpfs", "/run", "tmpfs", 0, "mode=755"); err != nil {
		return fmt.Errorf("mounting /run: %w", err)
	}
	if out, err := exec.Command("ip", "link", "set", "lo", "up").CombinedOutput(); err != nil {
		return fmt.Errorf("ip link set lo up: %w: %s", err, out)
	}
	return nil
}

var (
	probeMu sync.Mutex // guards probed
	probed  = map[Feature]bool{}
)

// Has reports whether this machine has the feature.
func Has(f Feature) bool {
	probeMu.Lock()
	defer probeMu.Unlock()
	has, done := probed[f]
	if !done {
		has = probe(f)
		probed[f] = has
	}
	return has
}

// Need skips the test unless the machine has all the features.
func Need(t testing.TB, features ...Feature) {
	t.Helper()
	var lacks []string
	for _, f := range features {
		if !Has(f) {
			lacks = append(lacks, string(f))
		}
	}
	if len(lacks) > 0 {
		t.Skip(SkipPrefix + strings.Join(lacks, ", "))
	}
}

var probes = map[Feature]string{
	Root:  `true`,
	IPVS:  `modprobe -qa ip_vs ip_vs_mh; test -e /proc/net/ip_vs`,
	Dummy: `ip link add nettest0 type dummy`,
	IPIP:  `modprobe -qa ipip ip6_tunnel; ip link show tunl0 && ip link show ip6tnl0`,
	IPSet: `ipset create nettest hash:ip,port && { iptables-nft -I INPUT -m set --match-set nettest dst,dst -j ACCEPT || iptables-legacy -I INPUT -m set --match-set nettest dst,dst -j ACCEPT; }`,
	LegacyNAT: `iptables-legacy -t nat -A PREROUTING -p tcp --dport 9 -j DNAT --to-destination 127.0.0.1:9 &&
		ip6tables-legacy -t nat -A PREROUTING -p tcp --dport 9 -j DNAT --to-destination [::1]:9`,
	NftNAT: `iptables-nft -t nat -A PREROUTING -p tcp --dport 9 -j DNAT --to-destination 127.0.0.1:9 &&
		ip6tables-nft -t nat -A PREROUTING -p tcp --dport 9 -j DNAT --to-destination [::1]:9`,
	Systemd: `systemd-analyze --version && test -x /usr/lib/systemd/systemd && test -w /sys/fs/cgroup/cgroup.procs && modprobe -qa overlay; unshare -m sh -ec '
		mount -t tmpfs probe /mnt; mkdir /mnt/upper /mnt/work
		mount -t overlay -o lowerdir=/,upperdir=/mnt/upper,workdir=/mnt/work probe /mnt
		mount -t cgroup2 probe /media; group=$(mktemp -d /media/nettest-XXXXXX); rmdir "$group"'`,
	FRR:        `test -x /usr/lib/frr/bgpd && test -x /usr/lib/frr/zebra`,
	PlainClock: `! grep -q 'User Mode Linux' /proc/cpuinfo`,
}

func probe(f Feature) bool {
	script, known := probes[f]
	if !known {
		panic("nettest: unknown feature " + string(f))
	}
	if os.Geteuid() != 0 {
		return false
	}
	cmd := exec.Command("bash", "-c", "PATH=$PATH:/usr/sbin:/sbin; "+script)
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNET}
	return cmd.Run() == nil
}

// Run runs a command and returns what it printed on both outputs; the test ends if the command does.
func Run(t testing.TB, name string, args ...string) string {
	t.Helper()
	out, err := exec.Command(name, args...).CombinedOutput()
	if err != nil {
		t.Fatalf("%s %s: %v\n%s", name, strings.Join(args, " "), err, out)
	}
	return string(out)
}

// Shell runs a bash script that ends at its first failing command and returns what it printed.
func Shell(t testing.TB, script string) string {
	t.Helper()
	return Run(t, "bash", "-euc", script)
}

// InNetns runs fn on a thread of its own that is in a new network namespace, which is gone afterwards. Goroutines that
// fn starts are not in it.
func InNetns(t testing.TB, fn func()) {
	t.Helper()
	Need(t, Root)
	done := make(chan error)
	go func() {
		// The thread ends with the goroutine, because it is never unlocked.
		runtime.LockOSThread()
		err := syscall.Unshare(syscall.CLONE_NEWNET)
		if err == nil {
			defer func() { done <- nil }() // also when fn calls t.FailNow
			fn()
			return
		}
		done <- err
	}()
	if err := <-done; err != nil {
		t.Fatalf("making a network namespace: %v", err)
	}
	if t.Failed() {
		t.FailNow()
	}
}

// HoldTables takes the lock of the legacy tables, as a long-running iptables-restore does, until release is called.
func HoldTables(t testing.TB) (release func()) {
	t.Helper()
	f, err := os.OpenFile("/run/xtables.lock", os.O_CREATE|os.O_RDWR, 0o600)
	if err == nil {
		err = syscall.Flock(int(f.Fd()), syscall.LOCK_EX)
	}
	if err != nil {
		t.Fatalf("taking the lock of the tables: %v", err)
	}
	return func() { _ = f.Close() }
}
