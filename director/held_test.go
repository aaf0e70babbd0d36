package director

import (
	"slices"
	"testing"

	"github.com/moby/ipvs"
	"golang.org/x/sys/unix"

	"github.com/ravel-lb/ravel"
)

// served returns the keys of want that a fake kernel serves.
func served(f *fake, want []ravel.VirtualService) []ravel.ServiceKey {
	f.mu.Lock()
	defer f.mu.Unlock()
	keys := []ravel.ServiceKey{}
	for _, v := range want {
		have := f.find(id{ServiceKey: v.Key}.request())
		if have != nil && isOurs(&have.Service) && have.SchedName != none && (len(have.reals) > 0 || len(v.RealServers) == 0) {
			keys = append(keys, v.Key)
		}
	}
	return keys
}

// TestHeld has one thing of a service fail, and wants it held exactly if the kernel serves it.
func TestHeld(t *testing.T) {
	before := vs("tcp 192.0.2.1:80", rs("10.0.0.1", 1))
	nobody := vs("tcp 192.0.2.1:80")
	other := vs("tcp 192.0.2.2:80", rs("10.0.0.1", 1))
	i := id{ServiceKey: before.Key}
	for _, test := range []struct {
		name   string
		before []ravel.VirtualService
		left   *service // by somebody else, or by a process that died
		next   ravel.VirtualService
		held   bool
	}{
		{"its next scheduler is missing", []ravel.VirtualService{before}, nil, scheduled(before, "nosuch", 0), true},
		{"its first scheduler is missing", nil, nil, scheduled(before, "nosuch", 0), false},
		{"it was left without a scheduler", nil, &service{scheduler: none, flags: flagOurs, netmask: 0xffffffff}, scheduled(before, "nosuch", 0), false},
		{"it was left with one", nil, &service{scheduler: "rr", flags: flagOurs, netmask: 0xffffffff}, scheduled(before, "nosuch", 0), true},
		{"it is foreign", nil, &service{scheduler: "rr", netmask: 0xffffffff}, before, false},
		{"a real server is refused", []ravel.VirtualService{before}, nil, vs("tcp 192.0.2.1:80", rs("224.0.0.1", 1), rs("10.0.0.1", 2)), true},
		{"every real server of a new one is refused", nil, nil, vs("tcp 192.0.2.1:80", rs("224.0.0.1", 1)), false},
		{"the first real server is refused", []ravel.VirtualService{nobody}, nil, vs("tcp 192.0.2.1:80", rs("224.0.0.1", 1)), false},
		{"none is wanted", []ravel.VirtualService{nobody}, nil, scheduled(nobody, "nosuch", 0), true},
		{"a real server of the other family", []ravel.VirtualService{before}, nil, vs("tcp 192.0.2.1:80", rs("2001:db8::1", 1)), true},
		{"the same of a new one", nil, nil, vs("tcp 192.0.2.1:80", rs("2001:db8::1", 1)), false},
	} {
		t.Run(test.name, func(t *testing.T) {
			kernels(t, func(t *testing.T, open func() (kernel, error)) {
				if test.left != nil {
					if err := opened(t, open).NewService(i.full(*test.left)); err != nil {
						t.Fatal(err)
					}
				}
				d := start(t, Options{open: open})
				if test.left == nil {
					apply(t, d, test.before...)
				}
				want := []ravel.ServiceKey{other.Key}
				if test.held {
					want = []ravel.ServiceKey{before.Key, other.Key}
				}
				for range 2 {
					held, err := d.Apply(t.Context(), []ravel.VirtualService{test.next, other})
					if !slices.Equal(held, want) {
						t.Errorf("held %v, want %v; %v", held, want, err)
					}
					if err == nil && len(d.Problems()) == 0 {
						t.Error("nobody is told that it is not as wanted")
					}
				}
			})
		})
	}
}

// unbinding is a kernel whose edits of services take the scheduler away and then fail, while broken is set.
type unbinding struct {
	kernel
	broken *bool
}

func (u unbinding) UpdateService(s *ipvs.Service) error {
	if !*u.broken {
		return u.kernel.UpdateService(s)
	}
	bare := *s
	bare.SchedName = none
	if err := u.kernel.UpdateService(&bare); err != nil {
		return err
	}
	return unix.ENOMEM
}

// TestHeldIsAsked has an edit fail in a way that leaves something else than what was there before.
func TestHeldIsAsked(t *testing.T) {
	f := &fake{}
	broken := false
	d := start(t, Options{open: func() (kernel, error) {
		k, err := f.handle()
		return unbinding{k, &broken}, err
	}})
	v := vs("tcp 192.0.2.1:80", rs("10.0.0.1", 1))
	apply(t, d, v)
	broken = true
	if held, err := d.Apply(t.Context(), []ravel.VirtualService{scheduled(v, "wrr", 0)}); err == nil || len(held) > 0 {
		t.Errorf("held %v, %v; want nothing, for its scheduler is gone", held, err)
	}
	broken = false
	apply(t, d, scheduled(v, "wrr", 0))
}
