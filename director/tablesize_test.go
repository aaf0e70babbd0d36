package director

import (
	"bytes"
	"compress/gzip"
	"errors"
	"maps"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/moby/ipvs"
	"golang.org/x/sys/unix"

	"github.com/ravel-lb/ravel"
	"github.com/ravel-lb/ravel/internal/maglev"
	"github.com/ravel-lb/ravel/internal/nettest"
)

// hostWith makes a root with these files.
func hostWith(t *testing.T, files map[string]string) string {
	t.Helper()
	root := t.TempDir()
	for path, text := range files {
		path = filepath.Join(root, path)
		if err := errors.Join(os.MkdirAll(filepath.Dir(path), 0o755), os.WriteFile(path, []byte(text), 0o644)); err != nil {
			t.Fatal(err)
		}
	}
	return root
}

func zipped(t *testing.T, text string) string {
	t.Helper()
	var b bytes.Buffer
	w := gzip.NewWriter(&b)
	if _, err := w.Write([]byte(text)); err != nil {
		t.Fatal(err)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return b.String()
}

func TestTableSizeFromConfiguration(t *testing.T) {
	config := func(index string) string {
		return "#\n# Automatically generated file\n#\nCONFIG_IP_VS=m\nCONFIG_IP_VS_MH=m\nCONFIG_IP_VS_MH_TAB_INDEX=" + index + "\n"
	}
	release := map[string]string{"proc/sys/kernel/osrelease": "6.1.0-test\n"}
	for _, test := range []struct {
		name  string
		files map[string]string
		size  maglev.Size // 0: nothing is known
		how   string
	}{
		{"nothing", nil, 0, ""},
		{"in proc", map[string]string{"proc/config.gz": zipped(t, config("16"))}, 65521, "/proc/config.gz"},
		{"in boot", map[string]string{"boot/config-6.1.0-test": config("8")}, 251, "/boot/config-6.1.0-test"},
		{"with the modules", map[string]string{"lib/modules/6.1.0-test/config": config("17")}, 131071, "/lib/modules/6.1.0-test/config"},
		{"built in", map[string]string{"boot/config-6.1.0-test": strings.ReplaceAll(config("12"), "MH=m", "MH=y")}, 4093, "/boot/config-6.1.0-test"},
		{"proc counts first", map[string]string{
			"proc/config.gz": zipped(t, config("9")), "boot/config-6.1.0-test": config("10"),
		}, 509, "/proc/config.gz"},
		{"of another kernel", map[string]string{"boot/config-6.1.0-other": config("12")}, 0, ""},
		{"without the scheduler", map[string]string{
			"boot/config-6.1.0-test": "# CONFIG_IP_VS_MH is not set\nCONFIG_IP_VS_MH_TAB_INDEX=12\n",
		}, 0, ""},
		{"an index that there is not", map[string]string{"boot/config-6.1.0-test": config("18")}, 0, ""},
		{"no number", map[string]string{"boot/config-6.1.0-test": config("x")}, 0, ""},
		{"not zipped, and another is good", map[string]string{
			"proc/config.gz": config("9"), "boot/config-6.1.0-test": config("10"),
		}, 1021, "/boot/config-6.1.0-test"},
		{"cut short", map[string]string{"proc/config.gz": zipped(t, config("9"))[:30]}, 0, ""},
		{"a release with a path in it", map[string]string{
			"proc/sys/kernel/osrelease": "../../x", "x": config("9"), "boot/config-../../x": config("9"),
		}, 0, ""},
	} {
		files := maps.Clone(release)
		maps.Copy(files, test.files)
		if size, how := configuredSize(hostWith(t, files)); size != test.size || how != test.how {
			t.Errorf("%s: %d by %q, want %d by %q", test.name, size, how, test.size, test.how)
		}
	}
}

// postman is a kernel with tables of a size, and the way to it: it counts flows as mh would.
type postman struct {
	*fakeHandle
	size    maglev.Size
	at      netip.AddrPort
	clients []netip.AddrPort
	lose    int // so many datagrams get lost
	tries   int
	closed  int
}

func (p *postman) open(addr netip.Addr) (mailbox, error) {
	p.tries++
	p.at, p.clients = netip.AddrPortFrom(addr, uint16(40000+p.tries)), nil
	return mailboxOf{p}, nil
}

type mailboxOf struct{ *postman }

func (m mailboxOf) Port() uint16 { return m.at.Port() }
func (m mailboxOf) Close() error { m.closed++; return nil }

func (m mailboxOf) Fill(n int) ([]netip.AddrPort, error) {
	for i := range n {
		m.clients = append(m.clients, netip.AddrPortFrom(netip.MustParseAddr("127.0.0.1"), uint16(50000+7*i)))
	}
	return m.clients, nil
}

func (p *postman) GetDestinations(s *ipvs.Service) ([]*ipvs.Destination, error) {
	list, err := p.fakeHandle.GetDestinations(s)
	v := ravel.VirtualService{Key: ravel.ServiceKey{VIP: p.at.Addr(), Port: p.at.Port()}, Flags: ravel.HashPort}
	// The fake keeps its list as the kernel does, newest first.
	for _, d := range list {
		addr, _ := netip.AddrFromSlice(d.Address)
		v.RealServers = append(v.RealServers, ravel.RealServer{Addr: addr.Unmap(), Weight: d.Weight})
	}
	table := maglev.Build(p.size, v)
	for _, client := range p.clients[min(p.lose, len(p.clients)):] {
		if i, ok := table.Pick(client); ok {
			list[i].InactiveConnections++
		}
	}
	return list, err
}

func TestTableSizeByProbe(t *testing.T) {
	for _, size := range maglev.Sizes() {
		f := &fake{}
		p := &postman{fakeHandle: &fakeHandle{fake: f}, size: size}
		if got, how, err := tableSize(p, t.TempDir(), p.open); err != nil || got != size || how != "probe" {
			t.Errorf("%d slots: found %d by %q, %v", size, got, how, err)
		}
		if len(f.services) > 0 || p.closed != p.tries {
			t.Errorf("%d slots: the probe left something behind: %d services, %d sockets", size, len(f.services), p.tries-p.closed)
		}
	}
}

// However a probe fails, it removes its service, unless just that failed.
func TestTableSizeProbeFails(t *testing.T) {
	for at := 1; ; at++ {
		f := &fake{failAt: at}
		p := &postman{fakeHandle: &fakeHandle{fake: f}, size: maglev.DefaultSize}
		size, how, err := tableSize(p, t.TempDir(), p.open)
		if at > f.calls {
			if at < 10 {
				t.Errorf("the probe asked %d times only", f.calls)
			}
			break
		}
		if err == nil || size != 0 || how != "" || !errors.Is(err, unix.EIO) {
			t.Errorf("request %d failed: found %d by %q, %v", at, size, how, err)
		}
		left := 0
		if at == f.calls && at > 1 {
			left = 1 // it was the removal; the next Apply mends it
		}
		if len(f.services) != left || p.closed != p.tries {
			t.Errorf("request %d failed: %d services are left, %d sockets", at, len(f.services), p.tries-p.closed)
		}
		for _, s := range f.services {
			if !isOurs(&s.Service) {
				t.Error("the service of the probe is not ours")
			}
		}
	}

	f := &fake{missing: []string{"mh"}}
	p := &postman{fakeHandle: &fakeHandle{fake: f}, size: maglev.DefaultSize}
	if _, _, err := tableSize(p, t.TempDir(), p.open); !errors.Is(err, errNoMH) || p.tries != 1 {
		t.Errorf("without the scheduler: %v after %d tries", err, p.tries)
	}

	p = &postman{fakeHandle: &fakeHandle{fake: &fake{}}, size: maglev.DefaultSize, lose: 1}
	if _, _, err := tableSize(p, t.TempDir(), p.open); err == nil || p.tries != probeTries || p.closed != probeTries {
		t.Errorf("a datagram got lost: %v after %d tries", err, p.tries)
	}
}

// The probe avoids a service that is there, whoever made it.
func TestTableSizeProbeTakesNoForeignPlace(t *testing.T) {
	f := &fake{}
	p := &postman{fakeHandle: &fakeHandle{fake: f}, size: maglev.DefaultSize}
	var foreign netip.AddrPort
	taken := func(addr netip.Addr) (mailbox, error) {
		box, err := p.open(addr)
		if !foreign.IsValid() {
			foreign = p.at
			i := id{ServiceKey: ravel.ServiceKey{VIP: foreign.Addr(), Proto: ravel.UDP, Port: foreign.Port()}}
			if err := p.NewService(i.full(service{scheduler: "rr", netmask: 0xffffffff})); err != nil {
				t.Fatal(err)
			}
		}
		return box, err
	}
	if size, _, err := tableSize(p, t.TempDir(), taken); err != nil || size != maglev.DefaultSize || p.tries != 2 {
		t.Errorf("found %d after %d tries, %v", size, p.tries, err)
	}
	if len(f.services) != 1 || f.services[0].SchedName != "rr" || f.services[0].Port != foreign.Port() {
		t.Errorf("the foreign service suffered: %s", f.changes)
	}
}

// The datagrams of a probe come from different ports and reach its own socket only.
func TestMailbox(t *testing.T) {
	box, err := openMailbox(netip.MustParseAddr("127.82.3.4"))
	if err != nil {
		t.Fatal(err)
	}
	defer box.Close()
	clients, err := box.Fill(5)
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range clients {
		from, err := receive(box.(udpMailbox))
		if err != nil || from != want {
			t.Errorf("a datagram from %s, %v, want %s", from, err, want)
		}
	}
	slices.SortFunc(clients, netip.AddrPort.Compare)
	if n := len(slices.Compact(clients)); n != 5 {
		t.Errorf("datagrams from %d ports, want 5", n)
	}
}

func receive(m udpMailbox) (netip.AddrPort, error) {
	_, from, err := m.ReadFromUDPAddrPort(make([]byte, 100))
	return netip.AddrPortFrom(from.Addr().Unmap(), from.Port()), err
}

// The configuration of the real kernel and a probe of it say the same, and services of others notice nothing.
func TestTableSizeOfTheKernel(t *testing.T) {
	nettest.Need(t, nettest.IPVS)
	flush(t)
	k, err := open()
	if err != nil {
		t.Fatal(err)
	}
	defer k.Close()
	i := id{ServiceKey: key("udp 127.0.0.1:9")}
	if err := k.NewService(i.full(service{scheduler: "rr", netmask: 0xffffffff})); err != nil {
		t.Fatal(err)
	}
	before := nettest.Run(t, "ipvsadm", "-Sn")
	for range 3 { // the kernel remembers the flows of the first
		size, how, err := tableSize(k, t.TempDir(), openMailbox)
		if err != nil || how != "probe" {
			t.Fatalf("found %d by %q, %v", size, how, err)
		}
		t.Logf("a probe found %d slots", size)
		if config := kernelConfig(t); config != "" {
			root := hostWith(t, map[string]string{"proc/config.gz": zipped(t, config)})
			if configured, how, err := tableSize(k, root, openMailbox); err != nil || configured != size {
				t.Errorf("the configuration says %d by %q, %v; the probe %d", configured, how, err, size)
			}
		}
	}
	if after := nettest.Run(t, "ipvsadm", "-Sn"); after != before {
		t.Errorf("the probe changed IPVS:\n%swant\n%s", after, before)
	}
}

// kernelConfig returns the configuration of this kernel, if it can be had: the lab kernel prints its own.
func kernelConfig(t *testing.T) string {
	t.Helper()
	if nettest.Has(nettest.PlainClock) {
		return ""
	}
	return nettest.Run(t, "linux.uml", "--showconfig")
}
