package director

import (
	"encoding/json"
	"errors"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/ravel-lb/ravel"
)

func TestStatusAsJSON(t *testing.T) {
	kernels(t, func(t *testing.T, open func() (kernel, error)) {
		k := opened(t, open)
		mark := id{mark: 7}
		persistent := service{scheduler: "rr", flags: flagPersistent, timeout: 300, netmask: 0xffffffff}
		if err := errors.Join(
			k.NewService(mark.full(persistent)),
			k.NewDestination(mark.request(), real{at: addrPort("10.0.0.1", 8080), weight: 1}.destination()),
		); err != nil {
			t.Fatal(err)
		}
		d := start(t, Options{open: open})
		apply(t, d, with(vs("udp [2001:db8::1]:53", tunnelled(rs("2001:db8::a", 3))), func(v *ravel.VirtualService) {
			v.Name, v.OnePacket = "dns/dns:dns", true
		}))
		status, err := d.Status(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		got, err := json.MarshalIndent(status, "", " ")
		if err != nil {
			t.Fatal(err)
		}
		want := `[
 {
  "ours": true,
  "name": "dns/dns:dns",
  "vip": "2001:db8::1",
  "protocol": "udp",
  "port": 53,
  "scheduler": "mh",
  "flags": [
   "mh-fallback",
   "mh-port",
   "flag-3"
  ],
  "onePacket": true,
  "counters": {
   "flows": 0,
   "packets": 0,
   "bytes": 0
  },
  "realServers": [
   {
    "address": "2001:db8::a",
    "port": 53,
    "forwarding": "tunnel",
    "weight": 3,
    "active": 0,
    "inactive": 0,
    "counters": {
     "flows": 0,
     "packets": 0,
     "bytes": 0
    }
   }
  ]
 },
 {
  "ours": false,
  "mark": 7,
  "scheduler": "rr",
  "persistence": 300,
  "counters": {
   "flows": 0,
   "packets": 0,
   "bytes": 0
  },
  "realServers": [
   {
    "address": "10.0.0.1",
    "port": 8080,
    "forwarding": "masquerade",
    "weight": 1,
    "active": 0,
    "inactive": 0,
    "counters": {
     "flows": 0,
     "packets": 0,
     "bytes": 0
    }
   }
  ]
 }
]`
		if diff := cmp.Diff(want, string(got)); diff != "" {
			t.Errorf("JSON (-want +got):\n%s", diff)
		}
	})
}
