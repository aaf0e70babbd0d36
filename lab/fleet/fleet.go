// Package fleet realises a topology in network namespaces: each node has its own network, mounts, host name and
// processes, as a container would, and the very files of the topology.
//
// All of a node hangs on one process and on threads of this one. When this process ends, in whatever way, the kernel
// ends every process of the fleet, and with them go namespaces, links and mounts: nothing stays behind.
package fleet

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"runtime"
	"sync"
	"time"

	"github.com/ravel-lb/ravel/lab/topology"
	"github.com/vishvananda/netlink"
	"golang.org/x/sync/errgroup"
)

// Options say how a fleet runs.
type Options struct {
	Log *slog.Logger // nil logs nothing
	// LogDir is where processes write what they say (Node.Spawn). It is made if it is not there.
	LogDir string
	// Keep are directories that nodes see although they lie below /tmp, /run, /var/tmp or /var/log, where each node
	// has an empty directory of its own. The working directory is one of them by itself.
	Keep []string
}

// Fleet is a topology that runs. Its methods may be called by any goroutine.
type Fleet struct {
	topo  *topology.Topology
	opts  Options
	nodes map[string]*Node
	links map[topology.Endpoint]topology.Endpoint // both ways

	mu   sync.Mutex // guards the field below
	cuts map[topology.Endpoint]settings
}

// Up realises the topology and returns when all commands of all nodes have ended well. If one fails, or ctx ends,
// nothing is left. The caller calls Down.
func Up(ctx context.Context, topo *topology.Topology, opts Options) (*Fleet, error) {
	if os.Geteuid() != 0 {
		return nil, errors.New("a fleet needs root")
	}
	if opts.Log == nil {
		opts.Log = slog.New(slog.NewTextHandler(io.Discard, nil))
	}
	if opts.LogDir != "" {
		if err := os.MkdirAll(opts.LogDir, 0o755); err != nil {
			return nil, err
		}
		abs, err := filepath.Abs(opts.LogDir)
		if err != nil {
			return nil, err
		}
		opts.LogDir = abs
	}
	f := &Fleet{topo: topo, opts: opts, nodes: map[string]*Node{}, links: map[topology.Endpoint]topology.Endpoint{},
		cuts: map[topology.Endpoint]settings{}}
	if err := f.up(ctx); err != nil {
		return nil, errors.Join(err, f.Down())
	}
	return f, nil
}

func (f *Fleet) up(ctx context.Context) error {
	start := time.Now()
	for _, t := range f.topo.Nodes {
		n, err := newNode(t, f.opts)
		if err != nil {
			return fmt.Errorf("making node %s: %w", t.Name, err)
		}
		f.nodes[t.Name] = n
		if err := ctx.Err(); err != nil {
			return err
		}
	}
	f.opts.Log.Debug("nodes are there", "took", time.Since(start))
	for _, l := range f.topo.Links {
		if err := f.connect(l); err != nil {
			return fmt.Errorf("connecting %s and %s: %w", l[0], l[1], err)
		}
	}
	f.opts.Log.Debug("links are there", "took", time.Since(start))
	group, ctx := errgroup.WithContext(ctx)
	group.SetLimit(2 * runtime.NumCPU())
	for _, n := range f.nodes {
		group.Go(func() error {
			if err := n.configure(ctx); err != nil {
				return fmt.Errorf("node %s: %w", n.name, err)
			}
			return nil
		})
	}
	err := group.Wait()
	f.opts.Log.Debug("commands have run", "took", time.Since(start))
	return err
}

// connect makes a veth pair, both ends up.
func (f *Fleet) connect(l topology.Link) error {
	a, b := f.nodes[l[0].Node], f.nodes[l[1].Node]
	err := a.Do(func() error {
		attrs := netlink.NewLinkAttrs()
		attrs.Name = l[0].Interface
		veth := &netlink.Veth{LinkAttrs: attrs, PeerName: l[1].Interface, PeerNamespace: netlink.NsPid(b.init.Process.Pid)}
		if err := netlink.LinkAdd(veth); err != nil {
			return err
		}
		return up(l[0].Interface)
	})
	if err != nil {
		return err
	}
	f.links[l[0]], f.links[l[1]] = l[1], l[0]
	return b.Do(func() error { return up(l[1].Interface) })
}

// up sets a link of the calling thread's network up.
func up(name string) error {
	link, err := netlink.LinkByName(name)
	if err != nil {
		return err
	}
	return netlink.LinkSetUp(link)
}

// Node returns a node of the topology. It panics if there is none of that name.
func (f *Fleet) Node(name string) *Node {
	n := f.nodes[name]
	if n == nil {
		panic("fleet: there is no node " + name)
	}
	return n
}

// Topology returns what the fleet realises.
func (f *Fleet) Topology() *topology.Topology { return f.topo }

// KillNode ends a node as a power failure does: its neighbours lose the carrier, then every process is gone at once.
// The node does not come back.
func (f *Fleet) KillNode(name string) error {
	n := f.Node(name)
	err := n.Do(func() error {
		var errs []error
		for end := range f.links {
			if end.Node == name {
				errs = append(errs, down(end.Interface))
			}
		}
		return errors.Join(errs...)
	})
	n.kill()
	return err
}

// Down ends everything and waits until it is gone. It may be called again.
func (f *Fleet) Down() error {
	for _, n := range f.nodes {
		n.end()
	}
	return nil
}
