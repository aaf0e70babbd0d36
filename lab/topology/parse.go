package topology

import (
	"cmp"
	"fmt"
	"path"
	"regexp"
	"strings"

	"go.yaml.in/yaml/v3"
)

// parser walks a document and collects what is wrong with it.
type parser struct{ errs []error }

func (p *parser) errorf(place, format string, args ...any) {
	p.errs = append(p.errs, fmt.Errorf("%s: %s", place, fmt.Sprintf(format, args...)))
}

// mapping calls the function of each key that the node has. A key without a function is one that the runner does not
// realise; "*" takes those that have none.
func (p *parser) mapping(place string, n *yaml.Node, keys map[string]func(place string, n *yaml.Node)) {
	if n.Kind != yaml.MappingNode {
		p.errorf(orDocument(place), "want a mapping, line %d", n.Line)
		return
	}
	seen := map[string]bool{}
	for i := 0; i+1 < len(n.Content); i += 2 {
		key, value := n.Content[i], n.Content[i+1]
		at := strings.TrimPrefix(place+"."+key.Value, ".")
		read := keys[key.Value]
		if read == nil {
			read = keys["*"]
		}
		switch {
		case key.Kind != yaml.ScalarNode:
			p.errorf(orDocument(place), "a key on line %d is no name", key.Line)
		case seen[key.Value]:
			p.errorf(at, "is there twice")
		case read == nil || key.Value == "*":
			p.errorf(at, "the lab's runner does not realise this key")
		case value.Kind == yaml.AliasNode || value.Anchor != "":
			p.errorf(at, "the lab's runner does not realise anchors")
		default:
			read(at, value)
		}
		seen[key.Value] = true
	}
}

func orDocument(place string) string {
	if place == "" {
		return "the document"
	}
	return place
}

func (p *parser) list(place string, n *yaml.Node, item func(place string, n *yaml.Node)) {
	if n.Kind != yaml.SequenceNode {
		p.errorf(place, "want a list, line %d", n.Line)
		return
	}
	for i, n := range n.Content {
		at := fmt.Sprintf("%s[%d]", place, i)
		if n.Kind == yaml.AliasNode || n.Anchor != "" {
			p.errorf(at, "the lab's runner does not realise anchors")
			continue
		}
		item(at, n)
	}
}

func (p *parser) text(place string, n *yaml.Node) string {
	if n.Kind != yaml.ScalarNode || n.Tag != "!!str" || n.Value == "" {
		p.errorf(place, "want a text, line %d", n.Line)
		return ""
	}
	if strings.IndexByte(n.Value, 0) >= 0 {
		p.errorf(place, "has a zero byte")
		return ""
	}
	return n.Value
}

func (p *parser) only(place string, n *yaml.Node, realised string) {
	if text := p.text(place, n); text != "" && text != realised {
		p.errorf(place, "the lab's runner realises %q only, not %q", realised, text)
	}
}

var nodeName = regexp.MustCompile(`^[a-z0-9][a-z0-9-]{0,30}$`)

func (p *parser) topology(n *yaml.Node) *Topology {
	t := &Topology{}
	var common defaults
	var own []defaults // of each node
	type reader = func(string, *yaml.Node)
	p.mapping("", n, map[string]reader{
		"name": func(at string, n *yaml.Node) {
			if t.Name = p.text(at, n); t.Name != "" && !nodeName.MatchString(t.Name) {
				p.errorf(at, "%q is no name", t.Name)
			}
		},
		"topology": func(at string, n *yaml.Node) {
			p.mapping(at, n, map[string]reader{
				"defaults": func(at string, n *yaml.Node) { p.mapping(at, n, p.defaults(&common)) },
				"nodes": func(at string, n *yaml.Node) {
					p.mapping(at, n, map[string]reader{"*": func(at string, n *yaml.Node) {
						node, d := p.node(at, n)
						t.Nodes, own = append(t.Nodes, node), append(own, d)
					}})
				},
				"links": func(at string, n *yaml.Node) {
					p.list(at, n, func(at string, n *yaml.Node) { t.Links = append(t.Links, p.link(at, n)) })
				},
			})
		},
	})
	for i := range t.Nodes {
		node := &t.Nodes[i]
		at := "topology.nodes." + node.Name
		node.Image = cmp.Or(own[i].image, common.image)
		if cmp.Or(own[i].kind, common.kind) == "" {
			p.errorf(at+".kind", "missing")
		}
		if node.Image == "" {
			p.errorf(at+".image", "missing")
		}
		if cmp.Or(own[i].network, common.network) == "" {
			p.errorf(at+".network-mode", "missing: without \"none\" containerlab adds a network of its own")
		}
	}
	return t
}

