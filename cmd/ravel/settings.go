package main

import (
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/urfave/cli/v2"

	"github.com/ravel-lb/ravel/bgp"
	"github.com/ravel-lb/ravel/gossip"
	"github.com/ravel-lb/ravel/internal/config"
	"github.com/ravel-lb/ravel/internal/desired"
	"github.com/ravel-lb/ravel/internal/ifaddr"
	"github.com/ravel-lb/ravel/internal/iptables"
	"github.com/ravel-lb/ravel/internal/settings"
	"github.com/ravel-lb/ravel/internal/sysctl"
	"github.com/ravel-lb/ravel/realserver"
)

const (
	defaultSocket = "/run/ravel/admin.sock"
	runDir        = "/run/ravel"
	sysctlNotes   = runDir + "/sysctl.json"
	lockFile      = runDir + "/lock"

	// defaultHealthPort is where a realserver's agent answers probes: beside gossip's port.
	defaultHealthPort = gossip.DefaultPort + 1

	defaultGossipListen = "[::]:7946"
	defaultHealthListen = "[::]:7947"
)

// env is the variable of a flag: --stop-wait is RAVEL_STOP_WAIT.
func env(name string) []string { return []string{settings.Variable(name)} }

func stringFlag(name, value, usage string) *cli.StringFlag {
	return &cli.StringFlag{Name: name, EnvVars: env(name), Value: value, Usage: usage}
}

func durationFlag(name string, value time.Duration, usage string) *cli.DurationFlag {
	return &cli.DurationFlag{Name: name, EnvVars: env(name), Value: value, Usage: usage}
}

func boolFlag(name string, value bool, usage string) *cli.BoolFlag {
	return &cli.BoolFlag{Name: name, EnvVars: env(name), Value: value, Usage: usage}
}

func intFlag(name string, value int, usage string) *cli.IntFlag {
	return &cli.IntFlag{Name: name, EnvVars: env(name), Value: value, Usage: usage}
}

func socketFlag() cli.Flag {
	return stringFlag("admin-socket", defaultSocket, "unix socket on which a running ravel answers")
}

func configFlag() cli.Flag {
	return stringFlag(settings.ConfigFlag, "", "a YAML file of these settings by the same names; flags and variables win over it")
}

func stateDirFlag() cli.Flag {
	return stringFlag("state-dir", "/var/lib/ravel",
		"where the last good static file is kept, for a start at which the file is bad or gone; empty keeps none")
}

func nodeFlag() cli.Flag {
	return &cli.StringFlag{Name: "node", Aliases: []string{"nodename"}, EnvVars: env("node"),
		Usage: "this host's name in the fleet (default: the hostname)"}
}

func staticFlag() cli.Flag {
	return stringFlag("static", "", "the static file: cluster, fleet, nodes and endpoints (docs/config.md)")
}

// defaultServiceFlags are the service of VIPs that have nothing on its port.
func defaultServiceFlags() []cli.Flag {
	return []cli.Flag{
		stringFlag("auto-configure-service", "", "the default service of those VIPs of vipPool that have nothing on --auto-configure-port: "+
			"namespace/service:portName; the same for all of the fleet"),
		intFlag("auto-configure-port", 0, "the port of the default service; the same for all of the fleet"),
	}
}

// defaultService reads them.
func defaultService(c *cli.Context, f *faults) *desired.DefaultService {
	d, err := config.DefaultService(c.String("auto-configure-service"), c.Int("auto-configure-port"))
	if err != nil {
		f.add("auto-configure-service", "%v", err)
	}
	return d
}

// hostFlags are how both roles meet the host.
func hostFlags() []cli.Flag {
	return []cli.Flag{
		stringFlag("iptables", "auto", "auto, nft or legacy: which iptables the node uses"),
		stringFlag("iptables-chain", "RAVEL", "name of our base chain and prefix of the others"),
		stringFlag("link", ifaddr.DefaultLink, "the dummy link that holds VIPs"),
	}
}

