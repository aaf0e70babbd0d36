package hold

import (
	"os"
	"path/filepath"
	"testing"
	"time"
)

// Whatever stands in the file, it is read or refused.
func FuzzLoad(f *testing.F) {
	for _, seed := range []string{"", "{}", `{"documents":{"Cluster":{"Services":[{"Key":{"VIP":"192.0.2.1","Proto":"tcp","Port":80}}]}}}`,
		`{"documents":{"Fleet":{"Policy":{"Communities":["1:2"],"LargeCommunities":["1:2:3"]}}}}`, `{"documents":{"Fleet":{"Policy":{"Communities":["1:70000"]}}}}`} {
		f.Add([]byte(seed))
	}
	path := filepath.Join(f.TempDir(), "file")
	f.Fuzz(func(t *testing.T, b []byte) {
		if err := os.WriteFile(path, b, 0o600); err != nil {
			t.Fatal(err)
		}
		saved, _, err := Load(path)
		if err != nil {
			return
		}
		g := New(Options{Share: 50, Fleet: saved.Fleet, Boot: saved.Boot})
		g.Restore(saved)
		g.Decide(time.Now(), documents(1, 1), fleetOf("d1").Fleet)
	})
}
