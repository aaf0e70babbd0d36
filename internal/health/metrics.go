package health

import (
	"net/netip"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/ravel-lb/ravel"
)

var healths = []ravel.Health{ravel.Unprobed, ravel.Healthy, ravel.Refused, ravel.Silent}

type proberMetrics struct {
	probes  *prometheus.CounterVec
	void    prometheus.Counter
	targets *prometheus.GaugeVec
}

func newProberMetrics(r prometheus.Registerer) *proberMetrics {
	m := &proberMetrics{
		probes: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "ravel_health_probes_total",
			Help: "Probes of real servers by what each found; unprobed is a fault of this host. One that is silent does " +
				"not make a real server silent.",
		}, []string{"result"}),
		void: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "ravel_health_probes_void_total",
			Help: "Probes without an answer during which this process or machine did not get to run. They count for nothing; " +
				"where they are many, this director is short of processor time.",
		}),
		targets: prometheus.NewGaugeVec(prometheus.GaugeOpts{
			Name: "ravel_health_probed_addresses",
			Help: "Addresses of real servers by what this director's own probes say. It is not the fleet's verdict.",
		}, []string{"health"}),
	}
	for _, h := range healths {
		m.probes.WithLabelValues(h.String())
	}
	m.set(nil)
	if r != nil {
		r.MustRegister(m.probes, m.void, m.targets)
	}
	return m
}

func (m *proberMetrics) set(count map[ravel.Health]int) {
	for _, h := range healths {
		m.targets.WithLabelValues(h.String()).Set(float64(count[h]))
	}
}

type judgeMetrics struct {
	addrs         *prometheus.GaugeVec
	deaths, flaps prometheus.Counter
	voters        *prometheus.GaugeVec
	alone         *prometheus.GaugeVec
}

func newJudgeMetrics(r prometheus.Registerer) *judgeMetrics {
	m := &judgeMetrics{
		addrs: prometheus.NewGaugeVec(prometheus.GaugeOpts{
			Name: "ravel_health_addresses",
			Help: "Addresses of real servers by the fleet's verdict as this process knows it: alive, dead, or held (they " +
				"are well again and held back for a while). Services may use dead ones still, because of their floor.",
		}, []string{"verdict"}),
		deaths: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "ravel_health_deaths_total",
			Help: "Addresses of real servers that became dead.",
		}),
		flaps: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "ravel_health_flaps_total",
			Help: "Addresses of real servers that became dead again within 10 minutes of their return.",
		}),
		voters: prometheus.NewGaugeVec(prometheus.GaugeOpts{
			Name: "ravel_health_voters",
			Help: "Voting members of the fleet: those seen, and all there should be. There is a majority while seen is " +
				"more than half of all.",
		}, []string{"count"}),
		alone: prometheus.NewGaugeVec(prometheus.GaugeOpts{
			Name: "ravel_health_alone",
			Help: "1 while this director fails to reach more than half of the real servers of a family, which others reach.",
		}, []string{"family"}),
	}
	m.set(Verdict{}, time.Time{}, nil)
	if r != nil {
		r.MustRegister(m.addrs, m.deaths, m.flaps, m.voters, m.alone)
	}
	return m
}

func (m *judgeMetrics) set(v Verdict, now time.Time, addrs map[netip.Addr]*record) {
	var alive, dead, held float64
	for _, r := range addrs {
		switch {
		case r.dead:
			dead++
		case now.Before(r.held):
			held++
		default:
			alive++
		}
	}
	m.addrs.WithLabelValues("alive").Set(alive)
	m.addrs.WithLabelValues("dead").Set(dead)
	m.addrs.WithLabelValues("held").Set(held)
	m.voters.WithLabelValues("seen").Set(float64(v.Seen))
	m.voters.WithLabelValues("all").Set(float64(v.Voters))
	for family, alone := range map[string]bool{"ipv4": v.Alone.V4, "ipv6": v.Alone.V6} {
		m.alone.WithLabelValues(family).Set(0)
		if alone {
			m.alone.WithLabelValues(family).Set(1)
		}
	}
}
