package fleet

import (
	"errors"
	"fmt"

	"github.com/ravel-lb/ravel/lab/topology"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// down sets a link of the calling thread's network down.
func down(name string) error {
	link, err := netlink.LinkByName(name)
	if err != nil {
		return err
	}
	return netlink.LinkSetDown(link)
}

// CutLink pulls the cable of an interface: no packet passes it. If the other end is a switch's port, the node sees that
// the carrier is lost; else the other end sees that, and the node's own interface is down. RestoreLink undoes it.
func (f *Fleet) CutLink(node, iface string) error {
	end, err := f.cuttable(node, iface)
	if err != nil {
		return err
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	if _, already := f.cuts[end]; already {
		return nil
	}
	err = f.Node(end.Node).Do(func() error {
		saved, err := save(end.Interface)
		if err != nil {
			return err
		}
		f.cuts[end] = saved
		return down(end.Interface)
	})
	if err != nil {
		return fmt.Errorf("cutting %s:%s: %w", node, iface, err)
	}
	return nil
}

// RestoreLink plugs a cable in again that CutLink pulled, with the addresses and static routes that its interface had.
func (f *Fleet) RestoreLink(node, iface string) error {
	end, err := f.cuttable(node, iface)
	if err != nil {
		return err
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	saved, ok := f.cuts[end]
	if !ok {
		return nil
	}
	if err := f.Node(end.Node).Do(func() error { return saved.restore(end.Interface) }); err != nil {
		return fmt.Errorf("restoring %s:%s: %w", node, iface, err)
	}
	delete(f.cuts, end)
	return nil
}

// cuttable returns the end of a link that is set down to cut it: a switch's port loses nothing by it.
func (f *Fleet) cuttable(node, iface string) (topology.Endpoint, error) {
	end := topology.Endpoint{Node: node, Interface: iface}
	peer, ok := f.links[end]
	if !ok {
		return end, fmt.Errorf("there is no link at %s", end)
	}
	isPort, err := f.isPort(peer)
	if err == nil && isPort {
		end = peer
	}
	return end, err
}

// settings are what an interface loses when it is set down: IPv6 addresses, and static routes of both families.
type settings struct {
	addrs  []netlink.Addr
	routes []netlink.Route
}

func save(name string) (settings, error) {
	link, err := netlink.LinkByName(name)
	if err != nil {
		return settings{}, err
	}
	var s settings
	if s.addrs, err = netlink.AddrList(link, netlink.FAMILY_V6); err != nil {
		return s, err
	}
	for _, family := range []int{netlink.FAMILY_V4, netlink.FAMILY_V6} {
		routes, err := netlink.RouteList(link, family)
		if err != nil {
			return s, err
		}
		for _, r := range routes {
			if r.Protocol == unix.RTPROT_BOOT || r.Protocol == unix.RTPROT_STATIC {
				s.routes = append(s.routes, r)
			}
		}
	}
	return s, nil
}

func (s settings) restore(name string) error {
	link, err := netlink.LinkByName(name)
	if err != nil {
		return err
	}
	if err := netlink.LinkSetUp(link); err != nil {
		return err
	}
	var errs []error
	for _, a := range s.addrs {
		if a.IP.IsLinkLocalUnicast() {
			continue // the kernel makes it
		}
		a.Flags = unix.IFA_F_NODAD
		errs = append(errs, netlink.AddrReplace(link, &a))
	}
	for _, r := range s.routes {
		errs = append(errs, netlink.RouteReplace(&r))
	}
	return errors.Join(errs...)
}

// isPort reports whether an endpoint is a port of a bridge.
func (f *Fleet) isPort(e topology.Endpoint) (bool, error) {
	port := false
	err := f.Node(e.Node).Do(func() error {
		link, err := netlink.LinkByName(e.Interface)
		if err == nil {
			port = link.Attrs().MasterIndex != 0
		}
		return err
	})
	return port, err
}
