package config

import (
	"bytes"
	"encoding/json"
	"fmt"
	"maps"
	"os"
	"regexp"
	"slices"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/santhosh-tekuri/jsonschema/v6"
	"go.yaml.in/yaml/v3"
)

// schemas compiles docs/schema.
func schemas(t *testing.T) *jsonschema.Schema {
	t.Helper()
	c := jsonschema.NewCompiler()
	c.AssertFormat()
	for _, name := range []string{"cluster", "fleet", "static"} {
		b, err := os.ReadFile("../../docs/schema/" + name + ".json")
		must(t, err)
		doc, err := jsonschema.UnmarshalJSON(bytes.NewReader(b))
		must(t, err)
		must(t, c.AddResource("https://ravel.dev/schema/"+name+".json", doc))
	}
	schema, err := c.Compile("https://ravel.dev/schema/static.json")
	must(t, err)
	return schema
}

// validate checks a YAML document against a schema.
func validate(schema *jsonschema.Schema, b []byte) error {
	var v any
	if err := yaml.Unmarshal(b, &v); err != nil {
		return err
	}
	b, err := json.Marshal(textKeys(v))
	if err != nil {
		return err
	}
	doc, err := jsonschema.UnmarshalJSON(bytes.NewReader(b))
	if err != nil {
		return err
	}
	return schema.Validate(doc)
}

// textKeys makes all keys strings, as JSON wants them.
func textKeys(v any) any {
	switch v := v.(type) {
	case map[string]any:
		for k := range v {
			v[k] = textKeys(v[k])
		}
	case map[any]any:
		m := make(map[string]any, len(v))
		for k := range v {
			m[fmt.Sprint(k)] = textKeys(v[k])
		}
		return m
	case []any:
		for i := range v {
			v[i] = textKeys(v[i])
		}
	}
	return v
}

// What the parser takes the schema takes, except keys in another case.
func TestSchemaTakesGoodDocuments(t *testing.T) {
	schema := schemas(t)
	good := map[string][]byte{
		"docs": docsExample(t), "small": smallExample(t), "original": originalExample(t),
		"empty": []byte(static("", "", "", "")),
		"nulls": []byte(static("{config: {192.0.2.1: {}}, config6: null, labels: null, vipPool: null, mtuConfig: null, ipv6: null}",
			"{directors: null, peers: null, pools: null, communities: null, largeCommunities: }", "[{name: n, addresses: [10.0.0.1], labels: }]", "")),
		"asdot": []byte(fleet(`{asn: 1.10, peers: [{address: 192.0.2.9, asn: "65000.1", holdTime: 1m30s}]}`)),
		"edges": []byte(fleet(`{asn: 4294967295, peers: [{address: "2001:db8::9", asn: 1, port: 65535, multihop: 255, holdTime: 65535s}],
  med: 0, localPref: 4294967295, prepend: 16, communities: ["0:0", "65535:65535"], pools: [{name: p, vips: ["::/0", 0.0.0.0/0]}]}`)),
		"words": []byte(cluster(`{config: {192.0.2.1: {"65535": {namespace: a, service: b, tcpEnabled: null, udpEnabled: true, udpMode: Sticky,
  ipvsOptions: {scheduler: MH, flags: "flag-1, mh-port", forwardingMethod: auto, persistence: 3}}}}}`)),
		"pool and MTUs": []byte(cluster(`{config: {}, vipPool: [192.0.2.1, "2001:db8::1"], mtuConfig: {192.0.2.1: "9216", 192.0.2.2: 1280, 192.0.2.3: ""}, mtuConfig6: {"2001:db8::1": null},
  defaultService: {namespace: a, service: b, portName: null, port: 65535}}`)),
	}
	for name, b := range good {
		if _, err := Parse(b); err != nil {
			t.Errorf("%s: the parser refuses it: %v", name, err)
		}
		if err := validate(schema, b); err != nil {
			t.Errorf("%s: the schema refuses it: %v", name, err)
		}
	}
}

// What the parser refuses the schema refuses, except for what no schema can know.
func TestSchemaRefusesBadDocuments(t *testing.T) {
	schema := schemas(t)
	passes := map[string]bool{}
	for _, table := range [][]struct{ name, doc, want string }{badDocuments, badClusters, badFleets, badNodes} {
		for _, tt := range table {
			if validate(schema, []byte(tt.doc)) == nil {
				passes[tt.name] = true
			}
		}
	}
	want := []string{
		// What must differ, or fit, elsewhere in the document.
		"VIPs of others", "no asn", "node with another director's address", "two spellings", "VIP of the pool that is a node's", "two MTUs of one VIP",
		// Keys in another case are other keys to a schema.
		"both cases",
		// Finer than the formats.
		"asn asdot too large", "mapped", "no host's, v4",
		// Gone before a schema sees the document.
		"asn hex", "merge key", "tag", "two documents",
	}
	slices.Sort(want)
	if diff := cmp.Diff(want, slices.Sorted(maps.Keys(passes))); diff != "" {
		t.Error(diff)
	}
}

// docs/config.md names every key of the schemas, and its example uses each one that has an effect.
func TestDocsNameEveryKey(t *testing.T) {
	docs, err := os.ReadFile("../../docs/config.md")
	must(t, err)
	example := docsExample(t)
	noEffect := []string{
		"ipv6", "ipv4Enabled", "ipv6Enabled", "proxyProtocolEnabled",
	}
	keys := 0
	var walk func(v any)
	walk = func(v any) {
		switch v := v.(type) {
		case map[string]any:
			if properties, ok := v["properties"].(map[string]any); ok {
				for key := range properties {
					keys++
					if !regexp.MustCompile("`[^`\n]*\\b" + key + "\\b[^`\n]*`").Match(docs) {
						t.Errorf("docs/config.md does not explain %s", key)
					}
					if !slices.Contains(noEffect, key) && !regexp.MustCompile(`(?m)^[- #]*`+key+`:|[{ ]`+key+`:`).Match(example) {
						t.Errorf("the example of docs/config.md does not use %s", key)
					}
				}
			}
			for _, child := range v {
				walk(child)
			}
		case []any:
			for _, child := range v {
				walk(child)
			}
		}
	}
	for _, name := range []string{"cluster", "fleet", "static"} {
		b, err := os.ReadFile("../../docs/schema/" + name + ".json")
		must(t, err)
		var v any
		must(t, json.Unmarshal(b, &v))
		walk(v)
	}
	if keys < 50 {
		t.Errorf("found %d keys in the schemas", keys)
	}
}
