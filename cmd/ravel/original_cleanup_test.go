package main

import (
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/ravel-lb/ravel/internal/iptables"
	"github.com/ravel-lb/ravel/internal/nettest"
)

// oldChains are a few of what the original leaves.
const oldChains = `*nat
:CH - [0:0]
:CH-MASQ - [0:0]
:CH-SVC-CDGGSHYLG3RE2FKL - [0:0]
:CH-SEP-4ZIGKUTDV76XFVIU - [0:0]
-A PREROUTING -j CH
-A CH -p tcp -m tcp --dport 80 -j CH-SVC-CDGGSHYLG3RE2FKL
-A CH-SVC-CDGGSHYLG3RE2FKL -j CH-SEP-4ZIGKUTDV76XFVIU
-A CH-SEP-4ZIGKUTDV76XFVIU -j CH-MASQ
-A CH-MASQ -j MARK --set-xmark 0x4000/0x4000
COMMIT
`

// Both variants are looked through, and what is there of another base stays.
func TestCleanupOfTheOriginal(t *testing.T) {
	nettest.Need(t, nettest.NftNAT, nettest.LegacyNAT)
	nettest.InNetns(t, func() {
		for _, v := range []string{"nft", "legacy"} {
			for _, base := range []string{"RAVEL", "LB"} {
				nettest.Shell(t, "iptables-"+v+"-restore --noflush <<'END'\n"+strings.ReplaceAll(oldChains, "CH", base)+"END")
			}
		}
		count := func(base string) int {
			return strings.Count(nettest.Shell(t, "iptables-nft-save -t nat 2>/dev/null; iptables-legacy-save -t nat 2>/dev/null"), "\n:"+base)
		}
		cleanup := func(args ...string) (string, string) {
			t.Helper()
			code, stdout, stderr := ravelWith(append([]string{"cleanup", "--original"}, args...)...)
			if code != exitOK {
				t.Fatalf("%v: exit code %d\n%s%s", args, code, stdout, stderr)
			}
			return stdout, stderr
		}
		would, _ := cleanup("--dry-run")
		if n := count("RAVEL"); n != 8 || strings.Count(would, "\n") != 10 {
			t.Errorf("a dry run left %d of 8 chains:\n%s", n, would)
		}
		if did, _ := cleanup("--iptables", "legacy"); strings.Count(did, "\n") != 5 || count("RAVEL") != 4 {
			t.Errorf("one variant: left %d of 4 chains:\n%s", count("RAVEL"), did)
		}
		if did, _ := cleanup(); strings.Count(did, "\n") != 5 || count("RAVEL") != 0 {
			t.Errorf("both: left %d chains:\n%s", count("RAVEL"), did)
		}
		if again, _ := cleanup(); again != "nothing of the original's is here\n" || count("LB") != 8 {
			t.Errorf("again, and %d of 8 chains of another base:\n%s", count("LB"), again)
		}
		if did, _ := cleanup("--iptables-chain", "LB"); count("LB") != 0 {
			t.Errorf("another base:\n%s", did)
		}

		// Not while it runs: it would make them again.
		nettest.Shell(t, "iptables-nft-restore --noflush <<'END'\n"+strings.ReplaceAll(oldChains, "CH", "RAVEL")+"END")
		old := exec.CommandContext(t.Context(), "bash", "-c", "exec -a /bin/kube2ipvs tail -f /dev/null realserver 2>/dev/null")
		if err := old.Start(); err != nil {
			t.Fatal(err)
		}
		defer func() { _ = old.Process.Kill(); _ = old.Wait() }()
		for until := time.Now().Add(10 * time.Second); besideOriginal("/proc") == nil && time.Now().Before(until); {
			time.Sleep(10 * time.Millisecond)
		}
		for args, want := range map[string]int{"cleanup --original": exitUsage, "cleanup --original --dry-run": exitOK,
			"realserver --gossip-insecure --gossip-advertise=10.0.0.1 --static=/nowhere": exitUsage, "director --gossip-insecure --gossip-advertise=10.0.0.1 --static=/nowhere": exitUsage} {
			code, _, stderr := ravelWith(strings.Fields(args)...)
			if code != want || !strings.Contains(stderr, "/bin/kube2ipvs tail") && !strings.Contains(stderr, "/bin/kube2ipvs -f") {
				t.Errorf("ravel %s: exit code %d:\n%s", args, code, stderr)
			}
		}
		if n := count("RAVEL"); n != 4 {
			t.Errorf("%d of 4 chains", n)
		}
	})
}

