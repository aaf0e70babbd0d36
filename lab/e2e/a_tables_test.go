package e2e

import (
	"bufio"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/ravel-lb/ravel"
	"github.com/ravel-lb/ravel/lab/stage"
)

// virtual is one service of IPVS as /proc/net/ip_vs shows it.
type virtual struct {
	scheduler string
	servers   map[netip.Addr]real
}

// real is a real server there.
type real struct {
	forward string // Route or Tunnel
	weight  int
}

func (v virtual) takesNewFlows() bool {
	for _, s := range v.servers {
		if s.weight > 0 {
			return true
		}
	}
	return false
}

// readIPVS reads the table of a node. It costs no process, so it can be asked often.
func readIPVS(s *stage.Stage, node string) (map[ravel.ServiceKey]virtual, error) {
	file, err := os.Open(fmt.Sprintf("/proc/%d/net/ip_vs", s.Fleet.Node(node).PID()))
	if err != nil {
		return nil, err
	}
	defer func() { _ = file.Close() }()
	table := map[ravel.ServiceKey]virtual{}
	var last virtual
	lines := bufio.NewScanner(bufio.NewReaderSize(file, 1<<16))
	for lines.Scan() {
		words := strings.Fields(lines.Text())
		switch {
		case len(words) >= 3 && (words[0] == "TCP" || words[0] == "UDP"):
			at, err := procAddrPort(words[1])
			if err != nil {
				return nil, err
			}
			proto := ravel.TCP
			if words[0] == "UDP" {
				proto = ravel.UDP
			}
			last = virtual{scheduler: words[2], servers: map[netip.Addr]real{}}
			table[ravel.ServiceKey{VIP: at.Addr(), Proto: proto, Port: at.Port()}] = last
		case len(words) >= 4 && words[0] == "->" && last.servers != nil:
			at, err := procAddrPort(words[1])
			if err != nil {
				return nil, err
			}
			weight, err := strconv.Atoi(words[3])
			if err != nil {
				return nil, err
			}
			last.servers[at.Addr()] = real{words[2], weight}
		}
	}
	return table, lines.Err()
}

// procAddrPort reads C6336414:0050 or [2001:0db8::]:0050.
func procAddrPort(text string) (netip.AddrPort, error) {
	host, port, found := cutLast(text, ":")
	n, err := strconv.ParseUint(port, 16, 16)
	if !found || err != nil {
		return netip.AddrPort{}, fmt.Errorf("%q is no address and port: %w", text, err)
	}
	if strings.HasPrefix(host, "[") {
		a, err := netip.ParseAddr(strings.Trim(host, "[]"))
		return netip.AddrPortFrom(a, uint16(n)), err
	}
	b, err := hex.DecodeString(host)
	if err != nil || len(b) != 4 {
		return netip.AddrPort{}, fmt.Errorf("%q is no address", host)
	}
	return netip.AddrPortFrom(netip.AddrFrom4([4]byte(b)), uint16(n)), nil
}

// procAddr reads C6336414 or [2001:0db8::] or 2001:0db8::, as the files of IPVS show addresses.
func procAddr(text string) (netip.Addr, bool) {
	if b, err := hex.DecodeString(text); err == nil && len(b) == 4 {
		return netip.AddrFrom4([4]byte(b)), true
	}
	a, err := netip.ParseAddr(strings.Trim(text, "[]"))
	return a, err == nil
}

func cutLast(s, sep string) (before, after string, found bool) {
	if i := strings.LastIndex(s, sep); i >= 0 {
		return s[:i], s[i+len(sep):], true
	}
	return s, "", false
}

// natTable reads the nat table of one family of a node as the kernel holds it, past iptables-save, which would cost two
// orders of magnitude more.
type natTable struct {
	fd int
	v6 bool
}

func openNAT(t *testing.T, s *stage.Stage, node string, v6 bool) natTable {
	t.Helper()
	n := natTable{fd: -1, v6: v6}
	family := unix.AF_INET
	if v6 {
		family = unix.AF_INET6
	}
	must(t, s.Fleet.Node(node).Do(func() (err error) {
		n.fd, err = unix.Socket(family, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.IPPROTO_RAW)
		return err
	}))
	t.Cleanup(func() { _ = unix.Close(n.fd) })
	return n
}

