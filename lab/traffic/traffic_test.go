package traffic

import (
	"bufio"
	"context"
	"fmt"
	"net"
	"net/netip"
	"path/filepath"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

// servePod starts a pod at a free port of this machine and returns where it is and how to stop it.
func servePod(t *testing.T, name string, port uint16) (netip.AddrPort, context.CancelFunc) {
	t.Helper()
	if port == 0 {
		l, err := net.Listen("tcp", ":0")
		if err != nil {
			t.Fatal(err)
		}
		port = uint16(l.Addr().(*net.TCPAddr).Port)
		_ = l.Close()
	}
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	go func() { ended <- ServePod(ctx, name, port) }()
	t.Cleanup(func() {
		cancel()
		if err := <-ended; err != nil {
			t.Errorf("pod %s: %v", name, err)
		}
	})
	target := netip.AddrPortFrom(netip.MustParseAddr("127.0.0.1"), port)
	eventually(t, "the pod answers", func() bool {
		conn, err := net.Dial("tcp", target.String())
		if err == nil {
			_ = conn.Close()
		}
		return err == nil
	})
	return target, func() { cancel(); ended <- <-ended }
}

func eventually(t *testing.T, what string, holds func() bool) {
	t.Helper()
	for deadline := time.Now().Add(10 * time.Second); !holds(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("not within 10 s: %s", what)
		}
	}
}

// run starts a client and returns it with its remote.
func run(t *testing.T, load Load) (*Client, Remote) {
	t.Helper()
	c, err := NewClient(load)
	if err != nil {
		t.Fatal(err)
	}
	remote := Remote{Path: filepath.Join(t.TempDir(), "s")}
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error, 2)
	go func() { c.Run(ctx); ended <- nil }()
	go func() { ended <- c.Control(ctx, remote.Path) }()
	t.Cleanup(func() {
		cancel()
		for range 2 {
			if err := <-ended; err != nil {
				t.Error(err)
			}
		}
	})
	return c, remote
}

func TestAllIsWell(t *testing.T) {
	target, _ := servePod(t, "p1", 0)
	v6 := netip.AddrPortFrom(netip.IPv6Loopback(), target.Port())
	c, remote := run(t, Load{
		Flows:    []Flows{{Name: "flows", Target: target, Count: 20, Every: 10 * time.Millisecond}},
		Requests: []Requests{{Name: "requests", Target: v6, Rate: 200}},
		Streams:  []Streams{{Name: "streams", Target: v6, Count: 3, Every: 10 * time.Millisecond}},
	})
	eventually(t, "everything was answered many times", func() bool {
		r := c.Report()
		return r.Flows[0].Open == 20 && r.Flows[0].Answered > 200 && r.Requests[0].Answered > 50 && r.Streams[0].Answered > 50
	})
	r, err := remote.Reset(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	f, q, s := r.Flows[0], r.Requests[0], r.Streams[0]
	if diff := cmp.Diff(map[string]int{"p1": 20}, f.Pods); diff != "" || f.OtherPod != 0 || len(f.Broken) != 0 {
		t.Errorf("flows: %+v", f)
	}
	if f.LongestWait <= 0 || q.Slowest <= 0 || s.LongestGap < 5*time.Millisecond {
		t.Errorf("nothing takes no time: %v %v %v", f.LongestWait, q.Slowest, s.LongestGap)
	}
	if q.Failures() != 0 || q.Begun-q.Answered > 50 || q.Pods["p1"] != q.Answered {
		t.Errorf("requests: %+v", q)
	}
	if s.Lost != 0 || s.OtherPod != 0 || s.Pods["p1"] != 3 || len(s.Errors) != 0 {
		t.Errorf("streams: %+v", s)
	}
	after, err := remote.Report(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if after.Flows[0].Answered >= f.Answered || after.Flows[0].Open != 20 {
		t.Errorf("after a reset: %+v", after.Flows[0])
	}
}

func TestAPodThatEndsIsNoticed(t *testing.T) {
	target, stop := servePod(t, "p1", 0)
	c, _ := run(t, Load{
		Flows:    []Flows{{Name: "flows", Target: target, Count: 5, Every: 5 * time.Millisecond}},
		Requests: []Requests{{Name: "requests", Target: target, Rate: 100}},
		Streams:  []Streams{{Name: "streams", Target: target, Count: 2, Every: 5 * time.Millisecond}},
	})
	eventually(t, "all flows are open", func() bool { return c.Report().Flows[0].Open == 5 })
	stop()
	eventually(t, "every flow broke, requests are refused, datagrams are lost", func() bool {
		r := c.Report()
		return sum(r.Flows[0].Broken) == 5 && r.Flows[0].Open == 0 && r.Requests[0].Failed["refused"] > 3 &&
			r.Streams[0].Errors["refused"] > 0 && r.Streams[0].Lost > 3
	})
	if got := c.Report().Flows[0]; len(got.Examples) == 0 || got.Broken["closed"]+got.Broken["reset"] != 5 {
		t.Errorf("flows: %+v", got)
	}
	c.Reset()
	servePod(t, "p2", target.Port())
	eventually(t, "streams and requests see the other pod", func() bool {
		r := c.Report()
		return r.Streams[0].OtherPod == 2 && r.Streams[0].Pods["p2"] == 2 && r.Requests[0].Pods["p2"] > 3
	})
}

// impostor answers the first requests of every connection as one pod and the later ones as another.
func TestAnAnswerFromAnotherPodIsNoticed(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = l.Close() }()
	go func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			go func() {
				defer func() { _ = conn.Close() }()
				scanner := bufio.NewScanner(conn)
				for n := 0; scanner.Scan(); n++ {
					switch {
					case n < 3:
						_, _ = fmt.Fprintf(conn, "p1 here %s\n", scanner.Text())
					case n == 3:
						_, _ = fmt.Fprintf(conn, "p2 here %s\n", scanner.Text())
					default:
						_, _ = fmt.Fprintf(conn, "p1 here 0\n") // an answer to something else
					}
				}
			}()
		}
	}()
	target := netip.MustParseAddrPort(l.Addr().String())
	c, _ := run(t, Load{Flows: []Flows{{Name: "flows", Target: target, Count: 4, Every: time.Millisecond}}})
	eventually(t, "all four met the impostor", func() bool {
		f := c.Report().Flows[0]
		return f.OtherPod == 4 && f.Broken["garbled"] == 4
	})
}

