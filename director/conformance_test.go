package director

import (
	"errors"
	"net"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/moby/ipvs"
	"golang.org/x/sys/unix"

	"github.com/ravel-lb/ravel"
	"github.com/ravel-lb/ravel/internal/nettest"
)

func TestMain(m *testing.M) { nettest.Main(m) }

// kernels runs a test on the fake kernel and on the real one, each empty.
func kernels(t *testing.T, test func(t *testing.T, open func() (kernel, error))) {
	t.Run("fake", func(t *testing.T) { test(t, (&fake{}).handle) })
	t.Run("real", func(t *testing.T) {
		nettest.Need(t, nettest.IPVS)
		flush(t)
		test(t, open)
	})
}

// flush empties the real kernel's table, now and after the test.
func flush(t testing.TB) {
	t.Helper()
	empty := func() {
		k, err := open()
		if err != nil {
			t.Fatal(err)
		}
		defer k.Close()
		if err := k.(*ipvs.Handle).Flush(); err != nil {
			t.Fatal(err)
		}
	}
	empty()
	t.Cleanup(empty)
}

// TestConformance pins what a kernel answers, so that the fake cannot differ from the real one.
func TestConformance(t *testing.T) {
	kernels(t, func(t *testing.T, open func() (kernel, error)) {
		k, err := open()
		if err != nil {
			t.Fatal(err)
		}
		defer k.Close()
		v4 := id{ServiceKey: key("tcp 192.0.2.1:80")}
		v6 := id{ServiceKey: key("udp [2001:db8::1]:53")}
		mark := id{mark: 7}
		settings := func(i id, scheduler string, flags uint32) *ipvs.Service {
			s := service{scheduler: scheduler, flags: flags, netmask: 128}
			if !i.v6 && i.mark != 0 || i.VIP.Is4() {
				s.netmask = 0xffffffff
			}
			return i.full(s)
		}
		server := func(a string, port uint16, weight int, method uint32) *ipvs.Destination {
			d := real{at: addrPort(a, port), weight: weight, method: method}.destination()
			return d
		}
		const direct, tunnel = ipvs.ConnectionFlagDirectRoute, ipvs.ConnectionFlagTunnel
		for _, step := range []struct {
			name string
			do   func() error
			want error
			then string // the table, where it is worth looking at
		}{
			{"a service under no scheduler", func() error { return k.NewService(settings(v4, none, 0x38)) }, nil,
				"-A -t 192.0.2.1:80 -s none -b flag-1,flag-2,flag-3\n"},
			{"the same again", func() error { return k.NewService(settings(v4, "mh", 0)) }, unix.EEXIST, ""},
			{"real server", func() error { return k.NewDestination(v4.request(), server("10.0.0.1", 80, 1, direct)) }, nil, ""},
			{"the newest is the head", func() error { return k.NewDestination(v4.request(), server("10.0.0.2", 80, 65535, tunnel)) }, nil,
				"-A -t 192.0.2.1:80 -s none -b flag-1,flag-2,flag-3\n-a -t 192.0.2.1:80 -r 10.0.0.2:80 -i -w 65535\n-a -t 192.0.2.1:80 -r 10.0.0.1:80 -g -w 1\n"},
			{"the same real server", func() error { return k.NewDestination(v4.request(), server("10.0.0.1", 80, 5, direct)) }, unix.EEXIST, ""},
			{"a multicast real server", func() error { return k.NewDestination(v4.request(), server("224.0.0.1", 80, 5, direct)) }, unix.EINVAL, ""},
			{"a negative weight", func() error { return k.NewDestination(v4.request(), server("10.0.0.3", 80, -1, direct)) }, unix.ERANGE, ""},
			{"bind", func() error { return k.UpdateService(settings(v4, "mh", 0x38)) }, nil,
				"-A -t 192.0.2.1:80 -s mh -b mh-fallback,mh-port,flag-3\n-a -t 192.0.2.1:80 -r 10.0.0.2:80 -i -w 65535\n-a -t 192.0.2.1:80 -r 10.0.0.1:80 -g -w 1\n"},
			{"a scheduler that is not there keeps the old", func() error { return k.UpdateService(settings(v4, "nosuch", 0)) }, unix.ENOENT,
				"-A -t 192.0.2.1:80 -s mh -b mh-fallback,mh-port,flag-3\n-a -t 192.0.2.1:80 -r 10.0.0.2:80 -i -w 65535\n-a -t 192.0.2.1:80 -r 10.0.0.1:80 -g -w 1\n"},
			{"a new service with it", func() error { return k.NewService(settings(v6, "nosuch", 0)) }, unix.ENOENT, ""},
			{"flags in place", func() error { return k.UpdateService(settings(v4, "mh", 0x20)) }, nil, ""},
			{"weight in place", func() error { return k.UpdateDestination(v4.request(), server("10.0.0.1", 80, 0, tunnel)) }, nil,
				"-A -t 192.0.2.1:80 -s mh -b flag-3\n-a -t 192.0.2.1:80 -r 10.0.0.2:80 -i -w 65535\n-a -t 192.0.2.1:80 -r 10.0.0.1:80 -i -w 0\n"},
			{"unbind", func() error { return k.UpdateService(settings(v4, none, 0x20)) }, nil, ""},
			{"another scheduler", func() error { return k.UpdateService(settings(v4, "rr", 0x20)) }, nil, ""},
			{"a real server that is not there", func() error { return k.UpdateDestination(v4.request(), server("10.0.0.9", 80, 1, direct)) }, unix.ENOENT, ""},
			{"removing it", func() error { return k.DelDestination(v4.request(), server("10.0.0.9", 80, 1, direct)) }, unix.ENOENT, ""},
			{"another port is another real server", func() error { return k.DelDestination(v4.request(), server("10.0.0.1", 81, 1, direct)) }, unix.ENOENT, ""},
			{"IPv6", func() error { return k.NewService(settings(v6, "wrr", 0x24)) }, nil, ""},
			{"IPv6 real server", func() error { return k.NewDestination(v6.request(), server("2001:db8::a", 53, 2, tunnel)) }, nil, ""},
			{"IPv6 link-local", func() error { return k.NewDestination(v6.request(), server("fe80::1", 53, 2, tunnel)) }, unix.EINVAL, ""},
			{"a mark", func() error { return k.NewService(settings(mark, "rr", 0x20)) }, nil,
				"-A -t 192.0.2.1:80 -s rr -b flag-3\n-a -t 192.0.2.1:80 -r 10.0.0.2:80 -i -w 65535\n-a -t 192.0.2.1:80 -r 10.0.0.1:80 -i -w 0\n" +
					"-A -u [2001:db8::1]:53 -s wrr -o -b flag-3\n-a -u [2001:db8::1]:53 -r [2001:db8::a]:53 -i -w 2\n" +
					"-A -f 7 -s rr -b flag-3\n"},
			{"read one", func() error { _, err := k.GetService(v6.request()); return err }, nil, ""},
			{"remove", func() error { return k.DelService(v6.request()) }, nil, ""},
			{"read what is gone", func() error { _, err := k.GetService(v6.request()); return err }, unix.ESRCH, ""},
			{"remove what is gone", func() error { return k.DelService(v6.request()) }, unix.ESRCH, ""},
			{"edit what is gone", func() error { return k.UpdateService(settings(v6, "rr", 0)) }, unix.ESRCH, ""},
			{"add to what is gone", func() error { return k.NewDestination(v6.request(), server("2001:db8::a", 53, 2, tunnel)) }, unix.ESRCH, ""},
			{"change in what is gone", func() error { return k.UpdateDestination(v6.request(), server("2001:db8::a", 53, 2, tunnel)) }, unix.ESRCH, ""},
			{"remove from what is gone", func() error { return k.DelDestination(v6.request(), server("2001:db8::a", 53, 2, tunnel)) }, unix.ESRCH, ""},
			{"list what is gone", func() error {
				list, err := k.GetDestinations(v6.request())
				return errors.Join(err, errIf(len(list) > 0, "it has real servers"))
			}, nil, ""},
			{"remove the mark", func() error { return k.DelService(mark.request()) }, nil, ""},
			{"remove a real server", func() error { return k.DelDestination(v4.request(), server("10.0.0.2", 80, 0, 0)) }, nil,
				"-A -t 192.0.2.1:80 -s rr -b flag-3\n-a -t 192.0.2.1:80 -r 10.0.0.1:80 -i -w 0\n"},
		} {
			if err := step.do(); !errors.Is(err, step.want) {
				t.Errorf("%s: %v, want %v", step.name, err, step.want)
			}
			if step.then != "" {
				if diff := cmp.Diff(step.then, dump(t, k)); diff != "" {
					t.Errorf("after %s (-want +got):\n%s", step.name, diff)
				}
			}
		}
		all, err := k.GetServices()
		if err != nil || len(all) != 1 {
			t.Fatalf("%d services, %v; want one", len(all), err)
		}
		if s := all[0]; s.Flags != 0x22 || s.Netmask != 0xffffffff || s.Timeout != 0 {
			t.Errorf("read back flags %#x netmask %#x timeout %d; want 0x22, 0xffffffff, 0", s.Flags, s.Netmask, s.Timeout)
		}
		if flagsOf := serviceOf(all[0]).flags; flagsOf != uint32(ravel.Flag3) {
			t.Errorf("flags without those of the kernel: %#x", flagsOf)
		}
	})
}

