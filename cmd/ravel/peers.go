package main

import (
	"errors"
	"fmt"
	"strconv"
	"strings"
	"time"

	"github.com/urfave/cli/v2"

	"github.com/ravel-lb/ravel/bgp"
	"github.com/ravel-lb/ravel/internal/admin"
)

// peersAnswer is what a running director says of its sessions.
type peersAnswer struct {
	bgp.Status
	Unknown bool `json:"unknown,omitempty"` // no document is in force, so that no peer is wanted yet
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
			if status.Unknown {
				return notKnown(c, "director", "its peers")
			}
			for _, p := range status.Peers {
				if !p.Established() {
					return errNotWell
				}
			}
			return nil
		},
	}
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
