package ifaddr

import (
	"errors"
	"fmt"
	"math"
	"net"
	"net/netip"
	"os"
	"syscall"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/ravel-lb/ravel"
)

// kernel is what ifaddr does to the kernel. Adding what is there and removing what is gone are no errors.
type kernel interface {
	link(name string) (link, error) // errNoLink if it is not there
	aliased() ([]string, error)     // the names of the dummy links with our alias
	addLink(name string) error      // a dummy, down; errExists if the name is taken
	setAlias(index int) error
	setUp(index int) error
	delLink(index int) error // errNoLink if it is gone
	addrs() ([]addr, error)  // of all links, without the link-local ones of IPv6
	addAddr(index int, a netip.Addr) error
	delAddr(index int, a netip.Addr) error
	holes() ([]netip.Addr, error) // blackhole routes with our protocol number
	addHole(a netip.Addr) error
	delHole(a netip.Addr) error
	watch() (socket, error) // messages about links and addresses
}

var (
	errNoLink = errors.New("no such link")
	errExists = errors.New("a link of that name exists")
)

// link is a link as the kernel shows it.
type link struct {
	index int
	kind  string // "dummy", "veth", …
	alias string
	up    bool
	bare  bool // it holds no address but link-local ones
}

// ours reports whether Ravel made the link. A dummy without alias that is down and bare is what a crash between
// making and naming it leaves, so that one is taken over.
func (l link) ours() bool {
	return l.kind == "dummy" && (l.alias == alias || l.alias == "" && !l.up && l.bare)
}

// addr is an address on a link.
type addr struct {
	addr  netip.Addr
	index int
	link  string
}

// holeMetric is not 0, so that a route of somebody else to the same address is neither hit nor in the way.
const holeMetric = 1

// netlinkKernel is the kernel of this network namespace.
type netlinkKernel struct{ h *netlink.Handle }

var _ kernel = netlinkKernel{}

// newNetlink returns the kernel by a handle that opens a socket for each request.
func newNetlink() netlinkKernel { return netlinkKernel{&netlink.Handle{}} }

// byIndex names a link by its index only.
func byIndex(index int) netlink.Link {
	return &netlink.Dummy{LinkAttrs: netlink.LinkAttrs{Index: index}}
}

// errno turns the kernel's words for a missing link into errNoLink, and drops err if it is one of fine.
func errno(err error, fine ...syscall.Errno) error {
	for _, e := range fine {
		if errors.Is(err, e) {
			return nil
		}
	}
	if errors.Is(err, unix.ENODEV) || errors.As(err, &netlink.LinkNotFoundError{}) {
		return fmt.Errorf("%w: %w", errNoLink, err)
	}
	return err
}

// dump reads a list again while the kernel changes it under the reader, within reason.
func dump[T any](read func() ([]T, error)) (list []T, err error) {
	for range 5 {
		if list, err = read(); !errors.Is(err, netlink.ErrDumpInterrupted) {
			return list, err
		}
	}
	return nil, err
}

func (k netlinkKernel) link(name string) (link, error) {
	found, err := k.h.LinkByName(name)
	if err != nil {
		return link{}, errno(err)
	}
	attrs := found.Attrs()
	on, err := dump(func() ([]netlink.Addr, error) { return k.h.AddrList(found, netlink.FAMILY_ALL) })
	if err != nil {
		return link{}, errno(err)
	}
	bare := true
	for _, a := range on {
		bare = bare && a.IP.IsLinkLocalUnicast()
	}
	return link{attrs.Index, found.Type(), attrs.Alias, attrs.Flags&net.FlagUp != 0, bare}, nil
}

func (k netlinkKernel) aliased() ([]string, error) {
	list, err := dump(k.h.LinkList)
	if err != nil {
		return nil, err
	}
	var names []string
	for _, l := range list {
		if l.Type() == "dummy" && l.Attrs().Alias == alias {
			names = append(names, l.Attrs().Name)
		}
	}
	return names, nil
}

