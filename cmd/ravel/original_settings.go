package main

import (
	"github.com/urfave/cli/v2"

	"github.com/ravel-lb/ravel/internal/desired"
)

// The settings that stand for flags of the original, by the original's names where it had one.

func originalMetricsFlag() cli.Flag {
	return boolFlag("original-metrics", false, "show those of the original's metrics (rdei_lb_*) that can be told, too (docs/migration.md)")
}

func originalDirectorFlags() []cli.Flag {
	return []cli.Flag{
		boolFlag("ipvs-weight-override", false, "give every real server the weight 1, however many pods it has; the same on all directors"),
		boolFlag("adopt", false, "take over IPVS services of our VIPs that another load balancer left here, with their open flows; that one must have ended"),
		boolFlag("ipvs-ignore-node-cordon", false, "let cordoned nodes take new flows; the same on all directors"),
	}
}

func originalRealserverFlags() []cli.Flag {
	return []cli.Flag{
		boolFlag("iptables-masq", false, "whether pods see this node's address instead of the client's (default: as the fleet document has it)"),
	}
}

// originalValues are the checked values of them.
type originalValues struct {
	metrics bool
	// For the labels of the original's metrics.
	configNamespace, configName, configKey string

	equalWeights, ignoreCordon bool
	adopt                      bool
	masquerade                 *bool // nil leaves it to the fleet document
}

func originalOf(c *cli.Context, director bool) originalValues {
	o := originalValues{
		metrics: c.Bool("original-metrics"), configNamespace: c.String("config-namespace"), configName: c.String("config-name"), configKey: c.String("config-key"),
	}
	if director {
		o.equalWeights, o.ignoreCordon = c.Bool("ipvs-weight-override"), c.Bool("ipvs-ignore-node-cordon")
		o.adopt = c.Bool("adopt")
		return o
	}
	if on := c.Bool("iptables-masq"); c.IsSet("iptables-masq") {
		o.masquerade = &on
	}
	return o
}

// into is what the settings make of the inputs.
func (o originalValues) into(in desired.Inputs) desired.Inputs {
	in.EqualWeights = o.equalWeights
	if o.masquerade != nil {
		in.Fleet.Masquerade = *o.masquerade
	}
	return in
}
