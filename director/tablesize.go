package director

import (
	"bufio"
	"compress/gzip"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"github.com/moby/ipvs"
	"golang.org/x/sys/unix"

	"github.com/ravel-lb/ravel"
	"github.com/ravel-lb/ravel/internal/maglev"
)

// errNoMH says that the scheduler mh is neither loaded nor built in, and cannot be loaded.
var errNoMH = errors.New("this kernel has no Maglev scheduler; load it with: modprobe ip_vs_mh")

// TableSize finds out how many slots this kernel's Maglev tables have, for Digests, and says how it is known: the path of
// the kernel's configuration, or "probe" where none can be read.
func (d *Director) TableSize(ctx context.Context) (slots int, how string, err error) {
	_, err = d.call(ctx, func(_ context.Context, k kernel) error {
		size, from, err := tableSize(k, "/", openMailbox)
		slots, how = int(size), from
		return err
	})
	if err != nil {
		return 0, "", err
	}
	d.tableSize.Store(int64(slots))
	return slots, how, nil
}

// tableSize returns the number of slots, from the configuration below root or by a probe.
//
// The probe makes a service of ours on a loopback address that has none, sends it datagrams of our own, sees which of
// its real servers, loopback addresses too, were picked, and removes it again; no packet leaves the host. What stays
// behind are some entries of IPVS's connection table, for 300 s. It needs NET_ADMIN, no more. Should the process die
// in the middle, the next Apply removes the service.
func tableSize(k kernel, root string, open func(netip.Addr) (mailbox, error)) (maglev.Size, string, error) {
	if size, path := configuredSize(root); size != 0 {
		return size, path, nil
	}
	size, err := probeSize(k, open)
	if err != nil {
		return 0, "", fmt.Errorf("finding the size of the kernel's Maglev tables: %w", err)
	}
	return size, "probe", nil
}

// configuredSize reads the size from the configuration that this kernel was built with, and tells where that is; 0 if
// there is none or it says nothing of the scheduler.
func configuredSize(root string) (maglev.Size, string) {
	paths := []string{"/proc/config.gz"}
	if release, err := os.ReadFile(filepath.Join(root, "/proc/sys/kernel/osrelease")); err == nil {
		if name := strings.TrimSpace(string(release)); name != "" && filepath.Base(name) == name {
			paths = append(paths, "/boot/config-"+name, "/lib/modules/"+name+"/config")
		}
	}
	for _, path := range paths {
		if size := readSize(filepath.Join(root, path)); size != 0 {
			return size, path
		}
	}
	return 0, ""
}

// readSize reads the size from one configuration. A kernel without the scheduler may be configured with a size too.
func readSize(path string) maglev.Size {
	file, err := os.Open(path)
	if err != nil {
		return 0
	}
	defer file.Close()
	var text io.Reader = file
	if strings.HasSuffix(path, ".gz") {
		if text, err = gzip.NewReader(file); err != nil {
			return 0
		}
	}
	scheduler, size := false, maglev.Size(0)
	const most = 16 << 20 // a configuration has some 300 kB
	for lines := bufio.NewScanner(io.LimitReader(text, most)); lines.Scan(); {
		switch name, value, _ := strings.Cut(strings.TrimSpace(lines.Text()), "="); name {
		case "CONFIG_IP_VS_MH":
			scheduler = value == "y" || value == "m"
		case "CONFIG_IP_VS_MH_TAB_INDEX":
			if index, err := strconv.Atoi(value); err == nil {
				size = maglev.SizeOf(index)
			}
		}
	}
	if !scheduler {
		return 0
	}
	return size
}

// What a probe does. Of 48 flows over 16 real servers no two of the ten sizes give each as many, but by a chance of far
// less than one in a million, and then the next try has other ports.
const (
	probeReals = 16
	probeFlows = 48
	probeTries = 5
)

// probeSize asks the kernel itself.
func probeSize(k kernel, open func(netip.Addr) (mailbox, error)) (size maglev.Size, err error) {
	for range probeTries {
		if size, err = probeOnce(k, open); !errors.Is(err, errDisturbed) {
			break
		}
	}
	return size, err
}

// errDisturbed is of a probe for which another address and other ports may help.
var errDisturbed = errors.New("somebody else was in the way of the probe")

