package director

import (
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/ravel-lb/ravel"
	"github.com/ravel-lb/ravel/internal/sysctl"
)

// kube-proxy in IPVS mode that knows a VIP takes our service over in place: it edits it, adds its own real servers by
// masquerading and removes ours (pkg/proxy/ipvs/proxier.go, syncService). From the next reading on the service is not
// held, which is a Problem that names it, and nothing of kube-proxy's is touched; when it lets go, it is ours again. Our
// other service is held all the while.
func TestKubeProxyTakesAServiceOver(t *testing.T) {
	kernels(t, func(t *testing.T, open func() (kernel, error)) {
		k := opened(t, open)
		d := start(t, Options{open: open})
		taken, other := vs("tcp 192.0.2.1:80", rs("10.0.0.1", 1)), vs("tcp 192.0.2.2:80", rs("10.0.0.1", 1))
		holds := func(when string, want ...ravel.VirtualService) {
			t.Helper()
			d.Resync()
			held, err := d.Apply(t.Context(), []ravel.VirtualService{taken, other})
			if err != nil {
				t.Fatalf("%s: %v", when, err)
			}
			var keys []ravel.ServiceKey
			for _, v := range want {
				keys = append(keys, v.Key)
			}
			if !slices.Equal(held, keys) {
				t.Errorf("%s: held %v, want %v", when, held, keys)
			}
		}
		holds("alone", taken, other)
		before := dump(t, k)

		i := id{ServiceKey: taken.Key}
		pod := real{at: addrPort("10.2.0.7", 8080), weight: 1}
		err := errors.Join(
			k.UpdateService(i.full(service{scheduler: "rr", netmask: 0xffffffff})),
			k.NewDestination(i.request(), pod.destination()),
			k.DelDestination(i.request(), real{at: addrPort("10.0.0.1", 80)}.destination()))
		if err != nil {
			t.Fatal(err)
		}
		theirs := dump(t, k)
		for range 2 {
			holds("taken over", other)
			problems := d.Problems()
			if len(problems) != 1 || problems[0].Where != taken.Key.String() || problems[0].Fix == "" {
				t.Errorf("problems %v, want one of %s", problems, taken.Key)
			}
			if got := d.Foreign(); !slices.Equal(got, []ravel.ServiceKey{taken.Key}) {
				t.Errorf("foreign %v", got)
			}
			if got := dump(t, k); got != theirs {
				t.Errorf("kube-proxy's service is now\n%swas\n%s", got, theirs)
			}
		}
		if err := k.DelService(i.request()); err != nil {
			t.Fatal(err)
		}
		holds("let go", taken, other)
		if got := dump(t, k); len(d.Problems()) != 0 || lines(got) != lines(before) {
			t.Errorf("ours again: problems %v, table\n%swas\n%s", d.Problems(), got, before)
		}

		// It removes what it does not know, unless --ipvs-exclude-cidrs has the VIP.
		for _, v := range []ravel.VirtualService{taken, other} {
			if err := k.DelService(id{ServiceKey: v.Key}.request()); err != nil {
				t.Fatal(err)
			}
		}
		holds("removed", taken, other)
		if got := dump(t, k); lines(got) != lines(before) {
			t.Errorf("made again:\n%swas\n%s", got, before)
		}
	})
}

// Where IPVS has services of others too, it goes on to keep conntrack true if it does; without them it need not.
func TestConntrackOfOthers(t *testing.T) {
	root := t.TempDir()
	dir := filepath.Join(root, "net/ipv4/vs")
	if err := os.MkdirAll(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	for _, s := range settings {
		if err := os.WriteFile(filepath.Join(dir, s.name), []byte("1\n"), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	f := &fake{}
	k, err := f.handle()
	if err != nil {
		t.Fatal(err)
	}
	d := start(t, Options{open: f.handle, Sysctl: sysctl.New(root, "")})
	setting := func(when, want string) {
		t.Helper()
		d.Resync()
		apply(t, d)
		b, err := os.ReadFile(filepath.Join(root, keepTrack))
		if err != nil {
			t.Fatal(err)
		}
		if got := strings.TrimSpace(string(b)); got != want {
			t.Errorf("%s: conntrack is %s, want %s", when, got, want)
		}
	}
	i := id{ServiceKey: key("tcp 10.96.0.1:443")}
	if err := k.NewService(i.full(service{scheduler: "rr", netmask: 0xffffffff})); err != nil {
		t.Fatal(err)
	}
	setting("beside kube-proxy", "1")
	if err := k.DelService(i.request()); err != nil {
		t.Fatal(err)
	}
	setting("alone", "0")
}
