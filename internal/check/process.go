package check

import (
	"fmt"
	"strconv"
	"strings"
)

func checkKernel(f *facts) []Line {
	const newer = "boot a newer kernel"
	release := f.release()
	major, minor, known := parseRelease(release)
	if !known {
		return []Line{warn("uname -r", "the kernel's version cannot be read")}
	}
	switch {
	case f.director() && older(major, minor, 4, 18):
		return []Line{fail(newer, "%s: the Maglev scheduler came with 4.18", short(release))}
	case older(major, minor, 4, 18):
		return []Line{warn(newer, "%s is older than any kernel that Ravel is tried on", short(release))}
	case f.director() && older(major, minor, 5, 9):
		return []Line{warn(newer, "%s: before 5.9 a client that uses a port again may wait for a second", short(release))}
	}
	return []Line{ok("%s", short(release))}
}

// parseRelease reads the first two numbers of a kernel's release, as of "6.1.0-28-amd64".
func parseRelease(release string) (major, minor int, known bool) {
	first, rest, _ := strings.Cut(release, ".")
	second := rest
	if end := strings.IndexFunc(rest, func(r rune) bool { return r < '0' || r > '9' }); end >= 0 {
		second = rest[:end]
	}
	major, err := strconv.Atoi(first)
	if err != nil || major < 1 {
		return 0, 0, false
	}
	minor, err = strconv.Atoi(second)
	if err != nil {
		return 0, 0, false
	}
	return major, minor, true
}

func older(major, minor, than, thanMinor int) bool {
	return major < than || major == than && minor < thanMinor
}

// wide are the kernel's names of 64-bit little-endian machines.
var wide = map[string]bool{
	"x86_64": true, "aarch64": true, "riscv64": true, "ppc64le": true, "loongarch64": true, "alpha": true,
}

// checkMachine keeps directors apart whose Maglev tables differ: a 32-bit kernel hashes by HalfSipHash, a big-endian
// one another word.
func checkMachine(f *facts) []Line {
	const fix = "run every director on a 64-bit little-endian kernel, such as x86_64 or aarch64"
	machine, err := f.kernel.machine()
	switch {
	case err != nil:
		return []Line{warn("uname -m", "%v", err)}
	case wide[machine]:
		return []Line{ok("%s: 64 bits, little-endian", machine)}
	case machine == "mips64":
		return []Line{warn(fix, "mips64: cannot tell its byte order; directors of another pick other real servers")}
	}
	return []Line{fail(fix, "%s is not known as 64-bit and little-endian: its Maglev table differs from other directors'", short(machine))}
}

// The bits of capabilities (include/uapi/linux/capability.h).
const (
	capNetAdmin  = 12
	capNetRaw    = 13
	capSysModule = 16
)

func checkCapabilities(f *facts) []Line {
	const fix = "run it as root (sudo ravel check --host), or give the container capabilities NET_ADMIN and NET_RAW"
	status, err := f.read(f.self() + "/status")
	if err != nil {
		return []Line{warn(fix, "cannot be read: %v", err)}
	}
	caps, err := parseCaps(status)
	if err != nil {
		return []Line{warn(fix, "cannot be read: %v", err)}
	}
	has := func(bit int) bool { return caps>>bit&1 != 0 }
	var lacks []string
	if !has(capNetAdmin) {
		lacks = append(lacks, "NET_ADMIN (links, IPVS, rules)")
	}
	if !has(capNetRaw) {
		lacks = append(lacks, "NET_RAW (iptables)")
	}
	if len(lacks) > 0 {
		return []Line{fail(fix, "this process lacks %s", strings.Join(lacks, " and "))}
	}
	if !has(capSysModule) && !f.modules().none {
		return []Line{ok("NET_ADMIN and NET_RAW; without SYS_MODULE, modules that the kernel does not load by itself must be there before")}
	}
	return []Line{ok("NET_ADMIN and NET_RAW")}
}

