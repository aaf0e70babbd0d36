package main

import (
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/urfave/cli/v2"

	"github.com/ravel-lb/ravel"
	"github.com/ravel-lb/ravel/bgp"
	"github.com/ravel-lb/ravel/internal/admin"
)

// peersAnswer is what a running director says of its sessions.
type peersAnswer struct {
	bgp.Status
	Unknown bool   `json:"unknown,omitempty"` // no document is in force, so that no peer is wanted yet
	Attract string `json:"attract,omitempty"` // none, or nothing
	// Trouble says why sessions that there should be are not in Peers, or that BGP itself has a fault.
	Trouble string `json:"trouble,omitempty"`
	// Fleet are its settings that an operator should not forget.
	Fleet standing `json:"fleet,omitzero"`
}

// answerPeers is what a director says of its sessions, of which c wants some. The bool is false while no document is in
// force.
func answerPeers(status bgp.Status, c computed, known bool) peersAnswer {
	answer := peersAnswer{Status: status, Unknown: !known}
	if c.inputs.AttractNone {
		answer.Attract = "none"
	}
	if known {
		answer.Trouble = peersTrouble(status, c)
	}
	return answer
}

// peersTrouble says what no line of the sessions can: that they are not there, and why.
func peersTrouble(status bgp.Status, c computed) string {
	var lacks []string
	for _, want := range c.state.Peers {
		if !slices.ContainsFunc(status.Peers, func(p bgp.PeerStatus) bool { return p.Addr == want.Addr }) {
			lacks = append(lacks, want.Addr.String())
		}
	}
	switch {
	case status.Fault != "":
		return "BGP has a fault: " + status.Fault
	case !listed(c.inputs.Fleet, c.inputs.Node):
		return fmt.Sprintf("BGP does not run here: this director, %s, is not in fleet.directors", c.inputs.Node)
	case !status.Running && len(c.state.Peers) == 0:
		return fmt.Sprintf("BGP does not run here: fleet.peers has none for this director, %s", c.inputs.Node)
	case !status.Running:
		return "BGP does not run here: it has not started, though peers are wanted: " + strings.Join(lacks, ", ")
	case len(lacks) > 0:
		return "BGP has no session with wanted peers: " + strings.Join(lacks, ", ")
	}
	return ""
}

func peersCommand() *cli.Command {
	return &cli.Command{
		Name:  "peers",
		Usage: "show each BGP session of the director that runs here",
		Flags: askFlags(),
		Action: func(c *cli.Context) error {
			socket, format, err := asks(c)
			if err != nil {
				return err
			}
			var status peersAnswer
			err = admin.Get(c.Context, socket, "peers", &status)
			if errors.Is(err, admin.ErrNotRunning) || errors.Is(err, admin.ErrNoSuchQuery) {
				return fmt.Errorf("no director runs here, so there are no BGP sessions (asked on %s): %w", socket, admin.ErrNotRunning)
			}
			if err != nil {
				return err
			}
			if format == formatJSON {
				err = printJSON(c.App.Writer, status)
			} else {
				err = table(c.App.Writer, peerHeader(format), peerRows(status.Status, format))
			}
			if err != nil {
				return err
			}
			status.Fleet.tell(c)
			if status.Unknown {
				return notKnown(c, "director", "its peers")
			}
			return judgePeers(c, status)
		},
	}
}

// judgePeers says what the table does not show. A director that announces nothing needs no session.
func judgePeers(c *cli.Context, status peersAnswer) error {
	down := slices.ContainsFunc(status.Peers, func(p bgp.PeerStatus) bool { return !p.Established() })
	switch {
	case status.Trouble == "" && !down:
		return nil
	case status.Attract == "none":
		fmt.Fprintln(c.App.ErrWriter, "ravel: this director announces nothing (--attract=none), so no session is needed")
		return nil
	case status.Trouble != "":
		fmt.Fprintf(c.App.ErrWriter, "ravel: %s; see ravel check\n", status.Trouble)
	}
	return errNotWell
}

func peerHeader(format string) []string {
	header := []string{"PEER", "ASN", "STATE", "UPTIME", "SENT", "RECEIVED", "LAST ERROR"}
	if format == formatWide {
		header = append(header, "WHEN", "PORT", "LOCAL ASN", "HOLD", "FAMILIES", "FLAPS", "UPDATES")
	}
	return header
}

func peerRows(status bgp.Status, format string) [][]string {
	var rows [][]string
	for _, p := range status.Peers {
		uptime := ""
		if p.Established() {
			uptime = span(time.Duration(p.Uptime) * time.Second)
		}
		lastError := p.LastError
		if lastError != "" && format != formatWide {
			lastError += " (" + ago(p.LastErrorAt) + ")"
		}
		row := []string{
			p.Addr.String(), strconv.FormatUint(uint64(p.ASN), 10), p.State, uptime,
			strconv.FormatUint(p.Sent, 10), strconv.FormatUint(p.Received, 10), lastError,
		}
		if format == formatWide {
			row = append(row, ago(p.LastErrorAt), strconv.Itoa(int(p.Port)), strconv.FormatUint(uint64(p.LocalASN), 10),
				span(time.Duration(p.HoldTime)*time.Second), strings.Join(p.Families, ","),
				strconv.FormatUint(p.Flaps, 10), strconv.FormatUint(p.Updates, 10))
		}
		rows = append(rows, row)
	}
	return rows
}

// sessionProblems are the sessions that are down, each with why and what to do.
func sessionProblems(status bgp.Status) []ravel.Problem {
	var problems []ravel.Problem
	for _, p := range status.Peers {
		if p.Established() || p.LastError == "" {
			continue
		}
		problems = append(problems, ravel.Problem{
			Where: "peer " + p.Addr.String(), What: "the session is down: " + p.LastError, Fix: sessionRemedy(p),
		})
	}
	return problems
}

// sessionRemedy is what to do about the last error of a session, which package bgp words.
func sessionRemedy(p bgp.PeerStatus) string {
	says := func(words ...string) bool {
		return slices.ContainsFunc(words, func(w string) bool { return strings.Contains(p.LastError, w) })
	}
	asns := fmt.Sprintf("make asn of the peer (here %d) the router's own, and the router's remote AS for this director %d", p.ASN, p.LocalASN)
	switch {
	case says("bad peer AS"):
		return asns
	case says("did not accept our OPEN", "closed or reset"):
		return asns + "; the router needs this director's address as a neighbour"
	case says("connection refused"):
		return fmt.Sprintf("start BGP on the router, at port %d of %s, and let this director's address in", p.Port, p.Addr)
	case says("MD5 key"):
		return "make passwordFile of the peer and the router's password the same, and see that the router is reached: ping " + p.Addr.String()
	case says("no route to host", "network is unreachable"):
		return "give this host a route to the router: ip route get " + p.Addr.String() + "; set multihop where another router lies between"
	case says("does not hold the local address"):
		return "give this host that address, or correct localAddress of the peer"
	case says("already in use"):
		return "stop what has the port, or set another --bgp-port"
	}
	return "see the router's log, and the peer in the fleet document"
}
