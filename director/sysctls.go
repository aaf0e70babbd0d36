package director

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"strings"

	"github.com/ravel-lb/ravel"
	"github.com/ravel-lb/ravel/internal/sysctl"
)

// settings are the kernel's for IPVS (Documentation/networking/ipvs-sysctl.rst), and why.
var settings = []struct{ name, value string }{
	{"sloppy_tcp", "1"},                // take over a flow in its middle, from a director that is gone
	{"sloppy_sctp", "1"},               // the same
	{"schedule_icmp", "1"},             // an error about a flow that is not known here goes where its packets would go
	{"conntrack", "0"},                 // IPVS needs no conntrack here, but see tune
	{"expire_nodest_conn", "0"},        // a real server that comes back finds its flows
	{"expire_quiescent_template", "0"}, // the same for persistence, which we do not use
	{"conn_reuse_mode", "1"},           // a client that uses a port again is scheduled again
	{"drop_entry", "1"},                // forget half-open flows when memory is short
	{"run_estimation", "0"},            // counting costs latency; see Options.CountPackets
	{"pmtu_disc", "1"},                 // tell senders of packets that are too long for a tunnel
	{"ignore_tunneled", "0"},           // packets from a tunnel are packets
}

// estimation is the setting without which the kernel's counters stand still (ip_vs_est.c).
const estimation = "net/ipv4/vs/run_estimation"

// keepTrack is the setting by which IPVS keeps conntrack true to what it does with a flow.
const keepTrack = "net/ipv4/vs/conntrack"

// Prepare makes the kernel's settings as Apply does, for a process that will not have the right to, and touches no
// service. ip_vs must be there: the settings come with it.
func (d *Director) Prepare(ctx context.Context) ([]ravel.Problem, error) {
	var problems []ravel.Problem
	finished, err := d.call(ctx, func(_ context.Context, k kernel) error {
		if _, err := d.readTable(k); err != nil {
			return err
		}
		problems = tune(d.sysctl, d.count, len(d.Foreign()) > 0)
		return nil
	})
	if !finished {
		return nil, err
	}
	return problems, err
}

// tune sets the kernel's settings and returns what could not be set. Where IPVS holds services of others too, conntrack
// stays as it is: kube-proxy needs it for the addresses that it puts in the place of clients', and our packets are not
// tracked.
func tune(s *sysctl.Setter, count, shared bool) []ravel.Problem {
	if s == nil {
		return nil
	}
	var problems []ravel.Problem
	var unset []string // as sysctl takes them
	var why error
	for _, setting := range settings {
		name, value := "net/ipv4/vs/"+setting.name, setting.value
		if count && name == estimation {
			value = "1"
		}
		if shared && name == keepTrack {
			continue
		}
		err := s.Set(name, value)
		switch {
		case errors.Is(err, fs.ErrNotExist):
			problems = append(problems, ravel.Problem{
				Where: "sysctl " + name, What: fmt.Sprintf("this kernel has it not; it should be %s", value),
				Fix: "use a kernel that has it",
			})
		case err != nil:
			unset = append(unset, setting.name+"="+value)
			why = cmp.Or(why, err)
		}
	}
	if len(unset) > 0 {
		// One cause for all of them, as a rule: /proc/sys is read-only here.
		var path *fs.PathError
		if errors.As(why, &path) {
			why = path.Err
		}
		problems = append(problems, ravel.Problem{
			Where: "sysctl net/ipv4/vs", What: fmt.Sprintf("cannot set %s: %v", strings.Join(unset, ", "), why),
			Fix: "ravel check --host --fix --role director, as root of the host before this starts",
		})
	}
	return problems
}