func probeOnce(k kernel, open func(netip.Addr) (mailbox, error)) (size maglev.Size, err error) {
	// 127.82.0.0/16 is ours alone (0x52, as RouteProtocol); the kernel remembers flows of earlier probes for 300 s, so
	// that an address serves only once.
	vip := netip.AddrFrom4([4]byte{127, ravel.RouteProtocol, byte(rand.Uint32()), byte(rand.Uint32())})
	box, err := open(vip)
	if err != nil {
		return 0, fmt.Errorf("opening a socket on %s: %w", vip, err)
	}
	defer func() { err = errors.Join(err, box.Close()) }()

	v := probeService(netip.AddrPortFrom(vip, box.Port()))
	i := id{ServiceKey: v.Key}
	made := targetOf(v, func(ravel.RealServer) uint32 { return ipvs.ConnectionFlagLocalNode })
	switch err := k.NewService(i.full(made)); {
	case errors.Is(err, unix.ENOENT):
		return 0, errNoMH
	case errors.Is(err, unix.EEXIST):
		return 0, fmt.Errorf("adding %s: %w: %w", i, err, errDisturbed)
	case err != nil:
		return 0, fmt.Errorf("adding %s: %w", i, err)
	}
	defer func() {
		if gone := k.DelService(i.request()); gone != nil {
			err = errors.Join(err, fmt.Errorf("removing %s: %w", i, gone))
		}
	}()
	for _, r := range slices.Backward(made.reals) {
		if err := k.NewDestination(i.request(), r.destination()); err != nil {
			return 0, fmt.Errorf("adding %s to %s: %w", r.at, i, err)
		}
	}
	clients, err := box.Fill(probeFlows)
	if err != nil {
		return 0, fmt.Errorf("sending to %s: %w", i, err)
	}
	list, err := k.GetDestinations(i.request())
	if err != nil {
		return 0, fmt.Errorf("reading the real servers of %s: %w", i, err)
	}
	took := make([]int, len(made.reals))
	for _, d := range list {
		at, err := addrOf(d.Address)
		if err != nil {
			return 0, err
		}
		if n := made.find(netip.AddrPortFrom(at, d.Port)); n >= 0 {
			took[n] = d.ActiveConnections + d.InactiveConnections
		}
	}
	return sizeOf(v, clients, took)
}

// probeService is a service on an address, with as many real servers as a probe needs.
func probeService(at netip.AddrPort) ravel.VirtualService {
	v := ravel.VirtualService{
		Key:       ravel.ServiceKey{VIP: at.Addr(), Proto: ravel.UDP, Port: at.Port()},
		Scheduler: ravel.MH, Flags: ravel.HashPort,
	}
	addr := netip.AddrFrom4([4]byte{127, ravel.RouteProtocol + 1, 0, 1})
	for range probeReals {
		v.RealServers = append(v.RealServers, ravel.RealServer{Addr: addr, Weight: 1, LastWeight: 1})
		addr = addr.Next()
	}
	return v
}

// sizeOf returns the one size with which each of the service's real servers takes as many flows as it took.
func sizeOf(v ravel.VirtualService, clients []netip.AddrPort, took []int) (maglev.Size, error) {
	var fits []maglev.Size
	for _, size := range maglev.Sizes() {
		table, takes := maglev.Build(size, v), make([]int, len(v.RealServers))
		for _, client := range clients {
			if i, ok := table.Pick(client); ok {
				takes[i]++
			}
		}
		if slices.Equal(took, takes) {
			fits = append(fits, size)
		}
	}
	switch len(fits) {
	case 1:
		return fits[0], nil
	case 0:
		return 0, fmt.Errorf("of %d flows the real servers took %v, which no size explains: %w", len(clients), took, errDisturbed)
	}
	return 0, fmt.Errorf("the sizes %v all explain what the real servers took: %w", fits, errDisturbed)
}

// mailbox is a UDP socket for the datagrams of a probe, so that nobody else gets them.
type mailbox interface {
	// Port is the socket's port.
	Port() uint16
	// Fill sends it some datagrams, each from another port of this host, and tells from where.
	Fill(n int) ([]netip.AddrPort, error)
	Close() error
}

type udpMailbox struct{ *net.UDPConn }

// openMailbox opens a mailbox on a loopback address, on a port that is free there.
func openMailbox(addr netip.Addr) (mailbox, error) {
	conn, err := net.ListenUDP("udp4", net.UDPAddrFromAddrPort(netip.AddrPortFrom(addr, 0)))
	if err != nil {
		return nil, err
	}
	return udpMailbox{conn}, nil
}

func (m udpMailbox) at() netip.AddrPort { return m.LocalAddr().(*net.UDPAddr).AddrPort() }

func (m udpMailbox) Port() uint16 { return m.at().Port() }

func (m udpMailbox) Fill(n int) ([]netip.AddrPort, error) {
	clients := make([]netip.AddrPort, 0, n)
	for range n {
		// Sockets stay open until all have sent, so that no port is used twice.
		conn, err := net.ListenUDP("udp4", &net.UDPAddr{IP: net.IPv4(127, 0, 0, 1)})
		if err != nil {
			return nil, err
		}
		defer conn.Close()
		if _, err := conn.WriteToUDPAddrPort([]byte("ravel"), m.at()); err != nil {
			return nil, err
		}
		clients = append(clients, conn.LocalAddr().(*net.UDPAddr).AddrPort())
	}
	return clients, nil
}
