package kube

import (
	"errors"
	"fmt"

	"github.com/ravel-lb/ravel"
	"github.com/ravel-lb/ravel/internal/config"
)

// document is one key of the ConfigMap: its last good content, and why it is not as it now is.
type document[T any] struct {
	where string // configmap ns/name key k
	parse func([]byte) (T, []ravel.Problem, error)

	known    bool // there was a good one
	value    T
	text     string
	warnings []ravel.Problem
	seen     string          // the text that was last looked at
	looked   bool            // some was
	faults   []ravel.Problem // of what is there now
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
		d.refuse("is not there", "")
	case !c.has && c.binary:
		d.refuse("is under binaryData: it is not text", "")
	case !c.has:
		d.refuse("is not in the ConfigMap", "")
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
		d.faults = nil
		var e *config.Error
		if !errors.As(err, &e) {
			d.refuse(err.Error(), "")
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

func (d *document[T]) refuse(what, fix string) {
	d.faults = []ravel.Problem{{Where: d.where, What: what, Fix: fix}}
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
	problems := []ravel.Problem{{Where: d.where, What: fmt.Sprintf("the document cannot be used: %s", means)}}
	if d.faults[0].Where == d.where {
		problems[0].What = fmt.Sprintf("%s: %s", d.faults[0].What, means)
		return problems
	}
	return append(problems, d.faults...)
}
