package main

import (
	"context"
	"fmt"
	"path/filepath"
	"strings"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/urfave/cli/v2"
	"golang.org/x/sync/errgroup"

	"github.com/ravel-lb/ravel"
	"github.com/ravel-lb/ravel/internal/config"
	"github.com/ravel-lb/ravel/internal/hold"
	"github.com/ravel-lb/ravel/internal/kube"
)

// kubeFlags say which cluster a process follows where there is no static file.
func kubeFlags() []cli.Flag {
	return []cli.Flag{
		stringFlag("kubeconfig", "", "with --config-name: the kubeconfig of the cluster to follow; empty is that of this pod"),
		stringFlag("config-namespace", "", "the namespace of the ConfigMap with the cluster document"),
		stringFlag("config-name", "", "the ConfigMap with the cluster document; set instead of --static, to follow a Kubernetes cluster"),
		stringFlag("config-key", "", "the key of the cluster document in the ConfigMap"),
		stringFlag("fleet-key", "", "the key of the fleet document in the ConfigMap; this or --fleet-file"),
		stringFlag("fleet-file", "", "the file of the fleet document, beside --config-name; this or --fleet-key"),
		durationFlag("max-cache-age", 24*time.Hour, "how old what is kept of the API server may be for a start without it"),
		durationFlag("kube-wait", 5*time.Second, "how long a start waits for the API server before it takes what is kept"),
	}
}

// kubeValues are the checked values of them.
type kubeValues struct {
	kubeconfig                string
	namespace, name, key      string
	fleetKey, fleetFile       string
	maxCacheAge, wait         time.Duration
	ignoreCordon, postsEvents bool
}

// kube reads them, and returns nil where a static file is followed.
func (f *faults) kube(c *cli.Context, s values, director bool) *kubeValues {
	k := kubeValues{
		kubeconfig: c.String("kubeconfig"), namespace: c.String("config-namespace"), name: c.String("config-name"),
		key: c.String("config-key"), fleetKey: c.String("fleet-key"), fleetFile: c.String("fleet-file"),
		ignoreCordon: c.Bool("ipvs-ignore-node-cordon"), postsEvents: director,
	}
	switch {
	case s.static == "" && k.name == "":
		f.add("static", "not set: nothing says what to balance; set it, or --config-name to follow a Kubernetes cluster")
		return nil
	case k.name == "":
		return nil
	case s.static != "":
		f.add("config-name", "set beside --static: the documents come from one of them")
		return nil
	}
	if k.namespace == "" {
		f.add("config-namespace", "not set: --config-name needs it")
	}
	if k.key == "" {
		f.add("config-key", "not set: --config-name needs it")
	}
	switch {
	case k.fleetKey == "" && k.fleetFile == "":
		f.add("fleet-file", "not set, and neither is --fleet-key: nothing says who the directors and routers are")
	case k.fleetKey != "" && k.fleetFile != "":
		f.add("fleet-key", "set beside --fleet-file: the fleet document comes from one of them")
	case k.fleetKey == k.key && k.key != "":
		f.add("fleet-key", "%q is that of the cluster document: want a key of its own", k.fleetKey)
	}
	k.maxCacheAge = f.duration(c, "max-cache-age", time.Second)
	k.wait = f.duration(c, "kube-wait", 100*time.Millisecond)
	return &k
}

// namespaced reads the flag of a command that names an object of a cluster as namespace/name, and makes a client for it.
func namespaced(c *cli.Context, flag string) (client *kube.Client, namespace, name string, err error) {
	text := c.String(flag)
	namespace, name, found := strings.Cut(text, "/")
	if !found || namespace == "" || name == "" || strings.Contains(name, "/") {
		return nil, "", "", usageError{fmt.Errorf("--%s: %q: want namespace/name", flag, text)}
	}
	client, err = kube.NewClient(c.String("kubeconfig"), buildInfo().Version)
	return client, namespace, name, err
}

