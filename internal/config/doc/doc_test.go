package doc

import (
	"encoding/json"
	"fmt"
	"strings"
	"testing"
	"time"
	"unicode/utf8"

	"github.com/google/go-cmp/cmp"
	"go.yaml.in/yaml/v3"
)

// faults parses a document and returns what is wrong with it, one a line.
func faults(b string) string {
	var report Report
	Parse([]byte(b), &report)
	var lines []string
	for _, p := range report.Faults() {
		lines = append(lines, p.String())
	}
	return strings.Join(lines, "\n")
}

func TestPaths(t *testing.T) {
	got := faults(`a:
  b-c: [x, {192.0.2.1: &a 1, "": &b 2, "x y": &c 3, 9z: &d 4, _z: &e 5}]
` + strings.Repeat("k", 100) + ": &f 6\n\"\\n\": &g 7\n")
	const text = ": anchors and aliases are not supported"
	want := `a.b-c[1]["192.0.2.1"]: anchor &a` + text + ` (line 2:24)
a.b-c[1][""]: anchor &b` + text + ` (line 2:34)
a.b-c[1]["x y"]: anchor &c` + text + ` (line 2:47)
a.b-c[1]["9z"]: anchor &d` + text + ` (line 2:57)
a.b-c[1]["_z"]: anchor &e` + text + ` (line 2:67)
["` + strings.Repeat("k", 80) + `…"]: anchor &f` + text + ` (line 3:103)
["\n"]: anchor &g` + text + ` (line 4:7)`
	if diff := cmp.Diff(strings.Split(want, "\n"), strings.Split(got, "\n")); diff != "" {
		t.Error(diff)
	}
}

// The library counts lines from 0 or 1, as it comes; we want the line of what is wrong, or of where that began.
func TestLinesOfSyntaxErrors(t *testing.T) {
	for doc, want := range map[string]string{
		"a: {b: {}\nf: {}\n":                 "did not find expected ',' or '}' (line 2)",
		"x: 1\ny: 2\na: {b: {}\nf: {}\nz: 1": "did not find expected ',' or '}' (line 3)",
		"a: 1\nb:\n  c: 1\n d: 2\n":          "did not find expected key (line 4)",
		"a: 1\nb: \"x\n":                     "found unexpected end of stream (line 2)",
		"a: 1\nb: c: d\n":                    "mapping values are not allowed in this context (line 2)",
		"a:\n - b\n c: d\n":                  "did not find expected '-' indicator (line 2)",
		"a: 1\n\tb: 2\n":                     "found a tab character that violates indentation (line 2)",
		"a: 'x' y\n":                         "did not find expected key (line 1)",
		"a: \"\\q\"\n":                       "found unknown escape character (line 1)",
		"a: 1\nb\n":                          "could not find expected ':' (line 2)",
		"[a, b]]":                            "did not find expected <document start> (line 1)",
		"a: *b":                              "unknown anchor 'b' referenced",
	} {
		if got := faults(doc); got != "document: syntax error: "+want {
			t.Errorf("%q: got %s, want %s", doc, got, want)
		}
	}
}

// Documents that cost other readers time, memory or their lives.
func TestBombs(t *testing.T) {
	laughs := "a: &a [x,x,x,x,x,x,x,x,x]\n"
	for c := 'b'; c < 'k'; c++ {
		laughs += fmt.Sprintf("%c: &%c [*%c,*%c,*%c,*%c,*%c,*%c,*%c,*%c,*%c]\n", c, c, c-1, c-1, c-1, c-1, c-1, c-1, c-1, c-1, c-1)
	}
	for name, tt := range map[string]struct{ doc, want string }{
		"laughs":      {laughs, "anchors and aliases are not supported"},
		"itself":      {"a: &a [*a]", "anchors and aliases are not supported"},
		"deep lists":  {strings.Repeat("[", 9000) + strings.Repeat("]", 9000), "is nested more than 32 deep"},
		"deeper":      {strings.Repeat("[", 1<<20), "exceeded max depth"},
		"deep blocks": {strings.Repeat("- ", 9000) + "x", "is nested more than 32 deep"},
		"deep keys":   {strings.Repeat("{a: ", 5000), "did not find expected"},
		"deep JSON":   {strings.Repeat(`{"a":`, 9000) + "1" + strings.Repeat("}", 9000), "is nested more than 32 deep"},
		"many faults": {"[" + strings.Repeat("!a b, ", 50000) + "]", "49000 more faults"},
		"one line":    {"{" + strings.Repeat(`"a": 1, `, 50000) + `"a": 1}`, "49000 more faults"},
		"long keys":   {`{"` + strings.Repeat("x", 1<<20) + `": 1, "` + strings.Repeat("x", 1<<20) + `": 2}`, "given twice"},
		"quotes":      {strings.Repeat(`"`, 1<<20), "syntax error"},
		"questions":   {strings.Repeat("? ", 9000), "a key that is a mapping"},
	} {
		t.Run(name, func(t *testing.T) {
			start := time.Now()
			if got := faults(tt.doc); !strings.Contains(got, tt.want) || len(got) > 1<<20 {
				t.Errorf("got %.200s… (%d bytes)", got, len(got))
			}
			t.Logf("took %s", time.Since(start))
		})
	}
}

