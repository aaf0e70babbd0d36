package config

import (
	"fmt"
	"strings"

	"github.com/ravel-lb/ravel/internal/config/doc"
)

// kubeLabel reports whether Kubernetes allows s as the name of a namespace, a service or a port (RFC 1123 section 2.1).
func kubeLabel(s string) bool {
	return name(s, 63, func(c byte) bool { return c >= 'a' && c <= 'z' }, "-")
}

// hostLabel reports whether we allow s as the name of a machine or a pool: a little more than DNS, for hosts that
// have it.
func hostLabel(s string) bool {
	return name(s, 253, func(c byte) bool { return c|0x20 >= 'a' && c|0x20 <= 'z' }, "-_.")
}

// name reports whether s is 1 to most letters and digits, and between them characters of inner.
func name(s string, most int, letter func(byte) bool, inner string) bool {
	if s == "" || len(s) > most {
		return false
	}
	for i := range len(s) {
		edge := i == 0 || i == len(s)-1
		if c := s[i]; !letter(c) && (c < '0' || c > '9') && (edge || strings.IndexByte(inner, c) < 0) {
			return false
		}
	}
	return true
}

const (
	optional = false
	needed   = true
	strict   = false
	folded   = true
)

// kubeName reads the name of a Kubernetes object. Names are part of comments in iptables rules, so nothing else may
// pass. Folded, upper case is taken for lower, as the original compares.
func kubeName(o *doc.Object, key string, need, fold bool) string {
	name, v, ok := text(o, key, need)
	if !ok || name == "" && !need {
		return ""
	}
	if fold {
		name = strings.ToLower(name)
	}
	if !kubeLabel(name) {
		v.Fault("name %q: want 1 to 63 of the characters a-z, 0-9 and -, with none of the last at either end", name)
	}
	return name
}

// hostName reads the name of a machine or a pool.
func hostName(o *doc.Object, key string) string {
	name, v, ok := text(o, key, needed)
	if ok && !hostLabel(name) {
		v.Fault("name %q: want 1 to 253 letters, digits, -, _ and ., with a letter or digit at either end", name)
	}
	return name
}

func text(o *doc.Object, key string, need bool) (string, doc.Value, bool) {
	v, ok := o.Get(key)
	if !ok {
		if need {
			o.Fault("%s is missing", key)
		}
		return "", v, false
	}
	s, ok := v.Text()
	return s, v, ok
}

// boolean reads true or false.
func boolean(o *doc.Object, key string, otherwise bool) bool {
	v, ok := o.Get(key)
	if !ok {
		return otherwise
	}
	on, _ := v.Bool()
	return on
}

// join lists names for people.
func join[T any](names []T) string {
	return strings.Trim(strings.Join(strings.Fields(fmt.Sprint(names)), ", "), "[]")
}
