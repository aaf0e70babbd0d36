// Package stage puts Ravel on the lab's fleet: pods that answer, realservers, directors and clients, all run from one
// static file that a story or a test changes as it goes, or from a Kubernetes cluster.
package stage

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sync/errgroup"

	"github.com/ravel-lb/ravel/gossip"
	"github.com/ravel-lb/ravel/internal/admin"
	"github.com/ravel-lb/ravel/lab/fleet"
	"github.com/ravel-lb/ravel/lab/topology"
	"github.com/ravel-lb/ravel/lab/traffic"
)

// Stage is a fleet that Ravel runs on. Its methods may be called by many goroutines, a node's by one at a time.
type Stage struct {
	Fleet *fleet.Fleet
	Pods  []Pod
	// DirectorArgs and RealserverArgs are added to the command lines of processes that start later.
	DirectorArgs, RealserverArgs []string
	// Source are the arguments by which processes that start later find their documents: at first, the static file.
	Source []string

	build string // where the programs are
	file  string // the static file
	key   string // the file with the fleet's gossip key

	mu        sync.Mutex // guards the fields below
	document  Document
	processes map[string]*fleet.Process // ravel, by node
}

// Routers are the top-of-rack routers of the lab.
func Routers() []string { return []string{"tor1", "tor2"} }

// Up brings up the topology with its pods, and writes a static file in which all pods are behind the two VIPs, port
// 80, TCP and UDP. build has the programs ravel and traffic; dir, which is build or is made, takes the files and the logs.
// All nodes see these and the directories keep. No ravel runs yet.
func Up(ctx context.Context, build, dir string, keep ...string) (*Stage, error) {
	build, err := filepath.Abs(build)
	if err != nil {
		return nil, err
	}
	if dir, err = filepath.Abs(dir); err != nil {
		return nil, err
	}
	topo, err := topology.Load("lab/ravel.clab.yml")
	if err != nil {
		return nil, err
	}
	logs := filepath.Join(dir, "lab-logs")
	if err := os.RemoveAll(logs); err != nil {
		return nil, err
	}
	f, err := fleet.Up(ctx, topo, fleet.Options{LogDir: logs, Keep: append([]string{build, dir}, keep...)})
	if err != nil {
		return nil, err
	}
	s := &Stage{Fleet: f, Pods: PodsOf(topo), build: build, file: filepath.Join(dir, "static.yaml"), processes: map[string]*fleet.Process{}}
	s.Source = []string{"--static", s.file}
	s.key = filepath.Join(dir, "gossip.key")
	if err := os.WriteFile(s.key, []byte(gossip.NewKey()+"\n"), 0o600); err != nil {
		return nil, errors.Join(err, f.Down())
	}
	document := Document{Directors: []string{"d1", "d2", "d3"}, Nodes: []string{"r1", "r2", "r3", "r4"}}
	document.Services = []Service{
		{VIP: VIP4, Port: 80, Name: "web", TCP: true, UDP: true},
		{VIP: VIP6, Port: 80, Name: "web", TCP: true, UDP: true},
	}
	document.Back("web", s.Pods...)
	if err := s.startPods(); err != nil {
		return nil, errors.Join(err, f.Down())
	}
	return s, s.SetDocument(document)
}

func (s *Stage) startPods() error {
	for _, p := range s.Pods {
		place, err := s.Fleet.Node(p.Node).Pod(p.Name)
		if err != nil {
			return err
		}
		if _, err := place.Spawn("pod-"+p.Name, filepath.Join(s.build, "traffic"), "pod", p.String(), fmt.Sprint(PodPort)); err != nil {
			return err
		}
	}
	return nil
}

// Document returns a copy of the document in force.
func (s *Stage) Document() Document {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.document.Clone()
}

// SetDocument makes d the document in force, in one step.
func (s *Stage) SetDocument(d Document) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.document = d.Clone()
	return write(s.file, d.YAML())
}

// Change edits the document in force.
func (s *Stage) Change(edit func(*Document)) error {
	d := s.Document()
	edit(&d)
	return s.SetDocument(d)
}

// WriteFile puts any content in the place of the static file; SetDocument mends it.
func (s *Stage) WriteFile(content []byte) error { return write(s.file, content) }

// File is the path of the static file.
func (s *Stage) File() string { return s.file }

// Directors and Realservers list the nodes of a role.
func (s *Stage) Directors() []string { return s.Document().Directors }

// Realservers lists the nodes that have pods.
func (s *Stage) Realservers() []string { return s.Document().Nodes }

