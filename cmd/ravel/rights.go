package main

import (
	"fmt"
	"os"
	"strconv"
	"strings"

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

// mayListen refuses a port that this process has not the right to listen on (ip(7), ip_unprivileged_port_start).
func mayListen(flag string, port int) error {
	if port <= 0 {
		return nil
	}
	first := 1024
	if b, err := os.ReadFile("/proc/sys/net/ipv4/ip_unprivileged_port_start"); err == nil {
		if n, err := strconv.Atoi(strings.TrimSpace(string(b))); err == nil {
			first = n
		}
	}
	may, err := hasCapability(unix.CAP_NET_BIND_SERVICE)
	if err != nil || may || port >= first {
		return err
	}
	return usageError{fmt.Errorf("--%s: port %d is below %d: give this process CAP_NET_BIND_SERVICE, or set a higher port; nothing was done", flag, port, first)}
}
