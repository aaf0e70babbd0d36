package config

import (
	"net/netip"
	"path/filepath"
	"slices"
	"time"

	"github.com/ravel-lb/ravel"
	"github.com/ravel-lb/ravel/internal/config/doc"
	"github.com/ravel-lb/ravel/internal/desired"
)

const (
	bgpPort     = 179
	maxHoldTime = 65535 * time.Second // two bytes of seconds, RFC 4271 section 4.2
)

// peers reads the routers. The directors must be known.
func (p *parser) peers(v doc.Value, f *desired.Fleet) {
	list, _ := v.List()
	at := map[netip.Addr][]int{} // by address: places in the list
	for i, v := range list {
		o, ok := v.Object("address", "port", "asn", "holdTime", "keepalive", "multihop", "passwordFile", "passive",
			"localAddress", "directors", "directorLabels")
		if !ok {
			f.Peers = append(f.Peers, desired.FleetPeer{}) // keeps the places right; the document is refused
			continue
		}
		peer := p.peer(o, f.ASN)
		selectors(o, f, &peer)
		if v, ok := o.Get("localAddress"); ok {
			count := 0
			for _, d := range f.Directors {
				if chosen(peer, d) {
					count++
				}
			}
			if count > 1 {
				v.Warn("is the address of one host, and %d directors have this peer", count)
			}
		}
		if addr := peer.Peer.Addr; addr.IsValid() {
			for _, j := range at[addr] {
				if shared(f.Directors, peer, f.Peers[j]) {
					o.Fault("address %s is that of %s too, for the same director", addr, list[j].Path())
					break
				}
			}
			at[addr] = append(at[addr], i)
		}
		f.Peers = append(f.Peers, peer)
	}
}

func (p *parser) peer(o *doc.Object, ownASN uint32) desired.FleetPeer {
	peer := ravel.Peer{Port: bgpPort, Passive: boolean(o, "passive", false)}
	if v, ok := o.Need("address"); ok {
		if peer.Addr, ok = v.Addr(); ok {
			p.notVIP(v, peer.Addr)
		}
	}
	if v, ok := o.Get("port"); ok {
		port, _ := v.Int(1, 65535)
		peer.Port = uint16(port)
	}
	if v, ok := o.Need("asn"); ok {
		peer.ASN = asn(v)
	}
	peer.HoldTime, peer.Keepalive = timers(o)
	if v, ok := o.Get("multihop"); ok {
		ttl, _ := v.Int(0, 255)
		if peer.Multihop = uint8(ttl); ttl > 0 && peer.ASN == ownASN {
			v.Warn("has no effect: the peer has the fleet's AS number, and iBGP needs no multihop")
		}
	}
	if file, v, ok := text(o, "passwordFile", optional); ok {
		if peer.PasswordFile = file; !filepath.IsAbs(file) {
			v.Fault("password file %q: want a path that begins with /", file)
		}
	}
	if v, ok := o.Get("localAddress"); ok {
		if peer.LocalAddr, ok = v.Addr(); ok {
			p.notVIP(v, peer.LocalAddr)
			if peer.Addr.IsValid() && peer.LocalAddr.Is4() != peer.Addr.Is4() {
				v.Fault("local address %s is not of the family of %s", peer.LocalAddr, peer.Addr)
			}
		}
	}
	return desired.FleetPeer{Peer: peer}
}

// timers reads the hold time and the keepalive interval, both in whole seconds as BGP counts.
func timers(o *doc.Object) (hold, keepalive time.Duration) {
	hold = desired.DefaultHoldTime
	if v, ok := o.Get("holdTime"); ok {
		if d, ok := v.Duration(desired.DefaultHoldTime, maxHoldTime); ok {
			hold = wholeSeconds(v, d)
		}
	}
	keepalive = max((hold / 3).Truncate(time.Second), time.Second)
	if v, ok := o.Get("keepalive"); ok {
		if d, ok := v.Duration(time.Second, maxHoldTime); ok {
			keepalive = wholeSeconds(v, d)
			switch {
			case keepalive >= hold:
				v.Fault("keepalive %s is not less than the hold time, %s", keepalive, hold)
			case keepalive > hold/3:
				v.Warn("keepalive %s is more than a third of the hold time, %s: fewer lost messages end the session",
					keepalive, hold)
			}
		}
	}
	return hold, keepalive
}

func wholeSeconds(v doc.Value, d time.Duration) time.Duration {
	if d%time.Second != 0 {
		v.Fault("duration %s: BGP counts in whole seconds", d)
	}
	return d
}

// selectors reads which directors peer: those that are named and those that have all the labels; all, with neither.
func selectors(o *doc.Object, f *desired.Fleet, peer *desired.FleetPeer) {
	directors, all := f.Directors, len(f.DirectorNodes) == 0 // else nodes may be more of them
	if v, ok := o.Get("directors"); ok {
		names, _ := v.List()
		for _, v := range names {
			name, ok := v.Text()
			if !ok {
				continue
			}
			if slices.Contains(peer.Directors, name) {
				v.Fault("director %q is in the list twice", name)
			}
			if all && !slices.ContainsFunc(directors, func(d desired.FleetDirector) bool { return d.Name == name }) {
				v.Warn("director %q is not in fleet.directors", name)
			}
			peer.Directors = append(peer.Directors, name)
		}
	}
	if v, ok := o.Get("directorLabels"); ok {
		peer.Labels, ok = v.TextMap()
		fits := func(d desired.FleetDirector) bool { return labelled(peer.Labels, d) }
		if ok && all && len(peer.Labels) > 0 && !slices.ContainsFunc(directors, fits) {
			v.Warn("no director of fleet.directors has these labels")
		}
	}
}

func labelled(want map[string]string, d desired.FleetDirector) bool {
	for k, w := range want {
		if have, ok := d.Labels[k]; !ok || have != w {
			return false
		}
	}
	return true
}

func chosen(peer desired.FleetPeer, d desired.FleetDirector) bool {
	if len(peer.Directors) == 0 && len(peer.Labels) == 0 {
		return true
	}
	return slices.Contains(peer.Directors, d.Name) || len(peer.Labels) > 0 && labelled(peer.Labels, d)
}

// shared reports whether a director has both peers.
func shared(directors []desired.FleetDirector, a, b desired.FleetPeer) bool {
	all := func(p desired.FleetPeer) bool { return len(p.Directors) == 0 && len(p.Labels) == 0 }
	return all(a) && all(b) ||
		slices.ContainsFunc(directors, func(d desired.FleetDirector) bool { return chosen(a, d) && chosen(b, d) })
}
