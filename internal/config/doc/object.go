package doc

import (
	"strings"

	"go.yaml.in/yaml/v3"
)

// Object is a mapping whose keys the schema knows.
type Object struct {
	Value
	lenient bool
}

// Object returns a mapping that may have the known keys and no others.
func (v Value) Object(known ...string) (*Object, bool) { return v.object(false, known) }

// LenientObject returns a mapping as Go's encoding/json reads it into a struct: the case of its keys does not
// matter, null is as good as absent, and unknown keys are ignored, with a warning.
func (v Value) LenientObject(known ...string) (*Object, bool) { return v.object(true, known) }

func (v Value) object(lenient bool, known []string) (*Object, bool) {
	o := &Object{Value: v, lenient: lenient}
	if v.node.Kind != yaml.MappingNode {
		v.want("a mapping")
		return o, false
	}
	var seen map[string]string
	for i := 0; i+1 < len(v.node.Content); i += 2 {
		key := v.node.Content[i]
		if key.Kind != yaml.ScalarNode || key.ShortTag() == "!!merge" {
			continue // reported by checkTree
		}
		name, fits := find(known, key.Value, lenient)
		switch {
		case !fits && lenient:
			unread := o.entry(i)
			unread.node = key // the place is the key's: nothing in the value is read
			unread.Warn("unknown key: ignored")
		case !fits:
			o.entry(i).KeyFault("unknown key%s", meant(known, key.Value))
		case lenient:
			if seen == nil {
				seen = make(map[string]string, len(known))
			}
			if first, twice := seen[name]; twice && first != key.Value {
				v.faultAt(key, "keys %s and %s are the same: their case does not matter", quote(first), quote(key.Value))
			}
			seen[name] = key.Value
		}
	}
	return o, true
}

func find(known []string, key string, fold bool) (string, bool) {
	for _, k := range known {
		if k == key || fold && strings.EqualFold(k, key) {
			return k, true
		}
	}
	return "", false
}

// meant returns a hint for a key that is nearly a known one.
func meant(known []string, key string) string {
	for _, k := range known {
		if strings.EqualFold(k, key) || strings.EqualFold(k, strings.NewReplacer("-", "", "_", "").Replace(key)) ||
			strings.EqualFold(k, key+"s") || strings.EqualFold(k+"s", key) {
			return ": did you mean " + k + "?"
		}
	}
	const few = 16
	if len(known) > few {
		return ""
	}
	return ": want " + strings.Join(known, ", ")
}

// Get returns the value of a key, and false where there is none.
func (o *Object) Get(key string) (Value, bool) {
	content := o.node.Content
	for i := 0; i+1 < len(content); i += 2 {
		k := content[i].Value
		if content[i].Kind != yaml.ScalarNode || k != key && (!o.lenient || !strings.EqualFold(k, key)) {
			continue
		}
		v := o.entry(i)
		v.key = key // as the schema writes it
		if o.lenient && v.IsNull() {
			return Value{}, false
		}
		return v, true
	}
	return Value{}, false
}

// Need is Get, and reports a key that is not there.
func (o *Object) Need(key string) (Value, bool) {
	v, ok := o.Get(key)
	if !ok {
		o.Fault("%s is missing", key)
	}
	return v, ok
}
