package main

import (
	"fmt"

	"golang.org/x/sys/unix"
)

// mayChange refuses, before anything is touched, a command that changes the kernel and has not the right to.
func mayChange(command string) error {
	header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var data [2]unix.CapUserData // version 3 has 64 bits
	if err := unix.Capget(&header, &data[0]); err != nil {
		return fmt.Errorf("reading this process's capabilities: %w", err)
	}
	if data[0].Effective>>unix.CAP_NET_ADMIN&1 == 0 {
		return usageError{fmt.Errorf("ravel %s lacks CAP_NET_ADMIN, to change links, rules and IPVS: run it as root, or give it "+
			"CAP_NET_ADMIN and CAP_NET_RAW; nothing was done", command)}
	}
	if command == directorRole || command == realserverRole {
		if err := besideOriginal("/proc"); err != nil {
			return usageError{fmt.Errorf("%w: stop it first (docs/migration.md); nothing was done", err)}
		}
	}
	return nil
}
