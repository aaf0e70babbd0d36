package kube

import (
	"context"
	"runtime"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	"k8s.io/apimachinery/pkg/runtime/schema"
)

func gvk(resource string) schema.GroupVersionKind {
	kind := strings.TrimSuffix(listKinds[resource], "List")
	if resource == kindSlices {
		return discoveryv1.SchemeGroupVersion.WithKind(kind)
	}
	return corev1.SchemeGroupVersion.WithKind(kind)
}

func has(part string) func(Value) bool {
	return func(v Value) bool { return strings.Contains(text(v), part) }
}

// Whatever the API server does, the last value stays, and what changed meanwhile comes when it is back.
func TestAPIServerLost(t *testing.T) {
	for _, test := range []struct {
		name     string
		behaves  behaviour
		fault    string // of which Status tells; empty where it need not
		forgets  bool
		noStream bool
	}{
		{name: "answers 500", behaves: fails, fault: "it is InternalError"},
		{name: "answers 500, and forgets what was", behaves: fails, fault: "it is InternalError", forgets: true},
		{name: "forbids", behaves: forbids, fault: "it is Forbidden"},
		{name: "closes connections", behaves: closes, fault: "API server"},
		{name: "closes connections, and forgets what was", behaves: closes, fault: "API server", forgets: true},
		{name: "closes connections, an older one", behaves: closes, fault: "API server", forgets: true, noStream: true},
		{name: "hangs", behaves: hangs, fault: "the API server does not answer"},
		{name: "hangs, an older one", behaves: hangs, fault: "the API server does not answer", noStream: true},
		{name: "breaks watches", behaves: breaks},
		{name: "throttles", behaves: throttles, fault: "it is TooManyRequests"},
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			api := newAPIServer(t, webMap, nodeOf("n1", "10.0.0.1"), serviceOf("shop", "web"), sliceOf("shop", "web", "s", "10.1.0.1@n1"))
			api.noStream = test.noStream
			s := source(t, Options{Client: api.client(t)}, brisk)
			first := waitFor(t, s, "the first", has("10.1.0.1:8080@n1 ready"))
			opened(t, s)
			if p := s.Status().Problems; len(p) > 0 {
				t.Errorf("problems before: %v", p)
			}

			api.behave(test.behaves)
			if test.fault != "" {
				until(t, "the loss is told", func() bool {
					p := s.Status().Problems
					return len(p) > 0 && p[0].Where == "API server" && strings.Contains(p[0].String(), test.fault)
				})
				if age := s.Status().Age; age <= 0 || age > time.Minute {
					t.Errorf("age %s while the API server is lost", age)
				}
			}
			api.set(sliceOf("shop", "web", "s", "10.1.0.2@n1"))
			api.remove(nodeOf("n1"))
			api.set(nodeOf("n2", "10.0.0.2"))
			if test.forgets {
				api.forget()
			}
			if test.behaves != breaks {
				if v, _ := s.Latest(); text(v) != text(first) {
					t.Errorf("while the API server is lost:\n%s", text(v))
				}
			}
			api.behave(good)
			v := waitFor(t, s, "what changed meanwhile", func(v Value) bool { return has("10.1.0.2:8080")(v) && has("node n2")(v) && !has("node n1")(v) })
			if v.Cached || v.Revision < first.Revision {
				t.Errorf("cached %v, revision %d after %d", v.Cached, v.Revision, first.Revision)
			}
			opened(t, s)
			if p := s.Status().Problems; len(p) > 0 {
				t.Errorf("problems after: %v", p)
			}
			if age := s.Status().Age; age != 0 {
				t.Errorf("age %s while all watches are open", age)
			}
		})
	}
}

// A history that the API server has forgotten makes the reflector list again, and that is no loss.
func TestGone(t *testing.T) {
	api := newAPIServer(t, webMap, nodeOf("n1", "10.0.0.1"), serviceOf("shop", "web"), sliceOf("shop", "web", "s", "10.1.0.1@n1"))
	s := source(t, Options{Client: api.client(t)}, brisk)
	waitFor(t, s, "the first", has("10.1.0.1:8080"))
	opened(t, s)
	for i := range 5 {
		api.forget()
		api.CloseClientConnections()
		at := "10.1.0." + string(rune('2'+i))
		api.set(sliceOf("shop", "web", "s", at+"@n1"))
		waitFor(t, s, "what came after "+at, has(at))
	}
}

// Nothing is published before everything is told: an API server that tells all but one kind makes no value.
func TestNothingBeforeAll(t *testing.T) {
	api := newAPIServer(t, webMap, nodeOf("n1", "10.0.0.1"), serviceOf("shop", "web"), sliceOf("shop", "web", "s", "10.1.0.1@n1"))
	for _, kind := range []string{kindNodes, kindServices, kindSlices, kindConfigMaps} {
		api.mu.Lock()
		api.mute = kind
		api.mu.Unlock()
		s := source(t, Options{Client: api.client(t), StartWait: 20 * time.Millisecond}, brisk)
		until(t, "all others are told", func() bool {
			n := 0
			for _, r := range s.Status().Resources {
				if r.Synced {
					n++
				}
			}
			return n == 3
		})
		until(t, "it is told what is missing", func() bool {
			p := s.Status().Problems
			return len(p) == 1 && strings.Contains(p[0].String(), kind) && strings.Contains(p[0].String(), "nothing is known yet")
		})
		if v, known := s.Latest(); known {
			t.Errorf("without %s there is a value:\n%s", kind, text(v))
		}
	}
}

// What Run began has ended when it returns, whatever the API server does.
func TestEndsInAnyState(t *testing.T) {
	for _, b := range []behaviour{good, fails, closes, hangs, breaks, throttles} {
		api := newAPIServer(t, webMap, nodeOf("n1", "10.0.0.1"), serviceOf("shop", "web"), sliceOf("shop", "web", "s", "10.1.0.1@n1"))
		client := api.client(t)
		before := runtime.NumGoroutine()
		{
			s := New(Options{Client: client, Namespace: "lb", Name: "ravel", Key: "cluster.json", Events: true, Cache: t.TempDir() + "/cache"})
			ctx, cancel := context.WithCancel(context.Background())
			done := make(chan struct{})
			go func() { defer close(done); _ = s.Run(ctx) }()
			waitFor(t, s, "the first", func(Value) bool { return true })
			asked := api.asked()
			api.behave(b)
			if b != good {
				until(t, "it was asked again", func() bool { return api.asked() > asked })
			}
			started := time.Now()
			cancel()
			<-done
			if took := time.Since(started); took > 10*time.Second {
				t.Errorf("behaviour %d: Run took %s to end", b, took)
			}
			api.behave(good)
		}
		api.CloseClientConnections()
		until(t, "no goroutine is left", func() bool { return runtime.NumGoroutine() <= before+8 })
	}
}