// commonFlags are the settings of both roles.
func commonFlags() []cli.Flag {
	return append([]cli.Flag{
		configFlag(),
		staticFlag(),
		nodeFlag(),
		socketFlag(),
		stateDirFlag(),
		stringFlag("listen", "", "TCP address for /metrics, /healthz and /readyz, such as 127.0.0.1:10234; empty opens none"),
		stringFlag("log-level", "info", "debug, info, warn or error"),
		stringFlag("log-format", "text", "text or json"),
		boolFlag("guard", true, "reject packets to a VIP that no service claims, before any local listener sees them"),
		durationFlag("blackhole", ifaddr.DefaultBlackhole, "how long a removed VIP's packets are dropped"),
		durationFlag("resync", 30*time.Second, "how often the kernel is read again, in case somebody else changed it"),
		intFlag("blast-radius", 50, "percent of all VIPs, or of all real servers, that one change of the documents may take away; "+
			"more waits for ravel accept; the same for all of the fleet, and 100 holds nothing"),
		boolFlag("cleanup-on-exit", false, "remove all that is ours on a planned stop; open flows break"),
		originalMetricsFlag(),
	}, slices.Concat(kubeFlags(), defaultServiceFlags(), fleetFlags(), hostFlags())...)
}

func directorFlags() []cli.Flag {
	return append([]cli.Flag{
		stringFlag("attract", "bgp", "bgp, or none: program and show everything, announce nothing"),
		stringFlag("router-id", "", "BGP identifier, an IPv4 address (default: the fleet document's, else the first IPv4 address there)"),
		intFlag("bgp-port", 0, "TCP port on which routers may connect; 0 only dials out"),
		&cli.StringSliceFlag{Name: "bgp-listen", EnvVars: env("bgp-listen"), Usage: "addresses of --bgp-port (default: all)"},
		durationFlag("stop-wait", bgp.DefaultStopWait, "between the withdrawal of all routes and the end of the sessions, on a planned stop"),
		durationFlag("linger", 2*time.Second, "how long a withdrawn VIP is served on: routers still send for a while"),
		durationFlag("drain", time.Minute, "how long a real server that left a service keeps its flows"),
		durationFlag("rise", 10*time.Second, "how long a new real server whose node does not report its redirect waits for its first flow"),
		durationFlag("batch", time.Second, "the least time between two changes of a service's Maglev table"),
		stringFlag("probe", "tcp", "how real servers are probed: tcp connects, http wants an answer of 2xx or 3xx, off leaves it to gossip"),
		intFlag("probe-port", defaultHealthPort, "port of the real servers that is probed: that of their --health-listen"),
		stringFlag("probe-path", "/healthz", "path that --probe=http asks for"),
		intFlag("floor", 50, "percent of a service's real servers that stay in use though they seem dead"),
		intFlag("withdraw-share", 1, "percent of new flows by which the tables of a director that stands alone must differ for it to withdraw"),
		intFlag("fleet-size", 0, "how many members vote, directors and realservers; 0 learns it"),
		boolFlag("count-packets", false, "have the kernel count flows and bytes of each service; up to Linux 6.1 this delays packets"),
	}, originalDirectorFlags()...)
}

func realserverFlags() []cli.Flag {
	return append([]cli.Flag{
		stringFlag("health-listen", defaultHealthListen, "TCP address that directors probe: /healthz, nothing else; empty opens none"),
		stringFlag("redirect", "pods", "what picks the pod: pods, Ravel's own rules; or kube-service, the Service's chain where kube-proxy in mode iptables has one for the VIP and port"),
		durationFlag("redirect-linger", 5*time.Second, "how long a redirect without pods is kept: directors still send for a while"),
		intFlag("mark", realserver.DefaultMark, "connection mark bit of redirected flows"),
		intFlag("tunnel-mark", realserver.DefaultTunnelMark, "mark bit of packets and flows that came by a director's tunnel"),
		intFlag("masquerade-mark", realserver.DefaultMasqueradeMark, "packet mark bit of flows to masquerade"),
		&cli.StringSliceFlag{Name: "pod-cidr-masq", EnvVars: env("pod-cidr-masq"), Usage: "sources that are never masqueraded, such as the pods' own networks"},
		intFlag("mtu", 0, "MTU of the path from the directors; 0 takes that of the links that they are reached by"),
	}, originalRealserverFlags()...)
}

