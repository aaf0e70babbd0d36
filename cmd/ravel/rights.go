package main

import (
	"fmt"

	"golang.org/x/sys/unix"
)

// hasCapability reports whether this process has a capability (capabilities(7)) in its effective set.
func hasCapability(capability uint) (bool, error) {
	header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var data [2]unix.CapUserData // version 3 has 64 bits
	if err := unix.Capget(&header, &data[0]); err != nil {
		return false, fmt.Errorf("reading this process's capabilities: %w", err)
	}
	return data[capability/32].Effective>>(capability%32)&1 != 0, nil
}

// mayChange refuses, before anything is touched, a command that changes the kernel and has not the right to.
func mayChange(command string) error {
	may, err := hasCapability(unix.CAP_NET_ADMIN)
	if err != nil {
		return err
	}
	if !may {
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
