package ifaddr

import (
	"cmp"
	"errors"
	"net/netip"
	"os"
	"slices"
	"sync"
	"syscall"

	"golang.org/x/sys/unix"
)

var errInjected = errors.New("injected")

// fakeKernel is a small honest kernel: links with addresses, and blackhole routes. It can fail at the nth call.
type fakeKernel struct {
	links  map[string]*fakeLink
	routes map[netip.Addr]bool
	next   int
	failAt int      // counts down at each change; the one that reaches 0 fails
	log    []string // the changes that were made, in ip's words
	calls  int      // all calls
	told   chan any // what a watch receives: messages, or an error; without it there is none
}

type fakeLink struct {
	link
	addrs map[netip.Addr]bool
}

var _ kernel = (*fakeKernel)(nil)

func newFake() *fakeKernel {
	return &fakeKernel{links: map[string]*fakeLink{}, routes: map[netip.Addr]bool{}, next: 1}
}

func (k *fakeKernel) fails() bool {
	k.calls++
	if k.failAt == 0 {
		return false
	}
	k.failAt--
	return k.failAt == 0
}

func (k *fakeKernel) byIndex(index int) *fakeLink {
	for _, l := range k.links {
		if l.index == index {
			return l
		}
	}
	return nil
}

func (k *fakeKernel) foreign(name, kind string, addrs ...netip.Addr) {
	l := &fakeLink{link: link{index: k.next, kind: kind, up: true}, addrs: map[netip.Addr]bool{}}
	k.next++
	for _, a := range addrs {
		l.addrs[a] = true
	}
	k.links[name] = l
}

func (k *fakeKernel) link(name string) (link, error) {
	k.calls++
	l := k.links[name]
	if l == nil {
		return link{}, errNoLink
	}
	found := l.link
	found.bare = len(l.addrs) == 0
	return found, nil
}

func (k *fakeKernel) aliased() ([]string, error) {
	if k.fails() {
		return nil, errInjected
	}
	var names []string
	for name, l := range k.links {
		if l.kind == "dummy" && l.alias == alias {
			names = append(names, name)
		}
	}
	return names, nil
}

func (k *fakeKernel) addLink(name string) error {
	if k.fails() {
		return errInjected
	}
	if k.links[name] != nil {
		return errExists
	}
	k.links[name] = &fakeLink{link: link{index: k.next, kind: "dummy"}, addrs: map[netip.Addr]bool{}}
	k.next++
	k.log = append(k.log, "link add "+name)
	return nil
}

func (k *fakeKernel) setAlias(index int) error {
	return k.set(index, func(l *fakeLink) { l.alias = alias })
}
func (k *fakeKernel) setUp(index int) error { return k.set(index, func(l *fakeLink) { l.up = true }) }

func (k *fakeKernel) set(index int, fn func(*fakeLink)) error {
	if k.fails() {
		return errInjected
	}
	l := k.byIndex(index)
	if l == nil {
		return errNoLink
	}
	fn(l)
	return nil
}

func (k *fakeKernel) delLink(index int) error {
	if k.fails() {
		return errInjected
	}
	for name, l := range k.links {
		if l.index == index {
			delete(k.links, name)
			return nil
		}
	}
	return errNoLink
}

func (k *fakeKernel) addrs() ([]addr, error) {
	if k.fails() {
		return nil, errInjected
	}
	var all []addr
	for name, l := range k.links {
		for a := range l.addrs {
			all = append(all, addr{a, l.index, name})
		}
	}
	slices.SortFunc(all, func(a, b addr) int { return cmp.Or(a.index-b.index, a.addr.Compare(b.addr)) })
	return all, nil
}

func (k *fakeKernel) addAddr(index int, a netip.Addr) error {
	if k.fails() {
		return errInjected
	}
	l := k.byIndex(index)
	if l == nil {
		return errNoLink
	}
	l.addrs[a] = true
	k.log = append(k.log, "addr add "+a.String())
	return nil
}

func (k *fakeKernel) delAddr(index int, a netip.Addr) error {
	if k.fails() {
		return errInjected
	}
	if l := k.byIndex(index); l != nil {
		delete(l.addrs, a)
	}
	k.log = append(k.log, "addr del "+a.String())
	return nil
}

func (k *fakeKernel) holes() ([]netip.Addr, error) {
	if k.fails() {
		return nil, errInjected
	}
	var all []netip.Addr
	for a := range k.routes {
		all = append(all, a)
	}
	slices.SortFunc(all, netip.Addr.Compare)
	return all, nil
}

func (k *fakeKernel) addHole(a netip.Addr) error {
	if k.fails() {
		return errInjected
	}
	k.routes[a] = true
	k.log = append(k.log, "route add blackhole "+a.String())
	return nil
}

func (k *fakeKernel) delHole(a netip.Addr) error {
	if k.fails() {
		return errInjected
	}
	delete(k.routes, a)
	k.log = append(k.log, "route del blackhole "+a.String())
	return nil
}

// fakeSocket receives what is sent to told, until it is closed.
type fakeSocket struct {
	told   chan any
	closed chan struct{}
	once   sync.Once
}

func (k *fakeKernel) watch() (socket, error) {
	if k.told == nil {
		return nil, errInjected
	}
	return &fakeSocket{told: k.told, closed: make(chan struct{})}, nil
}

func (s *fakeSocket) Receive() ([]syscall.NetlinkMessage, *unix.SockaddrNetlink, error) {
	select {
	case <-s.closed:
		return nil, nil, os.ErrClosed
	case what := <-s.told:
		if err, failed := what.(error); failed {
			return nil, nil, err
		}
		return what.([]syscall.NetlinkMessage), nil, nil
	}
}

func (s *fakeSocket) Close() { s.once.Do(func() { close(s.closed) }) }
