package kube

import (
	"errors"

	"github.com/ravel-lb/ravel"
	"github.com/ravel-lb/ravel/internal/config"
)

// document is one key of the ConfigMap: its last good content, and why it is not as it now is.
type document[T any] struct {
	where string // configmap ns/name key k
	of    string // configmap ns/name
	parse func([]byte) (T, []ravel.Problem, error)

	known    bool // there was a good one
	value    T
	text     string
	warnings []ravel.Problem
	seen     string          // the text that was last looked at
	looked   bool            // some was
	faults   []ravel.Problem // of what is there now
	whole    bool            // the fault is that there is no document
}

// content is what the ConfigMap has for a document.
type content struct {
	there, has, binary bool
	text               string
}

// look takes the document as it now is, and reports whether the value in force is another one by it.
func (d *document[T]) look(c content) bool {
	switch {
	case !c.there:
		d.refuse(d.of, "is not there", "make it, or correct --config-namespace and --config-name")
	case !c.has && c.binary:
		d.refuse(d.where, "is under binaryData: it is not text", "put it under data, as text")
	case !c.has:
		d.refuse(d.where, "is not in the ConfigMap", "put the document under that key, or correct --config-key and --fleet-key")
	case d.looked && d.seen == c.text:
		return false
	default:
		d.seen, d.looked = c.text, true
		return d.read(c.text)
	}
	d.looked = false
	return false
}

func (d *document[T]) read(text string) bool {
	value, warnings, err := d.parse([]byte(text))
	if err != nil {
		d.faults, d.whole = nil, false
		var e *config.Error
		if !errors.As(err, &e) {
			d.refuse(d.where, err.Error(), "")
			return false
		}
		for _, f := range e.Faults {
			d.faults = append(d.faults, ravel.Problem{Where: d.where + ": " + f.Where, What: f.What})
		}
		return false
	}
	d.faults = nil
	if d.known && d.text == text {
		return false
	}
	d.known, d.value, d.text, d.warnings = true, value, text, warnings
	return true
}

func (d *document[T]) refuse(where, what, fix string) {
	d.faults, d.whole = []ravel.Problem{{Where: where, What: what, Fix: fix}}, true
}

// remember takes the last good text of an earlier process.
func (d *document[T]) remember(text string) {
	if text == "" || d.known {
		return
	}
	value, warnings, err := d.parse([]byte(text))
	if err == nil {
		d.known, d.value, d.text, d.warnings = true, value, text, warnings
	}
}

// problems are the faults, and what they mean.
func (d *document[T]) problems() []ravel.Problem {
	if len(d.faults) == 0 {
		return nil
	}
	means := "the last good one stays in force"
	if !d.known {
		means = "there was no good one before"
	}
	if d.whole {
		f := d.faults[0]
		f.What += ": " + means
		return []ravel.Problem{f}
	}
	return append([]ravel.Problem{{
		Where: d.where, What: "the document cannot be used: " + means, Fix: "mend the places that are named with it",
	}}, d.faults...)
}
