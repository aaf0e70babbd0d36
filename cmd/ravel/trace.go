package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/urfave/cli/v2"

	"github.com/ravel-lb/ravel"
	"github.com/ravel-lb/ravel/internal/admin"
	"github.com/ravel-lb/ravel/internal/desired"
	"github.com/ravel-lb/ravel/internal/maglev"
	"github.com/ravel-lb/ravel/internal/node"
)

// traceWords name a flow.
type traceWords struct {
	Client netip.Addr  `json:"client"`
	Port   uint16      `json:"clientPort,omitempty"` // 0 is not said
	VIP    netip.Addr  `json:"vip"`
	Proto  ravel.Proto `json:"protocol"`
	To     uint16      `json:"port"`
}

func (w traceWords) key() ravel.ServiceKey {
	return ravel.ServiceKey{VIP: w.VIP, Proto: w.Proto, Port: w.To}
}

func (w traceWords) client() netip.AddrPort { return netip.AddrPortFrom(w.Client, w.Port) }

// fault is what is wrong with the words, or nil.
func (w traceWords) fault() error {
	for _, a := range []netip.Addr{w.Client, w.VIP} {
		if !a.IsValid() || a.Zone() != "" || a.Is4In6() || a.IsUnspecified() || a.IsMulticast() {
			return fmt.Errorf("%s can be neither client nor VIP", a)
		}
	}
	switch {
	case w.Client.Is4() != w.VIP.Is4():
		return fmt.Errorf("the client %s and the VIP %s are of two families", w.Client, w.VIP)
	case w.To == 0:
		return errors.New("want a port of the VIP, 1 to 65535")
	case w.Proto != ravel.TCP && w.Proto != ravel.UDP:
		return fmt.Errorf("protocol %s: want tcp or udp", w.Proto)
	}
	return nil
}

// traceAnswer is where a flow goes, and why, by what the kernel holds.
type traceAnswer struct {
	Director string `json:"director"`
	traceWords
	Name      string   `json:"name,omitempty"`
	Held      bool     `json:"held"` // the kernel has the service
	Scheduler string   `json:"scheduler,omitempty"`
	Flags     []string `json:"flags,omitempty"`
	OnePacket bool     `json:"onePacket,omitempty"`
	TableSize int      `json:"tableSize,omitempty"`
	// Assumed says that the table size is not known yet, so that it is taken for the usual one.
	Assumed bool        `json:"tableSizeAssumed,omitempty"`
	Reals   []traceReal `json:"realServers,omitempty"` // as the kernel's list holds them

	// Slot is that of the flow, and Owner whose it is. Both are absent where the client's port decides and was not said.
	Slot  *int       `json:"slot,omitempty"`
	Owner netip.Addr `json:"owner,omitzero"`
	// Pick gets the flow if it is a new one; Tries is how many other slots were looked at for it. It is absent where nobody
	// gets it. Why says how it came to that.
	Pick  netip.Addr `json:"pick,omitzero"`
	Tries int        `json:"tries,omitempty"`
	Why   string     `json:"why"`
	// Next would get it without Pick.
	Next netip.Addr `json:"next,omitzero"`
	// Wanted gets it once the kernel holds what is wanted, where that is another table now; invalid is nobody.
	Wanted *netip.Addr `json:"wanted,omitempty"`

	// Pinned is where the kernel sends the flow because it is open already; Searched says that all connections were looked
	// through for it, or it was found.
	Pinned   netip.Addr `json:"pinned,omitzero"`
	Searched bool       `json:"searched"`

	// Agree are the live directors that pick as this one does, Differ those that do not, and Silent those that do not say.
	Agree  []string       `json:"agree,omitempty"`
	Differ []traceDiffers `json:"differ,omitempty"`
	Silent []string       `json:"silent,omitempty"`

	Announced bool   `json:"announced"`        // this director announces the VIP
	WhyNot    string `json:"whyNot,omitempty"` // why it does not
	standing
}

type traceDiffers struct {
	Director string `json:"director"`
	What     string `json:"what"`
}

