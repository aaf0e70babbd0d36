package ravel_test

import (
	"testing"

	"github.com/ravel-lb/ravel"
)

// What communities write they read, and nothing else.
func TestCommunitiesReadWhatTheyWrite(t *testing.T) {
	for _, c := range []ravel.Community{0, 1, 65100<<16 | 120, 0xffffffff} {
		text, _ := c.MarshalText()
		var got ravel.Community
		if err := got.UnmarshalText(text); err != nil || got != c {
			t.Errorf("%s came back as %s, %v", c, got, err)
		}
	}
	for _, c := range []ravel.LargeCommunity{{}, {Global: 4294967295, Local1: 1, Local2: 4294967295}} {
		text, _ := c.MarshalText()
		var got ravel.LargeCommunity
		if err := got.UnmarshalText(text); err != nil || got != c {
			t.Errorf("%s came back as %s, %v", c, got, err)
		}
	}
	for _, text := range []string{"", ":", "1", "1:", "1:2:3:4", "1:70000", "-1:2", "+1:2", "01:2", "1:2x", "1: 2", "1:2:4294967296", "no-export"} {
		var c ravel.Community
		if err := c.UnmarshalText([]byte(text)); err == nil {
			t.Errorf("community %q is read as %s", text, c)
		}
		var large ravel.LargeCommunity
		if err := large.UnmarshalText([]byte(text)); err == nil {
			t.Errorf("large community %q is read as %s", text, large)
		}
	}
}
