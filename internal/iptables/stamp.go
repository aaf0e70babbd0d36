package iptables

import (
	"encoding/binary"
	"fmt"
	"hash/fnv"
	"unsafe"

	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"
)

// Stamp returns a number that tells whether anybody changed the rules since another one was asked for: with iptables-nft
// it is another one after every change of whatever table; with iptables-legacy after every change of this table that
// left another number of rules, or rules of another size. It runs no program, waits for no lock and costs the same
// however many rules there are: some microseconds.
func (t *Tables) Stamp(table string) (uint64, error) {
	if t.variant == NFT {
		stamp, err := generation()
		if err != nil {
			return 0, fmt.Errorf("asking for the generation of nf_tables: %w", err)
		}
		return stamp, nil
	}
	if there, err := t.holds(table); err != nil || !there {
		return 0, err
	}
	stamp, err := info(t.family, table)
	if err != nil {
		return 0, fmt.Errorf("asking for the size of %s %s: %w", t.family, table, err)
	}
	return stamp, nil
}

// From include/uapi/linux/netfilter/nf_tables.h and nfnetlink.h.
const (
	nfTables = 10 // NFNL_SUBSYS_NFTABLES
	getGen   = 16 // NFT_MSG_GETGEN
	genID    = 1  // NFTA_GEN_ID
)

// generation asks for the number that nf_tables counts its transactions by.
func generation() (uint64, error) {
	request := nl.NewNetlinkRequest(nfTables<<8|getGen, 0)
	request.AddData(&nl.Nfgenmsg{NfgenFamily: unix.AF_UNSPEC, Version: nl.NFNETLINK_V0})
	messages, err := request.Execute(unix.NETLINK_NETFILTER, 0)
	if err != nil {
		return 0, err
	}
	for _, m := range messages {
		if id, ok := parseGeneration(m); ok {
			return uint64(id), nil
		}
	}
	return 0, unix.EPROTO
}

// parseGeneration reads one answer to NFT_MSG_GETGEN: four bytes of header, then attributes.
func parseGeneration(m []byte) (id uint32, ok bool) {
	if len(m) < nl.SizeofNfgenmsg {
		return 0, false
	}
	for b := m[nl.SizeofNfgenmsg:]; len(b) >= unix.SizeofNlAttr; {
		size, kind := int(binary.NativeEndian.Uint16(b)), binary.NativeEndian.Uint16(b[2:])&nl.NLA_TYPE_MASK
		if size < unix.SizeofNlAttr || size > len(b) {
			return 0, false
		}
		if value := b[unix.SizeofNlAttr:size]; kind == genID && len(value) == 4 {
			return binary.BigEndian.Uint32(value), true
		}
		b = b[min((size+3)&^3, len(b)):]
	}
	return 0, false
}

// getInfo is IPT_SO_GET_INFO, and IP6T_SO_GET_INFO, of include/uapi/linux/netfilter_ipv[46]/ip6?_tables.h.
const getInfo = 64

// info is a hash of struct ipt_getinfo, whose IPv6 like has the same form: the table's name, 32 bytes, which hooks it
// has, where the rules of each begin, how many rules there are and how many bytes they take.
func info(f Family, table string) (uint64, error) {
	domain, level := unix.AF_INET, unix.IPPROTO_IP
	if f == V6 {
		domain, level = unix.AF_INET6, unix.IPPROTO_IPV6
	}
	fd, err := unix.Socket(domain, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.IPPROTO_RAW)
	if err != nil {
		return 0, err
	}
	defer func() { _ = unix.Close(fd) }()
	var answer [32 + 4 + 5*4 + 5*4 + 4 + 4]byte
	copy(answer[:31], table)
	size := uint32(len(answer))
	_, _, errno := unix.Syscall6(unix.SYS_GETSOCKOPT, uintptr(fd), uintptr(level), getInfo,
		uintptr(unsafe.Pointer(&answer)), uintptr(unsafe.Pointer(&size)), 0)
	if errno != 0 {
		return 0, errno
	}
	h := fnv.New64a()
	_, _ = h.Write(answer[:])
	return h.Sum64(), nil
}
