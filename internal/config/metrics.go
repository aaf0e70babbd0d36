package config

import "github.com/prometheus/client_golang/prometheus"

// register adds the metrics of a file to reg. They are read from its status when they are scraped.
func (f *File) register(reg prometheus.Registerer) {
	if reg == nil {
		return
	}
	gauge := func(name, help string, value func(Status) float64) {
		reg.MustRegister(prometheus.NewGaugeFunc(prometheus.GaugeOpts{Name: name, Help: help},
			func() float64 { return value(f.Status()) }))
	}
	gauge("ravel_config_stale", "1 while what the static file says is not wholly in force: it cannot be used, so that the last good one, if any, is; or it names a service that no endpoint names.",
		func(s Status) float64 {
			if s.Fault != nil || s.Unknown > 0 {
				return 1
			}
			return 0
		})
	gauge("ravel_config_last_success_timestamp_seconds",
		"Unix time at which the static file was last loaded without a fault; 0 if never.",
		func(s Status) float64 {
			if s.LoadedAt.IsZero() {
				return 0
			}
			return float64(s.LoadedAt.UnixNano()) / 1e9
		})
	gauge("ravel_config_warnings", "Parts of the static file in force that were left out or mean less than they seem to.",
		func(s Status) float64 { return float64(s.Warnings) })
	gauge("ravel_config_unknown_services", "Services of the static file in force that no endpoint names.",
		func(s Status) float64 { return float64(s.Unknown) })
	reg.MustRegister(prometheus.NewCounterFunc(prometheus.CounterOpts{
		Name: "ravel_config_load_failures_total",
		Help: "Contents of the static file that could not be used, each counted when it was first seen.",
	}, func() float64 { return float64(f.Status().Failures) }))
}
