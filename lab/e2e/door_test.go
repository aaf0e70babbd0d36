package e2e

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/ravel-lb/ravel/lab/stage"
)

// doorPort is where sshd, so to speak, listens on every address of a node.
const doorPort = 2222

// door is a program that listens on 0.0.0.0 and [::] by TCP and UDP, and answers whoever gets to it.
type door struct {
	mu    sync.Mutex // guards the field below
	byVIP []string   // who got to it by a VIP
}

// openDoor starts the program on a node. It ends with the test.
func openDoor(t *testing.T, s *stage.Stage, node string) *door {
	t.Helper()
	d := &door{}
	var group sync.WaitGroup
	t.Cleanup(group.Wait) // after the listeners are closed
	for _, family := range []string{"4", "6"} {
		var listener net.Listener
		var packets net.PacketConn
		must(t, s.Fleet.Node(node).Do(func() (err error) {
			var config net.ListenConfig
			config.SetMultipathTCP(false)
			address := map[string]string{"4": "0.0.0.0", "6": "[::]"}[family] + fmt.Sprintf(":%d", doorPort)
			if listener, err = config.Listen(context.Background(), "tcp"+family, address); err != nil {
				return err
			}
			packets, err = config.ListenPacket(context.Background(), "udp"+family, address)
			return err
		}))
		t.Cleanup(func() { _, _ = listener.Close(), packets.Close() })
		group.Go(func() {
			for {
				conn, err := listener.Accept()
				if err != nil {
					return
				}
				if own := conn.LocalAddr().(*net.TCPAddr).AddrPort().Addr().Unmap(); isVIP(own) {
					d.entered(fmt.Sprintf("%s from %s", own, conn.RemoteAddr()))
				}
				_, _ = conn.Write([]byte("welcome\n"))
				_ = conn.Close()
			}
		})
		group.Go(func() {
			buffer := make([]byte, 2048)
			for {
				n, from, err := packets.ReadFrom(buffer)
				if errors.Is(err, net.ErrClosed) {
					return
				}
				if err != nil {
					continue // an ICMP error of an earlier answer
				}
				// A datagram says which address it was sent to.
				if to, err := netip.ParseAddr(strings.TrimSpace(string(buffer[:n]))); err == nil && isVIP(to) {
					d.entered(fmt.Sprintf("udp %s from %s", to, from))
				}
				_, _ = packets.WriteTo([]byte("welcome\n"), from)
			}
		})
	}
	return d
}

func isVIP(a netip.Addr) bool { return ours.MatchString(a.String()) }

func (d *door) entered(how string) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.byVIP = append(d.byVIP, how)
}

func (d *door) intruders() []string {
	d.mu.Lock()
	defer d.mu.Unlock()
	return slices.Clone(d.byVIP)
}

// knock asks an address for a line by TCP or UDP, from a node.
func knock(s *stage.Stage, node, network string, to netip.Addr, port uint16, patience time.Duration) (line string, err error) {
	var conn net.Conn
	deadline := time.Now().Add(patience)
	err = s.Fleet.Node(node).Do(func() (err error) {
		dialer := net.Dialer{Deadline: deadline}
		dialer.SetMultipathTCP(false)
		conn, err = dialer.Dial(network, netip.AddrPortFrom(to, port).String())
		return err
	})
	if err != nil {
		return "", err
	}
	defer func() { _ = conn.Close() }()
	_ = conn.SetDeadline(deadline)
	if _, err := fmt.Fprintln(conn, to); err != nil {
		return "", err
	}
	answer := make([]byte, 512)
	n, err := conn.Read(answer)
	if errors.Is(err, io.EOF) && n > 0 {
		err = nil
	}
	return strings.TrimSpace(string(answer[:n])), err
}

