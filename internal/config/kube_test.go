package config

import (
	"context"
	"errors"
	"log/slog"
	"net/netip"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
)

// A document that stands alone means what it means as a part of a static file, with the same faults at the same places.
func TestPartsAsInStatic(t *testing.T) {
	column := regexp.MustCompile(`line \d+:\d+`)
	inPlace := func(where, text string) string {
		var lines []string
		for line := range strings.Lines(column.ReplaceAllString(text, "line")) {
			if strings.HasPrefix(line, where) {
				lines = append(lines, strings.TrimSpace(line))
			}
		}
		return strings.Join(lines, "\n")
	}
	for _, part := range []string{
		`{config: {192.0.2.1: {80: {namespace: a, service: b, portName: http, tcpEnabled: true}}}, labels: {a: b}}`,
		`{"config": {}, "config6": {"2001:db8::1": {"443": {"namespace": "a", "service": "b", "tcpEnabled": true, "udpEnabled": true}}}}`,
		`{config: {192.0.2.1: {80: {namespace: A b, service: b, tcpEnabled: maybe}, 81: null}}}`,
		`{config: {192.0.2.1: {80: {}, "80": {}}, 192.0.2.1: {}}}`,
		`{config: {2001:db8::1: {}}, config6: [], labels: 7}`,
		`{}`,
		`{config: {192.0.2.1: {70000: {namespace: a, service: b}}}, color: blue}`,
		`[1, 2]`,
	} {
		whole, wholeErr := Parse([]byte(cluster(part)))
		alone, warnings, err := ParseCluster([]byte(part), nil)
		if (err == nil) != (wholeErr == nil) {
			t.Errorf("%s: alone %v, in a static file %v", part, err, wholeErr)
			continue
		}
		if err != nil {
			if diff := cmp.Diff(inPlace("cluster", wholeErr.Error()), inPlace("cluster", err.Error())); diff != "" {
				t.Errorf("%s: faults (-in a static file +alone):\n%s", part, diff)
			}
			continue
		}
		if diff := cmp.Diff(whole.Cluster, alone, cmpopts.EquateEmpty(), cmp.Comparer(func(a, b netip.Addr) bool { return a == b })); diff != "" {
			t.Errorf("%s (-in a static file +alone):\n%s", part, diff)
		}
		if len(warnings) != len(whole.Warnings) {
			t.Errorf("%s: warnings %v, in a static file %v", part, warnings, whole.Warnings)
		}
	}
	for _, part := range []string{
		"asn: 65100\npeers: [{address: 192.0.2.9, asn: 1}]\ndirectors: [{name: d1, addresses: [10.0.0.1]}]\n",
		"asn: 0", "asn: 65100\nasn: 65101\n", "{peers: [{address: 192.0.2.9, asn: 1}]}",
	} {
		whole, wholeErr := Parse([]byte(fleet("{" + strings.ReplaceAll(strings.Trim(part, "{}\n"), "\n", ", ") + "}")))
		alone, _, err := ParseFleet([]byte(part))
		if (err == nil) != (wholeErr == nil) {
			t.Errorf("%s: alone %v, in a static file %v", part, err, wholeErr)
		}
		if err == nil && alone.ASN != whole.Fleet.ASN {
			t.Errorf("%s: ASN %d, in a static file %d", part, alone.ASN, whole.Fleet.ASN)
		}
	}
}

// What is no document names its part, so that one knows which key of a ConfigMap is meant.
func TestPartsThatAreNone(t *testing.T) {
	for _, test := range []struct{ doc, want string }{
		{"", "cluster: is empty"},
		{" \n", "cluster: is empty"},
		{"null", "cluster: is nothing: want a mapping (line 1:1)"},
		{"{", "cluster: syntax error"},
		{"hello", `cluster: want a mapping, got the string "hello" (line 1:1)`},
		{"\xff\xfe{\x00", "cluster: is UTF-16: want UTF-8"},
	} {
		_, _, err := ParseCluster([]byte(test.doc), nil)
		var e *Error
		if !errors.As(err, &e) || !strings.HasPrefix(err.Error(), test.want) {
			t.Errorf("%q: %v, want %s", test.doc, err, test.want)
		}
	}
}

func FuzzParts(f *testing.F) {
	for _, seed := range []string{"{config: {}}", `{"config":{},"config6":{}}`, "asn: 1", "null", "[", "\xff"} {
		f.Add([]byte(seed))
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		if c, _, err := ParseCluster(b, nil); err == nil {
			for _, s := range c.Services {
				if !s.Key.VIP.IsValid() || s.Key.Port == 0 || s.Namespace == "" || s.Service == "" {
					t.Errorf("%q: service %+v", b, s)
				}
			}
		}
		_, _, _ = ParseFleet(b)
	})
}

// A file with the fleet document alone is followed as a static file is, and kept for a start at which it is bad.
func TestFleetFile(t *testing.T) {
	dir := t.TempDir()
	path, kept := filepath.Join(dir, "fleet.yaml"), filepath.Join(dir, "kept")
	run := func(content string, check func(f *File)) {
		t.Helper()
		must(t, os.WriteFile(path, []byte(content), 0o600))
		f := NewFleetFile(path, slog.New(slog.DiscardHandler), nil)
		f.Keep = kept
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan struct{})
		go func() { defer close(done); _ = f.Run(ctx) }()
		defer func() { cancel(); <-done }()
		changed := f.Changed()
		if _, known := f.Latest(); !known {
			select {
			case <-changed:
			case <-time.After(10 * time.Second):
				t.Fatalf("no value of %q: %v", content, f.Status().Fault)
			}
		}
		check(f)
	}
	run("asn: 65100\n", func(f *File) {
		if s, _ := f.Latest(); s.Fleet.ASN != 65100 || f.Status().Fault != nil {
			t.Errorf("%+v, fault %v", s.Fleet, f.Status().Fault)
		}
	})
	run("asn: nobody\n", func(f *File) {
		s, _ := f.Latest()
		if fault := f.Status().Fault; s.Fleet.ASN != 65100 || fault == nil || !strings.HasPrefix(fault.Error(), "fleet.asn: ") {
			t.Errorf("%+v, fault %v", s.Fleet, fault)
		}
	})
}
