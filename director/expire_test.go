package director

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/ravel-lb/ravel"
	"github.com/ravel-lb/ravel/internal/sysctl"
)

// TestExpireSetting looks at the setting at each request: it is 1 only while real servers leave sticky UDP services,
// which is the last thing that an Apply does.
func TestExpireSetting(t *testing.T) {
	root := t.TempDir()
	if err := os.MkdirAll(filepath.Join(root, "net/ipv4/vs"), 0o755); err != nil {
		t.Fatal(err)
	}
	for _, s := range settings {
		if err := os.WriteFile(filepath.Join(root, "net/ipv4/vs", s.name), []byte(s.value), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	f := &fake{}
	var changes []string
	f.changed = func() {
		value, err := os.ReadFile(filepath.Join(root, nodest))
		if err != nil {
			t.Error(err)
		}
		changes = append(changes, string(value)+" "+f.changes[len(f.changes)-1])
	}
	d := start(t, Options{open: f.handle, Sysctl: sysctl.New(root, ""), expiring: 200 * time.Millisecond})
	sticky := func(reals ...ravel.RealServer) ravel.VirtualService { return vs("udp 192.0.2.1:80", reals...) }
	single := func(reals ...ravel.RealServer) ravel.VirtualService {
		return with(vs("udp 192.0.2.2:80", reals...), func(v *ravel.VirtualService) { v.OnePacket = true })
	}
	web := func(reals ...ravel.RealServer) ravel.VirtualService { return vs("tcp 192.0.2.3:80", reals...) }
	one, two, three := rs("10.0.0.1", 1), rs("10.0.0.2", 2), rs("10.0.0.3", 3)
	step := func(what string, services []ravel.VirtualService, want ...string) {
		t.Helper()
		changes = nil
		apply(t, d, services...)
		if diff := cmp.Diff(want, changes); diff != "" {
			t.Errorf("%s (-want +got):\n%s", what, diff)
		}
		if p := d.Problems(); len(p) > 0 {
			t.Errorf("%s: %v", what, p)
		}
		if v, err := d.sysctl.Get(nodest); v != "0" || err != nil {
			t.Errorf("%s: the setting is left at %s, %v", what, v, err)
		}
	}
	apply(t, d, sticky(three, two, one), single(three, two, one), web(three, two, one))
	step("one leaves all", []ravel.VirtualService{sticky(three, two), single(three, two), web(three, two)},
		"0 delete 10.0.0.1 from 17 192.0.2.2:80", "0 delete 10.0.0.1 from 6 192.0.2.3:80", "1 delete 10.0.0.1 from 17 192.0.2.1:80")
	began := time.Now()
	step("two change places, while the kernel may be expiring flows", []ravel.VirtualService{sticky(three, two), single(three, two), web(two, three)},
		"0 delete 10.0.0.2 from 6 192.0.2.3:80", "0 add 10.0.0.2 to 6 192.0.2.3:80, weight 2")
	if took := time.Since(began); took < d.expiring/2 {
		t.Errorf("that took %v, want it to wait for %v", took, d.expiring)
	}
	step("a last one comes first", []ravel.VirtualService{sticky(one), single(three, two), web(two, three)},
		"0 add 10.0.0.1 to 17 192.0.2.1:80, weight 1", "1 delete 10.0.0.3 from 17 192.0.2.1:80", "1 delete 10.0.0.2 from 17 192.0.2.1:80")

	// While one waits, the others are done first.
	order := []string{"0 set 10.0.0.2 of 6 192.0.2.4:80, weight 9", "0 delete 10.0.0.3 from 6 192.0.2.3:80", "0 add 10.0.0.3 to 6 192.0.2.3:80, weight 3"}
	last := vs("tcp 192.0.2.4:80", two)
	apply(t, d, sticky(one), single(three, two), web(two, three), last)
	apply(t, d, sticky(two, one), single(three, two), web(two, three), last)
	apply(t, d, sticky(one), single(three, two), web(two, three), last)
	step("one waits", []ravel.VirtualService{sticky(one), single(three, two), web(three, two), vs("tcp 192.0.2.4:80", rs("10.0.0.2", 9))}, order...)

	// The last one with a weight stays where what replaces it is refused, and the next Apply asks again.
	for range 2 {
		_, err := d.Apply(t.Context(), []ravel.VirtualService{sticky(rs("224.0.0.1", 1)), single(three, two), web(three, two)})
		if err == nil || !strings.Contains(err.Error(), "10.0.0.1:80 of udp 192.0.2.1:80 is the last one with a weight: kept") {
			t.Errorf("error %v", err)
		}
	}

	// Where the setting cannot be changed they are removed all the same.
	apply(t, d, sticky(one, two))
	if err := os.Remove(filepath.Join(root, nodest)); err != nil {
		t.Fatal(err)
	}
	f.changed = nil
	apply(t, d, sticky(one))
	p := d.Problems()
	if len(p) != 1 || p[0].Where != "sysctl net/ipv4/vs/expire_nodest_conn" || !strings.HasPrefix(p[0].What, "clients of UDP may go on") {
		t.Errorf("problems %v", p)
	}
}

// TestRemovalFromUDPFails has the kernel refuse one, and somebody else be faster.
func TestRemovalFromUDPFails(t *testing.T) {
	f := &fake{}
	d := start(t, Options{open: f.handle})
	other := vs("tcp 192.0.2.3:80", rs("10.0.0.1", 1))
	apply(t, d, vs("udp 192.0.2.1:80", rs("10.0.0.2", 1), rs("10.0.0.1", 1)), other)
	want := []ravel.VirtualService{vs("udp 192.0.2.1:80", rs("10.0.0.2", 1)), other}
	f.failAt = f.calls + 1
	held, err := d.Apply(t.Context(), want)
	if err == nil || len(held) != 2 || len(f.services) != 2 {
		t.Fatalf("held %v, %v; want both held, and an error", held, err)
	}
	f.failAt = 0
	apply(t, d, want...)
	k, _ := f.handle()
	if diff := cmp.Diff(shown(want), dump(t, k)); diff != "" {
		t.Errorf("table (-want +got):\n%s", diff)
	}

	apply(t, d, vs("udp 192.0.2.1:80", rs("10.0.0.3", 1), rs("10.0.0.2", 1)), other)
	if err := k.DelDestination(id{ServiceKey: want[0].Key}.request(), real{at: addrPort("10.0.0.3", 80)}.destination()); err != nil {
		t.Fatal(err)
	}
	apply(t, d, want...)
	if diff := cmp.Diff(shown(want), dump(t, k)); diff != "" {
		t.Errorf("table (-want +got):\n%s", diff)
	}
}
