package agree

import (
	"github.com/prometheus/client_golang/prometheus"

	"github.com/ravel-lb/ravel"
)

type metrics struct {
	writes  prometheus.Counter
	entries *prometheus.GaugeVec
	differs prometheus.Gauge
	frozen  prometheus.Gauge
	drained prometheus.Gauge
	settled prometheus.Gauge
}

func newMetrics(reg prometheus.Registerer) *metrics {
	m := &metrics{
		writes: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "ravel_roster_writes_total",
			Help: "Entries that this director wrote into the fleet's rosters. Others may have written the same.",
		}),
		entries: prometheus.NewGaugeVec(prometheus.GaugeOpts{
			Name: "ravel_roster_entries",
			Help: "Entries of the fleet's rosters as this director knows them, by state; gone ones are remembered for a while.",
		}, []string{"state"}),
		differs: prometheus.NewGauge(prometheus.GaugeOpts{
			Name: "ravel_services_differing",
			Help: "Services whose tables have differed for too long between directors that want the same; ravel members names them.",
		}),
		frozen: prometheus.NewGauge(prometheus.GaugeOpts{Name: "ravel_fleet_frozen", Help: "1 while the fleet holds its last state."}),
		drained: prometheus.NewGauge(prometheus.GaugeOpts{
			Name: "ravel_fleet_drained", Help: "Directors and nodes that an operator drains.",
		}),
		settled: prometheus.NewGauge(prometheus.GaugeOpts{
			Name: "ravel_fleet_settled", Help: "1 once this director has heard from the fleet or has waited long enough; before, it changes nothing.",
		}),
	}
	if reg != nil {
		reg.MustRegister(m.writes, m.entries, m.differs, m.frozen, m.drained, m.settled)
	}
	return m
}

func (m *metrics) observe(fleet ravel.Fleet, differs []Difference) {
	counts := map[ravel.RosterState]int{}
	for _, r := range fleet.Rosters {
		for _, e := range r {
			counts[e.State]++
		}
	}
	for _, state := range []ravel.RosterState{ravel.Joining, ravel.Active, ravel.Draining, ravel.Gone} {
		m.entries.WithLabelValues(state.String()).Set(float64(counts[state]))
	}
	m.differs.Set(float64(len(differs)))
	m.drained.Set(float64(len(fleet.AllDrained())))
	m.frozen.Set(one(fleet.Frozen()))
	m.settled.Set(one(fleet.Settled))
}

func one(is bool) float64 {
	if is {
		return 1
	}
	return 0
}
