package main

import (
	"net/netip"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/urfave/cli/v2"

	"github.com/ravel-lb/ravel"
	"github.com/ravel-lb/ravel/director"
)

// Whose flows end with their director is said in every form.
func TestServicesMarksFlowsThatAreNotKept(t *testing.T) {
	real := director.RealServerStatus{Addr: netip.MustParseAddr("10.0.0.1"), Port: 80, Forwarding: "direct", Weight: 2}
	limited := real
	limited.Upper, limited.Lower = 100, 80
	services := []director.ServiceStatus{
		{Ours: true, VIP: web.VIP, Proto: ravel.TCP, Port: 80, Scheduler: "mh", Reals: []director.RealServerStatus{real}},
		{Ours: true, VIP: dns.VIP, Proto: ravel.TCP, Port: 80, Scheduler: "wlc", NotKept: true, Reals: []director.RealServerStatus{limited}},
	}
	for _, test := range []struct{ format, want string }{
		{formatTable, "" +
			"tcp 192.0.2.80:80 - ravel mh 10.0.0.1 direct 2 0\n" +
			"tcp 192.0.2.53:80 - ravel wlc (flows: not kept) 10.0.0.1 direct 2 0\n"},
		{formatWide, "" +
			"tcp 192.0.2.80:80 - ravel mh 10.0.0.1 direct 2 0 0 - - - -\n" +
			"tcp 192.0.2.53:80 - ravel wlc (flows: not kept) 10.0.0.1 direct 2 0 0 100/80 - - -\n"},
		{formatJSON, ""},
	} {
		var out strings.Builder
		c := cli.NewContext(&cli.App{Writer: &out}, nil, nil)
		if err := printServices(c, test.format, services); err != nil {
			t.Fatal(err)
		}
		if test.format == formatJSON {
			if n := strings.Count(out.String(), `"flowsNotKept": true`); n != 1 || !strings.Contains(out.String(), `"upperThreshold": 100`) {
				t.Errorf("%d services are marked, want one:\n%s", n, out.String())
			}
			continue
		}
		_, rows, _ := strings.Cut(out.String(), "\n")
		var got strings.Builder
		for row := range strings.Lines(rows) {
			got.WriteString(strings.Join(strings.Fields(row), " ") + "\n")
		}
		if diff := cmp.Diff(test.want, got.String()); diff != "" {
			t.Errorf("%s (-want +got):\n%s", test.format, diff)
		}
	}
}
