package node

import (
	"github.com/prometheus/client_golang/prometheus"

	"github.com/ravel-lb/ravel"
)

// Registerer is where metrics go.
type Registerer = prometheus.Registerer

type metrics struct {
	applies     *prometheus.CounterVec
	duration    prometheus.Histogram
	lastSuccess prometheus.Gauge
	vips        *prometheus.GaugeVec
	waiting     *prometheus.GaugeVec
	problems    prometheus.Gauge
}

func newMetrics(reg Registerer) *metrics {
	m := &metrics{
		applies: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "ravel_apply_total",
			Help: "Walks through all appliers, by result. An error means that a part was not done and is tried again.",
		}, []string{"result"}),
		duration: prometheus.NewHistogram(prometheus.HistogramOpts{
			Name:    "ravel_apply_duration_seconds",
			Help:    "Duration of a walk through all appliers.",
			Buckets: prometheus.ExponentialBuckets(0.0001, 4, 9),
		}),
		lastSuccess: prometheus.NewGauge(prometheus.GaugeOpts{
			Name: "ravel_apply_last_success_timestamp_seconds",
			Help: "When the last walk ended in which everything was applied. It does not promise that routers converged.",
		}),
		vips: prometheus.NewGaugeVec(prometheus.GaugeOpts{
			Name: "ravel_vips_announced",
			Help: "VIPs by what was meant and done: wanted has a route in the wanted state, announced has one in the RIB.",
		}, []string{"state"}),
		waiting: prometheus.NewGaugeVec(prometheus.GaugeOpts{
			Name: "ravel_waiting",
			Help: "What time alone will change: lingering VIPs or redirects, draining and rising real servers.",
		}, []string{"what"}),
		problems: prometheus.NewGauge(prometheus.GaugeOpts{
			Name: "ravel_problems",
			Help: "Problems that the appliers see on this host; `ravel check` names them.",
		}),
	}
	for _, result := range []string{"ok", "error"} {
		m.applies.WithLabelValues(result)
	}
	if reg != nil {
		reg.MustRegister(m.applies, m.duration, m.lastSuccess, m.vips, m.waiting, m.problems)
	}
	return m
}

func (m *metrics) observe(want ravel.State, r Report) {
	result := "ok"
	if r.Err != nil {
		result = "error"
	} else {
		m.lastSuccess.Set(float64(r.At.UnixMilli()) / 1000)
	}
	m.applies.WithLabelValues(result).Inc()
	m.duration.Observe(r.Took.Seconds())
	m.vips.WithLabelValues("wanted").Set(float64(len(want.Routes)))
	m.vips.WithLabelValues("announced").Set(float64(len(r.Announced)))
	m.waiting.WithLabelValues("lingering").Set(float64(r.Lingering))
	m.waiting.WithLabelValues("draining").Set(float64(r.Draining))
	m.waiting.WithLabelValues("rising").Set(float64(r.Rising))
	m.problems.Set(float64(len(r.Problems)))
}
