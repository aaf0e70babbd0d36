package main

import (
	"fmt"
	"log/slog"
	"maps"
	"net/netip"
	"os"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/prometheus/client_golang/prometheus"

	"github.com/ravel-lb/ravel/bgp"
	"github.com/ravel-lb/ravel/director"
	"github.com/ravel-lb/ravel/gossip"
	"github.com/ravel-lb/ravel/internal/agree"
	"github.com/ravel-lb/ravel/internal/config"
	"github.com/ravel-lb/ravel/internal/guard"
	"github.com/ravel-lb/ravel/internal/health"
	"github.com/ravel-lb/ravel/internal/hold"
	"github.com/ravel-lb/ravel/internal/ifaddr"
	"github.com/ravel-lb/ravel/internal/kube"
	"github.com/ravel-lb/ravel/internal/node"
	"github.com/ravel-lb/ravel/internal/sysctl"
	"github.com/ravel-lb/ravel/realserver"
)

const metricsFile = "../../docs/metrics.md"

// recorder notes what is registered.
type recorder map[string]string // help by name

func (r recorder) Register(c prometheus.Collector) error {
	descs := make(chan *prometheus.Desc)
	go func() {
		c.Describe(descs)
		close(descs)
	}()
	for d := range descs {
		var name, help string
		if _, err := fmt.Sscanf(d.String(), "Desc{fqName: %q, help: %q", &name, &help); err != nil {
			return fmt.Errorf("%s: %w", d, err)
		}
		r[name] = help
	}
	return nil
}

func (r recorder) MustRegister(cs ...prometheus.Collector) {
	for _, c := range cs {
		if err := r.Register(c); err != nil {
			panic(err)
		}
	}
}

func (r recorder) Unregister(prometheus.Collector) bool { return false }

// docs/metrics.md has every metric with its help text. RAVEL_TEST_UPDATE=1 writes its tables anew.
func TestEveryMetricIsDocumented(t *testing.T) {
	log := slog.New(slog.DiscardHandler)
	parts := []struct {
		title string
		make  func(prometheus.Registerer) error
	}{
		{"Both roles", func(r prometheus.Registerer) error {
			config.NewFile("x", log, r)
			node.NewDirector(node.Options{Log: log, Metrics: r}, node.DirectorConfig{})
			ifaddr.New(ifaddr.Options{Registerer: r})
			guard.New(guard.Options{Registerer: r})
			hold.New(hold.Options{Registerer: r})
			kube.New(kube.Options{Registerer: r})
			_, err := gossip.New(gossip.Config{
				Registerer: r, Name: "x", Fleet: "x", Insecure: true, Addrs: []netip.Addr{netip.MustParseAddr("192.0.2.1")},
			})
			return err
		}},
		{"Directors", func(r prometheus.Registerer) error {
			d, err := director.New(director.Options{Registerer: r})
			if err != nil {
				return err
			}
			bgp.New(bgp.Options{Registerer: r})
			agree.New(agree.Options{Log: log, Registerer: r})
			health.New(health.Options{Registerer: r})
			return d.Close()
		}},
		{"Realservers", func(r prometheus.Registerer) error {
			_, err := realserver.New(realserver.Options{Registerer: r, Sysctl: sysctl.New("/proc/sys", "")})
			return err
		}},
	}
	var b strings.Builder
	b.WriteString(`# Metrics

At ` + "`/metrics`" + ` on the admin socket, and by TCP where ` + "`--listen`" + ` is set. ` + "`ravel_build_info`" + ` and the usual ` + "`go_*`" + ` and
` + "`process_*`" + ` are there too.

Wanted and actual stand side by side, so that an alert can compare them. Good ones to begin with: ` + "`ravel_config_stale == 1`" + `,
` + "`ravel_change_held == 1`" + `, ` + "`ravel_vips_announced{state=\"announced\"} < ignoring(state) ravel_vips_announced{state=\"wanted\"}`" + `, ` + "`ravel_bgp_session_up == 0`" + `,
` + "`time() - ravel_apply_last_success_timestamp_seconds > 120`" + `.
`)
	for _, p := range parts {
		r := recorder{}
		if err := p.make(r); err != nil {
			t.Fatal(err)
		}
		fmt.Fprintf(&b, "\n## %s\n\n| metric | what it says |\n|---|---|\n", p.title)
		for _, name := range slices.Sorted(maps.Keys(r)) {
			if r[name] == "" {
				t.Errorf("%s has no help text", name)
			}
			fmt.Fprintf(&b, "| `%s` | %s |\n", name, r[name])
		}
	}
	if os.Getenv("RAVEL_TEST_UPDATE") != "" {
		if err := os.WriteFile(metricsFile, []byte(b.String()), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	got, err := os.ReadFile(metricsFile)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(b.String(), string(got)); diff != "" {
		t.Fatalf("%s (-want +got):\n%s", metricsFile, diff)
	}
}
