package doc

import (
	"encoding/json"
	"strings"
	"unicode/utf8"

	"go.yaml.in/yaml/v3"
)

// jsonReader turns JSON into the tree that the YAML library would make of it, where that library could: it knows no
// surrogate pairs, and no key longer than 1,024 bytes. It is also an order of magnitude faster.
type jsonReader struct {
	b      string
	at     int
	line   int
	column int         // at count, from 1
	count  int         // up to where characters were counted
	spare  []yaml.Node // nodes are made many at a time
}

// parseJSON returns the tree of b, which must be valid JSON.
func parseJSON(b []byte) *yaml.Node {
	r := &jsonReader{b: string(b), line: 1, column: 1}
	return r.value()
}

// space skips white space; JSON has line ends nowhere else.
func (r *jsonReader) space() {
	for ; r.at < len(r.b); r.at++ {
		switch r.b[r.at] {
		case ' ', '\t', '\r':
		case '\n':
			r.line++
			r.column, r.count = 1, r.at+1
		default:
			return
		}
	}
}

// next skips white space and returns the next byte without taking it.
func (r *jsonReader) next() byte {
	r.space()
	return r.b[r.at]
}

func (r *jsonReader) node(kind yaml.Kind, tag string) *yaml.Node {
	if len(r.spare) == 0 {
		r.spare = make([]yaml.Node, min(1+(len(r.b)-r.at)/16, 256))
	}
	n := &r.spare[0]
	r.spare = r.spare[1:]
	r.column += utf8.RuneCountInString(r.b[r.count:r.at])
	r.count = r.at
	n.Kind, n.Tag, n.Line, n.Column = kind, tag, r.line, r.column
	return n
}

func (r *jsonReader) value() *yaml.Node {
	switch c := r.next(); c {
	case '{':
		n := r.node(yaml.MappingNode, "!!map")
		r.at++
		for r.next() != '}' {
			if r.b[r.at] == ',' {
				r.at++
				r.space()
			}
			n.Content = append(n.Content, r.text())
			r.next() // the colon
			r.at++
			n.Content = append(n.Content, r.value())
		}
		r.at++
		return n
	case '[':
		n := r.node(yaml.SequenceNode, "!!seq")
		r.at++
		for r.next() != ']' {
			if r.b[r.at] == ',' {
				r.at++
			}
			n.Content = append(n.Content, r.value())
		}
		r.at++
		return n
	case '"':
		return r.text()
	default:
		return r.word()
	}
}

// text reads a string.
func (r *jsonReader) text() *yaml.Node {
	n := r.node(yaml.ScalarNode, "!!str")
	n.Style = yaml.DoubleQuotedStyle
	start, escaped := r.at, false
	for r.at++; r.b[r.at] != '"'; r.at++ {
		if r.b[r.at] == '\\' {
			escaped = true
			r.at++
		}
	}
	r.at++
	if raw := r.b[start:r.at]; escaped {
		_ = json.Unmarshal([]byte(raw), &n.Value) // valid, as all of b is
	} else {
		n.Value = raw[1 : len(raw)-1]
	}
	return n
}

// word reads a number, true, false or null.
func (r *jsonReader) word() *yaml.Node {
	n := r.node(yaml.ScalarNode, "!!int")
	start := r.at
	for r.at < len(r.b) && !strings.ContainsRune(" \t\r\n,]}", rune(r.b[r.at])) {
		r.at++
	}
	switch n.Value = r.b[start:r.at]; {
	case n.Value == "null":
		n.Tag = "!!null"
	case n.Value == "true" || n.Value == "false":
		n.Tag = "!!bool"
	case strings.ContainsAny(n.Value, ".eE"):
		n.Tag = "!!float"
	}
	return n
}
