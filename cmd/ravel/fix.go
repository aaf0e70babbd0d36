package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/urfave/cli/v2"

	"github.com/ravel-lb/ravel"
	"github.com/ravel-lb/ravel/director"
	"github.com/ravel-lb/ravel/internal/check"
	"github.com/ravel-lb/ravel/internal/ifaddr"
	"github.com/ravel-lb/ravel/internal/iptables"
	"github.com/ravel-lb/ravel/internal/sysctl"
	"github.com/ravel-lb/ravel/internal/wholefile"
	"github.com/ravel-lb/ravel/realserver"
)

// hostSettings are the settings of this host, and what they were before ravel changed them.
func hostSettings() *sysctl.Setter {
	s := sysctl.New("/proc/sys", sysctlNotes)
	s.Elsewhere, s.Only = check.Elsewhere, mayRestore
	return s
}

// restorable are the settings that a role makes, and all that a note of earlier values may have put back: the note lies
// where a role can write that is not allowed to make any.
var restorable = regexp.MustCompile(`^net/ipv4/(vs/[a-z_]+|conf/all/arp_(ignore|announce)|conf/tunl0/rp_filter)$|^net/netfilter/nf_conntrack_tcp_be_liberal$`)

func mayRestore(name, was string) bool {
	_, err := strconv.Atoi(was)
	return err == nil && restorable.MatchString(name)
}

// modprobeTime bounds the loading of one module.
const modprobeTime = 30 * time.Second

// fix makes a host ready for a role that may not do so itself, as in a container: modules, the link that holds VIPs, and
// settings. What it did is a line each; so is what it could not do, with what to do.
func fix(c *cli.Context, role string, host values, preflight check.Host) ([]line, error) {
	if role != directorRole && role != realserverRole {
		return nil, usageError{errors.New("--fix: set --role director or realserver, to say what this host is to be ready for; nothing was done")}
	}
	if err := mayChange(c.Command.Name); err != nil {
		return nil, err
	}
	ctx := c.Context
	var lines []line
	did := func(format string, args ...any) {
		lines = append(lines, line{Status: check.OK, Name: "fix", Detail: fmt.Sprintf(format, args...)})
	}
	failed := func(fix string, err error) {
		lines = append(lines, line{Status: check.Fail, Name: "fix", Detail: err.Error(), Fix: fix})
	}

	if err := os.MkdirAll(runDir, 0o755); err != nil {
		return nil, fmt.Errorf("making the directory of what is noted: %w", err)
	}
	// Modules of one variant's tables must not bring those of the other.
	if preflight.IPTables == "auto" {
		variant, err := iptables.Detect(ctx)
		if err != nil {
			failed("ravel check --host names what is missing", err)
		} else {
			preflight.IPTables = string(variant)
			if err := wholefile.Write(variantNote, []byte(variant)); err != nil {
				failed("make "+runDir+" writable", err)
			}
		}
	}
	needed, wished := preflight.Modules(ctx)
	for _, module := range slices.Concat(needed, wished) {
		err := modprobe(ctx, module)
		if err == nil {
			did("modprobe %s", module)
			continue
		}
		status := check.Fail
		if slices.Contains(wished, module) {
			status = check.Warn
		}
		lines = append(lines, line{Status: status, Name: "fix", Detail: err.Error(), Fix: "modprobe " + module +
			", as root of the host; where it is refused, sysctl kernel.modules_disabled must be 0 and the package of the kernel's modules installed"})
	}

	settings := hostSettings()
	settings.Changed = func(name, was, value string) {
		did("sysctl -w %s=%s (was %s)", strings.ReplaceAll(name, "/", "."), value, was)
	}
	links := ifaddr.New(ifaddr.Options{Sysctl: settings, Link: host.link})
	_, gone := os.Stat("/sys/class/net/" + host.link)
	if err := links.Prepare(); err != nil {
		failed("modprobe dummy, as root of the host, and ravel check --host, which names what else is in the way", err)
	} else if gone != nil {
		did("ip link add %s type dummy", host.link)
	}
	problems := links.Problems()
	switch role {
	case directorRole:
		found, err := prepareDirector(ctx, settings, c.Bool("count-packets"))
		if err != nil {
			failed("modprobe ip_vs, as root of the host; where there is no such module, boot a kernel that has it", err)
		}
		problems = append(problems, found...)
	case realserverRole:
		if err := prepareRealserver(settings); err != nil {
			failed("mount /proc/sys so that it can be written", err)
		}
	}
	lines = append(lines, problemLines(check.Fail, problems)...)
	if len(lines) == 0 {
		did("nothing was to do")
	}
	return lines, nil
}

func prepareDirector(ctx context.Context, settings *sysctl.Setter, count bool) (problems []ravel.Problem, err error) {
	d, err := director.New(director.Options{Sysctl: settings, CountPackets: count})
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, d.Close()) }()
	return d.Prepare(ctx)
}

func prepareRealserver(settings *sysctl.Setter) error {
	rs, err := realserver.New(realserver.Options{Sysctl: settings})
	if err != nil {
		return err
	}
	return rs.Prepare()
}

// modprobe loads a module and what it needs.
func modprobe(ctx context.Context, module string) error {
	ctx, cancel := context.WithTimeout(ctx, modprobeTime)
	defer cancel()
	out, err := exec.CommandContext(ctx, "modprobe", module).CombinedOutput()
	if err != nil {
		said := strings.Join(strings.Fields(string(out)), " ")
		return fmt.Errorf("loading module %s: %s", module, strings.TrimSuffix(err.Error()+": "+said, ": "))
	}
	return nil
}
