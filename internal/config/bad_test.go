package config

import (
	"errors"
	"flag"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

var update = flag.Bool("update", false, "write what the documents of testdata give")

// static makes a document of parts, each of which may be empty.
func static(cluster, fleet, nodes, endpoints string) string {
	or := func(s, otherwise string) string {
		if s == "" {
			return otherwise
		}
		return s
	}
	return "cluster: " + or(cluster, "{config: {}}") + "\nfleet: " + or(fleet, "{}") +
		"\nnodes: " + or(nodes, "[]") + "\nendpoints: " + or(endpoints, "[]") + "\n"
}

func cluster(s string) string { return static(s, "", "", "") }
func service(s string) string {
	return cluster(`{config: {192.0.2.1: {80: {namespace: a, service: b, ` + s + `}}}}`)
}
func fleet(s string) string     { return static("", s, "", "") }
func nodes(s string) string     { return static("", "", s, "") }
func endpoints(s string) string { return static("", "", "[{name: n1, addresses: [10.0.0.1]}]", s) }

// bad parses a document that must be refused and returns its faults, one a line.
func bad(t *testing.T, b string) string {
	t.Helper()
	s, err := Parse([]byte(b))
	var e *Error
	if !errors.As(err, &e) {
		t.Fatalf("parsed %q to %+v, %v", b, s, err)
	}
	return e.Error()
}

var badDocuments = []struct{ name, doc, want string }{
	{"empty", "", "document: is empty"},
	{"white space", " \n\n", "document: is empty"},
	{"comments", "# nothing\n# here\n", "document: is empty"},
	{"null", "null\n", "document: want a mapping, got nothing (line 1:1)"},
	{"separator", "---\n", "document: want a mapping, got nothing (line 2:1)"},
	{"json null", "null", "document: want a mapping, got nothing (line 1:1)"},
	{"list", "[1, 2]", "document: want a mapping, got a list (line 1:1)"},
	{"number", "7", "document: want a mapping, got 7 (line 1:1)"},
	{"text", "hello", `document: want a mapping, got the string "hello" (line 1:1)`},
	{"tab", "cluster:\n\tconfig: {}\n", "document: syntax error: found character that cannot start any token " +
		"(a tab where YAML wants spaces, or a sign that needs quotes) (line 2)"},
	{"syntax", "cluster: {config: {}\nfleet: {}\n", "document: syntax error: did not find expected ',' or '}' (line 2)"},
	{"latin-1", "cluster: {}\n# caf\xe9\n", "document: byte 0xe9 is not UTF-8 (line 2)"},
	{"utf-16", "\xff\xfec\x00l\x00", "document: is UTF-16: want UTF-8"},
	{"nul", "cluster: {}\nfl\x00eet", "document: holds a NUL byte: it is not text (line 2)"},
	{"two documents", static("", "", "", "") + "---\ncluster: {}\n",
		"document: a second document begins here: want one (line 5)"},
	{"nothing in it", "{}", "" +
		"document: cluster is missing: where none is meant, write cluster: {} (line 1:1)\n" +
		"document: fleet is missing: where none is meant, write fleet: {} (line 1:1)\n" +
		"document: nodes is missing: where none is meant, write nodes: [] (line 1:1)\n" +
		"document: endpoints is missing: where none is meant, write endpoints: [] (line 1:1)"},
	{"cut off", "cluster: {config: {}}\nfleet: {}\nnodes:\n", "" +
		"document: endpoints is missing: where none is meant, write endpoints: [] (line 1:1)\n" +
		"nodes: is nothing: where none is meant, write nodes: [] (line 3:1)"},
	{"unknown part", static("", "", "", "") + "node: []\n", "node: unknown key: did you mean nodes? (line 5:1)"},
	{"duplicate key", static("", "", "", "") + "nodes: []\n", "nodes: given twice, first at line 3:1 (line 5:1)"},
	{"duplicate key deep down", fleet(`{asn: 65100, peers: [{address: 192.0.2.9, asn: 1, asn: 2}]}`),
		"fleet.peers[0].asn: given twice, first at line 2:50 (line 2:58)"},
	{"duplicate key in JSON", `{"cluster": {"config": {"192.0.2.1": {}, "192.0.2.1": {}}},
"fleet": {}, "nodes": [], "endpoints": []}`,
		`cluster.config["192.0.2.1"]: given twice, first at line 1:25 (line 1:42)`},
	{"one key as number and string", cluster(`{config: {192.0.2.1: {80: {}, "80": {}}}}`),
		`cluster.config["192.0.2.1"]["80"]: given twice, first at line 1:32 (line 1:40)`},
	{"alias", "cluster: &c {config: {}}\nfleet: {}\nnodes: []\nendpoints: *c\n", "" +
		"cluster: anchor &c: anchors and aliases are not supported (line 1:10)\n" +
		"endpoints: alias *c: aliases are not supported: write the value out (line 4:12)"},
	{"merge key", fleet("{<<: {asn: 1}}"), "fleet: merge keys are not supported: write the values out (line 2:9)"},
	{"tag", nodes("[{name: !!str 7, addresses: [10.0.0.1]}]"),
		"nodes[0].name: tag !!str: tags are not supported (line 3:16)"},
	{"key that is a list", fleet("{? [a] : 1}"), "fleet: a key that is a list: want a plain one (line 2:11)"},
	{"windows line ends", "cluster: {config: {}}\r\nfleet: {}\r\nnodes: []\r\nendpoints: 7\r\n",
		"endpoints: want a list, got 7 (line 4:12)"},
}

var badClusters = []struct{ name, doc, want string }{
	{"no config", cluster("{}"), "cluster: config and config6 are missing: where no service is meant, write config: {} (line 1:10)"},
	{"config null", cluster("{config: null, Config6: }"), "cluster: config and config6 are missing: where no service is meant, write config: {} (line 1:10)"},
	{"config list", cluster("{config: []}"), "cluster.config: want a mapping, got a list (line 1:19)"},
	{"both cases", cluster("{config: {}, Config: {}}"),
		`cluster: keys "config" and "Config" are the same: their case does not matter (line 1:23)`},
	{"no address", cluster("{config: {localhost: {}}}"), `cluster.config.localhost: "localhost" is no IP address (line 1:20)`},
	{"leading zeros", cluster("{config: {192.0.2.010: {}}}"), `cluster.config["192.0.2.010"]: "192.0.2.010" is no IP address (line 1:20)`},
	{"prefix", cluster("{config: {192.0.2.0/24: {}}}"), `cluster.config["192.0.2.0/24"]: "192.0.2.0/24" is no IP address (line 1:20)`},
	{"v6 in config", cluster(`{config: {"2001:db8::1": {}}}`),
		`cluster.config["2001:db8::1"]: 2001:db8::1 is an IPv6 address: it belongs in cluster.config6 (line 1:20)`},
	{"v4 in config6", cluster(`{config6: {192.0.2.1: {}}}`),
		`cluster.config6["192.0.2.1"]: 192.0.2.1 is an IPv4 address: it belongs in cluster.config (line 1:21)`},
	{"two spellings", cluster(`{config6: {"2001:db8::1": {}, "2001:DB8:0::1": {}}}`),
		`cluster.config6["2001:DB8:0::1"]: is the same VIP as cluster.config6["2001:db8::1"] (line 1) (line 1:40)`},
	{"mapped", cluster(`{config6: {"::ffff:192.0.2.1": {}}}`), `cluster.config6["::ffff:192.0.2.1"]: ` +
		`::ffff:192.0.2.1 is an IPv4-mapped IPv6 address: write 192.0.2.1: want an address that a host can have (line 1:21)`},
	{"no host's", cluster(`{config6: {"fe80::1%eth0": {}, "::": {}, "::1": {}, "ff02::1": {}, "fe80::1": {}}}`), "" +
		`cluster.config6["fe80::1%eth0"]: fe80::1%eth0 has a zone: want an address that a host can have (line 1:21)` + "\n" +
		`cluster.config6["::"]: :: is the unspecified address: want an address that a host can have (line 1:41)` + "\n" +
		`cluster.config6["::1"]: ::1 is a loopback address: want an address that a host can have (line 1:51)` + "\n" +
		`cluster.config6["ff02::1"]: ff02::1 is a multicast address: want an address that a host can have (line 1:62)` + "\n" +
		`cluster.config6["fe80::1"]: fe80::1 is a link-local address: want an address that a host can have (line 1:77)`},
	{"no host's, v4", cluster(`{config: {0.1.2.3: {}, 255.255.255.255: {}}}`), "" +
		`cluster.config["0.1.2.3"]: 0.1.2.3 is an address of "this network" (RFC 1122): want an address that a host can have (line 1:20)` + "\n" +
		`cluster.config["255.255.255.255"]: 255.255.255.255 is the broadcast address: want an address that a host can have (line 1:33)`},
	{"VIP null", cluster("{config: {192.0.2.1: }}"),
		`cluster.config["192.0.2.1"]: has no ports: where none is meant, write {} (line 1:20)`},
	{"port 0", cluster("{config: {192.0.2.1: {0: {namespace: a, service: b, tcpEnabled: true}}}}"),
		`cluster.config["192.0.2.1"]["0"]: port 0: want 1 to 65535 (line 1:32)`},
	{"ports", cluster(`{config: {192.0.2.1: {
    70000: {namespace: a, service: b}, "-1": {namespace: a, service: b}, 080: {namespace: a, service: b},
    0x50: {namespace: a, service: b}, http: {namespace: a, service: b}, "": {namespace: a, service: b}, "8080": null}}}`), "" +
		`cluster.config["192.0.2.1"]["70000"]: port 70000: want 1 to 65535 (line 2:5)` + "\n" +
		`cluster.config["192.0.2.1"]["-1"]: port -1: want 1 to 65535 (line 2:40)` + "\n" +
		`cluster.config["192.0.2.1"]["080"]: port 080: want 1 to 65535 (line 2:74)` + "\n" +
		`cluster.config["192.0.2.1"]["0x50"]: port 0x50: want 1 to 65535 (line 3:5)` + "\n" +
		`cluster.config["192.0.2.1"].http: port http: want 1 to 65535 (line 3:39)` + "\n" +
		`cluster.config["192.0.2.1"][""]: port : want 1 to 65535 (line 3:73)` + "\n" +
		`cluster.config["192.0.2.1"]["8080"]: is nothing: want a service (line 3:105)`},
	{"names", cluster(`{config: {192.0.2.1: {80: {namespace: "a b", service: 7, portName: "x\ny", tcpEnabled: "true"}}}}`), "" +
		`cluster.config["192.0.2.1"]["80"].namespace: name "a b": want 1 to 63 of the characters a-z, 0-9 and -, with none of the last at either end (line 1:48)` + "\n" +
		`cluster.config["192.0.2.1"]["80"].service: want a string (put it in quotes), got 7 (line 1:64)` + "\n" +
		`cluster.config["192.0.2.1"]["80"].portName: name "x\ny": want 1 to 63 of the characters a-z, 0-9 and -, with none of the last at either end (line 1:77)` + "\n" +
		`cluster.config["192.0.2.1"]["80"].tcpEnabled: want true or false, got the string "true" (line 1:97)`},
	{"yes", service("tcpEnabled: yes"), `cluster.config["192.0.2.1"]["80"].tcpEnabled: want true or false, got the string "yes" (line 1:75)`},
	{"udp mode", service("udpEnabled: true, udpMode: round"),
		`cluster.config["192.0.2.1"]["80"].udpMode: udpMode "round": want oneshot or sticky (line 1:90)`},
	{"flags", service(`tcpEnabled: true, ipvsOptions: {flags: "flag-1,sh-port,frob"}`), "" +
		`cluster.config["192.0.2.1"]["80"].ipvsOptions.flags: flag "sh-port" is not for scheduler mh (line 1:102)` + "\n" +
		`cluster.config["192.0.2.1"]["80"].ipvsOptions.flags: flag "frob": want flag-1, flag-2, flag-3, mh-fallback, mh-port, sh-fallback or sh-port (line 1:102)`},
	{"thresholds", service(`tcpEnabled: true, ipvsOptions: {uThreshold: "7", lThreshold: 1.5}`), "" +
		`cluster.config["192.0.2.1"]["80"].ipvsOptions.uThreshold: want a number without quotes, got the string "7" (line 1:107)` + "\n" +
		`cluster.config["192.0.2.1"]["80"].ipvsOptions.lThreshold: want a whole number, got 1.5 (line 1:124)`},
	{"labels", cluster("{config: {}, labels: {a: true, b: 7, c: , d: [x], \"\": y}}"), "" +
		`cluster.labels.a: want a string (put it in quotes), got true (line 1:35)` + "\n" +
		`cluster.labels.b: want a string (put it in quotes), got 7 (line 1:44)` + "\n" +
		`cluster.labels.c: want a string, got nothing (line 1:50)` + "\n" +
		`cluster.labels.d: want a string, got a list (line 1:55)` + "\n" +
		`cluster.labels[""]: an empty key (line 1:60)`},
	{"pool", cluster("{config: {}, vipPool: [7]}"), `cluster.vipPool[0]: want a string (put it in quotes), got 7 (line 1:33)`},
	{"default service", cluster(`{config: {}, vipPool: [192.0.2.1], defaultService: {namespace: "a b", port: 70000}}`), "" +
		"cluster.defaultService: service is missing (line 1:61)\n" +
		`cluster.defaultService.namespace: name "a b": want 1 to 63 of the characters a-z, 0-9 and -, with none of the last at either end (line 1:73)` + "\n" +
		"cluster.defaultService.port: 70000: want 1 to 65535 (line 1:86)"},
	{"default service without a port", cluster(`{config: {}, defaultService: {namespace: a, service: b}}`),
		"cluster.defaultService: port is missing (line 1:39)"},
	{"VIP of the pool that is a node's", static("{config: {}, vipPool: [10.0.0.7], defaultService: {namespace: a, service: b, port: 70}}", "",
		"[{name: n, addresses: [10.0.0.7]}]", ""), "nodes[0].addresses[0]: 10.0.0.7 is the VIP of cluster.vipPool[0] (line 3:31)"},
	{"MTU", cluster(`{config: {192.0.2.1: {}}, mtuConfig: {192.0.2.1: "1279", 192.0.2.2: 9217, 192.0.2.3: -1, here: "0", 192.0.2.4: [1500]}}`), "" +
		`cluster.mtuConfig["192.0.2.1"]: MTU 1279: want 1280 to 9216 (line 1:59)` + "\n" +
		`cluster.mtuConfig["192.0.2.2"]: MTU 9217: want 1280 to 9216 (line 1:78)` + "\n" +
		`cluster.mtuConfig["192.0.2.3"]: MTU -1: want 1280 to 9216 (line 1:95)` + "\n" +
		`cluster.mtuConfig.here: MTU 0: want 1280 to 9216 (line 1:105)` + "\n" +
		`cluster.mtuConfig["192.0.2.4"]: want a string or a number, got a list (line 1:121)`},
	{"two MTUs of one VIP", cluster(`{config6: {"2001:db8::1": {80: {namespace: a, service: b, tcpEnabled: true}}}, mtuConfig6: {"2001:db8::1": "1400", "2001:DB8::1": 1500}}`),
		`cluster.mtuConfig6["2001:DB8::1"]: 2001:db8::1 has another MTU already, 1400 (line 1:140)`},
}

var badFleets = []struct{ name, doc, want string }{
	{"unknown key", fleet("{ASN: 1, hold-time: 3s, announce: some}"), "" +
		"fleet.ASN: unknown key: did you mean asn? (line 2:9)\n" +
		"fleet.hold-time: unknown key: want asn, directors, directorNodes, peers, forwarding, masquerade, announce, communities, largeCommunities, med, localPref, prepend, pools (line 2:17)\n" +
		`fleet.announce: announce "some": want any or all (line 2:42)`},
	{"asn", fleet("{asn: 0}"), "fleet.asn: 0: want 1 to 4294967295 (line 2:14)"},
	{"asn too large", fleet("{asn: 4294967296}"), "fleet.asn: 4294967296: want 1 to 4294967295 (line 2:14)"},
	{"asn in quotes", fleet(`{asn: "65100"}`), `fleet.asn: want a number without quotes, got the string "65100" (line 2:14)`},
	{"asn hex", fleet(`{asn: 0x10}`), `fleet.asn: 0x10: want 1 to 4294967295 (line 2:14)`},
	{"asn NaN", fleet(`{asn: .nan}`), `fleet.asn: AS number ".nan": want 1 to 4294967295, or two numbers to 65535 with a dot between (line 2:14)`},
	{"asn 0.0", fleet(`{asn: 0.0}`), `fleet.asn: AS number 0 is nobody's (RFC 7607): want 1 to 4294967295 (line 2:14)`},
	{"asn asdot too large", fleet(`{asn: 1.65536}`), `fleet.asn: AS number "1.65536": want 1 to 4294967295, or two numbers to 65535 with a dot between (line 2:14)`},
	{"no asn", fleet("{peers: [{address: 192.0.2.9, asn: 65000}]}"), "fleet: asn is missing, and there are peers (line 2:8)"},
	{"directors", fleet(`{directors: [{name: a, addresses: [10.0.0.1], routerID: 0.0.0.0}, {name: a, addresses: [10.0.0.1, 10.0.0.2]},
  {addresses: []}, {name: "a b", addresses: 10.0.0.3, label: {}}, 7]}`), "" +
		`fleet.directors[0].routerID: router ID "0.0.0.0": want four numbers such as 192.0.2.1 (line 2:64)` + "\n" +
		`fleet.directors[1]: name "a" is that of fleet.directors[0] too (line 2:74)` + "\n" +
		`fleet.directors[1]: addresses: want one of a family at most, as next hop (line 2:74)` + "\n" +
		`fleet.directors[1].addresses[0]: 10.0.0.1 is fleet.directors[0].addresses[0] too (line 2:96)` + "\n" +
		`fleet.directors[2]: name is missing (line 3:3)` + "\n" +
		`fleet.directors[2].addresses: is empty: want one address at least (line 3:15)` + "\n" +
		`fleet.directors[3].name: name "a b": want 1 to 253 letters, digits, -, _ and ., with a letter or digit at either end (line 3:27)` + "\n" +
		`fleet.directors[3].addresses: want a list, got the string "10.0.0.3" (line 3:45)` + "\n" +
		`fleet.directors[3].label: unknown key: did you mean labels? (line 3:55)` + "\n" +
		`fleet.directors[4]: want a mapping, got 7 (line 3:67)`},
	{"router IDs", fleet(`{directors: [{name: a, addresses: [10.0.0.1], routerID: 10.9.9.9}, {name: b, addresses: [10.0.0.2], routerID: 10.9.9.9},
  {name: c, addresses: [10.0.0.3], routerID: "2001:db8::1"}]}`), "" +
		`fleet.directors[1].routerID: 10.9.9.9 is fleet.directors[0].routerID too (line 2:118)` + "\n" +
		`fleet.directors[2].routerID: router ID "2001:db8::1": want four numbers such as 192.0.2.1 (line 3:46)`},
	{"peers", fleet(`{asn: 65100, peers: [
  {},
  {address: router1, port: 0, asn: 65000, holdTime: 2s, keepalive: 1, multihop: 256, passwordFile: key, passive: 1},
  {address: 192.0.2.9, asn: 65000, holdTime: 3, keepalive: 500ms, localAddress: "2001:db8::7"},
  {address: 192.0.2.8, asn: 65000, holdTime: 9s, keepalive: 9s},
  {address: 192.0.2.7, asn: 65000, holdTime: 3500ms, keepalive: soon},
  {address: 192.0.2.7, asn: 65000, directors: x, directorLabels: [y]}]}`), "" +
		`fleet.peers[0]: address is missing (line 3:3)` + "\n" +
		`fleet.peers[0]: asn is missing (line 3:3)` + "\n" +
		`fleet.peers[1].address: "router1" is no IP address (line 4:13)` + "\n" +
		`fleet.peers[1].port: 0: want 1 to 65535 (line 4:28)` + "\n" +
		`fleet.peers[1].holdTime: duration 2s: want 3s to 18h12m15s (line 4:53)` + "\n" +
		`fleet.peers[1].keepalive: want a duration such as "3s", got 1 (line 4:68)` + "\n" +
		`fleet.peers[1].multihop: 256: want 0 to 255 (line 4:81)` + "\n" +
		`fleet.peers[1].passwordFile: password file "key": want a path that begins with / (line 4:100)` + "\n" +
		`fleet.peers[1].passive: want true or false, got 1 (line 4:114)` + "\n" +
		`fleet.peers[2].holdTime: want a duration such as "3s", got 3 (line 5:46)` + "\n" +
		`fleet.peers[2].keepalive: duration 500ms: want 1s to 18h12m15s (line 5:60)` + "\n" +
		`fleet.peers[2].localAddress: local address 2001:db8::7 is not of the family of 192.0.2.9 (line 5:81)` + "\n" +
		`fleet.peers[3].keepalive: keepalive 9s is not less than the hold time, 9s (line 6:61)` + "\n" +
		`fleet.peers[4].holdTime: duration 3.5s: BGP counts in whole seconds (line 7:46)` + "\n" +
		`fleet.peers[4].keepalive: duration "soon": want a number and a unit such as "3s" (line 7:65)` + "\n" +
		`fleet.peers[5]: address 192.0.2.7 is that of fleet.peers[4] too, for the same director (line 8:3)` + "\n" +
		`fleet.peers[5].directors: want a list, got the string "x" (line 8:47)` + "\n" +
		`fleet.peers[5].directorLabels: want a mapping, got a list (line 8:66)`},
	{"no label of nodes that are directors", fleet(`{directorNodes: {}}`), "fleet.directorNodes: has no label: want one at least, or no directorNodes (line 2:24)"},
	{"one router twice for a director", fleet(`{asn: 65100, directors: [{name: a, addresses: [10.0.0.1], labels: {x: "1"}}, {name: b, addresses: [10.0.0.2]}], peers: [
  {address: 192.0.2.9, asn: 65000, directors: [b]},
  {address: 192.0.2.9, asn: 65000, directorLabels: {x: "1"}},
  {address: 192.0.2.9, asn: 65000, directors: [a, a]}]}`), "" +
		`fleet.peers[2]: address 192.0.2.9 is that of fleet.peers[1] too, for the same director (line 5:3)` + "\n" +
		`fleet.peers[2].directors[1]: director "a" is in the list twice (line 5:51)`},
	{"policy", fleet(`{forwarding: nat, masquerade: no, announce: 7, communities: ["65100:1", "65100:65536", no-exports, 65100, "65100:1"],
  largeCommunities: ["65100:1:2", "65100:1", "1:2:4294967296", "65100:1:2"], med: -1, localPref: 4294967296,
  prepend: 17}`), "" +
		`fleet.forwarding: forwarding "nat": want auto, direct or tunnel (line 2:21)` + "\n" +
		`fleet.masquerade: want true or false, got the string "no" (line 2:38)` + "\n" +
		`fleet.announce: want a string (put it in quotes), got 7 (line 2:52)` + "\n" +
		`fleet.communities[1]: community "65100:65536": want two numbers to 65535 such as 65100:1, or a name such as no-export (line 2:80)` + "\n" +
		`fleet.communities[2]: community "no-exports": want two numbers to 65535 such as 65100:1, or a name such as no-export (line 2:95)` + "\n" +
		`fleet.communities[3]: want a string (put it in quotes), got 65100 (line 2:107)` + "\n" +
		`fleet.communities[4]: 65100:1 is in the list twice (line 2:114)` + "\n" +
		`fleet.largeCommunities[1]: large community "65100:1": want three numbers such as 65100:1:2 (line 3:35)` + "\n" +
		`fleet.largeCommunities[2]: large community "1:2:4294967296": want three numbers such as 65100:1:2 (line 3:46)` + "\n" +
		`fleet.largeCommunities[3]: 65100:1:2 is in the list twice (line 3:64)` + "\n" +
		`fleet.med: -1: want 0 to 4294967295 (line 3:83)` + "\n" +
		`fleet.localPref: 4294967296: want 0 to 4294967295 (line 3:98)` + "\n" +
		`fleet.prepend: 17: want 0 to 16 (line 4:12)`},
	{"pools", fleet(`{pools: [{name: a, vips: [192.0.2.0/24, 192.0.2.7, 192.0.3.1/24]}, {name: a, vips: []}, {vips: [192.0.2.0/25, x, 1/2, "::ffff:1.2.3.4/120"]},
  {name: d, vips: [0.0.0.0/0]}, {name: e}]}`), "" +
		`fleet.pools[0].vips[0]: 192.0.2.0/24 overlaps 0.0.0.0/0 of fleet.pools[3].vips[0] (line 2:34)` + "\n" +
		`fleet.pools[0].vips[1]: 192.0.2.7/32 overlaps 0.0.0.0/0 of fleet.pools[3].vips[0] (line 2:48)` + "\n" +
		`fleet.pools[0].vips[2]: 192.0.3.1/24 has bits behind its length: did you mean 192.0.3.0/24? (line 2:59)` + "\n" +
		`fleet.pools[1]: name "a" is that of fleet.pools[0] too (line 2:75)` + "\n" +
		`fleet.pools[1].vips: is empty: want one prefix or address at least (line 2:91)` + "\n" +
		`fleet.pools[2]: name is missing (line 2:96)` + "\n" +
		`fleet.pools[2].vips[0]: 192.0.2.0/25 overlaps 0.0.0.0/0 of fleet.pools[3].vips[0] (line 2:104)` + "\n" +
		`fleet.pools[2].vips[1]: "x" is no IP address (line 2:118)` + "\n" +
		`fleet.pools[2].vips[2]: "1/2" is no prefix or address (line 2:121)` + "\n" +
		`fleet.pools[2].vips[3]: ::ffff:1.2.3.4/120 is IPv4-mapped IPv6: write it as IPv4 (line 2:126)` + "\n" +
		`fleet.pools[4]: vips is missing (line 3:33)`},
}

var badNodes = []struct{ name, doc, want string }{
	{"nodes", nodes(`[{name: a, addresses: [10.0.0.1, 10.0.0.1]}, {name: a, addresses: [10.0.0.1]}, {name: b}, {name: c, addresses: [x], ready: maybe, role: y}]`), "" +
		`nodes[0].addresses[1]: 10.0.0.1 is nodes[0].addresses[0] too (line 3:41)` + "\n" +
		`nodes[1]: name "a" is that of nodes[0] too (line 3:53)` + "\n" +
		`nodes[1].addresses[0]: 10.0.0.1 is nodes[0].addresses[0] too (line 3:75)` + "\n" +
		`nodes[2]: addresses is missing (line 3:87)` + "\n" +
		`nodes[3].addresses[0]: "x" is no IP address (line 3:120)` + "\n" +
		`nodes[3].ready: want true or false, got the string "maybe" (line 3:131)` + "\n" +
		`nodes[3].role: unknown key: want name, addresses, labels, ready (line 3:138)`},
	{"node with another director's address", static("", `{directors: [{name: d, addresses: [10.0.0.1]}]}`,
		`[{name: n, addresses: [10.0.0.2, 10.0.0.1]}]`, ""),
		`nodes[0].addresses[1]: 10.0.0.1 is fleet.directors[0].addresses[0] too, of director "d": a director can be no real server of its own (line 3:41)`},
	{"endpoints", endpoints(`[{}, {namespace: A, service: b, protocol: sctp, address: 10.1.0.1, port: 0, node: n1, ready: true, terminating: true},
  {namespace: a, service: b, address: 10.1.0.2, port: "80", node: n1},
  {namespace: a, service: b, address: 10.1.0.3, port: 80, node: n1},
  {namespace: a, service: b, protocol: TCP, address: 10.1.0.3, port: 80, node: n1}]`), "" +
		`endpoints[0]: namespace is missing (line 4:13)` + "\n" +
		`endpoints[0]: service is missing (line 4:13)` + "\n" +
		`endpoints[0]: node is missing (line 4:13)` + "\n" +
		`endpoints[0]: address is missing (line 4:13)` + "\n" +
		`endpoints[0]: port is missing (line 4:13)` + "\n" +
		`endpoints[1]: is both ready and terminating: want one of them (line 4:17)` + "\n" +
		`endpoints[1].namespace: name "A": want 1 to 63 of the characters a-z, 0-9 and -, with none of the last at either end (line 4:29)` + "\n" +
		`endpoints[1].protocol: protocol "sctp": want tcp or udp (line 4:54)` + "\n" +
		`endpoints[1].port: 0: want 1 to 65535 (line 4:85)` + "\n" +
		`endpoints[2].port: want a number without quotes, got the string "80" (line 5:55)` + "\n" +
		`endpoints[4]: is the same as endpoints[3] (line 7:3)`},
	{"VIPs of others", static(`{config: {192.0.2.1: {80: {namespace: a, service: b, tcpEnabled: true}}}}`,
		`{asn: 1, directors: [{name: d, addresses: [192.0.2.1]}], peers: [{address: 192.0.2.1, asn: 2}]}`,
		`[{name: n, addresses: [192.0.2.1]}]`,
		`[{namespace: a, service: b, address: 192.0.2.1, port: 80, node: n}]`), "" +
		`fleet.directors[0].addresses[0]: 192.0.2.1 is the VIP of cluster.config["192.0.2.1"] (line 2:51)` + "\n" +
		`fleet.peers[0].address: 192.0.2.1 is the VIP of cluster.config["192.0.2.1"] (line 2:83)` + "\n" +
		`nodes[0].addresses[0]: 192.0.2.1 is the VIP of cluster.config["192.0.2.1"] (line 3:31)` + "\n" +
		`nodes[0].addresses[0]: 192.0.2.1 is fleet.directors[0].addresses[0] too, of director "d": a director can be no real server of its own (line 3:31)` + "\n" +
		`endpoints[0].address: 192.0.2.1 is the VIP of cluster.config["192.0.2.1"] (line 4:49)`},
}

func TestBadDocuments(t *testing.T) {
	for _, table := range [][]struct{ name, doc, want string }{badDocuments, badClusters, badFleets, badNodes} {
		for _, tt := range table {
			t.Run(tt.name, func(t *testing.T) {
				if diff := cmp.Diff(strings.Split(tt.want, "\n"), strings.Split(bad(t, tt.doc), "\n")); diff != "" {
					t.Error(diff)
				}
			})
		}
	}
}
