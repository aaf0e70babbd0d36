package realserver

import (
	"fmt"

	"github.com/ravel-lb/ravel"
	"github.com/ravel-lb/ravel/internal/nftnat"
)

// early redirects before a kube-proxy that works with nftables, whose hook comes before iptables' (see nftnat).
type early interface {
	Needed() (bool, error) // whether such a kube-proxy is here
	Held() bool
	Lost() (bool, error)
	Apply(redirects []ravel.Redirect) error
	Remove(dryRun bool) ([]string, error)
}

var _ early = (*nftnat.Table)(nil)

// forestall has the redirects stand before kube-proxy's where they must, and nowhere else. The rules of iptables stand all
// the same: for what they do besides, and for the moment in which kube-proxy comes or goes.
func (f *family) forestall(redirects []ravel.Redirect) []ravel.Problem {
	if f.early == nil {
		return nil
	}
	needed, err := f.early.Needed()
	if err == nil && needed && len(redirects) > 0 {
		err = f.early.Apply(redirects)
	} else if err == nil {
		_, err = f.early.Remove(false)
	}
	f.late = err != nil
	if err == nil {
		return nil
	}
	return []ravel.Problem{{
		Where: "nf_tables of " + f.name(),
		What:  fmt.Sprintf("kube-proxy works with nftables here, and takes the packets of a VIP that it knows before they are redirected: %v", err),
		Fix:   "modprobe -a nf_tables nft_chain_nat nft_ct nft_numgen; or keep kube-proxy from knowing the VIP, by ipMode: Proxy in the status of the Service",
	}}
}

// forestalls reports whether forestall has work: kube-proxy came or went, or somebody removed our table.
func (f *family) forestalls(n names) bool {
	if f.early == nil || f.late {
		return false
	}
	needed, err := f.early.Needed()
	if err != nil {
		return false // the next Resync looks
	}
	if lost, err := f.early.Lost(); lost || err != nil {
		return lost && needed
	}
	return f.early.Held() != (needed && len(f.have["nat"][n.base]) > 0)
}
