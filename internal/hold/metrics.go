package hold

import "github.com/prometheus/client_golang/prometheus"

type metrics struct {
	held  prometheus.Gauge
	takes *prometheus.GaugeVec
}

func newMetrics(reg prometheus.Registerer) *metrics {
	m := &metrics{
		held: prometheus.NewGauge(prometheus.GaugeOpts{
			Name: "ravel_change_held",
			Help: "1 while a change of the documents waits for ravel accept, because it takes away too much at once; what was in force before goes on.",
		}),
		takes: prometheus.NewGaugeVec(prometheus.GaugeOpts{
			Name: "ravel_change_held_takes",
			Help: "What the change that waits would take away, by what: VIPs, VIPs with endpoints, announced VIPs, real servers. Only kinds of which it would be too much.",
		}, []string{"what"}),
	}
	if reg != nil {
		reg.MustRegister(m.held, m.takes)
	}
	return m
}

func (m *metrics) observe(c *Change) {
	m.takes.Reset()
	if c == nil || c.Empty {
		m.held.Set(0)
		return
	}
	m.held.Set(1)
	for _, p := range c.Parts {
		m.takes.WithLabelValues(p.What).Set(float64(len(p.Lost)))
	}
}
