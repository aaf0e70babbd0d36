package main

import (
	"bufio"
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net/netip"
	"os"
	"strconv"

	"github.com/ravel-lb/ravel"
)

// connectionsFile is the kernel's table of IPVS connections. The first thread of a process may be in another network
// namespace than the others.
const connectionsFile = "/proc/thread-self/net/ip_vs_conn"

// connection is a flow that the kernel's IPVS knows.
type connection struct {
	service ravel.ServiceKey
	client  netip.AddrPort
	real    netip.Addr
	// live says that it is not about to end: the client has not closed it. What the real server does, a director does
	// not see.
	live bool
}

// kernelConnections gives each connection of the kernel to each until that says no, or ctx ends; all says that it got
// them all. A kernel without IPVS has none. Up to Linux 6.13 the time it takes grows with the square of their number.
func kernelConnections(ctx context.Context, each func(connection) bool) (all bool, err error) {
	f, err := os.Open(connectionsFile)
	if errors.Is(err, fs.ErrNotExist) {
		return true, nil
	}
	if err != nil {
		return false, fmt.Errorf("reading the kernel's connections: %w", err)
	}
	defer f.Close()
	if all, err = readConnections(ctx, f, each); err != nil {
		err = fmt.Errorf("reading the kernel's connections: %w", err)
	}
	return all, err
}

// readConnections reads what ip_vs_conn_seq_show (ip_vs_conn.c) writes. Lines that it does not understand, such as those
// of other protocols, it leaves out.
func readConnections(ctx context.Context, r io.Reader, each func(connection) bool) (all bool, err error) {
	lines := bufio.NewReader(r)
	for n := 0; ; n++ {
		if n%1024 == 0 && ctx.Err() != nil {
			return false, nil
		}
		line, err := lines.ReadSlice('\n')
		if c, ok := parseConnection(line); ok && err == nil && !each(c) {
			return false, nil
		}
		switch {
		case errors.Is(err, io.EOF):
			return true, nil
		case err != nil && !errors.Is(err, bufio.ErrBufferFull):
			return false, err
		}
	}
}

// parseConnection reads one line: protocol, client, VIP and real server each with a port, state, expiry.
func parseConnection(line []byte) (c connection, ok bool) {
	var words [8][]byte
	for i := range words {
		line = bytes.TrimLeft(line, " \t")
		end := bytes.IndexAny(line, " \t\n")
		if end <= 0 {
			return c, false
		}
		words[i], line = line[:end], line[end:]
	}
	switch string(words[0]) {
	case "TCP":
		c.service.Proto = ravel.TCP
	case "UDP":
		c.service.Proto = ravel.UDP
	default:
		return c, false
	}
	client, ok1 := parseHexAddrPort(words[1], words[2])
	vip, ok2 := parseHexAddrPort(words[3], words[4])
	to, ok3 := parseHexAddrPort(words[5], words[6])
	c.client, c.service.VIP, c.service.Port, c.real = client, vip.Addr(), vip.Port(), to.Addr()
	switch string(words[7]) {
	case "FIN_WAIT", "TIME_WAIT", "CLOSE", "CLOSE_WAIT", "LAST_ACK":
	default:
		c.live = true
	}
	return c, ok1 && ok2 && ok3
}

// parseHexAddrPort reads an address as IPVS writes it: IPv4 as eight hexadecimal digits, IPv6 in full, the port as four.
func parseHexAddrPort(addr, port []byte) (netip.AddrPort, bool) {
	p, err := strconv.ParseUint(string(port), 16, 16)
	if err != nil {
		return netip.AddrPort{}, false
	}
	if bytes.IndexByte(addr, ':') >= 0 {
		a, err := netip.ParseAddr(string(bytes.Trim(addr, "[]")))
		return netip.AddrPortFrom(a, uint16(p)), err == nil
	}
	n, err := strconv.ParseUint(string(addr), 16, 32)
	if err != nil || len(addr) != 8 {
		return netip.AddrPort{}, false
	}
	var b [4]byte
	binary.BigEndian.PutUint32(b[:], uint32(n))
	return netip.AddrPortFrom(netip.AddrFrom4(b), uint16(p)), true
}
