package main

import (
	"context"
	"runtime"
	"strconv"
	"strings"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/ravel-lb/ravel"
	"github.com/ravel-lb/ravel/director"
)

// oldMetrics shows what this process can tell under the names of the original's metrics, with their labels. Every figure
// is one that Ravel shows under a name of its own, too.
type oldMetrics struct {
	lb, seczone string // of the labels: "bgp" or "realserver", and the key of the ConfigMap
	from        prometheus.Gatherer
	state       func() (ravel.State, bool)
	status      func(context.Context) ([]director.ServiceStatus, error) // nil on a realserver

	info, reconfigured, vips, running, received *prometheus.Desc
}

// oldMetricNames are those that are shown, with what they are made from, and their help text.
var oldMetricNames = []struct{ name, from, help string }{
	{"rdei_lb_info", "ravel_build_info", "Which ravel this is; always 0."},
	{"rdei_lb_loopback_total_configured", "ravel_vips", "VIPs that this host should hold, by family."},
	{"rdei_lb_reconfigure_count", "ravel_apply_total", "Walks through all appliers by outcome, complete or error."},
	{"rdei_lb_rx_bytes", "ravel services", "Bytes from clients to a VIP and port, as the kernel counts them, with --count-packets."},
	{"rdei_lb_worker_running", "ravel_build_info", "Always 1."},
}

func oldDesc(name string, constant prometheus.Labels, labels ...string) *prometheus.Desc {
	for _, m := range oldMetricNames {
		if m.name == name {
			return prometheus.NewDesc(name, m.help+" For dashboards of the original; see "+m.from+".", labels, constant)
		}
	}
	panic("ravel: metric " + name + " has no help text") // a mistake in the program, found by its first test
}

func newOldMetrics(o originalValues, role ravel.Role, from prometheus.Gatherer) *oldMetrics {
	m := &oldMetrics{lb: "bgp", seczone: o.configKey, from: from}
	if role == ravel.Realserver {
		m.lb = realserverRole
	}
	b := buildInfo()
	both := prometheus.Labels{"lb": m.lb, "seczone": m.seczone}
	m.info = oldDesc("rdei_lb_info", prometheus.Labels{
		"lb": m.lb, "seczone": m.seczone, "configNamespace": o.configNamespace, "configName": o.configName, "version": b.Version,
		"goVersion": b.Go, "commit": b.Revision, "buildDate": "", "arch": runtime.GOOS + "/" + runtime.GOARCH,
		"startTime": time.Now().UTC().Format(time.RFC3339),
	})
	m.reconfigured = oldDesc("rdei_lb_reconfigure_count", both, "outcome")
	m.vips = oldDesc("rdei_lb_loopback_total_configured", both, "addrKind")
	m.running = oldDesc("rdei_lb_worker_running", prometheus.Labels{"lb": m.lb})
	m.received = oldDesc("rdei_lb_rx_bytes", prometheus.Labels{"lb": m.lb}, "vip", "port", "protocol", "port_name", "namespace", "service")
	return m
}

// Describe names all of them.
func (m *oldMetrics) Describe(ch chan<- *prometheus.Desc) {
	for _, d := range []*prometheus.Desc{m.info, m.reconfigured, m.vips, m.running, m.received} {
		ch <- d
	}
}

// Collect asks for the figures. What cannot be told is left out.
func (m *oldMetrics) Collect(ch chan<- prometheus.Metric) {
	show := func(d *prometheus.Desc, kind prometheus.ValueType, value float64, labels ...string) {
		if metric, err := prometheus.NewConstMetric(d, kind, value, labels...); err == nil {
			ch <- metric
		}
	}
	show(m.info, prometheus.GaugeValue, 0)
	show(m.running, prometheus.GaugeValue, 1)
	if state, known := m.state(); known {
		var v4, v6 int
		for _, a := range state.Addrs {
			if a.VIP.Is4() {
				v4++
			} else {
				v6++
			}
		}
		show(m.vips, prometheus.GaugeValue, float64(v4), "ipv4")
		show(m.vips, prometheus.GaugeValue, float64(v6), "ipv6")
	}
	families, _ := m.from.Gather() // what could be gathered, and the fault shows where it belongs
	outcomes := map[string]string{"ok": "complete", "error": "error"}
	for _, f := range families {
		if f.GetName() != "ravel_apply_total" {
			continue
		}
		for _, one := range f.GetMetric() {
			for _, l := range one.GetLabel() {
				if outcome := outcomes[l.GetValue()]; l.GetName() == "result" && outcome != "" {
					show(m.reconfigured, prometheus.CounterValue, one.GetCounter().GetValue(), outcome)
				}
			}
		}
	}
	if m.status == nil {
		return
	}
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
	defer cancel()
	services, err := m.status(ctx)
	if err != nil {
		return
	}
	for _, s := range services {
		if !s.Ours || s.Counters == nil {
			continue
		}
		namespace, rest, _ := strings.Cut(s.Name, "/")
		service, portName, _ := strings.Cut(rest, ":")
		show(m.received, prometheus.CounterValue, float64(s.Counters.Bytes), s.VIP.String(), strconv.Itoa(int(s.Port)),
			strings.ToUpper(s.Proto.String()), portName, namespace, service)
	}
}

// gatherer is what /metrics shows: the registry, and with --original-metrics the original's names beside it.
func (p *process) gatherer(status func(context.Context) ([]director.ServiceStatus, error)) prometheus.Gatherer {
	if !p.settings.original.metrics {
		return p.registry
	}
	m := newOldMetrics(p.settings.original, p.role, p.registry)
	if m.state = p.state.Latest; p.settings.countPackets {
		m.status = status
	}
	registry := prometheus.NewRegistry()
	registry.MustRegister(m)
	return prometheus.Gatherers{p.registry, registry}
}