// traceReal is a real server of the kernel's list.
type traceReal struct {
	Addr       netip.Addr `json:"address"`
	Node       string     `json:"node,omitempty"`
	State      string     `json:"state"` // of its entry in the roster; "none" without one
	Weight     int        `json:"weight"`
	LastWeight int        `json:"lastWeight"`
	Slots      int        `json:"slots"`
	// Ports is how many of the client's ports 1024 to 65535 it gets, where the port decides and was not said.
	Ports int `json:"ports,omitempty"`
	// Why says why it takes no new flows.
	Why string `json:"why,omitempty"`
}

// searchFor bounds the search for an open flow.
const searchFor = 2 * time.Second

// kernelTable is what trace and plan ask of this director's kernel.
type kernelTable struct {
	// read returns our services as the kernel holds them, by key.
	read func(context.Context) ([]ravel.VirtualService, error)
	// connections gives the connections to each until that says no; all says that it got them all.
	connections func(ctx context.Context, each func(connection) bool) (all bool, err error)
}

// trace answers by what the kernel holds.
func (p *process) trace(n *node.Node, kernel kernelTable) admin.Command {
	return func(ctx context.Context, words func(any) error) (any, error) {
		var w traceWords
		if err := words(&w); err != nil {
			return nil, err
		}
		if err := w.fault(); err != nil {
			return nil, &admin.Refusal{Reason: err.Error(), Usage: true}
		}
		held, err := kernel.read(ctx)
		if err != nil {
			return nil, err
		}
		c, _ := p.computed.Latest()
		t := tracing{c: c, fleet: p.known(), guarded: p.settings.guard, traceAnswer: traceAnswer{
			Director: p.settings.node, traceWords: w, standing: p.standing(p.known()),
		}}
		for _, v := range p.vips(n).VIPs {
			if v.VIP == w.VIP {
				t.vip = v
			}
		}
		t.look(held)
		if t.Held && w.Port != 0 && !t.OnePacket {
			ctx, cancel := context.WithTimeout(ctx, searchFor)
			defer cancel()
			t.Searched, err = kernel.connections(ctx, func(open connection) bool {
				if open.service == w.key() && open.client == w.client() {
					t.Pinned = open.real
				}
				return !t.Pinned.IsValid()
			})
			t.Searched = t.Searched || t.Pinned.IsValid()
		}
		return t.traceAnswer, err
	}
}

// tracing is a trace under way. It is pure.
type tracing struct {
	c       computed
	fleet   ravel.Fleet
	guarded bool
	vip     vipStatus
	traceAnswer
}

// tableSize is the number of slots of a director's tables; false while it is not known, when the usual one will do.
func tableSize(fleet ravel.Fleet, director string) (maglev.Size, bool) {
	if slots := maglev.Size(fleet.Reports[director].TableSize); slots.Index() != 0 {
		return slots, true
	}
	return maglev.DefaultSize, false
}

// serviceOf finds a service in a list that is sorted by key.
func serviceOf(services []ravel.VirtualService, key ravel.ServiceKey) (ravel.VirtualService, bool) {
	i, found := slices.BinarySearchFunc(services, key, func(s ravel.VirtualService, key ravel.ServiceKey) int { return s.Key.Compare(key) })
	if !found {
		return ravel.VirtualService{}, false
	}
	return services[i], true
}

