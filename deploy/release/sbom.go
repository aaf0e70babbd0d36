package main

import (
	"cmp"
	"debug/buildinfo"
	"fmt"
	"io"
	"maps"
	"regexp"
	"slices"
	"strings"
	"time"

	"github.com/package-url/packageurl-go"
	spdxjson "github.com/spdx/tools-golang/json"
	"github.com/spdx/tools-golang/spdx/v2/common"
	"github.com/spdx/tools-golang/spdx/v2/v2_3"
)

// notInID is what the name of an element may not have.
var notInID = regexp.MustCompile(`[^A-Za-z0-9.]+`)

// writeSBOM writes an SPDX document of what a release is made of: the Go modules of the program, by what the program says
// itself, and Debian's packages, by what the root file systems say.
func writeSBOM(w io.Writer, parts []part, s source) error {
	const ravelID = "ravel"
	doc := &v2_3.Document{
		SPDXVersion: v2_3.Version, DataLicense: v2_3.DataLicense, SPDXIdentifier: "DOCUMENT", DocumentName: "ravel-" + s.version,
		DocumentNamespace: "https://github.com/ravel-lb/ravel/spdx/" + s.version + "-" + s.revision,
		CreationInfo: &v2_3.CreationInfo{Created: s.time.Format(time.RFC3339),
			Creators: []common.Creator{{CreatorType: "Tool", Creator: "ravel-release"}}},
	}
	add := func(id, name, version, license string, supplier *common.Supplier, url *packageurl.PackageURL) {
		doc.Packages = append(doc.Packages, &v2_3.Package{
			PackageName: name, PackageSPDXIdentifier: common.ElementID(id), PackageVersion: version, PackageSupplier: supplier,
			PackageDownloadLocation: "NOASSERTION", IsFilesAnalyzedTagPresent: true, PackageLicenseConcluded: "NOASSERTION",
			PackageLicenseDeclared: license, PackageCopyrightText: "NOASSERTION",
			PackageExternalReferences: []*v2_3.PackageExternalReference{{Category: common.CategoryPackageManager,
				RefType: common.TypePackageManagerPURL, Locator: url.ToString()}},
		})
	}
	relate := func(from, how, to string) {
		doc.Relationships = append(doc.Relationships, &v2_3.Relationship{RefA: common.MakeDocElementID("", from),
			RefB: common.MakeDocElementID("", to), Relationship: how})
	}

	main, modules, err := goModules(parts)
	if err != nil {
		return err
	}
	add(ravelID, "ravel", s.version, "Apache-2.0", nil, goURL(main, s.version))
	relate("DOCUMENT", common.TypeRelationshipDescribe, ravelID)
	for _, m := range modules {
		id := "go-" + notInID.ReplaceAllString(m.path, "-") + "-" + notInID.ReplaceAllString(m.version, "-")
		add(id, m.path, m.version, "NOASSERTION", nil, goURL(m.path, m.version))
		relate(ravelID, common.TypeRelationshipDependsOn, id)
	}
	for _, p := range parts {
		packages, err := p.debian.debianPackages()
		if err != nil {
			return err
		}
		for _, d := range packages {
			id := "deb-" + p.arch + "-" + notInID.ReplaceAllString(d.name, "-")
			qualifiers := map[string]string{"arch": d.arch, "distro": "debian-12"}
			if d.source != d.name {
				qualifiers["upstream"] = d.source
			}
			add(id, d.name, d.version, "NOASSERTION", &common.Supplier{SupplierType: "Organization", Supplier: "Debian"},
				packageurl.NewPackageURL(packageurl.TypeDebian, "debian", d.name, d.version, packageurl.QualifiersFromMap(qualifiers), ""))
			relate(ravelID, common.TypeRelationshipContains, id)
		}
	}
	seen := map[common.ElementID]bool{}
	for _, p := range doc.Packages {
		if seen[p.PackageSPDXIdentifier] {
			return fmt.Errorf("two packages of the SBOM are named %s: notInID in deploy/release/sbom.go makes them alike", p.PackageSPDXIdentifier)
		}
		seen[p.PackageSPDXIdentifier] = true
	}
	return spdxjson.Write(doc, w, spdxjson.Indent("  "))
}

// goURL names a Go module.
func goURL(path, version string) *packageurl.PackageURL {
	namespace, name := "", path
	if i := strings.LastIndex(path, "/"); i >= 0 {
		namespace, name = path[:i], path[i+1:]
	}
	return packageurl.NewPackageURL(packageurl.TypeGolang, namespace, name, version, nil, "")
}

// goModule is a module, or the standard library: stdlib.
type goModule struct{ path, version string }

// goModules lists the modules that are in the program of any architecture, and names the program's own.
func goModules(parts []part) (main string, list []goModule, err error) {
	all := map[goModule]bool{}
	for _, p := range parts {
		info, err := buildinfo.ReadFile(p.program)
		if err != nil {
			return "", nil, err
		}
		main = info.Main.Path
		all[goModule{"stdlib", strings.TrimPrefix(info.GoVersion, "go")}] = true
		for _, d := range info.Deps {
			if d.Replace != nil {
				d = d.Replace
			}
			all[goModule{d.Path, d.Version}] = true
		}
	}
	return main, slices.SortedFunc(maps.Keys(all), func(a, b goModule) int {
		return cmp.Or(cmp.Compare(a.path, b.path), cmp.Compare(a.version, b.version))
	}), nil
}
