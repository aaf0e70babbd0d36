package kube

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net/netip"
	"os"
	"time"

	"github.com/ravel-lb/ravel/internal/config"
	"github.com/ravel-lb/ravel/internal/desired"
	"github.com/ravel-lb/ravel/internal/wholefile"
)

// file is what the cache file holds, as written. A reader takes its own version only.
type file struct {
	Version       int           `json:"version"`
	Namespace     string        `json:"namespace"`
	Name          string        `json:"name"`
	Key           string        `json:"key"`
	FleetKey      string        `json:"fleetKey,omitempty"`
	Stamp         time.Time     `json:"stamp"`
	Revision      uint64        `json:"revision"`
	Document      string        `json:"document"`
	FleetDocument string        `json:"fleetDocument,omitempty"`
	Nodes         []fileNode    `json:"nodes"`
	Services      []fileService `json:"services"`
}

type fileNode struct {
	Name     string            `json:"name"`
	Addrs    []netip.Addr      `json:"addresses"`
	Labels   map[string]string `json:"labels,omitempty"`
	Ready    bool              `json:"ready,omitempty"`
	Draining bool              `json:"draining,omitempty"`
	Excluded bool              `json:"excluded,omitempty"`
}

// fileService holds the endpoints of one port of a service.
type fileService struct {
	Namespace string     `json:"namespace"`
	Service   string     `json:"service"`
	PortName  string     `json:"portName,omitempty"`
	Proto     string     `json:"protocol"`
	Endpoints []fileEndp `json:"endpoints"`
}

type fileEndp struct {
	At    netip.AddrPort `json:"at"`
	Node  string         `json:"node"`
	State string         `json:"state,omitempty"` // ready, terminating, or empty
}

const (
	fileVersion = 1
	maxFile     = 256 << 20 // bytes that are read
	// future is how far ahead the stamp of a file may be: clocks differ a little.
	future = time.Minute
)

// encode writes what a start needs of a value; stamp is when the API server was last heard.
func encode(o Options, v Value, stamp time.Time) ([]byte, error) {
	f := file{
		Version: fileVersion, Namespace: o.Namespace, Name: o.Name, Key: o.Key, FleetKey: o.FleetKey, Stamp: stamp.UTC().Round(0),
		Revision: v.Revision, Document: v.Document, FleetDocument: v.FleetDocument, Nodes: []fileNode{}, Services: []fileService{},
	}
	for _, n := range v.Cluster.Nodes {
		f.Nodes = append(f.Nodes, fileNode(n))
	}
	for _, e := range v.Cluster.Endpoints {
		last := len(f.Services) - 1
		if last < 0 || !f.Services[last].is(e) {
			f.Services = append(f.Services, fileService{Namespace: e.Namespace, Service: e.Service, PortName: e.PortName, Proto: e.Proto.String()})
			last++
		}
		one := fileEndp{At: netip.AddrPortFrom(e.Addr, e.Port), Node: e.Node}
		switch {
		case e.Ready:
			one.State = "ready"
		case e.Terminating:
			one.State = "terminating"
		}
		f.Services[last].Endpoints = append(f.Services[last].Endpoints, one)
	}
	return json.Marshal(f)
}

func (s fileService) is(e desired.Endpoint) bool {
	return s.Namespace == e.Namespace && s.Service == e.Service && s.PortName == e.PortName && s.Proto == e.Proto.String()
}

// decode reads what encode wrote for the same ConfigMap, and refuses all else.
func decode(o Options, b []byte) (*Value, error) {
	var f file
	d := json.NewDecoder(bytes.NewReader(b))
	d.DisallowUnknownFields()
	if err := d.Decode(&f); err != nil {
		return nil, err
	}
	if _, err := d.Token(); !errors.Is(err, io.EOF) {
		return nil, errors.New("something stands behind its end")
	}
	switch {
	case f.Version != fileVersion:
		return nil, fmt.Errorf("its version is %d: this ravel reads %d", f.Version, fileVersion)
	case f.Namespace != o.Namespace || f.Name != o.Name || f.Key != o.Key || f.FleetKey != o.FleetKey:
		return nil, fmt.Errorf("it is of configmap %s/%s, keys %q and %q", f.Namespace, f.Name, f.Key, f.FleetKey)
	}
	v := &Value{Document: f.Document, FleetDocument: f.FleetDocument, Cached: true, Stamp: f.Stamp.UTC().Round(0), Revision: f.Revision}
	cluster, warnings, err := o.parseCluster([]byte(f.Document))
	if err != nil {
		return nil, err
	}
	v.Cluster, v.Warnings = cluster, warnings
	if o.FleetKey != "" {
		fleet, warnings, err := config.ParseFleet([]byte(f.FleetDocument))
		if err != nil {
			return nil, err
		}
		v.Fleet, v.Warnings = &fleet, append(v.Warnings, warnings...)
	}
	if err := f.nodes(o, v); err != nil {
		return nil, err
	}
	return v, f.endpoints(v)
}

