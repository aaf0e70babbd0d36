package original

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// link is a link as the kernel shows it.
type link struct {
	index int
	name  string
	kind  string // "dummy", "veth", …
	alias string
	addrs []netip.Prefix // without the link-local ones of IPv6
}

// kernel is what RemoveLinks does to the kernel.
type kernel interface {
	links() ([]link, error)
	remove(index int) error // errGone if it is not there
}

var errGone = errors.New("no such link")

// vip returns the VIP that the original made a link for.
func (l link) vip() (netip.Addr, bool) {
	if l.kind != "dummy" || l.alias != "" || len(l.addrs) != 1 || !l.addrs[0].IsSingleIP() || !named(l.name, l.addrs[0].Addr()) {
		return netip.Addr{}, false
	}
	return l.addrs[0].Addr(), true
}

// named reports whether the original gives this name to the link of a VIP: an IPv4 address with underscores for dots,
// and of an IPv6 address, as it was written in the document, the last 15 characters without colons.
func named(name string, vip netip.Addr) bool {
	if vip.Is4() {
		return name == strings.ReplaceAll(vip.String(), ".", "_")
	}
	if len(name) != 15 {
		return false
	}
	b := vip.As16()
	groups := make([]string, 0, 8)
	for i := 0; i < len(b); i += 2 {
		groups = append(groups, fmt.Sprintf("%x", uint16(b[i])<<8|uint16(b[i+1])))
	}
	return endsAs(strings.ToLower(name), groups, false)
}

// endsAs reports whether text can be the end of groups of an IPv6 address written one after the other: each with leading
// zeros or without, and one run of zeros left out.
func endsAs(text string, groups []string, leftOut bool) bool {
	if text == "" {
		return true
	}
	if len(groups) == 0 {
		return false
	}
	before, last := groups[:len(groups)-1], groups[len(groups)-1]
	if !leftOut {
		for n := len(groups); n > 0 && groups[n-1] == "0"; n-- {
			if endsAs(text, groups[:n-1], true) {
				return true
			}
		}
	}
	for written := last; len(written) <= 4; written = "0" + written {
		if strings.HasSuffix(written, text) {
			return true
		}
		if rest, ends := strings.CutSuffix(text, written); ends && endsAs(rest, before, leftOut) {
			return true
		}
	}
	return false
}

// RemoveLinks removes the dummy links that the original made, each with its VIP, and returns what went, or with dryRun
// what would go, a line each in the words of ip, and which other link still holds the VIP, if one does.
func RemoveLinks(ctx context.Context, dryRun bool) ([]string, error) {
	return removeLinks(ctx, netlinkKernel{&netlink.Handle{}}, dryRun)
}

func removeLinks(ctx context.Context, k kernel, dryRun bool) (done []string, err error) {
	all, err := k.links()
	if err != nil {
		return nil, fmt.Errorf("reading links: %w", err)
	}
	slices.SortFunc(all, func(a, b link) int { return strings.Compare(a.name, b.name) })
	var errs []error
	for _, l := range all {
		vip, its := l.vip()
		if !its {
			continue
		}
		if err := ctx.Err(); err != nil {
			return done, errors.Join(append(errs, err)...)
		}
		if !dryRun {
			switch err := k.remove(l.index); {
			case errors.Is(err, errGone):
				continue
			case err != nil:
				errs = append(errs, fmt.Errorf("deleting link %s: %w", l.name, err))
				continue
			}
		}
		said := "no other link holds it"
		for _, other := range all {
			if other.index != l.index && slices.ContainsFunc(other.addrs, func(p netip.Prefix) bool { return p.Addr() == vip }) {
				said = other.name + " holds it too"
			}
		}
		done = append(done, fmt.Sprintf("ip link delete %s # VIP %s: %s", l.name, vip, said))
	}
	return done, errors.Join(errs...)
}

// netlinkKernel is the kernel of this network namespace.
type netlinkKernel struct{ h *netlink.Handle }

var _ kernel = netlinkKernel{}

func (k netlinkKernel) links() ([]link, error) {
	list, err := dump(k.h.LinkList)
	if err != nil {
		return nil, err
	}
	held, err := dump(func() ([]netlink.Addr, error) { return k.h.AddrList(nil, netlink.FAMILY_ALL) })
	if err != nil {
		return nil, err
	}
	addrs := map[int][]netip.Prefix{}
	for _, a := range held {
		ip, ok := netip.AddrFromSlice(a.IP)
		if ip = ip.Unmap(); !ok || ip.Is6() && ip.IsLinkLocalUnicast() {
			continue
		}
		ones, _ := a.Mask.Size()
		addrs[a.LinkIndex] = append(addrs[a.LinkIndex], netip.PrefixFrom(ip, ones))
	}
	all := make([]link, 0, len(list))
	for _, l := range list {
		a := l.Attrs()
		all = append(all, link{a.Index, a.Name, l.Type(), a.Alias, addrs[a.Index]})
	}
	return all, nil
}

func (k netlinkKernel) remove(index int) error {
	err := k.h.LinkDel(&netlink.Dummy{LinkAttrs: netlink.LinkAttrs{Index: index}})
	if errors.Is(err, unix.ENODEV) || errors.As(err, &netlink.LinkNotFoundError{}) {
		return fmt.Errorf("%w: %w", errGone, err)
	}
	return err
}

// dump reads a list again while the kernel changes it under the reader, within reason.
func dump[T any](read func() ([]T, error)) (list []T, err error) {
	for range 5 {
		if list, err = read(); !errors.Is(err, netlink.ErrDumpInterrupted) {
			return list, err
		}
	}
	return nil, err
}
