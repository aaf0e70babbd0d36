package main

import (
	"slices"
	"strings"

	"github.com/urfave/cli/v2"
)

// takesArguments are the commands that do not only take flags. Their flags may stand behind the arguments.
var takesArguments = []string{"trace", "plan", "drain", "freeze", "accept"}

// flagsFirst moves the flags of a command that takes arguments before these: what is behind the first argument would
// not be read as a flag. Behind "--" nothing is a flag.
func flagsFirst(args []string, commands []*cli.Command) []string {
	at := slices.IndexFunc(commands, func(c *cli.Command) bool { return len(args) > 1 && c.Name == args[1] })
	if at < 0 || !slices.Contains(takesArguments, args[1]) {
		return args
	}
	var flags, words []string
	for rest := args[2:]; len(rest) > 0; rest = rest[1:] {
		word := rest[0]
		if word == "--" {
			words = append(words, rest[1:]...)
			break
		}
		if !strings.HasPrefix(word, "-") || word == "-" {
			words = append(words, word)
			continue
		}
		flags = append(flags, word)
		if len(rest) > 1 && takesValue(commands[at], word) {
			flags = append(flags, rest[1])
			rest = rest[1:]
		}
	}
	return slices.Concat(args[:2], flags, []string{"--"}, words)
}

// takesValue reports whether the value of a flag is the next word.
func takesValue(c *cli.Command, word string) bool {
	name := strings.TrimLeft(word, "-")
	for _, f := range c.Flags {
		if slices.Contains(f.Names(), name) {
			documented, is := f.(cli.DocGenerationFlag)
			return is && documented.TakesValue()
		}
	}
	return false
}
