// Package deploy has the chart and what is made of it, and the tests of both.
package deploy

import (
	"bytes"
	"encoding/json"
	"os"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"go.yaml.in/yaml/v3"
)

const schemaFile = "helm/ravel/values.schema.json"

// Settings that the chart gives itself.
var own = []string{
	"static", "node", "admin-socket", "state-dir", "listen", "kubeconfig", "config-namespace", "config-name", "config-key", "fleet-key",
	"fleet-file", "gossip-advertise", "gossip-key-file", "gossip-insecure",
	"cleanup-on-exit", // a pod that is restarted is not one that goes
}

// Settings that both roles must have alike, because the cleanup of a node knows one value only.
var alike = []string{"iptables", "iptables-chain", "link"}

// The chart's schema takes the settings that deploy/ravel.yaml has, and no others. RAVEL_TEST_UPDATE=1 writes them anew.
func TestSchemaHasEverySetting(t *testing.T) {
	b, err := os.ReadFile(schemaFile)
	if err != nil {
		t.Fatal(err)
	}
	var schema map[string]any
	if err := json.Unmarshal(b, &schema); err != nil {
		t.Fatal(err)
	}
	common, director, realserver := settings(t)
	definitions := schema["definitions"].(map[string]any)
	for name, sections := range map[string][]map[string]any{
		"settings": {common}, "directorSettings": {common, director}, "realserverSettings": {common, realserver},
	} {
		properties := map[string]any{}
		for _, section := range sections {
			for key, is := range section {
				if !slices.Contains(own, key) && (name == "settings" || !slices.Contains(alike, key)) {
					properties[key] = is
				}
			}
		}
		definitions[name] = map[string]any{"type": "object", "additionalProperties": false, "properties": properties}
	}
	var want bytes.Buffer
	encoder := json.NewEncoder(&want)
	encoder.SetEscapeHTML(false)
	encoder.SetIndent("", "  ")
	if err := encoder.Encode(schema); err != nil {
		t.Fatal(err)
	}
	if os.Getenv("RAVEL_TEST_UPDATE") != "" {
		if err := os.WriteFile(schemaFile, want.Bytes(), 0o644); err != nil {
			t.Fatal(err)
		}
		return
	}
	if diff := cmp.Diff(want.String(), string(b)); diff != "" {
		t.Errorf("%s (-want +got):\n%s", schemaFile, diff)
	}
}

var duration = regexp.MustCompile(`^([0-9.]+(ms|s|m|h))+$`)

// settings reads deploy/ravel.yaml: what the schema says of each setting of both roles, of directors and of realservers.
func settings(t *testing.T) (common, director, realserver map[string]any) {
	t.Helper()
	b, err := os.ReadFile("ravel.yaml")
	if err != nil {
		t.Fatal(err)
	}
	common, director, realserver = map[string]any{}, map[string]any{}, map[string]any{}
	section := common
	for line := range strings.Lines(string(b)) {
		switch line = strings.TrimSpace(line); {
		case line == "# Directors.":
			section = director
		case line == "# Realservers.":
			section = realserver
		case strings.HasPrefix(line, "#") && !strings.HasPrefix(line, "# "):
			var setting map[string]any
			if err := yaml.Unmarshal([]byte(line[1:]), &setting); err != nil {
				t.Fatalf("%s: %v", line, err)
			}
			for name, value := range setting {
				section[name] = schemaOf(t, name, value)
			}
		}
	}
	for _, name := range slices.Concat(own, alike) {
		if common[name] == nil {
			t.Errorf("%s is no setting of both roles", name)
		}
	}
	return common, director, realserver
}

// schemaOf is the schema of a setting, by its default.
func schemaOf(t *testing.T, name string, value any) map[string]any {
	switch v := value.(type) {
	case bool:
		return map[string]any{"type": "boolean"}
	case int:
		return map[string]any{"type": "integer"}
	case string:
		if duration.MatchString(v) {
			return map[string]any{"$ref": "#/definitions/duration"}
		}
		return map[string]any{"type": "string"}
	case []any:
		return map[string]any{"type": "array", "items": map[string]any{"type": "string"}}
	}
	t.Fatalf("%s: what is %v (%T)?", name, value, value)
	return nil
}
