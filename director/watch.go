package director

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"syscall"
	"time"

	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"

	"github.com/ravel-lb/ravel"
)

// again is how long a watch that failed waits before it begins again.
const again = time.Second

// watch calls a function whenever the way of packets out of this host may have changed.
type watch struct {
	changed   func()
	log       *slog.Logger
	subscribe func() (socket, error)
	pause     time.Duration
	links     linkStates

	life context.Context // ends with close
	stop context.CancelFunc
	done sync.WaitGroup

	mu     sync.Mutex // guards the field below
	socket socket
}

// socket is what a watch reads from.
type socket interface {
	Receive() ([]syscall.NetlinkMessage, *unix.SockaddrNetlink, error)
	Close()
}

func subscribe() (socket, error) {
	s, err := nl.Subscribe(unix.NETLINK_ROUTE, unix.RTNLGRP_LINK,
		unix.RTNLGRP_IPV4_IFADDR, unix.RTNLGRP_IPV6_IFADDR, unix.RTNLGRP_IPV4_ROUTE, unix.RTNLGRP_IPV6_ROUTE)
	if err != nil {
		return nil, fmt.Errorf("watching routes: %w", err)
	}
	return s, nil
}

// newWatch starts a watch; close ends it.
func newWatch(changed func(), log *slog.Logger, subscribe func() (socket, error), pause time.Duration) (*watch, error) {
	socket, err := subscribe()
	if err != nil {
		return nil, err
	}
	w := &watch{changed: changed, log: log, subscribe: subscribe, pause: pause, links: linkStates{}, socket: socket}
	w.life, w.stop = context.WithCancel(context.Background())
	w.done.Go(func() {
		for socket != nil {
			err := w.read(socket)
			if w.life.Err() != nil {
				return
			}
			w.log.Error("routes are not watched; beginning again", "err", err)
			socket = w.reopen(socket)
		}
	})
	return w, nil
}

// read reads from a socket until that fails, as it does when it is closed, in one of many ways.
func (w *watch) read(socket socket) error {
	for {
		messages, _, err := socket.Receive()
		switch {
		case errors.Is(err, unix.EINTR):
		case errors.Is(err, unix.ENOBUFS):
			// Some were lost: anything may have changed.
			clear(w.links)
			w.changed()
		case err != nil:
			return err
		}
		matter := false
		for _, m := range messages {
			if w.links.matters(m.Header.Type, m.Data) {
				matter = true
			}
		}
		if matter {
			w.changed()
		}
	}
}

// reopen opens another socket in the place of one that failed, or returns nil after close. What happened in between
// was not seen, so anything may have changed.
func (w *watch) reopen(failed socket) socket {
	failed.Close()
	for {
		select {
		case <-w.life.Done():
			return nil
		case <-time.After(w.pause):
		}
		socket, err := w.subscribe()
		if err != nil {
			w.log.Error("routes are not watched; trying again", "err", err)
			continue
		}
		w.mu.Lock()
		defer w.mu.Unlock()
		if w.life.Err() != nil {
			socket.Close()
			return nil
		}
		w.socket = socket
		clear(w.links)
		w.changed()
		return socket
	}
}

func (w *watch) close() {
	w.stop()
	w.mu.Lock()
	w.socket.Close()
	w.mu.Unlock()
	w.done.Wait()
}

// linkStates are the links that messages told of, by index.
type linkStates map[int32]link

// link is what of a link decides where packets go.
type link struct {
	flags, master uint32
	state         byte // operstate (RFC 2863)
}

// linkOf reads a message about a link. Those of a bridge about its ports, which have a family, are not about links.
func linkOf(data []byte) (index int32, l link, ok bool) {
	if len(data) < unix.SizeofIfInfomsg || data[0] != unix.AF_UNSPEC {
		return 0, link{}, false
	}
	index = int32(binary.NativeEndian.Uint32(data[4:]))
	l.flags = binary.NativeEndian.Uint32(data[8:])
	for attrs := data[unix.SizeofIfInfomsg:]; len(attrs) >= unix.SizeofRtAttr; {
		size := int(binary.NativeEndian.Uint16(attrs))
		if size < unix.SizeofRtAttr || size > len(attrs) {
			return 0, link{}, false
		}
		value := attrs[unix.SizeofRtAttr:size]
		switch kind := binary.NativeEndian.Uint16(attrs[2:]); {
		case kind == unix.IFLA_OPERSTATE && len(value) == 1:
			l.state = value[0]
		case kind == unix.IFLA_MASTER && len(value) == 4:
			l.master = binary.NativeEndian.Uint32(value)
		}
		attrs = attrs[min(len(attrs), (size+unix.RTA_ALIGNTO-1)&^(unix.RTA_ALIGNTO-1)):]
	}
	return index, l, true
}

// matters reports whether a message of rtnetlink may change the way to a real server. Addresses without a subnet and
// what the kernel does for itself do not: VIPs come and go. Nor does a link of which the same was said before, as some
// drivers do over and over.
func (known linkStates) matters(kind uint16, data []byte) bool {
	switch kind {
	case unix.RTM_NEWLINK:
		index, l, ok := linkOf(data)
		if before, there := known[index]; !ok || there && before == l {
			return false
		}
		known[index] = l
		return true
	case unix.RTM_DELLINK:
		index, _, ok := linkOf(data)
		delete(known, index)
		return ok
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
			// An IPv6 address without a subnet comes with such a route to itself; host routes of ours are looked around.
			whole := length == bits(family)
			return !whole || origin != ravel.RouteProtocol && (family != unix.AF_INET6 || origin != unix.RTPROT_KERNEL)
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
