package main

import (
	"strings"
	"testing"
)

func TestWhereTheDocumentsComeFrom(t *testing.T) {
	const static = "../../deploy/example/ravel-static.yaml"
	for _, c := range []struct {
		args []string
		want []string // in what is said
	}{
		{nil, []string{"--static: not set", "--config-name"}},
		{[]string{"--static", static, "--config-name", "lb"}, []string{"--config-name: set beside --static"}},
		{[]string{"--config-name", "lb"}, []string{"--config-namespace: not set", "--config-key: not set", "--fleet-file: not set"}},
		{[]string{"--config-name", "lb", "--config-namespace", "ravel", "--config-key", "a", "--fleet-key", "a"}, []string{"--fleet-key: \"a\" is that of the cluster document"}},
		{[]string{"--config-name", "lb", "--config-namespace", "ravel", "--config-key", "a", "--fleet-key", "b", "--fleet-file", "f"},
			[]string{"--fleet-key: set beside --fleet-file"}},
		{[]string{"--config-name", "lb", "--config-namespace", "ravel", "--config-key", "a", "--fleet-key", "b", "--max-cache-age", "-1s", "--kube-wait", "soon"},
			[]string{"--max-cache-age", "--kube-wait"}},
		{[]string{"--static", static, "--auto-configure-service", "a"}, []string{"--auto-configure-service"}},
	} {
		for _, role := range []string{"director", "realserver"} {
			// One fault more, so that nothing begins where the others are missed.
			code, _, stderr := ravelWith(append([]string{role, "--log-level", "loud"}, c.args...)...)
			if code != exitUsage {
				t.Errorf("%s %v: exit code %d, want %d", role, c.args, code, exitUsage)
			}
			for _, want := range c.want {
				if !strings.Contains(stderr, want) {
					t.Errorf("%s %v: %q is not said:\n%s", role, c.args, want, stderr)
				}
			}
		}
	}
}
