// Package cluster runs the control plane of a Kubernetes cluster for tests: etcd, kube-apiserver and the few controllers
// that are wanted, as lab/kube builds them, on an address of this machine or of a node of the fleet. There are no
// kubelets: who runs tests says what nodes and pods there are.
//
// What it starts ends with Stop, and with this process however that ends. Files are left in its directory only.
package cluster

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net/http"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"
)

// Options say how a cluster runs. The zero value of all but Binary is a default.
type Options struct {
	// Binary is the program that lab/kube/build built; see Build.
	Binary string
	// Addr is where the API server listens, and the address that its certificate and the kubeconfigs name: 127.0.0.1.
	Addr netip.Addr
	// Port is the API server's, a free one if 0. Choose one below net.ipv4.ip_local_port_range: of a client on the same
	// host that tries again and again while the server is down, it might become the own port.
	Port uint16
	// EtcdPort is etcd's, on 127.0.0.1; like Port if 0.
	EtcdPort uint16
	// ServiceCIDRs are what cluster IPs are taken from, the first family first: 10.96.0.0/16 and fd00:10:96::/112.
	ServiceCIDRs []netip.Prefix
	// Controllers are those of kube-controller-manager that run: DefaultControllers if nil. With none it does not run.
	Controllers []string
	// APIServerFlags follow those that the cluster gives kube-apiserver.
	APIServerFlags []string
	// Place is where the cluster runs if not in this process's namespaces: a *fleet.Node. Its end is the cluster's end,
	// and it must see dir and Binary.
	Place Place
	// Deadline is how long a start may take until the cluster is ready: 5 min.
	Deadline time.Duration
}

// Place runs fn on a thread that is in the place: sockets that fn opens, and processes that it starts, belong to it.
type Place interface{ Do(fn func() error) error }

// here is the place of this process.
type here struct{}

func (here) Do(fn func() error) error { return fn() }

// DefaultControllers make EndpointSlices of Services and Pods, Pods of Deployments, and take away what a deleted object
// owned.
var DefaultControllers = []string{
	"endpointslice-controller", "deployment-controller", "replicaset-controller", "garbage-collector-controller", "namespace-controller",
}

// TokenController fills in Secrets with the token of a ServiceAccount; Options.Controllers may have it, too.
const TokenController = "serviceaccount-token-controller"

// Cluster is a running control plane. Its methods may be called by any goroutine, but those that start and stop
// something only one at a time.
type Cluster struct {
	dir  string
	opts Options
	ca   *authority

	admin  string // kubeconfig
	client *http.Client

	etcd, server, manager *process // nil when not running
}

// Start starts a cluster that keeps its data, certificates, kubeconfigs and logs in dir, which it makes, and returns when
// all of it serves. Each process logs to NAME.log there.
func Start(ctx context.Context, dir string, opts Options) (*Cluster, error) {
	dir, err := filepath.Abs(dir)
	if err != nil {
		return nil, err
	}
	if opts.Binary, err = filepath.Abs(opts.Binary); err != nil {
		return nil, err
	}
	if err := opts.complete(); err != nil {
		return nil, err
	}
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return nil, err
	}
	if entries, err := os.ReadDir(dir); err != nil || len(entries) > 0 {
		return nil, errors.Join(err, fmt.Errorf("%s: a cluster needs an empty directory", dir))
	}
	c := &Cluster{dir: dir, opts: opts}
	ctx, cancel := context.WithTimeout(ctx, opts.Deadline)
	defer cancel()
	if err := c.start(ctx); err != nil {
		return nil, errors.Join(fmt.Errorf("starting a cluster: %w", err), c.Stop())
	}
	return c, nil
}

func (o *Options) complete() error {
	if o.Place == nil {
		o.Place = here{}
	}
	if !o.Addr.IsValid() {
		o.Addr = netip.AddrFrom4([4]byte{127, 0, 0, 1})
	}
	if o.ServiceCIDRs == nil {
		o.ServiceCIDRs = []netip.Prefix{netip.MustParsePrefix("10.96.0.0/16"), netip.MustParsePrefix("fd00:10:96::/112")}
	}
	if o.Controllers == nil {
		o.Controllers = DefaultControllers
	}
	if o.Deadline == 0 {
		o.Deadline = 5 * time.Minute
	}
	return o.Place.Do(func() (err error) {
		if o.Port == 0 {
			if o.Port, err = freePort(o.EtcdPort); err != nil {
				return err
			}
		}
		if o.EtcdPort == 0 {
			o.EtcdPort, err = freePort(o.Port)
		}
		return err
	})
}

func (c *Cluster) start(ctx context.Context) error {
	if err := c.certify(); err != nil {
		return err
	}
	if err := c.startEtcd(); err != nil {
		return err
	}
	if err := c.StartAPIServer(ctx); err != nil {
		return err
	}
	return c.startControllers(ctx)
}

// startEtcd starts etcd. Nobody waits for it: the API server does.
func (c *Cluster) startEtcd() (err error) {
	clients := "http://127.0.0.1:" + strconv.Itoa(int(c.opts.EtcdPort))
	c.etcd, err = c.spawn("etcd", "etcd",
		"--data-dir="+filepath.Join(c.dir, "etcd"),
		"--listen-client-urls="+clients,
		"--advertise-client-urls="+clients,
		"--listen-peer-urls=http://127.0.0.1:0", // it has no peers
		"--unsafe-no-fsync",                     // what is written outlives the process, not the machine
		"--log-level=warn",
	)
	return err
}