func (n natTable) get(option int, b []byte) error {
	level := unix.IPPROTO_IP
	if n.v6 {
		level = unix.IPPROTO_IPV6
	}
	for tries := 0; ; tries++ {
		size := uint32(len(b))
		_, _, errno := unix.Syscall6(unix.SYS_GETSOCKOPT, uintptr(n.fd), uintptr(level), uintptr(option),
			uintptr(unsafe.Pointer(&b[0])), uintptr(unsafe.Pointer(&size)), 0)
		if errno == 0 {
			return nil
		}
		// The lab kernel sometimes cannot write to a page that nobody has touched yet.
		if errno != unix.EFAULT || tries == 100 {
			return errno
		}
		clear(b[36:]) // behind the table's name and the size that was asked for
	}
}

// entries returns the table's rules: struct ipt_entry or ip6t_entry, one after the other.
func (n natTable) entries() ([]byte, error) {
	const getInfo, getEntries = 64, 65 // IPT_SO_GET_INFO, IPT_SO_GET_ENTRIES, and the same for IPv6
	for {
		info := make([]byte, 84) // struct ipt_getinfo
		copy(info, "nat")
		if err := n.get(getInfo, info); err != nil {
			return nil, err
		}
		size := binary.NativeEndian.Uint32(info[80:])
		b := make([]byte, 40+size) // struct ipt_get_entries
		copy(b, "nat")
		binary.NativeEndian.PutUint32(b[32:], size)
		switch err := n.get(getEntries, b); {
		case errors.Is(err, unix.EAGAIN): // replaced in between
		case err != nil:
			return nil, err
		default:
			return b[40:], nil
		}
	}
}

// rule is one entry of the table.
type rule struct {
	dst    netip.Prefix
	proto  int
	port   uint16 // the destination port it matches, 0 if none
	target string // "" for a jump or verdict
	jump   int    // where a jump leads
	data   []byte // of the target
	next   int
}

func (n natTable) rule(b []byte, at int) (r rule, ok bool) {
	dst, mask, proto, offsets, head := 4, 12, 80, 88, 112
	size := 4
	if n.v6 {
		dst, mask, proto, offsets, head = 16, 48, 128, 140, 168
		size = 16
	}
	if at < 0 || at+head > len(b) {
		return r, false
	}
	e := b[at:]
	a, _ := netip.AddrFromSlice(e[dst : dst+size])
	bits := 0
	for _, m := range e[mask : mask+size] {
		for ; m != 0; m <<= 1 {
			bits++
		}
	}
	r.dst = netip.PrefixFrom(a, bits)
	r.proto = int(binary.NativeEndian.Uint16(e[proto:]))
	target, next := int(binary.NativeEndian.Uint16(e[offsets:])), int(binary.NativeEndian.Uint16(e[offsets+2:]))
	if target < head || next < target+32 || next > len(e) {
		return r, false
	}
	r.next = at + next
	name := func(b []byte) string { s, _, _ := strings.Cut(string(b[2:31]), "\x00"); return s }
	for m := e[head:target]; len(m) >= 40; {
		if name := name(m); name == "tcp" || name == "udp" {
			r.port = binary.NativeEndian.Uint16(m[36:])
		}
		step := int(binary.NativeEndian.Uint16(m))
		if step < 32 || step > len(m) {
			return r, false
		}
		m = m[step:]
	}
	r.target, r.data = name(e[target:]), e[target+32:next]
	if r.target == "" && len(r.data) >= 4 {
		r.jump = int(int32(binary.NativeEndian.Uint32(r.data)))
	}
	return r, true
}

// pod returns where a DNAT rule leads.
func (r rule) pod(v6 bool, revision byte) netip.AddrPort {
	d := r.data
	switch {
	case v6 && len(d) >= 38:
		return netip.AddrPortFrom(netip.AddrFrom16([16]byte(d[4:20])), binary.BigEndian.Uint16(d[36:]))
	case revision == 0 && len(d) >= 18: // struct nf_nat_ipv4_multi_range_compat
		return netip.AddrPortFrom(netip.AddrFrom4([4]byte(d[8:12])), binary.BigEndian.Uint16(d[16:]))
	case len(d) >= 38: // struct nf_nat_range2
		return netip.AddrPortFrom(netip.AddrFrom4([4]byte(d[4:8])), binary.BigEndian.Uint16(d[36:]))
	}
	return netip.AddrPort{}
}

