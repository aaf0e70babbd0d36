package settings

import (
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

// setting is a flag whose variable cli does not see.
type setting struct {
	described
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
		return &setting{f}
	case *cli.BoolFlag:
		f.EnvVars = nil
		return &setting{f}
	case *cli.IntFlag:
		f.EnvVars = nil
		return &setting{f}
	case *cli.DurationFlag:
		f.EnvVars = nil
		return &setting{f}
	case *cli.StringSliceFlag:
		f.EnvVars = nil
		return &setting{f}
	}
	panic(fmt.Sprintf("settings: a flag of type %T", f)) // a mistake in the program, found by its first run
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