func TestBits(t *testing.T) {
	for text, want := range map[string]string{
		"0x4000": "16384 true", "16384": "16384 true", "-1": "-1 true", "0": "0 true",
		"0xffffffffffffffff": "0 false", "0o17": "0 false", "1_000": "0 false", "1e3": "0 false", `"1"`: "0 false", "0x": "0 false",
	} {
		var report Report
		v, ok := Parse([]byte(text), &report)
		if !ok {
			t.Fatal(report.Faults())
		}
		i, ok := v.Bits()
		if got := fmt.Sprint(i, ok); got != want || ok == (len(report.Faults()) > 0) {
			t.Errorf("%s: got %s, %v, want %s", text, got, report.Faults(), want)
		}
	}
}

// same compares the trees of our JSON reader and the YAML library.
func same(a, b *yaml.Node) error {
	number := func(n *yaml.Node) string { return strings.Replace(n.ShortTag(), "!!float", "!!int", 1) } // YAML: by size
	if a.Kind != b.Kind || a.Value != b.Value || number(a) != number(b) || len(a.Content) != len(b.Content) || a.Line != b.Line ||
		a.Column != b.Column {
		return fmt.Errorf("%d %s %q at %d:%d is %d %s %q at %d:%d", a.Kind, a.ShortTag(), a.Value, a.Line, a.Column,
			b.Kind, b.ShortTag(), b.Value, b.Line, b.Column)
	}
	for i := range a.Content {
		if err := same(a.Content[i], b.Content[i]); err != nil {
			return err
		}
	}
	return nil
}

// FuzzJSON: what is both JSON and, for the library, YAML, reads the same as either.
func FuzzJSON(f *testing.F) {
	for _, s := range []string{
		`{"a": [1, -2.5e3, true, null, "x\ny\/\u00e9"], "b": {}, "c": []}`, "[\n\t{},\r\n [ ], 7 ]\n", `"é" `, "0", `{"":""}`, " {\"é\":\n  1}",
	} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		// What YAML reads otherwise, or not at all: surrogates, control characters, its own line ends, long keys.
		if !json.Valid(b) || !utf8.Valid(b) || strings.Contains(string(b), `\u`) || len(b) > 500 ||
			strings.ContainsAny(string(b), "\u0085\u2028\u2029\ufeff\u007f\ufffe\uffff") || strings.ContainsAny(string(b), "\r\t") {
			return
		}
		node, _, err := parseYAML(b)
		if err != nil || node == nil {
			return
		}
		// Numbers such as 1e5 are texts or floats to YAML, as it comes; what reads them looks at their characters.
		if strings.ContainsAny(string(b), "eE") && !strings.Contains(string(b), `"`) {
			return
		}
		if err := same(parseJSON(b), node); err != nil {
			t.Errorf("%s: %v", b, err)
		}
	})
}

// FuzzParse: nothing panics, and no message has a broken character or a line end.
func FuzzParse(f *testing.F) {
	for _, s := range []string{"a: &a [*a]", "? [a]\n: b", "<<: {a: 1}", "!!binary x", "a: |\n  b\n c", "%YAML 1.1\n---\na", "{\"a\":\"\\ud83d\"}", "a: 'b", "\ufeffa: 1"} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		var report Report
		v, ok := Parse(b, &report)
		if ok {
			read(v, 0)
		}
		for _, p := range report.Faults() {
			if s := p.String(); !utf8.ValidString(s) || strings.ContainsAny(s, "\n\r") || p.Where == "" {
				t.Errorf("%q", s)
			}
		}
	})
}

// read asks a value for everything.
func read(v Value, depth int) {
	v.Text()
	v.Bool()
	v.Int(0, 7)
	v.Bits()
	v.Plain()
	v.Duration(0, time.Hour)
	v.Addr()
	v.KeyAddr()
	v.KeyInt("port", 1, 2)
	v.TextMap()
	v.Line()
	if o, ok := v.Object("a", "b"); ok {
		o.Get("a")
		o.Need("b")
	}
	if o, ok := v.LenientObject("a", "b"); ok {
		o.Get("a")
	}
	if depth == maxDepth {
		return
	}
	list, _ := v.List()
	entries, _ := v.Entries()
	for _, child := range append(list, entries...) {
		read(child, depth+1)
	}
}