// follow makes what follows the documents: a static file; or a cluster, and the fleet document's file if it has one.
func (p *process) follow() error {
	s, k := p.settings, p.settings.kube
	var registry prometheus.Registerer
	if p.registry != nil {
		registry = p.registry
	}
	if k == nil {
		p.file = config.NewFile(s.static, s.log, registry)
		p.file.Keep = lastGood(s.stateDir, p.role)
		p.file.Default = s.defaultService
		return nil
	}
	client, err := kube.NewClient(k.kubeconfig, buildInfo().Version)
	if err != nil {
		return err
	}
	o := kube.Options{
		Log: s.log, Registerer: registry, Client: client, Namespace: k.namespace, Name: k.name, Key: k.key, FleetKey: k.fleetKey,
		Default: s.defaultService, IgnoreCordon: k.ignoreCordon, Events: k.postsEvents, MaxCacheAge: k.maxCacheAge, StartWait: k.wait,
	}
	o.Cache = lastCluster(s.stateDir, p.role)
	p.cluster = kube.New(o)
	if k.fleetFile != "" {
		p.file = config.NewFleetFile(k.fleetFile, s.log, registry)
		p.file.Keep = lastGoodFleet(s.stateDir, p.role)
	}
	return o.Check()
}

// lastGoodFleet is the file in which a role that follows a cluster keeps the last good fleet document's file, or nothing
// where none is to be kept.
func lastGoodFleet(stateDir string, role ravel.Role) string {
	if stateDir == "" {
		return ""
	}
	return filepath.Join(stateDir, "last-good-fleet-"+role.String()+".yaml")
}

// lastCluster is the file in which it keeps what the cluster last told, likewise.
func lastCluster(stateDir string, role ravel.Role) string {
	if stateDir == "" {
		return ""
	}
	return filepath.Join(stateDir, "cluster-"+role.String()+".json")
}

// runDocuments follows them until ctx ends.
func (p *process) runDocuments(ctx context.Context) error {
	group, ctx := errgroup.WithContext(ctx)
	if p.file != nil {
		group.Go(func() error { return p.file.Run(ctx) })
	}
	if p.cluster != nil {
		group.Go(func() error { return p.cluster.Run(ctx) })
	}
	return group.Wait()
}

// documentsChanged are channels that are closed when there is something new; one that never is, is nil.
func (p *process) documentsChanged() (file, cluster <-chan struct{}) {
	if p.file != nil {
		file = p.file.Changed()
	}
	if p.cluster != nil {
		cluster = p.cluster.Changed()
	}
	return file, cluster
}

// documents are the newest good ones, and false while they are not all known.
func (p *process) documents() (hold.Documents, bool) {
	var file config.Static
	if p.file != nil {
		var known bool
		if file, known = p.file.Latest(); !known {
			return hold.Documents{}, false
		}
	}
	if p.cluster == nil {
		return hold.Documents{Cluster: file.Cluster, Fleet: file.Fleet}, true
	}
	v, known := p.cluster.Latest()
	if !known {
		return hold.Documents{}, false
	}
	d := hold.Documents{Cluster: v.Cluster, Fleet: file.Fleet, Reported: true, Also: v.Also}
	if v.Fleet != nil {
		d.Fleet = *v.Fleet
	}
	return d, true
}

// source tells whether what the documents come from answers, as ravel.Report has it, and whether they are what an earlier
// process kept. A file is always there.
func (p *process) source() (unheard uint64, earlier bool) {
	if p.cluster == nil {
		return 0, false
	}
	v, known := p.cluster.Latest()
	if known && (v.Cached || !p.cluster.Heard(time.Now())) {
		unheard = max(1, v.Revision)
	}
	return unheard, known && v.Cached
}

// documentProblems are what is wrong with where the documents come from.
func (p *process) documentProblems() []ravel.Problem {
	var problems []ravel.Problem
	if p.cluster != nil {
		problems = append(problems, p.cluster.Status().Problems...)
	}
	if p.file != nil {
		if err := p.file.Status().KeepFault; err != nil {
			problems = append(problems, ravel.Problem{
				Where: "--state-dir", What: err.Error() + "; a start at which the file is bad would know nothing",
				Fix: "make " + p.settings.stateDir + " writable, or set --state-dir to what is; an empty one keeps nothing",
			})
		}
	}
	return problems
}