// askFlags are those of a command that asks a running process.
func askFlags() []cli.Flag {
	return append(settings.Flags(configFlag(), socketFlag()), outputFlag())
}

// others are all settings there are: the file of a role does for every command.
func others() []cli.Flag {
	return settings.Flags(slices.Concat(commonFlags(), directorFlags(), realserverFlags())...)
}

// asks reads the settings of a command with askFlags: where to ask, and the form to print in.
func asks(c *cli.Context) (socket, format string, err error) {
	var f faults
	f.read(c)
	if format, err = output(c); err != nil {
		f.errs = append(f.errs, err)
	}
	return c.String("admin-socket"), format, f.err()
}

// values are the checked settings of both roles' flags.
type values struct {
	node, static, socket, listen string
	stateDir                     string
	kube                         *kubeValues    // nil with a static file
	listenAt                     netip.AddrPort // of listen
	log                          *slog.Logger
	variant                      string
	chain, link                  string
	guard, cleanupOnExit         bool
	blackhole, resync            time.Duration
	blastRadius                  int // percent
	defaultService               *desired.DefaultService

	attractNone                      bool
	routerID                         netip.Addr
	bgpPort                          int
	bgpListen                        []netip.Addr
	stopWait, linger, drain, rise    time.Duration
	countPackets                     bool
	redirectLinger                   time.Duration
	health                           netip.AddrPort // of a realserver: where probes are answered; not valid is nowhere
	batch                            time.Duration
	probe, probePath                 string
	probePort, fleetSize             int
	floor, withdrawShare             int // percent
	gossip                           gossip.Config
	preset                           gossip.Preset
	mark, tunnelMark, masqueradeMark uint32
	noMasquerade                     []netip.Prefix
	throughKubeProxy                 bool
	mtu                              int
	original                         originalValues
}

// faults gathers all that is wrong with the settings, so that the operator hears of everything at once.
type faults struct{ errs []error }

func (f *faults) add(name, format string, args ...any) {
	f.errs = append(f.errs, fmt.Errorf("--%s: %s", name, fmt.Sprintf(format, args...)))
}

// read gives the flags of a command what variables and the file have.
func (f *faults) read(c *cli.Context) {
	if err := settings.Apply(c, others()...); err != nil {
		f.errs = append(f.errs, err)
	}
}

func (f *faults) err() error {
	if len(f.errs) == 0 {
		return nil
	}
	return usageError{errors.Join(f.errs...)}
}

func (f *faults) oneOf(c *cli.Context, name string, known ...string) string {
	value := c.String(name)
	for _, k := range known {
		if value == k {
			return value
		}
	}
	f.add(name, "%q: want %s", value, strings.Join(known, ", "))
	return value
}

func (f *faults) duration(c *cli.Context, name string, least time.Duration) time.Duration {
	d := c.Duration(name)
	if d < least || d > 24*time.Hour {
		f.add(name, "%s: want %s to 24h", d, least)
	}
	return d
}

func (f *faults) percent(c *cli.Context, name string) int {
	n := c.Int(name)
	if n < 0 || n > 100 {
		f.add(name, "%d: want 0 to 100", n)
	}
	return n
}

func (f *faults) bit(c *cli.Context, name string) uint32 {
	value := c.Int(name)
	if value <= 0 || value > 1<<31 || value&(value-1) != 0 {
		f.add(name, "%#x: want one bit of 32", value)
		return 0
	}
	return uint32(value)
}

