package main

import (
	"errors"
	"fmt"
	"net/netip"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

// listenFault says what to do about an address that could not be listened on: setting is the flag that names it.
func listenFault(setting, at string, err error) error {
	port := at[strings.LastIndex(at, ":")+1:]
	// Not all that listen wrap the cause.
	is := func(cause syscall.Errno) bool {
		return errors.Is(err, cause) || strings.Contains(err.Error(), cause.Error())
	}
	switch {
	case is(syscall.EADDRINUSE):
		return fmt.Errorf("%w; ss -lntup 'sport = :%s' shows who has the port: stop that, or set another --%s", err, port, setting)
	case is(syscall.EADDRNOTAVAIL):
		return fmt.Errorf("%w; give this host that address, or set another --%s", err, setting)
	}
	return err
}

// laterPorts returns an error where a port is taken that is listened on later: that of probes, when redirects are there,
// and that of BGP, when there are peers.
func (s *values) laterPorts() error {
	if s.health.IsValid() {
		if err := bindable(s.health); err != nil {
			return listenFault("health-listen", s.health.String(), fmt.Errorf("listening for probes on %s: %w", s.health, err))
		}
	}
	if s.bgpPort == 0 {
		return nil
	}
	addrs := s.bgpListen
	if len(addrs) == 0 {
		addrs = []netip.Addr{netip.IPv4Unspecified()}
	}
	for _, addr := range addrs {
		at := netip.AddrPortFrom(addr, uint16(s.bgpPort))
		if err := bindable(at); err != nil {
			return listenFault("bgp-port", at.String(), fmt.Errorf("listening for BGP on %s: %w", at, err))
		}
	}
	return nil
}

// bindable reports, as an error, that a TCP address cannot be bound. It does not listen: who connected in the meantime
// would take that for an answer.
func bindable(at netip.AddrPort) error {
	family, to := unix.AF_INET6, unix.Sockaddr(&unix.SockaddrInet6{Port: int(at.Port()), Addr: at.Addr().As16()})
	if at.Addr().Is4() {
		family, to = unix.AF_INET, &unix.SockaddrInet4{Port: int(at.Port()), Addr: at.Addr().As4()}
	}
	fd, err := unix.Socket(family, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil // a host without the family; whoever listens finds what to do
	}
	defer func() { _ = unix.Close(fd) }()
	// As Go's listeners have it: connections of an earlier process that are not over yet do not count.
	if err := unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_REUSEADDR, 1); err != nil {
		return err
	}
	return unix.Bind(fd, to)
}
