// Package gossip makes the processes of a fleet known to each other and spreads what they say and agree on.
package gossip

import (
	_ "github.com/hashicorp/memberlist"               // the package
	_ "google.golang.org/protobuf/encoding/protowire" // is in the making
)
