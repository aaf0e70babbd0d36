package config

import (
	"fmt"
	"os"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/ravel-lb/ravel"
	"github.com/ravel-lb/ravel/internal/desired"
)

// originalDocument is a complete cluster document of the original.
func originalDocument(t testing.TB) []byte {
	t.Helper()
	b, err := os.ReadFile("testdata/original.json")
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// The complete document of the original gives the services, limits and MTUs that it asks for, whole: on a director and on
// the node that has the pods.
func TestOriginalDocumentIsServed(t *testing.T) {
	parsed, err := Parse([]byte(`{"cluster": ` + string(originalDocument(t)) + `,
"fleet": {"asn": 65100, "directors": [{"name": "d1", "addresses": ["192.0.2.1", "2001:db8:77::1"]}]},
"nodes": [
  {"name": "n1", "addresses": ["192.0.2.11", "2001:db8:77::11"], "labels": {"example.net/lb-backend": "true", "example.net/zone": "blue"}},
  {"name": "n2", "addresses": ["192.0.2.12", "2001:db8:77::12"], "labels": {"example.net/lb-backend": "true", "example.net/zone": "blue"}},
  {"name": "n3", "addresses": ["192.0.2.13", "2001:db8:77::13"], "labels": {"example.net/lb-backend": "true", "example.net/zone": "red"}}],
"endpoints": [
  {"namespace": "shop", "service": "frontend", "portName": "https", "address": "203.0.113.1", "port": 8443, "node": "n1"},
  {"namespace": "shop", "service": "frontend", "portName": "https", "address": "203.0.113.3", "port": 8443, "node": "n3"},
  {"namespace": "shop", "service": "frontend", "portName": "https", "address": "2001:db8:113::1", "port": 8443, "node": "n1"},
  {"namespace": "shop", "service": "admin", "portName": "web", "address": "203.0.113.4", "port": 80, "node": "n1"},
  {"namespace": "shop", "service": "admin", "portName": "web", "address": "203.0.113.5", "port": 80, "node": "n2"},
  {"namespace": "infra", "service": "resolver", "portName": "dns", "protocol": "udp", "address": "203.0.113.6", "port": 5353, "node": "n2"},
  {"namespace": "infra", "service": "resolver", "portName": "dns", "protocol": "tcp", "address": "203.0.113.6", "port": 5353, "node": "n2"},
  {"namespace": "ops", "service": "unicorn", "portName": "www", "address": "203.0.113.7", "port": 7000, "node": "n1"}]}`))
	if err != nil {
		t.Fatal(err)
	}
	unicorn, err := DefaultService("ops/unicorn:www", 70)
	if err != nil {
		t.Fatal(err)
	}
	in := desired.Inputs{Node: "d1", Cluster: parsed.Cluster.WithDefault(unicorn), Fleet: parsed.Fleet}
	state, problems := desired.Compute(in)
	var got strings.Builder
	for _, v := range state.Services {
		fmt.Fprintf(&got, "%s %s %#x -o %v -x %d -y %d:", v.Key, v.Scheduler, uint32(v.Flags), v.OnePacket, v.UpperThreshold, v.LowerThreshold)
		for _, rs := range v.RealServers {
			fmt.Fprintf(&got, " %s %s %d", rs.Addr, rs.Forwarding, rs.Weight)
		}
		got.WriteByte('\n')
	}
	for _, r := range state.Routes {
		fmt.Fprintf(&got, "route %s via %s\n", r.Prefix, r.NextHop)
	}
	for _, p := range problems {
		fmt.Fprintf(&got, "problem %s\n", p)
	}
	in.Role, in.Node = ravel.Realserver, "n1"
	state, _ = desired.Compute(in)
	for _, r := range state.Redirects {
		fmt.Fprintf(&got, "redirect %s to %v tunnelled %v MTU %d\n", r.Key, r.Pods, r.Tunnelled, r.MTU)
	}
	const want = `tcp 198.51.100.20:70 mh 0x18 -o false -x 0 -y 0: 192.0.2.11 auto 1
tcp 198.51.100.20:443 mh 0x18 -o false -x 0 -y 0: 192.0.2.11 tunnel 1
tcp 198.51.100.20:9000 wlc 0x0 -o false -x 15000 -y 12000: 192.0.2.11 direct 1 192.0.2.12 direct 1
udp 198.51.100.20:443 mh 0x18 -o false -x 0 -y 0: 192.0.2.11 tunnel 1
tcp 198.51.100.21:53 mh 0x18 -o false -x 0 -y 0: 192.0.2.12 auto 1
tcp 198.51.100.21:70 mh 0x18 -o false -x 0 -y 0: 192.0.2.11 auto 1
udp 198.51.100.21:53 mh 0x18 -o true -x 0 -y 0: 192.0.2.12 auto 1
tcp 198.51.100.22:70 mh 0x18 -o false -x 0 -y 0: 192.0.2.11 auto 1
tcp [2001:db8:77:1:aaaa:bbbb:cccc:20]:443 wrr 0x0 -o false -x 0 -y 0: 2001:db8:77::11 auto 1
route 198.51.100.20/32 via 192.0.2.1
route 198.51.100.21/32 via 192.0.2.1
route 198.51.100.22/32 via 192.0.2.1
route 2001:db8:77:1:aaaa:bbbb:cccc:20/128 via 2001:db8:77::1
redirect tcp 198.51.100.20:70 to [203.0.113.7:7000] tunnelled true MTU 1500
redirect tcp 198.51.100.20:443 to [203.0.113.1:8443] tunnelled true MTU 1500
redirect tcp 198.51.100.20:9000 to [203.0.113.4:80] tunnelled false MTU 1500
redirect udp 198.51.100.20:443 to [203.0.113.1:8443] tunnelled true MTU 0
redirect tcp 198.51.100.21:70 to [203.0.113.7:7000] tunnelled true MTU 9000
redirect tcp 198.51.100.22:70 to [203.0.113.7:7000] tunnelled true MTU 0
redirect tcp [2001:db8:77:1:aaaa:bbbb:cccc:20]:443 to [[2001:db8:113::1]:8443] tunnelled true MTU 1500
`
	if diff := cmp.Diff(want, got.String()); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
}

// What the original takes we take, and say where we read it in another way.
func TestOriginalAccepts(t *testing.T) {
	const at = `cluster.config["192.0.2.1"]["80"]`
	service := func(more string) string {
		return `{"config": {"192.0.2.1": {"80": {"namespace": "a", "service": "b", "tcpEnabled": true` + more + `}}}, "config6": {}}`
	}
	const web = "tcp 192.0.2.1:80 a/b mh 0x18\n"
	for _, tt := range []struct{ name, doc, services, warnings string }{
		{"nothing at all", `{"config": {}, "config6": {}}`, "", ""},
		{"keys in any case", `{"CONFIG": {"192.0.2.1": {"80": {"Namespace": "a", "SERVICE": "b", "TcpEnabled": true, "PORTNAME": "",
  "IPVSOptions": {"Scheduler": " MH ", "FLAGS": "", "forwardingmethod": ""}}}}, "Config6": {}, "VipPool": [], "MTUCONFIG": {}, "Ipv6": {}, "Labels": {}}`,
			web, ""},
		{"nulls", `{"config": {"192.0.2.1": {"80": {"namespace": "a", "service": "b", "tcpEnabled": true, "udpEnabled": null, "portName": null,
  "ipvsOptions": null, "ipv4Enabled": null, "ipv6Enabled": null, "proxyProtocolEnabled": null}}}, "config6": {}, "vipPool": null,
  "mtuConfig": null, "mtuConfig6": {"2001:db8::1": null}, "labels": null, "ipv6": null}`, web, ""},
		{"null options", service(`, "ipvsOptions": {"scheduler": null, "flags": null, "forwardingMethod": null, "uThreshold": null, "lThreshold": null}`), web, ""},
		{"a VIP that is null", `{"config": {"192.0.2.1": null}, "config6": {}}`, "",
			`cluster.config["192.0.2.1"]: has no ports, so the VIP is not served`},
		{"a VIP without ports", `{"config": {"192.0.2.1": {}}, "config6": {}}`, "",
			`cluster.config["192.0.2.1"]: has no ports, so the VIP is not served`},
		{"one family alone", `{"config": null, "config6": {"2001:db8::1": {"80": {"namespace": "a", "service": "b", "tcpEnabled": true}}}}`,
			"tcp [2001:db8::1]:80 a/b mh 0x18\n", ""},
		{"unknown fields", `{"config": {}, "config6": {}, "comment": "x", "nested": {"a": [1]}}`, "",
			"cluster.comment: unknown key: ignored\ncluster.nested: unknown key: ignored"},
		{"unknown fields of a service", service(`, "ingressSources": ["10.0.0.0/8"], "ipvsOptions": {"weight": 1}`), web,
			at + ".ingressSources: unknown key: ignored\n" + at + ".ipvsOptions.weight: unknown key: ignored"},
		{"one service on many VIPs and ports", `{"config": {"192.0.2.1": {"80": {"namespace": "a", "service": "b", "tcpEnabled": true}, "81": {"namespace": "a", "service": "b", "tcpEnabled": true}},
  "192.0.2.2": {"80": {"namespace": "a", "service": "b", "tcpEnabled": true}}},
  "config6": {"2001:db8::1": {"80": {"namespace": "a", "service": "b", "tcpEnabled": true}}}}`,
			web + "tcp 192.0.2.1:81 a/b mh 0x18\ntcp 192.0.2.2:80 a/b mh 0x18\ntcp [2001:db8::1]:80 a/b mh 0x18\n", ""},
		{"many namespaces on one VIP", `{"config": {"192.0.2.1": {"80": {"namespace": "a", "service": "b", "tcpEnabled": true}, "81": {"namespace": "c", "service": "b", "tcpEnabled": true}}}, "config6": {}}`,
			web + "tcp 192.0.2.1:81 c/b mh 0x18\n", ""},
		{"names in any case", `{"config": {"192.0.2.1": {"80": {"namespace": "A", "service": "B", "portName": "HTTP", "tcpEnabled": true}}}, "config6": {}}`,
			"tcp 192.0.2.1:80 a/b:http mh 0x18\n", ""},
		{"neither protocol", `{"config": {"192.0.2.1": {"80": {"namespace": "a", "service": "b"}}}, "config6": {}}`, "",
			at + ": neither tcpEnabled nor udpEnabled: nothing is served here"},
		{"both protocols", service(`, "udpEnabled": true`), web + "udp 192.0.2.1:80 a/b mh 0x18\n", ""},
		{"what drives nothing", service(`, "ipv4Enabled": false, "ipv6Enabled": true, "proxyProtocolEnabled": false`), web, ""},
		{"the PROXY protocol", service(`, "proxyProtocolEnabled": true`), web,
			at + ".proxyProtocolEnabled: has no effect, and there is nothing to add: packets reach the pods with the client's own address, unless fleet.masquerade is true"},
		{"rr", service(`, "ipvsOptions": {"scheduler": "rr"}`), "tcp 192.0.2.1:80 a/b rr 0x0\n", notKept(at, "rr")},
		{"wrr", service(`, "ipvsOptions": {"scheduler": "wrr"}`), "tcp 192.0.2.1:80 a/b wrr 0x0\n", notKept(at, "wrr")},
		{"lc", service(`, "ipvsOptions": {"scheduler": "lc"}`), "tcp 192.0.2.1:80 a/b lc 0x0\n", notKept(at, "lc")},
		{"wlc", service(`, "ipvsOptions": {"scheduler": " Wlc "}`), "tcp 192.0.2.1:80 a/b wlc 0x0\n", notKept(at, "wlc")},
		{"dh", service(`, "ipvsOptions": {"scheduler": "dh"}`), "tcp 192.0.2.1:80 a/b dh 0x0\n", notKept(at, "dh")},
		{"sh", service(`, "ipvsOptions": {"scheduler": "sh", "flags": "flag-1,flag-2"}`), "tcp 192.0.2.1:80 a/b sh 0x18\n", notKept(at, "sh")},
		{"mh", service(`, "ipvsOptions": {"scheduler": "mh", "flags": "flag-2"}`), "tcp 192.0.2.1:80 a/b mh 0x10\n", ""},
		{"a scheduler that is none", service(`, "ipvsOptions": {"scheduler": "fastest"}`), web,
			at + `.ipvsOptions.scheduler: scheduler "fastest": want one of dh, fo, lblc, lblcr, lc, mh, nq, ovf, rr, sed, sh, twos, wlc, wrr; mh is taken, where the original took wrr`},
		{"a forwarding method that is none", service(`, "ipvsOptions": {"forwardingMethod": "m"}`), web,
			at + `.ipvsOptions.forwardingMethod: forwarding method "m": want g or direct, i or tunnel, or auto; the fleet's is taken, where the original took g`},
		{"forwarding methods", service(`, "ipvsOptions": {"forwardingMethod": "i"}`), "tcp 192.0.2.1:80 a/b mh 0x18 tunnel\n", ""},
		{"thresholds below 0", service(`, "ipvsOptions": {"uThreshold": -1, "lThreshold": -2}`), web, ""},
		{"MTUs", `{"config": {"192.0.2.1": {"80": {"namespace": "a", "service": "b", "tcpEnabled": true}}}, "config6": {},
  "mtuConfig": {"192.0.2.1": "1500", "192.0.2.9": "1500", "192.0.2.1 ": "1500", "x": ""}, "mtuConfig6": {"y": "high"}}`, web, "" +
			`cluster.mtuConfig["192.0.2.9"]: has no effect: no service has this VIP by TCP` + "\n" +
			`cluster.mtuConfig["192.0.2.1 "]: "192.0.2.1 " is no IP address; it is left out` + "\n" +
			`cluster.mtuConfig.x: MTU "" is no number; it is left out` + "\n" +
			`cluster.mtuConfig6.y: MTU "high" is no number; it is left out`},
		{"a pool of anything", `{"config": {}, "config6": {}, "vipPool": ["192.0.2.1", "192.0.2.1", "", "192.0.2.0/24", "vip.example.net"]}`, "", "" +
			"cluster.vipPool[1]: 192.0.2.1 is in the list twice\n" +
			`cluster.vipPool[2]: "" is no IP address; it is left out` + "\n" +
			`cluster.vipPool[3]: "192.0.2.0/24" is no IP address; it is left out` + "\n" +
			`cluster.vipPool[4]: "vip.example.net" is no IP address; it is left out`},
		{"aliases of anything", `{"config": {}, "config6": {}, "ipv6": {"192.0.2.1": "2001:db8::1", "x": "y", "z": ""}}`, "", ""},
		{"labels that are null", `{"config": {}, "config6": {}, "labels": {"a": null, "b": ""}}`, "", ""},
		{"an address of IPv6 in any spelling", `{"config": {}, "config6": {"2001:DB8:0:0::0001": {"80": {"namespace": "a", "service": "b", "tcpEnabled": true}}}}`,
			"tcp [2001:db8::1]:80 a/b mh 0x18\n", ""},
	} {
		t.Run(tt.name, func(t *testing.T) {
			s, err := Parse([]byte(`{"cluster": ` + tt.doc + `, "fleet": {}, "nodes": [], "endpoints": []}`))
			if err != nil {
				t.Fatal(err)
			}
			var services strings.Builder
			for _, v := range s.Cluster.Services {
				fmt.Fprintf(&services, "%s %s %s %#x", v.Key, v.Name(), v.Scheduler, uint32(v.Flags))
				if v.Forwarding != nil {
					services.WriteString(" " + v.Forwarding.String())
				}
				services.WriteByte('\n')
			}
			if diff := cmp.Diff(tt.services, services.String()); diff != "" {
				t.Errorf("services (-want +got):\n%s", diff)
			}
			var warnings []string
			for _, w := range s.Warnings {
				text, _, _ := strings.Cut(w.String(), " (line ")
				warnings = append(warnings, text)
			}
			if diff := cmp.Diff(tt.warnings, strings.Join(warnings, "\n")); diff != "" {
				t.Errorf("warnings (-want +got):\n%s", diff)
			}
		})
	}
}

func notKept(at, scheduler string) string {
	return fmt.Sprintf("%s.ipvsOptions.scheduler: flows are not kept: by %s each director picks for itself, by mh all pick alike", at, scheduler)
}

// What the original takes and cannot serve, or guesses the meaning of, we refuse: docs/config.md lists these.
func TestOriginalTakesAndWeRefuse(t *testing.T) {
	one := func(port, service string) string {
		return `{"config": {"192.0.2.1": {"` + port + `": ` + service + `}}, "config6": {}}`
	}
	const good = `{"namespace": "a", "service": "b", "tcpEnabled": true}`
	for _, tt := range []struct{ name, doc, want string }{
		{"port 0", one("0", good), `cluster.config["192.0.2.1"]["0"]: port 0: want 1 to 65535`},
		{"port 65536", one("65536", good), `cluster.config["192.0.2.1"]["65536"]: port 65536: want 1 to 65535`},
		{"port by name", one("http", good), `cluster.config["192.0.2.1"].http: port http: want 1 to 65535`},
		{"port that is null", one("80", "null"), `cluster.config["192.0.2.1"]["80"]: is nothing: want a service`},
		{"no VIP", `{"config": {"vip": {"80": ` + good + `}}, "config6": {}}`, `cluster.config.vip: "vip" is no IP address`},
		{"a VIP of the other family", `{"config": {"2001:db8::1": {"80": ` + good + `}}, "config6": {}}`,
			`cluster.config["2001:db8::1"]: 2001:db8::1 is an IPv6 address: it belongs in cluster.config6`},
		{"no service", one("80", `{"tcpEnabled": true}`), "" +
			`cluster.config["192.0.2.1"]["80"]: namespace is missing` + "\n" + `cluster.config["192.0.2.1"]["80"]: service is missing`},
		{"a name that no object can have", one("80", `{"namespace": "a", "service": "b_c", "tcpEnabled": true}`),
			`cluster.config["192.0.2.1"]["80"].service: name "b_c": want 1 to 63 of the characters a-z, 0-9 and -, with none of the last at either end`},
		{"flags of another scheduler", one("80", `{"namespace": "a", "service": "b", "tcpEnabled": true, "ipvsOptions": {"flags": "sh-port"}}`),
			`cluster.config["192.0.2.1"]["80"].ipvsOptions.flags: flag "sh-port" is not for scheduler mh`},
		{"a key twice", `{"config": {"192.0.2.1": {"80": ` + good + `, "80": ` + good + `}}, "config6": {}}`,
			`cluster.config["192.0.2.1"]["80"]: given twice, first at line 1:39`},
		{"a key in two cases", `{"config": {}, "Config": {}, "config6": {}}`,
			`cluster: keys "config" and "Config" are the same: their case does not matter`},
		{"a VIP in two spellings", `{"config": {}, "config6": {"2001:db8::1": {}, "2001:DB8::1": {}}}`,
			`cluster.config6["2001:DB8::1"]: is the same VIP as cluster.config6["2001:db8::1"] (line 1)`},
		{"an MTU out of range", `{"config": {}, "config6": {}, "mtuConfig": {"192.0.2.1": "100"}}`,
			`cluster.mtuConfig["192.0.2.1"]: MTU 100: want 1280 to 9216`},
	} {
		t.Run(tt.name, func(t *testing.T) {
			var got []string
			for line := range strings.Lines(bad(t, `{"cluster": `+tt.doc+`, "fleet": {}, "nodes": [], "endpoints": []}`)) {
				if at := strings.LastIndex(line, " (line "); at > 0 {
					line = line[:at]
				}
				got = append(got, line)
			}
			if diff := cmp.Diff(tt.want, strings.Join(got, "\n")); diff != "" {
				t.Error(diff)
			}
		})
	}
}

// A default service in the document is served before that of a setting.
func TestDefaultServices(t *testing.T) {
	s, err := Parse([]byte(cluster(`{config: {192.0.2.1: {70: {namespace: a, service: b, tcpEnabled: true}}}, vipPool: [192.0.2.1, 192.0.2.2, "2001:db8::1"],
  defaultService: {Namespace: Ops, service: unicorn, portName: www, port: 70}}`)))
	if err != nil || len(s.Warnings) > 0 {
		t.Fatal(err, s.Warnings)
	}
	setting, err := DefaultService("ops/other", 71)
	if err != nil {
		t.Fatal(err)
	}
	var got []string
	for _, v := range s.Cluster.WithDefault(setting).Services {
		got = append(got, v.Key.String()+" "+v.Name()+" from "+v.Where)
	}
	want := []string{
		`tcp 192.0.2.1:70 a/b from cluster.config["192.0.2.1"]["70"]`, "tcp 192.0.2.2:70 ops/unicorn:www from cluster.vipPool[1]",
		"tcp [2001:db8::1]:70 ops/unicorn:www from cluster.vipPool[2]",
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error(diff)
	}
	for _, tt := range []struct {
		service string
		port    int
		want    string
	}{
		{"", 0, ""}, {"", 70, ""}, {"ops/unicorn:www", 70, ""}, {"ops/unicorn", 65535, ""},
		{"ops/unicorn:www", 0, "a default service and no port: want one from 1 to 65535"},
		{"ops/unicorn:www", 65536, "port 65536 of the default service: want 1 to 65535"},
		{"ops/unicorn:www", -1, "port -1 of the default service: want 1 to 65535"},
		{"unicorn:www", 70, `default service "unicorn:www": want namespace/service:portName`},
		{"ops/", 70, `default service "ops/": want namespace/service:portName`},
		{"ops/unicorn:a:b", 70, `default service "ops/unicorn:a:b": want namespace/service:portName`},
	} {
		d, err := DefaultService(tt.service, tt.port)
		switch {
		case tt.want != "" && (err == nil || err.Error() != tt.want):
			t.Errorf("%q %d: %v, %v; want %s", tt.service, tt.port, d, err, tt.want)
		case tt.want == "" && (err != nil || (d == nil) != (tt.service == "")):
			t.Errorf("%q %d: %v, %v", tt.service, tt.port, d, err)
		}
	}
}