// shut checks that the VIPs are no door: refused at once, by TCP and UDP.
func shut(t *testing.T, s *stage.Stage, from, when string) {
	t.Helper()
	for _, vip := range vips {
		for _, network := range []string{"tcp", "udp"} {
			began := time.Now()
			line, err := knock(s, from, network, vip, doorPort, 3*time.Second)
			// A kernel tells somebody only so often a second that nobody is there.
			for tries := 0; network == "udp" && errors.Is(err, os.ErrDeadlineExceeded) && tries < 3; tries++ {
				time.Sleep(time.Second)
				began = time.Now()
				line, err = knock(s, from, network, vip, doorPort, 3*time.Second)
			}
			if !errors.Is(err, syscall.ECONNREFUSED) {
				t.Errorf("%s: from %s, %s %s port %d: %q, %v, want it refused", when, from, network, vip, doorPort, line, err)
			} else if took := time.Since(began); took > time.Second {
				t.Errorf("%s: from %s, %s %s port %d was refused only after %s", when, from, network, vip, doorPort, took)
			}
		}
	}
}

// neighbour makes the rack's switch a host of the rack, and returns how to send its packets for the VIPs straight to a
// node: it holds no VIP itself, as a director or a real server does.
func neighbour(t *testing.T, s *stage.Stage) (node string, via func(t *testing.T, next netip.Addr, next6 netip.Addr)) {
	t.Helper()
	on(t, s, "sw", "ip", "address", "add", "10.1.0.99/24", "dev", "rack")
	on(t, s, "sw", "ip", "address", "add", "fd00:1::99/64", "dev", "rack", "nodad")
	t.Cleanup(func() {
		on(t, s, "sw", "ip", "address", "flush", "dev", "rack", "scope", "global")
	})
	return "sw", func(t *testing.T, next, next6 netip.Addr) {
		t.Helper()
		on(t, s, "sw", "ip", "route", "replace", stage.VIP4.String(), "via", next.String())
		on(t, s, "sw", "ip", "route", "replace", stage.VIP6.String(), "via", next6.String())
	}
}

// ping sends an echo request and wants the reply.
func ping(t *testing.T, s *stage.Stage, from string, to netip.Addr, when string) {
	t.Helper()
	if out, err := s.Output(within(t, 20*time.Second), from, "ping", "-n", "-c", "2", "-i", "0.2", "-W", "3", to.String()); err != nil {
		t.Errorf("%s: ping %s from %s: %v\n%s", when, to, from, err, out)
	}
}

