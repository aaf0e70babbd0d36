package main

import (
	"cmp"
	"fmt"
	"net"
	"slices"
	"strconv"
	"strings"

	"github.com/ravel-lb/ravel"
	"github.com/ravel-lb/ravel/internal/iptables"
)

// fate is what becomes of a flag or variable of the original.
type fate string

const (
	kept    fate = "kept"    // the same name, the same meaning
	renamed fate = "renamed" // the same meaning under another name
	idle    fate = "taken"   // taken, and without effect, because there is nothing to do
	refused fate = "refused" // its meaning has another place, which the fault names
)

// oldKind is the type of a flag of the original. A list is given by commas, by repetition, or both; a switch without
// "=" is on, whatever the next word is.
type oldKind string

const (
	oldText   oldKind = "text"
	oldList   oldKind = "list"
	oldSwitch oldKind = "switch"
)

// oldFlag is a flag of the original, which is also a key of its file.
type oldFlag struct {
	name   string
	kind   oldKind
	fate   fate
	to     string   // what it is called here
	why    string   // what is to be known, a sentence without a full stop
	only   string   // the role that it is for here; the other one takes it without effect. Empty: both
	allow  []string // of a refused one: values that say nothing, and are taken
	become func(o *oldLine, values []string)
}

// oldFlags are all of them, in the order of their names.
var oldFlags = []oldFlag{
	{name: "auto-configure-port", kind: oldText, fate: kept, to: "--auto-configure-port"},
	{name: "auto-configure-service", kind: oldText, fate: kept, to: "--auto-configure-service"},
	{name: "bgp-bin", kind: oldText, fate: idle, why: "BGP is built in; gobgp and gobgpd are not needed"},
	{name: "bgp-communities", kind: oldList, fate: refused, to: "`communities` of the fleet document", only: directorRole,
		allow: []string{""}, why: "all directors announce with the same", become: refuseCommunities},
	{name: "calico-bin", kind: oldText, fate: idle, why: "it did nothing there"},
	{name: "calico-dir", kind: oldText, fate: idle, why: "it did nothing there"},
	{name: "calico-version", kind: oldText, fate: idle, why: "it did nothing there"},
	{name: "cleanup-master", kind: oldSwitch, fate: idle, why: "it did nothing there; `--cleanup-on-exit` does what its name says"},
	{name: "compute-iface", kind: oldText, fate: idle, why: "ARP is kept quiet on all links at once"},
	{name: "compute-iface-local", kind: oldText, fate: idle, why: "the same"},
	{name: "config", kind: oldText, fate: kept, to: "--config", why: "its keys may be the original's, ours, or both"},
	{name: "config-key", kind: oldText, fate: kept, to: "--config-key"},
	{name: "config-name", kind: oldText, fate: kept, to: "--config-name"},
	{name: "config-namespace", kind: oldText, fate: kept, to: "--config-namespace",
		why: "there it named a label of metrics only and `platform-load-balancer` was read always; here it counts"},
	{name: "coordinator-port", kind: oldList, fate: idle, why: "directors and realservers find one another by gossip"},
	{name: "debug", kind: oldSwitch, fate: renamed, to: "--log-level=debug", become: switchTo("--log-level=debug")},
	{name: "failover-timeout", kind: oldText, fate: idle, why: "a realserver waits for no director on its host: the two do not share one"},
	{name: "forced-reconfigure", kind: oldSwitch, fate: idle, why: "the kernel is always read again every `--resync` (30 s)"},
	{name: "gateway", kind: oldText, fate: refused, to: "`peers` of the fleet document", only: directorRole, allow: []string{""},
		why: "it was for gratuitous ARP; VIPs are announced by BGP"},
	{name: "iptables-chain", kind: oldText, fate: kept, to: "--iptables-chain",
		why: "RAVEL, or RAVEL and up to 5 upper case letters or digits; another name is refused: " +
			"`ravel cleanup --original --iptables-chain NAME` removes what stands under it", become: chainName},
	{name: "iptables-masq", kind: oldSwitch, fate: kept, to: "--iptables-masq", only: realserverRole,
		why: "without it, the fleet document's `masquerade` counts; but a command line in the original's words gets the original's default, true"},
	{name: "ipvs-colocation-mode", kind: oldText, fate: refused, to: "a host for each role", allow: []string{"", "disabled"},
		why: "a director and a realserver cannot share a network namespace, because the redirect takes every packet before IPVS sees it"},
	{name: "ipvs-ignore-node-cordon", kind: oldSwitch, fate: kept, to: "--ipvs-ignore-node-cordon", only: directorRole,
		why: "its default was true there and is false here: a cordoned node is drained"},
	{name: "ipvs-sysctl", kind: oldList, fate: refused, to: "/etc/sysctl.d", only: directorRole, allow: []string{""},
		why: "what Ravel needs it sets itself (docs/architecture.md); others are the host's", become: refuseSysctls},
	{name: "ipvs-weight-override", kind: oldSwitch, fate: kept, to: "--ipvs-weight-override", only: directorRole,
		why: "but a node without a ready pod has weight 0 here, and gets no packets that nobody would take"},
	{name: "kubeconfig", kind: oldText, fate: kept, to: "--kubeconfig"},
	{name: "lo-announce", kind: oldText, fate: idle, why: "arp_announce is 2 at least, on all links"},
	{name: "lo-ignore", kind: oldText, fate: idle, why: "arp_ignore is 1 at least, on all links"},
	{name: "nodename", kind: oldText, fate: renamed, to: "--node", why: "`--nodename` is taken too", become: asFlag("node")},
	{name: "pod-cidr-masq", kind: oldText, fate: kept, to: "--pod-cidr-masq", only: realserverRole, why: "it may name several now"},
	{name: "primary-announce", kind: oldText, fate: idle, why: "as --lo-announce"},
	{name: "primary-ignore", kind: oldText, fate: idle, why: "as --lo-ignore"},
	{name: "primary-ip", kind: oldText, fate: idle, why: "a director is never its own real server"},
	{name: "stats-enabled", kind: oldSwitch, fate: idle, why: "since 2.6.0 it gave no series; `--count-packets` has the kernel count, without a capture"},
	{name: "stats-interface", kind: oldText, fate: idle, why: "nothing is captured"},
	{name: "stats-interval", kind: oldText, fate: idle, why: "nothing is captured"},
	{name: "stats-listen", kind: oldText, fate: renamed, to: "--listen=ADDRESS:PORT",
		why: "it was not heeded there, and is here", become: func(o *oldLine, v []string) { o.statsAddr = last(v) }},
	{name: "stats-port", kind: oldText, fate: renamed, to: "--listen=ADDRESS:PORT",
		why: "without either of the two no port is open; it was 10234 there", become: func(o *oldLine, v []string) { o.statsPort = last(v) }},
}

