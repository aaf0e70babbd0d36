package settings

import (
	"flag"
	"fmt"

	"github.com/urfave/cli/v2"
)

// Flags makes settings of flags: Apply reads their variables, and no longer cli itself, which would name the first
// fault only. Help shows the variables as ever. Flags must be String, Bool, Int, Duration or StringSlice ones.
func Flags(flags ...cli.Flag) []cli.Flag {
	made := make([]cli.Flag, len(flags))
	for i, f := range flags {
		made[i] = newSetting(f)
	}
	return made
}

// setting is a flag whose variable cli does not see, and none of whose values on the command line is wrong to cli.
type setting struct {
	described
	faults []error // of the values that the command line had
}

// described is what cli asks of its own flags, besides what it does with them.
type described interface {
	cli.DocGenerationFlag
	cli.CategorizableFlag
	cli.RequiredFlag
	cli.ActionableFlag
}

func newSetting(f cli.Flag) cli.Flag {
	switch f := f.(type) {
	case *setting:
		return f
	case *cli.StringFlag:
		f.EnvVars = nil
		return &setting{described: f}
	case *cli.BoolFlag:
		f.EnvVars = nil
		return &setting{described: f}
	case *cli.IntFlag:
		f.EnvVars = nil
		return &setting{described: f}
	case *cli.DurationFlag:
		f.EnvVars = nil
		return &setting{described: f}
	case *cli.StringSliceFlag:
		f.EnvVars = nil
		return &setting{described: f}
	}
	panic(fmt.Sprintf("settings: a flag of type %T", f)) // a mistake in the program, found by its first run
}

// Apply makes the flag one of set. A value that is not of the flag's type is noted for the function Apply: cli would end
// at the first one.
func (s *setting) Apply(set *flag.FlagSet) error {
	s.faults = nil
	switch s.described.(type) {
	case *cli.BoolFlag, *cli.IntFlag, *cli.DurationFlag:
	default:
		return s.described.Apply(set)
	}
	typed := flag.NewFlagSet("", flag.ContinueOnError)
	if err := s.described.Apply(typed); err != nil {
		return err
	}
	typed.VisitAll(func(f *flag.Flag) { set.Var(&typedValue{f.Value, s}, f.Name, f.Usage) })
	return nil
}

// typedValue is the value of a flag that takes text of one kind only.
type typedValue struct {
	flag.Value
	of *setting
}

// Set keeps the value as it was where text is of another kind.
func (v *typedValue) Set(text string) error {
	if err := parses(v.of, text); err != nil {
		v.of.faults = append(v.of.faults, fmt.Errorf("--%s: %w", v.of.Names()[0], err))
		return nil
	}
	return v.Value.Set(text)
}

// String returns the value; that of none is nothing, as package flag asks of one.
func (v *typedValue) String() string {
	if v.Value == nil {
		return ""
	}
	return v.Value.String()
}

// IsBoolFlag reports whether the flag needs no value.
func (v *typedValue) IsBoolFlag() bool {
	_, on := v.of.described.(*cli.BoolFlag)
	return on
}

// GetEnvVars returns the variable, for the help text.
func (s *setting) GetEnvVars() []string { return []string{Variable(s.Names()[0])} }

// String returns the line of the help text.
func (s *setting) String() string { return cli.FlagStringer(s) }

// IsSliceFlag reports whether the flag may be given more than once.
func (s *setting) IsSliceFlag() bool {
	_, slice := s.described.(*cli.StringSliceFlag)
	return slice
}

// inner returns the flag that was made a setting, or f itself.
func inner(f cli.Flag) cli.Flag {
	if s, ours := f.(*setting); ours {
		return s.described
	}
	return f
}