// TestConformanceOfFlows pins that a real server which is added again has its open flows still, and its last weight from
// that.
func TestConformanceOfFlows(t *testing.T) {
	flow := func(t *testing.T, k kernel, i id) {
		if h, is := k.(*fakeHandle); is {
			h.find(i.request()).reals[0].InactiveConnections++
			return
		}
		// IPVS sees what this host itself sends, too; that it does not arrive does not matter.
		nettest.Shell(t, "ip addr add 192.0.2.1/32 dev lo; ip route add 10.0.0.0/24 dev lo")
		t.Cleanup(func() { nettest.Shell(t, "ip addr del 192.0.2.1/32 dev lo; ip route del 10.0.0.0/24 dev lo") })
		conn, err := net.Dial("udp", "192.0.2.1:53")
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = conn.Close() })
		_, _ = conn.Write([]byte("x"))
	}
	kernels(t, func(t *testing.T, open func() (kernel, error)) {
		k := opened(t, open)
		i := id{ServiceKey: key("udp 192.0.2.1:53")}
		server := real{at: addrPort("10.0.0.1", 53), weight: 1, method: ipvs.ConnectionFlagDirectRoute}
		flows := func(want int) {
			t.Helper()
			list, err := k.GetDestinations(i.request())
			if err != nil || len(list) != 1 || list[0].ActiveConnections+list[0].InactiveConnections != want {
				t.Fatalf("%+v, %v; want one real server with %d flows", list, err, want)
			}
		}
		must := func(err error) {
			t.Helper()
			if err != nil {
				t.Fatal(err)
			}
		}
		must(k.NewService(i.full(service{scheduler: "mh", flags: flagOurs, netmask: 0xffffffff})))
		must(k.NewDestination(i.request(), server.destination()))
		flows(0)
		flow(t, k, i)
		flows(1)
		must(k.DelDestination(i.request(), server.destination()))
		must(k.NewDestination(i.request(), server.destination()))
		flows(1)
	})
}

func errIf(bad bool, what string) error {
	if bad {
		return errors.New(what)
	}
	return nil
}
