package kube

import (
	"time"

	"github.com/prometheus/client_golang/prometheus"
)

// register adds the metrics to reg. They are read when they are scraped.
func (s *Source) register(reg prometheus.Registerer) {
	s.published = prometheus.NewCounter(prometheus.CounterOpts{
		Name: "ravel_kube_values_total", Help: "Values that were made of what the API server told; changes that come close together make one.",
	})
	if reg == nil {
		return
	}
	gauge := func(name, help string, value func() float64) {
		reg.MustRegister(prometheus.NewGaugeFunc(prometheus.GaugeOpts{Name: name, Help: help}, value))
	}
	gauge("ravel_kube_synced", "1 once the API server told everything; the value in force may be older still.", func() float64 {
		s.mu.Lock()
		defer s.mu.Unlock()
		return number(s.status.synced)
	})
	gauge("ravel_kube_cached", "1 while the inputs are those of an earlier process, from the cache file.", func() float64 {
		v, _ := s.value.Latest()
		return number(v.Cached)
	})
	gauge("ravel_kube_cache_age_seconds",
		"For how long something that the API server would tell may be missing from the inputs: 0 while all watches are open. While there are no inputs, since the process began or an attempt was heard.",
		func() float64 { return max(0, s.age(time.Now()).Seconds()) })
	gauge("ravel_kube_document_stale", "1 while a document of the ConfigMap, as it now is, cannot be used: the last good one, if any, is in force.",
		func() float64 {
			s.mu.Lock()
			defer s.mu.Unlock()
			return number(len(s.status.faults) > 0)
		})
	reg.MustRegister(s.published)
	for _, w := range s.watches {
		labels := prometheus.Labels{"resource": w.kind}
		each := func(name, help string, value func() float64) {
			reg.MustRegister(prometheus.NewGaugeFunc(prometheus.GaugeOpts{Name: name, Help: help, ConstLabels: labels}, value))
		}
		each("ravel_kube_watch_open", "1 while a watch of the resource is open.", func() float64 { return number(w.standing().open) })
		each("ravel_kube_objects", "Objects of the resource that are kept, trimmed.", func() float64 { return float64(s.caches.count(w.kind)) })
		each("ravel_kube_last_event_timestamp_seconds",
			"Unix time at which the API server last told something of the resource, if only that there is nothing new; 0 if never.",
			func() float64 {
				at := w.standing().heardAt
				if at.IsZero() {
					return 0
				}
				return float64(at.UnixNano()) / 1e9
			})
		reg.MustRegister(prometheus.NewCounterFunc(prometheus.CounterOpts{
			Name: "ravel_kube_watch_errors_total", Help: "Requests for the resource that failed, those to watch it again among them.", ConstLabels: labels,
		}, func() float64 { return float64(w.standing().errors) }))
	}
}

func number(b bool) float64 {
	if b {
		return 1
	}
	return 0
}