// look follows the flow through what the kernel holds.
func (t *tracing) look(kernel []ravel.VirtualService) {
	t.Announced, t.WhyNot = t.vip.Announced, t.vip.Why
	held, holds := serviceOf(kernel, t.key())
	wanted, wants := serviceOf(t.c.state.Services, t.key())
	t.Name = wanted.Name
	if !holds {
		t.Why = t.nobodys(wants)
		return
	}
	t.Held, t.Scheduler, t.OnePacket = true, string(held.Scheduler), held.OnePacket
	if held.Flags&ravel.HashPort != 0 {
		t.Flags = append(t.Flags, "mh-port")
	}
	if held.Flags&ravel.Fallback != 0 {
		t.Flags = append(t.Flags, "mh-fallback")
	}
	t.list(held, wanted)
	if held.Scheduler != ravel.MH {
		t.Why = fmt.Sprintf("the scheduler %s picks by what this director has done before: only mh can be told beforehand", held.Scheduler)
		return
	}
	size, known := tableSize(t.fleet, t.Director)
	t.TableSize, t.Assumed = int(size), !known
	now := maglev.Build(size, held)
	for i, slots := range now.Slots() {
		t.Reals[i].Slots = slots
	}
	t.agreement()
	if t.Port == 0 && held.Flags&ravel.HashPort != 0 {
		t.spread(now)
		return
	}
	t.pick(now)
	if wants && !wanted.AsIs {
		then := maglev.Build(size, wanted)
		a, b := maglev.Digest(size, held)
		c, d := maglev.Digest(size, wanted)
		if a != c || b != d {
			var addr netip.Addr
			if i, ok := then.Pick(t.client()); ok {
				addr = wanted.RealServers[i].Addr
			}
			t.Wanted = &addr
		}
	}
}

// nobodys says what becomes of a packet for a service that the kernel has not.
func (t *tracing) nobodys(wanted bool) string {
	what := "no service has this VIP, protocol and port"
	if wanted {
		what = "the service is wanted, but the kernel has it not (see ravel check)"
	}
	switch {
	case !t.vip.Held:
		return what + ", and this director does not hold the VIP: packets for it are none of its"
	case t.guarded:
		return what + ": the guard rejects it, TCP by a reset, all else by ICMP port unreachable"
	}
	return what + ": with --guard=false its packets meet this host's own programs"
}

// list tells the real servers as the kernel has them.
func (t *tracing) list(held, wanted ravel.VirtualService) {
	for _, rs := range held.RealServers {
		r := traceReal{Addr: rs.Addr, Node: nodeOf(t.c.inputs, rs.Addr), State: "none", Weight: rs.Weight, LastWeight: max(rs.Weight, rs.LastWeight)}
		entry, there := t.fleet.Rosters[t.key()].Find(rs.Addr)
		if there {
			r.State = entry.State.String()
		}
		if rs.Weight == 0 {
			r.Why = t.idle(r, entry, there, wanted)
		}
		t.Reals = append(t.Reals, r)
	}
}

// idle says why a real server takes no new flows.
func (t *tracing) idle(r traceReal, entry ravel.RosterEntry, there bool, wanted ravel.VirtualService) string {
	dead, isDead := t.c.result.Verdict.Dead[r.Addr]
	at := slices.IndexFunc(wanted.RealServers, func(rs ravel.RealServer) bool { return rs.Addr == r.Addr })
	switch {
	case at >= 0 && wanted.RealServers[at].Weight > 0 && !wanted.AsIs:
		return "is about to take new flows"
	case isDead:
		return "is dead: " + dead
	case r.Node != "" && t.fleet.Drained(r.Node):
		return "is drained by " + t.fleet.Registers[ravel.DrainRegisterPrefix+r.Node].By
	case there && entry.State == ravel.Draining:
		return "drains, as " + cmp.Or(entry.By, "the fleet") + " began it"
	case there && entry.State == ravel.Joining:
		return "joins: its node has not said that the redirect is in place"
	case !there || entry.State == ravel.Gone:
		return "is in the roster no more, so it is about to go"
	}
	return "has no ready pod of the service, or its node is not ready"
}

// nodeOf is the node that has an address; empty where nobody has.
func nodeOf(in desired.Inputs, addr netip.Addr) string {
	for _, n := range in.Cluster.Nodes {
		if slices.Contains(n.Addrs, addr) {
			return n.Name
		}
	}
	return ""
}

