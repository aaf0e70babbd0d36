package main

import (
	"context"
	"errors"
	"os"
	"strconv"
	"strings"
	"testing"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/ravel-lb/ravel"
	"github.com/ravel-lb/ravel/director"
)

// shown is what a gatherer gives of the original's names, a series a line, without the labels of the build.
func shown(t *testing.T, g prometheus.Gatherer) string {
	t.Helper()
	families, err := g.Gather()
	if err != nil {
		t.Fatal(err)
	}
	var b strings.Builder
	for _, f := range families {
		for _, m := range f.GetMetric() {
			var labels []string
			for _, l := range m.GetLabel() {
				switch l.GetName() {
				case "version", "goVersion", "commit", "arch", "startTime":
					if l.GetValue() == "" && l.GetName() != "commit" {
						t.Errorf("%s has no %s", f.GetName(), l.GetName())
					}
				default:
					labels = append(labels, l.GetName()+"="+l.GetValue())
				}
			}
			value := m.GetGauge().GetValue() + m.GetCounter().GetValue()
			if strings.HasPrefix(f.GetName(), "rdei_lb_") {
				b.WriteString(f.GetName() + " " + strings.Join(labels, " ") + " " + strconv.FormatFloat(value, 'g', -1, 64) + "\n")
			}
		}
	}
	return b.String()
}

func TestOriginalMetrics(t *testing.T) {
	r := newRig(t, ravel.Director)
	p := r.p
	p.registry = prometheus.NewRegistry()
	applies := prometheus.NewCounterVec(prometheus.CounterOpts{Name: "ravel_apply_total"}, []string{"result"})
	p.registry.MustRegister(applies)
	applies.WithLabelValues("ok").Add(7)
	applies.WithLabelValues("error").Add(2)
	if shown(t, p.gatherer(nil)) != "" {
		t.Error("not asked for, and shown")
	}
	p.settings.countPackets = true
	p.settings.original = originalValues{metrics: true, configNamespace: "lb", configName: "kube2ipvs", configKey: "green"}
	p.state.Set(ravel.State{Addrs: []ravel.Addr{{VIP: web.VIP}, {VIP: dns.VIP}, {VIP: web6.VIP}}})
	status := func(context.Context) ([]director.ServiceStatus, error) {
		return []director.ServiceStatus{
			{Ours: true, Name: "shop/web:http", VIP: web.VIP, Proto: web.Proto, Port: web.Port, Counters: &director.Counters{Bytes: 1500}},
			{Ours: true, Name: "shop/dns", VIP: dns.VIP, Proto: dns.Proto, Port: dns.Port},
			{Name: "", VIP: web6.VIP, Proto: web6.Proto, Port: web6.Port, Counters: &director.Counters{Bytes: 1}},
		}, nil
	}
	want := `rdei_lb_info buildDate= configName=kube2ipvs configNamespace=lb lb=bgp seczone=green 0
rdei_lb_loopback_total_configured addrKind=ipv4 lb=bgp seczone=green 2
rdei_lb_loopback_total_configured addrKind=ipv6 lb=bgp seczone=green 1
rdei_lb_reconfigure_count lb=bgp outcome=complete seczone=green 7
rdei_lb_reconfigure_count lb=bgp outcome=error seczone=green 2
rdei_lb_rx_bytes lb=bgp namespace=shop port=80 port_name=http protocol=TCP service=web vip=192.0.2.80 1500
rdei_lb_worker_running lb=bgp 1
`
	if got := shown(t, p.gatherer(status)); got != want {
		t.Errorf("got:\n%swant:\n%s", got, want)
	}
	p.role = ravel.Realserver
	got := shown(t, p.gatherer(func(context.Context) ([]director.ServiceStatus, error) { return nil, errors.New("no IPVS") }))
	if strings.Contains(got, "rx_bytes") || strings.Contains(got, "lb=bgp") || !strings.Contains(got, "lb=realserver") {
		t.Errorf("of a realserver:\n%s", got)
	}
}

// docs/migration.md has every one of them with what it is made from.
func TestOriginalMetricsAreDocumented(t *testing.T) {
	b, err := os.ReadFile(migrationFile)
	if err != nil {
		t.Fatal(err)
	}
	for _, m := range oldMetricNames {
		if !strings.Contains(string(b), "`"+m.name+"`") || !strings.Contains(string(b), "`"+m.from+"`") {
			t.Errorf("%s, from %s, is not in %s", m.name, m.from, migrationFile)
		}
	}
	m := newOldMetrics(originalValues{}, ravel.Director, prometheus.NewRegistry())
	descs := make(chan *prometheus.Desc, 10)
	m.Describe(descs)
	if len(descs) != len(oldMetricNames) {
		t.Errorf("%d are described, and %d in the list", len(descs), len(oldMetricNames))
	}
}
