package guard

import "github.com/prometheus/client_golang/prometheus"

type metrics struct {
	entries *prometheus.GaugeVec
	drift   *prometheus.CounterVec
}

func newMetrics(r prometheus.Registerer) *metrics {
	m := &metrics{
		entries: prometheus.NewGaugeVec(prometheus.GaugeOpts{
			Name: "ravel_guard_entries",
			Help: "VIPs that the guard's sets hold (vip) and services whose packets it lets pass (claim). " +
				"It does not say that the rule that reads them is in place.",
		}, []string{"kind"}),
		drift: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "ravel_guard_drift_total",
			Help: "Set entries (entry) and times that rules (rule) were changed by somebody else, as found on re-reading.",
		}, []string{"kind"}),
	}
	for _, kind := range []string{"vip", "claim"} {
		m.entries.WithLabelValues(kind)
	}
	for _, kind := range []string{"entry", "rule"} {
		m.drift.WithLabelValues(kind)
	}
	if r != nil {
		r.MustRegister(m.entries, m.drift)
	}
	return m
}
