package bgp

import (
	"context"
	"encoding/json"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/ravel-lb/ravel"
	"github.com/ravel-lb/ravel/internal/nettest"
)

// TestFRR: what a real router makes of it all: routes, attributes, MD5, and the last words of a planned stop.
func TestFRR(t *testing.T) {
	nettest.Need(t, nettest.Root, nettest.FRR)
	nettest.Shell(t, `
		ip link add frr0 type veth peer name frr1
		ip link set frr0 up; ip link set frr1 up
		ip addr add 10.9.0.1/24 dev frr0; ip addr add 10.9.0.2/24 dev frr0
		ip addr add fd09::1/64 dev frr0 nodad; ip addr add fd09::2/64 dev frr0 nodad`)
	t.Cleanup(func() { _ = exec.Command("ip", "link", "del", "frr0").Run() })
	vtysh := startFRR(t, `
router bgp 65001
 bgp router-id 10.9.0.1
 no bgp ebgp-requires-policy
 no bgp network import-check
 neighbor 10.9.0.2 remote-as 64600
 neighbor 10.9.0.2 passive
 neighbor 10.9.0.2 password opensesame
 neighbor 10.9.0.2 timers 1 3
 neighbor fd09::2 remote-as 64600
 neighbor fd09::2 passive
 neighbor fd09::2 timers 1 3
 address-family ipv4 unicast
  network 198.51.100.0/24
  neighbor fd09::2 activate
 address-family ipv6 unicast
  neighbor 10.9.0.2 activate
  neighbor fd09::2 activate
`)
	key := filepath.Join(t.TempDir(), "key")
	if err := os.WriteFile(key, []byte("opensesame\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	med := uint32(50)
	four := ravel.Route{
		Prefix: netip.MustParsePrefix("192.0.2.1/32"), NextHop: netip.MustParseAddr("10.9.0.77"), MED: &med,
		Communities:      []ravel.Community{65000<<16 | 1, 65000<<16 | 120},
		LargeCommunities: []ravel.LargeCommunity{{Global: 65000, Local1: 1, Local2: 2}, {Global: 4200000000, Local1: 3, Local2: 4}},
	}
	six := four
	six.Prefix, six.NextHop = netip.MustParsePrefix("2001:db8::1/128"), netip.MustParseAddr("fd09::77")
	peer4 := ravel.Peer{
		Addr: netip.MustParseAddr("10.9.0.1"), Port: frrPort, ASN: 65001, LocalASN: ourASN,
		LocalAddr: netip.MustParseAddr("10.9.0.2"), HoldTime: 3 * time.Second, PasswordFile: key,
	}
	peer6 := peer4
	peer6.Addr, peer6.LocalAddr, peer6.PasswordFile = netip.MustParseAddr("fd09::1"), netip.MustParseAddr("fd09::2"), ""
	s := speaker(t, Options{Node: "d1"})
	peers := []ravel.Peer{peer4, peer6}
	apply(t, s, peers, four, six)

	// Both sessions carry both families.
	for command, want := range map[string]frrPath{
		"show bgp ipv4 unicast 192.0.2.1/32 json":    {Hop: "10.9.0.77"},
		"show bgp ipv6 unicast 2001:db8::1/128 json": {Hop: "fd09::77"},
	} {
		want.Valid, want.Metric, want.Origin, want.AS = true, 50, "IGP", "64600"
		want.Communities, want.Large = "65000:1 65000:120", "65000:1:2 4200000000:3:4"
		eventually(t, command, func() error {
			var diff []string
			got := parseFRR(t, vtysh(command))
			for _, from := range []string{"10.9.0.2", "fd09::2"} {
				if d := cmp.Diff(want, got[from]); d != "" {
					diff = append(diff, from+":\n"+d)
				}
			}
			if len(diff) > 0 {
				return fmt.Errorf("(-want +got)\n%s", strings.Join(diff, ""))
			}
			return nil
		})
	}
	eventually(t, "the status", func() error {
		// What FRR sent is its own network, and perhaps what the other session told it.
		if p := status(t, s, peer4.Addr); p.Received == 0 || p.Sent != 2 || p.HoldTime != 3 || len(p.Families) != 2 {
			return fmt.Errorf("%+v", p)
		}
		return nil
	})

	// One of the two goes.
	apply(t, s, peers, four)
	eventually(t, "the withdrawal", func() error {
		if got := parseFRR(t, vtysh("show bgp ipv6 unicast 2001:db8::1/128 json")); len(got) > 0 {
			return fmt.Errorf("still there: %v", got)
		}
		return nil
	})

	// FRR resets the session: its words are in the status, and it is back soon.
	vtysh("clear bgp 10.9.0.2")
	eventually(t, "the end of the session", func() error {
		if p := status(t, s, peer4.Addr); p.Flaps != 1 || !strings.Contains(p.LastError, "Cease: administrative reset") {
			return fmt.Errorf("%+v", p)
		}
		return nil
	})
	eventually(t, "the session's return", func() error {
		if p := status(t, s, peer4.Addr); !p.Established() || p.Sent != 1 {
			return fmt.Errorf("%+v", p)
		}
		return nil
	})

	if err := s.Stop(context.Background()); err != nil {
		t.Error(err)
	}
	eventually(t, "FRR's view of the stop", func() error {
		var neighbors map[string]struct {
			State  string `json:"bgpState"`
			Due    string `json:"lastResetDueTo"`
			Reason string `json:"lastNotificationReason"`
			Text   string `json:"lastShutdownDescription"`
		}
		if err := json.Unmarshal([]byte(vtysh("show bgp neighbors json")), &neighbors); err != nil {
			return err
		}
		for _, addr := range []string{"10.9.0.2", "fd09::2"} {
			n := neighbors[addr]
			if n.Due != "BGP Notification received" || n.Reason != "Cease/Administrative Shutdown" || n.Text != "ravel: planned stop of director d1" {
				return fmt.Errorf("%s: %+v", addr, n)
			}
		}
		return nil
	})
}

const frrPort = 1793

// frrPath is one path of a prefix, as FRR holds it.
type frrPath struct {
	Valid       bool
	Metric      int
	Origin, AS  string
	Hop         string
	Communities string
	Large       string
}

// parseFRR reads "show bgp AFI unicast PREFIX json": paths by the neighbour that sent them.
func parseFRR(t testing.TB, out string) map[string]frrPath {
	t.Helper()
	var prefix struct {
		Paths []struct {
			Valid     bool
			Metric    int
			Origin    string
			AsPath    struct{ String string }
			Community struct{ String string }
			Large     struct{ String string } `json:"largeCommunity"`
			Nexthops  []struct{ IP string }
			Peer      struct{ PeerID string }
		}
	}
	if err := json.Unmarshal([]byte(out), &prefix); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	paths := map[string]frrPath{}
	for _, p := range prefix.Paths {
		path := frrPath{
			Valid: p.Valid, Metric: p.Metric, Origin: p.Origin, AS: p.AsPath.String,
			Communities: p.Community.String, Large: p.Large.String,
		}
		if len(p.Nexthops) > 0 {
			path.Hop = p.Nexthops[0].IP
		}
		paths[p.Peer.PeerID] = path
	}
	return paths
}

// startFRR runs zebra and bgpd with a configuration and returns what asks them.
func startFRR(t *testing.T, config string) (vtysh func(command string) string) {
	t.Helper()
	dir, err := os.MkdirTemp("/run", "frr")
	if err != nil {
		t.Fatal(err)
	}
	conf := filepath.Join(dir, "bgpd.conf")
	if err := os.WriteFile(conf, []byte(config), 0o644); err != nil {
		t.Fatal(err)
	}
	nettest.Run(t, "chown", "-R", "frr:frr", dir)
	for _, daemon := range [][]string{
		{"zebra", "-z", dir + "/z.sock", "--vty_socket", dir, "-i", dir + "/zebra.pid", "-f", "/dev/null"},
		{"bgpd", "-z", dir + "/z.sock", "--vty_socket", dir, "-i", dir + "/bgpd.pid", "-f", conf, "-p", fmt.Sprint(frrPort)},
	} {
		var book logbook
		cmd := exec.Command("/usr/lib/frr/"+daemon[0], daemon[1:]...)
		cmd.Stdout, cmd.Stderr = &book, &book
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() {
			_ = cmd.Process.Kill()
			_ = cmd.Wait()
			if t.Failed() {
				t.Logf("%s: %s", daemon[0], book.String())
			}
		})
		eventually(t, daemon[0], func() error {
			_, err := os.Stat(filepath.Join(dir, daemon[0]+".vty"))
			return err
		})
	}
	return func(command string) string { return nettest.Run(t, "vtysh", "--vty_socket", dir, "-c", command) }
}
