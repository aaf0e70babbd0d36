package ifaddr

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"sync"
	"syscall"
	"time"

	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"
)

const (
	again  = time.Second            // between a watch that failed and the next
	gather = 50 * time.Millisecond  // in which what is told together is looked at together
	atMost = 500 * time.Millisecond // between two calls for an Apply: another program may undo each
	buffer = 4 << 20                // bytes of messages that the kernel keeps for us
)

// socket is what a watch reads from.
type socket interface {
	Receive() ([]syscall.NetlinkMessage, *unix.SockaddrNetlink, error)
	Close()
}

func (k netlinkKernel) watch() (socket, error) {
	s, err := nl.Subscribe(unix.NETLINK_ROUTE, unix.RTNLGRP_LINK, unix.RTNLGRP_IPV4_IFADDR, unix.RTNLGRP_IPV6_IFADDR)
	if err != nil {
		return nil, err
	}
	_ = s.SetReceiveBufferSize(buffer, true) // else it has the usual size, and what is lost is told
	return s, nil
}

// spot is an address on a link.
type spot struct {
	index int
	addr  netip.Addr
}

// news is what the kernel told since somebody looked.
type news struct {
	addrs map[spot]bool // whether the address is there, by the last that was told of it
	links map[int]bool
	lost  bool // messages were lost, or nobody listened
}

func newNews() *news { return &news{addrs: map[spot]bool{}, links: map[int]bool{}} }

func (n *news) empty() bool { return len(n.addrs) == 0 && len(n.links) == 0 && !n.lost }

// add notes a message of rtnetlink; what is not understood is left out.
func (n *news) add(kind uint16, data []byte) {
	switch kind {
	case unix.RTM_NEWLINK, unix.RTM_DELLINK:
		if len(data) >= unix.SizeofIfInfomsg && data[0] == unix.AF_UNSPEC {
			n.links[int(int32(binary.NativeEndian.Uint32(data[4:])))] = true
		}
	case unix.RTM_NEWADDR, unix.RTM_DELADDR:
		if len(data) < unix.SizeofIfAddrmsg {
			return
		}
		index := int(binary.NativeEndian.Uint32(data[4:]))
		var found netip.Addr
		for attrs := data[unix.SizeofIfAddrmsg:]; len(attrs) >= unix.SizeofRtAttr; {
			size := int(binary.NativeEndian.Uint16(attrs))
			if size < unix.SizeofRtAttr || size > len(attrs) {
				return
			}
			// IFA_ADDRESS is the peer's where there is one; IFA_LOCAL, which IPv6 mostly lacks, comes after it.
			if kind := binary.NativeEndian.Uint16(attrs[2:]); kind == unix.IFA_LOCAL || kind == unix.IFA_ADDRESS {
				if a, ok := netip.AddrFromSlice(attrs[unix.SizeofRtAttr:size]); ok {
					found = a.Unmap()
				}
			}
			attrs = attrs[min(len(attrs), (size+unix.RTA_ALIGNTO-1)&^(unix.RTA_ALIGNTO-1)):]
		}
		if found.IsValid() && !(found.Is6() && found.IsLinkLocalUnicast()) {
			n.addrs[spot{index, found}] = kind == unix.RTM_NEWADDR
		}
	}
}

// watch listens to what happens to links and addresses. One goroutine reads, so that the kernel never has to wait for
// an Apply; another compares with what Links hold.
type watch struct {
	links *Links
	life  context.Context // ends with close
	stop  context.CancelFunc
	done  sync.WaitGroup
	wake  chan struct{} // size 1: there is news

	mu     sync.Mutex // guards the fields below
	news   *news
	socket socket // nil while there is none
}

// newWatch begins to listen; what happens after its return is told.
func newWatch(l *Links) *watch {
	w := &watch{links: l, wake: make(chan struct{}, 1), news: newNews()}
	w.life, w.stop = context.WithCancel(context.Background())
	fault := w.open()
	w.done.Go(func() { w.listen(fault) })
	w.done.Go(w.compare)
	return w
}