// A VIP is no door to the node that holds it (P7): what listens on all addresses of a node is reached by the node's
// own, and never by a VIP.
func TestVIPIsNoDoor(t *testing.T) {
	s := fleet(t)
	ready(t, s)
	doors := map[string]*door{}
	for _, node := range []string{"d1", "d2", "d3", "r1"} {
		doors[node] = openDoor(t, s, node)
	}
	unentered := func(t *testing.T, when string) {
		t.Helper()
		for node, d := range doors {
			if who := d.intruders(); len(who) > 0 {
				t.Errorf("%s: %s was entered by a VIP %d times: %s", when, node, len(who), who[0])
			}
		}
	}
	rack, via := neighbour(t, s)
	targets := []struct {
		node   string
		v4, v6 netip.Addr
	}{
		{"d1", netip.MustParseAddr("10.1.0.11"), netip.MustParseAddr("fd00:1::11")},
		{"r1", netip.MustParseAddr("10.1.0.21"), netip.MustParseAddr("fd00:1::21")},
	}

	for _, target := range targets {
		t.Run(target.node, func(t *testing.T) {
			via(t, target.v4, target.v6)
			for _, own := range []netip.Addr{target.v4, target.v6} {
				for _, network := range []string{"tcp", "udp"} {
					for _, from := range []string{"c1", rack} {
						if line, err := knock(s, from, network, own, doorPort, 5*time.Second); err != nil || line != "welcome" {
							t.Errorf("from %s, %s to the node's own address %s: %q, %v", from, network, own, line, err)
						}
					}
				}
			}
			// Straight from the rack, to this very node.
			shut(t, s, rack, "straight to "+target.node)
			for _, vip := range vips {
				ping(t, s, rack, vip, "straight to "+target.node)
				line, err := knock(s, rack, "tcp", vip, 80, 5*time.Second)
				if err != nil || !strings.Contains(line, "-p") {
					t.Errorf("the service at %s does not answer by %s: %q, %v", vip, target.node, line, err)
				}
			}
		})
	}

	t.Run("from a client", func(t *testing.T) {
		shut(t, s, "c1", "from a client")
		for _, vip := range vips {
			for _, client := range []string{"c1", "c2"} {
				ping(t, s, client, vip, "from a client")
			}
		}
	})
	unentered(t, "before a change")

	t.Run("while services change", func(t *testing.T) {
		via(t, targets[0].v4, targets[0].v6)
		stop := make(chan struct{})
		var mu sync.Mutex // guards the fields below
		knocks, answers := 0, map[string]int{}
		var group sync.WaitGroup
		for _, from := range []string{"c1", rack} {
			group.Go(func() {
				for {
					for _, vip := range vips {
						for _, network := range []string{"tcp", "udp"} {
							select {
							case <-stop:
								return
							case <-time.After(20 * time.Millisecond):
							}
							line, err := knock(s, from, network, vip, doorPort, 300*time.Millisecond)
							mu.Lock()
							knocks++
							if err == nil {
								answers[line[:min(len(line), 7)]]++
							}
							mu.Unlock()
						}
					}
				}
			})
		}
		defer sync.OnceFunc(func() { close(stop); group.Wait() })()
		atDoor := func(on bool) func(*stage.Document) {
			return func(d *stage.Document) {
				*d = shared.first.Clone()
				for _, vip := range vips {
					if on {
						d.Services = append(d.Services, stage.Service{VIP: vip, Port: doorPort, Name: "web", TCP: true, UDP: true})
					}
				}
			}
		}
		gone := func(d *stage.Document) { d.Services = nil }
		for i, edit := range []func(*stage.Document){atDoor(true), atDoor(false), atDoor(true), gone, atDoor(true), gone, atDoor(false)} {
			must(t, s.Change(edit))
			d := s.Document()
			for _, node := range []string{"d1", "r1"} {
				eventually(t, 30*time.Second, func() error {
					out := shell(t, s, node, "ip -o address show dev ravel0; ipvsadm -Sn; iptables-save -t nat; ip6tables-save -t nat")
					held := strings.Contains(out, "ravel0    inet 198.51.100.20/32")
					served := strings.Contains(out, fmt.Sprintf("198.51.100.20:%d ", doorPort)) || strings.Contains(out, fmt.Sprintf("--dport %d ", doorPort))
					if held != (len(d.Services) > 0) || served != (len(d.Services) > 2) {
						return fmt.Errorf("change %d of %s is not done: VIP held %t, port served %t\n%s", i, node, held, served, out)
					}
					return nil
				})
			}
			if i == 1 {
				// A crash in between opens nothing either.
				must(t, s.Process("d1").Kill())
				must(t, s.Process("r1").Kill())
				must(t, s.Start("d1"))
				must(t, s.Start("r1"))
			}
		}
		must(t, s.WaitHops(within(t, 30*time.Second), stage.Routers(), vips, 3))
		mu.Lock()
		defer mu.Unlock()
		t.Logf("%d knocks, answers %v", knocks, answers)
		if knocks < 100 {
			t.Errorf("only %d knocks in all", knocks)
		}
		if answers["welcome"] > 0 {
			t.Errorf("a door opened %d times", answers["welcome"])
		}
		if len(answers) == 0 {
			t.Error("while the port was a service's, no pod ever answered there")
		}
	})
	unentered(t, "while services changed")
	shut(t, s, "c1", "after the changes")

	// The test can tell: without the guard the door is open.
	t.Run("without the guard", func(t *testing.T) {
		restart(t, s, "d1", "--guard=false")
		restart(t, s, "r1", "--guard=false")
		for _, target := range targets {
			via(t, target.v4, target.v6)
			for _, vip := range vips {
				eventually(t, 20*time.Second, func() error {
					line, err := knock(s, rack, "tcp", vip, doorPort, time.Second)
					if err == nil && line != "welcome" {
						err = errors.New(line)
					}
					if err != nil {
						return fmt.Errorf("%s: the guard is off, and the door is shut: %w", target.node, err)
					}
					return nil
				})
			}
			if len(doors[target.node].intruders()) == 0 {
				t.Errorf("%s: the program does not tell who came by a VIP", target.node)
			}
		}
	})
}
