package gossip

import (
	"fmt"
	"testing"
	"time"
)

// hold has processes hold facts of a topic that nobody shows, as if they had always known them.
func hold(n int, stamp uint64, all ...*process) {
	for _, p := range all {
		p.mu.Lock()
	}
	for i := range n {
		c := newCell(key{99, "", fmt.Sprint(i)}, rank{stamp, 0}, "value of a fact, with some bytes", "")
		for _, p := range all {
			p.store.put(c)
		}
	}
	for _, p := range all {
		p.mu.Unlock()
	}
}

// sum is of all that directors share.
func (p *process) sum() uint64 {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.store.tree.sum()
}

// Differences in most parts of a big store are more than one digest may carry, and heal all the same; a newcomer
// settles with all of it.
func TestBigDifferences(t *testing.T) {
	virtual(t, func(t *testing.T, w *world) {
		all := w.together(2)
		a, b := all[0], all[1]
		hold(60_000, 1, a, b)
		hold(6_000, 2, a)
		took := until(t, "they hold the same", 20*time.Second, func() bool { return a.sum() == b.sum() })
		t.Logf("healed after %s", took)
		c := w.director(3)
		took = until(t, "a newcomer settles", 5*time.Second, func() bool { return c.fleet().Settled })
		t.Logf("settled after %s", took)
		if c.sum() != a.sum() {
			t.Error("it settled before it had heard all")
		}
		for _, p := range append(all, c) {
			if n := p.dropped("oversized"); n != 0 {
				t.Errorf("%s dropped %v oversized messages", p.config.Name, n)
			}
		}
	})
}

// What one message makes a member do is bounded.
func TestSmallDigestsOfMuch(t *testing.T) {
	virtual(t, func(t *testing.T, w *world) {
		all := w.together(2)
		a, b := all[0], all[1]
		hold(20_000, 1, a, b)
		time.Sleep(2 * time.Second)
		ask := func(leaves ...leaf) (n int) {
			for _, o := range a.handle(seal(digestKind, "d2", b.addr, marshalDigest(digest{leaves: leaves}))) {
				n += len(o.b)
			}
			return n
		}
		if n := ask(leaf{}, leaf{}); n != 0 || a.dropped("malformed") != 1 {
			t.Errorf("%d bytes for one span twice", n)
		}
		if n := ask(leaf{}, leaf{span: span{4, 77}}); n != 0 || a.dropped("malformed") != 2 {
			t.Errorf("%d bytes for a span within another", n)
		}
		total := 0
		for range 100 {
			n := ask(leaf{})
			if total += n; n > maxAnswer+maxAnswer/4 {
				t.Fatalf("%d bytes for one digest", n)
			}
		}
		if total < maxAnswer || total > maxGiven+2*maxAnswer || a.dropped("busy") == 0 {
			t.Errorf("%d bytes in a second, %v dropped", total, a.dropped("busy"))
		}
	})
}
