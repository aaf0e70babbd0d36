package kube

import (
	"maps"
	"slices"
	"sync"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	"k8s.io/apimachinery/pkg/api/meta"
	"k8s.io/client-go/tools/cache"

	"github.com/ravel-lb/ravel/internal/desired"
)

// caches hold what is kept of the cluster's objects, and what of it changed since somebody asked.
//
// All endpoint slices of the cluster are kept, trimmed: so a document that names another service finds its endpoints at
// once, and nothing has to be listed again.
type caches struct {
	key, fleetKey string
	changed       chan struct{} // of one: something changed

	mu       sync.Mutex // guards the fields below
	synced   map[string]bool
	revision uint64
	nodes    map[string]desired.Node
	services map[ref]service
	slices   map[ref]*slice   // by their own name
	byOwner  map[ref][]*slice // by their Service's; sorted by name
	document configMap

	nodesChanged, documentChanged bool
	touched                       map[ref]bool // services
}

// kinds are what is watched.
const (
	kindNodes      = "nodes"
	kindServices   = "services"
	kindSlices     = "endpointslices"
	kindConfigMaps = "configmaps"
)

func newCaches(key, fleetKey string) *caches {
	return &caches{
		key: key, fleetKey: fleetKey, changed: make(chan struct{}, 1), synced: map[string]bool{},
		nodes: map[string]desired.Node{}, services: map[ref]service{}, slices: map[ref]*slice{}, byOwner: map[ref][]*slice{},
		touched: map[ref]bool{},
	}
}

// news are what changed since the last news. What is in them is never changed.
type news struct {
	revision uint64
	nodes    map[string]desired.Node // all of them; nil where none changed
	document *configMap              // nil where it did not change
	services map[ref]about           // those that changed
}

// about is what there is of a service.
type about struct {
	exists bool // the Service
	service
	slices []*slice
}

// take returns what changed, and false while the caches are not all filled: then nothing is taken.
func (c *caches) take() (news, bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if len(c.synced) < 4 {
		return news{}, false
	}
	n := news{revision: c.revision}
	if c.nodesChanged {
		n.nodes = maps.Clone(c.nodes)
	}
	if c.documentChanged {
		document := c.document
		n.document = &document
	}
	n.services = make(map[ref]about, len(c.touched))
	for r := range c.touched {
		n.services[r] = c.aboutLocked(r)
	}
	c.nodesChanged, c.documentChanged = false, false
	clear(c.touched)
	return n, true
}

func (c *caches) aboutLocked(r ref) about {
	s, exists := c.services[r]
	return about{exists: exists, service: s, slices: c.byOwner[r]}
}

// about returns what there is of services now.
func (c *caches) about(refs []ref) map[ref]about {
	c.mu.Lock()
	defer c.mu.Unlock()
	all := make(map[ref]about, len(refs))
	for _, r := range refs {
		all[r] = c.aboutLocked(r)
	}
	return all
}

// count returns how many objects of a kind there are.
func (c *caches) count(kind string) int {
	c.mu.Lock()
	defer c.mu.Unlock()
	switch kind {
	case kindNodes:
		return len(c.nodes)
	case kindServices:
		return len(c.services)
	case kindSlices:
		return len(c.slices)
	}
	if c.document.there {
		return 1
	}
	return 0
}

func (c *caches) isSynced(kind string) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.synced[kind]
}

// wake has somebody look, though no object changed.
func (c *caches) wake() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.wakeLocked()
}

func (c *caches) wakeLocked() {
	select {
	case c.changed <- struct{}{}:
	default:
	}
}

// store is one kind of the caches, as a reflector fills it.
type store struct {
	*caches
	kind         string
	ignoreCordon bool
	heard        func() // is told that the API server spoke
	filled       func() // is told that it told all
}

var (
	_ cache.TransformingStore      = store{}
	_ cache.ReflectorBookmarkStore = store{}
)

// Add keeps an object.
func (s store) Add(object any) error { return s.Update(object) }

// Update keeps an object.
func (s store) Update(object any) error {
	s.heard()
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.putLocked(object)
}

