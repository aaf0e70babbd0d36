package director

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"

	"github.com/moby/ipvs"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/ravel-lb/ravel"
)

// kernel is what this package calls of the kernel's IPVS, one netlink request each.
//
// What it answers, as read in net/netfilter/ipvs/ip_vs_ctl.c: a service that is there cannot be made again (EEXIST),
// one that is not there can be neither changed nor removed nor given real servers (ESRCH), a scheduler that cannot be
// loaded is ENOENT. A real server that is there is EEXIST, one that is not ENOENT. The list of real servers of a
// service that is not there is empty.
type kernel interface {
	GetServices() ([]*ipvs.Service, error)
	GetService(*ipvs.Service) (*ipvs.Service, error)
	GetDestinations(*ipvs.Service) ([]*ipvs.Destination, error)
	NewService(*ipvs.Service) error
	UpdateService(*ipvs.Service) error
	DelService(*ipvs.Service) error
	NewDestination(*ipvs.Service, *ipvs.Destination) error
	UpdateDestination(*ipvs.Service, *ipvs.Destination) error
	DelDestination(*ipvs.Service, *ipvs.Destination) error
	Close()
}

var _ kernel = (*ipvs.Handle)(nil)

// errNoIPVS says that ip_vs is neither loaded nor built in.
var errNoIPVS = errors.New("this kernel has no IPVS; load it with: modprobe ip_vs")

// open opens the IPVS of this thread's network namespace. moby/ipvs asks for IPVS's netlink family once in the life of
// the process and keeps a failure for ever, so it is not called before the family is there. Asking for it makes the
// kernel load ip_vs if it can.
func open() (kernel, error) {
	if _, err := netlink.GenlFamilyGet("IPVS"); errors.Is(err, unix.ENOENT) {
		return nil, errNoIPVS
	} else if err != nil {
		return nil, fmt.Errorf("asking the kernel for IPVS: %w", err)
	}
	handle, err := ipvs.New("")
	if err != nil {
		return nil, fmt.Errorf("opening IPVS: %w", err)
	}
	return handle, nil
}

// id is what names a service in IPVS: a key or a firewall mark.
type id struct {
	ravel.ServiceKey
	mark uint32
	v6   bool // the family of a service by mark
}

// String returns the key as ServiceKey does, or "mark 7".
func (i id) String() string {
	if i.mark != 0 {
		return fmt.Sprintf("mark %d", i.mark)
	}
	return i.ServiceKey.String()
}

func idOf(s *ipvs.Service) (id, error) {
	if s.FWMark != 0 {
		return id{mark: s.FWMark, v6: s.AddressFamily == unix.AF_INET6}, nil
	}
	vip, err := addrOf(s.Address)
	if err != nil {
		return id{}, err
	}
	return id{ServiceKey: ravel.ServiceKey{VIP: vip, Proto: ravel.Proto(s.Protocol), Port: s.Port}}, nil
}

// request returns what names the service to the kernel.
func (i id) request() *ipvs.Service {
	if i.mark != 0 {
		s := &ipvs.Service{FWMark: i.mark, AddressFamily: unix.AF_INET}
		if i.v6 {
			s.AddressFamily = unix.AF_INET6
		}
		return s
	}
	return &ipvs.Service{
		Address: i.VIP.AsSlice(), AddressFamily: familyOf(i.VIP), Protocol: uint16(i.Proto), Port: i.Port,
	}
}

// full returns the whole of a service, to make or change it.
func (i id) full(s service) *ipvs.Service {
	r := i.request()
	r.SchedName, r.Flags, r.Timeout, r.Netmask = s.scheduler, s.flags, s.timeout, s.netmask
	return r
}

func familyOf(a netip.Addr) uint16 {
	if a.Is4() {
		return unix.AF_INET
	}
	return unix.AF_INET6
}

func addrOf(ip net.IP) (netip.Addr, error) {
	addr, ok := netip.AddrFromSlice(ip)
	if !ok {
		return addr, fmt.Errorf("address %v from the kernel: want 4 or 16 bytes", []byte(ip))
	}
	return addr, nil
}

// netmaskOf is the whole address: for IPv4 a mask in network byte order, for IPv6 a length.
func netmaskOf(a netip.Addr) uint32 {
	if a.Is4() {
		return binary.NativeEndian.Uint32([]byte{255, 255, 255, 255})
	}
	return 128
}

// readServices returns all services of the kernel. A dump is no snapshot: of a service that is in it twice, the first
// counts.
func readServices(k kernel) (map[id]*ipvs.Service, []id, error) {
	list, err := k.GetServices()
	if err != nil {
		return nil, nil, fmt.Errorf("reading the services of IPVS: %w", err)
	}
	services := make(map[id]*ipvs.Service, len(list))
	order := make([]id, 0, len(list))
	for _, s := range list {
		i, err := idOf(s)
		if err != nil {
			return nil, nil, fmt.Errorf("reading the services of IPVS: %w", err)
		}
		if services[i] == nil {
			services[i] = s
			order = append(order, i)
		}
	}
	slices.SortFunc(order, func(a, b id) int {
		if a.mark != b.mark {
			return int(int64(a.mark) - int64(b.mark))
		}
		return a.Compare(b.ServiceKey)
	})
	return services, order, nil
}

// readReals returns the real servers of a service as the kernel's list holds them, newest first.
func readReals(k kernel, i id) ([]real, []*ipvs.Destination, error) {
	list, err := k.GetDestinations(i.request())
	if err != nil {
		return nil, nil, fmt.Errorf("reading the real servers of %s: %w", i, err)
	}
	reals := make([]real, 0, len(list))
	raw := make([]*ipvs.Destination, 0, len(list))
	seen := make(map[netip.AddrPort]bool, len(list))
	for _, d := range list {
		addr, err := addrOf(d.Address)
		if err != nil {
			return nil, nil, fmt.Errorf("reading the real servers of %s: %w", i, err)
		}
		at := netip.AddrPortFrom(addr, d.Port)
		if seen[at] {
			continue
		}
		seen[at] = true
		r := real{
			at: at, weight: d.Weight, last: d.Weight, method: d.ConnectionFlags & ipvs.ConnectionFlagFwdMask,
			upper: d.UpperThreshold, lower: d.LowerThreshold,
		}
		if r.weight == 0 {
			r.last = unknown
		}
		reals, raw = append(reals, r), append(raw, d)
	}
	return reals, raw, nil
}