// pick says who gets the flow.
func (t *tracing) pick(now *maglev.Table) {
	slot := now.Slot(t.client())
	t.Slot = &slot
	owner := now.Owner(slot)
	if owner >= 0 {
		t.Owner = t.Reals[owner].Addr
	}
	picked, tries, ok := now.Try(t.client())
	if ok {
		t.Pick, t.Tries = t.Reals[picked].Addr, tries
		if next, ok := now.PickBut(t.client(), picked); ok {
			t.Next = t.Reals[next].Addr
		}
	}
	switch {
	case t.Port == 20:
		t.Why = "IPVS takes what comes from port 20 for the data of FTP and schedules no new flow from it: it meets this host's own programs"
	case len(t.Reals) == 0:
		t.Why = "the service has no real server: the client gets ICMP port unreachable"
	case owner < 0:
		t.Why = "no real server owns a slot yet: the client gets ICMP port unreachable"
	case ok && tries == 0:
		t.Why = "it owns the slot and takes new flows"
	case ok:
		t.Why = fmt.Sprintf("%s owns the slot, but %s; fallback, try %d", t.named(t.Owner), t.Reals[owner].Why, tries)
	case !slices.Contains(t.Flags, "mh-fallback"):
		t.Why = fmt.Sprintf("%s owns the slot, but %s; without mh-fallback nobody else takes it, and the client gets ICMP port unreachable",
			t.named(t.Owner), t.Reals[owner].Why)
	default:
		t.Why = "no real server takes new flows: the client gets ICMP port unreachable"
	}
}

// The ports that clients use, and that a distribution is told of.
const (
	firstPort = 1024
	lastPort  = 65535
)

// spread says how a client's flows are spread where its port decides.
func (t *tracing) spread(now *maglev.Table) {
	for port := firstPort; port <= lastPort; port++ {
		if i, ok := now.Pick(netip.AddrPortFrom(t.Client, uint16(port))); ok {
			t.Reals[i].Ports++
		}
	}
	t.Why = fmt.Sprintf("the client's port decides, too (mh-port): name one for its real server; of the ports %d to %d each real server gets PORTS",
		firstPort, lastPort)
}

// agreement compares what the live directors say of the service.
func (t *tracing) agreement() {
	own := t.fleet.Reports[t.Director].Services[t.key()]
	for _, m := range t.fleet.Live(ravel.Director) {
		r, says := t.fleet.Reports[m.Name].Services[t.key()]
		switch {
		case m.Name == t.Director && own.Table != 0:
			t.Agree = append(t.Agree, m.Name)
		case !says || r.Table == 0 || own.Table == 0:
			t.Silent = append(t.Silent, m.Name)
		case r.Table != own.Table:
			t.Differ = append(t.Differ, traceDiffers{m.Name, "has another Maglev table" + otherWish(r, own)})
		case r.Available != own.Available:
			t.Differ = append(t.Differ, traceDiffers{m.Name, "has other real servers for new flows" + otherWish(r, own)})
		default:
			t.Agree = append(t.Agree, m.Name)
		}
	}
}

func otherWish(a, b ravel.ServiceReport) string {
	if a.Wish != b.Wish {
		return ", because its inputs ask for others"
	}
	return ""
}

// named is a real server with its node.
func (t traceAnswer) named(addr netip.Addr) string {
	for _, r := range t.Reals {
		if r.Addr == addr && r.Node != "" {
			return fmt.Sprintf("%s (%s)", addr, r.Node)
		}
	}
	return addr.String()
}

func traceCommand() *cli.Command {
	return &cli.Command{
		Name:      "trace",
		Usage:     "say which real server a flow gets from the director that runs here, and why",
		ArgsUsage: "CLIENT[:PORT] VIP:PORT[/PROTO]",
		Flags:     askFlags(),
		Action: func(c *cli.Context) error {
			socket, format, err := asks(c)
			if err != nil {
				return err
			}
			w, err := flowOf(c.Args().Slice())
			if err != nil {
				return usageError{fmt.Errorf("ravel trace: %w", err)}
			}
			var answer traceAnswer
			if err := askDirector(c, socket, "trace", w, &answer); err != nil {
				return err
			}
			if format == formatJSON {
				err = printJSON(c.App.Writer, answer)
			} else {
				err = printTrace(c, answer)
			}
			if err != nil {
				return err
			}
			return judgeTrace(c, answer)
		},
	}
}

