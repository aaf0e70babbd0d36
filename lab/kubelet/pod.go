package kubelet

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/ravel-lb/ravel/lab/fleet"
)

// pod is one pod on its node.
type pod struct {
	o     Options
	spec  *corev1.Pod
	node  *corev1.Node
	place *fleet.Node
	since time.Time
	vols  *volumes

	ending context.Context // ends when the pod is told to
	tell   func(grace time.Duration)
	gone   chan struct{} // closed when nothing of it runs any more

	mu         sync.Mutex // guards the fields below
	grace      time.Duration
	told       bool
	containers map[string]*run // the newest run of each
	status     map[string]corev1.ContainerStatus
	phase      corev1.PodPhase
	readySince time.Time
}

func newPod(o Options, spec *corev1.Pod, node *corev1.Node) *pod {
	p := &pod{
		o: o, spec: spec, node: node, place: o.Node(node.Name), since: time.Now(), gone: make(chan struct{}),
		containers: map[string]*run{}, status: map[string]corev1.ContainerStatus{}, phase: corev1.PodPending,
	}
	ctx, cancel := context.WithCancel(context.Background())
	p.ending = ctx
	p.tell = func(grace time.Duration) {
		p.mu.Lock()
		defer p.mu.Unlock()
		if !p.told {
			p.told, p.grace = true, grace
			cancel()
		}
	}
	return p
}

// end tells the pod to end: SIGTERM, and SIGKILL when grace is over.
func (p *pod) end(grace time.Duration) { p.tell(grace) }

// over reports whether nothing of it runs any more.
func (p *pod) over() bool {
	select {
	case <-p.gone:
		return true
	default:
		return false
	}
}

func (p *pod) running(container string) string {
	p.mu.Lock()
	defer p.mu.Unlock()
	if r := p.containers[container]; r != nil && r.runs() {
		return r.id
	}
	return ""
}

// run is the life of the pod, until it is told to end, or the kubelets stop.
func (p *pod) run(ctx context.Context) {
	defer close(p.gone)
	life, cancel := context.WithCancel(p.ending)
	defer cancel()
	defer context.AfterFunc(ctx, cancel)()
	var work sync.WaitGroup
	defer work.Wait()
	defer p.killAll()
	defer cancel()
	for !p.begin(life, &work) {
		if !wait(life, time.Second) {
			return
		}
	}
	if p.phase != corev1.PodRunning { // a Job's that ended
		<-life.Done()
		return
	}
	<-life.Done()
	if ctx.Err() == nil {
		p.terminate(ctx)
	}
}

// begin makes the volumes, runs the init containers and starts the others. It is called again when it could not.
func (p *pod) begin(ctx context.Context, work *sync.WaitGroup) bool {
	var err error
	if p.vols == nil {
		if err = p.refusals(); err == nil {
			p.vols, err = p.makeVolumes(ctx)
		}
		if err != nil {
			p.vols = nil
			p.waiting("CreateContainerConfigError", err.Error())
			return false
		}
		work.Go(func() { p.vols.follow(ctx) })
	}
	for i := range p.spec.Spec.InitContainers {
		c := &p.spec.Spec.InitContainers[i]
		if s, was := p.statusOf(c.Name); was && s.State.Terminated != nil && s.State.Terminated.ExitCode == 0 {
			continue
		}
		r, err := p.start(ctx, c)
		if err == nil {
			err = r.wait(ctx)
		}
		if err != nil {
			if ctx.Err() == nil {
				p.restarted(c.Name, "CrashLoopBackOff", err.Error())
			}
			return false
		}
		p.terminated(c.Name, 0)
	}
	if p.spec.Spec.RestartPolicy != corev1.RestartPolicyAlways {
		return p.runOnce(ctx)
	}
	for i := range p.spec.Spec.Containers {
		c := &p.spec.Spec.Containers[i]
		work.Go(func() { p.keep(ctx, c, work) })
	}
	p.setPhase(corev1.PodRunning)
	return true
}

// runOnce runs the containers of a Job's pod to their end.
func (p *pod) runOnce(ctx context.Context) bool {
	p.setPhase(corev1.PodRunning)
	for i := range p.spec.Spec.Containers {
		c := &p.spec.Spec.Containers[i]
		r, err := p.start(ctx, c)
		if err == nil {
			err = r.wait(ctx)
		}
		if err != nil {
			if ctx.Err() == nil && p.spec.Spec.RestartPolicy == corev1.RestartPolicyNever {
				p.terminated(c.Name, 1)
				p.setPhase(corev1.PodFailed)
				return true
			}
			p.restarted(c.Name, "CrashLoopBackOff", err.Error())
			return false
		}
		p.terminated(c.Name, 0)
	}
	p.setPhase(corev1.PodSucceeded)
	return true
}