// redirects returns where each VIP:port is redirected to, sorted.
func (n natTable) redirects() (map[ravel.ServiceKey][]netip.AddrPort, error) {
	b, err := n.entries()
	if err != nil {
		return nil, err
	}
	table := map[ravel.ServiceKey][]netip.AddrPort{}
	// chain calls fn for each rule from an offset to the head of the next chain.
	chain := func(at int, fn func(at int, r rule)) {
		for {
			r, ok := n.rule(b, at)
			if !ok || r.target == "ERROR" {
				return
			}
			fn(at, r)
			at = r.next
		}
	}
	for at := 0; ; {
		r, ok := n.rule(b, at)
		if !ok {
			break
		}
		if r.target == "" && r.jump > 0 && r.dst.IsSingleIP() {
			chain(r.jump, func(_ int, s rule) {
				if s.target != "" || s.jump <= 0 || s.port == 0 {
					return
				}
				key := ravel.ServiceKey{VIP: r.dst.Addr(), Proto: ravel.Proto(s.proto), Port: s.port}
				chain(s.jump, func(at int, p rule) {
					if p.target == "DNAT" {
						table[key] = append(table[key], p.pod(n.v6, b[p.next-len(p.data)-1]))
					}
				})
				slices.SortFunc(table[key], netip.AddrPort.Compare)
			})
		}
		at = r.next
	}
	return table, nil
}

// poller asks a question again and again and notes when the answer changes.
type poller struct {
	stop chan struct{}
	done sync.WaitGroup

	mu      sync.Mutex // guards the fields below
	polls   int
	changes []change
	err     error
}

// change is an answer, and when it was first seen.
type change struct {
	at     time.Time
	before time.Time // when the answer before was last seen
	answer string
}

// poll asks every so often until the test ends or end is called.
func poll(t *testing.T, every time.Duration, ask func() (string, error)) *poller {
	t.Helper()
	p := &poller{stop: make(chan struct{})}
	t.Cleanup(p.end)
	p.done.Go(func() {
		var last time.Time
		for {
			begun := time.Now()
			answer, err := ask()
			now := time.Now()
			p.mu.Lock()
			p.polls++
			if err != nil && p.err == nil {
				p.err = err
			}
			if err == nil && (len(p.changes) == 0 || p.changes[len(p.changes)-1].answer != answer) {
				p.changes = append(p.changes, change{now, last, answer})
			}
			p.mu.Unlock()
			last = begun
			select {
			case <-p.stop:
				return
			case <-time.After(every):
			}
		}
	})
	return p
}

func (p *poller) end() {
	select {
	case <-p.stop:
	default:
		close(p.stop)
	}
	p.done.Wait()
}

// last returns the last answer.
func (p *poller) last() string {
	p.mu.Lock()
	defer p.mu.Unlock()
	if len(p.changes) == 0 {
		return ""
	}
	return p.changes[len(p.changes)-1].answer
}

// forget begins the history anew.
func (p *poller) forget() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.polls, p.changes = 0, nil
}

// history returns the answers in order, and how often was asked.
func (p *poller) history(t *testing.T) ([]change, int) {
	t.Helper()
	p.mu.Lock()
	defer p.mu.Unlock()
	must(t, p.err)
	return slices.Clone(p.changes), p.polls
}

// wordsOf writes a table on one line, so that it can be compared.
func wordsOf(table map[ravel.ServiceKey]virtual) string {
	var b strings.Builder
	for _, key := range slices.SortedFunc(maps.Keys(table), ravel.ServiceKey.Compare) {
		v := table[key]
		fmt.Fprintf(&b, "%s %s", key, v.scheduler)
		for _, a := range slices.SortedFunc(maps.Keys(v.servers), netip.Addr.Compare) {
			fmt.Fprintf(&b, " %s=%d/%s", a, v.servers[a].weight, v.servers[a].forward)
		}
		b.WriteString("; ")
	}
	return b.String()
}
