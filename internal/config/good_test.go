package config

import (
	"fmt"
	"os"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// docsExample returns the full example of docs/config.md.
func docsExample(t testing.TB) []byte {
	t.Helper()
	b, err := os.ReadFile("../../docs/config.md")
	if err != nil {
		t.Fatal(err)
	}
	_, after, found := strings.Cut(string(b), "```yaml\n")
	example, _, closed := strings.Cut(after, "```\n")
	if !found || !closed {
		t.Fatal("docs/config.md has no example")
	}
	return []byte(example)
}

func smallExample(t testing.TB) []byte {
	t.Helper()
	b, err := os.ReadFile("../../deploy/example/ravel-static.yaml")
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// originalExample returns a complete document of the original Ravel, in a static file.
func originalExample(t testing.TB) []byte {
	t.Helper()
	return []byte(`{"cluster": ` + string(originalDocument(t)) + `, "fleet": {}, "nodes": [], "endpoints": []}`)
}

func TestGoodDocuments(t *testing.T) {
	for golden, document := range map[string][]byte{
		"docs": docsExample(t), "small": smallExample(t), "original": originalExample(t),
		"empty": []byte(static("", "", "", "")),
	} {
		t.Run(golden, func(t *testing.T) {
			s, err := Parse(document)
			if err != nil {
				t.Fatal(err)
			}
			got, path := write(s), "testdata/"+golden+".golden"
			if *update {
				if err := os.WriteFile(path, []byte(got), 0o644); err != nil {
					t.Fatal(err)
				}
			}
			want, err := os.ReadFile(path)
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(strings.Split(string(want), "\n"), strings.Split(got, "\n")); diff != "" {
				t.Error(diff)
			}
			// Windows writes line ends and a mark at the beginning; neither means anything.
			windows := "\ufeff" + strings.ReplaceAll(string(document), "\n", "\r\n")
			if s, err := Parse([]byte(windows)); err != nil {
				t.Error(err)
			} else if diff := cmp.Diff(got, write(s)); diff != "" {
				t.Error("with CRLF and a byte order mark:", diff)
			}
		})
	}
}

// Every service of service() is one line of write.
func TestServices(t *testing.T) {
	const key = `cluster.config["192.0.2.1"]["80"]`
	const fleets, both = "forwarding the fleet's, from " + key, "flags 0x18 onePacket false "
	notKept := func(scheduler string, column int) string {
		return fmt.Sprintf("%s.ipvsOptions.scheduler: flows are not kept: by %s each director picks for itself, by mh all pick alike (line 1:%d)",
			key, scheduler, column)
	}
	for _, tt := range []struct{ service, want, warning string }{
		{"tcpEnabled: true", "tcp 192.0.2.1:80 a/b: mh " + both + fleets, ""},
		{"TCPENABLED: true", "tcp 192.0.2.1:80 a/b: mh " + both + fleets, ""},
		{"tcpEnabled: true, udpEnabled: null, ipvsOptions: null, portName: null", "tcp 192.0.2.1:80 a/b: mh " + both + fleets, ""},
		{"tcpEnabled: true, portName: HTTP", "tcp 192.0.2.1:80 a/b:http: mh " + both + fleets, ""},
		{"", "", key + ": neither tcpEnabled nor udpEnabled: nothing is served here (line 1:36)"},
		{"udpEnabled: true", "udp 192.0.2.1:80 a/b: mh " + both + fleets, ""},
		{"udpEnabled: true, udpMode: oneshot", "udp 192.0.2.1:80 a/b: mh flags 0x18 onePacket true " + fleets, ""},
		{"tcpEnabled: true, udpMode: oneshot", "tcp 192.0.2.1:80 a/b: mh " + both + fleets,
			key + ".udpMode: has no effect without udpEnabled (line 1:90)"},
		{`tcpEnabled: true, ipvsOptions: {scheduler: " MH ", flags: " "}`, "tcp 192.0.2.1:80 a/b: mh " + both + fleets, ""},
		{`tcpEnabled: true, ipvsOptions: {scheduler: "", flags: flag-1}`, "tcp 192.0.2.1:80 a/b: mh flags 0x8 onePacket false " + fleets, ""},
		{`tcpEnabled: true, IPVSOptions: {scheduler: sh, flags: "sh-port, sh-fallback"}`, "tcp 192.0.2.1:80 a/b: sh " + both + fleets, notKept("sh", 106)},
		{`tcpEnabled: true, ipvsOptions: {scheduler: sh}`, "tcp 192.0.2.1:80 a/b: sh flags 0x0 onePacket false " + fleets, notKept("sh", 106)},
		{`tcpEnabled: true, ipvsOptions: {scheduler: maglev}`, "tcp 192.0.2.1:80 a/b: mh " + both + fleets,
			key + `.ipvsOptions.scheduler: scheduler "maglev": want one of dh, fo, lblc, lblcr, lc, mh, nq, ovf, rr, sed, sh, twos, wlc, wrr; ` +
				"mh is taken, where the original took wrr (line 1:106)"},
		{`tcpEnabled: true, ipvsOptions: {flags: "mh-port,flag-3"}`, "tcp 192.0.2.1:80 a/b: mh flags 0x10 onePacket false " + fleets,
			key + ".ipvsOptions.flags: flag-3 is left out: no scheduler reads it (line 1:102)"},
		{`tcpEnabled: true, ipvsOptions: {flags: "flag-2", scheduler: wlc}`, "tcp 192.0.2.1:80 a/b: wlc flags 0x0 onePacket false " + fleets,
			key + ".ipvsOptions.flags: has no effect: scheduler wlc reads no flags (line 1:102)\n" + notKept("wlc", 123)},
		{`tcpEnabled: true, ipvsOptions: {forwardingMethod: g}`, "tcp 192.0.2.1:80 a/b: mh " + both + "forwarding direct, from " + key, ""},
		{`tcpEnabled: true, ipvsOptions: {forwardingMethod: I}`, "tcp 192.0.2.1:80 a/b: mh " + both + "forwarding tunnel, from " + key, ""},
		{`tcpEnabled: true, ipvsOptions: {forwardingMethod: auto}`, "tcp 192.0.2.1:80 a/b: mh " + both + "forwarding auto, from " + key, ""},
		{`tcpEnabled: true, ipvsOptions: {forwardingMethod: m}`, "tcp 192.0.2.1:80 a/b: mh " + both + fleets,
			key + `.ipvsOptions.forwardingMethod: forwarding method "m": want g or direct, i or tunnel, or auto; the fleet's is taken, ` +
				"where the original took g (line 1:113)"},
		{`tcpEnabled: true, ipvsOptions: {uThreshold: 0, lThreshold: -3}`, "tcp 192.0.2.1:80 a/b: mh " + both + fleets, ""},
		{`tcpEnabled: true, ipvsOptions: {uThreshold: 100, lThreshold: 80}`, "tcp 192.0.2.1:80 a/b: mh " + both + fleets,
			key + ".ipvsOptions.uThreshold: connection thresholds are refused with mh, because each director counts only its own " +
				"connections and would pick another real server than the others do: the service is served without them (line 1:107)"},
		{`tcpEnabled: true, ipvsOptions: {uThreshold: 100, lThreshold: -80, scheduler: lc}`,
			"tcp 192.0.2.1:80 a/b: lc flags 0x0 onePacket false forwarding the fleet's thresholds 100 0, from " + key,
			key + ".ipvsOptions.uThreshold: each director counts only its own flows, and shares the thresholds out among the real servers " +
				"of the service; the original did among all nodes (line 1:107)\n" + notKept("lc", 140)},
		{`tcpEnabled: true, ipvsOptions: {uThreshold: 9223372036854775807, lThreshold: 9, scheduler: lc}`,
			"tcp 192.0.2.1:80 a/b: lc flags 0x0 onePacket false forwarding the fleet's thresholds 2147483647 9, from " + key,
			key + ".ipvsOptions.uThreshold: each director counts only its own flows, and shares the thresholds out among the real servers " +
				"of the service; the original did among all nodes (line 1:107)\n" + notKept("lc", 154)},
		{`tcpEnabled: true, ipvsOptions: {uThreshold: 9, lThreshold: 9, scheduler: lc}`, "tcp 192.0.2.1:80 a/b: lc flags 0x0 onePacket false " + fleets,
			key + ".ipvsOptions.uThreshold: lThreshold 9 is not less than uThreshold 9: there is no limit, as in the original (line 1:107)\n" +
				notKept("lc", 136)},
		{`tcpEnabled: true, ipvsOptions: {persistence: 300}`, "tcp 192.0.2.1:80 a/b: mh " + both + fleets,
			key + ".ipvsOptions.persistence: persistence is refused, because each director would remember only its own " +
				"clients: the service is served without it (line 1:108)"},
		{`tcpEnabled: true, proxyProtocolEnabled: true, ipv4Enabled: false`, "tcp 192.0.2.1:80 a/b: mh " + both + fleets,
			key + ".proxyProtocolEnabled: has no effect, and there is nothing to add: packets reach the pods with the client's own address, " +
				"unless fleet.masquerade is true (line 1:103)"},
		{`tcpEnabled: true, ingressSources: [10.0.0.0/8]`, "tcp 192.0.2.1:80 a/b: mh " + both + fleets,
			key + ".ingressSources: unknown key: ignored (line 1:81)"},
	} {
		t.Run(tt.service, func(t *testing.T) {
			s, err := Parse([]byte(service(tt.service)))
			if err != nil {
				t.Fatal(err)
			}
			var got, warnings []string
			for line := range strings.Lines(write(s)) {
				line = strings.TrimSpace(line)
				if line, ok := strings.CutPrefix(line, "service "); ok {
					got = append(got, line)
				}
				if line, ok := strings.CutPrefix(line, "warning "); ok {
					warnings = append(warnings, line)
				}
			}
			if diff := cmp.Diff(tt.want, strings.Join(got, "\n")); diff != "" {
				t.Error(diff)
			}
			if diff := cmp.Diff(tt.warning, strings.Join(warnings, "\n")); diff != "" {
				t.Error(diff)
			}
		})
	}
}

func TestWarnings(t *testing.T) {
	for _, tt := range []struct{ name, doc, want string }{
		{"mtu", cluster(`{config: {192.0.2.1: {80: {namespace: a, service: b, udpEnabled: true}}}, mtuConfig: {192.0.2.1: 9000,
  192.0.2.2: "", 192.0.2.3: "1500 ", here: "1400", "2001:db8::1": "1400", 192.0.2.4: null}, mtuConfig6: null}`), "" +
			`cluster.mtuConfig["192.0.2.1"]: has no effect: no service has this VIP by TCP (line 1:107)` + "\n" +
			`cluster.mtuConfig["192.0.2.2"]: MTU "" is no number; it is left out (line 2:14)` + "\n" +
			`cluster.mtuConfig["192.0.2.3"]: MTU "1500 " is no number; it is left out (line 2:29)` + "\n" +
			`cluster.mtuConfig.here: "here" is no IP address; it is left out (line 2:44)` + "\n" +
			`cluster.mtuConfig["2001:db8::1"]: is not of the family of cluster.mtuConfig; it is left out (line 2:67)`},
		{"VIP that is null", cluster(`{config: {192.0.2.1: null}}`),
			`cluster.config["192.0.2.1"]: has no ports, so the VIP is not served (line 1:31)`},
		{"default service of nobody", cluster(`{config: {}, defaultService: {namespace: a, service: b, port: 70, ports: 71}}`), "" +
			"cluster.defaultService: has no effect: vipPool has no VIP (line 1:39)\n" +
			"cluster.defaultService.ports: unknown key: ignored (line 1:76)"},
		{"unknown keys", cluster(`{config: {}, ravel: {asn: [{}]}, "odd key": 1}`), "" +
			"cluster.ravel: unknown key: ignored (line 1:23)\n" +
			`cluster["odd key"]: unknown key: ignored (line 1:43)`},
		{"no ports", cluster(`{config: {192.0.2.1: {}}}`),
			`cluster.config["192.0.2.1"]: has no ports, so the VIP is not served (line 1:31)`},
		{"pool", cluster(`{config: {}, vipPool: [192.0.2.1, 192.0.2.1, here, 127.0.0.1]}`), "" +
			"cluster.vipPool[1]: 192.0.2.1 is in the list twice (line 1:44)\n" +
			`cluster.vipPool[2]: "here" is no IP address; it is left out (line 1:55)` + "\n" +
			`cluster.vipPool[3]: 127.0.0.1 is a loopback address: want an address that a host can have; it is left out (line 1:61)`},
		{"AS numbers", fleet(`{asn: 65535, peers: [{address: 192.0.2.9, asn: 23456, holdTime: 9s, keepalive: 4s}, {address: 192.0.2.8, asn: 0.65535, multihop: 3}]}`), "" +
			"fleet.asn: AS number 65535 is reserved (RFC 6793, RFC 7300): routers may refuse it (line 2:14)\n" +
			"fleet.peers[0].asn: AS number 23456 is reserved (RFC 6793, RFC 7300): routers may refuse it (line 2:55)\n" +
			"fleet.peers[0].keepalive: keepalive 4s is more than a third of the hold time, 9s: fewer lost messages end the session (line 2:87)\n" +
			"fleet.peers[1].asn: AS number 65535 is reserved (RFC 6793, RFC 7300): routers may refuse it (line 2:118)\n" +
			"fleet.peers[1].multihop: has no effect: the peer has the fleet's AS number, and iBGP needs no multihop (line 2:137)"},
		{"selectors", fleet(`{asn: 65100, directors: [{name: d, addresses: [10.0.0.1]}], peers: [{address: 192.0.2.9, asn: 65000, directors: [d, e], directorLabels: {rack: a}}]}`), "" +
			`fleet.peers[0].directors[1]: director "e" is not in fleet.directors (line 2:124)` + "\n" +
			"fleet.peers[0].directorLabels: no director of fleet.directors has these labels (line 2:144)"},
		{"local address of two", fleet(`{asn: 65100, directors: [{name: d, addresses: [10.0.0.1]}, {name: e, addresses: [10.0.0.2]}], peers: [{address: 192.0.2.9, asn: 65000, localAddress: 10.0.0.1}]}`),
			"fleet.peers[0].localAddress: is the address of one host, and 2 directors have this peer (line 2:157)"},
		{"node of an endpoint", endpoints(`[{namespace: a, service: b, address: 10.1.0.1, port: 80, node: n2}]`),
			`endpoints[0]: node "n2" is not in the list of nodes, so this pod gets no traffic (line 4:13)`},
	} {
		t.Run(tt.name, func(t *testing.T) {
			s, err := Parse([]byte(tt.doc))
			if err != nil {
				t.Fatal(err)
			}
			var got []string
			for _, w := range s.Warnings {
				got = append(got, w.String())
			}
			if diff := cmp.Diff(strings.Split(tt.want, "\n"), got); diff != "" {
				t.Error(diff)
			}
		})
	}
}

func TestDirectorNodes(t *testing.T) {
	s, err := Parse([]byte(`{cluster: {config: {}}, endpoints: [], nodes: [
  {name: n1, addresses: [10.0.0.1, "fd00::1", 10.0.1.1], labels: {role: lb, rack: a}}, {name: n2, addresses: [10.0.0.2]}],
  fleet: {asn: 65100, directors: [{name: d, addresses: [10.0.0.9]}], directorNodes: {role: lb},
    peers: [{address: 192.0.2.9, asn: 65000, directors: [e]}, {address: 192.0.2.8, asn: 65000, directorLabels: {rack: a}}]}}`))
	if err != nil {
		t.Fatal(err)
	}
	if len(s.Warnings) > 0 {
		t.Errorf("who peers cannot be known from the document alone, and is warned of: %v", s.Warnings)
	}
	if got := s.Fleet.Directors; len(got) != 2 || got[1].Name != "n1" || len(got[1].Addrs) != 2 || got[1].Labels["rack"] != "a" {
		t.Errorf("directors: %+v", got)
	}
}

func TestUnknownServices(t *testing.T) {
	s, err := Parse([]byte(static(`{config: {192.0.2.1: {
  80: {namespace: a, service: b, portName: http, tcpEnabled: true, udpEnabled: true},
  81: {namespace: a, service: b, portName: web, tcpEnabled: true, udpEnabled: true},
  82: {namespace: a, service: c, tcpEnabled: true}}}}`, "", "[{name: n, addresses: [10.0.0.1]}]", `[
  {namespace: a, service: b, portName: http, address: 10.1.0.1, port: 80, node: n, ready: false},
  {namespace: a, service: b, address: 10.1.0.1, port: 81, node: n}]`)))
	if err != nil {
		t.Fatal(err)
	}
	var got []string
	for _, p := range s.Unknown {
		got = append(got, p.String())
	}
	want := []string{
		`cluster.config["192.0.2.1"]["81"]: service a/b:web is unknown: no endpoint names it, so it gets no traffic; a/b has the port names "", "http"`,
		`cluster.config["192.0.2.1"]["82"]: service a/c is unknown: no endpoint names it, so it gets no traffic`,
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error(diff)
	}
}

// Whether one machine can be both is for package desired to judge; here it is only one name and its address.
func TestMachineThatIsDirectorAndNode(t *testing.T) {
	s, err := Parse([]byte(static("", `{directors: [{name: d, addresses: [10.0.0.1]}]}`, `[{name: d, addresses: [10.0.0.1]}]`, "")))
	if err != nil || len(s.Fleet.Directors) != 1 || len(s.Cluster.Nodes) != 1 {
		t.Errorf("got %+v, %v", s, err)
	}
}
