package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/urfave/cli/v2"

	"github.com/ravel-lb/ravel"
	"github.com/ravel-lb/ravel/internal/admin"
	"github.com/ravel-lb/ravel/internal/check"
	"github.com/ravel-lb/ravel/internal/config"
	"github.com/ravel-lb/ravel/internal/desired"
	"github.com/ravel-lb/ravel/internal/hold"
	"github.com/ravel-lb/ravel/internal/node"
)

// checkAnswer is what a running process says of itself.
type checkAnswer struct {
	Role     string          `json:"role"`
	Node     string          `json:"node"`
	Static   string          `json:"static"`            // the file, or empty
	Cluster  string          `json:"cluster,omitempty"` // where in Kubernetes the documents are, or nothing
	Listen   []string        `json:"listen,omitempty"`  // the TCP addresses that it has
	Attract  string          `json:"attract,omitempty"` // none, or nothing
	Unknown  bool            `json:"unknown,omitempty"` // no document is in force
	Kept     string          `json:"kept,omitempty"`    // the document in force is an earlier process's, kept here
	LoadedAt time.Time       `json:"loadedAt,omitzero"` // when the document in force was loaded
	Stale    []ravel.Problem `json:"stale"`             // why the file as it now is cannot be used
	Refused  []ravel.Problem `json:"refused,omitempty"` // those that fail: documents of the cluster that cannot be used or are not heard of, a kernel that cannot be read, a network plugin
	Problems []ravel.Problem `json:"problems"`          // of the document in force and of this host
	VIPs     []vipStatus     `json:"vips,omitempty"`    // those that are wanted and not as they should be
	Err      string          `json:"err,omitempty"`
}

