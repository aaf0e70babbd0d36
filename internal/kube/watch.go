package kube

import (
	"context"
	"errors"
	"log/slog"
	"math"
	"net/url"
	"strings"
	"sync"
	"time"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/fields"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/util/wait"
	apiwatch "k8s.io/apimachinery/pkg/watch"
	"k8s.io/client-go/tools/cache"
	"k8s.io/klog/v2"
	"k8s.io/utils/clock"
)

// watch keeps one kind of the caches in step with the API server.
type watch struct {
	kind      string
	namespace string // empty is all
	selector  string // of fields
	log       *slog.Logger
	example   runtime.Object
	all       func() runtime.Object // makes a list
	store     store
	client    *Client
	// firstWord is how long the API server may say nothing after a request to watch, silence how long it may later; its
	// bookmarks come once a minute. A list may take long. Then the request is given up and made again.
	firstWord, silence, long time.Duration
	// settle is how long a watch must last, if nothing is told, to be taken as open: the client makes one that ends at once of
	// a connection that was closed.
	settle time.Duration

	mu       sync.Mutex // guards the fields below
	open     bool       // a watch is
	heardAt  time.Time  // the API server last told something of this kind
	touchAt  time.Time  // a watch was last open
	fault    string     // of the last try, since the last that went well
	fix      string     // what to do about it
	errors   int
	guard    *time.Timer // ends the request that is under way
	initials bool        // the request's first objects are under way
}

func (s *Source) newWatches() []*watch {
	watches := []*watch{
		{kind: kindConfigMaps, namespace: s.o.Namespace, example: &corev1.ConfigMap{}, all: func() runtime.Object { return &corev1.ConfigMapList{} },
			selector: fields.OneTermEqualSelector(metav1.ObjectNameField, s.o.Name).String()},
		{kind: kindNodes, example: &corev1.Node{}, all: func() runtime.Object { return &corev1.NodeList{} }},
		{kind: kindServices, example: &corev1.Service{}, all: func() runtime.Object { return &corev1.ServiceList{} }},
		{kind: kindSlices, example: &discoveryv1.EndpointSlice{}, all: func() runtime.Object { return &discoveryv1.EndpointSliceList{} }},
	}
	for _, w := range watches {
		w.log, w.client = s.log.With("resource", w.kind), s.o.Client
		w.firstWord, w.silence, w.long, w.settle = 30*time.Second, 3*time.Minute, 2*time.Minute, time.Second
		w.store = store{caches: s.caches, kind: w.kind, ignoreCordon: s.o.IgnoreCordon, heard: w.heard, filled: w.filled}
	}
	return watches
}

// run follows the kind until ctx ends.
func (w *watch) run(ctx context.Context, longest time.Duration) {
	const first = 500 * time.Millisecond
	lw := &cache.ListWatch{ListWithContextFunc: w.listing, WatchFuncWithContext: w.watching}
	// The library logs each try; this package says when the API server is lost, and when it is back.
	quiet := klog.Logger{}
	r := cache.NewReflectorWithOptions(lw, w.example, w.store, cache.ReflectorOptions{
		Name: w.kind, Logger: &quiet, Clock: endingClock{clock.RealClock{}, ctx},
		Backoff: &wait.Backoff{
			Duration: min(first, longest), Cap: longest, Factor: 2, Jitter: 1, Steps: int(math.Ceil(float64(longest) / float64(min(first, longest)))),
		},
	})
	r.RunWithContext(klog.NewContext(ctx, quiet))
}

// endingClock has no wait outlive its context: the reflector sits some of them out.
type endingClock struct {
	clock.RealClock
	ctx context.Context
}

// After is time.After that ends with the context too.
func (c endingClock) After(d time.Duration) <-chan time.Time {
	ch := make(chan time.Time, 1)
	ctx, cancel := context.WithTimeout(c.ctx, d)
	context.AfterFunc(ctx, func() {
		cancel()
		ch <- time.Now()
	})
	return ch
}

