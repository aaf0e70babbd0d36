package config

import (
	"bytes"
	"fmt"
	"testing"
)

// large makes a document of 1,000 services, 500 nodes and 20,000 endpoints, in YAML or JSON.
func large(json bool) []byte {
	var b bytes.Buffer
	key := func(s string) string {
		if json {
			return `"` + s + `"`
		}
		return s
	}
	line := func(format string, args ...any) { fmt.Fprintf(&b, format+"\n", args...) }
	list := func(name string, count int, element func(i int) []string) {
		line("%s: [", key(name))
		for i := range count {
			fields := element(i)
			b.WriteString("  {")
			for j := 0; j < len(fields); j += 2 {
				if j > 0 {
					b.WriteString(", ")
				}
				b.WriteString(key(fields[j]) + ": " + fields[j+1])
			}
			b.WriteString("}")
			if i < count-1 {
				b.WriteString(",")
			}
			b.WriteString("\n")
		}
		b.WriteString("]")
	}
	quoted := func(format string, args ...any) string { return `"` + fmt.Sprintf(format, args...) + `"` }
	line("{%s: {%s: {", key("cluster"), key("config"))
	for i := range 1000 {
		comma := ","
		if i == 999 {
			comma = ""
		}
		line(`  "10.255.%d.%d": {"80": {%s: "ns", %s: "svc-%d", %s: "http", %s: true, %s: {%s: "mh", %s: "mh-port,mh-fallback"}}}%s`,
			i/250, i%250+1, key("namespace"), key("service"), i, key("portName"), key("tcpEnabled"), key("ipvsOptions"),
			key("scheduler"), key("flags"), comma)
	}
	line("}}, %s: {%s: 65100},", key("fleet"), key("asn"))
	list("nodes", 500, func(i int) []string {
		return []string{"name", quoted("node-%d", i), "addresses", "[" + quoted("10.254.%d.%d", i/250, i%250+1) + "]"}
	})
	b.WriteString(",")
	list("endpoints", 20000, func(i int) []string {
		return []string{
			"namespace", `"ns"`, "service", quoted("svc-%d", i%1000), "portName", `"http"`,
			"address", quoted("10.%d.%d.%d", i/62500, i/250%250, i%250+1), "port", "8080", "node", quoted("node-%d", i%500),
		}
	})
	line("}")
	return b.Bytes()
}

func BenchmarkParse(b *testing.B) {
	for name, json := range map[string]bool{"json": true, "yaml": false} {
		document := large(json)
		b.Run(name, func(b *testing.B) {
			b.SetBytes(int64(len(document)))
			b.ReportAllocs()
			for b.Loop() {
				s, err := Parse(document)
				if err != nil || len(s.Cluster.Services) != 1000 || len(s.Cluster.Endpoints) != 20000 || len(s.Unknown) > 0 {
					b.Fatal(err, len(s.Cluster.Services), len(s.Cluster.Endpoints), len(s.Unknown))
				}
			}
		})
	}
}
