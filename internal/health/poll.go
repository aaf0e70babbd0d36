package health

import (
	"net/netip"
	"slices"

	"github.com/ravel-lb/ravel"
)

// votes count the opinions on an address of those live directors that are not alone.
type votes struct {
	healthy, refused, silent int
	directors                int // with or without an opinion
}

func (v votes) opinions() int { return v.healthy + v.refused + v.silent }

// silence reports whether a strict majority of those that know call the address silent.
func (v votes) silence() bool { return v.silent > 0 && 2*v.silent > v.opinions() }

// reached reports whether a strict majority of those that know call it healthy or refused.
func (v votes) reached() bool { return 2*(v.healthy+v.refused) > v.opinions() }

func (v *votes) add(h ravel.Health, n int) {
	switch h {
	case ravel.Healthy:
		v.healthy += n
	case ravel.Refused:
		v.refused += n
	case ravel.Silent:
		v.silent += n
	}
}

// poll is what each live director says of each address.
type poll struct {
	directors int            // the first is this process
	addrs     []netip.Addr   // sorted, each once
	opinions  []ravel.Health // directors of them for each address
	tallies   []tally        // two for each director, IPv4 first
	all       [2]int         // addresses of each family
	votes     []votes        // for each address
}

// tally counts the addresses of a family that a director calls silent.
type tally struct {
	silent    int
	contested int // that most of the others which know reach
	agreed    int // that most of the others which know call silent too
}

// take asks each director, by what it reports, for each address of the nodes.
func take(reports []map[netip.Addr]ravel.Health, nodes []Node) poll {
	p := poll{directors: len(reports), tallies: make([]tally, 2*len(reports))}
	for _, n := range nodes {
		p.addrs = append(p.addrs, n.Addrs...)
	}
	slices.SortFunc(p.addrs, netip.Addr.Compare)
	p.addrs = slices.Compact(p.addrs)
	p.opinions = make([]ravel.Health, 0, len(p.addrs)*len(reports))
	for _, addr := range p.addrs {
		v := votes{}
		for _, report := range reports {
			h := report[addr]
			p.opinions = append(p.opinions, h)
			v.add(h, 1)
		}
		p.all[family(addr)]++
		if v.silent == 0 {
			continue
		}
		others := v
		others.add(ravel.Silent, -1)
		for d, h := range p.opinions[len(p.opinions)-len(reports):] {
			if h != ravel.Silent {
				continue
			}
			t := &p.tallies[2*d+family(addr)]
			t.silent++
			if others.reached() {
				t.contested++
			}
			if others.silence() {
				t.agreed++
			}
		}
	}
	return p
}

const v4, v6 = 0, 1

func family(addr netip.Addr) int {
	if addr.Is4() {
		return v4
	}
	return v6
}

// alone reports whether the director calls more than half of the addresses of a family silent that most of the others
// which know reach. Of those that know an address at most half can find that; so not all of them are alone.
func (p poll) alone(director, family int) bool {
	return 2*p.tallies[2*director+family].contested > p.all[family]
}

// cutOff reports whether the director calls more than half of the addresses of a family silent, without most of the
// others saying so.
func (p poll) cutOff(director, family int) bool {
	t := p.tallies[2*director+family]
	return 2*(t.silent-t.agreed) > p.all[family]
}

// count counts the votes of those directors that are not alone in the family. While this process sees no other, it is what
// was found when it did.
func (p *poll) count(alone [2]bool) {
	counts, directors := make([]bool, 2*p.directors), [2]int{}
	for d := range p.directors {
		for f := range alone {
			if !p.alone(d, f) && !(p.directors == 1 && alone[f]) {
				counts[2*d+f] = true
				directors[f]++
			}
		}
	}
	p.votes = make([]votes, len(p.addrs))
	for i, addr := range p.addrs {
		f := family(addr)
		v := votes{directors: directors[f]}
		for d, h := range p.opinions[i*p.directors : (i+1)*p.directors] {
			if counts[2*d+f] {
				v.add(h, 1)
			}
		}
		p.votes[i] = v
	}
}

// of returns the votes on an address and what this process says of it.
func (p poll) of(addr netip.Addr) (votes, ravel.Health) {
	i, found := slices.BinarySearchFunc(p.addrs, addr, netip.Addr.Compare)
	if !found {
		return votes{}, ravel.Unprobed
	}
	return p.votes[i], p.opinions[i*p.directors]
}
