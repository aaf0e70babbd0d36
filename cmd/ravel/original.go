package main

import (
	"encoding/csv"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"github.com/urfave/cli/v2"
	"go.yaml.in/yaml/v3"

	"github.com/ravel-lb/ravel/internal/config/doc"
	"github.com/ravel-lb/ravel/internal/settings"
)

// oldProgram is another name of the original's program.
const oldProgram = "kube2ipvs"

// fromOriginal makes a command line of ours of one that was written for the original Ravel. One that is ours already comes
// back as it is: that is every one that has no flag, no key in its file and no variable that is the original's alone. What
// is to be known of the change is in notes. The error is a usageError: all that has another place now, or that the
// command is to be called otherwise.
func fromOriginal(args []string, commands []*cli.Command) (ours, notes []string, err error) {
	if len(args) == 0 {
		return args, nil, nil
	}
	old := filepath.Base(args[0]) == oldProgram
	sub, rest := oldCommand(args[1:])
	switch {
	case sub == "bgp" || old && (sub == directorRole || sub == realserverRole):
	case old:
		return nil, nil, usageError{fmt.Errorf("%s is the original's name: run instead\n\n  ravel --help", oldProgram)}
	case sub != directorRole && sub != realserverRole:
		return args, nil, nil
	}
	role := sub
	if sub == "bgp" {
		role = directorRole
	}
	o := newOldLine(role, commands)
	if !o.read(rest) && !old && sub == role {
		return args, nil, nil
	}
	o.translate()
	if old || sub != role {
		return nil, nil, usageError{errors.New(o.advice(strings.TrimSpace(filepath.Base(args[0]) + " " + sub)))}
	}
	if len(o.faults) > 0 {
		return nil, nil, usageError{errors.Join(o.faults...)}
	}
	return slices.Concat(args[:1], []string{role}, o.args, o.behind), o.notes, nil
}

// oldCommand finds the subcommand, which the original's flags could stand before, and returns the other words.
func oldCommand(words []string) (sub string, rest []string) {
	for i := 0; i < len(words); i++ {
		w := words[i]
		if w == "--" {
			break
		}
		if !strings.HasPrefix(w, "-") {
			return w, slices.Concat(words[:i], words[i+1:])
		}
		if f := findOld(strings.TrimLeft(w, "-")); f != nil && f.kind != oldSwitch {
			i++ // its value
		}
	}
	return "", words
}

// oldLine is a command line of the original on its way.
type oldLine struct {
	role  string
	flags map[string]cli.Flag // the role's own, by every name
	known map[string]bool     // the names of all settings there are

	values map[string][]string // of the original's flags, the command line's before the file's
	alone  bool                // something in it is the original's alone
	given  map[string]bool     // flags of ours that are given
	file   []string            // flags of ours that the file has
	behind []string            // words that are none of the original's flags, as they are

	args                 []string // the result
	idle                 []string
	notes                []string
	faults               []error
	statsAddr, statsPort string
}

func newOldLine(role string, commands []*cli.Command) *oldLine {
	o := &oldLine{
		role: role, flags: map[string]cli.Flag{}, known: map[string]bool{}, values: map[string][]string{}, given: map[string]bool{},
	}
	for _, c := range commands {
		if c.Name != role {
			continue
		}
		for _, f := range c.Flags {
			for _, name := range f.Names() {
				o.flags[name] = f
			}
		}
	}
	for _, f := range others() {
		for _, name := range f.Names() {
			o.known[name] = true
		}
	}
	return o
}

func (o *oldLine) note(format string, args ...any) {
	o.notes = append(o.notes, fmt.Sprintf(format, args...))
}

func (o *oldLine) refuse(name, format string, args ...any) {
	o.faults = append(o.faults, fmt.Errorf("%s: %s", name, fmt.Sprintf(format, args...)))
}

// has reports whether a flag of ours is given: by the line, its variable or the file.
func (o *oldLine) has(name string) bool {
	_, set := os.LookupEnv(settings.Variable(name))
	return set || o.given[name]
}