// host reads the settings of how we meet the host.
func (f *faults) host(c *cli.Context, s *values) {
	s.variant = f.oneOf(c, "iptables", "auto", string(iptables.NFT), string(iptables.Legacy))
	s.chain, s.link = c.String("iptables-chain"), c.String("link")
	if len(s.link) == 0 || len(s.link) > 15 || strings.ContainsAny(s.link, "/ \t\n:") {
		f.add("link", "%q: want the name of a link, 15 characters at most", s.link)
	}
	// The applier knows how a chain may be named, and touches nothing yet.
	if _, err := realserver.New(realserver.Options{Sysctl: sysctl.New("/proc/sys", ""), Chain: s.chain}); err != nil {
		f.add("iptables-chain", "%v", err)
	}
}

// listenAddr is the TCP address of a setting, the zero one where that is empty or wrong. Names are resolved, so what is
// good here can only be taken, or not this host's.
func (f *faults) listenAddr(text string) netip.AddrPort {
	if text == "" {
		return netip.AddrPort{}
	}
	a, err := net.ResolveTCPAddr("tcp", text)
	switch {
	case err != nil:
		f.add("listen", "%q: %v", text, err)
		return netip.AddrPort{}
	case a.Port == 0:
		f.add("listen", "%q: want a port, 1 to 65535", text)
		return netip.AddrPort{}
	}
	at := a.AddrPort()
	if !at.Addr().IsValid() { // all of this host's
		return netip.AddrPortFrom(netip.IPv4Unspecified(), at.Port())
	}
	return netip.AddrPortFrom(at.Addr().Unmap(), at.Port())
}

// listens are the TCP addresses that a role listens on, as listenAddrs has them.
func (s *values) listens() []string {
	var all []string
	if s.listenAt.IsValid() {
		all = append(all, s.listenAt.String())
	}
	if s.bgpPort > 0 {
		all = append(all, netip.AddrPortFrom(netip.IPv4Unspecified(), uint16(s.bgpPort)).String())
	}
	for _, at := range []netip.AddrPort{s.gossip.Bind, s.health} {
		if at.IsValid() {
			all = append(all, at.String())
		}
	}
	return all
}

// readSettings checks every setting of a role and touches nothing.
func readSettings(c *cli.Context, director bool) (values, error) {
	var f faults
	f.read(c)
	s := values{
		static: c.String("static"), socket: c.String("admin-socket"), listen: c.String("listen"),
		stateDir: c.String("state-dir"), node: c.String("node"), guard: c.Bool("guard"), cleanupOnExit: c.Bool("cleanup-on-exit"),
	}
	if s.node == "" {
		name, err := os.Hostname()
		if err != nil {
			f.add("node", "not set, and the hostname cannot be read: %v", err)
		}
		s.node = name
	}
	s.kube = f.kube(c, s, director)
	if s.socket == "" {
		f.add("admin-socket", "not set")
	}
	s.listenAt = f.listenAddr(s.listen)
	s.log = f.logger(c)
	f.host(c, &s)
	f.fleet(c, &s, director)
	s.blackhole = f.duration(c, "blackhole", time.Second)
	s.resync = f.duration(c, "resync", time.Second)
	s.blastRadius = f.percent(c, "blast-radius")
	s.defaultService = defaultService(c, &f)
	s.original = originalOf(c, director)
	if director {
		f.director(c, &s)
	} else {
		f.realserver(c, &s)
	}
	return s, f.err()
}

func (f *faults) logger(c *cli.Context) *slog.Logger {
	var level slog.Level
	if err := level.UnmarshalText([]byte(f.oneOf(c, "log-level", "debug", "info", "warn", "error"))); err != nil {
		level = slog.LevelInfo
	}
	options := &slog.HandlerOptions{Level: level}
	if f.oneOf(c, "log-format", "text", "json") == "json" {
		return slog.New(slog.NewJSONHandler(c.App.ErrWriter, options))
	}
	return slog.New(slog.NewTextHandler(c.App.ErrWriter, options))
}

