package main

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/urfave/cli/v2"

	"github.com/ravel-lb/ravel"
	"github.com/ravel-lb/ravel/gossip"
)

// fleetFlags are how both roles find the others and speak with them.
func fleetFlags() []cli.Flag {
	return []cli.Flag{
		stringFlag("fleet", "ravel", "name of the fleet; members of differently named fleets do not hear each other"),
		stringFlag("gossip-listen", defaultGossipListen, "where gossip listens, by UDP and TCP"),
		stringFlag("gossip-advertise", "", "address and port by which the others reach this one (default: the address of the default route)"),
		stringFlag("gossip-key-file", "", "file with the fleet's keys, one in base64 a line, the first one encrypts (ravel gossip-key makes one)"),
		boolFlag("gossip-insecure", false, "gossip in the clear: whoever reaches the port can change what the fleet does"),
		stringFlag("gossip-timing", string(gossip.LAN), "lan, or fast: how soon a dead member is noticed; the same for all of the fleet"),
		&cli.StringSliceFlag{Name: "seeds", EnvVars: env("seeds"), Usage: "members to join, host or host:port (default: the directors of the static file)"},
		stringFlag("seeds-file", "", "a file with more of them, one a line; it is read again as it changes"),
		durationFlag("settle", 5*time.Second, "how long a start waits to hear from the fleet before it goes by what it has"),
	}
}

// fleet reads the settings of gossip.
func (f *faults) fleet(c *cli.Context, s *values, director bool) {
	role := ravel.Realserver
	if director {
		role = ravel.Director
	}
	s.preset = gossip.Preset(f.oneOf(c, "gossip-timing", string(gossip.LAN), string(gossip.Fast)))
	s.gossip = gossip.Config{
		Name: s.node, Role: role, Version: version, Fleet: c.String("fleet"), Preset: s.preset,
		KeyFile: c.String("gossip-key-file"), Insecure: c.Bool("gossip-insecure"),
		Seeds: c.StringSlice("seeds"), SeedsFile: c.String("seeds-file"), Settle: f.duration(c, "settle", 100*time.Millisecond),
		Bind: f.addrPort(c, "gossip-listen", gossip.DefaultPort), Advertise: f.addrPort(c, "gossip-advertise", 0),
		Addrs: ownAddrs(c.String("link")),
	}
	// It knows what its settings may be, and runs nothing yet.
	if _, err := gossip.New(s.gossip); err != nil {
		f.errs = append(f.errs, err)
	}
	s.gossip.Log = s.log
}

// addrPort is the address and port of a setting, the zero value where it is empty or wrong.
func (f *faults) addrPort(c *cli.Context, name string, port uint16) netip.AddrPort {
	text := c.String(name)
	if text == "" {
		return netip.AddrPort{}
	}
	if addr, err := netip.ParseAddr(strings.Trim(text, "[]")); err == nil {
		return netip.AddrPortFrom(addr.Unmap(), port)
	}
	at, err := netip.ParseAddrPort(text)
	if err != nil {
		f.add(name, "%q: want an address, with a port or without", text)
		return netip.AddrPort{}
	}
	return netip.AddrPortFrom(at.Addr().Unmap(), at.Port())
}

// maxOwnAddrs is how many of a host's addresses its member tells.
const maxOwnAddrs = 16

// ownAddrs are the addresses of this host, without those of the link that holds VIPs; first those that packets to the
// world leave from.
func ownAddrs(vipLink string) []netip.Addr {
	var addrs []netip.Addr
	add := func(a netip.Addr) {
		if a = a.Unmap().WithZone(""); a.IsGlobalUnicast() && !slices.Contains(addrs, a) && len(addrs) < maxOwnAddrs {
			addrs = append(addrs, a)
		}
	}
	// Nothing is sent: the kernel only looks for the route.
	for _, world := range []string{"192.0.2.1:9", "[2001:db8::1]:9"} {
		if conn, err := net.Dial("udp", world); err == nil {
			add(conn.LocalAddr().(*net.UDPAddr).AddrPort().Addr())
			_ = conn.Close()
		}
	}
	links, _ := net.Interfaces()
	for _, link := range links {
		if link.Name == vipLink || link.Flags&net.FlagLoopback != 0 {
			continue
		}
		list, _ := link.Addrs()
		for _, a := range list {
			if prefix, err := netip.ParsePrefix(a.String()); err == nil {
				add(prefix.Addr())
			}
		}
	}
	return addrs
}

// bootID names the life of this kernel; empty where the kernel does not tell.
func bootID() string {
	b, _ := os.ReadFile("/proc/sys/kernel/random/boot_id")
	return strings.TrimSpace(string(b))
}

// rosterFile is where a director keeps the fleet's rosters, or nothing where none is to be kept.
func rosterFile(stateDir string) string {
	if stateDir == "" {
		return ""
	}
	return filepath.Join(stateDir, "rosters.json")
}

func gossipKeyCommand() *cli.Command {
	return &cli.Command{
		Name:  "gossip-key",
		Usage: "print a new key for --gossip-key-file, or put one into a Secret of Kubernetes that is not there yet",
		Flags: []cli.Flag{
			&cli.StringFlag{Name: "secret", Usage: "namespace/name of the Secret: it is made with the key gossip.key; one that is there is left as it is"},
			stringFlag("kubeconfig", "", "with --secret: the kubeconfig of the cluster; empty is that of this pod"),
		},
		Action: gossipKey,
	}
}

// gossipKeyName is the key of a Secret that has a fleet's keys.
const gossipKeyName = "gossip.key"

func gossipKey(c *cli.Context) error {
	key := gossip.NewKey() + "\n"
	secret := c.String("secret")
	if secret == "" {
		_, err := c.App.Writer.Write([]byte(key))
		return err
	}
	client, namespace, name, err := namespaced(c, "secret")
	if err != nil {
		return err
	}
	created, err := client.CreateSecret(c.Context, namespace, name, gossipKeyName, key)
	switch {
	case err != nil:
		return err
	case created:
		fmt.Fprintf(c.App.Writer, "secret %s is made, with a new key\n", secret)
	default:
		fmt.Fprintf(c.App.Writer, "secret %s is there already and stays as it is\n", secret)
	}
	return nil
}

var errNotSettled = errors.New("has not heard from the fleet yet")