// flag gives a flag of ours.
func (o *oldLine) flag(name, value string) {
	o.given[name] = true
	o.args = append(o.args, "--"+name+"="+value)
}

// read sorts the words, and reads the file that they name. It reports whether any of it is the original's alone.
func (o *oldLine) read(words []string) bool {
	for i := 0; i < len(words); i++ {
		w := words[i]
		name, value, has := strings.Cut(strings.TrimLeft(w, "-"), "=")
		f := findOld(name)
		switch {
		case w == "--":
			o.behind = append(o.behind, words[i:]...)
			i = len(words)
			continue
		case f == nil || !strings.HasPrefix(w, "-"):
			o.behind = append(o.behind, w)
			if strings.HasPrefix(w, "-") {
				o.given[name] = true
				if flag, is := o.flags[name].(cli.DocGenerationFlag); is && flag.TakesValue() && !has && i+1 < len(words) {
					i++
					o.behind = append(o.behind, words[i])
				}
			}
			continue
		case has:
		case f.kind == oldSwitch:
			value = "true"
			if i+1 < len(words) && isBool(words[i+1]) {
				i++
				o.alone = true
				if on, _ := strconv.ParseBool(words[i]); on {
					break // as it says
				}
				o.note("--%s %s: the original read this as true, and so does Ravel, for %[2]q is a word of its own; "+
					"write --%[1]s=%[2]s, or leave it out", name, words[i])
			}
		case i+1 == len(words):
			o.refuse("--"+name, "has no value")
			o.alone = o.alone || o.flags[name] == nil
			continue
		default:
			i++
			value = words[i]
		}
		o.alone = o.alone || o.flags[name] == nil
		o.add(f, value)
	}
	for _, v := range oldVariables {
		if _, set := os.LookupEnv(v.name); set && v.alone {
			o.alone = true
		}
	}
	o.readFile()
	return o.alone
}

func isBool(word string) bool {
	_, err := strconv.ParseBool(word)
	return err == nil
}

// add notes one more value of a flag.
func (o *oldLine) add(f *oldFlag, value string) {
	all := []string{value}
	switch f.kind {
	case oldList:
		if fields, err := csv.NewReader(strings.NewReader(value)).Read(); err == nil {
			all = fields
		}
	case oldSwitch:
		on, err := strconv.ParseBool(value)
		if err != nil {
			o.refuse("--"+f.name, "want true or false, got %q", value)
			return
		}
		all = []string{strconv.FormatBool(on)}
	}
	o.values[f.name] = append(o.values[f.name], all...)
}

// readFile reads the file of --config if it has a key that is the original's alone. Other files, and faulty ones, are
// left to be read as ours.
func (o *oldLine) readFile() {
	path := os.Getenv(settings.Variable(settings.ConfigFlag))
	given := o.values[settings.ConfigFlag]
	if len(given) > 0 {
		path = last(given)
	}
	if path == "" {
		return
	}
	b, _, err := doc.ReadFile(path)
	if err != nil {
		return
	}
	var keys map[string]any
	if yaml.Unmarshal(b, &keys) != nil {
		return
	}
	alone := false
	for key := range keys {
		key = strings.ToLower(key)
		alone = alone || findOld(key) != nil && o.flags[key] == nil && !o.known[key]
	}
	if !alone && !o.alone {
		return
	}
	o.alone = true
	delete(o.values, settings.ConfigFlag)
	if len(given) == 0 {
		o.file = append(o.file, "--"+settings.ConfigFlag+"=") // not by its variable either
	}
	for _, key := range slices.Sorted(maps.Keys(keys)) {
		name := strings.ToLower(key)
		f := findOld(name)
		switch {
		case f != nil && len(o.values[name]) > 0: // the command line wins
		case f != nil:
			for _, value := range plain(keys[key]) {
				o.add(f, value)
			}
		case o.flags[name] != nil && !o.has(name):
			for _, value := range plain(keys[key]) {
				o.file = append(o.file, "--"+name+"="+value)
			}
			o.given[name] = true
		case o.flags[name] != nil, o.known[name]:
		default:
			o.refuse(path, "%s: is no setting, neither here nor of the original", key)
		}
	}
}

