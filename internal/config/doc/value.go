package doc

import (
	"fmt"
	"math"
	"net/netip"
	"strconv"
	"strings"
	"time"

	"go.yaml.in/yaml/v3"
)

// Value is one value of a document. Its methods that return a bool report a fault when they return false, unless one
// was reported for this value before.
type Value struct {
	node   *yaml.Node
	label  *yaml.Node // its key; nil in a list
	report *Report
	parent *Value // nil for the root
	key    string // in a mapping
	index  int    // in a list
}

// entry returns the value at i in a mapping's content, where keys and values alternate.
func (v *Value) entry(i int) Value {
	key := v.node.Content[i]
	return Value{node: v.node.Content[i+1], label: key, report: v.report, parent: v, key: key.Value}
}

// element returns an element of a list.
func (v *Value) element(i int) Value {
	return Value{node: v.node.Content[i], report: v.report, parent: v, index: i}
}

// Path returns where the value is: fleet.peers[0].address, cluster.config["192.0.2.1"]["80"].
func (v Value) Path() string {
	if v.parent == nil {
		return ""
	}
	above := v.parent.Path()
	switch {
	case v.parent.node.Kind == yaml.SequenceNode:
		return above + "[" + strconv.Itoa(v.index) + "]"
	case !plainKey(v.key):
		return above + "[" + quote(v.key) + "]"
	case above == "":
		return v.key
	default:
		return above + "." + v.key
	}
}

// plainKey reports whether a key needs no quotes in a path: it is a word.
func plainKey(key string) bool {
	for i := range len(key) {
		c := key[i] | 0x20
		if (c < 'a' || c > 'z') && (i == 0 || key[i] != '-' && (key[i] < '0' || key[i] > '9')) {
			return false
		}
	}
	return key != "" && len(key) <= 80
}

// Line returns the line of the value, or of its key, from 1.
func (v Value) Line() int {
	if v.label != nil {
		return v.label.Line
	}
	return v.node.Line
}

// Fault reports that the document cannot be used because of this value.
func (v Value) Fault(format string, args ...any) { v.faultAt(v.node, format, args...) }

func (v Value) faultAt(n *yaml.Node, format string, args ...any) {
	v.report.add(&v.report.faults, entry{line: n.Line, column: n.Column}, v.where(), fmt.Sprintf(format, args...))
}

// KeyFault is Fault, with the place of the value's key.
func (v Value) KeyFault(format string, args ...any) {
	if v.label == nil {
		v.Fault(format, args...)
		return
	}
	v.faultAt(v.label, format, args...)
}

// Warn reports that this value, or a part of it, is left out.
func (v Value) Warn(format string, args ...any) {
	e := entry{line: v.node.Line, column: v.node.Column}
	v.report.add(&v.report.warnings, e, v.where(), fmt.Sprintf(format, args...))
}

func (v Value) where() string {
	if path := v.Path(); path != "" {
		return path
	}
	return documentWhere
}

// IsNull reports whether the value is null, or nothing at all.
func (v Value) IsNull() bool { return v.is("!!null") }

// IsWrittenNull reports whether the value is null and somebody wrote that: nothing at all may be what was cut off.
func (v Value) IsWrittenNull() bool { return v.IsNull() && v.node.Value != "" }

// Key returns the value's key in a mapping.
func (v Value) Key() string { return v.key }

func (v Value) is(tag string) bool { return v.node.Kind == yaml.ScalarNode && v.node.ShortTag() == tag }

// want reports a value of a wrong kind.
func (v Value) want(what string) {
	if v.node.Kind == yaml.AliasNode || v.node.Style&yaml.TaggedStyle != 0 {
		return // reported by checkTree
	}
	v.Fault("want %s, got %s", what, kindOf(v.node))
}

// kindOf names what a node is, for people.
func kindOf(n *yaml.Node) string {
	switch n.Kind {
	case yaml.MappingNode:
		return "a mapping"
	case yaml.SequenceNode:
		return "a list"
	case yaml.AliasNode:
		return "an alias"
	}
	switch n.ShortTag() {
	case "!!null":
		return "nothing"
	case "!!bool", "!!int", "!!float":
		return shorten(n.Value)
	case "!!timestamp":
		return "the date " + shorten(n.Value)
	case "!!merge":
		return `"<<"`
	}
	return "the string " + quote(n.Value)
}

// quote quotes s for a message, cut to a length that a line can bear.
func quote(s string) string { return strconv.Quote(shorten(s)) }

func shorten(s string) string {
	const most = 80
	if len(s) <= most {
		return s
	}
	return strings.ToValidUTF8(s[:most], "") + "…"
}

// Text returns a string. Anything that YAML takes for another type is refused: who means a string can quote it.
func (v Value) Text() (string, bool) {
	if v.is("!!str") {
		return v.node.Value, true
	}
	if v.node.Kind == yaml.ScalarNode && !v.IsNull() {
		v.want("a string (put it in quotes)")
	} else {
		v.want("a string")
	}
	return "", false
}

// Bool returns true or false.
func (v Value) Bool() (value, ok bool) {
	if v.is("!!bool") {
		switch v.node.Value {
		case "true", "True", "TRUE":
			return true, true
		case "false", "False", "FALSE":
			return false, true
		}
	}
	v.want("true or false")
	return false, false
}

// Int returns a whole number from least to most, written in decimal digits.
func (v Value) Int(least, most int64) (int64, bool) {
	if !v.is("!!int") {
		if v.is("!!str") {
			v.want("a number without quotes")
		} else {
			v.want("a whole number")
		}
		return 0, false
	}
	i, ok := decimal(v.node.Value, least, most)
	if !ok {
		v.Fault("%s: want %d to %d", shorten(v.node.Value), least, most)
	}
	return i, ok
}

