package kube

import (
	"context"
	"fmt"
	"hash/fnv"
	"log/slog"
	"slices"
	"strings"
	"sync"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	"github.com/ravel-lb/ravel"
)

// poster says on the ConfigMap itself what is wrong with it, as an Event. All processes of a fleet post the same Event under
// the same name, so that there is one, and again each hour, because Events go after that.
type poster struct {
	o   Options
	log *slog.Logger
	gap time.Duration // between two posts, at least
	now func() time.Time

	changed chan struct{} // of one
	mu      sync.Mutex    // guards the fields below
	faults  []ravel.Problem
	uid     string
}

func newPoster(o Options, log *slog.Logger) *poster {
	return &poster{o: o, log: log, gap: 2 * time.Second, now: time.Now, changed: make(chan struct{}, 1)}
}

// post gives what is to be said now; nothing is to be said of a document without faults.
func (p *poster) post(faults []ravel.Problem, uid string) {
	if !p.o.Events {
		return
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if slices.Equal(faults, p.faults) && uid == p.uid {
		return
	}
	p.faults, p.uid = faults, uid
	select {
	case p.changed <- struct{}{}:
	default:
	}
}

// run posts until ctx ends.
func (p *poster) run(ctx context.Context) {
	if !p.o.Events {
		return
	}
	again := time.NewTicker(10 * time.Minute)
	defer again.Stop()
	posted := ""
	for {
		select {
		case <-ctx.Done():
			return
		case <-p.changed:
		case <-again.C:
		}
		p.mu.Lock()
		faults, uid := p.faults, p.uid
		p.mu.Unlock()
		if len(faults) == 0 {
			posted = ""
			continue
		}
		event := p.event(faults, uid)
		if event.Name == posted {
			continue
		}
		if err := p.create(ctx, event); err != nil {
			p.log.Warn("posting an Event on the ConfigMap", "error", err)
		} else {
			posted = event.Name
		}
		select {
		case <-ctx.Done():
			return
		case <-time.After(p.gap):
		}
	}
}

func (p *poster) create(ctx context.Context, event *corev1.Event) error {
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	err := p.o.Client.post(ctx, event)
	if apierrors.IsAlreadyExists(err) {
		return nil // another process was first
	}
	return err
}

func (p *poster) event(faults []ravel.Problem, uid string) *corev1.Event {
	var lines []string
	for i, f := range faults {
		if i == 3 {
			lines = append(lines, fmt.Sprintf("and %d more; ravel check shows all", len(faults)-i))
			break
		}
		lines = append(lines, f.String())
	}
	text := "the document cannot be used: " + strings.Join(lines, "; ") + "; the last good one, if there was any, stays in force"
	const most = 1000 // bytes; the API server allows 1,024
	if len(text) > most {
		text = strings.ToValidUTF8(text[:most], "") + "…"
	}
	now := p.now()
	name := fnv.New64a()
	fmt.Fprint(name, uid, text, now.Unix()/3600)
	return &corev1.Event{
		ObjectMeta: metav1.ObjectMeta{Namespace: p.o.Namespace, Name: fmt.Sprintf("%s.ravel-%016x", p.o.Name, name.Sum64())},
		InvolvedObject: corev1.ObjectReference{
			APIVersion: "v1", Kind: "ConfigMap", Namespace: p.o.Namespace, Name: p.o.Name, UID: types.UID(uid),
		},
		Type: corev1.EventTypeWarning, Reason: "DocumentRefused", Message: text,
		Source:         corev1.EventSource{Component: "ravel"},
		FirstTimestamp: metav1.NewTime(now), LastTimestamp: metav1.NewTime(now), Count: 1,
	}
}
