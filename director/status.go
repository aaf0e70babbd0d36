package director

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strings"

	"github.com/moby/ipvs"

	"github.com/ravel-lb/ravel"
)

// ServiceStatus is a service of the kernel, ours or not.
type ServiceStatus struct {
	Ours      bool               `json:"ours"`
	Name      string             `json:"name,omitempty"` // as it was last applied; the kernel has none
	VIP       netip.Addr         `json:"vip,omitzero"`   // none for a service by firewall mark
	Proto     ravel.Proto        `json:"protocol,omitzero"`
	Port      uint16             `json:"port,omitempty"`
	Mark      uint32             `json:"mark,omitempty"`         // the firewall mark, of foreign services only
	Scheduler string             `json:"scheduler"`              // "none" while it has none
	Flags     []string           `json:"flags,omitempty"`        // as ipvsadm names them
	OnePacket bool               `json:"onePacket,omitempty"`    // each datagram is scheduled by itself
	NotKept   bool               `json:"flowsNotKept,omitempty"` // ours, and no other director would pick as this one: not mh
	Timeout   uint32             `json:"persistence,omitempty"`  // in seconds, of foreign services only
	Counters  *Counters          `json:"counters,omitempty"`     // nil where the kernel does not count
	Reals     []RealServerStatus `json:"realServers"`            // as the kernel's list holds them, newest first

	v6 bool
}

// RealServerStatus is a real server of the kernel.
type RealServerStatus struct {
	Addr       netip.Addr `json:"address"`
	Port       uint16     `json:"port"`
	Forwarding string     `json:"forwarding"` // "direct", "tunnel", and of foreign services "masquerade", "local" or "bypass"
	Weight     int        `json:"weight"`
	Upper      uint32     `json:"upperThreshold,omitempty"` // of the flows that this director counts; 0 is no limit
	Lower      uint32     `json:"lowerThreshold,omitempty"`
	Active     int        `json:"active"`             // flows that are open
	Inactive   int        `json:"inactive"`           // flows that are half open or closed
	Counters   *Counters  `json:"counters,omitempty"` // nil where the kernel does not count
}

// Counters are what came from clients since the service or real server was made, a few seconds late; replies do not
// pass a director. The kernel tells flows and packets in 32 bits: after 4294967295 they begin again at 0.
type Counters struct {
	Flows   uint64 `json:"flows"` // scheduled
	Packets uint64 `json:"packets"`
	Bytes   uint64 `json:"bytes"`
}

func countersOf(s ipvs.SvcStats) *Counters {
	return &Counters{Flows: uint64(s.Connections), Packets: uint64(s.PacketsIn), Bytes: s.BytesIn}
}

// Key returns what names the service; it is the zero key for a service by firewall mark.
func (s ServiceStatus) Key() ravel.ServiceKey {
	return ravel.ServiceKey{VIP: s.VIP, Proto: s.Proto, Port: s.Port}
}

// Status returns all that the kernel's table holds, ours and foreign, by key; services by firewall mark come last.
func (d *Director) Status(ctx context.Context) ([]ServiceStatus, error) {
	var list []ServiceStatus
	_, err := d.call(ctx, func(ctx context.Context, k kernel) error {
		services, order, err := readServices(k)
		if err != nil {
			return err
		}
		counts := true
		if d.sysctl != nil {
			v, err := d.sysctl.Get(estimation)
			counts = err != nil || v != "0"
		}
		for _, i := range order {
			if err := ctx.Err(); err != nil {
				return err
			}
			reals, raw, err := readReals(k, i)
			if err != nil {
				return err
			}
			name := ""
			if was := d.applied[i.ServiceKey]; was != nil {
				name = was.want.Name
			}
			status := statusOf(i, services[i], reals, raw, name)
			if !counts {
				status = status.uncounted()
			}
			list = append(list, status)
		}
		return nil
	})
	if err != nil {
		return nil, err
	}
	return list, nil
}

func statusOf(i id, s *ipvs.Service, reals []real, raw []*ipvs.Destination, name string) ServiceStatus {
	status := ServiceStatus{
		Ours: isOurs(s), VIP: i.VIP, Proto: i.Proto, Port: i.Port, Mark: i.mark, v6: i.v6, Scheduler: s.SchedName,
		Flags: flagNames(s.SchedName, s.Flags), OnePacket: s.Flags&flagOnePacket != 0,
		NotKept:  isOurs(s) && s.SchedName != none && s.SchedName != string(ravel.MH),
		Counters: countersOf(s.Stats), Reals: make([]RealServerStatus, len(reals)),
	}
	if status.Ours {
		status.Name = name
	}
	if s.Flags&flagPersistent != 0 {
		status.Timeout = s.Timeout
	}
	for j, r := range reals {
		status.Reals[j] = RealServerStatus{
			Addr: r.at.Addr(), Port: r.at.Port(), Forwarding: methodNames[r.method], Weight: r.weight,
			Upper: r.upper, Lower: r.lower,
			Active: raw[j].ActiveConnections, Inactive: raw[j].InactiveConnections,
			Counters: countersOf(ipvs.SvcStats(raw[j].Stats)),
		}
	}
	return status
}

var methodNames = map[uint32]string{
	ipvs.ConnectionFlagDirectRoute: "direct", ipvs.ConnectionFlagTunnel: "tunnel", ipvs.ConnectionFlagMasq: "masquerade",
	ipvs.ConnectionFlagLocalNode: "local", ipvs.ConnFwdBypass: "bypass",
}

var methodOptions = map[string]string{"direct": "-g", "tunnel": "-i", "masquerade": "-m", "local": "-g", "bypass": "-g"}

