package fleet

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"

	"github.com/ravel-lb/ravel/lab/topology"
	"golang.org/x/sys/unix"
)

// Node is a machine of the fleet. Its methods may be called by any goroutine.
type Node struct {
	Place // the node's own network
	name  string
	topo  topology.Node
	opts  Options
	init  *exec.Cmd // process 1 of the node: all the others end with it

	mu     sync.Mutex // guards the fields below
	pods   map[string]*Place
	killed bool
}

func newNode(t topology.Node, opts Options) (*Node, error) {
	n := &Node{name: t.Name, topo: t, opts: opts, pods: map[string]*Place{}}
	main, err := newThread(n.create)
	if err != nil {
		return nil, err
	}
	n.Place = Place{thread: main, node: n}
	return n, nil
}

// create makes the node's namespaces for the calling thread and starts process 1 in them.
func (n *Node) create() error {
	const flags = unix.CLONE_NEWNET | unix.CLONE_NEWNS | unix.CLONE_NEWUTS | unix.CLONE_NEWIPC
	if err := unix.Unshare(flags); err != nil {
		return fmt.Errorf("making namespaces: %w", err)
	}
	if err := unix.Sethostname([]byte(n.name)); err != nil {
		return err
	}
	if err := mounts(n.topo, n.opts.Keep); err != nil {
		return err
	}
	if err := unix.Mount("sysfs", "/sys", "sysfs", 0, ""); err != nil {
		return fmt.Errorf("mounting /sys: %w", err)
	}
	if err := up("lo"); err != nil {
		return err
	}
	// The thread loses sight of the machine's /proc when process 1 mounts its own.
	proc, err := os.Open("/proc")
	if err != nil {
		return err
	}
	defer func() { _ = proc.Close() }()
	// Only a process of the new process namespace can mount its /proc. Children of a process that ignores SIGCHLD leave
	// no zombies, and sleep inherits that.
	n.init = exec.Command("sh", "-c", "exec 2>&1; mount -t proc proc /proc && trap '' CHLD && exec sleep infinity >/dev/null 2>&1")
	n.init.SysProcAttr = &syscall.SysProcAttr{Cloneflags: unix.CLONE_NEWPID, Pdeathsig: syscall.SIGKILL}
	mounted, err := n.init.StdoutPipe()
	if err != nil {
		return err
	}
	if err := n.init.Start(); err != nil {
		return fmt.Errorf("starting process 1: %w", err)
	}
	problem, err := io.ReadAll(mounted) // ends when sleep starts
	if len(problem) > 0 {
		err = fmt.Errorf("mounting /proc: %s", problem)
	}
	if err == nil {
		err = n.adopt(proc)
	}
	if err != nil {
		_ = n.init.Process.Kill()
		_ = n.init.Wait()
		return err
	}
	return nil
}

