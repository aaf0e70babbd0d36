// Package kube follows a Kubernetes cluster: what it publishes is the newest whole that its API server told, of the
// cluster document in a ConfigMap, the nodes and the pods behind the services that the document names.
//
// Nothing is published before all of it is known. A document that cannot be used, that is emptied or deleted, leaves the
// last good one in force; so does an API server that does not answer, also over a restart, by a file. It watches nodes,
// services, endpoint slices and one ConfigMap, and never pods. This is the only package that imports client-go.
package kube

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/ravel-lb/ravel"
	"github.com/ravel-lb/ravel/internal/desired"
	"github.com/ravel-lb/ravel/internal/latest"
	"github.com/ravel-lb/ravel/internal/setdiff"
)

// Options say what a Source follows. Client, Namespace, Name and Key are needed.
type Options struct {
	Log        *slog.Logger          // nil logs nothing
	Registerer prometheus.Registerer // nil registers nothing
	Client     *Client
	// Namespace and Name are those of the ConfigMap, Key that of the cluster document in it.
	Namespace, Name, Key string
	// FleetKey is the key of the fleet document in the same ConfigMap; empty where that comes from elsewhere.
	FleetKey string
	// Default is the default service of pools whose document names none; nil is none.
	Default *desired.DefaultService
	// IgnoreCordon lets nodes take new flows that are cordoned (spec.unschedulable).
	IgnoreCordon bool
	// Events posts a Kubernetes Event on the ConfigMap when its document cannot be used.
	Events bool
	// Cache is the file of the last good inputs, for a start at which the API server does not answer; empty keeps none.
	Cache string
	// MaxCacheAge is how long after the API server was last heard the file is good for a start; 24 h where it is 0.
	MaxCacheAge time.Duration
	// StartWait is how long a start waits for the API server before it takes the file; 5 s where it is 0.
	StartWait time.Duration
}

// Value is what the cluster was last known to want. It is never changed after it is published; parts that did not change
// are the very same in memory from one value to the next.
type Value struct {
	// Cluster's nodes and endpoints are sorted. Of the endpoints only those are there that a service of the document names,
	// or one of Also.
	Cluster desired.Cluster
	// Also are services that the document does not name, and whose endpoints are told all the same (Source.Also).
	Also []desired.Service
	// Fleet is the fleet document; nil where Options.FleetKey is empty.
	Fleet *desired.Fleet
	// Document and FleetDocument are the texts that Cluster and Fleet came from.
	Document, FleetDocument string
	// Warnings are parts of the documents that were left out, or that mean less than they seem to.
	Warnings []ravel.Problem
	// Problems are why a document, as it now is, is not in force, and which endpoints were left out. Sorted.
	Problems []ravel.Problem
	// Cached says that the value is that of an earlier process, from the file: the API server was not heard since. Whether a
	// member of the fleet has newer inputs (Revision, or Stamp) is for the caller to find out.
	Cached bool
	// Stamp is when the API server was known to say so, by the wall clock, in UTC, without a monotonic part.
	Stamp time.Time
	// Revision is the newest resourceVersion that was seen, which the API server counts up over all objects; 0 where it
	// told none that is a number. It is comparable between processes that follow the same cluster.
	Revision uint64
}

// Source follows a cluster. Its methods are safe for many goroutines.
type Source struct {
	o        Options
	log      *slog.Logger
	value    latest.Value[Value]
	caches   *caches
	watches  []*watch
	poster   *poster
	gap      time.Duration // between two values, at least
	quietFor time.Duration // of a change before it is written to the file
	keepGap  time.Duration // between two writes of the file, at least
	backoff  time.Duration // the longest between two tries to reach the API server, doubled at random

	mu     sync.Mutex // guards the fields below
	status status
	also   []desired.Service

	builder   builder // Run's
	published prometheus.Counter
}

// status is what a Source says of itself beside its value.
type status struct {
	fileFault error           // why the file was not used, or not written
	faults    []ravel.Problem // why documents, as they now are, are not in force
	synced    bool            // every cache was filled once
	late      bool            // not so within StartWait
}