// flagNames returns the flags of a scheduler as ipvsadm spells them.
func flagNames(scheduler string, flags uint32) []string {
	names := []string{"flag-1", "flag-2", "flag-3"}
	if scheduler == "mh" || scheduler == "sh" {
		names[0], names[1] = scheduler+"-fallback", scheduler+"-port"
	}
	var list []string
	for i, flag := range []ravel.SchedulerFlags{ravel.Fallback, ravel.HashPort, ravel.Flag3} {
		if flags&uint32(flag) != 0 {
			list = append(list, names[i])
		}
	}
	return list
}

// uncounted returns the status without counters, which stand still.
func (s ServiceStatus) uncounted() ServiceStatus {
	s.Counters = nil
	for i := range s.Reals {
		s.Reals[i].Counters = nil
	}
	return s
}

// String returns the service and its real servers in the words of ipvsadm -Sn, a line each: in the kernel's order,
// while ipvsadm sorts, and with all flags and thresholds, while ipvsadm leaves some out.
func (s ServiceStatus) String() string {
	i := id{ServiceKey: s.Key(), mark: s.Mark, v6: s.v6}
	var b strings.Builder
	fmt.Fprintf(&b, "-A %s -s %s", option(i), s.Scheduler)
	if s.Timeout != 0 {
		fmt.Fprintf(&b, " -p %d", s.Timeout)
	}
	if s.OnePacket {
		b.WriteString(" -o")
	}
	if len(s.Flags) > 0 {
		b.WriteString(" -b " + strings.Join(s.Flags, ","))
	}
	b.WriteByte('\n')
	for _, r := range s.Reals {
		fmt.Fprintf(&b, "-a %s -r %s %s -w %d", option(i), netip.AddrPortFrom(r.Addr, r.Port), methodOptions[r.Forwarding], r.Weight)
		if r.Upper != 0 || r.Lower != 0 {
			fmt.Fprintf(&b, " -x %d -y %d", r.Upper, r.Lower)
		}
		b.WriteByte('\n')
	}
	return b.String()
}

// option returns what names a service to ipvsadm.
func option(i id) string {
	if i.mark != 0 {
		if i.v6 {
			return fmt.Sprintf("-f %d -6", i.mark)
		}
		return fmt.Sprintf("-f %d", i.mark)
	}
	letter := "-t"
	switch i.Proto {
	case ravel.UDP:
		letter = "-u"
	case sctp:
		letter = "--sctp-service"
	}
	return letter + " " + netip.AddrPortFrom(i.VIP, i.Port).String()
}

// sctp is the one protocol that IPVS has and we have not.
const sctp ravel.Proto = 132

// Read returns the services of ours as the kernel holds them, by key, real servers newest first: at start that is what
// outlived the last process. Names are empty; Forwarding is never Auto; LastWeight is 0 where the kernel does not tell
// it and this process never knew it.
func (d *Director) Read(ctx context.Context) ([]ravel.VirtualService, error) {
	var list []ravel.VirtualService
	_, err := d.call(ctx, func(ctx context.Context, k kernel) error {
		now, err := d.readTable(k)
		if err != nil {
			return err
		}
		for _, key := range sortedKeys(now.ours) {
			list = append(list, now.ours[key].virtual(key))
		}
		return nil
	})
	if err != nil {
		return nil, err
	}
	return list, nil
}

// virtual returns the service as a noun.
func (s service) virtual(key ravel.ServiceKey) ravel.VirtualService {
	v := ravel.VirtualService{
		Key: key, Scheduler: ravel.Scheduler(s.scheduler), OnePacket: s.flags&flagOnePacket != 0,
		Flags: ravel.SchedulerFlags(s.flags) & (ravel.Fallback | ravel.HashPort),
	}
	// Where somebody else gave them different ones it is enough that Apply mends them.
	if len(s.reals) > 0 && s.scheduler != string(ravel.MH) {
		v.UpperThreshold, v.LowerThreshold = int(s.reals[0].upper), int(s.reals[0].lower)
	}
	for _, r := range s.reals {
		rs := ravel.RealServer{Addr: r.at.Addr(), Weight: r.weight, LastWeight: max(r.last, 0), Forwarding: ravel.Direct}
		if r.method == ipvs.ConnectionFlagTunnel {
			rs.Forwarding = ravel.Tunnel
		}
		v.RealServers = append(v.RealServers, rs)
	}
	return v
}

// Cleanup removes every service and host route of ours, and nothing else, and returns a line of ipvsadm or ip for each.
// With dryRun it only says what it would do. A kernel without IPVS has no services to remove.
func (d *Director) Cleanup(ctx context.Context, dryRun bool) ([]string, error) {
	var lines []string
	finished, err := d.call(ctx, func(ctx context.Context, k kernel) error {
		a := applying{Director: d, ctx: ctx, kernel: k}
		if err := a.read(false); err != nil {
			return err
		}
		var errs []error
		for _, key := range sortedKeys(d.table.ours) {
			if !dryRun {
				if err := a.remove(key); err != nil && !errors.Is(err, errStale) {
					errs = append(errs, err)
					continue
				}
			}
			lines = append(lines, "ipvsadm -D "+option(id{ServiceKey: key}))
		}
		if !dryRun {
			d.fresh = false
		}
		return errors.Join(errs...)
	})
	if errors.Is(err, errNoIPVS) {
		finished, err = true, nil
	}
	if !finished {
		return nil, err
	}
	more, failed := d.reach.cleanup(ctx, dryRun)
	return append(lines, more...), errors.Join(err, failed)
}

func sortedKeys[V any](m map[ravel.ServiceKey]V) []ravel.ServiceKey {
	return slices.SortedFunc(maps.Keys(m), ravel.ServiceKey.Compare)
}
