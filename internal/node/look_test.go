package node

import (
	"context"
	"log/slog"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/ravel-lb/ravel"
	"github.com/ravel-lb/ravel/internal/latest"
)

// looking is a walk that counts, whose rules somebody else moves.
type looking struct {
	steps, looks atomic.Int64
	moved        atomic.Bool
}

func (l *looking) step(context.Context, ravel.State, time.Time) (Report, error) {
	l.steps.Add(1)
	l.moved.Store(false)
	return Report{}, nil
}
func (l *looking) look(context.Context) bool              { l.looks.Add(1); return l.moved.Load() }
func (l *looking) stop(context.Context) error             { return nil }
func (l *looking) resync()                                {}
func (l *looking) changed() (ipvs, links <-chan struct{}) { return nil, nil }

// Every second the loop looks whether jumps stand where they should, and walks only when one does not. Before a state is
// known it touches nothing, so it does not look either.
func TestLook(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w, source := &looking{}, &latest.Value[ravel.State]{}
		n := newNode(Options{Log: slog.New(slog.DiscardHandler), Source: source, Resync: time.Hour}, w)
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error)
		go func() { done <- n.Run(ctx) }()
		after := func(d time.Duration, steps, looks int64) {
			t.Helper()
			time.Sleep(d)
			synctest.Wait()
			if w.steps.Load() != steps || w.looks.Load() != looks {
				t.Errorf("%d steps and %d looks, want %d and %d", w.steps.Load(), w.looks.Load(), steps, looks)
			}
		}
		after(10*time.Second, 0, 0)
		source.Set(ravel.State{})
		after(500*time.Millisecond, 1, 0)
		after(10*time.Second, 1, 10)
		w.moved.Store(true)
		after(time.Second, 2, 11)
		after(10*time.Second, 2, 21)
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
}