// StartAPIServer starts the API server on the data that there is, after StopAPIServer, and returns when it serves. It
// does nothing when it runs.
func (c *Cluster) StartAPIServer(ctx context.Context) (err error) {
	if c.server.runs() {
		return nil
	}
	ctx, cancel := context.WithTimeout(ctx, c.opts.Deadline)
	defer cancel()
	var cidrs []string
	for _, p := range c.opts.ServiceCIDRs {
		cidrs = append(cidrs, p.String())
	}
	args := []string{
		"apiserver",
		"--etcd-servers=http://127.0.0.1:" + strconv.Itoa(int(c.opts.EtcdPort)),
		"--bind-address=" + c.opts.Addr.String(),
		"--advertise-address=" + c.opts.Addr.String(),
		"--secure-port=" + strconv.Itoa(int(c.opts.Port)),
		"--cert-dir=" + c.dir,
		"--tls-cert-file=" + c.file("apiserver.crt"),
		"--tls-private-key-file=" + c.file("apiserver.key"),
		"--client-ca-file=" + c.file("ca.crt"),
		"--service-account-key-file=" + c.file("ca.key"),
		"--service-account-signing-key-file=" + c.file("ca.key"),
		"--service-account-issuer=https://kubernetes.default.svc",
		"--authorization-mode=RBAC",
		"--service-cluster-ip-range=" + strings.Join(cidrs, ","),
		"--endpoint-reconciler-type=none",            // nothing asks Service kubernetes for the way here
		"--disable-admission-plugins=ServiceAccount", // pods need no account
		"--allow-privileged",
		"--enable-priority-and-fairness=false",
		"--profiling=false",
		"--v=1",
	}
	c.server, err = c.spawn("apiserver", append(args, c.opts.APIServerFlags...)...)
	if err != nil {
		return err
	}
	return c.ready(ctx)
}

// StopAPIServer kills the API server. Its clients lose it without a word; etcd and the data stay.
func (c *Cluster) StopAPIServer() error {
	err := c.server.kill()
	// Connections to what is gone are of no use, and a new server is to be found at once.
	c.client.CloseIdleConnections()
	return err
}

// startControllers starts kube-controller-manager, or none.
func (c *Cluster) startControllers(ctx context.Context) error {
	if len(c.opts.Controllers) == 0 {
		return nil
	}
	config, err := c.NewKubeconfig("system:kube-controller-manager", "system:masters")
	if err != nil {
		return err
	}
	c.manager, err = c.spawn("controller-manager", "controller-manager",
		"--kubeconfig="+config,
		"--controllers="+strings.Join(c.opts.Controllers, ","),
		"--service-account-private-key-file="+c.file("ca.key"), // for TokenController
		"--root-ca-file="+c.file("ca.crt"),
		"--leader-elect=false",
		"--use-service-account-credentials=false",
		"--kube-api-qps=1000", "--kube-api-burst=2000",
		"--secure-port=0",
		"--profiling=false",
		"--v=1",
	)
	return err
}

// RestartControllers kills kube-controller-manager and starts it anew. After the API server was away for long it tries
// again only every half a minute or so; a new one does at once.
func (c *Cluster) RestartControllers(ctx context.Context) error {
	if err := c.manager.kill(); err != nil {
		return err
	}
	return c.startControllers(ctx)
}

// Stop ends all of the cluster, at once, and waits for it. Its files stay. Stop may be called again.
func (c *Cluster) Stop() error {
	var errs []error
	for _, p := range []*process{c.manager, c.server, c.etcd} {
		errs = append(errs, p.kill())
	}
	if c.client != nil {
		c.client.CloseIdleConnections()
	}
	return errors.Join(errs...)
}

// Memory returns the resident memory in bytes of each process that runs, by its name. Pages that processes share count
// for each of them.
func (c *Cluster) Memory() (map[string]int, error) {
	sizes := map[string]int{}
	for _, p := range []*process{c.etcd, c.server, c.manager} {
		if !p.runs() {
			continue
		}
		size, err := p.memory()
		if err != nil {
			return nil, fmt.Errorf("memory of %s: %w", p.name, err)
		}
		sizes[p.name] = size
	}
	return sizes, nil
}

// ProxyArgs returns the command of a kube-proxy for a node, by the name that its pods know: mode is iptables, nftables or
// ipvs, and kubeconfig a file that may list and watch Services, EndpointSlices and Nodes, as system:kube-proxy may. It
// listens nowhere, and leaves conntrack's limits and timeouts as they are.
func (c *Cluster) ProxyArgs(node, mode, kubeconfig string) []string {
	return []string{
		c.opts.Binary, "proxy",
		"--kubeconfig=" + kubeconfig,
		"--hostname-override=" + node,
		"--proxy-mode=" + mode,
		"--healthz-bind-address=", "--metrics-bind-address=",
		"--conntrack-max-per-core=0", "--conntrack-min=0",
		"--conntrack-tcp-timeout-established=0s", "--conntrack-tcp-timeout-close-wait=0s",
		"--iptables-min-sync-period=100ms", "--ipvs-min-sync-period=100ms",
		"--v=2",
	}
}

// Build has lab/kube/build make the program, unless it is there, and returns where it is. top is the checkout. The first
// time it takes minutes and the network.
func Build(ctx context.Context, top string) (string, error) {
	cmd := exec.CommandContext(ctx, filepath.Join(top, "lab/kube/build"))
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	cmd.Cancel = func() error { return syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL) }
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, os.Stderr
	if err := cmd.Run(); err != nil {
		return "", fmt.Errorf("lab/kube/build: %w", err)
	}
	return strings.TrimSpace(out.String()), nil
}

func (c *Cluster) file(name string) string { return filepath.Join(c.dir, name) }
