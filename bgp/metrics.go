package bgp

import (
	"time"

	"github.com/prometheus/client_golang/prometheus"
)

// metrics reads the Speaker when it is scraped, so the series of a removed peer are gone with it.
type metrics struct {
	speaker *Speaker

	sessionUp, flaps, updates                        *prometheus.Desc // by peer
	desired, announced, announces, withdraws, change *prometheus.Desc
}

var _ prometheus.Collector = (*metrics)(nil)

func newMetrics(s *Speaker) *metrics {
	desc := func(name, help string, labels ...string) *prometheus.Desc {
		return prometheus.NewDesc("ravel_bgp_"+name, help, labels, nil)
	}
	return &metrics{
		speaker: s,
		sessionUp: desc("session_up", "1 while the BGP session with the router is established. "+
			"It does not say that the router forwards to us.", "peer"),
		flaps: desc("session_flaps_total", "Ends of an established BGP session that were not by our own hand.", "peer"),
		updates: desc("updates_sent_total", "BGP UPDATE messages sent to the router. "+
			"It does not say that the router took them in.", "peer"),
		desired: desc("routes_desired", "Routes that this director wants to announce."),
		announced: desc("routes_announced", "Routes in this director's BGP table. "+
			"Routers have them only while their session is up."),
		announces: desc("announcements_total", "Routes put into this director's BGP table, new or changed."),
		withdraws: desc("withdrawals_total", "Routes taken from this director's BGP table."),
		change: desc("last_change_timestamp_seconds", "When a route or a peer last changed, in Unix time. "+
			"0 before the first change."),
	}
}

// Describe sends the descriptions of all metrics.
func (m *metrics) Describe(ch chan<- *prometheus.Desc) {
	for _, d := range []*prometheus.Desc{
		m.sessionUp, m.flaps, m.updates, m.desired, m.announced, m.announces, m.withdraws, m.change,
	} {
		ch <- d
	}
}

// Collect sends the present values.
func (m *metrics) Collect(ch chan<- prometheus.Metric) {
	gauge := func(d *prometheus.Desc, v float64, labels ...string) {
		ch <- prometheus.MustNewConstMetric(d, prometheus.GaugeValue, v, labels...)
	}
	counter := func(d *prometheus.Desc, v uint64, labels ...string) {
		ch <- prometheus.MustNewConstMetric(d, prometheus.CounterValue, float64(v), labels...)
	}
	v := &m.speaker.view
	v.Lock()
	desired, announced, announces, withdraws, changed := v.desired, len(v.routes), v.announces, v.withdraws, v.changed
	v.Unlock()
	gauge(m.desired, float64(desired))
	gauge(m.announced, float64(announced))
	counter(m.announces, announces)
	counter(m.withdraws, withdraws)
	var at float64
	if !changed.IsZero() {
		at = float64(changed.UnixNano()) / 1e9
	}
	gauge(m.change, at)
	peers, _ := m.speaker.sessions.status(time.Now())
	for _, p := range peers {
		up := 0.0
		if p.Established() {
			up = 1
		}
		peer := p.Addr.String()
		gauge(m.sessionUp, up, peer)
		counter(m.flaps, p.Flaps, peer)
		counter(m.updates, p.Updates, peer)
	}
}
