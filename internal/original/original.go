// Package original knows what the original Ravel (Comcast's, whose program is also called kube2ipvs) leaves in a kernel,
// and removes just that: its chains in nat and the jump to them, and its dummy links, one for each VIP.
//
// It guarantees that nothing goes that only looks alike. A chain goes if its name is one that the original makes under the
// given base and all of its rules are of the kind that the original writes there; a link, if it is a dummy that holds one
// address and has the name that the original derives from that address. IPVS carries no mark of who made a service, so
// this package leaves that alone.
package original
