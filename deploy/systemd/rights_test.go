package systemd_test

import (
	"os"
	"slices"
	"strings"
	"testing"

	"sigs.k8s.io/yaml"
)

// rbac.yaml has the rights that docs/kubernetes.md lists, no more and no less.
func TestRights(t *testing.T) {
	text, err := os.ReadFile("rbac.yaml")
	if err != nil {
		t.Fatal(err)
	}
	var have []string
	for part := range strings.SplitSeq(string(text), "\n---\n") {
		var role struct {
			Rules []struct{ APIGroups, Resources, ResourceNames, Verbs []string }
		}
		if err := yaml.Unmarshal([]byte(part), &role); err != nil {
			t.Fatal(err)
		}
		for _, r := range role.Rules {
			for _, resource := range r.Resources {
				group := strings.Join(r.APIGroups, ",")
				if group == "" {
					group = "core"
				}
				have = append(have, group+" "+resource+": "+strings.Join(r.Verbs, ", "))
			}
			if named := len(r.ResourceNames) > 0; named != slices.Equal(r.Resources, []string{"configmaps"}) {
				t.Errorf("%v by the names %v", r.Resources, r.ResourceNames)
			}
		}
	}
	page, err := os.ReadFile("../../docs/kubernetes.md")
	if err != nil {
		t.Fatal(err)
	}
	_, table, found := strings.Cut(string(page), "### Rights")
	table, _, _ = strings.Cut(table, "\n###")
	var want []string
	for line := range strings.Lines(table) {
		cells := strings.Split(line, "|")
		if len(cells) != 5 || strings.Contains(line, "API group") || strings.Contains(line, "---") {
			continue
		}
		group := strings.Trim(strings.TrimSpace(cells[1]), "`")
		verbs, _, _ := strings.Cut(strings.TrimSpace(cells[3]), ";")
		verbs, _, _ = strings.Cut(verbs, ", for ") // the account here is a director's too
		// The resources are in backquotes, the words after a comma say where.
		for i, part := range strings.Split(cells[2], "`") {
			if i%2 == 1 && part != "resourceNames" {
				want = append(want, group+" "+part+": "+verbs)
			}
		}
	}
	slices.Sort(have)
	slices.Sort(want)
	if !found || !slices.Equal(have, want) {
		t.Errorf("rbac.yaml has\n%s\ndocs/kubernetes.md\n%s", strings.Join(have, "\n"), strings.Join(want, "\n"))
	}
}