// askDirector gives a command to the director that runs here; where none does, the error says so.
func askDirector(c *cli.Context, socket, command string, words, answer any) error {
	err := admin.Post(c.Context, socket, command, words, answer)
	if errors.Is(err, admin.ErrNotRunning) || errors.Is(err, admin.ErrNoSuchQuery) {
		return fmt.Errorf("no director runs here (asked on %s): %w", socket, admin.ErrNotRunning)
	}
	return err
}

// flowOf reads CLIENT[:PORT] VIP:PORT[/PROTO].
func flowOf(args []string) (w traceWords, err error) {
	if len(args) != 2 {
		return w, fmt.Errorf("want CLIENT[:PORT] VIP:PORT[/PROTO], got %q", args)
	}
	if addr, err := netip.ParseAddr(unbracket(args[0])); err == nil {
		w.Client = addr.Unmap()
	} else if at, err := netip.ParseAddrPort(args[0]); err == nil && at.Port() != 0 {
		w.Client, w.Port = at.Addr().Unmap(), at.Port()
	} else {
		return w, fmt.Errorf("client %q: want an address, or one with a port, IPv6 in brackets: 192.0.2.7:40000, [2001:db8::7]:40000", args[0])
	}
	vip, proto, given := strings.Cut(args[1], "/")
	w.Proto = ravel.TCP
	if given {
		if err := w.Proto.UnmarshalText([]byte(proto)); err != nil {
			return w, err
		}
	}
	at, err := netip.ParseAddrPort(vip)
	if err != nil {
		return w, fmt.Errorf("VIP %q: want an address with a port, IPv6 in brackets: 192.0.2.80:443/tcp, [2001:db8::80]:53/udp", args[1])
	}
	w.VIP, w.To = at.Addr().Unmap(), at.Port()
	return w, w.fault()
}

// unbracket takes brackets off that stand around all of it.
func unbracket(text string) string {
	if inner, opened := strings.CutPrefix(text, "["); opened {
		if inner, closed := strings.CutSuffix(inner, "]"); closed {
			return inner
		}
	}
	return text
}