func (p *process) check(n *node.Node) admin.Query {
	return func(context.Context) (any, error) {
		var status config.Status
		if p.file != nil {
			status = p.file.Status()
		}
		answer := checkAnswer{Role: p.role.String(), Node: p.settings.node, Static: p.settings.static, LoadedAt: status.LoadedAt}
		if k := p.settings.kube; k != nil {
			answer.Cluster = fmt.Sprintf("configmap %s/%s", k.namespace, k.name)
		}
		var faults *config.Error
		if errors.As(status.Fault, &faults) {
			answer.Stale = faults.Faults
		}
		if status.Kept {
			answer.Kept = p.file.Keep
		}
		if p.settings.attractNone {
			answer.Attract = "none"
		}
		answer.Listen = p.settings.listens()
		c, known := p.computed.Latest()
		answer.Unknown = !known
		answer.VIPs = slices.DeleteFunc(p.vips(n).VIPs, func(v vipStatus) bool { return !v.failed() })
		report, _ := n.Reports().Latest()
		answer.Problems = slices.Concat(c.problems, p.problems(), report.Problems)
		if p.cluster != nil {
			answer.Refused = p.cluster.Status().Faults
		}
		if p.refused != nil {
			answer.Refused = slices.Concat(answer.Refused, p.refused())
		}
		if p.role == ravel.Realserver {
			answer.Refused = append(slices.Clone(answer.Refused), p.plugins.Bypass(context.Background())...)
		}
		if len(answer.Refused) > 0 {
			answer.Problems = slices.DeleteFunc(answer.Problems, func(p ravel.Problem) bool { return slices.Contains(answer.Refused, p) })
		}
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

// lookAs is whose view of a document is checked.
type lookAs struct {
	role, node  string // either may be empty: not known
	attractNone bool
	fallback    *desired.DefaultService // of the settings; may be nil
	// assumed says that nobody named the node: it is this host's name, as a role would take it. A document that does not
	// have it may be one for other hosts.
	assumed bool
}

// checkStatic reads a document as a role would and says all that is wrong with it.
func checkStatic(path string, as lookAs) (config.Static, []line) {
	static, err := config.LoadWith(path, as.fallback)
	var faults *config.Error
	switch {
	case errors.As(err, &faults):
		return static, problemLines(check.Fail, faults.Faults)
	case err != nil:
		return static, []line{{Status: check.Fail, Name: path, Detail: err.Error()}}
	}
	lines := append(problemLines(check.Fail, static.Unknown), problemLines(check.Warn, static.Warnings)...)
	role := roleOf(as.role, as.node, static)
	known := listed(static.Fleet, as.node) || static.Cluster.HasNode(as.node)
	if known || as.node != "" && !as.assumed {
		in := desired.Inputs{Role: role, Node: as.node, Cluster: static.Cluster, Fleet: static.Fleet, AttractNone: as.attractNone}
		_, problems := desired.Compute(in)
		named := make(map[string]bool, len(lines)) // places
		for _, l := range lines {
			named[l.Name] = true
		}
		for _, p := range problems {
			if !named[p.Where] {
				lines = append(lines, problemLine(p, as.attractNone))
			}
		}
	}
	if len(lines) == 0 {
		detail := fmt.Sprintf("%d services, %d nodes, %d endpoints, %d directors, %d peers",
			len(static.Cluster.Services), len(static.Cluster.Nodes), len(static.Cluster.Endpoints),
			len(static.Fleet.Directors), len(static.Fleet.Peers))
		if known {
			detail += fmt.Sprintf("; looked at as the %s %s", role, as.node)
		}
		lines = append(lines, line{Status: check.OK, Name: path, Detail: detail})
	}
	if as.assumed && !known {
		lines = append(lines, line{Status: check.Warn, Name: path,
			Detail: "this host, " + as.node + ", is neither director nor node there, so only the file itself was looked at; --node NAME looks as another"})
	}
	return static, lines
}

// roleOf is the role that a node has: the one that is said, else the one that the document has for it.
func roleOf(role, name string, static config.Static) ravel.Role {
	if role == ravel.Realserver.String() || role == "" && static.Cluster.HasNode(name) && !listed(static.Fleet, name) {
		return ravel.Realserver
	}
	return ravel.Director
}

// listed reports whether a fleet has a director of this name.
func listed(fleet desired.Fleet, name string) bool {
	return slices.ContainsFunc(fleet.Directors, func(d desired.FleetDirector) bool { return d.Name == name })
}

// problemLine is a problem of a document that is good in itself. A director that the fleet does not know announces
// nothing, and a realserver that is in no list of nodes redirects nothing: failures of all that they are for. A change that is held is not in force.
func problemLine(p ravel.Problem, attractNone bool) line {
	status := check.Warn
	if p.Where == "fleet.directors" && !attractNone || p.What == desired.NotListed || p.Where == hold.Where {
		status = check.Fail
	}
	return problemLines(status, []ravel.Problem{p})[0]
}

func checkCommand() *cli.Command {
	return &cli.Command{
		Name: "check",
		Usage: "check the documents, the ravel that runs here, and with --host this machine; " +
			"exits 0 if all is well, 1 if anything fails",
		Flags: append([]cli.Flag{
			outputFlag(),
			&cli.BoolFlag{Name: "host", Usage: "the preflight: what this machine has and lacks"},
			&cli.BoolFlag{Name: "fix", Usage: "with --host and --role: load modules, make the link and the kernel's settings, for a role that may not do so itself"},
			&cli.StringFlag{Name: "role", Usage: "director or realserver (default: what runs here, else both)"},
		}, checkFlags()...),
		Action: runCheck,
	}
}

func runCheck(c *cli.Context) error {
	var f faults
	f.read(c)
	format, err := output(c)
	if err != nil {
		f.errs = append(f.errs, err)
	}
	role, static, name := c.String("role"), c.String("static"), c.String("node")
	fallback := defaultService(c, &f)
	if role != "" && role != "director" && role != "realserver" {
		f.add("role", "%q: want director or realserver", role)
	}
	var host values
	f.host(c, &host)
	listen := f.listenAddrs(c)
	if c.Bool("fix") && !c.Bool("host") {
		f.add("fix", "is of the host: set --host, too")
	}
	if err := f.err(); err != nil {
		return err
	}

	var lines []line
	var running checkAnswer
	err = admin.ErrNotRunning
	if !c.Bool("fix") { // by itself: it works with all rights, and takes no word of who may not
		err = admin.Get(c.Context, c.String("admin-socket"), "check", &running)
	}
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
		// What it has taken is no news.
		listen = slices.DeleteFunc(listen, func(a netip.AddrPort) bool { return slices.Contains(running.Listen, a.String()) })
	case errors.Is(err, admin.ErrNoAccess) && static == "" && !c.Bool("host"):
		return err
	case !errors.Is(err, admin.ErrNotRunning):
		lines = append(lines, line{Status: check.Fail, Name: "process", Detail: err.Error()})
	case static == "" && !c.Bool("host"):
		return fmt.Errorf("nothing to check: no ravel runs here, and neither --static FILE nor --host is given: %w", err)
	}

	var document config.Static
	if static != "" {
		as := lookAs{role: role, node: name, attractNone: running.Attract == "none", fallback: fallback}
		if name == "" {
			if name, err = os.Hostname(); err != nil {
				lines = append(lines, line{Status: check.Warn, Name: "--node", Detail: fmt.Sprintf("not set, and the hostname cannot be read: %v", err)})
			}
			as.node, as.assumed = name, name != ""
		}
		type finding struct{ name, detail string }
		said := make(map[finding]bool, len(lines))
		for _, l := range lines {
			said[finding{l.Name, l.Detail}] = true
		}
		var found []line
		document, found = checkStatic(static, as)
		for _, l := range found {
			if !said[finding{l.Name, l.Detail}] {
				lines = append(lines, l)
			}
		}
	}
	if c.Bool("host") {
		preflight := hostCheck(c, role, name, host, listen, document)
		if c.Bool("fix") {
			fixed, err := fix(c, role, host, preflight)
			if err != nil {
				return err
			}
			lines = append(lines, fixed...)
		}
		lines = append(lines, preflight.Run(c.Context)...)
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

// runningLines are about the process that runs here.
func runningLines(a checkAnswer) []line {
	var lines []line
	if len(a.Stale) > 0 {
		detail := "is stale: the running " + a.Role + " goes on with the last good one"
		switch {
		case a.Unknown:
			detail = "cannot be used, and no good one is known from before: the running " + a.Role + " leaves this host as it found it"
		case a.Kept != "":
			detail += ", which an earlier process kept as " + a.Kept
		}
		if !a.Unknown && !a.LoadedAt.IsZero() {
			detail += ", of " + a.LoadedAt.UTC().Format(time.RFC3339)
		}
		lines = append(lines, line{Status: check.Fail, Name: cmp.Or(a.Static, "--fleet-file"), Detail: detail})
		lines = append(lines, problemLines(check.Fail, a.Stale)...)
	} else if a.Unknown && len(a.Refused) == 0 {
		lines = append(lines, line{Status: check.Fail, Name: cmp.Or(a.Static, a.Cluster), Detail: "is not loaded yet"})
	}
	if a.Err != "" {
		lines = append(lines, line{Status: check.Fail, Name: a.Role, Detail: firstFault(a.Err), Fix: "ravel check --host, which names what this host lacks"})
	}
	lines = append(lines, problemLines(check.Fail, a.Refused)...)
	for _, p := range a.Problems {
		lines = append(lines, problemLine(p, a.Attract == "none"))
	}
	for _, v := range a.VIPs {
		lacks := "not held"
		if a.Role == ravel.Director.String() {
			lacks = "not announced"
		}
		lines = append(lines, line{Status: check.Fail, Name: "VIP " + v.VIP.String(), Detail: "is " + lacks + ": " + strings.TrimSuffix(v.Why, ": see ravel check")})
	}
	if len(lines) == 0 {
		lines = append(lines, line{Status: check.OK, Name: a.Role, Detail: "runs as " + a.Node + ", and all is applied"})
	}
	return lines
}

// firstFault is the first line of several faults, which often have one cause. The log has them all.
func firstFault(faults string) string {
	all := strings.Split(faults, "\n")
	others := slices.DeleteFunc(all[1:], func(l string) bool { return l == all[0] })
	if len(others) == 0 {
		return all[0]
	}
	return fmt.Sprintf("%s (and %d more, which the log has)", all[0], len(others))
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
