package iptables

import (
	"strings"
	"testing"
)

// iptables-nft-restore says of each table, chain and rule that it could not be added: the first causes do.
func TestCausesAreALine(t *testing.T) {
	var said strings.Builder
	said.WriteString("iptables-nft-restore v1.8.9 (nf_tables): \n")
	for range 40 {
		said.WriteString("line 2: TABLE_ADD failed (Operation not supported): table nat\nline 3: CHAIN_USER_ADD failed (No such file or directory): chain RAVEL-A\n")
	}
	said.WriteString("line 9: RULE_APPEND failed (No such file or directory): rule in chain RAVEL-A\n")
	const want = "TABLE_ADD failed (Operation not supported): table nat; CHAIN_USER_ADD failed (No such file or directory): chain RAVEL-A (and 1 lines more)"
	if got := causes(said.String()); got != want {
		t.Errorf("got  %s\nwant %s", got, want)
	}
	if got := causes(strings.Repeat("é", 1000)); len(got) > maxCause {
		t.Errorf("%d bytes: %s", len(got), got)
	}
}