func printTrace(c *cli.Context, t traceAnswer) error {
	client := t.Client.String()
	if t.Port != 0 {
		client = t.client().String()
	}
	var lines [][2]string
	say := func(what, format string, args ...any) {
		lines = append(lines, [2]string{what, fmt.Sprintf(format, args...)})
	}
	say("flow", "%s to %s", client, t.key())
	if t.Held {
		service := cmp.Or(t.Name, "without a name") + ", scheduler " + t.Scheduler
		if len(t.Flags) > 0 {
			service += " with " + strings.Join(t.Flags, " and ")
		}
		if t.OnePacket {
			service += ", each datagram by itself"
		}
		say("service", "%s", service)
	}
	if t.Slot != nil && *t.Slot >= 0 {
		owner := "nobody's"
		if t.Owner.IsValid() {
			owner = "of " + t.named(t.Owner)
		}
		say("slot", "%d of %d, %s", *t.Slot, t.TableSize, owner)
	}
	switch {
	case t.Pick.IsValid():
		say("pick", "%s: %s", t.named(t.Pick), t.Why)
	case t.Slot == nil && t.Held:
		say("pick", "%s", t.Why)
	default:
		say("pick", "none: %s", t.Why)
	}
	if t.Pick.IsValid() {
		next := "none: nobody else takes new flows"
		if t.Next.IsValid() {
			next = t.named(t.Next) + ", if that one went away"
		}
		say("next", "%s", next)
	}
	if t.Wanted != nil {
		say("wanted", "the kernel is about to hold another table, in which %s gets the flow", cmp.Or(t.orNobody(*t.Wanted), "nobody"))
	}
	switch {
	case t.Pinned.IsValid() && t.Pinned == t.Pick:
		say("open flow", "pinned to %s, as the table has it", t.named(t.Pinned))
	case t.Pinned.IsValid():
		say("open flow", "pinned to %s while this director lives; another director would send it to %s", t.named(t.Pinned), cmp.Or(t.orNobody(t.Pick), "nobody"))
	case t.Searched:
		say("open flow", "none here")
	case t.Held && t.Port != 0 && !t.OnePacket:
		say("open flow", "not found in %s, and not all connections were looked through", searchFor)
	}
	if t.Held && t.TableSize != 0 {
		say("directors", "%s", t.agreementWords())
	}
	if t.Announced {
		say("announced", "by this director, %s", t.Director)
	} else {
		say("announced", "not by this director, %s%s", t.Director, colon(t.WhyNot))
	}
	if t.Assumed {
		say("table size", "not known yet; %d is what most kernels have", t.TableSize)
	}
	for _, line := range t.lines() {
		say("fleet", "%s", line)
	}
	for _, line := range lines {
		if _, err := fmt.Fprintf(c.App.Writer, "%-11s %s\n", line[0], line[1]); err != nil {
			return err
		}
	}
	if len(t.Reals) == 0 {
		return nil
	}
	fmt.Fprintln(c.App.Writer)
	header := []string{"PLACE", "REAL SERVER", "NODE", "STATE", "WEIGHT", "LAST WEIGHT", "SLOTS", "WHY NOT"}
	ports := t.Held && t.TableSize != 0 && t.Slot == nil
	if ports {
		header = slices.Insert(header, 7, "PORTS")
	}
	var rows [][]string
	for i, r := range t.Reals {
		row := []string{strconv.Itoa(i + 1), r.Addr.String(), r.Node, r.State, strconv.Itoa(r.Weight), strconv.Itoa(r.LastWeight), strconv.Itoa(r.Slots), r.Why}
		if ports {
			row = slices.Insert(row, 7, fmt.Sprintf("%d (%.1f%%)", r.Ports, 100*float64(r.Ports)/(lastPort-firstPort+1)))
		}
		rows = append(rows, row)
	}
	return table(c.App.Writer, header, rows)
}

func colon(why string) string {
	if why == "" {
		return ""
	}
	return ": " + why
}

// orNobody is a real server with its node, and nothing for nobody.
func (t traceAnswer) orNobody(addr netip.Addr) string {
	if !addr.IsValid() {
		return ""
	}
	return t.named(addr)
}

// agreementWords say whether the directors agree.
func (t traceAnswer) agreementWords() string {
	var words []string
	switch {
	case len(t.Differ) == 0 && len(t.Silent) == 0 && len(t.Agree) > 1:
		return fmt.Sprintf("all %d pick the same: %s", len(t.Agree), strings.Join(t.Agree, ", "))
	case len(t.Differ) == 0 && len(t.Silent) == 0:
		return "no other director is there"
	}
	for _, d := range t.Differ {
		words = append(words, d.Director+" "+d.What)
	}
	if len(t.Silent) > 0 {
		words = append(words, "not said yet by "+strings.Join(t.Silent, ", "))
	}
	if len(t.Agree) > 0 {
		words = append(words, "the same on "+strings.Join(t.Agree, ", "))
	}
	return strings.Join(words, "; ")
}

// judgeTrace says why a flow is not served as it should be.
func judgeTrace(c *cli.Context, t traceAnswer) error {
	var why []string
	served := t.Pick.IsValid() || t.Held && t.Slot == nil && slices.ContainsFunc(t.Reals, func(r traceReal) bool { return r.Weight > 0 })
	if !served {
		why = append(why, "nobody gets this flow")
	}
	if !t.Announced && t.WhyNot != whyAttractNone && t.Held {
		why = append(why, "this director does not announce the VIP"+colon(t.WhyNot))
	}
	if len(t.Differ) > 0 {
		why = append(why, "directors pick differently; see ravel members")
	}
	for _, line := range why {
		fmt.Fprintln(c.App.ErrWriter, "ravel:", line)
	}
	if len(why) > 0 {
		return errNotWell
	}
	return nil
}
