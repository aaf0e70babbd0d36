package bgp

import (
	"context"
	"errors"
	"fmt"
	"time"
)

const (
	// ceaseWait bounds how long Stop waits for its Cease messages to leave.
	ceaseWait = time.Second
	// closeWait bounds how long Close waits for GoBGP.
	closeWait = 2 * time.Second
	// leaveWait is what Stop gives itself, after its context has ended, to say what it left out.
	leaveWait = 100 * time.Millisecond
)

// Stop is the planned end. It withdraws every route, waits Options.StopWait while the kernel serves on, and ends each
// session by a Cease (administrative shutdown) with a text that names this director (RFC 9003). If ctx ends first,
// what is left of that is skipped and the error says so. Then it stops GoBGP, as Close does. It lasts no longer than
// ctx, also where a router has stopped reading.
func (s *Speaker) Stop(ctx context.Context) error {
	left := make(chan error, 1)
	go func() { left <- s.leave(ctx) }() // close waits for it: both hold mu
	var err error
	select {
	case err = <-left:
	case <-ctx.Done():
		select {
		case err = <-left:
		case <-time.After(leaveWait):
			err = fmt.Errorf("withdrawing all routes: %w", ctx.Err())
		}
	}
	return errors.Join(err, s.CloseContext(ctx))
}

// leave says goodbye to the routers. Nothing is applied afterwards.
func (s *Speaker) leave(ctx context.Context) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.stopped || s.gobgp == nil {
		s.stopped = true
		return nil
	}
	s.stopped = true
	s.view.want(0)
	err := s.withdrawAll()
	if !s.sessions.anyEstablished() {
		return err
	}
	wait := time.NewTimer(s.o.StopWait)
	defer wait.Stop()
	select {
	case <-wait.C:
	case <-s.closing:
		return err
	case <-ctx.Done():
		return errors.Join(err, fmt.Errorf("waiting for the routers to forget our routes: %w", ctx.Err()))
	}
	reason := "ravel: planned stop"
	if s.o.Node != "" {
		reason += " of director " + s.o.Node
	}
	for addr := range s.peers {
		if s.sessions.leave(addr) {
			err = errors.Join(err, s.gobgp.cease(addr, reason))
		}
	}
	return errors.Join(err, s.awaitDown(ctx))
}

// awaitDown waits until no session is established.
func (s *Speaker) awaitDown(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, ceaseWait)
	defer cancel()
	poll := time.NewTicker(5 * time.Millisecond)
	defer poll.Stop()
	for s.sessions.anyEstablished() {
		select {
		case <-poll.C:
		case <-s.closing:
			return nil
		case <-ctx.Done():
			return fmt.Errorf("waiting for the end of the sessions: %w", ctx.Err())
		}
	}
	return nil
}

// Close ends everything at once: no wait, nothing withdrawn by name, a Cease (peer de-configured) to each router, which
// makes it forget our routes. It returns when every goroutine of the Speaker has ended, or after 2 s: a router that has
// stopped reading can hold GoBGP up for that session's hold time, which is logged and ends by itself. Close may be
// called twice, and while Stop runs.
func (s *Speaker) Close() error {
	ctx, cancel := context.WithTimeout(context.Background(), closeWait)
	defer cancel()
	if err := s.CloseContext(ctx); err != nil {
		s.log.Warn("a router that does not read holds up the end of its session; not waiting for it", "err", err)
	}
	return nil
}

// CloseContext is Close that waits for as long as ctx lasts. Its error says that goroutines are left, which end when
// the last router reads again or its hold time is over.
func (s *Speaker) CloseContext(ctx context.Context) error {
	closed := s.close()
	select {
	case <-closed:
		return nil
	default:
	}
	select {
	case <-closed:
		return nil
	case <-ctx.Done():
		return fmt.Errorf("waiting for GoBGP to stop: %w", ctx.Err())
	}
}

// close starts the end, once, and returns a channel that is closed at the end of it.
func (s *Speaker) close() <-chan struct{} {
	s.closeOnce.Do(func() {
		close(s.closing)
		go func() {
			defer close(s.closed)
			s.mu.Lock()
			s.stopped = true // so that no Apply starts the keeper after we waited for it
			s.mu.Unlock()
			s.keeper.Wait()
			s.mu.Lock()
			defer s.mu.Unlock()
			s.stopServer("the speaker stops")
			if s.o.Registerer != nil {
				s.o.Registerer.Unregister(s.metrics)
			}
		}()
	})
	return s.closed
}
