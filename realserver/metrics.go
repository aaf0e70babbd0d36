package realserver

import (
	"errors"

	"github.com/prometheus/client_golang/prometheus"
)

// metrics are the numbers of one Realserver. The vectors' label is the family: ipv4 or ipv6.
type metrics struct {
	desired, held                              *prometheus.GaugeVec
	transactions, errors, forgotten, overtaken *prometheus.CounterVec
	success                                    prometheus.Gauge
	duration                                   prometheus.Histogram
}

func newMetrics(reg prometheus.Registerer) (*metrics, error) {
	gauge := func(name, help string) *prometheus.GaugeVec {
		return prometheus.NewGaugeVec(prometheus.GaugeOpts{Name: name, Help: help}, []string{"family"})
	}
	counter := func(name, help string) *prometheus.CounterVec {
		return prometheus.NewCounterVec(prometheus.CounterOpts{Name: name, Help: help}, []string{"family"})
	}
	m := &metrics{
		desired: gauge("ravel_realserver_redirects_desired",
			"Redirects that this node should hold, those without pods among them."),
		held: gauge("ravel_realserver_redirects_held",
			"Redirects that the kernel held after the last apply. Rules that others change after it are seen at the next resync."),
		transactions: counter("ravel_realserver_iptables_changes_total",
			"iptables-restore transactions that changed rules of ours."),
		errors: counter("ravel_realserver_errors_total",
			"Applies that did not bring a family to what was wanted."),
		forgotten: counter("ravel_realserver_conntrack_removed_total",
			"Conntrack entries of UDP flows that were removed because their pod went or they were older than their redirect."),
		overtaken: counter("ravel_realserver_overtaken_total",
			"Times that another program's rule was found before our jump in nat PREROUTING, or the jump gone. Flows that began meanwhile were that program's."),
		success: prometheus.NewGauge(prometheus.GaugeOpts{Name: "ravel_realserver_last_success_timestamp_seconds",
			Help: "When an apply last brought both families to what was wanted."}),
		duration: prometheus.NewHistogram(prometheus.HistogramOpts{Name: "ravel_realserver_apply_seconds",
			Help: "How long applies took, those that found nothing to change among them.", Buckets: prometheus.ExponentialBuckets(0.0001, 4, 10)}),
	}
	if reg == nil {
		return m, nil
	}
	var errs []error
	for _, c := range []prometheus.Collector{m.desired, m.held, m.transactions, m.errors, m.forgotten, m.overtaken, m.success, m.duration} {
		errs = append(errs, reg.Register(c))
	}
	return m, errors.Join(errs...)
}
