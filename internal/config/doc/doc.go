// Package doc reads YAML and JSON documents strictly, as trees in which every value knows its path and its place, so
// that whoever reads one can name all of its faults at once.
//
// Strictly means: one document; every key once; plain values only, so no aliases, merge keys or tags, and nothing
// that would mean another thing than it looks. No input makes it panic, and the cost is in proportion to the input.
package doc

import (
	"bytes"
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"regexp"
	"strconv"
	"strings"
	"unicode/utf8"

	"go.yaml.in/yaml/v3"
)

// Parse reads the one document in b. Its second result is false where b is no document at all; the report says why.
// Faults that leave the rest readable, such as a key given twice, are reported too, and the value is returned.
func Parse(b []byte, report *Report) (Value, bool) { return ParsePart(b, "", report) }

// ParsePart reads a document that stands for one part of a larger one: paths begin with the part's name.
func ParsePart(b []byte, part string, report *Report) (Value, bool) {
	root := Value{report: report}
	if part != "" {
		root.parent, root.key = &Value{node: &yaml.Node{Kind: yaml.MappingNode}, report: report}, part
	}
	fail := func(line int, format string, args ...any) (Value, bool) {
		report.add(&report.faults, entry{line: line}, cmp.Or(part, documentWhere), fmt.Sprintf(format, args...))
		return Value{}, false
	}
	b = bytes.TrimPrefix(b, []byte("\ufeff"))
	if bytes.HasPrefix(b, []byte("\xff\xfe")) || bytes.HasPrefix(b, []byte("\xfe\xff")) {
		return fail(0, "is UTF-16: want UTF-8")
	}
	if at := invalidUTF8(b); at >= 0 {
		return fail(1+bytes.Count(b[:at], []byte("\n")), "byte 0x%02x is not UTF-8", b[at])
	}
	if at := bytes.IndexByte(b, 0); at >= 0 {
		return fail(1+bytes.Count(b[:at], []byte("\n")), "holds a NUL byte: it is not text")
	}
	if trimmed := bytes.TrimSpace(b); len(trimmed) > 0 && trimmed[0] == '{' && json.Valid(b) {
		root.node = parseJSON(b)
	} else {
		node, line, err := parseYAML(b)
		if err != nil {
			return fail(min(line, 1+bytes.Count(bytes.TrimSuffix(b, []byte("\n")), []byte("\n"))), "%v", err)
		}
		root.node = node
	}
	if root.node == nil {
		return fail(0, "is empty")
	}
	root.checkTree(0)
	return root, true
}

// documentWhere is the place of faults that concern all of a document.
const documentWhere = "document"

func invalidUTF8(b []byte) int {
	if utf8.Valid(b) {
		return -1
	}
	for i := 0; i < len(b); {
		r, size := utf8.DecodeRune(b[i:])
		if r == utf8.RuneError && size == 1 {
			return i
		}
		i += size
	}
	return -1
}

// yamlLine finds the line in the messages of the YAML library.
var yamlLine = regexp.MustCompile(`^yaml: (?:line (\d+): )?`)

// parseYAML returns the root of the one document in b, or nil where there is none.
func parseYAML(b []byte) (_ *yaml.Node, line int, err error) {
	defer func() {
		// The library reports by panic inside; should one of its own bugs get out, it costs this document only.
		if r := recover(); r != nil {
			err = fmt.Errorf("the YAML library failed: %v", r)
		}
	}()
	decoder := yaml.NewDecoder(bytes.NewReader(b))
	var document, second yaml.Node
	switch err := decoder.Decode(&document); {
	case errors.Is(err, io.EOF):
		return nil, 0, nil
	case err != nil:
		return nil, lineOf(err), tidy(err)
	}
	switch err := decoder.Decode(&second); {
	case err == nil:
		return nil, second.Line, errors.New("a second document begins here: want one")
	case !errors.Is(err, io.EOF):
		return nil, lineOf(err), tidy(err)
	}
	if len(document.Content) != 1 {
		return nil, 0, nil
	}
	return document.Content[0], 0, nil
}

