package realserver

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"os"
	"os/exec"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/ravel-lb/ravel"
	"github.com/ravel-lb/ravel/internal/iptables"
	"github.com/ravel-lb/ravel/internal/nettest"
)

var seed = flag.Uint64("seed", uint64(time.Now().UnixNano()), "of the random walks")

// randomRedirects returns redirects of a few VIPs and ports. Those in always are among them, with other pods each time.
func randomRedirects(rng *rand.Rand, pods int, always []ravel.ServiceKey) []ravel.Redirect {
	some := func(least int) []int {
		list := rng.Perm(pods)[:least+rng.IntN(pods+1-least)]
		slices.Sort(list)
		return list
	}
	var list []ravel.Redirect
	for _, key := range always {
		list = append(list, redirect(key.Proto, key.VIP, key.Port, some(1)...))
	}
	for _, vip := range []netip.Addr{vip4, vip6, netip.MustParseAddr("192.0.2.9"), netip.MustParseAddr("2001:db8::9")} {
		for _, port := range []uint16{81, 82, 83} {
			for _, proto := range []ravel.Proto{ravel.TCP, ravel.UDP} {
				if rng.IntN(2) == 0 {
					r := redirect(proto, vip, port, some(0)...)
					r.Masquerade = rng.IntN(4) == 0
					r.MTU = []int{0, 0, 1400, 9000}[rng.IntN(4)]
					r.Name = fmt.Sprintf("ns%d/svc:p", rng.IntN(3))
					list = append(list, r)
				}
			}
		}
	}
	rng.Shuffle(len(list), func(i, j int) { list[i], list[j] = list[j], list[i] })
	return list
}

// Any set of redirects leads to any other, and what stays redirected is never refused meanwhile: neither to clients nor
// to who looks at the rules. Another program that writes to the same tables all the time loses nothing.
func TestWalk(t *testing.T) {
	eachVariant(t, func(t *testing.T, v iptables.Variant) {
		t.Logf("-seed %d", *seed)
		rng := rand.New(rand.NewPCG(*seed, 1))
		const pods = 3
		steps := 40
		if !nettest.Has(nettest.PlainClock) {
			steps = 15
		}
		l := newLab(t, pods)
		l.serve(8080)
		always := []ravel.ServiceKey{
			{VIP: vip4, Proto: ravel.TCP, Port: 80}, {VIP: vip6, Proto: ravel.TCP, Port: 80},
			{VIP: vip4, Proto: ravel.UDP, Port: 80}, {VIP: vip6, Proto: ravel.UDP, Port: 80},
		}
		r := newReal(t, v, nil)
		apply(t, r, randomRedirects(rng, pods, always)...)

		ctx, cancel := context.WithCancel(t.Context())
		var wg sync.WaitGroup
		looker := newReal(t, v, nil)
		var asked, looked, written atomic.Int64
		wg.Go(func() {
			for ctx.Err() == nil {
				for _, key := range always {
					wait := patience
					if key.Proto == ravel.UDP {
						wait = aMoment
					}
					_, _, _, err := askFor(key, wait)
					if key.Proto == ravel.UDP && errors.Is(err, os.ErrDeadlineExceeded) {
						// The answer was under way when its pod went from the redirect. The next datagram meets another.
						_, _, _, err = ask(key)
					}
					if err != nil {
						t.Errorf("%s was refused: %v", key, err)
					}
					asked.Add(1)
				}
			}
		})
		wg.Go(func() {
			for ctx.Err() == nil {
				for _, f := range looker.families {
					lines, err := f.tables.Save(t.Context(), "nat")
					if err != nil {
						continue // the kernel's rules changed too often meanwhile
					}
					found := redirectsIn(parseSaved(lines, func(chain string) bool { return looker.names.ours("nat", chain) }), looker.names)
					for _, key := range always {
						if key.VIP.Is6() == f.v6 && len(found[key]) == 0 {
							t.Errorf("%s has no rule:\n%s", key, strings.Join(lines, "\n"))
						}
					}
					looked.Add(1)
				}
			}
		})
		var foreign []string // the rules that are to be there in the end
		wg.Go(func() {
			rng := rand.New(rand.NewPCG(*seed, 2))
			for ctx.Err() == nil {
				rule := fmt.Sprintf("-s 198.51.100.%d/32 -p tcp -m tcp --dport %d -j ACCEPT", rng.IntN(256), 1+rng.IntN(65535))
				where := []string{"-t nat -%s PREROUTING %s", "-t filter -%s FORWARD %s", "-t nat -%s POSTROUTING %s"}[rng.IntN(3)]
				if len(foreign) > 5 && rng.IntN(2) == 0 {
					i := rng.IntN(len(foreign))
					if foreignWrite(t, v, strings.Replace(foreign[i], "%s", "D", 1)) {
						foreign = slices.Delete(foreign, i, i+1)
					}
				} else if foreignWrite(t, v, fmt.Sprintf(where, "A", rule)) {
					foreign = append(foreign, fmt.Sprintf(where, "%s", rule))
				}
				written.Add(1)
			}
		})
		for step := range steps {
			if step == steps/2 {
				r = newReal(t, v, nil)
			}
			if step%7 == 0 {
				r.Resync()
			}
			want := randomRedirects(rng, pods, always)
			apply(t, r, want...)
			have := map[ravel.ServiceKey][]netip.AddrPort{}
			for _, f := range r.families {
				if err := r.look(t.Context(), f); err != nil {
					t.Fatal(err)
				}
				for key, pods := range redirectsIn(f.have["nat"], r.names) {
					have[key] = pods
				}
			}
			for _, x := range want {
				if !slices.Equal(have[x.Key], x.Pods) {
					t.Fatalf("step %d: %s goes to %v, want %v", step, x.Key, have[x.Key], x.Pods)
				}
				delete(have, x.Key)
			}
			if len(have) > 0 {
				t.Fatalf("step %d: redirects that nobody wants: %v", step, have)
			}
		}
		cancel()
		wg.Wait()
		t.Logf("%d requests, %d looks at the rules, %d foreign writes", asked.Load(), looked.Load(), written.Load())
		if asked.Load() == 0 || looked.Load() == 0 || len(foreign) == 0 {
			t.Error("nothing went on beside the walk")
		}
		if _, err := r.Cleanup(t.Context(), false); err != nil {
			t.Fatal(err)
		}
		for _, table := range []string{"nat", "filter"} {
			var left []string
			for _, line := range strings.Split(nettest.Shell(t, "iptables-"+string(v)+"-save -t "+table+" 2>/dev/null"), "\n") {
				if strings.HasPrefix(line, "-A ") {
					left = append(left, "-t "+table+" "+strings.Replace(line, "-A", "-%s", 1))
				}
			}
			want := filter(foreign, func(rule string) bool { return strings.HasPrefix(rule, "-t "+table) })
			slices.Sort(left)
			slices.Sort(want)
			if !slices.Equal(left, want) {
				t.Errorf("%s holds foreign rules\n%s\nwant\n%s", table, strings.Join(left, "\n"), strings.Join(want, "\n"))
			}
		}
	})
}

// foreignWrite runs iptables as another program does, and reports whether it could write.
func foreignWrite(t *testing.T, v iptables.Variant, args string) bool {
	out, err := exec.Command("iptables-"+string(v), append([]string{"-w", "5"}, strings.Fields(args)...)...).CombinedOutput()
	if err != nil && !strings.Contains(string(out), "temporarily unavailable") {
		t.Errorf("foreign iptables %s: %v: %s", args, err, out)
	}
	return err == nil
}
