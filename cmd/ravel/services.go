package main

import (
	"errors"
	"fmt"
	"net/netip"
	"strconv"
	"strings"

	"github.com/urfave/cli/v2"

	"github.com/ravel-lb/ravel/director"
	"github.com/ravel-lb/ravel/internal/admin"
	"github.com/ravel-lb/ravel/realserver"
)

func servicesCommand() *cli.Command {
	return &cli.Command{
		Name: "services",
		Usage: "show the services of this host: on a director IPVS and its real servers, ours and others', " +
			"on a realserver the redirects and their pods",
		Flags: askFlags(),
		Action: func(c *cli.Context) error {
			socket, format, err := asks(c)
			if err != nil {
				return err
			}
			var services []director.ServiceStatus
			err = admin.Get(c.Context, socket, "services", &services)
			if err == nil {
				tellStanding(c, socket)
				return printServices(c, format, services)
			}
			if !errors.Is(err, admin.ErrNoSuchQuery) {
				return err
			}
			var redirects []realserver.RedirectStatus
			if err := admin.Get(c.Context, socket, "redirects", &redirects); err != nil {
				return err
			}
			tellStanding(c, socket)
			return printRedirects(c, format, redirects)
		},
	}
}

func printServices(c *cli.Context, format string, services []director.ServiceStatus) error {
	if format == formatJSON {
		return printJSON(c.App.Writer, services)
	}
	header := []string{"SERVICE", "NAME", "OWNER", "SCHEDULER", "REAL SERVER", "FORWARDING", "WEIGHT", "ACTIVE"}
	if format == formatWide {
		header = append(header, "INACTIVE", "THRESHOLDS", "FLAGS", "FLOWS", "BYTES")
	}
	var rows [][]string
	for _, s := range services {
		key := s.Key().String()
		if s.Mark != 0 {
			key = fmt.Sprintf("fwmark %d", s.Mark)
		}
		owner := "other"
		if s.Ours {
			owner = "ravel"
		}
		scheduler := s.Scheduler
		if s.NotKept {
			scheduler += " (flows: not kept)"
		}
		first := []string{key, s.Name, owner, scheduler}
		if len(s.Reals) == 0 {
			rows = append(rows, pad(append(first, "none"), len(header)))
		}
		for _, rs := range s.Reals {
			addr := rs.Addr.String()
			if rs.Port != s.Port {
				addr = netip.AddrPortFrom(rs.Addr, rs.Port).String()
			}
			row := append(first, addr, rs.Forwarding, strconv.Itoa(rs.Weight), strconv.Itoa(rs.Active))
			if format == formatWide {
				flows, bytes := "", ""
				if rs.Counters != nil {
					flows, bytes = strconv.FormatUint(rs.Counters.Flows, 10), strconv.FormatUint(rs.Counters.Bytes, 10)
				}
				limit := ""
				if rs.Upper > 0 {
					limit = fmt.Sprintf("%d/%d", rs.Upper, rs.Lower)
				}
				row = append(row, strconv.Itoa(rs.Inactive), limit, strings.Join(s.Flags, ","), flows, bytes)
			}
			rows = append(rows, row)
			first = []string{" ", " ", " ", " "} // what is the same is said once
		}
	}
	return table(c.App.Writer, header, rows)
}

func printRedirects(c *cli.Context, format string, redirects []realserver.RedirectStatus) error {
	if format == formatJSON {
		return printJSON(c.App.Writer, redirects)
	}
	header := []string{"REDIRECT", "NAME", "HELD", "POD", "SHARE", "FLOWS"}
	if format == formatWide {
		header = append(header, "TUNNELLED", "MASQUERADE", "MTU")
	}
	var rows [][]string
	for _, r := range redirects {
		first := []string{r.Key().String(), r.Name, yes(r.Held)}
		if len(r.Pods) == 0 {
			rows = append(rows, pad(append(first, "none"), len(header)))
		}
		for _, pod := range r.Pods {
			row := append(first, pod.Addr.String(), fmt.Sprintf("%.1f%%", 100*pod.Probability), strconv.FormatUint(pod.Flows, 10))
			if format == formatWide {
				mtu := ""
				if r.MTU > 0 {
					mtu = strconv.Itoa(r.MTU)
				}
				row = append(row, yes(r.Tunnelled), yes(r.Masquerade), mtu)
			}
			rows = append(rows, row)
			first = []string{" ", " ", " "}
		}
	}
	return table(c.App.Writer, header, rows)
}

// pad makes a row as long as the header.
func pad(row []string, length int) []string {
	for len(row) < length {
		row = append(row, "")
	}
	return row
}
