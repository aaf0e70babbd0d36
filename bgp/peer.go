package bgp

import (
	"bytes"
	"crypto/sha256"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"slices"
	"time"

	api "github.com/osrg/gobgp/v3/api"

	"github.com/ravel-lb/ravel"
)

const (
	minHoldTime = 3 * time.Second // RFC 4271 section 4.2
	maxHoldTime = 65535 * time.Second
	bgpPort     = 179
	maxPassword = 80 // TCP_MD5SIG_MAXKEYLEN in include/uapi/linux/tcp.h

	// maxReceived is how many routes of one family a router may send. They are refused anyway, but GoBGP keeps them; a
	// full table would be a million. A router that sends more gets a Cease (maximum number of prefixes reached) and is
	// tried again every cappedPause.
	maxReceived = 10000
)

// settings are all that a session depends on: if they are equal, the session is left alone.
type settings struct {
	ravel.Peer
	password string
}

// checkPeers keys peers by address, with defaults filled in and passwords read. Those that cannot be had are in the
// error, in bad, and in the sessions' table with what is wrong.
func (s *Speaker) checkPeers(peers []ravel.Peer) (good map[netip.Addr]settings, bad map[netip.Addr]bool, err error) {
	good, bad = make(map[netip.Addr]settings, len(peers)), map[netip.Addr]bool{}
	var errs []error
	for _, p := range peers {
		if _, twice := good[p.Addr]; twice || bad[p.Addr] {
			errs = append(errs, fmt.Errorf("peer %s: wanted twice; the first is taken", p.Addr))
			continue
		}
		set, err := s.checkPeer(p)
		if err != nil {
			err = fmt.Errorf("peer %s: %w", p.Addr, err)
			bad[p.Addr] = true
			if p.Addr.IsValid() {
				s.sessions.want(p)
				s.sessions.failed(p.Addr, err.Error())
			}
			errs = append(errs, err)
			continue
		}
		good[p.Addr] = set
	}
	s.sessions.forgetAllBut(func(addr netip.Addr) bool {
		_, held := s.peers[addr]
		_, wanted := good[addr]
		return held || wanted || bad[addr]
	})
	return good, bad, errors.Join(errs...)
}

func (s *Speaker) checkPeer(p ravel.Peer) (settings, error) {
	if p.Port == 0 {
		p.Port = bgpPort
	}
	if p.Keepalive == 0 {
		p.Keepalive = p.HoldTime / 3
	}
	p.Keepalive = max(p.Keepalive.Truncate(time.Second), time.Second)
	var errs []error
	fault := func(is bool, format string, args ...any) {
		if is {
			errs = append(errs, fmt.Errorf(format, args...))
		}
	}
	fault(!p.Addr.IsValid() || p.Addr.IsUnspecified() || p.Addr.IsMulticast() || p.Addr.Is4In6(),
		"no address of a router")
	fault(p.ASN == 0, "AS number 0 (RFC 7607)")
	fault(p.LocalASN == 0, "local AS number 0 (RFC 7607)")
	fault(p.HoldTime < minHoldTime || p.HoldTime > maxHoldTime || p.HoldTime%time.Second != 0,
		"hold time %s: want whole seconds, 3 to 65535", p.HoldTime)
	fault(p.Keepalive >= p.HoldTime, "keepalive %s: want less than the hold time %s", p.Keepalive, p.HoldTime)
	fault(p.LocalAddr.IsValid() && p.LocalAddr.Is4() != p.Addr.Is4(),
		"local address %s is of the other family", p.LocalAddr)
	fault(p.Passive && s.o.ListenPort <= 0, "passive, but no listening port is set: neither side would dial")
	password, err := readPassword(p.PasswordFile)
	fault(err != nil, "reading its password: %w", err)
	return settings{Peer: p, password: password}, errors.Join(errs...)
}

// readPassword reads a TCP MD5 key (RFC 2385) without its line's end.
func readPassword(file string) (string, error) {
	if file == "" {
		return "", nil
	}
	b, err := os.ReadFile(file)
	if err != nil {
		return "", err
	}
	b = bytes.TrimSuffix(bytes.TrimSuffix(b, []byte("\n")), []byte("\r"))
	switch {
	case len(b) == 0:
		return "", fmt.Errorf("%s: empty", file)
	case len(b) > maxPassword:
		return "", fmt.Errorf("%s: %d bytes; the kernel takes %d at most", file, len(b), maxPassword)
	}
	return string(b), nil
}

// oneLocalASN returns an error that names two peers whose LocalASN differ.
func oneLocalASN(peers []ravel.Peer) error {
	for _, p := range peers {
		if first := peers[0]; p.LocalASN != first.LocalASN {
			return fmt.Errorf("peers %s and %s want local AS numbers %d and %d: "+
				"a director has one; the sessions stay as they are", first.Addr, p.Addr, first.LocalASN, p.LocalASN)
		}
	}
	return nil
}

// localASN returns the AS number that all of peers share, and false if there are none.
func localASN(peers map[netip.Addr]settings) (asn uint32, ok bool) {
	for _, p := range peers {
		return p.LocalASN, true
	}
	return 0, false
}

// routerIDFor follows the rule of Options.RouterID.
func (s *Speaker) routerIDFor(peers map[netip.Addr]settings) netip.Addr {
	s.view.Lock()
	asked := s.view.askedID
	s.view.Unlock()
	if asked.IsValid() {
		return asked
	}
	var locals []netip.Addr
	for _, p := range peers {
		if p.LocalAddr.Is4() && !p.LocalAddr.IsUnspecified() {
			locals = append(locals, p.LocalAddr)
		}
	}
	if len(locals) > 0 {
		return slices.MinFunc(locals, netip.Addr.Compare)
	}
	// Some routers refuse an identifier that is no unicast address: keep the first octet in 1 to 126.
	sum := sha256.Sum256([]byte("ravel router ID of " + s.o.Node))
	return netip.AddrFrom4([4]byte{1 + sum[0]%126, sum[1], sum[2], sum[3]})
}

// gobgpPeer writes a peer as GoBGP's API wants it. GoBGP counts in whole seconds.
func gobgpPeer(p settings) *api.Peer {
	peer := &api.Peer{
		Conf: &api.PeerConf{
			NeighborAddress: p.Addr.String(),
			PeerAsn:         p.ASN,
			LocalAsn:        p.LocalASN,
			AuthPassword:    p.password,
		},
		Timers: &api.Timers{Config: &api.TimersConfig{
			ConnectRetry:           1,
			HoldTime:               uint64(p.HoldTime / time.Second),
			KeepaliveInterval:      uint64(p.Keepalive / time.Second),
			IdleHoldTimeAfterReset: 1,
		}},
		Transport: &api.Transport{RemotePort: uint32(p.Port), PassiveMode: p.Passive},
	}
	if p.LocalAddr.IsValid() {
		peer.Transport.LocalAddress = p.LocalAddr.String()
	}
	if p.Multihop > 0 && p.ASN != p.LocalASN {
		peer.EbgpMultihop = &api.EbgpMultihop{Enabled: true, MultihopTtl: uint32(p.Multihop)}
	}
	for _, afi := range []api.Family_Afi{api.Family_AFI_IP, api.Family_AFI_IP6} {
		family := &api.Family{Afi: afi, Safi: api.Family_SAFI_UNICAST}
		peer.AfiSafis = append(peer.AfiSafis, &api.AfiSafi{
			Config:       &api.AfiSafiConfig{Family: family, Enabled: true},
			PrefixLimits: &api.PrefixLimit{Family: family, MaxPrefixes: maxReceived},
		})
	}
	return peer
}
