package check

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os/exec"
	"strings"
	"time"

	"github.com/moby/ipvs"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/ravel-lb/ravel"
)

// kernel is what is asked of the kernel other than by reading files. Nothing of it changes anything.
type kernel interface {
	links() ([]link, error)
	addrs() ([]addr, error)
	// route says how packets to an address leave.
	route(netip.Addr) (route, error)
	// entry returns the entry of the routing tables that an address meets.
	entry(netip.Addr) (entry, error)
	// services returns what IPVS holds. It is asked only where ip_vs is loaded.
	services() ([]service, error)
	// nft returns the chains of nf_tables. It is asked only where that is loaded.
	nft() ([]chain, error)
	// legacy returns one of ip_tables' tables as iptables-save prints it. It is asked only for one that is there.
	legacy(ctx context.Context, v6 bool, table string) (string, error)
	// program finds a program in PATH or where administrators' programs are.
	program(name string) (string, error)
	// version returns what a program prints when asked for its version.
	version(ctx context.Context, path string) (string, error)
	// writable returns why a file cannot be written, nil if it can.
	writable(path string) error
	// answers reports whether somebody answers on a unix socket.
	answers(socket string) bool
	// machine is the kernel's name for the processor, as uname -m.
	machine() (string, error)
}

var _ kernel = live{}

// link is a network device.
type link struct {
	index    int
	name     string
	kind     string // as ip link knows it: "dummy", "ipip"; "device" for hardware
	alias    string
	up       bool
	mtu      int
	external bool       // a tunnel that takes every packet which no other claims (collect_md)
	remote   netip.Addr // a tunnel's other end; the zero value is any
	local    netip.Addr
}

// addr is an address on a link.
type addr struct {
	prefix netip.Prefix // the address with the length of its subnet
	index  int
	link   string
}

// route is how packets leave.
type route struct {
	link    string
	gateway netip.Addr // the zero value is on-link
	source  netip.Addr // what they leave from; the zero value is not known
	local   bool       // the address is this host's
	mtu     int
}

// entry is an entry of the routing tables.
type entry struct {
	prefix   netip.Prefix // the zero value is the default route
	local    bool
	unicast  bool
	link     string
	gateway  netip.Addr
	protocol int
}

// service is a virtual service of IPVS.
type service struct {
	key  ravel.ServiceKey
	mark uint32 // not 0: the service is by firewall mark and has no key
	ours bool
}

// live is the kernel of this thread's network namespace.
type live struct{}

// errNoRoute says that packets to an address leave nowhere.
var errNoRoute = errors.New("no route")

// dump reads a list again while the kernel changes it under the reader, within reason. What was read in the last try
// counts even so: for a look it is good enough.
func dump[T any](read func() ([]T, error)) (list []T, err error) {
	for range 3 {
		if list, err = read(); !errors.Is(err, netlink.ErrDumpInterrupted) {
			return list, err
		}
	}
	return list, nil
}

func (live) links() ([]link, error) {
	list, err := dump(netlink.LinkList)
	if err != nil {
		return nil, fmt.Errorf("listing links: %w", err)
	}
	links := make([]link, 0, len(list))
	for _, l := range list {
		a := l.Attrs()
		found := link{
			index: a.Index, name: a.Name, kind: l.Type(), alias: a.Alias, up: a.Flags&net.FlagUp != 0, mtu: a.MTU,
		}
		switch t := l.(type) {
		case *netlink.Iptun:
			found.external, found.local, found.remote = t.FlowBased, address(t.Local), address(t.Remote)
		case *netlink.Ip6tnl:
			found.external, found.local, found.remote = t.FlowBased, address(t.Local), address(t.Remote)
		}
		links = append(links, found)
	}
	return links, nil
}

// address returns the zero value for what is no address, or the unspecified one.
func address(ip net.IP) netip.Addr {
	a, _ := netip.AddrFromSlice(ip)
	if a = a.Unmap(); a.IsValid() && !a.IsUnspecified() {
		return a
	}
	return netip.Addr{}
}

func (live) addrs() ([]addr, error) {
	list, err := dump(func() ([]netlink.Addr, error) { return netlink.AddrList(nil, netlink.FAMILY_ALL) })
	if err != nil {
		return nil, fmt.Errorf("listing addresses: %w", err)
	}
	names := map[int]string{}
	if links, err := dump(netlink.LinkList); err == nil {
		for _, l := range links {
			names[l.Attrs().Index] = l.Attrs().Name
		}
	}
	addrs := make([]addr, 0, len(list))
	for _, a := range list {
		ip, good := netip.AddrFromSlice(a.IP)
		if !good {
			continue
		}
		bits, _ := a.Mask.Size()
		found := addr{netip.PrefixFrom(ip.Unmap(), bits), a.LinkIndex, names[a.LinkIndex]}
		if found.link == "" {
			found.link = fmt.Sprintf("number %d", a.LinkIndex)
		}
		addrs = append(addrs, found)
	}
	return addrs, nil
}

// lookup asks for one route.
func lookup(to netip.Addr, fib bool) (netlink.Route, error) {
	list, err := netlink.RouteGetWithOptions(net.IP(to.AsSlice()), &netlink.RouteGetOptions{FIBMatch: fib})
	switch {
	case errors.Is(err, unix.ENETUNREACH), errors.Is(err, unix.EHOSTUNREACH), errors.Is(err, unix.EACCES), errors.Is(err, unix.EINVAL):
		// The last two are answers of prohibit and blackhole routes.
		return netlink.Route{}, errNoRoute
	case err != nil:
		return netlink.Route{}, fmt.Errorf("asking for the route to %s: %w", to, err)
	case len(list) == 0:
		return netlink.Route{}, errNoRoute
	}
	return list[0], nil
}

