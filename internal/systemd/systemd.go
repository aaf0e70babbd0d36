// Package systemd tells the service manager how a process does: the datagrams of sd_notify(3).
package systemd

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"strconv"
	"strings"
	"time"
)

// Manager is who started this process and wants to hear from it. Open finds it. A nil Manager is nobody: nothing is
// told.
type Manager struct {
	socket net.UnixAddr
	every  time.Duration // within which the manager wants a sign of life; 0 wants none
}

// Open finds the manager that the environment names, and returns nil where it names none. It takes the names out of the
// environment, because the programs that this process runs have nothing to tell.
func Open() (*Manager, error) {
	socket, every, pid := take("NOTIFY_SOCKET"), take("WATCHDOG_USEC"), take("WATCHDOG_PID")
	if socket == "" {
		return nil, nil
	}
	if socket[0] != '/' && socket[0] != '@' {
		return nil, fmt.Errorf("NOTIFY_SOCKET is %q: only unix sockets are known", socket)
	}
	// Go, too, writes an abstract name with an @.
	m := &Manager{socket: net.UnixAddr{Name: socket, Net: "unixgram"}}
	if every != "" && (pid == "" || pid == strconv.Itoa(os.Getpid())) {
		n, err := strconv.ParseInt(every, 10, 64)
		if err != nil || n <= 0 || n > int64(24*time.Hour/time.Microsecond) {
			return nil, fmt.Errorf("WATCHDOG_USEC is %q: want a number of microseconds", every)
		}
		m.every = time.Duration(n) * time.Microsecond
	}
	return m, nil
}

func take(name string) string {
	value := os.Getenv(name)
	_ = os.Unsetenv(name)
	return value
}

// tell sends assignments in one datagram, to the socket that is there now: a manager may have started anew.
func (m *Manager) tell(assignments ...string) error {
	conn, err := net.DialUnix("unixgram", nil, &m.socket)
	if err != nil {
		return err
	}
	// One that takes nothing is no reason to wait: it is told again.
	if err = conn.SetWriteDeadline(time.Now().Add(time.Second)); err == nil {
		_, err = conn.Write([]byte(strings.Join(assignments, "\n")))
	}
	return errors.Join(err, conn.Close())
}

// Process is what there is to tell.
type Process struct {
	Log *slog.Logger
	// Healthy returns an error while the process does not do its work; then it gives no sign of life.
	Healthy func() error
	// Status is one line for operators, and whether what the process is for is done for the first time.
	Status func() (line string, done bool)
	// ReadyWithin is after what time the manager is told that the start is over, done or not.
	ReadyWithin time.Duration
	// Every is how often Status is asked; 0 is 1 s.
	Every time.Duration
}

// Run tells how the process does until ctx ends. When stopping is closed before that, it tells of a planned stop.
func (m *Manager) Run(ctx context.Context, stopping <-chan struct{}, p Process) {
	if m == nil {
		return
	}
	// A status that takes for ever does not keep the start from being over.
	enough := time.AfterFunc(p.ReadyWithin, func() { _ = m.tell("READY=1") })
	defer enough.Stop()
	alive := make(chan struct{})
	// Beside each other: a status that takes long is no death.
	go func() {
		defer close(alive)
		m.live(ctx, p)
	}()
	m.status(ctx, stopping, p)
	<-alive
}

// live gives a sign of life twice as often as the manager wants one.
func (m *Manager) live(ctx context.Context, p Process) {
	if m.every == 0 {
		return
	}
	ticker := time.NewTicker(m.every / 2)
	defer ticker.Stop()
	for {
		err := p.Healthy()
		if err == nil {
			err = m.tell("WATCHDOG=1")
		}
		if err != nil && ctx.Err() == nil {
			p.Log.Warn("no sign of life is given to the service manager", "err", err)
		}
		select {
		case <-ctx.Done():
			return
		case <-ticker.C:
		}
	}
}

// status tells of the end of the start, of the status whenever it changes, and of a planned stop.
func (m *Manager) status(ctx context.Context, stopping <-chan struct{}, p Process) {
	every := p.Every
	if every == 0 {
		every = time.Second
	}
	ticker := time.NewTicker(every)
	defer ticker.Stop()
	told, ready, deaf := "", false, false
	tell := func(assignments ...string) bool {
		err := m.tell(assignments...)
		if err != nil && !deaf {
			p.Log.Warn("the service manager does not hear", "err", err)
		}
		deaf = err != nil
		return !deaf
	}
	for {
		line, done := p.Status()
		line = oneLine(line)
		var news []string
		becomes := !ready && done
		if becomes {
			news = append(news, "READY=1")
		}
		if line != told {
			news = append(news, "STATUS="+line)
		}
		if len(news) > 0 && tell(news...) {
			told, ready = line, ready || becomes
		}
		select {
		case <-ctx.Done():
			return
		case <-stopping:
			tell("STOPPING=1", "STATUS=stopping")
			<-ctx.Done()
			return
		case <-ticker.C:
		}
	}
}

// oneLine writes joined errors in one line of a length that fits beside others.
func oneLine(s string) string {
	const most = 400
	s = strings.Join(strings.FieldsFunc(s, func(r rune) bool { return r == '\n' || r == '\r' }), "; ")
	if len(s) > most {
		s = strings.ToValidUTF8(s[:most], "") + "..."
	}
	return s
}
