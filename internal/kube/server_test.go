package kube

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"net/http"
	"net/http/httptest"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/client-go/rest"
)

// apiServer is a small honest API server for what this package asks: lists, watches from a revision on, streamed lists,
// events; and it can do what an API server in trouble does.
type apiServer struct {
	*httptest.Server

	mu       sync.Mutex // guards the fields below
	revision int
	objects  map[string]runtime.Object // by kind, namespace and name
	history  []told
	oldest   int // watches from before it are answered 410 Gone
	changed  chan struct{}
	behaves  behaviour
	mute     string         // the kind of which nothing is said
	requests map[string]int // by verb and resource
	posted   []corev1.Event
	noStream bool // streamed lists are refused, as by older API servers
	dropped  chan struct{}
}

// told is something that watches tell.
type told struct {
	revision int
	what     string // ADDED, MODIFIED, DELETED
	object   runtime.Object
}

// behaviour is what is wrong with the API server.
type behaviour int

const (
	good      behaviour = iota
	fails               // answers 500
	forbids             // answers 403
	closes              // closes connections
	hangs               // accepts and says nothing
	breaks              // watches end with an error in the stream
	throttles           // answers 429
)

func newAPIServer(t testing.TB, objects ...runtime.Object) *apiServer {
	a := &apiServer{objects: map[string]runtime.Object{}, changed: make(chan struct{}), dropped: make(chan struct{}), requests: map[string]int{}, revision: 1}
	a.Server = httptest.NewServer(http.HandlerFunc(a.serve))
	t.Cleanup(func() {
		a.behave(closes)
		a.CloseClientConnections()
		a.Close()
	})
	for _, o := range objects {
		a.set(o)
	}
	return a
}

func (a *apiServer) client(t testing.TB) *Client {
	c, err := newClient(&rest.Config{Host: a.URL, QPS: -1})
	if err != nil {
		t.Fatal(err)
	}
	return c
}

func keyOf(o runtime.Object) string {
	m := o.(metav1.Object)
	return kindOf(o) + " " + m.GetNamespace() + "/" + m.GetName()
}

// set makes an object as it is told, and tells of it.
func (a *apiServer) set(o runtime.Object) {
	a.mu.Lock()
	defer a.mu.Unlock()
	o = o.DeepCopyObject()
	what := "ADDED"
	if _, there := a.objects[keyOf(o)]; there {
		what = "MODIFIED"
	}
	a.revision++
	o.(metav1.Object).SetResourceVersion(strconv.Itoa(a.revision))
	a.objects[keyOf(o)] = o
	a.tellLocked(what, o)
}

func (a *apiServer) remove(o runtime.Object) {
	a.mu.Lock()
	defer a.mu.Unlock()
	o = o.DeepCopyObject()
	a.revision++
	o.(metav1.Object).SetResourceVersion(strconv.Itoa(a.revision))
	delete(a.objects, keyOf(o))
	a.tellLocked("DELETED", o)
}

func (a *apiServer) tellLocked(what string, o runtime.Object) {
	a.history = append(a.history, told{a.revision, what, o})
	close(a.changed)
	a.changed = make(chan struct{})
}

// behave changes what is wrong with the API server, and ends what is under way.
func (a *apiServer) behave(b behaviour) {
	a.mu.Lock()
	a.behaves = b
	close(a.dropped)
	a.dropped = make(chan struct{})
	a.mu.Unlock()
}

// forget loses the history, as a compaction or a restart does.
func (a *apiServer) forget() {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.history, a.oldest = nil, a.revision+1
	a.revision++
}

// asked is how many requests there were.
func (a *apiServer) asked() int {
	a.mu.Lock()
	defer a.mu.Unlock()
	sum := 0
	for _, n := range a.requests {
		sum += n
	}
	return sum
}

func (a *apiServer) serve(w http.ResponseWriter, r *http.Request) {
	resource := r.URL.Path[strings.LastIndex(r.URL.Path, "/")+1:]
	verb := "list"
	switch {
	case r.Method == http.MethodPost:
		verb = "create"
	case r.URL.Query().Get("watch") != "":
		verb = "watch"
	}
	a.mu.Lock()
	a.requests[verb+" "+resource]++
	behaves, dropped := a.behaves, a.dropped
	if a.mute == resource {
		behaves = hangs
	}
	a.mu.Unlock()
	switch behaves {
	case fails:
		answer(w, http.StatusInternalServerError, metav1.StatusReasonInternalError)
		return
	case forbids:
		answer(w, http.StatusForbidden, metav1.StatusReasonForbidden)
		return
	case throttles:
		w.Header().Set("Retry-After", "0")
		answer(w, http.StatusTooManyRequests, metav1.StatusReasonTooManyRequests)
		return
	case closes:
		panic(http.ErrAbortHandler)
	case hangs:
		select {
		case <-r.Context().Done():
		case <-dropped:
			panic(http.ErrAbortHandler)
		}
		return
	}
	w.Header().Set("Content-Type", "application/json")
	switch verb {
	case "create":
		var e corev1.Event
		body, err := io.ReadAll(r.Body)
		if err == nil {
			err = protobufOf(body, &e)
		}
		if err != nil {
			answer(w, http.StatusBadRequest, metav1.StatusReasonBadRequest)
			return
		}
		a.mu.Lock()
		defer a.mu.Unlock()
		if slices.ContainsFunc(a.posted, func(p corev1.Event) bool { return p.Name == e.Name }) {
			answer(w, http.StatusConflict, metav1.StatusReasonAlreadyExists)
			return
		}
		a.posted = append(a.posted, e)
		_ = json.NewEncoder(w).Encode(e)
	case "list":
		a.mu.Lock()
		list := map[string]any{"kind": listKinds[resource], "apiVersion": versionOf(resource), "metadata": map[string]string{"resourceVersion": strconv.Itoa(a.revision)},
			"items": a.allLocked(resource)}
		a.mu.Unlock()
		_ = json.NewEncoder(w).Encode(list)
	case "watch":
		a.watch(w, r, resource, dropped)
	}
}

