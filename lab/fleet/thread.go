package fleet

import (
	"errors"
	"fmt"
	"os"
	"runtime"
	"sync"

	"golang.org/x/sys/unix"
)

// thread is an operating system thread that lives in the namespaces of a node and runs there what others hand it.
// Processes that it starts are born in them.
type thread struct {
	jobs chan func()
	once sync.Once
	stop chan struct{} // closed when it shall end
	done chan struct{} // closed when it has ended
}

var errEnded = errors.New("the node is gone")

// newThread starts a thread and runs enter on it, which moves it to its place.
func newThread(enter func() error) (*thread, error) {
	t := &thread{jobs: make(chan func()), stop: make(chan struct{}), done: make(chan struct{})}
	ready := make(chan error)
	go t.run(enter, ready)
	if err := <-ready; err != nil {
		return nil, err
	}
	return t, nil
}

func (t *thread) run(enter func() error, ready chan<- error) {
	// Never unlocked: the thread ends with the goroutine, because no other may inherit its namespaces.
	runtime.LockOSThread()
	if unix.Gettid() == os.Getpid() {
		// The main thread cannot end. Hold it until another goroutine has found another thread.
		held := make(chan error)
		go t.run(enter, held)
		err := <-held
		runtime.UnlockOSThread()
		ready <- err
		return
	}
	defer close(t.done)
	// The root and working directory are the process's until the thread has its own, and then it may move.
	err := unix.Unshare(unix.CLONE_FS)
	if err == nil {
		err = enter()
	}
	ready <- err
	if err != nil {
		return
	}
	for {
		select {
		case job := <-t.jobs:
			job()
		case <-t.stop:
			return
		}
	}
}

// do runs fn on the thread and returns its error.
func (t *thread) do(fn func() error) error {
	result := make(chan error, 1)
	select {
	case t.jobs <- func() { result <- fn() }:
		return <-result
	case <-t.done:
		return errEnded
	}
}

// end stops the thread and waits until it is gone.
func (t *thread) end() {
	t.once.Do(func() { close(t.stop) })
	<-t.done
}

// enter moves the calling thread to the namespaces of a process; the network may be another one.
func enter(pid int, network string) error {
	for _, ns := range []struct {
		path string
		kind int
	}{
		{fmt.Sprintf("/proc/%d/ns/ipc", pid), unix.CLONE_NEWIPC},
		{fmt.Sprintf("/proc/%d/ns/uts", pid), unix.CLONE_NEWUTS},
		{network, unix.CLONE_NEWNET},
		{fmt.Sprintf("/proc/%d/ns/pid", pid), unix.CLONE_NEWPID},
		{fmt.Sprintf("/proc/%d/ns/mnt", pid), unix.CLONE_NEWNS},
	} {
		fd, err := unix.Open(ns.path, unix.O_RDONLY|unix.O_CLOEXEC, 0)
		if err != nil {
			return fmt.Errorf("opening %s: %w", ns.path, err)
		}
		err = unix.Setns(fd, ns.kind)
		_ = unix.Close(fd)
		if err != nil {
			return fmt.Errorf("entering %s: %w", ns.path, err)
		}
	}
	return nil
}
