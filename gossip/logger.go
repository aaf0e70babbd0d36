package gossip

import (
	"log"
	"strings"
	"sync"
	"time"
)

// logger takes memberlist's log: its errors are warnings at most once in ten seconds for each kind, all else is for
// debugging. memberlist says nowhere else what it drops and whom it suspects.
type logger struct {
	g      *Gossip
	mu     sync.Mutex // guards the field below
	logged map[string]time.Time
}

func newLogger(g *Gossip) *log.Logger {
	return log.New(&logger{g: g, logged: map[string]time.Time{}}, "", 0)
}

// dropped are the lines by which memberlist says that it dropped something, and our reasons for them.
var dropped = []struct{ text, reason string }{
	{"unacceptable label", "fleet"},
	{"Decrypt packet failed", "key"},
	{"no installed keys could decrypt", "key"},
	{"not encrypted", "key"},
	{"encryption is not configured", "key"},
	{"handler queue full", "busy"},
	{"Too many pending push/pull", "busy"},
	{"Failed to decode", "malformed"},
	{"not supported", "malformed"},
	{"invalid checksum", "malformed"},
	{"missing message type byte", "malformed"},
	{"cannot decode label", "malformed"},
	{"exceeds limit", "oversized"},
	{"larger than limit", "oversized"},
}

const loggedOnce = 10 * time.Second

// Write takes one line.
func (l *logger) Write(b []byte) (int, error) {
	line := strings.TrimSpace(string(b))
	level, text, ok := strings.Cut(line, "] memberlist: ")
	if !ok {
		level, text = "[DEBUG", line
	}
	if name, ok := strings.CutPrefix(text, "Suspect "); ok {
		if name, ok = strings.CutSuffix(name, " has failed, no acks received"); ok {
			l.g.suspected(name, time.Now())
		}
	}
	what := ""
	for _, d := range dropped {
		if strings.Contains(text, d.text) {
			l.g.metrics.drop(d.reason)
			what = d.reason
			l.g.unreadableFrom(d.reason, text, time.Now())
			break
		}
	}
	if level != "[ERR" && level != "[ERROR" && what == "" {
		l.g.log.Debug("memberlist", "says", text)
		return len(b), nil
	}
	if what == "" {
		what, _, _ = strings.Cut(text, ":")
	}
	now := time.Now()
	l.mu.Lock()
	again := now.Sub(l.logged[what]) < loggedOnce
	if !again {
		if len(l.logged) > 100 {
			clear(l.logged)
		}
		l.logged[what] = now
	}
	l.mu.Unlock()
	if again {
		l.g.log.Debug("memberlist", "says", text)
	} else {
		l.g.log.Warn("memberlist", "says", text)
	}
	return len(b), nil
}