// New returns a Source that Run will feed. It registers its metrics with Options.Registerer.
func New(o Options) *Source {
	if o.Log == nil {
		o.Log = slog.New(slog.DiscardHandler)
	}
	if o.MaxCacheAge == 0 {
		o.MaxCacheAge = 24 * time.Hour
	}
	if o.StartWait == 0 {
		o.StartWait = 5 * time.Second
	}
	s := &Source{
		o: o, log: o.Log.With("component", "kube"), caches: newCaches(o.Key, o.FleetKey),
		gap: 50 * time.Millisecond, quietFor: 2 * time.Second, keepGap: 10 * time.Second, backoff: 5 * time.Second,
	}
	s.watches = s.newWatches()
	s.builder = newBuilder(o)
	s.poster = newPoster(o, s.log)
	s.register(o.Registerer)
	return s
}

// Latest returns the newest value, and false while there was none.
func (s *Source) Latest() (Value, bool) { return s.value.Latest() }

// Changed returns a channel that is closed when there is another value. Ask for it before Latest.
func (s *Source) Changed() <-chan struct{} { return s.value.Changed() }

// Also has the endpoints of services told that the document need not name: those of an earlier document that is in force
// still. They are in a value soon. services must not be changed afterwards.
func (s *Source) Also(services []desired.Service) {
	s.mu.Lock()
	same := setdiff.Same(s.also, services)
	s.also = services
	s.mu.Unlock()
	if !same {
		s.caches.wake()
	}
}

// Run follows the cluster until ctx ends; then it returns nil.
func (s *Source) Run(ctx context.Context) error {
	kept := s.load(time.Now())
	if kept != nil {
		s.builder.remember(kept.Document, kept.FleetDocument)
	}
	var group sync.WaitGroup
	for _, w := range s.watches {
		group.Go(func() { w.run(ctx, s.backoff) })
	}
	group.Go(func() { s.poster.run(ctx) })
	group.Go(func() { s.keep(ctx) })
	defer s.keepLast()
	defer group.Wait()

	late := time.NewTimer(s.o.StartWait)
	defer late.Stop()
	quiet := time.NewTimer(0)
	<-quiet.C
	defer quiet.Stop()
	var last time.Time // a value was published
	changed := s.caches.changed
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-late.C:
			s.startLate(kept)
			continue
		case <-changed:
			// The first change goes on at once; what comes soon after it is gathered.
			if wait := s.gap - time.Since(last); wait > 0 {
				changed = nil
				quiet.Reset(wait)
				continue
			}
		case <-quiet.C:
			changed = s.caches.changed
		}
		if s.publish() {
			last = time.Now()
		}
	}
}

// publish makes a value of what the caches hold, if all of it is known and anything changed.
func (s *Source) publish() bool {
	news, synced := s.caches.take()
	if !synced {
		return false
	}
	s.mu.Lock()
	s.status.synced = true
	s.mu.Unlock()
	s.mu.Lock()
	also := s.also
	s.mu.Unlock()
	before, any := s.value.Latest()
	value, changed := s.builder.build(news, also, s.caches.about)
	s.mu.Lock()
	s.status.faults = s.builder.problems()
	s.mu.Unlock()
	s.poster.post(s.builder.faults(), s.builder.uid)
	if !s.builder.known() {
		return false
	}
	value.Stamp, value.Revision = time.Now().UTC().Round(0), news.revision
	if any && !before.Cached && !changed {
		return false
	}
	if !any || before.Cached {
		s.log.Info("the cluster is known", "services", len(value.Cluster.Services), "nodes", len(value.Cluster.Nodes),
			"endpoints", len(value.Cluster.Endpoints))
	}
	s.published.Inc()
	s.value.Set(value)
	return true
}

// startLate takes the value of an earlier process where the API server has not told everything in time.
func (s *Source) startLate(kept *Value) {
	if _, any := s.value.Latest(); any {
		return
	}
	missing := s.missing()
	s.mu.Lock()
	s.status.late = true
	s.mu.Unlock()
	if kept == nil {
		s.log.Warn("the API server has not told everything yet, and there is no value of an earlier process", "missing", missing)
		return
	}
	s.log.Warn("the API server has not told everything yet: the inputs of an earlier process are in force",
		"missing", missing, "age", time.Since(kept.Stamp).Round(time.Second))
	s.value.Set(*kept)
}

// Check returns an error where options cannot work.
func (o Options) Check() error {
	var faults []error
	for _, needed := range []struct{ name, value string }{{"namespace", o.Namespace}, {"name", o.Name}, {"key", o.Key}} {
		if needed.value == "" {
			faults = append(faults, fmt.Errorf("the %s of the ConfigMap is missing", needed.name))
		}
	}
	if o.Key != "" && o.Key == o.FleetKey {
		faults = append(faults, fmt.Errorf("both documents cannot be in key %s", o.Key))
	}
	return errors.Join(faults...)
}