// A server that accepts and never answers.
func TestSilenceIsNoticed(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = l.Close() }()
	answers := make(chan struct{}, 1)
	answers <- struct{}{}
	go func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			defer func() { _ = conn.Close() }()
			if line, err := bufio.NewReader(conn).ReadString('\n'); err == nil {
				select {
				case <-answers:
					_, _ = fmt.Fprintf(conn, "p1 here %s", line)
				default:
				}
			}
		}
	}()
	target := netip.MustParseAddrPort(l.Addr().String())
	c, _ := run(t, Load{Flows: []Flows{{Name: "flows", Target: target, Count: 1, Every: time.Millisecond}}})
	eventually(t, "the flow is silent", func() bool {
		f := c.Report().Flows[0]
		return f.Open == 1 && f.Silent == 1 && f.LongestWait > time.Second
	})
	c, _ = run(t, Load{
		Flows:    []Flows{{Name: "flows", Target: target, Count: 1, Every: time.Millisecond, Timeout: 50 * time.Millisecond}},
		Requests: []Requests{{Name: "requests", Target: target, Rate: 50, Timeout: 50 * time.Millisecond}},
	})
	eventually(t, "timeouts", func() bool {
		r := c.Report()
		return r.Flows[0].Broken["timeout"] == 1 && r.Requests[0].Failed["timeout"] > 2
	})
}

func TestMerge(t *testing.T) {
	a := Report{
		Flows:    []FlowReport{{Name: "f", Count: 1, Open: 1, Answered: 2, Pods: map[string]int{"p": 1}, LongestWait: 1}},
		Requests: []RequestReport{{Name: "q", Begun: 3, Answered: 2, Failed: map[string]int{"reset": 1}, Slowest: 4}},
		Streams:  []StreamReport{{Name: "s", Count: 1, Sent: 9, Lost: 1}},
	}
	b := Report{Flows: []FlowReport{{Name: "f", Count: 2, Broken: map[string]int{"closed": 2}, LongestWait: 7}, {Name: "g", Count: 1}}}
	want := Report{
		Flows: []FlowReport{
			{Name: "f", Count: 3, Open: 1, Answered: 2, Pods: map[string]int{"p": 1}, Broken: map[string]int{"closed": 2}, LongestWait: 7},
			{Name: "g", Count: 1, Pods: map[string]int{}, Broken: map[string]int{}},
		},
		Requests: []RequestReport{{Name: "q", Begun: 3, Answered: 2, Failed: map[string]int{"reset": 1}, Slowest: 4, Pods: map[string]int{}}},
		Streams:  []StreamReport{{Name: "s", Count: 1, Sent: 9, Lost: 1, Errors: map[string]int{}, Pods: map[string]int{}}},
	}
	if diff := cmp.Diff(want, Merge(a, b)); diff != "" {
		t.Errorf("(-want +got)\n%s", diff)
	}
}

func TestALoadThatMakesNoSense(t *testing.T) {
	_, err := NewClient(Load{
		Flows:    []Flows{{Name: "flows", Count: 1}},
		Requests: []Requests{{Name: "requests", Target: netip.MustParseAddrPort("127.0.0.1:1")}},
	})
	want := "flows: no target\nflows: count or interval is not positive\nrequests: rate is not positive"
	if err == nil || err.Error() != want {
		t.Errorf("got %v, want %s", err, want)
	}
}

func FuzzAnswer(f *testing.F) {
	f.Add("p1 10.0.0.1:5 7\n", "7")
	f.Add("p1  7", "7")
	f.Add("", "")
	f.Fuzz(func(t *testing.T, line, request string) {
		pod, err := answer(line, request)
		if (err == nil) != (pod != "") {
			t.Errorf("answer(%q, %q) = %q, %v", line, request, pod, err)
		}
	})
}
