// Package settings gives the flags of a command the values that the command line did not: from the variable RAVEL_NAME,
// else from the file that --config names, a YAML mapping by the names of the flags, else the default.
//
// Everything that is wrong with the values of flags, variables and file is named at once. The file may hold the settings of other commands
// too, so that one file does for both roles.
package settings

import (
	"errors"
	"fmt"
	"os"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/urfave/cli/v2"

	"github.com/ravel-lb/ravel/internal/config/doc"
)

// ConfigFlag is the flag that names the file. It can be no key of the file.
const ConfigFlag = "config"

// Variable returns the variable of a flag: that of stop-wait is RAVEL_STOP_WAIT.
func Variable(flag string) string {
	return "RAVEL_" + strings.ToUpper(strings.ReplaceAll(flag, "-", "_"))
}

// Apply gives each flag of c's command that is not set a value, where a variable or the file has one. The file may
// have the names of others, too; they are checked and have no effect. The error is all faults, joined, one a line; the
// flags that are right have got their values nevertheless, and the others keep their defaults.
func Apply(c *cli.Context, others ...cli.Flag) error {
	var faults []error
	for _, f := range c.Command.Flags {
		if s, ours := f.(*setting); ours {
			faults = append(faults, s.faults...)
		}
		if value, set := variable(f); set && !c.IsSet(f.Names()[0]) {
			if err := setText(c, f, value); err != nil {
				faults = append(faults, fmt.Errorf("%s: %w", Variable(f.Names()[0]), err))
			}
		}
	}
	if path := c.String(ConfigFlag); path != "" {
		faults = append(faults, applyFile(c, path, others)...)
	}
	return errors.Join(faults...)
}

// variable returns the value of a flag's variable. Those of flags that Flags did not make are cli's own affair.
func variable(f cli.Flag) (string, bool) {
	if _, ours := f.(*setting); !ours {
		return "", false
	}
	value, set := os.LookupEnv(Variable(f.Names()[0]))
	if value == "" {
		// Only a string can be empty; for others that is as good as not set.
		_, text := inner(f).(*cli.StringFlag)
		set = set && text
	}
	return value, set
}

// setText gives a flag a value as the command line has it.
func setText(c *cli.Context, f cli.Flag, value string) error {
	if err := parses(f, value); err != nil {
		return err
	}
	return c.Set(f.Names()[0], value)
}

// parses returns what is wrong with a value as the command line has it.
func parses(f cli.Flag, value string) error {
	var err error
	var want string
	switch inner(f).(type) {
	case *cli.BoolFlag:
		_, err = strconv.ParseBool(value)
		want = "true or false"
	case *cli.IntFlag:
		_, err = strconv.ParseInt(value, 0, 64)
		want = "a whole number"
	case *cli.DurationFlag:
		_, err = time.ParseDuration(value)
		want = "a duration such as 3s"
	}
	if err != nil {
		return fmt.Errorf("want %s, got %q", want, value)
	}
	return nil
}

func applyFile(c *cli.Context, path string, others []cli.Flag) []error {
	b, _, err := doc.ReadFile(path)
	if err != nil {
		return []error{fmt.Errorf("%s: %w", path, err)}
	}
	if onlyComments(b) {
		return nil
	}
	var report doc.Report
	if root, ok := doc.Parse(b, &report); ok && !root.IsNull() {
		apply(c, root, others)
	}
	var faults []error
	for _, p := range report.Faults() {
		faults = append(faults, fmt.Errorf("%s: %s", path, p))
	}
	return faults
}

// onlyComments reports whether a file sets nothing, as the one that Example makes.
func onlyComments(b []byte) bool {
	for line := range strings.Lines(string(b)) {
		if line = strings.TrimSpace(line); line != "" && line[0] != '#' {
			return false
		}
	}
	return true
}

// apply gives the flags of c's command the values of the file.
func apply(c *cli.Context, root doc.Value, others []cli.Flag) {
	flags := map[string]cli.Flag{}
	var known []string
	for _, f := range slices.Concat(c.Command.Flags, others) {
		for _, name := range f.Names() {
			if _, twice := flags[name]; !twice && fileKey(f) {
				flags[name] = f
				known = append(known, name)
			}
		}
	}
	o, ok := root.Object(known...)
	if !ok {
		return
	}
	given := map[string]string{} // by first name: the key
	for _, key := range known {
		v, ok := o.Get(key)
		if !ok {
			continue
		}
		f := flags[key]
		name := f.Names()[0]
		if first, twice := given[name]; twice {
			v.KeyFault("%s and %s are the same setting", first, key)
		}
		given[name] = key
		text, ok := textOf(v, f)
		if !ok || !slices.Contains(c.Command.Flags, f) || c.IsSet(name) {
			continue
		}
		if err := c.Set(name, text); err != nil {
			v.Fault("%v", err)
		}
	}
}

// fileKey reports whether a flag can be in the file: the settings, and not what says how a command prints.
func fileKey(f cli.Flag) bool {
	_, ours := f.(*setting)
	return ours && f.Names()[0] != ConfigFlag
}

// textOf returns a value of the file as the command line has it, if it is of the flag's type.
func textOf(v doc.Value, f cli.Flag) (string, bool) {
	switch inner(f).(type) {
	case *cli.BoolFlag:
		on, ok := v.Bool()
		return strconv.FormatBool(on), ok
	case *cli.IntFlag:
		i, ok := v.Bits()
		return strconv.FormatInt(i, 10), ok
	case *cli.DurationFlag:
		d, ok := v.Duration(-1<<63, 1<<63-1)
		return d.String(), ok
	case *cli.StringSliceFlag:
		list, ok := v.List()
		var texts []string
		for _, v := range list {
			text, good := v.Text()
			texts, ok = append(texts, text), ok && good
		}
		return cli.NewStringSlice(texts...).Serialize(), ok
	}
	return v.Text()
}