// keep runs a container, and again when it ends, until ctx does.
func (p *pod) keep(ctx context.Context, c *corev1.Container, work *sync.WaitGroup) {
	for ctx.Err() == nil {
		r, err := p.start(ctx, c)
		if err == nil {
			probing, stop := context.WithCancel(ctx)
			p.started(c.Name)
			work.Go(func() { p.probe(probing, c, r) })
			err = r.wait(ctx)
			stop()
		}
		if ctx.Err() != nil {
			return
		}
		text := "it exited with 0"
		if err != nil {
			text = err.Error()
		}
		p.restarted(c.Name, "CrashLoopBackOff", text)
		wait(ctx, time.Second)
	}
}

// start begins a run of a container.
func (p *pod) start(ctx context.Context, c *corev1.Container) (*run, error) {
	s, _ := p.statusOf(c.Name)
	r, err := p.newRun(ctx, c, s.RestartCount)
	if err != nil {
		return nil, err
	}
	p.mu.Lock()
	p.containers[c.Name] = r
	p.mu.Unlock()
	return r, nil
}

// terminate asks all containers to end, and kills those that do not.
func (p *pod) terminate(ctx context.Context) {
	p.mu.Lock()
	grace := p.grace
	runs := make([]*run, 0, len(p.containers))
	for _, r := range p.containers {
		runs = append(runs, r)
	}
	p.mu.Unlock()
	for _, r := range runs {
		r.signal(syscall.SIGTERM)
	}
	over := time.After(grace)
	for _, r := range runs {
		select {
		case <-r.process.Done():
		case <-over:
			return
		case <-ctx.Done():
			return
		}
	}
}

// killAll ends what still runs, and takes its files away.
func (p *pod) killAll() {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, r := range p.containers {
		r.kill()
	}
	_ = os.RemoveAll(filepath.Join(p.o.dir(p.spec), "bundles"))
}

// wait waits for d, and reports false when ctx ends before.
func wait(ctx context.Context, d time.Duration) bool {
	select {
	case <-ctx.Done():
		return false
	case <-time.After(d):
		return true
	}
}

// refusals names what the pod asks for that is not known here.
func (p *pod) refusals() error {
	s := &p.spec.Spec
	job := slices.ContainsFunc(p.spec.OwnerReferences, func(o metav1.OwnerReference) bool { return o.Kind == "Job" })
	var errs []error
	refuse := func(is bool, what string) {
		if is {
			errs = append(errs, errors.New(what+" is not known here"))
		}
	}
	refuse(!s.HostNetwork && !job, "a pod's own network")
	refuse(s.HostPID || s.HostIPC || s.ShareProcessNamespace != nil, "processes that are shared")
	refuse(len(s.EphemeralContainers) > 0, "an ephemeral container")
	for _, c := range slices.Concat(s.InitContainers, s.Containers) {
		refuse(c.RestartPolicy != nil, "a sidecar")
		refuse(c.Lifecycle != nil, "a lifecycle hook")
		refuse(len(c.EnvFrom) > 0, "envFrom")
	}
	return errors.Join(errs...)
}

func (p *pod) statusOf(container string) (corev1.ContainerStatus, bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	s, was := p.status[container]
	return s, was
}

func (p *pod) change(container string, change func(*corev1.ContainerStatus)) {
	p.mu.Lock()
	s := p.status[container]
	s.Name = container
	change(&s)
	p.status[container] = s
	p.mu.Unlock()
	p.post()
}

func (p *pod) started(container string) {
	p.change(container, func(s *corev1.ContainerStatus) {
		s.State = corev1.ContainerState{Running: &corev1.ContainerStateRunning{StartedAt: metav1.Now()}}
		s.Ready = false
	})
}

func (p *pod) ready(container string, is bool) {
	if s, _ := p.statusOf(container); s.Ready != is {
		p.change(container, func(s *corev1.ContainerStatus) { s.Ready = is })
	}
}

func (p *pod) terminated(container string, code int32) {
	p.change(container, func(s *corev1.ContainerStatus) {
		s.State = corev1.ContainerState{Terminated: &corev1.ContainerStateTerminated{ExitCode: code, FinishedAt: metav1.Now()}}
		s.Ready = code == 0
	})
}