// Links and chains in one, and a host without one of the variants.
func TestCleanupOfTheOriginalsLinks(t *testing.T) {
	nettest.Need(t, nettest.Dummy, nettest.LegacyNAT)
	nettest.InNetns(t, func() {
		nettest.Shell(t, "iptables-legacy-restore --noflush <<'END'\n"+strings.ReplaceAll(oldChains, "CH", "RAVEL")+"END")
		nettest.Shell(t, "ip link add 10_1_2_3 type dummy; ip addr add 10.1.2.3 dev 10_1_2_3; ip link add dummy7 type dummy; ip addr add 10.1.2.4 dev dummy7")
		done, _, err := removeOriginal(t.Context(), []iptables.Variant{iptables.NFT, iptables.Legacy}, "RAVEL", false, false)
		if err != nil || len(done) != 6 || done[5] != "ip link delete 10_1_2_3 # VIP 10.1.2.3: no other link holds it" {
			t.Errorf("%q, %v", done, err)
		}
		if left := nettest.Shell(t, "ip -o link"); strings.Contains(left, "10_1_2_3") || !strings.Contains(left, "dummy7") {
			t.Errorf("left:\n%s", left)
		}
	})
}

func TestCleanupOfTheOriginalRefuses(t *testing.T) {
	for _, args := range []string{"--iptables-chain KUBE", "--iptables-chain much-too-long", "--iptables best", "all"} {
		code, stdout, stderr := ravelWith(append([]string{"cleanup", "--original", "--dry-run"}, strings.Fields(args)...)...)
		if code != exitUsage || stdout != "" {
			t.Errorf("%s: exit code %d:\n%s%s", args, code, stdout, stderr)
		}
	}
}

func TestWhatIsTheOriginal(t *testing.T) {
	other := "/bin/sleep"
	for _, test := range []struct {
		words, exe string
		want       bool
	}{
		{"/bin/ravel bgp --debug", other, true},
		{"kube2ipvs --kubeconfig x director", other, true},
		{"/usr/local/bin/ravel realserver", "/nowhere", true},
		{"/bin/ravel director", "/proc/self/exe", false}, // ours
		{"/bin/ravel version", other, false},
		{"/bin/ravel", other, false},
		{"/bin/raven director", other, false},
		{"", other, false},
	} {
		if got := isOriginal(strings.Split(test.words, " "), test.exe); got != test.want {
			t.Errorf("%q of %s: %v", test.words, test.exe, got)
		}
	}
	if err := besideOriginal(t.TempDir()); err != nil {
		t.Errorf("without /proc: %v", err)
	}
}

func TestRavelRuns(t *testing.T) {
	path := filepath.Join(t.TempDir(), "run", "lock")
	if ravelRuns(path) {
		t.Error("without a lock")
	}
	release, err := lock(path, "director")
	if err != nil {
		t.Fatal(err)
	}
	if !ravelRuns(path) {
		t.Error("a director is not seen")
	}
	release()
	if ravelRuns(path) {
		t.Error("a director that is gone is seen")
	}
	if entries, err := os.ReadDir(filepath.Dir(path)); err != nil || !slices.ContainsFunc(entries, func(e os.DirEntry) bool { return e.Name() == "lock" }) {
		t.Errorf("%v, %v", entries, err)
	}
}
