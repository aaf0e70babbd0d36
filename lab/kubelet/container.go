package kubelet

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/moby/profiles/seccomp"
	"github.com/opencontainers/runtime-spec/specs-go"
	corev1 "k8s.io/api/core/v1"

	"github.com/ravel-lb/ravel/lab/fleet"
)

// run is one run of a container.
type run struct {
	id      string
	place   *fleet.Node
	process *fleet.Process
}

// state is where runc on a node keeps what it runs.
const state = "/run/runc"

// newRun begins a run of a container by runc.
func (p *pod) newRun(ctx context.Context, c *corev1.Container, restarts int32) (*run, error) {
	bundle := filepath.Join(p.o.dir(p.spec), "bundles", fmt.Sprint(c.Name, "-", restarts))
	if err := os.MkdirAll(bundle, 0o700); err != nil {
		return nil, err
	}
	spec, err := p.specOf(c, bundle)
	if err != nil {
		return nil, err
	}
	// The image's files, with a layer of the container's own on it, in which runc makes the places of mounts.
	root := filepath.Join(bundle, "root")
	script := "set -e; [ $(stat -f -c %T /sys/fs/cgroup) = cgroup2fs ] || mount -t cgroup2 none /sys/fs/cgroup\n" +
		"mkdir -p " + state + " /run/layers/" + string(p.spec.UID) + "; cd $(mktemp -d /run/layers/" + string(p.spec.UID) + "/XXXXXX); mkdir upper work\n" +
		"mkdir -p " + root + "; mount -t overlay overlay -o lowerdir=" + p.o.Roots[c.Image] + ",upperdir=$PWD/upper,workdir=$PWD/work " + root + "\n"
	if out, err := p.place.Command(ctx, "bash", "-c", script).CombinedOutput(); err != nil {
		return nil, fmt.Errorf("making the root of container %s: %w: %s", c.Name, err, out)
	}
	text, err := json.Marshal(spec)
	if err == nil {
		err = os.WriteFile(filepath.Join(bundle, "config.json"), text, 0o600)
	}
	if err != nil {
		return nil, err
	}
	r := &run{id: fmt.Sprintf("%s-%s-%d", p.spec.UID, c.Name, restarts), place: p.place}
	// Before the traffic of clients and pods, as on a host that does nothing else.
	name := "ctr-" + p.spec.Name + "-" + c.Name
	r.process, err = p.place.Spawn(name, "nice", "-n", "-10", "runc", "--root", state, "run", "--bundle", bundle, r.id)
	if err != nil {
		return nil, err
	}
	return r, nil
}

// wait waits for the end of a run. Its error is nil where the container exited with 0.
func (r *run) wait(ctx context.Context) error {
	select {
	case <-r.process.Done():
	case <-ctx.Done():
		return ctx.Err()
	}
	if err := r.process.Stop(ctx); err != nil {
		return fmt.Errorf("%w: %s", err, lastLines(r.said(), 3))
	}
	return nil
}

// said is what it, and runs of it before, wrote to both outputs.
func (r *run) said() string {
	text, _ := os.ReadFile(r.process.Log)
	return string(text)
}

func lastLines(text string, n int) string {
	lines := strings.Split(strings.TrimSpace(text), "\n")
	return strings.Join(lines[max(0, len(lines)-n):], "; ")
}

func (r *run) runs() bool {
	select {
	case <-r.process.Done():
		return false
	default:
		return true
	}
}

// signal sends a signal to the container's first process, by runc, which passes it on.
func (r *run) signal(s syscall.Signal) { _ = r.process.Signal(s) }

// kill ends the container at once, and waits for it.
func (r *run) kill() {
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	if r.runs() {
		_, _ = r.place.Command(ctx, "runc", "--root", state, "kill", r.id, "KILL").CombinedOutput()
		select {
		case <-r.process.Done():
		case <-ctx.Done():
			_ = r.process.Kill()
		}
	}
	_, _ = r.place.Command(ctx, "runc", "--root", state, "delete", "--force", r.id).CombinedOutput()
}