func (f *faults) director(c *cli.Context, s *values) {
	s.attractNone = f.oneOf(c, "attract", "bgp", "none") == "none"
	if text := c.String("router-id"); text != "" {
		id, err := netip.ParseAddr(text)
		if err != nil || !id.Is4() || id.IsUnspecified() {
			f.add("router-id", "%q: want an IPv4 address", text)
		}
		s.routerID = id
	}
	if s.bgpPort = c.Int("bgp-port"); s.bgpPort < 0 || s.bgpPort > 65535 {
		f.add("bgp-port", "%d: want 0 to 65535", s.bgpPort)
	}
	for _, text := range c.StringSlice("bgp-listen") {
		a, err := netip.ParseAddr(text)
		if err != nil {
			f.add("bgp-listen", "%q: want an address", text)
		}
		s.bgpListen = append(s.bgpListen, a)
	}
	if len(s.bgpListen) > 0 && s.bgpPort == 0 {
		f.add("bgp-listen", "set, but --bgp-port is 0: nothing listens")
	}
	s.stopWait = f.duration(c, "stop-wait", 0)
	if s.stopWait > 8*time.Second {
		f.add("stop-wait", "%s: want 8s at most, because a planned stop is over in 10s", s.stopWait)
	}
	if s.stopWait == 0 {
		s.stopWait = -1 // no wait; bgp.Options takes 0 for its default
	}
	s.linger, s.drain, s.rise = f.duration(c, "linger", 0), f.duration(c, "drain", 0), f.duration(c, "rise", 0)
	s.countPackets = c.Bool("count-packets")
	s.batch = f.duration(c, "batch", 0)
	s.probe, s.probePath = f.oneOf(c, "probe", "tcp", "http", "off"), c.String("probe-path")
	if s.probePort = c.Int("probe-port"); s.probePort < 1 || s.probePort > 65535 {
		f.add("probe-port", "%d: want 1 to 65535", s.probePort)
	}
	s.floor, s.withdrawShare = f.percent(c, "floor"), f.percent(c, "withdraw-share")
	if s.fleetSize = c.Int("fleet-size"); s.fleetSize < 0 {
		f.add("fleet-size", "%d: want 0 or the number of members", s.fleetSize)
	}
}

func (f *faults) realserver(c *cli.Context, s *values) {
	if text := c.String("health-listen"); text != "" {
		s.health = f.addrPort(c, "health-listen", defaultHealthPort)
	}
	s.redirectLinger = f.duration(c, "redirect-linger", 0)
	s.mark, s.tunnelMark, s.masqueradeMark = f.bit(c, "mark"), f.bit(c, "tunnel-mark"), f.bit(c, "masquerade-mark")
	for _, text := range c.StringSlice("pod-cidr-masq") {
		p, err := netip.ParsePrefix(text)
		if err != nil {
			f.add("pod-cidr-masq", "%q: want a prefix such as 10.42.0.0/16", text)
		}
		s.noMasquerade = append(s.noMasquerade, p)
	}
	// The applier knows what its settings may be, and touches nothing yet.
	_, err := realserver.New(realserver.Options{
		Sysctl: sysctl.New("/proc/sys", ""), Mark: s.mark, TunnelMark: s.tunnelMark, MasqueradeMark: s.masqueradeMark,
	})
	if err != nil {
		f.errs = append(f.errs, err)
	}
	s.throughKubeProxy = f.oneOf(c, "redirect", "pods", "kube-service") == "kube-service"
	if s.mtu = c.Int("mtu"); s.mtu != 0 && (s.mtu < 1280 || s.mtu > 65535) {
		f.add("mtu", "%d: want 1280 to 65535, or 0", s.mtu)
	}
}