var listKinds = map[string]string{kindNodes: "NodeList", kindServices: "ServiceList", kindSlices: "EndpointSliceList", kindConfigMaps: "ConfigMapList"}

func versionOf(resource string) string {
	if resource == kindSlices {
		return discoveryv1.SchemeGroupVersion.String()
	}
	return "v1"
}

func (a *apiServer) allLocked(resource string) []runtime.Object {
	all := []runtime.Object{}
	for _, key := range slices.Sorted(maps.Keys(a.objects)) {
		if strings.HasPrefix(key, resource+" ") {
			all = append(all, a.objects[key])
		}
	}
	return all
}

func (a *apiServer) watch(w http.ResponseWriter, r *http.Request, resource string, dropped <-chan struct{}) {
	query := r.URL.Query()
	from, _ := strconv.Atoi(query.Get("resourceVersion"))
	tell := func(what string, object any) {
		if o, is := object.(runtime.Object); is {
			o = o.DeepCopyObject()
			o.GetObjectKind().SetGroupVersionKind(gvk(resource))
			object = o
		}
		_ = json.NewEncoder(w).Encode(map[string]any{"type": what, "object": object})
	}
	a.mu.Lock()
	stream := query.Get("sendInitialEvents") == "true"
	switch {
	case stream && a.noStream:
		a.mu.Unlock()
		answer(w, http.StatusUnprocessableEntity, metav1.StatusReasonInvalid)
		return
	case stream:
		all, revision := a.allLocked(resource), a.revision
		a.mu.Unlock()
		for _, o := range all {
			tell("ADDED", o)
		}
		from = revision
		tell("BOOKMARK", map[string]any{"kind": strings.TrimSuffix(listKinds[resource], "List"), "apiVersion": versionOf(resource), "metadata": map[string]any{
			"resourceVersion": strconv.Itoa(revision), "annotations": map[string]string{metav1.InitialEventsAnnotationKey: "true"}}})
	case from < a.oldest:
		a.mu.Unlock()
		tell("ERROR", metav1.Status{TypeMeta: metav1.TypeMeta{Kind: "Status", APIVersion: "v1"}, Status: metav1.StatusFailure, Code: http.StatusGone,
			Reason: metav1.StatusReasonExpired, Message: "too old resource version"})
		return
	default:
		a.mu.Unlock()
	}
	for {
		w.(http.Flusher).Flush()
		a.mu.Lock()
		changed, behaves := a.changed, a.behaves
		at, _ := slices.BinarySearchFunc(a.history, from+1, func(t told, revision int) int { return t.revision - revision })
		news := slices.Clone(a.history[at:])
		a.mu.Unlock()
		for _, n := range news {
			from = n.revision
			if kindOf(n.object) == resource {
				tell(n.what, n.object)
			}
		}
		if behaves == breaks {
			tell("ERROR", metav1.Status{TypeMeta: metav1.TypeMeta{Kind: "Status", APIVersion: "v1"}, Status: metav1.StatusFailure, Code: http.StatusInternalServerError,
				Reason: metav1.StatusReasonInternalError, Message: "etcd is away"})
			return
		}
		if len(news) > 0 {
			continue
		}
		select {
		case <-r.Context().Done():
			return
		case <-dropped:
			panic(http.ErrAbortHandler)
		case <-changed:
		}
	}
}

func answer(w http.ResponseWriter, code int, reason metav1.StatusReason) {
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(code)
	_ = json.NewEncoder(w).Encode(metav1.Status{TypeMeta: metav1.TypeMeta{Kind: "Status", APIVersion: "v1"}, Status: metav1.StatusFailure,
		Code: int32(code), Reason: reason, Message: fmt.Sprintf("it is %s", reason)})
}

// brisk makes a Source that does not wait long for anything.
func brisk(s *Source) {
	s.backoff, s.gap, s.quietFor, s.keepGap = 20*time.Millisecond, 5*time.Millisecond, time.Millisecond, time.Millisecond
	s.poster.gap = time.Millisecond
	for _, w := range s.watches {
		w.firstWord, w.silence, w.long, w.settle = 300*time.Millisecond, 2*time.Second, 300*time.Millisecond, 30*time.Millisecond
	}
}

// protobufOf reads an object in the API server's protobuf: a magic, and an envelope with the object in it.
func protobufOf(body []byte, into *corev1.Event) error {
	var envelope runtime.Unknown
	if err := envelope.Unmarshal(bytes.TrimPrefix(body, []byte("k8s\x00"))); err != nil {
		return err
	}
	return into.Unmarshal(envelope.Raw)
}