// open opens the socket, and leaves none if that fails or the watch is closed.
func (w *watch) open() error {
	s, err := w.links.kernel.watch()
	if err != nil {
		return fmt.Errorf("watching links: %w", err)
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.life.Err() != nil {
		s.Close()
		return nil
	}
	w.socket = s
	return nil
}

// listen reads until close, with another socket when one fails. fault is why there is none at first.
func (w *watch) listen(fault error) {
	logged := ""
	for w.life.Err() == nil {
		w.mu.Lock()
		s := w.socket
		w.mu.Unlock()
		if s != nil {
			logged = ""
			fault = w.read(s)
			if w.life.Err() != nil {
				return
			}
			w.mu.Lock()
			w.socket = nil
			w.mu.Unlock()
			s.Close()
		}
		if fault != nil && fault.Error() != logged {
			logged = fault.Error()
			w.links.log.Warn("links are not watched, so that what others change is found late", "err", fault)
		}
		select {
		case <-w.life.Done():
			return
		case <-time.After(again):
		}
		if fault = w.open(); fault == nil {
			w.tell(func(n *news) { n.lost = true })
		}
	}
}

// read reads from a socket until that fails.
func (w *watch) read(s socket) error {
	for {
		messages, _, err := s.Receive()
		switch {
		case w.life.Err() != nil:
			return nil
		case errors.Is(err, unix.EINTR):
			continue
		case errors.Is(err, unix.ENOBUFS):
			w.tell(func(n *news) { n.lost = true })
			continue
		case err != nil:
			return err
		}
		w.tell(func(n *news) {
			for _, m := range messages {
				n.add(m.Header.Type, m.Data)
			}
		})
	}
}

// tell adds to the news.
func (w *watch) tell(add func(*news)) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if add(w.news); w.news.empty() {
		return
	}
	select {
	case w.wake <- struct{}{}:
	default: // it is awake
	}
}

// compare looks at the news until close.
func (w *watch) compare() {
	pause := func(d time.Duration) {
		select {
		case <-w.life.Done():
		case <-time.After(d):
		}
	}
	for {
		select {
		case <-w.life.Done():
			return
		case <-w.wake:
		}
		pause(gather)
		w.mu.Lock()
		news := w.news
		w.news = newNews()
		w.mu.Unlock()
		if w.life.Err() == nil && w.links.hear(news) {
			pause(atMost)
		}
	}
}

func (w *watch) close() {
	w.stop()
	w.mu.Lock()
	if w.socket != nil {
		w.socket.Close()
	}
	w.mu.Unlock()
	w.done.Wait()
}

// hear compares news with what is held and reports whether it called for an Apply. News is late: our own changes are
// among it, and older than what is held now. So the kernel has the last word, and is asked only where news differs.
func (l *Links) hear(n *news) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	if !l.known || l.index == 0 {
		return false // the next Apply reads the kernel anyway, or there is nothing to lose
	}
	differs := n.lost || n.links[l.index]
	for s, there := range n.addrs {
		differs = differs || s.index == l.index && l.held[s.addr] != there
	}
	if !differs {
		return false
	}
	err := l.compareLocked()
	if err == nil {
		return false
	}
	l.log.Warn("somebody changed our link", "link", l.name, "what", err)
	l.known = false
	select {
	case l.changed <- struct{}{}:
	default: // the signal before is not taken yet
	}
	return true
}

// compareLocked returns what is not as the last Apply left it.
func (l *Links) compareLocked() error {
	found, err := l.kernel.link(l.name)
	if err != nil {
		return err
	}
	if found.index != l.index || !found.ours() || !found.up {
		return fmt.Errorf("it is another one, or down")
	}
	all, err := l.kernel.addrs()
	if err != nil {
		return err
	}
	held := map[netip.Addr]bool{}
	for _, a := range all {
		if a.index == l.index {
			held[a.addr] = true
		}
	}
	if !maps.Equal(held, l.held) {
		return fmt.Errorf("it has %d addresses, not the %d that were put there", len(held), len(l.held))
	}
	return nil
}

// Changed says that others took an address or the link away, or added one: a value is sent, never more than one ahead
// and no more than two a second, and the next Apply reads the kernel again and mends it. Nothing is sent before the
// first Apply and after Close. What it cannot tell of, because the kernel's messages are not to be had, Resync finds.
func (l *Links) Changed() <-chan struct{} { return l.changed }

// Close ends the watch and waits for it. What is held stays. Apply goes on to work, without Changed.
func (l *Links) Close() error {
	l.mu.Lock()
	w := l.watch
	l.watch, l.closed = nil, true
	l.mu.Unlock()
	if w != nil {
		w.close()
	}
	return nil
}