// parserErrors are the messages of the library that count lines from 0, where all others count from 1.
var parserErrors = regexp.MustCompile(`did not find expected (<|node content|key|'-' indicator|',' or)`)

// lineOf finds the line of a syntax error: of what is wrong, or of where that began. The library names none for the
// first one.
func lineOf(err error) int {
	m := yamlLine.FindStringSubmatch(err.Error())
	if m == nil {
		return 0
	}
	line, _ := strconv.Atoi(m[1])
	if strings.Contains(err.Error(), "unknown anchor") {
		return line // which it never names
	}
	if line == 0 || parserErrors.MatchString(err.Error()) {
		line++
	}
	return line
}

func tidy(err error) error {
	what := yamlLine.ReplaceAllString(err.Error(), "")
	if strings.Contains(what, "cannot start any token") {
		what += " (a tab where YAML wants spaces, or a sign that needs quotes)"
	}
	return fmt.Errorf("syntax error: %s", what)
}

// maxDepth is how deep a document may be nested: several times what any of ours is.
const maxDepth = 32

// checkTree reports what no document may hold, wherever it is.
func (v *Value) checkTree(depth int) {
	v.checkNode()
	if depth == maxDepth {
		v.Fault("is nested more than %d deep", maxDepth)
		return
	}
	switch v.node.Kind {
	case yaml.MappingNode:
		first := firstOf(v.node.Content)
		for i := 0; i+1 < len(v.node.Content); i += 2 {
			key := v.node.Content[i]
			switch {
			case key.Kind != yaml.ScalarNode:
				v.faultAt(key, "a key that is %s: want a plain one", kindOf(key))
			case key.ShortTag() == "!!merge":
				v.faultAt(key, "merge keys are not supported: write the values out")
			case key.Style&yaml.TaggedStyle != 0 || key.Anchor != "":
				v.faultAt(key, "key %s: tags and anchors are not supported", quote(key.Value))
			default:
				if f := first(i); f != key {
					v.entry(i).KeyFault("given twice, first at line %d:%d", f.Line, f.Column)
				}
			}
			if child := v.node.Content[i+1]; !plain(child) {
				child := v.entry(i)
				child.checkTree(depth + 1)
			}
		}
	case yaml.SequenceNode:
		for i, child := range v.node.Content {
			if !plain(child) {
				child := v.element(i)
				child.checkTree(depth + 1)
			}
		}
	}
}

// plain reports whether there is nothing to be said against a node, nor anything in it.
func plain(n *yaml.Node) bool {
	return n.Kind == yaml.ScalarNode && n.Anchor == "" && n.Style&yaml.TaggedStyle == 0
}

// firstOf returns a function that finds the first key with the text of the one at i, in a mapping's content.
func firstOf(content []*yaml.Node) func(i int) *yaml.Node {
	const few = 32
	if len(content) <= few {
		return func(i int) *yaml.Node {
			for j := 0; j < i; j += 2 {
				if content[j].Kind == yaml.ScalarNode && content[j].Value == content[i].Value {
					return content[j]
				}
			}
			return content[i]
		}
	}
	first := make(map[string]*yaml.Node, len(content)/2)
	return func(i int) *yaml.Node {
		if f, found := first[content[i].Value]; found {
			return f
		}
		first[content[i].Value] = content[i]
		return content[i]
	}
}

func (v *Value) checkNode() {
	switch n := v.node; {
	case n.Kind == yaml.AliasNode:
		v.Fault("alias *%s: aliases are not supported: write the value out", n.Value)
	case n.Anchor != "":
		v.Fault("anchor &%s: anchors and aliases are not supported", n.Anchor)
	case n.Style&yaml.TaggedStyle != 0:
		v.Fault("tag %s: tags are not supported", n.Tag)
	}
}
