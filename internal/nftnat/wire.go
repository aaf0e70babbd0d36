package nftnat

import (
	"encoding/binary"
	"errors"
	"fmt"
	"syscall"

	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"
)

// Of include/uapi/linux/netfilter/nfnetlink.h and nf_tables.h.
const (
	subsystem = 10 // NFNL_SUBSYS_NFTABLES

	batchBegin, batchEnd = 16, 17 // NFNL_MSG_BATCH_BEGIN and _END

	newTable, getTable, delTable = 0, 1, 2
	newChain                     = 3
	newRule                      = 6
	newSet                       = 9
	newElements, delElements     = 12, 14

	listElem  = 1 // NFTA_LIST_ELEM
	dataValue = 1 // NFTA_DATA_VALUE
)

// attr is one netlink attribute.
func attr(kind uint16, value []byte) []byte {
	b := make([]byte, 4, 4+len(value)+3)
	binary.NativeEndian.PutUint16(b, uint16(4+len(value)))
	binary.NativeEndian.PutUint16(b[2:], kind)
	b = append(b, value...)
	return append(b, make([]byte, -len(b)&3)...)
}

// nest is an attribute made of attributes.
func nest(kind uint16, parts ...[]byte) []byte {
	var all []byte
	for _, p := range parts {
		all = append(all, p...)
	}
	return attr(kind|unix.NLA_F_NESTED, all)
}

func text(kind uint16, s string) []byte { return attr(kind, append([]byte(s), 0)) }

func number(kind uint16, n uint32) []byte { return attr(kind, binary.BigEndian.AppendUint32(nil, n)) }

// value is data in a register's form.
func value(kind uint16, b []byte) []byte { return nest(kind, attr(dataValue, b)) }

// expr is one expression of a rule.
func expr(name string, parts ...[]byte) []byte {
	return nest(listElem, text(1, name), nest(2, parts...))
}

// batch is a transaction: all of its messages take effect at once, or none.
type batch struct {
	family uint8 // unix.NFPROTO_IPV4 or IPV6
	b      []byte
	seq    uint32
	last   int // where the last message begins
}

func newBatch(family uint8) *batch {
	t := &batch{family: family}
	t.message(batchBegin, 0, unix.NFPROTO_UNSPEC, subsystem, nil)
	return t
}

func (t *batch) message(kind, flags uint16, family uint8, resource uint16, attrs []byte) {
	t.last = len(t.b)
	t.seq++
	t.b = binary.NativeEndian.AppendUint32(t.b, uint32(unix.SizeofNlMsghdr+4+len(attrs)))
	t.b = binary.NativeEndian.AppendUint16(t.b, kind)
	t.b = binary.NativeEndian.AppendUint16(t.b, flags|unix.NLM_F_REQUEST)
	t.b = binary.NativeEndian.AppendUint32(t.b, t.seq)
	t.b = binary.NativeEndian.AppendUint32(t.b, 0)
	t.b = append(t.b, family, unix.NFNETLINK_V0)
	t.b = binary.BigEndian.AppendUint16(t.b, resource)
	t.b = append(t.b, attrs...)
}

// add appends a message of nf_tables.
func (t *batch) add(kind, flags uint16, parts ...[]byte) {
	var attrs []byte
	for _, p := range parts {
		attrs = append(attrs, p...)
	}
	t.message(subsystem<<8|kind, flags, t.family, 0, attrs)
}

// timeout bounds the wait for the kernel's answer.
const timeout = 10

// send has the kernel do the transaction. The kernel answers to each message at fault, and to the last one.
func (t *batch) send() error {
	// The last message wants an answer.
	flags := t.b[t.last+6:]
	binary.NativeEndian.PutUint16(flags, binary.NativeEndian.Uint16(flags)|unix.NLM_F_ACK)
	last := t.seq
	t.message(batchEnd, 0, unix.NFPROTO_UNSPEC, subsystem, nil)

	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.NETLINK_NETFILTER)
	if err != nil {
		return err
	}
	defer func() { _ = unix.Close(fd) }()
	room := len(t.b) + 1<<20
	err = errors.Join(
		unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_SNDBUFFORCE, room),
		unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, 1<<20),
		unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &unix.Timeval{Sec: timeout}),
		unix.Bind(fd, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}),
	)
	if err != nil {
		return err
	}
	if err := unix.Sendto(fd, t.b, 0, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}); err != nil {
		return err
	}
	buffer := make([]byte, 1<<16)
	for {
		n, _, err := unix.Recvfrom(fd, buffer, 0)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil {
			return fmt.Errorf("waiting for the kernel: %w", err)
		}
		done, err := parseAnswers(buffer[:n], last)
		if done || err != nil {
			return err
		}
	}
}

var errShort = errors.New("a netlink message is cut short")

// parseAnswers reads what the kernel answers to a transaction whose last message has the number last.
func parseAnswers(b []byte, last uint32) (done bool, err error) {
	for len(b) >= unix.SizeofNlMsghdr {
		size := int(binary.NativeEndian.Uint32(b))
		if size < unix.SizeofNlMsghdr || size > len(b) {
			return false, errShort
		}
		if binary.NativeEndian.Uint16(b[4:]) == unix.NLMSG_ERROR {
			if size < unix.SizeofNlMsghdr+4 {
				return false, errShort
			}
			seq := binary.NativeEndian.Uint32(b[8:])
			if errno := -int32(binary.NativeEndian.Uint32(b[unix.SizeofNlMsghdr:])); errno != 0 {
				return false, fmt.Errorf("message %d: %w", seq, syscall.Errno(errno))
			}
			if seq == last {
				return true, nil
			}
		}
		b = b[min((size+3)&^3, len(b)):]
	}
	return false, nil
}

// there reports whether a table is in the kernel. Where nf_tables is not there, no table is.
func there(family uint8, table string) (bool, error) {
	request := nl.NewNetlinkRequest(subsystem<<8|getTable, 0)
	request.AddData(&nl.Nfgenmsg{NfgenFamily: family, Version: nl.NFNETLINK_V0})
	request.AddData(nl.NewRtAttr(1, nl.ZeroTerminated(table)))
	_, err := request.Execute(unix.NETLINK_NETFILTER, 0)
	switch {
	case errors.Is(err, unix.ENOENT), errors.Is(err, unix.EINVAL), errors.Is(err, unix.EOPNOTSUPP):
		return false, nil
	case err != nil:
		return false, fmt.Errorf("asking for table %s of nf_tables: %w", table, err)
	}
	return true, nil
}