func (live) route(to netip.Addr) (route, error) {
	r, err := lookup(to, false)
	if err != nil {
		return route{}, err
	}
	if r.Type != unix.RTN_UNICAST && r.Type != unix.RTN_LOCAL {
		return route{}, errNoRoute
	}
	found := route{gateway: gateway(r, to), source: address(r.Src), local: r.Type == unix.RTN_LOCAL, mtu: r.MTU}
	if l, err := netlink.LinkByIndex(r.LinkIndex); err == nil {
		found.link = l.Attrs().Name
		if m := l.Attrs().MTU; found.mtu == 0 || m < found.mtu {
			found.mtu = m
		}
	}
	return found, nil
}

// gateway returns the router of a route to an address, none if the address is on-link: so it is behind a host route that
// leads to it through itself, as Ravel and some clouds make them.
func gateway(r netlink.Route, to netip.Addr) netip.Addr {
	if g := nextHop(r); g != to {
		return g
	}
	return netip.Addr{}
}

func nextHop(r netlink.Route) netip.Addr {
	if via, is := r.Via.(*netlink.Via); is {
		return address(via.Addr)
	}
	return address(r.Gw)
}

func (live) entry(to netip.Addr) (entry, error) {
	r, err := lookup(to, true)
	if err != nil {
		return entry{}, err
	}
	found := entry{
		local: r.Type == unix.RTN_LOCAL, unicast: r.Type == unix.RTN_UNICAST, gateway: gateway(r, to), protocol: int(r.Protocol),
	}
	if r.Dst != nil {
		if ip, good := netip.AddrFromSlice(r.Dst.IP); good {
			bits, _ := r.Dst.Mask.Size()
			found.prefix = netip.PrefixFrom(ip.Unmap(), bits)
		}
	}
	if l, err := netlink.LinkByIndex(r.LinkIndex); err == nil && r.LinkIndex != 0 {
		found.link = l.Attrs().Name
	}
	return found, nil
}

func (live) services() ([]service, error) {
	// Without the family, ipvs.New would remember for ever that there is none. With it, what it loads is there already.
	if _, err := netlink.GenlFamilyGet("IPVS"); err != nil {
		return nil, fmt.Errorf("asking the kernel for IPVS: %w", err)
	}
	handle, err := ipvs.New("")
	if err != nil {
		return nil, fmt.Errorf("opening IPVS: %w", err)
	}
	defer handle.Close()
	list, err := handle.GetServices()
	if err != nil {
		return nil, fmt.Errorf("listing the services of IPVS: %w", err)
	}
	services := make([]service, 0, len(list))
	for _, s := range list {
		found := service{mark: s.FWMark, ours: s.FWMark == 0 && ravel.SchedulerFlags(s.Flags)&ravel.Flag3 != 0}
		if s.FWMark == 0 {
			vip, _ := netip.AddrFromSlice(s.Address)
			found.key = ravel.ServiceKey{VIP: vip.Unmap(), Proto: ravel.Proto(s.Protocol), Port: s.Port}
		}
		services = append(services, found)
	}
	return services, nil
}

// programTime bounds one run of a program.
const programTime = 10 * time.Second

func run(ctx context.Context, path string, args ...string) (string, error) {
	ctx, cancel := context.WithTimeout(ctx, programTime)
	defer cancel()
	cmd := exec.CommandContext(ctx, path, args...)
	cmd.WaitDelay = time.Second
	out, err := cmd.Output()
	if err != nil {
		var exit *exec.ExitError
		if errors.As(err, &exit) && len(exit.Stderr) > 0 {
			return "", fmt.Errorf("running %s: %w: %s", path, err, strings.Join(strings.Fields(short(string(exit.Stderr))), " "))
		}
		return "", fmt.Errorf("running %s: %w", path, err)
	}
	return string(out), nil
}

func (k live) legacy(ctx context.Context, v6 bool, table string) (string, error) {
	name := "iptables"
	if v6 {
		name = "ip6tables"
	}
	path, err := k.program(name + "-legacy-save")
	if err != nil {
		if path, err = k.program(name + "-save"); err != nil {
			return "", err
		}
		if version, err := k.version(ctx, path); err != nil || strings.Contains(version, "nf_tables") {
			return "", fmt.Errorf("%s-legacy-save: %w", name, exec.ErrNotFound)
		}
	}
	return run(ctx, path, "-t", table)
}

func (live) program(name string) (string, error) {
	path, err := exec.LookPath(name)
	if err == nil {
		return path, nil
	}
	for _, dir := range []string{"/usr/sbin/", "/sbin/", "/usr/local/sbin/"} {
		if path, err := exec.LookPath(dir + name); err == nil {
			return path, nil
		}
	}
	return "", err
}

func (live) version(ctx context.Context, path string) (string, error) {
	return run(ctx, path, "--version")
}

func (live) writable(path string) error { return unix.Access(path, unix.W_OK) }

func (live) answers(socket string) bool {
	conn, err := net.DialTimeout("unix", socket, time.Second)
	if err != nil {
		return false
	}
	_ = conn.Close()
	return true
}

func (live) machine() (string, error) {
	var u unix.Utsname
	if err := unix.Uname(&u); err != nil {
		return "", fmt.Errorf("asking for the machine's name: %w", err)
	}
	return unix.ByteSliceToString(u.Machine[:]), nil
}