// defaults are the capabilities of a container that says nothing, as containerd has them.
var defaults = []string{
	"CHOWN", "DAC_OVERRIDE", "FSETID", "FOWNER", "MKNOD", "NET_RAW", "SETGID", "SETUID", "SETFCAP", "SETPCAP",
	"NET_BIND_SERVICE", "SYS_CHROOT", "KILL", "AUDIT_WRITE",
}

// capabilities of a container, as runc names them.
func capabilities(s *corev1.SecurityContext) ([]string, error) {
	if privileged(s) {
		return allCapabilities(), nil
	}
	list := slices.Clone(defaults)
	if s != nil && s.Capabilities != nil {
		for _, d := range s.Capabilities.Drop {
			if d == "ALL" {
				list = nil
			}
			list = slices.DeleteFunc(list, func(c string) bool { return c == string(d) })
		}
		for _, a := range s.Capabilities.Add {
			if a == "ALL" {
				return nil, errors.New("to add ALL capabilities is not known here")
			}
			if !slices.Contains(list, string(a)) {
				list = append(list, string(a))
			}
		}
	}
	for i := range list {
		list[i] = "CAP_" + list[i]
	}
	return list, nil
}

func privileged(s *corev1.SecurityContext) bool {
	return s != nil && s.Privileged != nil && *s.Privileged
}

// allCapabilities are all capabilities that this kernel has (include/uapi/linux/capability.h).
func allCapabilities() []string {
	names := strings.Fields(`CHOWN DAC_OVERRIDE DAC_READ_SEARCH FOWNER FSETID KILL SETGID SETUID SETPCAP LINUX_IMMUTABLE
		NET_BIND_SERVICE NET_BROADCAST NET_ADMIN NET_RAW IPC_LOCK IPC_OWNER SYS_MODULE SYS_RAWIO SYS_CHROOT SYS_PTRACE SYS_PACCT
		SYS_ADMIN SYS_BOOT SYS_NICE SYS_RESOURCE SYS_TIME SYS_TTY_CONFIG MKNOD LEASE AUDIT_WRITE AUDIT_CONTROL SETFCAP
		MAC_OVERRIDE MAC_ADMIN SYSLOG WAKE_ALARM BLOCK_SUSPEND AUDIT_READ PERFMON BPF CHECKPOINT_RESTORE`)
	last := len(names) - 1
	if text, err := os.ReadFile("/proc/sys/kernel/cap_last_cap"); err == nil {
		if n, err := strconv.Atoi(strings.TrimSpace(string(text))); err == nil {
			last = min(last, n)
		}
	}
	var all []string
	for _, n := range names[:last+1] {
		all = append(all, "CAP_"+n)
	}
	return all
}

// hiddenPaths and readonlyPaths are those of containerd's default, for containers that are not privileged.
var (
	hiddenPaths = []string{
		"/proc/acpi", "/proc/asound", "/proc/kcore", "/proc/keys", "/proc/latency_stats", "/proc/timer_list", "/proc/timer_stats",
		"/proc/sched_debug", "/sys/firmware", "/sys/devices/virtual/powercap", "/proc/scsi",
	}
	readonlyPaths = []string{"/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"}
)

