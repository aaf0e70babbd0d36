package gossip

import (
	"errors"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/ravel-lb/ravel"
)

// metrics counts what travels, and reads the rest from the Gossip when it is scraped.
type metrics struct {
	gossip *Gossip

	messages, bytes    *prometheus.CounterVec // by direction and kind
	dropped, exchanges *prometheus.CounterVec
	conflicts          prometheus.Counter

	members, cells, settled, keys, keysOK, health *prometheus.Desc
}

var _ prometheus.Collector = (*metrics)(nil)

func newMetrics(g *Gossip) *metrics {
	vec := func(name, help string, labels ...string) *prometheus.CounterVec {
		return prometheus.NewCounterVec(prometheus.CounterOpts{Name: "ravel_gossip_" + name, Help: help}, labels)
	}
	desc := func(name, help string, labels ...string) *prometheus.Desc {
		return prometheus.NewDesc("ravel_gossip_"+name, help, labels, nil)
	}
	return &metrics{
		gossip: g,
		messages: vec("messages_total", "Messages of Ravel's own, by direction and kind, without memberlist's. "+
			"Those sent need not have arrived.", "direction", "kind"),
		bytes: vec("message_bytes_total", "Bytes of these messages, before encryption.", "direction", "kind"),
		dropped: vec("dropped_total", "Messages and facts that were not taken in or not sent, by reason. "+
			"A few stale ones are normal: news may come by two ways.", "reason"),
		exchanges: vec("exchanges_total", "Comparisons with another member that it began, by what came of it: "+
			"same or differ.", "result"),
		conflicts: prometheus.NewCounter(prometheus.CounterOpts{Name: "ravel_gossip_conflicts_total",
			Help: "Times that another address claimed the name of a live member."}),
		members: desc("members", "Members that are there or lately were, this one included, by role and state. "+
			"Suspect is what this member's own probes say.", "role", "state"),
		cells:   desc("cells", "Facts that are held: entries of rosters, registers, what authors say."),
		settled: desc("settled", "1 once every director was heard, or the time to wait for it was over."),
		keys:    desc("keys", "Keys in use; 0 is gossip in the clear."),
		keysOK:  desc("keys_current", "1 while the key file could be read and its keys are those in use."),
		health: desc("health_score", "memberlist's view of our own health, 0 is well; "+
			"it does not say how others see us."),
	}
}

func (m *metrics) register(r prometheus.Registerer) error {
	return errors.Join(r.Register(m.messages), r.Register(m.bytes), r.Register(m.dropped), r.Register(m.exchanges),
		r.Register(m.conflicts), r.Register(m))
}

func (m *metrics) drop(reason string) { m.dropped.WithLabelValues(reason).Inc() }

func (m *metrics) sent(k kind, n int) { m.count("sent", k, n) }

func (m *metrics) received(k kind, n int) { m.count("received", k, n) }

func (m *metrics) count(direction string, k kind, n int) {
	m.messages.WithLabelValues(direction, k.String()).Inc()
	m.bytes.WithLabelValues(direction, k.String()).Add(float64(n))
}

// Describe sends the descriptions of what is read when scraped.
func (m *metrics) Describe(ch chan<- *prometheus.Desc) {
	for _, d := range []*prometheus.Desc{m.members, m.cells, m.settled, m.keys, m.keysOK, m.health} {
		ch <- d
	}
}

// Collect sends the present values.
func (m *metrics) Collect(ch chan<- prometheus.Metric) {
	gauge := func(d *prometheus.Desc, v float64, labels ...string) {
		ch <- prometheus.MustNewConstMetric(d, prometheus.GaugeValue, v, labels...)
	}
	g := m.gossip
	type group struct {
		role  ravel.Role
		state ravel.MemberState
	}
	count := map[group]int{}
	for _, role := range []ravel.Role{ravel.Director, ravel.Realserver} {
		for state := ravel.Alive; state <= ravel.Left; state++ {
			count[group{role, state}] = 0 // or it would seem that nothing is known
		}
	}
	g.mu.Lock()
	for _, o := range g.members {
		count[group{o.role, o.state()}]++
	}
	cells, settled, keys := len(g.store.cells), g.settle.settled, 0
	if g.keys != nil {
		keys = len(g.keys.keys)
	}
	_, stale := g.problems["keys"]
	g.mu.Unlock()
	for k, n := range count {
		gauge(m.members, float64(n), k.role.String(), k.state.String())
	}
	gauge(m.cells, float64(cells))
	gauge(m.settled, float64(flag(settled)))
	gauge(m.keys, float64(keys))
	gauge(m.keysOK, float64(flag(!stale)))
	if list := g.list.Load(); list != nil {
		gauge(m.health, float64(list.GetHealthScore()))
	}
}
