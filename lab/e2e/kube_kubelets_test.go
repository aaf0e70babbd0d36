//go:build kube

package e2e

import (
	"cmp"
	"context"
	"fmt"
	"maps"
	"net/http"
	"net/netip"
	"path/filepath"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/ravel-lb/ravel/lab/cluster"
	labfleet "github.com/ravel-lb/ravel/lab/fleet"
	"github.com/ravel-lb/ravel/lab/stage"
)

// kubePodPort is where the cluster's pods answer: on their lab pods, beside what the stage runs there.
const kubePodPort = 8090

// podGrace is how long a pod goes on after it was told to end. It must be longer than directors and nodes take to send
// it nothing new, as it must in any cluster.
const podGrace = 4 * time.Second

// kubelets are scheduler and kubelets of the cluster in one: each pod that a controller makes gets one of the lab's pods on
// a node that takes pods, a process there that answers, and is Ready when it does. A pod that is deleted ends podGrace
// later: its process is killed, and the lab's pod is free again.
type kubelets struct {
	s *stage.Stage
	c *cluster.Cluster

	mu   sync.Mutex // guards the fields below
	pods map[string]*kubePod
	err  error // of the last step
}

// kubePod is a pod of the cluster that has a lab's pod.
type kubePod struct {
	place   stage.Pod
	process *labfleet.Process
	ready   bool
	ends    time.Time // when it is over; zero while it was not told to end
}

func startKubelets(s *stage.Stage, c *cluster.Cluster) *kubelets {
	k := &kubelets{s: s, c: c, pods: map[string]*kubePod{}}
	go func() { // until the tests end, as the fleet does
		for {
			err := k.step(context.Background())
			k.mu.Lock()
			k.err = err
			k.mu.Unlock()
			time.Sleep(150 * time.Millisecond)
		}
	}()
	return k
}

// podList is what there is to know of the cluster's pods.
type podList struct {
	Items []struct {
		Metadata struct {
			Name              string
			DeletionTimestamp *time.Time
		}
		Spec struct{ NodeName string }
	}
}

const kubePods = "/api/v1/namespaces/" + stage.Namespace + "/pods"

func (k *kubelets) step(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, 20*time.Second)
	defer cancel()
	var list podList
	if err := k.c.Call(ctx, http.MethodGet, kubePods, nil, &list); err != nil {
		return err
	}
	open, err := k.openNodes(ctx)
	if err != nil {
		return err
	}
	for _, p := range list.Items {
		name := p.Metadata.Name
		switch has := k.pod(name); {
		case p.Metadata.DeletionTimestamp != nil:
			err = k.end(ctx, name, has)
		case has == nil && p.Spec.NodeName == "":
			err = k.begin(ctx, name, open)
		}
		if err != nil {
			return fmt.Errorf("pod %s: %w", name, err)
		}
	}
	return nil
}

func (k *kubelets) pod(name string) *kubePod {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.pods[name]
}

// openNodes lists the nodes that take pods.
func (k *kubelets) openNodes(ctx context.Context) (names []string, err error) {
	var nodes struct {
		Items []struct {
			Metadata struct{ Name string }
			Spec     struct{ Unschedulable bool }
			Status   struct {
				Conditions []struct{ Type, Status string }
			}
		}
	}
	if err := k.c.Call(ctx, http.MethodGet, "/api/v1/nodes", nil, &nodes); err != nil {
		return nil, err
	}
	for _, n := range nodes.Items {
		ready := false
		for _, c := range n.Status.Conditions {
			ready = ready || c.Type == "Ready" && c.Status == "True"
		}
		if ready && !n.Spec.Unschedulable {
			names = append(names, n.Metadata.Name)
		}
	}
	return names, nil
}

// begin runs a pod on the node with the fewest. One that finds no place waits.
func (k *kubelets) begin(ctx context.Context, name string, open []string) error {
	k.mu.Lock()
	taken, onNode := map[stage.Pod]bool{}, map[string]int{}
	for _, p := range k.pods {
		taken[p.place] = true
		onNode[p.place.Node]++
	}
	k.mu.Unlock()
	free := slices.DeleteFunc(slices.Clone(k.s.Pods), func(p stage.Pod) bool { return taken[p] || !slices.Contains(open, p.Node) })
	if len(free) == 0 {
		return nil
	}
	place := slices.MinFunc(free, func(a, b stage.Pod) int {
		return cmp.Or(cmp.Compare(onNode[a.Node], onNode[b.Node]), cmp.Compare(a.String(), b.String()))
	})
	where, err := k.s.Fleet.Node(place.Node).Pod(place.Name)
	if err != nil {
		return err
	}
	process, err := where.Spawn("pod-"+place.String()+"-kube", filepath.Join("build", "traffic"), "pod", place.String(), fmt.Sprint(kubePodPort))
	if err != nil {
		return err
	}
	k.mu.Lock()
	k.pods[name] = &kubePod{place: place, process: process}
	k.mu.Unlock()
	if err := k.c.BindPod(ctx, stage.Namespace, name, place.Node); err != nil {
		return err
	}
	err = stage.Wait(ctx, func() error {
		conn, err := dialFrom(k.s, place.Node, 0, "tcp", netip.AddrPortFrom(place.V4, kubePodPort))
		if err == nil {
			err = conn.Close()
		}
		return err
	})
	if err == nil {
		err = k.c.RunPod(ctx, stage.Namespace, name, place.V4, place.V6)
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	k.pods[name].ready = err == nil
	return err
}

// end ends a pod that was told to.
func (k *kubelets) end(ctx context.Context, name string, p *kubePod) error {
	if p != nil {
		k.mu.Lock()
		if p.ends.IsZero() {
			p.ends, p.ready = time.Now().Add(podGrace), false
		}
		k.mu.Unlock()
		if time.Now().Before(p.ends) {
			return nil
		}
		if err := p.process.Kill(); err != nil {
			return err
		}
	}
	if err := k.c.EndPod(ctx, stage.Namespace, name, false); err != nil {
		return err
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	delete(k.pods, name)
	return nil
}

// ready counts the pods of each node that are Ready and were not told to end.
func (k *kubelets) ready() map[string]int {
	k.mu.Lock()
	defer k.mu.Unlock()
	count := map[string]int{}
	for _, p := range k.pods {
		if p.ready {
			count[p.place.Node]++
		}
	}
	return count
}

// names lists the cluster's pods on a node, or on all.
func (k *kubelets) names(node string) (names []string) {
	k.mu.Lock()
	defer k.mu.Unlock()
	for _, name := range slices.Sorted(maps.Keys(k.pods)) {
		if node == "" || k.pods[name].place.Node == node {
			names = append(names, name)
		}
	}
	return names
}

// settled waits until just n pods run, all Ready.
func (k *kubelets) settled(t *testing.T, n int) {
	t.Helper()
	eventually(t, 2*time.Minute, func() error {
		k.mu.Lock()
		defer k.mu.Unlock()
		ready := 0
		for _, p := range k.pods {
			if p.ready {
				ready++
			}
		}
		if ready != n || len(k.pods) != n || k.err != nil {
			return fmt.Errorf("%d pods, %d ready, want %d; %v", len(k.pods), ready, n, k.err)
		}
		return nil
	})
}
