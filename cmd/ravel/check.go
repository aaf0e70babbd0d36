package main

import (
	"context"
	"errors"
	"fmt"

	"github.com/urfave/cli/v2"

	"github.com/ravel-lb/ravel"
	"github.com/ravel-lb/ravel/internal/admin"
	"github.com/ravel-lb/ravel/internal/check"
	"github.com/ravel-lb/ravel/internal/config"
	"github.com/ravel-lb/ravel/internal/desired"
	"github.com/ravel-lb/ravel/internal/node"
)

// checkAnswer is what a running process says of itself.
type checkAnswer struct {
	Role     string          `json:"role"`
	Node     string          `json:"node"`
	Static   string          `json:"static"`
	Stale    []ravel.Problem `json:"stale"`    // why the file as it now is cannot be used
	Problems []ravel.Problem `json:"problems"` // of the document in force and of this host
	Err      string          `json:"err,omitempty"`
}

func (p *process) check(n *node.Node) admin.Query {
	return func(context.Context) (any, error) {
		answer := checkAnswer{Role: p.role.String(), Node: p.settings.node, Static: p.settings.static}
		var faults *config.Error
		if errors.As(p.file.Status().Fault, &faults) {
			answer.Stale = faults.Faults
		}
		c, _ := p.computed.Latest()
		report, _ := n.Reports().Latest()
		answer.Problems = append(append(answer.Problems, c.problems...), report.Problems...)
		if report.Err != nil {
			answer.Err = report.Err.Error()
		}
		return answer, nil
	}
}

// line is one finding: of a document, of the process that runs here, or of the host.
type line = check.Line

func problemLines(status check.Status, problems []ravel.Problem) []line {
	var lines []line
	for _, p := range problems {
		lines = append(lines, line{Status: status, Name: p.Where, Detail: p.What, Fix: p.Fix})
	}
	return lines
}

// checkStatic reads a document as a role would and says all that is wrong with it.
func checkStatic(path, nodeName string, role desired.Role) (config.Static, []line) {
	static, err := config.Load(path)
	var faults *config.Error
	switch {
	case errors.As(err, &faults):
		return static, problemLines(check.Fail, faults.Faults)
	case err != nil:
		return static, []line{{Status: check.Fail, Name: path, Detail: err.Error()}}
	}
	lines := append(problemLines(check.Fail, static.Unknown), problemLines(check.Warn, static.Warnings)...)
	if nodeName != "" {
		_, problems := desired.Compute(desired.Inputs{Role: role, Node: nodeName, Cluster: static.Cluster, Fleet: static.Fleet})
		for _, l := range problemLines(check.Warn, problems) {
			if !contains(lines, l) {
				lines = append(lines, l)
			}
		}
	}
	if len(lines) == 0 {
		lines = append(lines, line{Status: check.OK, Name: path, Detail: fmt.Sprintf("%d services, %d nodes, %d endpoints, %d directors, %d peers",
			len(static.Cluster.Services), len(static.Cluster.Nodes), len(static.Cluster.Endpoints),
			len(static.Fleet.Directors), len(static.Fleet.Peers))})
	}
	return static, lines
}

// contains reports whether a place is named already.
func contains(lines []line, l line) bool {
	for _, known := range lines {
		if known.Name == l.Name {
			return true
		}
	}
	return false
}

func checkCommand() *cli.Command {
	return &cli.Command{
		Name: "check",
		Usage: "check the documents, the ravel that runs here, and with --host this machine; " +
			"exits 0 if all is well, 1 if anything fails",
		Flags: append([]cli.Flag{
			staticFlag(), socketFlag(), outputFlag(),
			&cli.BoolFlag{Name: "host", Usage: "the preflight: what this machine has and lacks"},
			&cli.StringFlag{Name: "role", Usage: "director or realserver (default: what runs here, else both)"},
			&cli.StringFlag{Name: "node", EnvVars: env("node"), Usage: "this host's name in the fleet (default: what runs here)"},
			stringFlag("listen", "", "with --host: the TCP address for metrics that a role is to have"),
			intFlag("bgp-port", 0, "with --host: the port on which a director is to take BGP sessions"),
		}, hostFlags()...),
		Action: runCheck,
	}
}

func runCheck(c *cli.Context) error {
	format, err := output(c)
	if err != nil {
		return err
	}
	role, static, name := c.String("role"), c.String("static"), c.String("node")
	var f faults
	if role != "" && role != "director" && role != "realserver" {
		f.add("role", "%q: want director or realserver", role)
	}
	var host values
	f.host(c, &host)
	listen := f.listenAddrs(c)
	if err := f.err(); err != nil {
		return err
	}

	var lines []line
	var running checkAnswer
	err = admin.Get(c.Context, c.String("admin-socket"), "check", &running)
	switch {
	case err == nil:
		if static == "" {
			static = running.Static
		}
		if name == "" {
			name = running.Node
		}
		if role == "" {
			role = running.Role
		}
		lines = append(lines, runningLines(running)...)
	case !errors.Is(err, admin.ErrNotRunning):
		lines = append(lines, line{Status: check.Fail, Name: "process", Detail: err.Error()})
	case static == "" && !c.Bool("host"):
		return fmt.Errorf("nothing to check: no ravel runs here, and neither --static FILE nor --host is given: %w", err)
	}

	var document config.Static
	if static != "" {
		r := desired.Director
		if role == "realserver" {
			r = desired.Realserver
		}
		var found []line
		document, found = checkStatic(static, name, r)
		for _, l := range found {
			if !containsExactly(lines, l) {
				lines = append(lines, l)
			}
		}
	}
	if c.Bool("host") {
		lines = append(lines, hostCheck(c, role, name, host, listen, document).Run(c.Context)...)
	}
	if format == formatJSON {
		err = printJSON(c.App.Writer, lines)
	} else {
		err = printLines(c, lines)
	}
	if err != nil {
		return err
	}
	for _, l := range lines {
		if l.Status == check.Fail {
			return errors.New("a check failed")
		}
	}
	return nil
}

func containsExactly(lines []line, l line) bool {
	for _, known := range lines {
		if known.Name == l.Name && known.Detail == l.Detail {
			return true
		}
	}
	return false
}

// runningLines are about the process that runs here.
func runningLines(a checkAnswer) []line {
	var lines []line
	if len(a.Stale) > 0 {
		lines = append(lines, line{Status: check.Fail, Name: a.Static, Detail: "is stale: the running " + a.Role + " goes on with the last good one"})
		lines = append(lines, problemLines(check.Fail, a.Stale)...)
	}
	if a.Err != "" {
		lines = append(lines, line{Status: check.Fail, Name: a.Role, Detail: a.Err})
	}
	lines = append(lines, problemLines(check.Warn, a.Problems)...)
	if len(lines) == 0 {
		lines = append(lines, line{Status: check.OK, Name: a.Role, Detail: "runs as " + a.Node + ", and all is applied"})
	}
	return lines
}

func printLines(c *cli.Context, lines []line) error {
	for _, l := range lines {
		if _, err := fmt.Fprintf(c.App.Writer, "%-4s  %s: %s\n", l.Status, l.Name, l.Detail); err != nil {
			return err
		}
		if l.Fix != "" {
			if _, err := fmt.Fprintf(c.App.Writer, "      mend it by: %s\n", l.Fix); err != nil {
				return err
			}
		}
	}
	return nil
}
