package e2e

import (
	"context"
	"encoding/json"
	"fmt"
	"net/netip"
	"os/exec"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/ravel-lb/ravel"
	"github.com/ravel-lb/ravel/director"
	"github.com/ravel-lb/ravel/internal/guard"
	"github.com/ravel-lb/ravel/internal/iptables"
	"github.com/ravel-lb/ravel/internal/nettest"
	"github.com/ravel-lb/ravel/lab/traffic"
)

const (
	unbound        = 200 * time.Millisecond // how long a service has no scheduler
	schedulerTurns = 12
)

// While a service has no scheduler for 200 ms, again and again, connects are slow and none is refused. Without the hold
// they are refused, or the test would show nothing.
func TestHeldWithoutScheduler(t *testing.T) {
	nettest.Need(t, nettest.IPVS, nettest.IPSet, nettest.LegacyNAT)
	// This namespace is the director, on one bridge with a client and a real server.
	nettest.Shell(t, `
		ip link add held0 type bridge
		ip addr add 10.9.0.1/24 dev held0
		ip addr add fd00:9::1/64 dev held0 nodad
		ip link set held0 up
		sysctl -qw net.ipv4.ip_forward=1 net.ipv4.conf.all.send_redirects=0 net.ipv4.conf.all.arp_ignore=1
		# Else only one refusal a second is sent.
		sysctl -qw net.ipv4.icmp_ratelimit=0 net.ipv6.icmp.ratelimit=0
		ip addr add 192.0.2.9/32 dev lo
		ip addr add 2001:db8:9::9/128 dev lo nodad
		n=2
		for name in client real; do
			ip netns add held-$name
			ip link add held-$name type veth peer name eth0 netns held-$name
			ip link set held-$name master held0 up
			ip -n held-$name addr add 10.9.0.$n/24 dev eth0
			ip -n held-$name addr add fd00:9::$n/64 dev eth0 nodad
			ip -n held-$name link set eth0 up
			ip -n held-$name link set lo up
			n=3
		done
		ip -n held-client route add 192.0.2.9 via 10.9.0.1
		ip -n held-client route add 2001:db8:9::9 via fd00:9::1
		ip netns exec held-real sysctl -qw net.ipv4.conf.all.arp_ignore=1
		ip -n held-real addr add 192.0.2.9/32 dev lo
		ip -n held-real addr add 2001:db8:9::9/128 dev lo nodad`)
	t.Cleanup(func() {
		nettest.Shell(t, `
			ip netns del held-client; ip netns del held-real; ip link del held0
			ip addr del 192.0.2.9/32 dev lo; ip addr del 2001:db8:9::9/128 dev lo`)
	})
	heldProcess(t, "ip", "netns", "exec", "held-real", "build/traffic", "pod", "real", "80")

	var tables []*iptables.Tables
	for _, f := range []iptables.Family{iptables.V4, iptables.V6} {
		one, err := iptables.Open(iptables.Legacy, f)
		must(t, err)
		tables = append(tables, one)
	}
	g := guard.New(guard.Options{Tables: tables, Enabled: true})
	targets := []netip.Addr{netip.MustParseAddr("192.0.2.9"), netip.MustParseAddr("2001:db8:9::9")}
	servers := []netip.Addr{netip.MustParseAddr("10.9.0.3"), netip.MustParseAddr("fd00:9::3")}
	t.Cleanup(func() {
		_, err := g.Apply(context.Background(), nil, nil, nil)
		must(t, err)
	})

	for _, holds := range []bool{true, false} {
		t.Run(fmt.Sprintf("holds=%t", holds), func(t *testing.T) {
			options := director.Options{Unbound: unbound}
			if holds {
				options.HoldBack = g.HoldBack
			}
			d, err := director.New(options)
			must(t, err)
			apply := func(scheduler ravel.Scheduler) {
				t.Helper()
				var services []ravel.VirtualService
				var keys []ravel.ServiceKey
				for i, vip := range targets {
					key := ravel.ServiceKey{VIP: vip, Proto: ravel.TCP, Port: 80}
					keys = append(keys, key)
					services = append(services, ravel.VirtualService{Key: key, Scheduler: scheduler, RealServers: []ravel.RealServer{
						{Addr: servers[i], Weight: 1, LastWeight: 1, Forwarding: ravel.Direct},
					}})
				}
				held, err := d.Apply(within(t, time.Minute), services)
				must(t, err)
				if len(held) != len(services) {
					t.Fatalf("IPVS holds %v", held)
				}
				_, err = g.Apply(t.Context(), targets, keys, nil)
				must(t, err)
			}
			t.Cleanup(func() {
				_, err := d.Apply(context.Background(), nil)
				must(t, err)
				must(t, d.Close())
			})
			apply(ravel.MH)

			var load traffic.Load
			for _, vip := range targets {
				load.Requests = append(load.Requests, traffic.Requests{Name: vip.String(), Target: netip.AddrPortFrom(vip, 80), Rate: 30, Timeout: 20 * time.Second})
			}
			text, err := json.Marshal(load)
			must(t, err)
			remote := traffic.Remote{Path: fmt.Sprintf("/run/held-%t.sock", holds)}
			heldProcess(t, "ip", "netns", "exec", "held-client", "build/traffic", "client", remote.Path, string(text))
			report := func(enough func(traffic.RequestReport) bool) (r traffic.Report) {
				t.Helper()
				eventually(t, time.Minute, func() (err error) {
					r, err = remote.Report(t.Context())
					for _, q := range r.Requests {
						if err == nil && !enough(q) {
							err = fmt.Errorf("%s: %d begun, %d answered, failed %v", q.Name, q.Begun, q.Answered, q.Failed)
						}
					}
					return err
				})
				return r
			}
			report(func(q traffic.RequestReport) bool { return q.Answered > 20 })
			for i := range schedulerTurns {
				apply([]ravel.Scheduler{"wrr", ravel.MH, "rr"}[i%3])
			}
			begun := map[string]int{}
			for _, q := range report(func(traffic.RequestReport) bool { return true }).Requests {
				begun[q.Name] = q.Begun
			}
			for _, q := range report(func(q traffic.RequestReport) bool { return q.Answered+q.Failures() > begun[q.Name] }).Requests {
				t.Logf("%s: %d begun, %d answered, the slowest after %s, failed %v", q.Name, q.Begun, q.Answered, q.Slowest.Round(time.Millisecond), q.Failed)
				switch {
				case holds && q.Failures() > 0:
					t.Errorf("%s: failed %v: %q", q.Name, q.Failed, q.Examples)
				case holds && q.Slowest < 900*time.Millisecond:
					t.Errorf("%s: the slowest took %s: no SYN met the hold, the test shows nothing", q.Name, q.Slowest)
				}
			}
			// A client takes a refusal to heart only if it comes between two of its own steps, so refusals are counted on
			// their arrival.
			for family, counter := range map[string]string{"IPv4": "IcmpInDestUnreachs", "IPv6": "Icmp6InDestUnreachs"} {
				came := strings.Fields(nettest.Shell(t, "ip netns exec held-client nstat -asz "+counter+" | grep "+counter))
				n, err := strconv.Atoi(came[1])
				must(t, err)
				if holds && n > 0 {
					t.Errorf("%s: %d refusals came", family, n)
				}
				if !holds && n == 0 {
					t.Errorf("%s: without the hold nothing is refused: the test shows nothing", family)
				}
			}
		})
	}
}

// heldProcess runs a process of this machine until the test's end.
func heldProcess(t *testing.T, args ...string) {
	t.Helper()
	cmd := exec.Command(args[0], args[1:]...)
	must(t, cmd.Start())
	t.Cleanup(func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
	})
}
