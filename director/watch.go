package director

import (
	"encoding/binary"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"sync"

	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"
)

// watch calls a function whenever the way of packets out of this host may have changed.
type watch struct {
	socket *nl.NetlinkSocket
	done   sync.WaitGroup
}

func newWatch(changed func(), log *slog.Logger) (*watch, error) {
	socket, err := nl.Subscribe(unix.NETLINK_ROUTE, unix.RTNLGRP_LINK,
		unix.RTNLGRP_IPV4_IFADDR, unix.RTNLGRP_IPV6_IFADDR, unix.RTNLGRP_IPV4_ROUTE, unix.RTNLGRP_IPV6_ROUTE)
	if err != nil {
		return nil, fmt.Errorf("watching routes: %w", err)
	}
	w := &watch{socket: socket}
	w.done.Go(func() {
		for {
			messages, _, err := socket.Receive()
			switch {
			case errors.Is(err, os.ErrClosed):
				return
			case errors.Is(err, unix.ENOBUFS):
				// Some were lost: anything may have changed.
				changed()
			case err != nil:
				log.Error("routes are not watched any more", "err", err)
				return
			}
			for _, m := range messages {
				if matters(m.Header.Type, m.Data) {
					changed()
					break
				}
			}
		}
	})
	return w, nil
}

func (w *watch) close() {
	w.socket.Close()
	w.done.Wait()
}

// matters reports whether a message of rtnetlink may change the way to a real server. Addresses without a subnet and
// what the kernel does for itself do not: VIPs come and go.
func matters(kind uint16, data []byte) bool {
	switch kind {
	case unix.RTM_NEWLINK, unix.RTM_DELLINK:
		return true
	case unix.RTM_NEWADDR, unix.RTM_DELADDR:
		if len(data) < unix.SizeofIfAddrmsg {
			return false
		}
		family, length := data[0], data[1]
		return length < bits(family)
	case unix.RTM_NEWROUTE, unix.RTM_DELROUTE:
		if len(data) < unix.SizeofRtMsg {
			return false
		}
		family, length, origin, kind := data[0], data[1], data[5], data[7]
		flags := binary.NativeEndian.Uint32(data[8:])
		if flags&unix.RTM_F_CLONED != 0 {
			return false
		}
		switch kind {
		case unix.RTN_UNICAST:
			// An IPv6 address without a subnet comes with such a route to itself.
			return family != unix.AF_INET6 || length < bits(family) || origin != unix.RTPROT_KERNEL
		case unix.RTN_BLACKHOLE, unix.RTN_UNREACHABLE, unix.RTN_PROHIBIT, unix.RTN_THROW:
			return length < bits(family)
		}
	}
	return false
}

func bits(family byte) byte {
	if family == unix.AF_INET {
		return 32
	}
	return 128
}
