package director

import (
	"fmt"
	"math"
	"net/netip"

	"github.com/ravel-lb/ravel"
)

// faults returns why a service cannot be programmed at all, or nothing.
func faults(v ravel.VirtualService) []ravel.Problem {
	var list []ravel.Problem
	say := func(format string, args ...any) {
		list = append(list, ravel.Problem{
			Where: v.Key.String(), What: fmt.Sprintf(format, args...) + "; the service is left as it is in IPVS",
		})
	}
	vip := v.Key.VIP
	if !vip.IsValid() || vip.Is4In6() || vip.Zone() != "" || vip.IsUnspecified() || vip.IsMulticast() {
		say("%s is no address for a service", vip)
	}
	if v.Key.Proto != ravel.TCP && v.Key.Proto != ravel.UDP {
		say("protocol %s: want tcp or udp", v.Key.Proto)
	}
	if v.Key.Port == 0 {
		say("port 0: want 1 to 65535")
	}
	if v.Scheduler == "" || v.Scheduler == none || len(v.Scheduler) > 15 {
		say("scheduler %q: want the name of one", v.Scheduler)
	}
	if v.Flags&^schedulerFlags != 0 {
		say("flags %#x: want those of a scheduler only", uint32(v.Flags))
	}
	if limited := v.UpperThreshold != 0 || v.LowerThreshold != 0; limited && (v.LowerThreshold < 0 ||
		v.LowerThreshold >= v.UpperThreshold || int64(v.UpperThreshold) > math.MaxInt32) {
		say("thresholds %d and %d: want 0 to 2147483647, and the upper one first", v.UpperThreshold, v.LowerThreshold)
	} else if limited && v.Scheduler == ravel.MH {
		say("thresholds are not for mh: what this director counts would change what it picks, and no other director's pick")
	}
	if v.OnePacket && v.Key.Proto != ravel.UDP {
		say("one-packet scheduling is for udp")
	}
	seen := make(map[netip.Addr]bool, len(v.RealServers))
	for _, rs := range v.RealServers {
		switch {
		case !rs.Addr.IsValid() || rs.Addr.Is4In6() || rs.Addr.Zone() != "":
			say("%s is no address for a real server", rs.Addr)
		case vip.IsValid() && rs.Addr.Is4() != vip.Is4():
			say("real server %s is of another family than the service", rs.Addr)
		case seen[rs.Addr]:
			say("real server %s is in it twice", rs.Addr)
		case rs.Weight < 0 || rs.Weight > 65535 || rs.LastWeight < 0 || rs.LastWeight > 65535:
			say("real server %s has weight %d, last weight %d: want 0 to 65535", rs.Addr, rs.Weight, rs.LastWeight)
		}
		seen[rs.Addr] = true
	}
	return list
}

// foreign says that a service of somebody else stands where one of ours should.
func foreign(key ravel.ServiceKey) ravel.Problem {
	return ravel.Problem{
		Where: key.String(),
		What:  "IPVS has this service already and it is not ours; it is left as it is",
		Fix:   "ipvsadm -D " + option(id{ServiceKey: key}) + "; or --adopt, to take over what the original Ravel left",
	}
}
