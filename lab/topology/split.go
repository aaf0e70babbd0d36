package topology

import (
	"errors"
	"strings"
)

// split cuts a command into words as containerlab does (github.com/google/shlex): blanks separate, single and double
// quotes and backslashes keep together, a # at the start of a word begins a comment.
func split(s string) ([]string, error) {
	var words []string
	var word strings.Builder
	inWord := false
	for i := 0; i < len(s); i++ {
		c := s[i]
		switch c {
		case ' ', '\t', '\r', '\n':
			if inWord {
				words = append(words, word.String())
				word.Reset()
				inWord = false
			}
			continue
		case '#':
			if !inWord {
				end := strings.IndexByte(s[i:], '\n')
				if end < 0 {
					return words, nil
				}
				i += end
				continue
			}
			word.WriteByte(c)
		case '\\':
			i++
			if i == len(s) {
				return nil, errors.New("a backslash ends the command")
			}
			word.WriteByte(s[i])
		case '\'', '"':
			for i++; i < len(s) && s[i] != c; i++ {
				if s[i] == '\\' && c == '"' && i+1 < len(s) {
					i++
				}
				word.WriteByte(s[i])
			}
			if i == len(s) {
				return nil, errors.New("a quote is not closed")
			}
		default:
			word.WriteByte(c)
		}
		inWord = true
	}
	if inWord {
		words = append(words, word.String())
	}
	return words, nil
}
