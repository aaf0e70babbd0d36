// Package topology reads the lab's topology: a file of containerlab's, of which it knows just the part that the lab's
// runner realises. Whatever else stands in the file is an error that names its place, so that the same file never
// means one thing on Docker and another in namespaces.
package topology

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"go.yaml.in/yaml/v3"
)

// Topology is a lab as its file describes it.
type Topology struct {
	Name  string
	Nodes []Node // in the order of the file; names are unique
	Links []Link // in the order of the file; no endpoint is in two of them
}

// Node is a machine of the lab: a host or router with a network of its own.
type Node struct {
	Name  string
	Image string
	Binds []Bind // in the order of the file
	// Exec are the commands to run when all links are there, in order, split into words as containerlab does.
	// None is empty.
	Exec [][]string
}

// Bind is a file or directory of the machine that a node sees at another place.
type Bind struct {
	Source   string // absolute, or relative to the directory of the file
	Target   string // absolute and clean
	ReadOnly bool
}

// Endpoint is one end of a link.
type Endpoint struct {
	Node      string
	Interface string // at most 15 bytes, never "lo" or "eth0"
}

// String returns the endpoint as "node:interface".
func (e Endpoint) String() string { return e.Node + ":" + e.Interface }

// Link is a cable between two interfaces.
type Link [2]Endpoint

// Node returns the node with that name and whether there is one.
func (t *Topology) Node(name string) (Node, bool) {
	i := slices.IndexFunc(t.Nodes, func(n Node) bool { return n.Name == name })
	if i < 0 {
		return Node{}, false
	}
	return t.Nodes[i], true
}

// Load reads a file; the sources of its binds become absolute.
func Load(path string) (*Topology, error) {
	b, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	t, err := Parse(b)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	dir, err := filepath.Abs(filepath.Dir(path))
	if err != nil {
		return nil, err
	}
	for _, n := range t.Nodes {
		for i, b := range n.Binds {
			if !filepath.IsAbs(b.Source) {
				n.Binds[i].Source = filepath.Join(dir, b.Source)
			}
		}
	}
	return t, nil
}

// Parse reads a topology and names all that is wrong with it at once, each with its place in the document.
func Parse(b []byte) (*Topology, error) {
	if i := strings.IndexByte(string(b), '$'); i >= 0 {
		// Containerlab replaces ${NAME} before it reads the file.
		return nil, fmt.Errorf("line %d: variables are not realised", 1+strings.Count(string(b[:i]), "\n"))
	}
	var doc yaml.Node
	if err := yaml.Unmarshal(b, &doc); err != nil {
		return nil, err
	}
	if len(doc.Content) == 0 {
		return nil, errors.New("the document is empty")
	}
	p := &parser{}
	t := p.topology(doc.Content[0])
	p.check(t)
	if len(p.errs) > 0 {
		return nil, errors.Join(p.errs...)
	}
	return t, nil
}
