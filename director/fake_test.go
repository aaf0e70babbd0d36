package director

import (
	"fmt"
	"net"
	"net/netip"
	"os"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/moby/ipvs"
	"golang.org/x/sys/unix"
)

// fake is a small honest IPVS: it keeps what it is told and answers as net/netfilter/ipvs/ip_vs_ctl.c does. The
// conformance test keeps it honest.
type fake struct {
	mu       sync.Mutex // guards the fields below
	services []*fakeService
	trash    []*fakeReal // removed while they had flows; one that is added again gets them back
	missing  []string    // schedulers that this kernel has not
	changes  []string    // the requests that changed something, in order
	calls    int         // all requests
	failAt   int         // this one of them fails with EIO, if not 0
	changed  func()      // called after each change, with mu held
}

type fakeService struct {
	ipvs.Service
	reals []*fakeReal
}

type fakeReal struct {
	ipvs.Destination
	last int
	of   string // the service that it was removed from
}

// handle opens the fake, as often as one likes.
func (f *fake) handle() (kernel, error) { return &fakeHandle{fake: f}, nil }

// fakeHandle is one handle of a fake. Closing it makes requests fail.
type fakeHandle struct {
	*fake
	closed bool
}

var _ kernel = (*fakeHandle)(nil)

func (h *fakeHandle) Close() {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.closed = true
}

// request begins a request; unlock ends it.
func (h *fakeHandle) request() (unlock func(), err error) {
	h.mu.Lock()
	h.calls++
	switch {
	case h.closed:
		err = os.ErrClosed
	case h.calls == h.failAt:
		err = unix.EIO
	}
	return h.mu.Unlock, err
}

func (f *fake) change(format string, args ...any) {
	f.changes = append(f.changes, fmt.Sprintf(format, args...))
	if f.changed != nil {
		f.changed()
	}
}

func (f *fake) find(s *ipvs.Service) *fakeService {
	for _, have := range f.services {
		if have.FWMark == s.FWMark && have.AddressFamily == s.AddressFamily &&
			(s.FWMark != 0 || have.Protocol == s.Protocol && have.Port == s.Port && have.Address.Equal(s.Address)) {
			return have
		}
	}
	return nil
}

func (s *fakeService) find(d *ipvs.Destination) int {
	return slices.IndexFunc(s.reals, func(r *fakeReal) bool { return r.Port == d.Port && r.Address.Equal(d.Address) })
}

func (s *fakeService) name() string {
	return fmt.Sprintf("%d %s:%d", s.Protocol, s.Address, s.Port)
}

func (h *fakeHandle) GetServices() ([]*ipvs.Service, error) {
	unlock, err := h.request()
	defer unlock()
	if err != nil {
		return nil, err
	}
	var list []*ipvs.Service
	for _, s := range h.services {
		c := s.Service
		list = append(list, &c)
	}
	return list, nil
}

func (h *fakeHandle) GetService(s *ipvs.Service) (*ipvs.Service, error) {
	unlock, err := h.request()
	defer unlock()
	if err != nil {
		return nil, err
	}
	have := h.find(s)
	if have == nil {
		return nil, unix.ESRCH
	}
	c := have.Service
	return &c, nil
}

func (h *fakeHandle) GetDestinations(s *ipvs.Service) ([]*ipvs.Destination, error) {
	unlock, err := h.request()
	defer unlock()
	if err != nil {
		return nil, err
	}
	have := h.find(s)
	if have == nil {
		return nil, nil
	}
	var list []*ipvs.Destination
	for _, r := range have.reals {
		c := r.Destination
		list = append(list, &c)
	}
	return list, nil
}

// settings checks and stores the settings of a service.
func (f *fake) settings(have *fakeService, s *ipvs.Service) error {
	if s.SchedName != none && (slices.Contains(f.missing, s.SchedName) || !slices.Contains(schedulers, s.SchedName)) {
		return unix.ENOENT
	}
	if s.AddressFamily == unix.AF_INET6 && (s.Netmask < 1 || s.Netmask > 128) {
		return unix.EINVAL
	}
	have.SchedName, have.Flags, have.Timeout, have.Netmask = s.SchedName, s.Flags|flagHashed, s.Timeout, s.Netmask
	return nil
}

var schedulers = strings.Fields("dh fo lblc lblcr lc mh nq ovf rr sed sh twos wlc wrr")

