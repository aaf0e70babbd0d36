package bgp

import (
	"context"
	"log/slog"
	"maps"
	"slices"

	"github.com/osrg/gobgp/v3/pkg/log"
)

// logger turns GoBGP's log into slog, and hands it to the sessions' table: the log is the only place where GoBGP says
// why a session ended or does not come up. Its methods are called with GoBGP's locks held, so they must neither block
// nor call GoBGP.
type logger struct {
	log      *slog.Logger
	observer *sessions
	exit     *exit
	freed    *freed
}

var _ log.Logger = (*logger)(nil)

// told are messages that the sessions' table turns into lines of its own, in an operator's words.
var told = []string{"sent notification", "received notification", "hold timer expired"}

// Panic and Fatal are where GoBGP would end the process. It does not: the message is an error, shown by Status.
func (l *logger) Panic(msg string, f log.Fields) { l.fatal(msg, f) }

// Fatal is as Panic.
func (l *logger) Fatal(msg string, f log.Fields) { l.fatal(msg, f) }

func (l *logger) fatal(msg string, f log.Fields) {
	l.observer.internal("GoBGP: "+msg, f)
	l.emit(slog.LevelError, msg, f)
}

// Error passes the message on.
func (l *logger) Error(msg string, f log.Fields) {
	l.observer.observe(msg, f)
	l.emit(slog.LevelError, msg, f)
}

// Warn passes the message on, as debug if an operator has nothing to do about it: table messages are about routes
// that routers sent and we refused.
func (l *logger) Warn(msg string, f log.Fields) {
	l.observer.observe(msg, f)
	level := slog.LevelWarn
	if f["Topic"] == "Table" || slices.Contains(told, msg) {
		level = slog.LevelDebug
	}
	l.emit(level, msg, f)
}

// Info becomes debug: the sessions' table says what operators ask about.
func (l *logger) Info(msg string, f log.Fields) {
	l.observer.observe(msg, f)
	l.emit(slog.LevelDebug, msg, f)
}

// Debug passes the message on.
func (l *logger) Debug(msg string, f log.Fields) {
	l.exit.hears(msg, f)
	l.freed.hears(msg)
	l.observer.observe(msg, f)
	l.emit(slog.LevelDebug, msg, f)
}

// SetLevel does nothing: the level is slog's.
func (l *logger) SetLevel(log.LogLevel) {}

// GetLevel is always debug: GoBGP says why it cannot connect only then.
func (l *logger) GetLevel() log.LogLevel { return log.DebugLevel }

func (l *logger) emit(level slog.Level, msg string, f log.Fields) {
	if !l.log.Enabled(context.Background(), level) {
		return
	}
	attrs := make([]slog.Attr, 0, len(f))
	for _, key := range slices.Sorted(maps.Keys(f)) {
		name := key
		switch key {
		case "Key":
			name = "peer"
		case "Topic":
			name = "topic"
		}
		attrs = append(attrs, slog.Any(name, f[key]))
	}
	l.log.LogAttrs(context.Background(), level, msg, attrs...)
}