// Delete forgets an object.
func (s store) Delete(object any) error {
	s.heard()
	m, err := meta.Accessor(object)
	if err != nil {
		return err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.revision = max(s.revision, revision(m.GetResourceVersion()))
	s.dropLocked(ref{m.GetNamespace(), m.GetName()})
	return nil
}

// Replace keeps these objects of its kind and no other, and takes it as filled.
func (s store) Replace(objects []any, version string) error {
	s.heard()
	s.filled()
	s.mu.Lock()
	defer s.mu.Unlock()
	there := make(map[ref]bool, len(objects))
	for _, object := range objects {
		m, err := meta.Accessor(object)
		if err != nil {
			return err
		}
		if err := s.putLocked(object); err != nil {
			return err
		}
		there[ref{m.GetNamespace(), m.GetName()}] = true
	}
	for _, r := range s.allLocked() {
		if !there[r] {
			s.dropLocked(r)
		}
	}
	s.revision = max(s.revision, revision(version))
	if !s.synced[s.kind] {
		s.synced[s.kind] = true
		if s.kind == kindConfigMaps {
			s.documentChanged = true // also where there is none
		}
	}
	s.wakeLocked()
	return nil
}

// Bookmark hears that the API server has nothing new.
func (s store) Bookmark(version string) error {
	s.heard()
	s.mu.Lock()
	defer s.mu.Unlock()
	s.revision = max(s.revision, revision(version))
	return nil
}

// Resync does nothing.
func (s store) Resync() error { return nil }

// Transformer returns what the reflector does to objects of a first list as they come.
func (s store) Transformer() cache.TransformFunc {
	return func(object any) (any, error) {
		s.heard()
		return trim(object)
	}
}

// putLocked keeps an object, and notes what changed by it.
func (s store) putLocked(object any) error {
	switch o := object.(type) {
	case *corev1.Node:
		s.seenLocked(o.ResourceVersion)
		n := keepNode(o, s.ignoreCordon)
		if was, there := s.nodes[n.Name]; there && equalNodes(was, n) {
			return nil
		}
		s.nodes[n.Name] = n
		s.nodesChanged = true
	case *corev1.Service:
		s.seenLocked(o.ResourceVersion)
		r, kept := ref{same(o.Namespace), same(o.Name)}, keepService(o)
		if was, there := s.services[r]; there && was == kept {
			return nil
		}
		s.services[r] = kept
		s.touched[r] = true
	case *discoveryv1.EndpointSlice:
		s.seenLocked(o.ResourceVersion)
		kept := keepSlice(o)
		name := ref{kept.namespace, o.Name}
		was := s.slices[name]
		if was != nil && was.equal(kept) {
			return nil
		}
		if kept.ref.name == "" { // nobody's
			s.dropLocked(name)
			return nil
		}
		if was != nil {
			s.disownLocked(was)
		}
		s.slices[name] = kept
		owned := s.byOwner[kept.ref]
		at, _ := slices.BinarySearchFunc(owned, kept.name, func(s *slice, name string) int { return compareNames(s.name, name) })
		// A new list: the old one may be read.
		s.byOwner[kept.ref] = slices.Concat(owned[:at], []*slice{kept}, owned[at:])
		s.touched[kept.ref] = true
	case *corev1.ConfigMap:
		s.seenLocked(o.ResourceVersion)
		s.document = keepConfigMap(o, s.key, s.fleetKey)
		s.documentChanged = true
	default:
		return unexpected(object)
	}
	if len(s.synced) == 4 {
		s.wakeLocked()
	}
	return nil
}

func compareNames(a, b string) int {
	switch {
	case a < b:
		return -1
	case a > b:
		return 1
	}
	return 0
}

func (s store) seenLocked(version string) { s.revision = max(s.revision, revision(version)) }

func (s store) disownLocked(was *slice) {
	left := slices.DeleteFunc(slices.Clone(s.byOwner[was.ref]), func(o *slice) bool { return o.name == was.name })
	if s.byOwner[was.ref] = left; len(left) == 0 {
		delete(s.byOwner, was.ref)
	}
	s.touched[was.ref] = true
}

func (s store) dropLocked(name ref) {
	switch s.kind {
	case kindNodes:
		if _, there := s.nodes[name.name]; !there {
			return
		}
		delete(s.nodes, name.name)
		s.nodesChanged = true
	case kindServices:
		if _, there := s.services[name]; !there {
			return
		}
		delete(s.services, name)
		s.touched[name] = true
	case kindSlices:
		was, there := s.slices[name]
		if !there {
			return
		}
		delete(s.slices, name)
		s.disownLocked(was)
	case kindConfigMaps:
		if !s.document.there {
			return
		}
		s.document = configMap{}
		s.documentChanged = true
	}
	s.wakeLocked()
}

// allLocked are the names of all objects of the kind, but for the ConfigMap, whose name is not kept.
func (s store) allLocked() []ref {
	var all []ref
	switch s.kind {
	case kindNodes:
		for name := range s.nodes {
			all = append(all, ref{name: name})
		}
	case kindServices:
		for r := range s.services {
			all = append(all, r)
		}
	case kindSlices:
		for r := range s.slices {
			all = append(all, r)
		}
	case kindConfigMaps:
		if s.document.there {
			all = append(all, ref{s.document.namespace, s.document.name})
		}
	}
	return all
}

func equalNodes(a, b desired.Node) bool {
	return a.Name == b.Name && a.Ready == b.Ready && a.Draining == b.Draining && a.Excluded == b.Excluded &&
		slices.Equal(a.Addrs, b.Addrs) && maps.Equal(a.Labels, b.Labels)
}
