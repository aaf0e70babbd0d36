package check

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"
)

// chain is a chain of rules of either engine.
type chain struct {
	variant string // "nft" or "legacy"
	family  string // as nft spells it: "ip", "ip6", "inet", …
	table   string
	name    string
	hook    string // "input", "forward", …; "" for one that the kernel does not call by itself
	drops   bool   // what no rule decides is dropped
	rules   int    // those that are not jumps to chains of ours
}

// String names the chain.
func (c chain) String() string { return c.family + " " + c.table + " " + c.name }

// iptables reports whether the programs of iptables write to the chain's table.
func (c chain) iptables() bool {
	switch c.table {
	case "filter", "nat", "mangle", "raw", "security":
		return c.family == "ip" || c.family == "ip6"
	}
	return false
}

// Of linux/netfilter/nfnetlink.h and nf_tables.h.
const (
	subsysNft   = 10
	getChain    = 4
	getRule     = 7
	chainTable  = 1
	chainName   = 3
	chainHook   = 4
	chainPolicy = 5
	hookNumber  = 1
	ruleTable   = 1
	ruleChain   = 2
)

var families = map[byte]string{1: "inet", 2: "ip", 3: "arp", 5: "netdev", 7: "bridge", 10: "ip6"}

var hooks = []string{"prerouting", "input", "forward", "output", "postrouting"}

// nft reads the chains, and counts the rules, by netlink: the programs ask for extensions, which may load modules.
func (live) nft() ([]chain, error) {
	ask := func(kind int) ([][]byte, error) {
		request := nl.NewNetlinkRequest(subsysNft<<8|kind, unix.NLM_F_DUMP)
		request.AddData(&nl.Nfgenmsg{NfgenFamily: unix.AF_UNSPEC, Version: nl.NFNETLINK_V0})
		messages, err := request.Execute(unix.NETLINK_NETFILTER, 0)
		if errors.Is(err, netlink.ErrDumpInterrupted) {
			err = nil
		}
		return messages, err
	}
	chains, err := ask(getChain)
	if err != nil {
		return nil, fmt.Errorf("listing the chains of nf_tables: %w", err)
	}
	rules, err := ask(getRule)
	if err != nil {
		return nil, fmt.Errorf("listing the rules of nf_tables: %w", err)
	}
	return parseNft(chains, rules), nil
}

// parseNft reads answers to NFT_MSG_GETCHAIN and NFT_MSG_GETRULE. What it cannot read it leaves out.
func parseNft(chains, rules [][]byte) []chain {
	type place struct{ family, table, name string }
	var all []chain
	index := map[place]int{}
	for _, m := range chains {
		family, attrs, good := nftMessage(m)
		if !good {
			continue
		}
		c := chain{variant: "nft", family: family}
		for kind, value := range attributes(attrs) {
			switch kind {
			case chainTable:
				c.table = text(value)
			case chainName:
				c.name = text(value)
			case chainPolicy:
				c.drops = len(value) == 4 && binary.BigEndian.Uint32(value) == 0
			case chainHook:
				for kind, value := range attributes(value) {
					if kind == hookNumber && len(value) == 4 {
						c.hook = hookName(family, binary.BigEndian.Uint32(value))
					}
				}
			}
		}
		c.drops = c.drops && c.hook != ""
		index[place{c.family, c.table, c.name}] = len(all)
		all = append(all, c)
	}
	for _, m := range rules {
		family, attrs, good := nftMessage(m)
		if !good {
			continue
		}
		at := place{family: family}
		for kind, value := range attributes(attrs) {
			switch kind {
			case ruleTable:
				at.table = text(value)
			case ruleChain:
				at.name = text(value)
			}
		}
		// The verdict of a jump to a chain of ours holds its name.
		jump := bytes.Contains(attrs, []byte("\x00RAVEL")) && !bytes.HasPrefix([]byte(at.name), []byte("RAVEL"))
		if i, known := index[at]; known && !jump {
			all[i].rules++
		}
	}
	return all
}

func hookName(family string, number uint32) string {
	if family == "ip" || family == "ip6" || family == "inet" || family == "bridge" {
		if int64(number) < int64(len(hooks)) {
			return hooks[number]
		}
	}
	return fmt.Sprintf("hook %d", number)
}

// nftMessage splits off the header of nfnetlink: family, version, two bytes of resource.
func nftMessage(m []byte) (family string, attrs []byte, good bool) {
	if len(m) < 4 {
		return "", nil, false
	}
	family, known := families[m[0]]
	if !known {
		family = fmt.Sprintf("family %d", m[0])
	}
	return family, m[4:], true
}

// attributes iterates over netlink attributes, up to the first that does not fit.
func attributes(b []byte) func(yield func(kind uint16, value []byte) bool) {
	return func(yield func(uint16, []byte) bool) {
		for len(b) >= 4 {
			length := int(binary.NativeEndian.Uint16(b))
			kind := binary.NativeEndian.Uint16(b[2:]) &^ (unix.NLA_F_NESTED | unix.NLA_F_NET_BYTEORDER)
			if length < 4 || length > len(b) || !yield(kind, b[4:length]) {
				return
			}
			b = b[min((length+3)&^3, len(b)):]
		}
	}
}

func text(b []byte) string {
	s, _, _ := bytes.Cut(b, []byte{0})
	return string(s)
}