func (k netlinkKernel) addLink(name string) error {
	attrs := netlink.NewLinkAttrs()
	attrs.Name = name
	err := k.h.LinkAdd(&netlink.Dummy{LinkAttrs: attrs})
	if errors.Is(err, unix.EEXIST) {
		return errExists
	}
	if errors.Is(err, unix.EOPNOTSUPP) {
		return fmt.Errorf("this kernel has no dummy links (modprobe dummy): %w", err)
	}
	if err != nil {
		return err
	}
	// No link-local address, and IPv6 even where the host's default is without. Both are settings of our own link:
	// they go with it, and a kernel without IPv6 has neither.
	for setting, value := range map[string]string{"addr_gen_mode": "1", "disable_ipv6": "0"} {
		_ = os.WriteFile("/proc/sys/net/ipv6/conf/"+name+"/"+setting, []byte(value), 0o644)
	}
	return nil
}

func (k netlinkKernel) setAlias(index int) error {
	return errno(k.h.LinkSetAlias(byIndex(index), alias))
}

func (k netlinkKernel) setUp(index int) error { return errno(k.h.LinkSetUp(byIndex(index))) }

func (k netlinkKernel) delLink(index int) error { return errno(k.h.LinkDel(byIndex(index))) }

func (k netlinkKernel) addrs() ([]addr, error) {
	list, err := dump(func() ([]netlink.Addr, error) { return k.h.AddrList(nil, netlink.FAMILY_ALL) })
	if err != nil {
		return nil, err
	}
	links, err := dump(k.h.LinkList)
	if err != nil {
		return nil, err
	}
	names := make(map[int]string, len(links))
	for _, l := range links {
		names[l.Attrs().Index] = l.Attrs().Name
	}
	var all []addr
	for _, a := range list {
		ip, ok := netip.AddrFromSlice(a.IP)
		if ip = ip.Unmap(); !ok || ip.Is6() && ip.IsLinkLocalUnicast() {
			continue
		}
		all = append(all, addr{ip, a.LinkIndex, names[a.LinkIndex]})
	}
	return all, nil
}

// prefix is an address as netlink wants it: a /32 or /128.
func prefix(a netip.Addr) *net.IPNet {
	return &net.IPNet{IP: a.AsSlice(), Mask: net.CIDRMask(a.BitLen(), a.BitLen())}
}

// addAddr adds a VIP so that the host never picks it as the source of its own connections: an IPv4 one by its scope,
// an IPv6 one as deprecated.
func (k netlinkKernel) addAddr(index int, a netip.Addr) error {
	request := &netlink.Addr{IPNet: prefix(a)}
	if a.Is4() {
		request.Scope = unix.RT_SCOPE_HOST
	} else {
		request.Flags = unix.IFA_F_NODAD | unix.IFA_F_NOPREFIXROUTE
		request.ValidLft, request.PreferedLft = math.MaxUint32, 0 // for ever, and deprecated at once
	}
	return errno(k.h.AddrAdd(byIndex(index), request), unix.EEXIST)
}

func (k netlinkKernel) delAddr(index int, a netip.Addr) error {
	return errno(k.h.AddrDel(byIndex(index), &netlink.Addr{IPNet: prefix(a)}), unix.EADDRNOTAVAIL, unix.ENOENT, unix.ENODEV)
}

func (k netlinkKernel) holes() ([]netip.Addr, error) {
	filter := &netlink.Route{Protocol: ravel.RouteProtocol, Type: unix.RTN_BLACKHOLE, Table: unix.RT_TABLE_MAIN}
	list, err := dump(func() ([]netlink.Route, error) {
		return k.h.RouteListFiltered(netlink.FAMILY_ALL, filter, netlink.RT_FILTER_PROTOCOL|netlink.RT_FILTER_TYPE|netlink.RT_FILTER_TABLE)
	})
	if err != nil {
		return nil, err
	}
	var all []netip.Addr
	for _, r := range list {
		if r.Dst == nil {
			continue
		}
		ip, ok := netip.AddrFromSlice(r.Dst.IP)
		if ones, bits := r.Dst.Mask.Size(); ok && ones == bits {
			all = append(all, ip.Unmap())
		}
	}
	return all, nil
}

// hole is the blackhole route for a VIP.
func hole(a netip.Addr) *netlink.Route {
	return &netlink.Route{
		Dst: prefix(a), Type: unix.RTN_BLACKHOLE, Protocol: ravel.RouteProtocol, Priority: holeMetric, Table: unix.RT_TABLE_MAIN,
	}
}

func (k netlinkKernel) addHole(a netip.Addr) error { return errno(k.h.RouteAdd(hole(a)), unix.EEXIST) }

func (k netlinkKernel) delHole(a netip.Addr) error {
	return errno(k.h.RouteDel(hole(a)), unix.ESRCH, unix.ENOENT)
}
