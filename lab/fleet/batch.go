package fleet

import "strings"

// batch is one process for one or several commands of a node.
type batch struct {
	args  []string
	input string // for its standard input
}

// batches gathers neighbouring ip commands into one `ip -batch`, in their order: it ends at the first that fails, as
// the commands would. Starting a process is what takes time.
func batches(commands [][]string) []batch {
	var out []batch
	var last string // the head of the batch that out ends with, if more may go in
	for _, c := range commands {
		head, rest := ipCommand(c)
		switch {
		case head == "":
			out = append(out, batch{args: c})
		case head == last:
			out[len(out)-1].input += rest + "\n"
		default:
			out = append(out, batch{args: append(strings.Fields(head), "-batch", "-"), input: rest + "\n"})
		}
		last = head
	}
	return out
}

// ipCommand cuts an ip command into what comes before and after -batch; the head is empty if the command is another
// one, or could mean something else in a batch.
func ipCommand(words []string) (head, rest string) {
	if words[0] != "ip" {
		return "", ""
	}
	head, words = "ip", words[1:]
	if len(words) > 2 && words[0] == "-n" {
		head, words = "ip -n "+words[1], words[2:]
	}
	if len(words) == 0 || strings.HasPrefix(words[0], "-") || words[0] == "netns" && len(words) > 1 && words[1] == "exec" {
		return "", ""
	}
	for _, w := range words {
		if w == "" || strings.ContainsAny(w, " \t\r\n\"'#\\") {
			return "", ""
		}
	}
	return head, strings.Join(words, " ")
}