func (p *pod) restarted(container, reason, message string) {
	p.change(container, func(s *corev1.ContainerStatus) {
		s.State = corev1.ContainerState{Waiting: &corev1.ContainerStateWaiting{Reason: reason, Message: message}}
		s.Ready = false
		s.RestartCount++
	})
}

// waiting says of all containers why they do not start.
func (p *pod) waiting(reason, message string) {
	for _, c := range p.spec.Spec.Containers {
		p.change(c.Name, func(s *corev1.ContainerStatus) {
			s.State = corev1.ContainerState{Waiting: &corev1.ContainerStateWaiting{Reason: reason, Message: message}}
		})
	}
}

func (p *pod) setPhase(phase corev1.PodPhase) {
	p.mu.Lock()
	p.phase = phase
	p.mu.Unlock()
	p.post()
}

// post tells the API server. What cannot be told is told with the next change.
func (p *pod) post() {
	p.mu.Lock()
	ready := p.phase == corev1.PodRunning
	status := corev1.PodStatus{Phase: p.phase, HostIP: p.hostIP(), PodIP: p.hostIP(), PodIPs: []corev1.PodIP{{IP: p.hostIP()}}}
	start := metav1.NewTime(p.since)
	status.StartTime = &start
	list := func(containers []corev1.Container, main bool) (all []corev1.ContainerStatus) {
		for _, c := range containers {
			s := p.status[c.Name]
			s.Name, s.Image = c.Name, c.Image
			ready = ready && (!main || s.Ready)
			all = append(all, s)
		}
		return all
	}
	status.InitContainerStatuses = list(p.spec.Spec.InitContainers, false)
	status.ContainerStatuses = list(p.spec.Spec.Containers, true)
	switch {
	case !ready:
		p.readySince = time.Time{}
	case p.readySince.IsZero():
		p.readySince = time.Now()
	}
	is := corev1.ConditionFalse
	at := metav1.Now()
	if ready {
		is, at = corev1.ConditionTrue, metav1.NewTime(p.readySince)
	}
	status.Conditions = []corev1.PodCondition{
		{Type: corev1.PodScheduled, Status: corev1.ConditionTrue, LastTransitionTime: start},
		{Type: corev1.ContainersReady, Status: is, LastTransitionTime: at},
		{Type: corev1.PodReady, Status: is, LastTransitionTime: at},
	}
	p.mu.Unlock()
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
	defer cancel()
	path := "/api/v1/namespaces/" + p.spec.Namespace + "/pods/" + p.spec.Name + "/status"
	_ = p.o.Cluster.Call(ctx, http.MethodPatch, path, map[string]any{"status": status}, nil)
}

// hostIP is the first address of the node.
func (p *pod) hostIP() string {
	for _, a := range p.node.Status.Addresses {
		if a.Type == corev1.NodeInternalIP {
			return a.Address
		}
	}
	return ""
}

// env is the environment of a container.
func (p *pod) env(c *corev1.Container) ([]string, error) {
	env := []string{"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "HOME=/root", "HOSTNAME=" + p.node.Name}
	if p.o.APIServer.IsValid() {
		env = append(env, "KUBERNETES_SERVICE_HOST="+p.o.APIServer.Addr().String(), fmt.Sprint("KUBERNETES_SERVICE_PORT=", p.o.APIServer.Port()))
	}
	fields := map[string]string{
		"spec.nodeName": p.node.Name, "status.hostIP": p.hostIP(), "status.podIP": p.hostIP(),
		"metadata.name": p.spec.Name, "metadata.namespace": p.spec.Namespace,
	}
	for _, e := range c.Env {
		value := e.Value
		if e.ValueFrom != nil {
			ref := e.ValueFrom.FieldRef
			if ref == nil {
				return nil, fmt.Errorf("variable %s: its source is not known here", e.Name)
			}
			known := false
			if value, known = fields[ref.FieldPath]; !known {
				return nil, fmt.Errorf("variable %s: field %s is not known here", e.Name, ref.FieldPath)
			}
		}
		env = append(env, e.Name+"="+value)
	}
	return env, nil
}

// expand replaces $(NAME) in arguments, as Kubernetes does.
func expand(words, env []string) []string {
	var pairs []string
	for _, e := range env {
		name, value, _ := strings.Cut(e, "=")
		pairs = append(pairs, "$("+name+")", value)
	}
	replacer := strings.NewReplacer(pairs...)
	out := make([]string, len(words))
	for i, w := range words {
		out[i] = replacer.Replace(w)
	}
	return out
}