var (
	directorRole   = ravel.Director.String()
	realserverRole = ravel.Realserver.String()
)

// oldVariable is an environment variable of the original.
type oldVariable struct {
	name, to, why string
	fate          fate
	alone         bool // it is the original's alone: to have it set is to come from there
	become        func(o *oldLine, value string)
}

// oldVariables are all of them, in the order of their names.
var oldVariables = []oldVariable{
	{name: "HOSTNAME", fate: renamed, to: "--node", why: "in a command line in the original's words that names no node",
		become: func(o *oldLine, v string) {
			if !o.has("node") && v != "" {
				o.flag("node", v)
			}
		}},
	{name: "IPTABLES_CLI", fate: renamed, to: "--iptables", alone: true,
		why: "iptables-nft is nft, iptables-legacy is legacy, iptables is auto; another program is refused", become: iptablesCLI},
	{name: "RAVEL_DELAY", fate: idle, alone: true, why: "a new real server waits until its node reports its redirect, `--rise` at most"},
	{name: "RAVEL_EARLYLATE", fate: idle, alone: true, why: "changes are always made in an order that is safe"},
	{name: "RAVEL_LOGRULE", fate: idle, alone: true, why: "a fault of iptables-restore quotes the line"},
	{name: "SKIP_MASTER_NODE", fate: idle, alone: true, why: "a director is never its own real server"},
}

