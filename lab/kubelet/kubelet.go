// Package kubelet runs the pods of one namespace of a test's cluster on nodes of the lab, as scheduler, kubelets and
// container runtimes of a real one would: each container by runc, in its image's files, with exactly the rights that its
// pod says; volumes, probes, status, restarts and graceful ends as Kubernetes documents them, as far as the manifests of
// this repository use them. What it does not know it refuses, instead of leaving it out.
//
// Pods without hostNetwork are refused, but for those of Jobs, which get the network of their node: there is no pod
// network here.
package kubelet

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"net/http"
	"net/netip"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/types"

	"github.com/ravel-lb/ravel/lab/cluster"
	"github.com/ravel-lb/ravel/lab/fleet"
)

// Options say what runs where.
type Options struct {
	Cluster   *cluster.Cluster
	Namespace string
	// Node returns the lab's node of a name. All nodes see Dir, and the roots.
	Node func(name string) *fleet.Node
	// Dir takes the files of pods; it is there.
	Dir string
	// Roots are the unpacked root file systems of images, by the image's name and tag. They are not written to.
	Roots map[string]string
	// Entrypoint is the images' own, for containers that have arguments only.
	Entrypoint []string
	// HostPath is where a node has the directory of a hostPath volume; nil is the path itself.
	HostPath func(path string) string
	// APIServer is what pods are told of it (KUBERNETES_SERVICE_HOST and _PORT).
	APIServer netip.AddrPort
}

// Kubelets run pods. Its methods may be called by any goroutine.
type Kubelets struct {
	o    Options
	stop context.CancelFunc
	done sync.WaitGroup

	mu   sync.Mutex // guards the fields below
	pods map[types.UID]*pod
	err  error // of the last look
}

// Start begins to run pods, until Stop.
func Start(o Options) *Kubelets {
	ctx, cancel := context.WithCancel(context.Background())
	k := &Kubelets{o: o, stop: cancel, pods: map[types.UID]*pod{}}
	if k.o.HostPath == nil {
		k.o.HostPath = func(path string) string { return path }
	}
	k.done.Go(func() {
		for {
			err := k.look(ctx)
			k.mu.Lock()
			k.err = err
			k.mu.Unlock()
			select {
			case <-ctx.Done():
				return
			case <-time.After(200 * time.Millisecond):
			}
		}
	})
	return k
}

// Stop ends all pods, at once, and says nothing of it to the API server.
func (k *Kubelets) Stop() {
	k.stop()
	k.done.Wait()
}

