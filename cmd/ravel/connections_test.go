package main

import (
	"context"
	"fmt"
	"net/netip"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/ravel-lb/ravel"
)

// As a kernel writes them (ip_vs_conn_seq_show), with what may stand there besides.
const connectionsText = `Pro FromIP   FPrt ToIP     TPrt DestIP   DPrt State       Expires PEName PEData
TCP C6336407 9C40 C0000250 0050 0A000001 0050 ESTABLISHED     899
TCP C6336407 9C41 C0000250 0050 0A000002 0050 FIN_WAIT        119
UDP C6336407 0035 C0000235 0035 0A000001 0035 UDP             299
TCP 2001:0db8:0000:0000:0000:0000:0000:0007 9C40 2001:0db8:0000:0000:0000:0000:0000:0080 0050 2001:0db8:0001:0000:0000:0000:0000:0002 0050 SYN_RECV         59
TCP [2001:0db8:0000:0000:0000:0000:0000:0007] 9C42 [2001:0db8:0000:0000:0000:0000:0000:0080] 0050 0A000003 0050 TIME_WAIT         59
SCTP C6336407 9C40 C0000250 0050 0A000001 0050 ESTABLISHED     899
TCP C6336407 9C40
TCP nonsense 9C40 C0000250 0050 0A000001 0050 ESTABLISHED     899
TCP C6336407 12345 C0000250 0050 0A000001 0050 ESTABLISHED     899
`

func read(t *testing.T, text string, most int) (lines []string, all bool) {
	t.Helper()
	all, err := readConnections(t.Context(), strings.NewReader(text), func(c connection) bool {
		lines = append(lines, fmt.Sprintf("%s to %s at %s %t", c.client, c.service, c.real, c.live))
		return len(lines) < most
	})
	if err != nil {
		t.Fatal(err)
	}
	return lines, all
}

func TestReadConnections(t *testing.T) {
	want := []string{
		"198.51.100.7:40000 to tcp 192.0.2.80:80 at 10.0.0.1 true",
		"198.51.100.7:40001 to tcp 192.0.2.80:80 at 10.0.0.2 false",
		"198.51.100.7:53 to udp 192.0.2.53:53 at 10.0.0.1 true",
		"[2001:db8::7]:40000 to tcp [2001:db8::80]:80 at 2001:db8:1::2 true",
		"[2001:db8::7]:40002 to tcp [2001:db8::80]:80 at 10.0.0.3 false",
	}
	text := connectionsText
	got, all := read(t, text, 100)
	if diff := cmp.Diff(want, got); diff != "" || !all {
		t.Errorf("all %t (-want +got):\n%s", all, diff)
	}
	if got, all := read(t, text, 2); len(got) != 2 || all {
		t.Errorf("asked for two: %d, all %t", len(got), all)
	}
	// A line that never ends, and none at all.
	if got, all := read(t, strings.Repeat("x", 10000)+"\n"+text, 100); len(got) != 5 || !all {
		t.Errorf("behind a long line: %d, all %t", len(got), all)
	}
	if got, all := read(t, "", 100); len(got) != 0 || !all {
		t.Errorf("of nothing: %d, all %t", len(got), all)
	}
	ended, cancel := context.WithCancel(t.Context())
	cancel()
	if all, err := readConnections(ended, strings.NewReader(text), func(connection) bool { return true }); all || err != nil {
		t.Errorf("after its end: all %t, %v", all, err)
	}
}

// Whatever stands in the file, what is taken from it is a flow.
func FuzzReadConnections(f *testing.F) {
	for line := range strings.Lines(connectionsText) {
		f.Add(line)
	}
	f.Fuzz(func(t *testing.T, text string) {
		_, err := readConnections(t.Context(), strings.NewReader(text), func(c connection) bool {
			if !c.client.IsValid() || !c.service.VIP.IsValid() || !c.real.IsValid() || c.service.Proto != ravel.TCP && c.service.Proto != ravel.UDP {
				t.Errorf("%q: %+v", text, c)
			}
			return true
		})
		if err != nil {
			t.Errorf("%q: %v", text, err)
		}
	})
}

func BenchmarkReadConnections(b *testing.B) {
	var text strings.Builder
	for i := range 10000 {
		fmt.Fprintf(&text, "TCP %08X %04X C0000250 0050 0A000001 0050 ESTABLISHED %7d\n", 0xc6336400+i%256, i, 899)
	}
	n := 0
	for b.Loop() {
		if _, err := readConnections(b.Context(), strings.NewReader(text.String()), func(c connection) bool {
			n += int(c.client.Port())
			return c.real != netip.Addr{}
		}); err != nil {
			b.Fatal(err)
		}
	}
	b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(b.N*10000), "ns/connection")
}
