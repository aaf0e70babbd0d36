package check

import (
	"bytes"
	"compress/gzip"
	"errors"
	"io"
	"io/fs"
	"os"
	"path"
	"slices"
	"strings"
)

// kernelConfig is what the running kernel was built with, by symbol without "CONFIG_"; nil is not known. A symbol that
// is not set is not in it.
type kernelConfig map[string]string

// readConfig finds the running kernel's configuration, and says where.
func (f *facts) readConfig() (kernelConfig, string) {
	release := f.release()
	names := []string{"proc/config.gz"}
	if release != "" {
		names = append(names, "boot/config-"+release, "lib/modules/"+release+"/config",
			"usr/lib/modules/"+release+"/config", "usr/lib/kernel/config-"+release)
	}
	for _, name := range names {
		text, err := f.read(name)
		if err != nil {
			continue
		}
		if strings.HasSuffix(name, ".gz") {
			text = gunzip(text)
		}
		if config := parseConfig(text); config != nil {
			return config, "/" + name
		}
	}
	return nil, ""
}

// gunzip returns what it can read, up to a bound.
func gunzip(s string) string {
	r, err := gzip.NewReader(strings.NewReader(s))
	if err != nil {
		return ""
	}
	var b bytes.Buffer
	if _, err := io.Copy(&b, io.LimitReader(r, maxFile)); err != nil {
		return ""
	}
	return b.String()
}

// parseConfig reads a kernel's .config. A text that has none of its lines is no configuration: nil.
func parseConfig(text string) kernelConfig {
	var config kernelConfig
	for line := range strings.Lines(text) {
		line = strings.TrimSpace(line)
		rest, found := strings.CutPrefix(line, "CONFIG_")
		if !found {
			continue
		}
		symbol, value, found := strings.Cut(rest, "=")
		if !found || symbol == "" {
			continue
		}
		if config == nil {
			config = kernelConfig{}
		}
		config[symbol] = strings.Trim(value, `"`)
	}
	return config
}

// modules is what is known of the kernel's modules.
type modules struct {
	none     bool            // the kernel has no loadable modules
	loaded   map[string]bool // nil if not known
	users    map[string][]string
	builtin  map[string]bool // nil if not known
	loadable map[string]bool // nil if not known
	disabled bool            // none can be loaded any more until the next boot
}

func (f *facts) readModules() modules {
	var m modules
	text, err := f.read("proc/modules")
	switch {
	case err == nil:
		m.loaded, m.users = parseModules(text)
	case errors.Is(err, fs.ErrNotExist) && f.exists("proc/sys/kernel"):
		m.none = true
	}
	if disabled, err := f.read("proc/sys/kernel/modules_disabled"); err == nil && disabled == "1" {
		m.disabled = true
	}
	release := f.release()
	if release == "" {
		return m
	}
	for _, dir := range []string{"lib/modules/", "usr/lib/modules/"} {
		if text, err := f.read(dir + release + "/modules.dep"); err == nil && m.loadable == nil {
			m.loadable = parseModuleFiles(text)
		}
		if text, err := f.read(dir + release + "/modules.builtin"); err == nil && m.builtin == nil {
			m.builtin = parseModuleFiles(text)
		}
	}
	return m
}

// parseModules reads /proc/modules: name, size, references, users or "-", state.
func parseModules(text string) (loaded map[string]bool, users map[string][]string) {
	loaded, users = map[string]bool{}, map[string][]string{}
	for line := range strings.Lines(text) {
		fields := strings.Fields(line)
		if len(fields) == 0 {
			continue
		}
		// "Loading" and "Unloading" are not there yet, or any more.
		if len(fields) >= 5 && fields[4] != "Live" {
			continue
		}
		loaded[fields[0]] = true
		if len(fields) >= 4 && fields[3] != "-" {
			for _, user := range strings.Split(fields[3], ",") {
				if user != "" && user[0] != '[' {
					users[fields[0]] = append(users[fields[0]], user)
				}
			}
		}
	}
	return loaded, users
}

// parseModuleFiles reads modules.dep and modules.builtin: a module's file before the colon, if there is one.
func parseModuleFiles(text string) map[string]bool {
	found := map[string]bool{}
	for line := range strings.Lines(text) {
		file, _, _ := strings.Cut(line, ":")
		name, _, is := strings.Cut(path.Base(strings.TrimSpace(file)), ".ko")
		if is && name != "" {
			found[strings.ReplaceAll(name, "-", "_")] = true
		}
	}
	return found
}

// presence says whether the kernel has a feature.
type presence int

const (
	unknown  presence = iota
	never             // it was not built, and this kernel loads no modules
	absent            // it was not built, or its module is not installed
	barred            // its module is there, but none may be loaded any more
	loadable          // the kernel or modprobe loads it when it is needed
	present           // loaded or built in
)

// have looks for a module and the symbol of the configuration that makes it.
func (f *facts) have(module, symbol string) presence {
	p := f.look(module, symbol)
	if p == loadable && !slices.Contains(f.loadable, module) {
		f.loadable = append(f.loadable, module)
	}
	return p
}

func (f *facts) look(module, symbol string) presence {
	m := f.modules()
	config, _ := f.config()
	info, err := os.Stat(f.path("sys/module/" + module))
	switch {
	case m.loaded[module], m.builtin[module], err == nil && info.IsDir(), config != nil && config[symbol] == "y":
		return present
	case m.none && config != nil:
		return never
	case config != nil && symbol != "" && config[symbol] == "":
		return absent
	case m.loadable[module] && m.disabled:
		return barred
	case m.loadable[module]:
		return loadable
	case m.loadable != nil && (m.builtin != nil || config != nil):
		return absent
	}
	return unknown
}

// line says what presence means for something: without what is needed it fails, without the rest it warns.
func (p presence) line(what, module string, needed bool) Line {
	bad := warn
	if needed {
		bad = fail
	}
	switch p {
	case present:
		return ok("%s: loaded or built in", what)
	case loadable:
		return ok("%s: not loaded yet; it can be (modprobe %s)", what, module)
	case barred:
		return bad("reboot, and load it before kernel.modules_disabled is set: echo "+module+" > /etc/modules-load.d/ravel.conf",
			"%s: not loaded, and kernel.modules_disabled=1 forbids it", what)
	case never:
		return bad("boot a kernel that has "+module, "%s: this kernel does not have it, and loads no modules", what)
	case absent:
		return bad(installModules(module), "%s: this kernel does not have it", what)
	}
	return warn("modprobe "+module, "%s: cannot tell whether this kernel has it (neither its configuration nor its list of modules can be read)", what)
}

// installModules names the package that holds the modules which cloud kernels leave out.
func installModules(module string) string {
	return "apt-get install linux-modules-extra-$(uname -r) || dnf install kernel-modules-extra; modprobe " + module +
		"; failing that, boot a kernel that has it"
}