// look asks for the pods, and begins and ends those that are to.
func (k *Kubelets) look(ctx context.Context) error {
	ask, cancel := context.WithTimeout(ctx, 20*time.Second)
	defer cancel()
	var list corev1.PodList
	if err := k.o.Cluster.Call(ask, http.MethodGet, k.path("pods"), nil, &list); err != nil {
		return err
	}
	var errs []error
	there := map[types.UID]bool{}
	for i := range list.Items {
		p := &list.Items[i]
		there[p.UID] = true
		if err := k.see(ctx, ask, p); err != nil {
			errs = append(errs, fmt.Errorf("pod %s: %w", p.Name, err))
		}
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	for uid, p := range k.pods {
		if !there[uid] {
			p.end(0) // deleted by force
			if p.over() {
				delete(k.pods, uid)
			}
		}
	}
	return errors.Join(errs...)
}

func (k *Kubelets) see(ctx, ask context.Context, p *corev1.Pod) error {
	k.mu.Lock()
	has := k.pods[p.UID]
	k.mu.Unlock()
	switch {
	case p.DeletionTimestamp != nil:
		if has != nil {
			has.end(time.Duration(*p.DeletionGracePeriodSeconds) * time.Second)
			if !has.over() {
				return nil
			}
		}
		return k.o.Cluster.EndPod(ask, p.Namespace, p.Name, false)
	case has != nil:
		return nil
	case p.Status.Phase == corev1.PodSucceeded || p.Status.Phase == corev1.PodFailed:
		return nil
	case p.Spec.NodeName == "":
		node, err := k.place(ask, p)
		if err != nil || node == "" {
			return err
		}
		return k.o.Cluster.BindPod(ask, p.Namespace, p.Name, node)
	}
	var node corev1.Node
	if err := k.o.Cluster.Call(ask, http.MethodGet, "/api/v1/nodes/"+p.Spec.NodeName, nil, &node); err != nil {
		return err
	}
	has = newPod(k.o, p, &node)
	k.mu.Lock()
	k.pods[p.UID] = has
	k.mu.Unlock()
	k.done.Go(func() { has.run(ctx) })
	return nil
}

// place chooses the node of a pod: the one that its DaemonSet made it for, or the one with the fewest pods of those that
// fit. None is not yet.
func (k *Kubelets) place(ctx context.Context, p *corev1.Pod) (string, error) {
	var nodes corev1.NodeList
	if err := k.o.Cluster.Call(ctx, http.MethodGet, "/api/v1/nodes", nil, &nodes); err != nil {
		return "", err
	}
	owner := ""
	for _, o := range p.OwnerReferences {
		owner = string(o.UID)
	}
	count, beside := map[string]int{}, map[string]bool{}
	k.mu.Lock()
	for _, other := range k.pods {
		count[other.spec.Spec.NodeName]++
		for _, o := range other.spec.OwnerReferences {
			if string(o.UID) == owner && !other.over() {
				beside[other.spec.Spec.NodeName] = true
			}
		}
	}
	k.mu.Unlock()
	var fit []string
	for _, n := range nodes.Items {
		if k.o.Node(n.Name) != nil && fits(p, &n) && !(apart(p) && beside[n.Name]) {
			fit = append(fit, n.Name)
		}
	}
	if len(fit) == 0 {
		return "", nil
	}
	return slices.MinFunc(fit, func(a, b string) int { return cmp.Or(cmp.Compare(count[a], count[b]), cmp.Compare(a, b)) }), nil
}

// apart reports whether a pod must not share a node with its like.
func apart(p *corev1.Pod) bool {
	a := p.Spec.Affinity
	return a != nil && a.PodAntiAffinity != nil && len(a.PodAntiAffinity.RequiredDuringSchedulingIgnoredDuringExecution) > 0
}

// fits reports whether a pod may be on a node: its selector, and the node affinity that it requires.
func fits(p *corev1.Pod, n *corev1.Node) bool {
	for key, value := range p.Spec.NodeSelector {
		if have, ok := n.Labels[key]; !ok || have != value {
			return false
		}
	}
	a := p.Spec.Affinity
	if a == nil || a.NodeAffinity == nil || a.NodeAffinity.RequiredDuringSchedulingIgnoredDuringExecution == nil {
		return true
	}
	return slices.ContainsFunc(a.NodeAffinity.RequiredDuringSchedulingIgnoredDuringExecution.NodeSelectorTerms, func(t corev1.NodeSelectorTerm) bool {
		for _, r := range t.MatchFields {
			if r.Key != "metadata.name" || r.Operator != corev1.NodeSelectorOpIn || !slices.Contains(r.Values, n.Name) {
				return false
			}
		}
		for _, r := range t.MatchExpressions {
			value, has := n.Labels[r.Key]
			ok := map[corev1.NodeSelectorOperator]bool{
				corev1.NodeSelectorOpExists: has, corev1.NodeSelectorOpDoesNotExist: !has,
				corev1.NodeSelectorOpIn: has && slices.Contains(r.Values, value), corev1.NodeSelectorOpNotIn: !has || !slices.Contains(r.Values, value),
			}[r.Operator]
			if !ok {
				return false
			}
		}
		return true
	})
}

func (k *Kubelets) path(kind string) string {
	return "/api/v1/namespaces/" + k.o.Namespace + "/" + kind
}

// Err is what went wrong at the last look for pods: nil while all is well.
func (k *Kubelets) Err() error {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.err
}

// Container returns the name by which runc on the node knows the newest run of a container, and false where none runs.
func (k *Kubelets) Container(node, owner, container string) (id string, ok bool) {
	k.mu.Lock()
	defer k.mu.Unlock()
	for _, p := range k.pods {
		if p.spec.Spec.NodeName == node && strings.HasPrefix(p.spec.Name, owner) && !p.over() {
			if id := p.running(container); id != "" {
				return id, true
			}
		}
	}
	return "", false
}

// dir is where a pod's files are.
func (o Options) dir(p *corev1.Pod) string { return filepath.Join(o.Dir, "pods", string(p.UID)) }