// Bits returns a whole number in decimal digits, or in hexadecimal ones after 0x.
func (v Value) Bits() (int64, bool) {
	if !v.is("!!int") {
		return v.Int(math.MinInt64, math.MaxInt64)
	}
	digits, hex := strings.CutPrefix(v.node.Value, "0x")
	if !hex {
		return v.Int(math.MinInt64, math.MaxInt64)
	}
	i, err := strconv.ParseInt(digits, 16, 64)
	if err != nil {
		v.Fault("%s is not a number of 63 bits", shorten(v.node.Value))
		return 0, false
	}
	return i, true
}

func decimal(s string, least, most int64) (int64, bool) {
	digits := strings.TrimPrefix(s, "-")
	if digits == "" || strings.Trim(digits, "0123456789") != "" || len(digits) > 1 && digits[0] == '0' {
		return 0, false
	}
	i, err := strconv.ParseInt(s, 10, 64)
	return i, err == nil && i >= least && i <= most
}

// Plain returns the characters of a string, or of a number as it was written.
func (v Value) Plain() (string, bool) {
	if v.is("!!str") || v.is("!!int") || v.is("!!float") {
		return v.node.Value, true
	}
	v.want("a string or a number")
	return "", false
}

// KeyInt returns the value's key as a whole number from least to most, in decimal digits; name is what it is.
func (v Value) KeyInt(name string, least, most int64) (int64, bool) {
	i, ok := decimal(v.key, least, most)
	if !ok {
		v.KeyFault("%s %s: want %d to %d", name, shorten(v.key), least, most)
	}
	return i, ok
}

// Duration returns a time such as "3s" or "1m30s" from least to most.
func (v Value) Duration(least, most time.Duration) (time.Duration, bool) {
	if !v.is("!!str") {
		v.want(`a duration such as "3s"`)
		return 0, false
	}
	d, err := time.ParseDuration(v.node.Value)
	switch {
	case err != nil:
		v.Fault(`duration %s: want a number and a unit such as "3s"`, quote(v.node.Value))
		return 0, false
	case d < least || d > most:
		v.Fault("duration %s: want %s to %s", d, least, most)
		return 0, false
	}
	return d, true
}

// Addr returns an address that one host may have: no zone, not IPv4 in an IPv6 dress, not loopback, multicast,
// link-local, broadcast or the unspecified one.
func (v Value) Addr() (netip.Addr, bool) {
	s, ok := v.Text()
	if !ok {
		return netip.Addr{}, false
	}
	addr, why := hostAddr(s)
	if why != "" {
		v.Fault("%s", why)
	}
	return addr, why == ""
}

// KeyAddr is Addr for the value's key.
func (v Value) KeyAddr() (netip.Addr, bool) {
	addr, why := hostAddr(v.key)
	if why != "" {
		v.KeyFault("%s", why)
	}
	return addr, why == ""
}

// HostAddr returns an address that one host may have, as Addr does, or why s is none.
func HostAddr(s string) (addr netip.Addr, why string) { return hostAddr(s) }

func hostAddr(s string) (_ netip.Addr, why string) {
	addr, err := netip.ParseAddr(s)
	if err != nil {
		return addr, quote(s) + " is no IP address"
	}
	switch {
	case addr.Zone() != "":
		why = "has a zone"
	case addr.Is4In6():
		why = "is an IPv4-mapped IPv6 address: write " + addr.Unmap().String()
	case addr.IsUnspecified():
		why = "is the unspecified address"
	case addr.IsLoopback():
		why = "is a loopback address"
	case addr.IsMulticast():
		why = "is a multicast address"
	case addr.IsLinkLocalUnicast():
		why = "is a link-local address"
	case addr.Is4() && addr.As4()[0] == 0:
		why = "is an address of \"this network\" (RFC 1122)"
	case addr == netip.AddrFrom4([4]byte{255, 255, 255, 255}):
		why = "is the broadcast address"
	default:
		return addr, ""
	}
	return netip.Addr{}, s + " " + why + ": want an address that a host can have"
}

// List returns the elements of a list; null is an empty one.
func (v Value) List() ([]Value, bool) {
	if v.IsNull() {
		return nil, true
	}
	if v.node.Kind != yaml.SequenceNode {
		v.want("a list")
		return nil, false
	}
	values := make([]Value, len(v.node.Content))
	for i := range values {
		values[i] = v.element(i)
	}
	return values, true
}

// Entries returns the values of a mapping whose keys are data, each key once; null is an empty one.
func (v Value) Entries() ([]Value, bool) {
	if v.IsNull() {
		return nil, true
	}
	if v.node.Kind != yaml.MappingNode {
		v.want("a mapping")
		return nil, false
	}
	var values []Value
	seen := make(map[string]bool, len(v.node.Content)/2)
	for i := 0; i+1 < len(v.node.Content); i += 2 {
		key := v.node.Content[i]
		if key.Kind != yaml.ScalarNode || key.ShortTag() == "!!merge" || seen[key.Value] {
			continue // reported by checkTree
		}
		seen[key.Value] = true
		values = append(values, v.entry(i))
	}
	return values, true
}

// TextMap returns a mapping of strings; null is an empty one.
func (v Value) TextMap() (map[string]string, bool) {
	entries, ok := v.Entries()
	if !ok || len(entries) == 0 {
		return nil, ok
	}
	m := make(map[string]string, len(entries))
	for _, e := range entries {
		s, good := e.Text()
		if e.key == "" {
			e.KeyFault("an empty key")
		}
		m[e.key], ok = s, ok && good && e.key != ""
	}
	return m, ok
}
