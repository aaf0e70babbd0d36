package main

import (
	"encoding/json"
	"fmt"
	"io"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/urfave/cli/v2"
)

// The forms in which a reading command prints.
const (
	formatTable = "table"
	formatWide  = "wide"
	formatJSON  = "json"
)

func outputFlag() cli.Flag {
	return &cli.StringFlag{Name: "output", Aliases: []string{"o"}, Value: formatTable, Usage: "table, wide or json"}
}

// output is the form that was asked for.
func output(c *cli.Context) (string, error) {
	switch format := c.String("output"); format {
	case formatTable, formatWide, formatJSON:
		return format, nil
	default:
		return "", usageError{fmt.Errorf("--output %q: want table, wide or json", format)}
	}
}

func printJSON(w io.Writer, value any) error {
	e := json.NewEncoder(w)
	e.SetIndent("", "  ")
	return e.Encode(value)
}

// table prints rows under a header, in columns. A cell that is empty prints as "-".
func table(w io.Writer, header []string, rows [][]string) error {
	t := tabwriter.NewWriter(w, 0, 4, 2, ' ', 0)
	fmt.Fprintln(t, strings.Join(header, "\t"))
	for _, row := range rows {
		for i, cell := range row {
			if cell == "" {
				row[i] = "-"
			}
		}
		fmt.Fprintln(t, strings.Join(row, "\t"))
	}
	return t.Flush()
}

// span prints a duration as operators read it: 4s, 3m10s, 2h5m, 9d4h.
func span(d time.Duration) string {
	d = d.Round(time.Second)
	switch {
	case d < time.Minute:
		return fmt.Sprintf("%ds", int(d.Seconds()))
	case d < time.Hour:
		return fmt.Sprintf("%dm%ds", int(d.Minutes()), int(d.Seconds())%60)
	case d < 24*time.Hour:
		return fmt.Sprintf("%dh%dm", int(d.Hours()), int(d.Minutes())%60)
	}
	return fmt.Sprintf("%dd%dh", int(d.Hours())/24, int(d.Hours())%24)
}

// ago prints how long ago something happened, and nothing for never.
func ago(at time.Time) string {
	if at.IsZero() {
		return ""
	}
	return span(max(0, time.Since(at))) + " ago"
}