// parseCaps finds the effective capabilities in /proc/PID/status.
func parseCaps(status string) (uint64, error) {
	for line := range strings.Lines(status) {
		if hex, found := strings.CutPrefix(line, "CapEff:"); found {
			caps, err := strconv.ParseUint(strings.TrimSpace(hex), 16, 64)
			if err != nil {
				return 0, fmt.Errorf("CapEff is %q, which is no number", short(strings.TrimSpace(hex)))
			}
			return caps, nil
		}
	}
	return 0, fmt.Errorf("there is no CapEff in the process's status")
}

func checkUserNamespace(f *facts) []Line {
	const fix = "run it in the host's user namespace (in Kubernetes hostUsers: true, in Docker --userns=host)"
	text, err := f.read(f.self() + "/uid_map")
	if missing(err) && f.exists(f.self()) {
		return []Line{ok("this kernel has none")}
	}
	if err != nil {
		return []Line{warn(fix, "cannot be read: %v", err)}
	}
	fields := strings.Fields(text)
	if len(fields) == 3 && fields[0] == "0" && fields[1] == "0" && fields[2] == "4294967295" {
		return []Line{ok("the host's own")}
	}
	return []Line{warn(fix, "not the host's: modules, some settings of IPVS and of other namespaces' links are out of reach")}
}

// checkProcSys finds the mount that /proc/sys belongs to: containers have it read-only.
func checkProcSys(f *facts) []Line {
	const fix = "ravel check --host --fix before the role starts, in a container that may (deploy/ has it), or: mount -o remount,rw /proc/sys"
	text, err := f.read(f.self() + "/mountinfo")
	if err != nil {
		return []Line{warn(fix, "cannot tell whether /proc/sys can be written: %v", err)}
	}
	for _, dir := range []string{"/proc/sys", "/proc/sys/net"} {
		readonly, found := parseMountinfo(text, dir)
		switch {
		case !found:
			return []Line{warn(fix, "no mount is known that holds %s", dir)}
		case readonly && f.director() && f.kernel.writable(f.path(strings.TrimPrefix(Elsewhere, "/")+"/"+nodest)) != nil:
			return []Line{warn("mount /proc/sys/"+nodest+" of the host at "+Elsewhere+"/"+nodest,
				"%s is mounted read-only, and one setting has to change while a director works: clients of UDP may go on "+
					"sending to a real server that is gone", dir)}
		case readonly:
			return []Line{ok("mounted read-only, as containers have it: what is to be set was set before, or has a line of its own here")}
		}
	}
	return []Line{ok("can be written")}
}

// Elsewhere is where settings of /proc/sys can be written too, by their names below it: those that a container gets
// from its host although its own /proc/sys is read-only.
const Elsewhere = "/host/proc/sys"

// nodest is the setting that a director has at 1 for the moment in which it removes a real server of a UDP service.
const nodest = "net/ipv4/vs/expire_nodest_conn"

// parseMountinfo finds the topmost mount that a directory belongs to, and whether that is read-only.
func parseMountinfo(text, dir string) (readonly, found bool) {
	longest := -1
	for line := range strings.Lines(text) {
		// ID, parent, device, root, mount point, options, … - type, source, options of the file system
		fields := strings.Fields(line)
		if len(fields) < 6 {
			continue
		}
		point := fields[4]
		inside := point == "/" || dir == point || strings.HasPrefix(dir, point+"/")
		// Of mounts at one place the last one counts.
		if !inside || len(point) < longest {
			continue
		}
		longest, found, readonly = len(point), true, hasOption(fields[5], "ro")
		for i, field := range fields {
			if field == "-" && i+3 < len(fields) {
				readonly = readonly || hasOption(fields[i+3], "ro")
			}
		}
	}
	return readonly, found
}

func hasOption(options, option string) bool {
	for o := range strings.SplitSeq(options, ",") {
		if o == option {
			return true
		}
	}
	return false
}
