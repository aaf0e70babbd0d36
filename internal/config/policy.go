package config

import (
	"cmp"
	"fmt"
	"math"
	"net/netip"
	"slices"
	"strconv"
	"strings"

	"github.com/ravel-lb/ravel"
	"github.com/ravel-lb/ravel/internal/config/doc"
	"github.com/ravel-lb/ravel/internal/desired"
)

// wellKnown are the communities of IANA's registry that routers know by name.
var wellKnown = map[string]ravel.Community{
	"graceful-shutdown":   0xffff0000, // RFC 8326
	"accept-own":          0xffff0001, // RFC 7611
	"llgr-stale":          0xffff0006, // RFC 9494
	"no-llgr":             0xffff0007, // RFC 9494
	"blackhole":           0xffff029a, // RFC 7999
	"no-export":           0xffffff01, // RFC 1997
	"no-advertise":        0xffffff02, // RFC 1997
	"no-export-subconfed": 0xffffff03, // RFC 1997
	"no-peer":             0xffffff04, // RFC 3765
}

// policy reads how VIPs are announced; keys that are not set are as in otherwise.
func policy(o *doc.Object, otherwise desired.Policy) desired.Policy {
	p := otherwise
	if name, v, ok := text(o, "announce", optional); ok {
		switch name {
		case "any":
			p.Announce = desired.AnnounceAny
		case "all":
			p.Announce = desired.AnnounceAll
		default:
			v.Fault("announce %q: want any or all", name)
		}
	}
	if v, ok := o.Get("communities"); ok {
		p.Communities = set(v, community, cmp.Compare[ravel.Community])
	}
	if v, ok := o.Get("largeCommunities"); ok {
		p.LargeCommunities = set(v, largeCommunity, ravel.LargeCommunity.Compare)
	}
	p.MED = number32(o, "med", p.MED)
	p.LocalPref = number32(o, "localPref", p.LocalPref)
	if v, ok := o.Get("prepend"); ok {
		n, _ := v.Int(0, mostPrepended)
		p.Prepend = int(n)
	}
	return p
}

// mostPrepended is as often as an AS number may be prepended. Routers refuse paths that are too long, some from 50.
const mostPrepended = 16

func number32(o *doc.Object, key string, otherwise *uint32) *uint32 {
	v, ok := o.Get(key)
	if !ok {
		return otherwise
	}
	i, _ := v.Int(0, math.MaxUint32)
	n := uint32(i)
	return &n
}

// set reads a list without duplicates, and sorts it.
func set[T comparable](v doc.Value, parse func(string) (T, error), compare func(a, b T) int) []T {
	list, _ := v.List()
	var values []T
	seen := map[T]bool{}
	for _, v := range list {
		s, ok := v.Text()
		if !ok {
			continue
		}
		switch value, err := parse(s); {
		case err != nil:
			v.Fault("%v", err)
		case seen[value]:
			v.Fault("%s is in the list twice", s)
		default:
			seen[value] = true
			values = append(values, value)
		}
	}
	slices.SortFunc(values, compare)
	return values
}

func community(s string) (ravel.Community, error) {
	if c, ok := wellKnown[s]; ok {
		return c, nil
	}
	high, low, _ := strings.Cut(s, ":")
	h, errH := strconv.ParseUint(high, 10, 16)
	l, errL := strconv.ParseUint(low, 10, 16)
	if errH != nil || errL != nil {
		return 0, fmt.Errorf("community %q: want two numbers to 65535 such as 65100:1, or a name such as no-export", s)
	}
	return ravel.Community(h<<16 | l), nil
}

func largeCommunity(s string) (ravel.LargeCommunity, error) {
	parts := strings.Split(s, ":")
	var numbers [3]uint32
	good := len(parts) == len(numbers)
	for i := 0; good && i < len(numbers); i++ {
		n, err := strconv.ParseUint(parts[i], 10, 32)
		numbers[i], good = uint32(n), err == nil
	}
	if !good {
		return ravel.LargeCommunity{}, fmt.Errorf("large community %q: want three numbers such as 65100:1:2", s)
	}
	return ravel.LargeCommunity{Global: numbers[0], Local1: numbers[1], Local2: numbers[2]}, nil
}

// pools reads policies for parts of the VIPs. What a pool does not set is as the fleet has it.
func pools(v doc.Value, otherwise desired.Policy) []desired.Pool {
	list, _ := v.List()
	var pools []desired.Pool
	var claims []claim
	names := map[string]doc.Value{}
	for _, v := range list {
		o, ok := v.Object("name", "vips", "announce", "communities", "largeCommunities", "med", "localPref", "prepend")
		if !ok {
			continue
		}
		pool := desired.Pool{Name: hostName(o, "name"), Policy: policy(o, otherwise)}
		if first, twice := names[pool.Name]; twice && pool.Name != "" {
			o.Fault("name %q is that of %s too", pool.Name, first.Path())
		}
		names[pool.Name] = v
		if v, ok := o.Need("vips"); ok {
			prefixes, ok := v.List()
			if ok && len(prefixes) == 0 {
				v.Fault("is empty: want one prefix or address at least")
			}
			for _, v := range prefixes {
				if prefix, ok := readPrefix(v); ok {
					pool.Prefixes = append(pool.Prefixes, prefix)
					claims = append(claims, claim{prefix, v})
				}
			}
		}
		pools = append(pools, pool)
	}
	overlaps(claims)
	return pools
}

// readPrefix reads a prefix, or an address as the prefix that holds nothing else.
func readPrefix(v doc.Value) (netip.Prefix, bool) {
	s, ok := v.Text()
	if !ok {
		return netip.Prefix{}, false
	}
	if !strings.Contains(s, "/") {
		addr, ok := v.Addr()
		if !ok {
			return netip.Prefix{}, false
		}
		return netip.PrefixFrom(addr, addr.BitLen()), true
	}
	prefix, err := netip.ParsePrefix(s)
	switch {
	case err != nil:
		v.Fault("%q is no prefix or address", s)
	case prefix.Addr().Is4In6():
		v.Fault("%s is IPv4-mapped IPv6: write it as IPv4", s)
	case prefix != prefix.Masked():
		v.Fault("%s has bits behind its length: did you mean %s?", s, prefix.Masked())
	default:
		return prefix, true
	}
	return netip.Prefix{}, false
}

// claim is a prefix of a pool and where it stands.
type claim struct {
	prefix netip.Prefix
	place  doc.Value
}

// overlaps reports prefixes that share addresses. Two prefixes do only if one holds the other, so that in the order
// of addresses, the wider first, it is enough to look at the last one that none before it holds.
func overlaps(all []claim) {
	slices.SortStableFunc(all, func(a, b claim) int {
		return cmp.Or(a.prefix.Addr().Compare(b.prefix.Addr()), cmp.Compare(a.prefix.Bits(), b.prefix.Bits()))
	})
	var outer *claim
	for i := range all {
		if outer != nil && outer.prefix.Overlaps(all[i].prefix) {
			all[i].place.Fault("%s overlaps %s of %s", all[i].prefix, outer.prefix, outer.place.Path())
			continue
		}
		outer = &all[i]
	}
}