// plain returns a value of the file as the command line has it.
func plain(value any) []string {
	switch v := value.(type) {
	case nil:
		return nil
	case []any:
		var all []string
		for _, one := range v {
			all = append(all, plain(one)...)
		}
		return all
	}
	return []string{fmt.Sprint(value)}
}

// translate makes the flags of ours.
func (o *oldLine) translate() {
	o.args = append(o.args, o.file...)
	for i := range oldFlags {
		f := &oldFlags[i]
		values := o.values[f.name]
		switch {
		case len(values) == 0:
		case f.fate == idle, f.only != "" && f.only != o.role:
			o.idle = append(o.idle, "--"+f.name)
		case f.fate == refused && !slices.ContainsFunc(values, func(v string) bool { return !slices.Contains(f.allow, v) }):
		case f.kind == oldText && last(values) == "": // as if it were not given
		case f.become != nil:
			f.become(o, values)
		case f.fate == refused:
			o.refuse("--"+f.name, "%s: see %s", f.why, strings.ReplaceAll(f.to, "`", ""))
		default:
			o.flag(f.name, last(values))
		}
	}
	o.listen()
	for _, v := range oldVariables {
		switch value, set := os.LookupEnv(v.name); {
		case !set:
		case v.become != nil:
			v.become(o, value)
		default:
			o.idle = append(o.idle, v.name)
		}
	}
	o.defaults()
	if len(o.idle) > 0 {
		o.note("without effect here: %s", strings.Join(o.idle, ", "))
	}
}

// oldNamespace is the one that the original read its ConfigMap from, whatever its flag said.
const oldNamespace = "platform-load-balancer"

// defaults are those of the original that packets, or what is read, depend on.
func (o *oldLine) defaults() {
	if o.role == realserverRole && !o.has("iptables-masq") {
		o.flag("iptables-masq", "true")
		o.note("--iptables-masq=true is added, because it was the original's default: " +
			"pods see their node's address, not the client's")
	}
	if !o.given["config-name"] {
		return
	}
	switch given := o.values["config-namespace"]; {
	case len(given) == 0 && !o.has("config-namespace"):
		o.flag("config-namespace", oldNamespace)
	case len(given) > 0 && last(given) != oldNamespace:
		o.note("--config-namespace=%s counts here; the original always read %s", last(given), oldNamespace)
	}
}

// advice says what to run instead.
func (o *oldLine) advice(called string) string {
	var b strings.Builder
	words := append([]string{"ravel", o.role}, slices.Concat(o.args, o.behind)...)
	for i, w := range words {
		words[i] = shellWord(w)
	}
	fmt.Fprintf(&b, "%q is of the original Ravel", called)
	if o.role == directorRole {
		b.WriteString(", and a director announces by BGP itself, without gobgpd")
	}
	fmt.Fprintf(&b, ". Run instead\n\n  %s\n", strings.Join(words, " "))
	if len(o.faults) > 0 {
		fmt.Fprintf(&b, "\nwhen this has found its place:\n%v\n", indent(errors.Join(o.faults...).Error()))
	}
	for _, n := range o.notes {
		b.WriteString("\n" + n)
	}
	return strings.TrimRight(b.String(), "\n")
}

func indent(lines string) string { return "  " + strings.ReplaceAll(lines, "\n", "\n  ") }

// shellWord quotes a word where a shell would read it otherwise.
func shellWord(w string) string {
	if w != "" && !strings.ContainsFunc(w, func(r rune) bool {
		return !strings.ContainsRune("-_=./:,@%+", r) && (r < '0' || r > '9') && (r < 'a' || r > 'z') && (r < 'A' || r > 'Z')
	}) {
		return w
	}
	return "'" + strings.ReplaceAll(w, "'", `'\''`) + "'"
}

// warnOf writes notes where a user sees them.
func warnOf(w io.Writer, notes []string) {
	for _, n := range notes {
		fmt.Fprintln(w, "ravel:", n)
	}
}