// adopt lets children of the calling thread be born among the node's processes.
func (n *Node) adopt(proc *os.File) error {
	fd, err := unix.Openat(int(proc.Fd()), fmt.Sprintf("%d/ns/pid", n.init.Process.Pid), unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer func() { _ = unix.Close(fd) }()
	if err := unix.Setns(fd, unix.CLONE_NEWPID); err != nil {
		return fmt.Errorf("entering the node's processes: %w", err)
	}
	return nil
}

// configure runs the commands of the topology, in order.
func (n *Node) configure(ctx context.Context) error {
	for _, b := range batches(n.topo.Exec) {
		cmd := n.Command(ctx, b.args...)
		if b.input != "" {
			cmd.Stdin = strings.NewReader(b.input)
		}
		out, err := cmd.CombinedOutput()
		if ctx.Err() != nil {
			return context.Cause(ctx) // the reason, not that the command was killed for it
		}
		if err != nil {
			return fmt.Errorf("%s: %w: %s%s", strings.Join(b.args, " "), err, out, b.input)
		}
	}
	return nil
}

// Name returns the node's name in the topology.
func (n *Node) Name() string { return n.name }

// PID returns process 1 of the node, as this process sees it: nsenter(1) finds the node by it.
func (n *Node) PID() int { return n.init.Process.Pid }

// Path returns where this process finds a file of the node, such as a socket below /run.
func (n *Node) Path(path string) string {
	return filepath.Join(fmt.Sprintf("/proc/%d/root", n.init.Process.Pid), path)
}

// Pod returns a network namespace that the node's commands made with `ip netns add`. All but the network is the node's.
func (n *Node) Pod(name string) (*Place, error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.killed {
		return nil, fmt.Errorf("%s: %w", n.name, errEnded)
	}
	if p := n.pods[name]; p != nil {
		return p, nil
	}
	pid := n.init.Process.Pid
	t, err := newThread(func() error { return enter(pid, n.Path("/run/netns/"+name)) })
	if err != nil {
		return nil, fmt.Errorf("pod %s of %s: %w", name, n.name, err)
	}
	n.pods[name] = &Place{thread: t, node: n}
	return n.pods[name], nil
}

// dead reports whether kill was called.
func (n *Node) dead() bool {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.killed
}

// kill ends every process of the node; its network stays.
func (n *Node) kill() {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.killed {
		return
	}
	n.killed = true
	_ = n.init.Process.Kill()
	// Process 1 is not gone before all the others are (pid_namespaces(7)).
	_ = n.init.Wait()
}

// end takes all of the node away.
func (n *Node) end() {
	n.kill()
	for _, p := range n.pods {
		p.thread.end()
	}
	n.thread.end()
}

// hidden are the directories of which each node has its own, empty at first.
var hidden = []string{"/run", "/tmp", "/var/tmp", "/var/log"}

// mounts makes the calling thread's mounts a node's: own directories for what programs leave, and the topology's binds.
func mounts(t topology.Node, keep []string) error {
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return fmt.Errorf("making mounts private: %w", err)
	}
	kept := map[string]int{}
	defer func() {
		for _, fd := range kept {
			_ = unix.Close(fd)
		}
	}()
	if wd, err := os.Getwd(); err == nil {
		keep = append([]string{wd}, keep...)
	}
	for _, b := range t.Binds {
		keep = append(keep, b.Source)
	}
	for _, path := range keep {
		if _, twice := kept[path]; twice || !isHidden(path) {
			continue
		}
		fd, err := unix.Open(path, unix.O_PATH|unix.O_CLOEXEC, 0)
		if err != nil {
			return fmt.Errorf("opening %s: %w", path, err)
		}
		kept[path] = fd
	}
	for _, dir := range hidden {
		if err := unix.Mount("tmpfs", dir, "tmpfs", unix.MS_NOSUID|unix.MS_NODEV, "mode=1777"); err != nil {
			return fmt.Errorf("mounting %s: %w", dir, err)
		}
	}
	for _, b := range t.Binds {
		source := b.Source
		if fd, ok := kept[source]; ok {
			source = fmt.Sprintf("/proc/self/fd/%d", fd)
		}
		if err := bind(source, b.Target, b.ReadOnly); err != nil {
			return fmt.Errorf("binding %s to %s: %w", b.Source, b.Target, err)
		}
		if fd, ok := kept[b.Source]; ok {
			_ = unix.Close(fd)
			delete(kept, b.Source)
		}
	}
	for path, fd := range kept {
		if err := bind(fmt.Sprintf("/proc/self/fd/%d", fd), path, false); err != nil {
			return fmt.Errorf("keeping %s: %w", path, err)
		}
	}
	return nil
}

func isHidden(path string) bool {
	for _, dir := range hidden {
		if strings.HasPrefix(path, dir+"/") {
			return true
		}
	}
	return false
}

// bind shows source at target. A target below a hidden directory is made; any other one must be there, because the
// machine's own files are not the lab's to change.
func bind(source, target string, readOnly bool) error {
	info, err := os.Stat(source)
	if err != nil {
		return err
	}
	if isHidden(target) {
		err = os.MkdirAll(filepath.Dir(target), 0o755)
		if err == nil && info.IsDir() {
			err = os.MkdirAll(target, 0o755)
		} else if err == nil {
			err = os.WriteFile(target, nil, 0o644)
		}
		if err != nil {
			return err
		}
	}
	if err := unix.Mount(source, target, "", unix.MS_BIND|unix.MS_REC, ""); err != nil {
		if errors.Is(err, unix.ENOENT) {
			return fmt.Errorf("%w: %s is not on this machine (lab/setup installs what the lab needs)", err, target)
		}
		return err
	}
	if !readOnly {
		return nil
	}
	return unix.Mount("", target, "", unix.MS_BIND|unix.MS_REMOUNT|unix.MS_RDONLY, "")
}
