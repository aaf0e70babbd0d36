package director

import (
	"errors"
	"time"

	"github.com/prometheus/client_golang/prometheus"
)

type metrics struct {
	services, reals *prometheus.GaugeVec
	operations      *prometheus.CounterVec
	duration        prometheus.Histogram
	drift           prometheus.Counter
	success         prometheus.Gauge
}

func newMetrics(r prometheus.Registerer) (*metrics, error) {
	m := &metrics{
		services: prometheus.NewGaugeVec(prometheus.GaugeOpts{
			Name: "ravel_ipvs_services",
			Help: "Virtual services that were wanted at the last apply, and those of them that IPVS then served.",
		}, []string{"state"}),
		reals: prometheus.NewGaugeVec(prometheus.GaugeOpts{
			Name: "ravel_ipvs_real_servers",
			Help: "Real servers that were wanted at the last apply, over all services, and those of them in services that IPVS then served.",
		}, []string{"state"}),
		operations: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "ravel_ipvs_operations_total",
			Help: "Changes asked of IPVS; result says whether the kernel made them.",
		}, []string{"operation", "result"}),
		duration: prometheus.NewHistogram(prometheus.HistogramOpts{
			Name:    "ravel_ipvs_apply_duration_seconds",
			Help:    "How long it took to apply all services, with the wait for an earlier apply.",
			Buckets: []float64{.0005, .001, .0025, .005, .01, .025, .05, .1, .25, .5, 1, 2.5, 5, 10, 30},
		}),
		drift: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "ravel_ipvs_drift_total",
			Help: "Services of ours that were found changed by somebody else when IPVS was read again.",
		}),
		success: prometheus.NewGauge(prometheus.GaugeOpts{
			Name: "ravel_ipvs_last_success_timestamp_seconds",
			Help: "When the last apply without an error ended, in seconds since 1970. Problems of single services are no errors.",
		}),
	}
	if r == nil {
		return m, nil
	}
	for i, c := range m.collectors() {
		if err := r.Register(c); err != nil {
			for _, earlier := range m.collectors()[:i] {
				r.Unregister(earlier)
			}
			return nil, err
		}
	}
	return m, nil
}

func (m *metrics) collectors() []prometheus.Collector {
	return []prometheus.Collector{m.services, m.reals, m.operations, m.duration, m.drift, m.success}
}

func (m *metrics) unregister(r prometheus.Registerer) {
	if r == nil {
		return
	}
	for _, c := range m.collectors() {
		r.Unregister(c)
	}
}

func (m *metrics) applied(start time.Time, err error) {
	m.duration.Observe(time.Since(start).Seconds())
	if err == nil {
		m.success.SetToCurrentTime()
	}
}

func (m *metrics) show(desired, held int, reals [2]int) {
	m.services.WithLabelValues("desired").Set(float64(desired))
	m.services.WithLabelValues("held").Set(float64(held))
	m.reals.WithLabelValues("desired").Set(float64(reals[0]))
	m.reals.WithLabelValues("held").Set(float64(reals[1]))
}

func (m *metrics) operation(op operation, err error) {
	result := "ok"
	switch {
	case errors.Is(err, errStale):
		result = "stale"
	case err != nil:
		result = "error"
	}
	m.operations.WithLabelValues(string(op), result).Inc()
}
