package guard

import (
	"errors"
	"fmt"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"

	"github.com/ravel-lb/ravel"
	"github.com/ravel-lb/ravel/internal/iptables"
)

// set is one kernel set of ours.
type set struct {
	name   string
	ports  bool // of VIP, protocol and port, not of VIPs alone
	family iptables.Family
	expire uint32 // seconds after which an entry goes by itself; 0 is never
}

// kind is the kernel's name for what is in the set.
func (s set) kind() string {
	if s.ports {
		return "hash:ip,port"
	}
	return "hash:ip"
}

// maxElements is how many entries a set can have. The kernel gives a set room as it fills.
const maxElements = 1 << 20

// sets is what guard does to the kernel's sets. In a set of VIPs alone an entry has neither protocol nor port. Adding
// what is there, also a set, and removing what is gone are no errors.
type sets interface {
	create(s set) error
	list(s set) (entries []ravel.ServiceKey, there bool, err error)
	add(s set, entry ravel.ServiceKey) error
	del(s set, entry ravel.ServiceKey) error
	destroy(s set) error // errBusy while a rule uses it
}

var errBusy = errors.New("the set is in use")

// ipset is the kernel of this network namespace.
type ipset struct{ h *netlink.Handle }

var _ sets = ipset{}

// door calls the netlink library, whose ipset calls panic on any error that is no errno, and turns its errors into
// ours.
func door(fn func() error) (err error) {
	defer func() {
		if p := recover(); p != nil {
			err = fmt.Errorf("asking the kernel about sets: %v", p)
		}
	}()
	err = fn()
	switch {
	case errors.Is(err, nl.IPSetError(nl.IPSET_ERR_BUSY)), errors.Is(err, nl.IPSetError(nl.IPSET_ERR_REFERENCED)):
		return fmt.Errorf("%w: %w", errBusy, err)
	case errors.Is(err, nl.IPSetError(nl.IPSET_ERR_FIND_TYPE)), errors.Is(err, unix.EINVAL), errors.Is(err, unix.EOPNOTSUPP):
		return fmt.Errorf("this kernel has no such sets (modprobe ip_set_hash_ip ip_set_hash_ipport): %w", err)
	}
	return err
}

func (k ipset) create(s set) error {
	family := uint8(unix.AF_INET)
	if s.family == iptables.V6 {
		family = unix.AF_INET6
	}
	options := netlink.IpsetCreateOptions{Family: family, MaxElements: maxElements}
	if s.expire > 0 {
		options.Timeout = &s.expire
	}
	err := door(func() error { return k.h.IpsetCreate(s.name, s.kind(), options) })
	if !errors.Is(err, unix.EEXIST) && !errors.Is(err, nl.IPSetError(nl.IPSET_ERR_EXIST)) {
		return err
	}
	found, err := read(s.name)
	if err != nil {
		return err
	}
	if found.kind != s.kind() || found.family != family {
		return fmt.Errorf("a set of that name is a %s of family %d, want a %s of family %d", found.kind, found.family,
			s.kind(), family)
	}
	return nil
}

func (k ipset) list(s set) ([]ravel.ServiceKey, bool, error) {
	found, err := read(s.name)
	if errors.Is(err, unix.ENOENT) {
		return nil, false, nil
	}
	return found.entries, err == nil, err
}

// entry is a key as the library wants it. Replace makes adding what is there, and removing what is not, no error.
func (s set) entry(key ravel.ServiceKey) *netlink.IPSetEntry {
	e := &netlink.IPSetEntry{IP: key.VIP.AsSlice(), Replace: true}
	if s.ports {
		proto := uint8(key.Proto)
		e.Protocol, e.Port = &proto, &key.Port
	}
	if s.expire > 0 {
		e.Timeout = &s.expire
	}
	return e
}

func (k ipset) add(s set, key ravel.ServiceKey) error {
	return door(func() error { return k.h.IpsetAdd(s.name, s.entry(key)) })
}

func (k ipset) del(s set, key ravel.ServiceKey) error {
	e := s.entry(key)
	e.Timeout = nil
	err := door(func() error { return k.h.IpsetDel(s.name, e) })
	if errors.Is(err, unix.ENOENT) {
		return nil
	}
	return err
}

func (k ipset) destroy(s set) error {
	err := door(func() error { return k.h.IpsetDestroy(s.name) })
	if errors.Is(err, unix.ENOENT) {
		return nil
	}
	return err
}
