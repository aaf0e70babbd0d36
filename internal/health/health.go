// Package health says which real servers are dead. A Prober asks each real server's address and says what it, alone,
// finds there; a Judge takes what all directors of the fleet find, and how gossip sees the nodes, and judges.
//
// It guarantees that nobody becomes dead unless a majority of the fleet's voting members is seen; that, where probes are
// on, only silence means death, and the silence of a strict majority of the directors that know; that an agent which is
// down is never a node which is down; and that no packet goes to any other than the given targets.
package health
