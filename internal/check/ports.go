package check

import (
	"bufio"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"os"
	"strconv"
	"strings"
)

// listener is a TCP socket that listens.
type listener struct {
	addr  netip.AddrPort
	inode string
}

func checkPorts(f *facts) []Line {
	if len(f.Listen) == 0 {
		return nil
	}
	var taken []listener
	for _, name := range []string{"tcp", "tcp6"} {
		file, err := os.Open(f.path(f.net() + "/" + name))
		if missing(err) && name == "tcp6" {
			continue
		}
		if err != nil {
			return []Line{warn("ss -lnt", "cannot tell which ports are taken: %v", err)}
		}
		found, err := parseListeners(file)
		_ = file.Close()
		if err != nil {
			return []Line{warn("ss -lnt", "cannot tell which ports are taken: %v", err)}
		}
		taken = append(taken, found...)
	}
	var lines []Line
	for _, want := range f.Listen {
		for _, l := range taken {
			if !collide(want, l.addr) {
				continue
			}
			comm, pid := f.owner(l.inode)
			switch {
			case comm == "ravel":
				lines = append(lines, warn("kill "+strconv.Itoa(pid)+", or go on with the one that runs", "port %d: a ravel listens on %s already (process %d)", want.Port(), l.addr, pid))
			case comm != "":
				lines = append(lines, fail(fmt.Sprintf("stop process %d, or set another port", pid), "port %d: %s listens on %s (process %d)", want.Port(), comm, l.addr, pid))
			default:
				lines = append(lines, fail(fmt.Sprintf("ss -lntp 'sport = :%d', then stop it or set another port", want.Port()), "port %d: another program listens on %s", want.Port(), l.addr))
			}
			break
		}
	}
	if len(lines) == 0 {
		return []Line{ok("%d free", len(f.Listen))}
	}
	return lines
}

// collide reports whether both cannot be listened on: the same port, and one of the addresses is all or they are equal.
func collide(want, have netip.AddrPort) bool {
	if want.Port() == 0 || want.Port() != have.Port() {
		return false
	}
	w, h := want.Addr().Unmap(), have.Addr().Unmap()
	if !w.IsValid() || w.IsUnspecified() && w.Is6() || h.IsUnspecified() && h.Is6() {
		return true // [::] takes IPv4 as well, unless told otherwise
	}
	return w == h || w.Is4() == h.Is4() && (w.IsUnspecified() || h.IsUnspecified())
}

// owner finds the process that has a socket, "" if it cannot be seen from here.
func (f *facts) owner(inode string) (comm string, pid int) {
	entries, err := os.ReadDir(f.path("proc"))
	if err != nil {
		return "", 0
	}
	for _, e := range entries {
		pid, err := strconv.Atoi(e.Name())
		if err != nil {
			continue
		}
		dir := "proc/" + e.Name()
		fds, err := os.ReadDir(f.path(dir + "/fd"))
		if err != nil {
			continue
		}
		for _, fd := range fds {
			if to, err := os.Readlink(f.path(dir + "/fd/" + fd.Name())); err == nil && to == "socket:["+inode+"]" {
				if comm, err = f.read(dir + "/comm"); err != nil {
					comm = "a process"
				}
				return comm, pid
			}
		}
	}
	return "", 0
}

// parseListeners reads /proc/net/tcp or tcp6: number, local address, remote address, state, …, inode tenth. Lines that
// it cannot read it leaves out.
func parseListeners(r io.Reader) ([]listener, error) {
	const listens = "0A"
	var all []listener
	scanner := bufio.NewScanner(r)
	for scanner.Scan() {
		fields := strings.Fields(scanner.Text())
		if len(fields) < 10 || fields[3] != listens {
			continue
		}
		if addr, good := parseSocketAddr(fields[1]); good {
			all = append(all, listener{addr, fields[9]})
		}
	}
	return all, scanner.Err()
}

// parseSocketAddr reads "0100007F:0050": 32-bit words of the address in the host's order, and the port.
func parseSocketAddr(s string) (netip.AddrPort, bool) {
	text, portText, _ := strings.Cut(s, ":")
	port, err := strconv.ParseUint(portText, 16, 16)
	if err != nil {
		return netip.AddrPort{}, false
	}
	raw, err := hex.DecodeString(text)
	if err != nil || len(raw) != 4 && len(raw) != 16 {
		return netip.AddrPort{}, false
	}
	for i := 0; i < len(raw); i += 4 {
		binary.NativeEndian.PutUint32(raw[i:], binary.BigEndian.Uint32(raw[i:]))
	}
	addr, _ := netip.AddrFromSlice(raw)
	return netip.AddrPortFrom(addr, uint16(port)), true
}

func checkSocket(f *facts) []Line {
	if f.Socket == "" {
		return nil
	}
	path := f.given(f.Socket)
	info, err := os.Stat(path)
	switch {
	case errors.Is(err, os.ErrNotExist):
		return []Line{ok("%s is free", f.Socket)}
	case err != nil:
		return []Line{warn("ls -l "+word(f.Socket), "cannot be looked at: %v", err)}
	case info.Mode()&os.ModeSocket == 0:
		return []Line{fail("rm "+word(f.Socket)+", or set another path", "%s is there and is no socket", f.Socket)}
	case f.kernel.answers(path):
		return []Line{warn("ravel version (of the one that runs), or set another path", "a ravel answers on %s already", f.Socket)}
	}
	return []Line{ok("%s is left by a process that is gone; it is taken over", f.Socket)}
}