// defaults are the keys that a node may leave to topology.defaults.
type defaults struct{ kind, image, network string }

func (p *parser) defaults(d *defaults) map[string]func(string, *yaml.Node) {
	return map[string]func(string, *yaml.Node){
		"kind":         func(at string, n *yaml.Node) { d.kind = n.Value; p.only(at, n, "linux") },
		"image":        func(at string, n *yaml.Node) { d.image = p.text(at, n) },
		"network-mode": func(at string, n *yaml.Node) { d.network = n.Value; p.only(at, n, "none") },
	}
}

func (p *parser) node(at string, n *yaml.Node) (Node, defaults) {
	node := Node{Name: strings.TrimPrefix(at, "topology.nodes.")}
	if !nodeName.MatchString(node.Name) {
		p.errorf(at, "is no name of a node")
	}
	var own defaults
	keys := p.defaults(&own)
	keys["binds"] = func(at string, n *yaml.Node) {
		p.list(at, n, func(at string, n *yaml.Node) { node.Binds = append(node.Binds, p.bind(at, n)) })
	}
	keys["exec"] = func(at string, n *yaml.Node) {
		p.list(at, n, func(at string, n *yaml.Node) {
			text := p.text(at, n)
			if text == "" {
				return
			}
			words, err := split(text)
			if err == nil && len(words) == 0 {
				err = fmt.Errorf("no command")
			}
			if err != nil {
				p.errorf(at, "%v", err)
				return
			}
			node.Exec = append(node.Exec, words)
		})
	}
	p.mapping(at, n, keys)
	return node, own
}

func (p *parser) bind(at string, n *yaml.Node) Bind {
	text := p.text(at, n)
	if text == "" {
		return Bind{}
	}
	parts := strings.Split(text, ":")
	b := Bind{Source: parts[0]}
	switch {
	case len(parts) == 3 && parts[2] == "ro":
		b.ReadOnly = true
	case len(parts) != 2:
		p.errorf(at, "want SOURCE:TARGET or SOURCE:TARGET:ro, not %q", text)
		return Bind{}
	}
	b.Target = path.Clean(parts[1])
	if b.Source == "" || !path.IsAbs(parts[1]) || b.Target == "/" {
		p.errorf(at, "want SOURCE:TARGET, the target an absolute path, not %q", text)
	}
	return b
}

func (p *parser) link(at string, n *yaml.Node) Link {
	var ends []Endpoint
	p.mapping(at, n, map[string]func(string, *yaml.Node){
		"endpoints": func(at string, n *yaml.Node) {
			p.list(at, n, func(at string, n *yaml.Node) { ends = append(ends, p.endpoint(at, n)) })
		},
	})
	if len(ends) != 2 {
		p.errorf(at, "want two endpoints, not %d", len(ends))
		return Link{}
	}
	return Link{ends[0], ends[1]}
}

var ifName = regexp.MustCompile(`^[a-zA-Z0-9_.-]{1,15}$`)

func (p *parser) endpoint(at string, n *yaml.Node) Endpoint {
	text := p.text(at, n)
	if text == "" {
		return Endpoint{}
	}
	node, link, found := strings.Cut(text, ":")
	switch {
	case !found || !ifName.MatchString(link) || strings.Trim(link, ".") == "":
		p.errorf(at, "want NODE:INTERFACE, not %q", text)
	case link == "lo" || link == "eth0":
		p.errorf(at, "%s is not for links", link)
	}
	return Endpoint{node, link}
}

// check looks at what only the whole document shows.
func (p *parser) check(t *Topology) {
	if t.Name == "" {
		p.errorf("name", "missing")
	}
	if len(t.Nodes) == 0 {
		p.errorf("topology.nodes", "missing")
	}
	nodes := map[string]bool{}
	for _, n := range t.Nodes {
		nodes[n.Name] = true
	}
	used := map[Endpoint]int{}
	for i, l := range t.Links {
		for _, e := range l {
			at := fmt.Sprintf("topology.links[%d]", i)
			if e.Node == "" {
				continue // named already
			}
			if !nodes[e.Node] {
				p.errorf(at, "there is no node %q", e.Node)
			}
			if first, twice := used[e]; twice {
				p.errorf(at, "%s is in topology.links[%d] already", e, first)
			}
			used[e] = i
		}
	}
}