func (h *fakeHandle) NewService(s *ipvs.Service) error {
	unlock, err := h.request()
	defer unlock()
	switch {
	case err != nil:
		return err
	case h.find(s) != nil:
		return unix.EEXIST
	}
	made := &fakeService{Service: ipvs.Service{
		Address: slices.Clone(s.Address), Protocol: s.Protocol, Port: s.Port, FWMark: s.FWMark, AddressFamily: s.AddressFamily,
	}}
	if err := h.settings(made, s); err != nil {
		return err
	}
	h.services = append(h.services, made)
	h.change("add %s %s", made.name(), s.SchedName)
	return nil
}

func (h *fakeHandle) UpdateService(s *ipvs.Service) error {
	unlock, err := h.request()
	defer unlock()
	if err != nil {
		return err
	}
	have := h.find(s)
	if have == nil {
		return unix.ESRCH
	}
	if err := h.settings(have, s); err != nil {
		return err
	}
	h.change("set %s %s", have.name(), s.SchedName)
	return nil
}

func (h *fakeHandle) DelService(s *ipvs.Service) error {
	unlock, err := h.request()
	defer unlock()
	if err != nil {
		return err
	}
	have := h.find(s)
	if have == nil {
		return unix.ESRCH
	}
	h.services = slices.DeleteFunc(h.services, func(s *fakeService) bool { return s == have })
	h.change("delete %s", have.name())
	return nil
}

// refused is what the kernel says of an address that cannot be a real server's.
func refused(ip net.IP) bool {
	a, _ := netip.AddrFromSlice(ip)
	return a.IsMulticast() || a.IsUnspecified() || a == netip.AddrFrom4([4]byte{255, 255, 255, 255}) || a.Is6() && a.IsLinkLocalUnicast()
}

func (h *fakeHandle) NewDestination(s *ipvs.Service, d *ipvs.Destination) error {
	unlock, err := h.request()
	defer unlock()
	if err != nil {
		return err
	}
	have := h.find(s)
	switch {
	case have == nil:
		return unix.ESRCH
	case d.Weight < 0:
		return unix.ERANGE
	case have.find(d) >= 0:
		return unix.EEXIST
	case refused(d.Address):
		return unix.EINVAL
	}
	made := &fakeReal{Destination: *d, last: d.Weight}
	made.Address = slices.Clone(d.Address)
	made.ActiveConnections, made.InactiveConnections = 0, 0
	if at := slices.IndexFunc(h.trash, func(r *fakeReal) bool {
		return r.of == have.name() && r.Port == d.Port && r.Address.Equal(d.Address)
	}); at >= 0 {
		made.ActiveConnections, made.InactiveConnections = h.trash[at].ActiveConnections, h.trash[at].InactiveConnections
		h.trash = slices.Delete(h.trash, at, at+1)
	}
	have.reals = slices.Insert(have.reals, 0, made)
	h.change("add %s to %s, weight %d", d.Address, have.name(), d.Weight)
	return nil
}

func (h *fakeHandle) UpdateDestination(s *ipvs.Service, d *ipvs.Destination) error {
	unlock, err := h.request()
	defer unlock()
	if err != nil {
		return err
	}
	have := h.find(s)
	if have == nil {
		return unix.ESRCH
	}
	at := have.find(d)
	switch {
	case d.Weight < 0:
		return unix.ERANGE
	case at < 0:
		return unix.ENOENT
	}
	r := have.reals[at]
	r.Weight, r.ConnectionFlags = d.Weight, d.ConnectionFlags
	r.UpperThreshold, r.LowerThreshold = d.UpperThreshold, d.LowerThreshold
	if d.Weight != 0 {
		r.last = d.Weight
	}
	h.change("set %s of %s, weight %d", d.Address, have.name(), d.Weight)
	return nil
}

func (h *fakeHandle) DelDestination(s *ipvs.Service, d *ipvs.Destination) error {
	unlock, err := h.request()
	defer unlock()
	if err != nil {
		return err
	}
	have := h.find(s)
	if have == nil {
		return unix.ESRCH
	}
	at := have.find(d)
	if at < 0 {
		return unix.ENOENT
	}
	if r := have.reals[at]; r.ActiveConnections+r.InactiveConnections > 0 {
		r.of = have.name()
		h.trash = append(h.trash, r)
	}
	have.reals = slices.Delete(have.reals, at, at+1)
	h.change("delete %s from %s", d.Address, have.name())
	return nil
}

// dump is a kernel's whole table as ipvsadm -Sn writes it, sorted by service.
func dump(t testing.TB, k kernel) string {
	t.Helper()
	services, order, err := readServices(k)
	if err != nil {
		t.Fatal(err)
	}
	var b strings.Builder
	for _, i := range order {
		reals, raw, err := readReals(k, i)
		if err != nil {
			t.Fatal(err)
		}
		b.WriteString(statusOf(i, services[i], reals, raw, "").String())
	}
	return b.String()
}