// Start runs ravel on a node, in the role that the node has.
func (s *Stage) Start(node string, args ...string) error {
	role, more := "director", s.DirectorArgs
	if strings.HasPrefix(node, "r") {
		role, more = "realserver", s.RealserverArgs
	}
	// Before the traffic of clients and pods, as the daemons of a host that does nothing else would be.
	words := slices.Concat([]string{"nice", "-n", "-5", filepath.Join(s.build, "ravel"), role, "--node", node,
		"--gossip-key-file", s.key,
		// All nodes share the machine's /var/lib, and each has its own /run.
		"--state-dir", "/run/ravel", "--log-level", "debug",
		// Tests take away what they like.
		"--blast-radius", "100"}, s.Source, more, args)
	p, err := s.Fleet.Node(node).Spawn("ravel", words...)
	if err != nil {
		return err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.processes[node] = p
	return nil
}

// StartAll runs ravel on every node of the document, and returns when every realserver holds its VIPs and the spine has
// a way to each VIP by both routers, which have one by every director.
func (s *Stage) StartAll(ctx context.Context) error {
	for _, node := range append(s.Realservers(), s.Directors()...) {
		if err := s.Start(node); err != nil {
			return err
		}
	}
	for _, node := range s.Realservers() {
		if err := Wait(ctx, func() error { return s.Ready(ctx, node) }); err != nil {
			return err
		}
	}
	vips := s.VIPs()
	if err := s.WaitHops(ctx, Routers(), vips, len(s.Directors())); err != nil {
		return err
	}
	if err := s.WaitHops(ctx, []string{"spine"}, vips, len(Routers())); err != nil {
		return err
	}
	return s.WaitTaking(ctx)
}

// VIPs lists those of the document.
func (s *Stage) VIPs() []netip.Addr {
	var vips []netip.Addr
	for _, service := range s.Document().Services {
		if !slices.Contains(vips, service.VIP) {
			vips = append(vips, service.VIP)
		}
	}
	return vips
}

// Ready asks the ravel of a node whether it serves, and returns nil if it does.
func (s *Stage) Ready(ctx context.Context, node string) error {
	client := http.Client{Transport: &http.Transport{
		DisableKeepAlives: true,
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return (&net.Dialer{}).DialContext(ctx, "unix", s.Fleet.Node(node).Path("/run/ravel/admin.sock"))
		},
	}}
	request, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://ravel/readyz", nil)
	if err != nil {
		return err
	}
	response, err := client.Do(request)
	if err != nil {
		return fmt.Errorf("%s: %w", node, err)
	}
	defer response.Body.Close()
	if response.StatusCode != http.StatusOK {
		why, _ := io.ReadAll(io.LimitReader(response.Body, 1000))
		return fmt.Errorf("%s is not ready: %s", node, bytes.TrimSpace(why))
	}
	return nil
}

// Process is the ravel that was started last on a node.
func (s *Stage) Process(node string) *fleet.Process {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.processes[node]
}

// Ravel runs a command of ravel on a node and returns what it printed on both outputs.
func (s *Stage) Ravel(ctx context.Context, node string, args ...string) (string, error) {
	out, err := s.Fleet.Node(node).Command(ctx, append([]string{filepath.Join(s.build, "ravel")}, args...)...).CombinedOutput()
	return string(out), err
}

// Ask asks the ravel of a node, as its commands do.
func (s *Stage) Ask(ctx context.Context, node, query string, value any) error {
	return admin.Get(ctx, s.Fleet.Node(node).Path("/run/ravel/admin.sock"), query, value)
}

// Tell gives a command to the ravel of a node, as its commands do.
func (s *Stage) Tell(ctx context.Context, node, command string, words, value any) error {
	return admin.Post(ctx, s.Fleet.Node(node).Path("/run/ravel/admin.sock"), command, words, value)
}

// Output runs a command on a node and returns its standard output.
func (s *Stage) Output(ctx context.Context, node string, args ...string) (string, error) {
	var stderr bytes.Buffer
	cmd := s.Fleet.Node(node).Command(ctx, args...)
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		return string(out), fmt.Errorf("%s: %s: %w: %s", node, strings.Join(args, " "), err, stderr.Bytes())
	}
	return string(out), nil
}

