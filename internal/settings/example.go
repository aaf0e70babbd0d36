package settings

import (
	"strconv"
	"strings"

	"github.com/urfave/cli/v2"
	"go.yaml.in/yaml/v3"
)

// Section is a part of an example file.
type Section struct {
	Title string
	Flags []cli.Flag
}

// Example returns a file that names every flag, once, with its meaning and its default, all of it commented out: to
// change a setting is to take away one #. A program's test can hold the file that is shipped against it.
func Example(sections ...Section) string {
	var b strings.Builder
	seen := map[string]bool{}
	for _, s := range sections {
		if b.Len() > 0 {
			b.WriteString("\n")
		}
		b.WriteString("# " + s.Title + "\n")
		for _, f := range s.Flags {
			name := f.Names()[0]
			if seen[name] || !fileKey(f) {
				continue
			}
			seen[name] = true
			b.WriteString("\n")
			if described, ok := f.(cli.DocGenerationFlag); ok && described.GetUsage() != "" {
				wrap(&b, described.GetUsage())
			}
			b.WriteString("#" + name + ": " + defaultOf(f) + "\n")
		}
	}
	return b.String()
}

// wrap writes a comment.
func wrap(b *strings.Builder, text string) {
	const width = 118
	line := "#"
	for word := range strings.FieldsSeq(text) {
		if len(line)+1+len(word) > width {
			b.WriteString(line + "\n")
			line = "#"
		}
		line += " " + word
	}
	b.WriteString(line + "\n")
}

// defaultOf returns a flag's default in YAML.
func defaultOf(f cli.Flag) string {
	switch f := inner(f).(type) {
	case *cli.BoolFlag:
		return strconv.FormatBool(f.Value)
	case *cli.IntFlag:
		return strconv.Itoa(f.Value)
	case *cli.DurationFlag:
		return f.Value.String()
	case *cli.StringSliceFlag:
		var quoted []string
		if f.Value != nil {
			for _, s := range f.Value.Value() {
				quoted = append(quoted, scalar(s))
			}
		}
		return "[" + strings.Join(quoted, ", ") + "]"
	case *cli.StringFlag:
		return scalar(f.Value)
	}
	return ""
}

// scalar writes a string so that YAML reads the same, also within a list.
func scalar(s string) string {
	if strings.ContainsAny(s, ",[]{}") {
		return strconv.Quote(s)
	}
	b, err := yaml.Marshal(s)
	if err != nil {
		return strconv.Quote(s)
	}
	return strings.TrimSuffix(string(b), "\n")
}
