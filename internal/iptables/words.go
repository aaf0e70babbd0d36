package iptables

import (
	"fmt"
	"regexp"
	"strconv"
	"strings"
)

// ours reports whether a chain is Ravel's.
func ours(chain string) bool { return strings.HasPrefix(chain, Prefix) }

// Words splits a rule as the iptables programs do: at blanks, with double quotes around what holds some. A backslash
// inside quotes takes the next byte as it is.
func Words(rule string) []string {
	var all []string
	var word strings.Builder
	inWord, quoted := false, false
	for i := 0; i < len(rule); i++ {
		switch c := rule[i]; {
		case quoted && c == '\\' && i+1 < len(rule):
			i++
			word.WriteByte(rule[i])
		case c == '"':
			quoted = !quoted
			inWord = true
		case !quoted && (c == ' ' || c == '\t'):
			if inWord {
				all = append(all, word.String())
				word.Reset()
				inWord = false
			}
		default:
			word.WriteByte(c)
			inWord = true
		}
	}
	if inWord {
		all = append(all, word.String())
	}
	return all
}

// target returns the chain or target that a rule jumps to, "" if it has none.
func target(rule []string) string {
	for i := 0; i+1 < len(rule); i++ {
		switch rule[i] {
		case "-j", "--jump", "-g", "--goto":
			return rule[i+1]
		case "--comment":
			i++ // its text may hold anything
		}
	}
	return ""
}

// quote is the reverse of Words for one rule.
func quote(rule []string) string {
	out := make([]string, len(rule))
	for i, w := range rule {
		if w == "" || strings.ContainsAny(w, " \t\"\\'") {
			w = `"` + strings.NewReplacer(`\`, `\\`, `"`, `\"`).Replace(w) + `"`
		}
		out[i] = w
	}
	return strings.Join(out, " ")
}

// checkOurs reads input for iptables-restore and returns an error at the first line that would write to a chain that
// is not ours, other than by adding or deleting a rule that jumps to one of ours.
func checkOurs(input string, ours func(chain string) bool) error {
	for n, line := range strings.Split(input, "\n") {
		line = strings.TrimSpace(line)
		if line == "" || line == "COMMIT" || line[0] == '#' || line[0] == '*' {
			continue
		}
		rule := Words(line)
		if len(rule) > 0 && strings.HasPrefix(rule[0], "[") { // counters
			rule = rule[1:]
		}
		if len(rule) == 0 {
			continue
		}
		declared, declares := strings.CutPrefix(rule[0], ":")
		switch {
		case declares && ours(declared):
			continue
		case len(rule) < 2:
		case ours(rule[1]):
			continue
		case (rule[0] == "-A" || rule[0] == "-I" || rule[0] == "-D") && ours(target(rule)):
			continue
		}
		return fmt.Errorf("line %d writes to a chain that is not ours: %q", n+1, line)
	}
	return nil
}

// failing finds the number in "iptables-restore: line 7 failed", "line 4: RULE_APPEND failed …" and "Error occurred at
// line: 3".
var failing = regexp.MustCompile(`\bline:? (\d+)`)

// failedLine returns the line of input that iptables-restore complained about, "" if it named none.
func failedLine(stderr, input string) string {
	found := failing.FindStringSubmatch(stderr)
	if found == nil {
		return ""
	}
	n, err := strconv.Atoi(found[1])
	lines := strings.Split(input, "\n")
	if err != nil || n < 1 || n > len(lines) {
		return ""
	}
	return lines[n-1]
}