func findOld(name string) *oldFlag {
	i, found := slices.BinarySearchFunc(oldFlags, name, func(f oldFlag, name string) int { return strings.Compare(f.name, name) })
	if !found {
		return nil
	}
	return &oldFlags[i]
}

func last(values []string) string { return values[len(values)-1] }

// asFlag gives the value of a flag to one of another name.
func asFlag(name string) func(*oldLine, []string) {
	return func(o *oldLine, values []string) { o.flag(name, last(values)) }
}

// switchTo sets a flag of ours where a switch is on.
func switchTo(word string) func(*oldLine, []string) {
	return func(o *oldLine, values []string) {
		if on, _ := strconv.ParseBool(last(values)); on {
			o.args = append(o.args, word)
		}
	}
}

func refuseCommunities(o *oldLine, values []string) {
	var quoted []string
	for _, v := range values {
		if v = strings.TrimSpace(v); v != "" {
			quoted = append(quoted, strconv.Quote(v))
		}
	}
	o.refuse("--bgp-communities", "write communities: [%s] into the fleet document (three numbers: largeCommunities)",
		strings.Join(quoted, ", "))
}

func refuseSysctls(o *oldLine, values []string) {
	var lines []string
	for _, v := range values {
		if v != "" {
			lines = append(lines, "net.ipv4.vs."+v)
		}
	}
	o.refuse("--ipvs-sysctl", "Ravel sets those that it needs; write others into /etc/sysctl.d: %s", strings.Join(lines, ", "))
}

func chainName(o *oldLine, values []string) {
	name := last(values)
	if !strings.HasPrefix(name, iptables.Prefix) {
		o.refuse("--iptables-chain", "%q: Ravel's chains begin with %s: leave the flag out; when Ravel has taken over, remove the old ones by: "+
			"ravel cleanup --original --iptables-chain %s", name, iptables.Prefix, shellWord(name))
		return
	}
	o.flag("iptables-chain", name)
}

func iptablesCLI(o *oldLine, value string) {
	name := value[strings.LastIndex(value, "/")+1:]
	switch variant := strings.TrimPrefix(name, "iptables"); {
	case o.has("iptables") || value == "" || name == "iptables":
	case name == "iptables-nft", name == "iptables-legacy":
		o.flag("iptables", strings.TrimPrefix(variant, "-"))
	default:
		o.refuse("IPTABLES_CLI", "%q: set --iptables to nft or legacy, and put the program into the PATH", value)
	}
}

// listen joins the two flags of the metrics' address.
func (o *oldLine) listen() {
	if o.statsAddr == "" && o.statsPort == "" {
		return
	}
	if o.has("listen") {
		o.note("--listen counts, not --stats-listen and --stats-port")
		return
	}
	addr, port := o.statsAddr, o.statsPort
	if addr == "" {
		addr = "0.0.0.0"
	}
	if port == "" {
		port = "10234"
	}
	o.flag("listen", net.JoinHostPort(strings.Trim(addr, "[]"), strings.TrimPrefix(port, ":")))
}

// oldTables are the tables of docs/migration.md.
func oldTables() (flags, variables string) {
	row := func(b *strings.Builder, name string, fate fate, to, why, only string) {
		if strings.HasPrefix(to, "--") {
			to = "`" + to + "`"
		}
		fmt.Fprintf(b, "| `%s` | %s | %s | %s | %s |\n", name, fate, cmp.Or(to, "–"), cmp.Or(only, "both"), why)
	}
	var f, v strings.Builder
	f.WriteString("| flag there | is | here | for | what to know |\n|---|---|---|---|---|\n")
	for _, o := range oldFlags {
		row(&f, "--"+o.name, o.fate, o.to, o.why, o.only)
	}
	v.WriteString("| variable there | is | here | for | what to know |\n|---|---|---|---|---|\n")
	for _, o := range oldVariables {
		row(&v, o.name, o.fate, o.to, o.why, "")
	}
	return f.String(), v.String()
}