// NextHops returns the next hops of a VIP's route in a router's kernel, sorted; none where there is no route.
func (s *Stage) NextHops(_ context.Context, router string, vip netip.Addr) ([]string, error) {
	family := netlink.FAMILY_V4
	if !vip.Is4() {
		family = netlink.FAMILY_V6
	}
	to := &net.IPNet{IP: vip.AsSlice(), Mask: net.CIDRMask(vip.BitLen(), vip.BitLen())}
	var routes []netlink.Route
	err := s.Fleet.Node(router).Do(func() (err error) {
		routes, err = netlink.RouteListFiltered(family, &netlink.Route{Dst: to}, netlink.RT_FILTER_DST)
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("reading the route of %s on %s: %w", vip, router, err)
	}
	var hops []string
	for _, r := range routes {
		if r.Gw != nil {
			hops = append(hops, r.Gw.String())
		}
		for _, n := range r.MultiPath {
			if n.Gw != nil {
				hops = append(hops, n.Gw.String())
			}
		}
	}
	slices.Sort(hops)
	return hops, nil
}

// WaitHops waits until each of the routers has just so many next hops for each VIP.
func (s *Stage) WaitHops(ctx context.Context, routers []string, vips []netip.Addr, want int) error {
	return Wait(ctx, func() error {
		for _, router := range routers {
			for _, vip := range vips {
				hops, err := s.NextHops(ctx, router, vip)
				if err != nil {
					return err
				}
				if len(hops) != want {
					return fmt.Errorf("%s has %d next hops for %s (%s), not %d", router, len(hops), vip, strings.Join(hops, " "), want)
				}
			}
		}
		return nil
	})
}

// WaitTaking waits until in the kernel of every director all nodes that have ready pods of a service take its new flows,
// for all services of the document. A flow that is opened earlier may lose its slot to a real server that comes, and
// then its place when it comes to another director.
func (s *Stage) WaitTaking(ctx context.Context) error {
	want := s.Document().takers()
	return Wait(ctx, func() error {
		for _, d := range s.Directors() {
			var services []struct {
				VIP         netip.Addr
				Protocol    string
				Port        int
				RealServers []struct{ Weight int }
			}
			if err := s.Ask(ctx, d, "services", &services); err != nil {
				return fmt.Errorf("%s: %w", d, err)
			}
			got := map[string]int{}
			for _, v := range services {
				for _, rs := range v.RealServers {
					got[takerKey(v.Protocol, v.VIP, v.Port)] += min(rs.Weight, 1)
				}
			}
			for service, nodes := range want {
				if got[service] != nodes {
					return fmt.Errorf("%s: of %s %d real servers take flows, not %d", d, service, got[service], nodes)
				}
			}
		}
		return nil
	})
}

func takerKey(proto string, vip netip.Addr, port int) string {
	return fmt.Sprint(proto, " ", netip.AddrPortFrom(vip, uint16(port)))
}

// takers counts the nodes with a ready pod of each service.
func (d Document) takers() map[string]int {
	takers := map[string]int{}
	for _, v := range d.Services {
		nodes := map[string]bool{}
		for _, e := range d.Endpoints {
			if e.Service == v.Name && !e.Terminating && e.Addr.Is4() == v.VIP.Is4() && slices.Contains(d.Nodes, e.Node) {
				nodes[e.Node] = true
			}
		}
		for proto, on := range map[string]bool{"tcp": v.TCP, "udp": v.UDP} {
			if on {
				takers[takerKey(proto, v.VIP, v.Port)] = len(nodes)
			}
		}
	}
	return takers
}

// Wait asks again and again, until check returns nil or ctx ends; then the error is the last one of check.
func Wait(ctx context.Context, check func() error) error {
	for {
		err := check()
		if err == nil {
			return nil
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("%w; last: %w", context.Cause(ctx), err)
		case <-time.After(100 * time.Millisecond):
		}
	}
}

// Client runs a load on a node.
type Client struct {
	traffic.Remote
	process *fleet.Process
}

// StartClient begins a load on a node and waits until it can be asked. name is unique on the node.
func (s *Stage) StartClient(ctx context.Context, node, name string, load traffic.Load) (*Client, error) {
	text, err := json.Marshal(load)
	if err != nil {
		return nil, err
	}
	socket := "/run/" + name + ".sock"
	p, err := s.Fleet.Node(node).Spawn(name, filepath.Join(s.build, "traffic"), "client", socket, string(text))
	if err != nil {
		return nil, err
	}
	c := &Client{traffic.Remote{Path: s.Fleet.Node(node).Path(socket)}, p}
	return c, Wait(ctx, func() error {
		_, err := c.Report(ctx)
		return err
	})
}

// Stop ends the load.
func (c *Client) Stop() error { return c.process.Kill() }

// Reset begins a new phase on all clients and returns what happened in the one before.
func Reset(ctx context.Context, clients ...*Client) (traffic.Report, error) {
	return gather(ctx, traffic.Remote.Reset, clients)
}

// Report says what happened since the last Reset on all clients.
func Report(ctx context.Context, clients ...*Client) (traffic.Report, error) {
	return gather(ctx, traffic.Remote.Report, clients)
}

func gather(ctx context.Context, ask func(traffic.Remote, context.Context) (traffic.Report, error), clients []*Client) (traffic.Report, error) {
	reports := make([]traffic.Report, len(clients))
	group, ctx := errgroup.WithContext(ctx)
	for i, c := range clients {
		group.Go(func() (err error) {
			reports[i], err = ask(c.Remote, ctx)
			return err
		})
	}
	err := group.Wait()
	return traffic.Merge(reports...), err
}

// Down ends everything.
func (s *Stage) Down() error { return s.Fleet.Down() }
