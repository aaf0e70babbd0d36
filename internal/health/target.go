package health

import (
	"cmp"
	"fmt"
	"net/netip"
	"strings"
)

// Kinds of probes.
const (
	// TCP is a probe that is content when the connection is set up.
	TCP = "tcp"
	// HTTP is a probe that asks for a path by HTTP/1.1 and wants an answer of 2xx or 3xx.
	HTTP = "http"
)

// Target is a real server's address and how to probe it. It is comparable.
type Target struct {
	Addr netip.Addr // without a zone, and no IPv4-mapped IPv6 address
	Port uint16     // of the node's agent, or of whatever stands for its health
	Kind string     // TCP or HTTP; empty is TCP
	Path string     // of HTTP; empty is "/"
	Host string     // of HTTP: the Host header; empty is the address and port
}

// check says what is wrong with a target.
func (t Target) check() error {
	switch {
	case !t.Addr.IsValid() || t.Addr.Is4In6() || t.Addr.Zone() != "" || t.Addr.IsUnspecified() || t.Addr.IsMulticast():
		return fmt.Errorf("address %q: cannot be a real server's", t.Addr)
	case t.Port == 0:
		return fmt.Errorf("%s: port missing", t.Addr)
	case t.Kind != "" && t.Kind != TCP && t.Kind != HTTP:
		return fmt.Errorf("%s: kind %q: want %s or %s", t.Addr, t.Kind, TCP, HTTP)
	case strings.ContainsFunc(t.Path+t.Host, func(r rune) bool { return r <= ' ' || r == 0x7f }):
		return fmt.Errorf("%s: a space or control character in path %q or host %q", t.Addr, t.Path, t.Host)
	case t.Path != "" && t.Path[0] != '/':
		return fmt.Errorf("%s: path %q: does not begin with /", t.Addr, t.Path)
	}
	return nil
}

// compare orders targets by address, then by the rest.
func (t Target) compare(u Target) int {
	return cmp.Or(t.Addr.Compare(u.Addr), cmp.Compare(t.Port, u.Port), cmp.Compare(t.Kind, u.Kind),
		cmp.Compare(t.Path, u.Path), cmp.Compare(t.Host, u.Host))
}

func (t Target) addrPort() netip.AddrPort { return netip.AddrPortFrom(t.Addr, t.Port) }