// specOf is a container as runc is told of it, after what containerd makes of a pod's.
func (p *pod) specOf(c *corev1.Container, bundle string) (*specs.Spec, error) {
	if p.o.Roots[c.Image] == "" {
		return nil, fmt.Errorf("image %q is not known here", c.Image)
	}
	command := c.Command
	if len(command) == 0 {
		command = p.o.Entrypoint
	}
	env, err := p.env(c)
	if err != nil {
		return nil, err
	}
	caps, err := capabilities(c.SecurityContext)
	if err != nil {
		return nil, err
	}
	free := privileged(c.SecurityContext)
	noNew := c.SecurityContext != nil && c.SecurityContext.AllowPrivilegeEscalation != nil && !*c.SecurityContext.AllowPrivilegeEscalation
	readonly := c.SecurityContext != nil && c.SecurityContext.ReadOnlyRootFilesystem != nil && *c.SecurityContext.ReadOnlyRootFilesystem
	s := &specs.Spec{
		Version: "1.0.2",
		Root:    &specs.Root{Path: filepath.Join(bundle, "root"), Readonly: readonly},
		Process: &specs.Process{
			User: specs.User{UID: p.user(c.SecurityContext), GID: p.group(c.SecurityContext)},
			Args: expand(slices.Concat(command, c.Args), env), Env: env, Cwd: "/", NoNewPrivileges: noNew,
			Capabilities: &specs.LinuxCapabilities{Bounding: caps, Effective: caps, Permitted: caps},
		},
		Mounts: []specs.Mount{
			{Destination: "/proc", Type: "proc", Source: "proc", Options: []string{"nosuid", "noexec", "nodev"}},
			{Destination: "/dev", Type: "tmpfs", Source: "tmpfs", Options: []string{"nosuid", "strictatime", "mode=755", "size=65536k"}},
			{Destination: "/dev/pts", Type: "devpts", Source: "devpts", Options: []string{"nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620"}},
			{Destination: "/dev/shm", Type: "tmpfs", Source: "shm", Options: []string{"nosuid", "noexec", "nodev", "mode=1777", "size=65536k"}},
			{Destination: "/sys", Type: "sysfs", Source: "sysfs", Options: mode(free, "nosuid", "noexec", "nodev")},
		},
		Linux: &specs.Linux{
			// The network, and with it the name, are the node's.
			Namespaces:  []specs.LinuxNamespace{{Type: specs.PIDNamespace}, {Type: specs.IPCNamespace}, {Type: specs.MountNamespace}},
			CgroupsPath: "/ravel-" + string(p.spec.UID) + "-" + c.Name,
			Resources:   &specs.LinuxResources{},
		},
	}
	if !free {
		s.Linux.MaskedPaths, s.Linux.ReadonlyPaths = hiddenPaths, readonlyPaths
		if profile := p.seccomp(c); profile == corev1.SeccompProfileTypeRuntimeDefault {
			if s.Linux.Seccomp, err = seccomp.GetDefaultProfile(s); err != nil {
				return nil, fmt.Errorf("making the default seccomp profile: %w", err)
			}
		}
	}
	mounts, err := p.mounts(c, bundle)
	s.Mounts = append(s.Mounts, mounts...)
	return s, err
}

// user is who a container runs as: root, unless it or its pod says otherwise.
func (p *pod) user(s *corev1.SecurityContext) uint32 {
	switch pod := p.spec.Spec.SecurityContext; {
	case s != nil && s.RunAsUser != nil:
		return uint32(*s.RunAsUser)
	case pod != nil && pod.RunAsUser != nil:
		return uint32(*pod.RunAsUser)
	}
	return 0
}

func (p *pod) group(s *corev1.SecurityContext) uint32 {
	switch pod := p.spec.Spec.SecurityContext; {
	case s != nil && s.RunAsGroup != nil:
		return uint32(*s.RunAsGroup)
	case pod != nil && pod.RunAsGroup != nil:
		return uint32(*pod.RunAsGroup)
	}
	return 0
}

// mode adds whether a mount may be written to.
func mode(write bool, options ...string) []string {
	if write {
		return append(options, "rw")
	}
	return append(options, "ro")
}

func (p *pod) seccomp(c *corev1.Container) corev1.SeccompProfileType {
	if c.SecurityContext != nil && c.SecurityContext.SeccompProfile != nil {
		return c.SecurityContext.SeccompProfile.Type
	}
	if s := p.spec.Spec.SecurityContext; s != nil && s.SeccompProfile != nil {
		return s.SeccompProfile.Type
	}
	return corev1.SeccompProfileTypeUnconfined
}