func (w *watch) listing(ctx context.Context, o metav1.ListOptions) (runtime.Object, error) {
	ctx, cancel := context.WithTimeoutCause(ctx, w.long, errSilent)
	defer cancel()
	o.FieldSelector = w.selector
	list := w.all()
	if err := w.client.list(ctx, w.kind, w.namespace, o, list); err != nil {
		w.failed(ctx, err)
		return nil, err
	}
	return list, nil
}

var errSilent = errors.New("the API server does not answer")

func (w *watch) watching(ctx context.Context, o metav1.ListOptions) (apiwatch.Interface, error) {
	ctx, cancel := context.WithCancelCause(ctx)
	guard := time.AfterFunc(w.firstWord, func() { cancel(errSilent) })
	w.mu.Lock()
	w.guard, w.initials = guard, o.SendInitialEvents != nil && *o.SendInitialEvents
	w.mu.Unlock()
	o.FieldSelector = w.selector
	opened, err := w.client.watch(ctx, w.kind, w.namespace, o)
	if err != nil {
		guard.Stop()
		w.mu.Lock()
		w.guard = nil
		w.mu.Unlock()
		w.failed(ctx, err)
		cancel(nil)
		return nil, err
	}
	w.mu.Lock()
	initials := w.initials
	w.mu.Unlock()
	settled := func() bool { return false }
	if !initials {
		guard.Reset(w.silence)
		settled = time.AfterFunc(w.settle, func() {
			if ctx.Err() == nil {
				w.filled()
			}
		}).Stop
	}
	return &watched{Interface: opened, stop: sync.OnceFunc(func() {
		settled()
		guard.Stop()
		w.closed(ctx)
		cancel(nil)
	})}, nil
}

// watched is a watch that tells when it is stopped, which the reflector does in each case.
type watched struct {
	apiwatch.Interface
	stop func()
}

// Stop ends the watch.
func (w *watched) Stop() {
	w.stop()
	w.Interface.Stop()
}

// heard notes that the API server said something of this kind.
func (w *watch) heard() {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.heardAt = time.Now()
	w.touchAt = w.heardAt
	if w.guard == nil {
		return
	}
	if w.initials {
		w.guard.Reset(w.firstWord)
		return
	}
	w.guard.Reset(w.silence)
	w.openedLocked()
}

// filled notes that the first objects of a watch are complete, or that one without such has lasted for a while.
func (w *watch) filled() {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.initials = false
	if w.guard != nil { // of a watch, not of a list
		w.openedLocked()
		w.guard.Reset(w.silence)
	}
}

func (w *watch) openedLocked() {
	w.open = true
	if w.fault != "" {
		w.log.Info("the API server is heard again")
		w.fault = ""
	}
}

func (w *watch) closed(ctx context.Context) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.open {
		w.touchAt = time.Now()
	}
	if w.guard != nil && errors.Is(context.Cause(ctx), errSilent) {
		w.failedLocked(errSilent)
	}
	w.open, w.guard = false, nil
}

// failed notes an error, unless it is that we ended the request.
func (w *watch) failed(ctx context.Context, err error) {
	switch cause := context.Cause(ctx); {
	case errors.Is(cause, errSilent):
		err = errSilent
	case cause != nil:
		return
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	w.failedLocked(err)
}

func (w *watch) failedLocked(err error) {
	if apierrors.IsResourceExpired(err) || apierrors.IsGone(err) {
		return // so it says that all is to be listed again
	}
	w.errors++
	what := reason(err)
	if w.fault == "" {
		w.log.Warn("the API server is not heard", "error", what)
	}
	w.fault, w.fix = what, remedy(err, w.client.server())
}

// reason is what an error says without the request that it is about, so that what is wrong with the API server is the same
// for all that is asked of it.
func reason(err error) string {
	var request *url.Error
	if errors.As(err, &request) {
		err = request.Err
	}
	what, _, _ := strings.Cut(err.Error(), " - error from a previous attempt")
	return what
}

// standing is how a watch is doing.
type standing struct {
	open             bool
	heardAt, touchAt time.Time
	fault, fix       string
	errors           int
}

func (w *watch) standing() standing {
	w.mu.Lock()
	defer w.mu.Unlock()
	return standing{w.open, w.heardAt, w.touchAt, w.fault, w.fix, w.errors}
}
