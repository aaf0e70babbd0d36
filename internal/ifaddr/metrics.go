package ifaddr

import "github.com/prometheus/client_golang/prometheus"

type metrics struct {
	vips  *prometheus.GaugeVec
	drift prometheus.Counter
}

func newMetrics(r prometheus.Registerer) *metrics {
	m := &metrics{
		vips: prometheus.NewGaugeVec(prometheus.GaugeOpts{
			Name: "ravel_vips",
			Help: "VIPs that this host should hold (desired) and that its link holds (held). " +
				"It does not say that one is announced or served.",
		}, []string{"state"}),
		drift: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "ravel_vips_drift_total",
			Help: "Addresses on Ravel's link that somebody else added or removed, as found on re-reading.",
		}),
	}
	m.vips.WithLabelValues("desired")
	m.vips.WithLabelValues("held")
	if r != nil {
		r.MustRegister(m.vips, m.drift)
	}
	return m
}