func (f file) nodes(o Options, v *Value) error {
	names := map[string]bool{}
	for _, n := range f.Nodes {
		if n.Name == "" || names[n.Name] {
			return fmt.Errorf("a node is named %q, as another one or none may be", n.Name)
		}
		names[n.Name] = true
		for _, a := range n.Addrs {
			if !usable(a) {
				return fmt.Errorf("node %s has address %s", n.Name, a)
			}
		}
		node := desired.Node(n)
		node.Draining = node.Draining && !o.IgnoreCordon
		v.Cluster.Nodes = append(v.Cluster.Nodes, node)
	}
	return nil
}

func (f file) endpoints(v *Value) error {
	for _, s := range f.Services {
		one := desired.Endpoint{Namespace: s.Namespace, Service: s.Service, PortName: s.PortName}
		if err := one.Proto.UnmarshalText([]byte(s.Proto)); err != nil {
			return err
		}
		for _, e := range s.Endpoints {
			one.Addr, one.Port, one.Node = e.At.Addr(), e.At.Port(), e.Node
			if !usable(one.Addr) || one.Port == 0 || one.Node == "" {
				return fmt.Errorf("service %s/%s has endpoint %s on node %q", s.Namespace, s.Service, e.At, e.Node)
			}
			switch e.State {
			case "ready", "terminating", "":
				one.Ready, one.Terminating = e.State == "ready", e.State == "terminating"
			default:
				return fmt.Errorf("service %s/%s has an endpoint that is %q", s.Namespace, s.Service, e.State)
			}
			v.Cluster.Endpoints = append(v.Cluster.Endpoints, one)
		}
	}
	return nil
}

// load returns the value of an earlier process, or nil where there is none that may be used.
func (s *Source) load(now time.Time) *Value {
	if s.o.Cache == "" {
		return nil
	}
	v, err := s.read()
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return nil
	case err != nil:
	case now.Sub(v.Stamp) > s.o.MaxCacheAge:
		err = fmt.Errorf("the API server said so %s ago, which is more than %s", now.Sub(v.Stamp).Round(time.Second), s.o.MaxCacheAge)
	case v.Stamp.Sub(now) > future:
		err = fmt.Errorf("it is from the future, %s: a clock is wrong", v.Stamp.Format(time.RFC3339))
	default:
		return v
	}
	err = fmt.Errorf("the inputs of an earlier process are not used: %w", err)
	s.log.Warn(err.Error(), "file", s.o.Cache)
	s.fileFault(err)
	return nil
}

func (s *Source) read() (*Value, error) {
	f, err := os.Open(s.o.Cache)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	b, err := io.ReadAll(io.LimitReader(f, maxFile))
	if err != nil {
		return nil, err
	}
	return decode(s.o, b)
}

func (s *Source) fileFault(err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.status.fileFault = err
}

// keep writes the file until ctx ends: some time after a change, and from time to time without one, so that it tells how
// lately the API server was heard.
func (s *Source) keep(ctx context.Context) {
	if s.o.Cache == "" {
		return
	}
	refresh := s.o.MaxCacheAge / 24
	var written time.Time // the stamp of the value in the file
	wait := func(d time.Duration) bool {
		select {
		case <-ctx.Done():
			return false
		case <-time.After(d):
			return true
		}
	}
	for {
		changed := s.value.Changed()
		v, known := s.value.Latest()
		if known && !v.Cached && v.Stamp != written {
			if !wait(s.quietFor) {
				return
			}
			if v, _ = s.value.Latest(); s.write(v) {
				written = v.Stamp
			}
			if !wait(s.keepGap) {
				return
			}
			continue
		}
		select {
		case <-ctx.Done():
			return
		case <-changed:
		case <-time.After(refresh):
			written = time.Time{}
		}
	}
}

// keepLast writes the file when everything else has ended.
func (s *Source) keepLast() {
	if v, known := s.value.Latest(); known && !v.Cached && s.o.Cache != "" {
		s.write(v)
	}
}

func (s *Source) write(v Value) bool {
	b, err := encode(s.o, v, s.touched(time.Now()))
	if err == nil {
		err = wholefile.Write(s.o.Cache, b)
	}
	if err != nil {
		err = fmt.Errorf("keeping the inputs for a start without the API server: %w", err)
		s.mu.Lock()
		before := s.status.fileFault
		s.mu.Unlock()
		if before == nil || before.Error() != err.Error() {
			s.log.Warn(err.Error())
		}
	}
	s.fileFault(err)
	return err == nil
}

// touched is since when something that the API server would tell may be missing: now, while all watches are open.
func (s *Source) touched(now time.Time) time.Time {
	for _, w := range s.watches {
		if at := w.standing(); !at.open && at.touchAt.Before(now) {
			now = at.touchAt
		}
	}
	return now
}
