package guard

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"syscall"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"

	"github.com/ravel-lb/ravel"
)

// contents is what the kernel says of one set.
type contents struct {
	kind    string // "hash:ip", …
	family  uint8  // AF_INET or AF_INET6
	entries []ravel.ServiceKey
}

// read asks the kernel for one set. The library has a call for it, which logs every attribute that a newer kernel
// sends, starts a goroutine for each list of attributes, and panics when the dump is interrupted; so it only carries
// the messages here. The error is ENOENT if there is no such set.
func read(name string) (contents, error) {
	var messages [][]byte
	var err error
	for range 5 { // again while the set changes under the reader, within reason
		req := nl.NewNetlinkRequest(nl.IPSET_CMD_LIST|unix.NFNL_SUBSYS_IPSET<<8, nl.GetIpsetFlags(nl.IPSET_CMD_LIST))
		req.AddData(&nl.Nfgenmsg{NfgenFamily: unix.AF_NETLINK, Version: nl.NFNETLINK_V0})
		req.AddData(nl.NewRtAttr(nl.IPSET_ATTR_PROTOCOL, nl.Uint8Attr(nl.IPSET_PROTOCOL)))
		req.AddData(nl.NewRtAttr(nl.IPSET_ATTR_SETNAME, nl.ZeroTerminated(name)))
		if messages, err = req.Execute(unix.NETLINK_NETFILTER, 0); !errors.Is(err, netlink.ErrDumpInterrupted) {
			break
		}
	}
	var errno syscall.Errno
	if errors.As(err, &errno) && errno >= nl.IPSET_ERR_PRIVATE {
		err = nl.IPSetError(errno)
	}
	if err != nil {
		return contents{}, err
	}
	var c contents
	for _, m := range messages {
		if err := c.parse(m); err != nil {
			return contents{}, fmt.Errorf("reading set %s: %w", name, err)
		}
	}
	return c, nil
}

var errShort = errors.New("a netlink message is cut short")

// attributes calls fn for each attribute of b, with the flags taken off its type.
func attributes(b []byte, fn func(kind uint16, value []byte) error) error {
	for len(b) >= unix.SizeofNlAttr {
		size, kind := int(binary.NativeEndian.Uint16(b)), binary.NativeEndian.Uint16(b[2:])&nl.NLA_TYPE_MASK
		if size < unix.SizeofNlAttr || size > len(b) {
			return errShort
		}
		if err := fn(kind, b[unix.SizeofNlAttr:size]); err != nil {
			return err
		}
		b = b[min((size+3)&^3, len(b)):]
	}
	return nil
}

// parse adds one message of a dump (include/uapi/linux/netfilter/ipset/ip_set.h).
func (c *contents) parse(message []byte) error {
	if len(message) < nl.SizeofNfgenmsg {
		return errShort
	}
	return attributes(message[nl.SizeofNfgenmsg:], func(kind uint16, value []byte) error {
		switch kind {
		case nl.IPSET_ATTR_TYPENAME:
			c.kind = unix.ByteSliceToString(value)
		case nl.IPSET_ATTR_FAMILY:
			if len(value) < 1 {
				return errShort
			}
			c.family = value[0]
		case nl.IPSET_ATTR_ADT:
			return attributes(value, func(_ uint16, value []byte) error {
				entry, err := parseEntry(value)
				if err == nil {
					c.entries = append(c.entries, entry)
				}
				return err
			})
		}
		return nil
	})
}

// parseEntry reads one entry.
func parseEntry(b []byte) (key ravel.ServiceKey, err error) {
	err = attributes(b, func(kind uint16, value []byte) error {
		switch kind {
		case nl.IPSET_ATTR_IP:
			return attributes(value, func(_ uint16, value []byte) error {
				a, ok := netip.AddrFromSlice(value)
				if !ok {
					return fmt.Errorf("an address has %d bytes", len(value))
				}
				key.VIP = a
				return nil
			})
		case nl.IPSET_ATTR_PROTO:
			if len(value) < 1 {
				return errShort
			}
			key.Proto = ravel.Proto(value[0])
		case nl.IPSET_ATTR_PORT:
			if len(value) < 2 {
				return errShort
			}
			key.Port = binary.BigEndian.Uint16(value)
		}
		return nil
	})
	return key, err
}
