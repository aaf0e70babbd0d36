package bgp

import (
	"cmp"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"time"

	api "github.com/osrg/gobgp/v3/api"
	"github.com/osrg/gobgp/v3/pkg/apiutil"
	"github.com/osrg/gobgp/v3/pkg/packet/bgp"

	"github.com/ravel-lb/ravel"
)

// checkRoutes keys routes by prefix. Those that cannot be announced are in the error and in bad.
func checkRoutes(routes []ravel.Route) (good map[netip.Prefix]ravel.Route, bad map[netip.Prefix]bool, err error) {
	good, bad = make(map[netip.Prefix]ravel.Route, len(routes)), map[netip.Prefix]bool{}
	var errs []error
	for _, r := range routes {
		err := checkRoute(r)
		if _, twice := good[r.Prefix]; twice && err == nil {
			err = errors.New("wanted twice; the first is taken")
		} else if err != nil {
			bad[r.Prefix] = true
		}
		if err != nil {
			errs = append(errs, fmt.Errorf("route %s: %w", r.Prefix, err))
			continue
		}
		good[r.Prefix] = r
	}
	return good, bad, errors.Join(errs...)
}

func checkRoute(r ravel.Route) error {
	addr := r.Prefix.Addr()
	switch {
	case !r.Prefix.IsValid() || addr.Zone() != "" || addr.Is4In6():
		return errors.New("no prefix of a VIP")
	case !r.Prefix.IsSingleIP():
		return errors.New("not a /32 or /128: only single VIPs are announced")
	case !r.NextHop.IsValid() || r.NextHop.IsUnspecified() || r.NextHop.Zone() != "" || r.NextHop.Is4In6():
		return fmt.Errorf("next hop %s: no address that a router can send to", r.NextHop)
	case r.NextHop.Is4() != addr.Is4():
		return fmt.Errorf("next hop %s is of the other family", r.NextHop)
	}
	return nil
}

func comparePrefixes(a, b netip.Prefix) int {
	return cmp.Or(a.Addr().Compare(b.Addr()), cmp.Compare(a.Bits(), b.Bits()))
}

func equalRoutes(a, b ravel.Route) bool {
	return a.Prefix == b.Prefix && a.NextHop == b.NextHop &&
		slices.Equal(a.Communities, b.Communities) && slices.Equal(a.LargeCommunities, b.LargeCommunities) &&
		equalPointers(a.MED, b.MED) && equalPointers(a.LocalPref, b.LocalPref) && slices.Equal(a.ASPath, b.ASPath)
}

func equalPointers(a, b *uint32) bool {
	return a == b || a != nil && b != nil && *a == *b
}

// gobgpPath writes a route as GoBGP wants it. IPv6 travels in MP_REACH_NLRI (RFC 4760), IPv4 as in RFC 4271. GoBGP
// puts its own number in front of the AS_PATH, and for iBGP adds a LOCAL_PREF of 100 where there is none; to eBGP peers it sends no LOCAL_PREF.
func gobgpPath(r ravel.Route) (*api.Path, error) {
	var nlri bgp.AddrPrefixInterface
	attrs := []bgp.PathAttributeInterface{bgp.NewPathAttributeOrigin(bgp.BGP_ORIGIN_ATTR_TYPE_IGP)}
	bits, addr, nextHop := uint8(r.Prefix.Bits()), r.Prefix.Addr().String(), r.NextHop.String()
	if r.Prefix.Addr().Is4() {
		nlri = bgp.NewIPAddrPrefix(bits, addr)
		attrs = append(attrs, bgp.NewPathAttributeNextHop(nextHop))
	} else {
		nlri = bgp.NewIPv6AddrPrefix(bits, addr)
		attrs = append(attrs, bgp.NewPathAttributeMpReachNLRI(nextHop, []bgp.AddrPrefixInterface{nlri}))
	}
	if len(r.ASPath) > 0 {
		segment := bgp.NewAs4PathParam(bgp.BGP_ASPATH_ATTR_TYPE_SEQ, r.ASPath)
		attrs = append(attrs, bgp.NewPathAttributeAsPath([]bgp.AsPathParamInterface{segment}))
	}
	if r.MED != nil {
		attrs = append(attrs, bgp.NewPathAttributeMultiExitDisc(*r.MED))
	}
	if r.LocalPref != nil {
		attrs = append(attrs, bgp.NewPathAttributeLocalPref(*r.LocalPref))
	}
	if len(r.Communities) > 0 {
		values := make([]uint32, len(r.Communities))
		for i, c := range r.Communities {
			values[i] = uint32(c)
		}
		attrs = append(attrs, bgp.NewPathAttributeCommunities(values))
	}
	if len(r.LargeCommunities) > 0 {
		values := make([]*bgp.LargeCommunity, len(r.LargeCommunities))
		for i, c := range r.LargeCommunities {
			values[i] = bgp.NewLargeCommunity(c.Global, c.Local1, c.Local2)
		}
		attrs = append(attrs, bgp.NewPathAttributeLargeCommunities(values))
	}
	return apiutil.NewPath(nlri, false, attrs, time.Now())
}
