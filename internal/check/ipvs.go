package check

import (
	"bufio"
	"fmt"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
)

// ipvsThere reports whether ip_vs is loaded, which is when it may be asked without loading it.
func (f *facts) ipvsThere() bool { return f.exists(f.net() + "/ip_vs") }

func checkIPVS(f *facts) []Line {
	if f.ipvsThere() {
		return []Line{ok("ip_vs: loaded")}
	}
	p := f.have("ip_vs", "IP_VS")
	if p == present {
		// In a namespace that the module does not serve, or under a /proc that hides it.
		return []Line{warn("modprobe ip_vs; ls /proc/net/ip_vs", "ip_vs is loaded or built in, but /proc/net/ip_vs is not there")}
	}
	return []Line{p.line("ip_vs", "ip_vs", true)}
}

func checkIPVSv6(f *facts) []Line {
	const fix = "boot a kernel with CONFIG_IP_VS_IPV6"
	_, v6 := split(f.VIPs)
	config, where := f.config()
	switch {
	case config["IP_VS_IPV6"] == "y":
		return []Line{ok("IPVS does IPv6 (%s)", where)}
	case config != nil && config["IP_VS"] == "":
		return nil // that there is no IPVS at all is another line
	case config != nil && len(v6) > 0:
		return []Line{fail(fix, "IPVS was built without IPv6 (%s), and %s wants it", where, some(v6))}
	case config != nil:
		return []Line{warn(fix, "IPVS was built without IPv6 (%s)", where)}
	case slices.Contains(f.modules().users["nf_defrag_ipv6"], "ip_vs"):
		return []Line{ok("IPVS does IPv6 (ip_vs uses nf_defrag_ipv6)")}
	case len(f.VIPs) > 0 && len(v6) == 0:
		return []Line{ok("not known, and no VIP needs it")}
	}
	return []Line{warn("modprobe configs && zgrep CONFIG_IP_VS_IPV6 /proc/config.gz", "cannot tell whether IPVS does IPv6: the kernel's configuration cannot be read")}
}

func checkMH(f *facts) []Line {
	return []Line{f.have("ip_vs_mh", "IP_VS_MH").line("scheduler mh (Maglev)", "ip_vs_mh", true)}
}

// primes are the sizes of the Maglev table by CONFIG_IP_VS_MH_TAB_INDEX (net/netfilter/ipvs/ip_vs_mh.c).
var primes = map[int]int{
	8: 251, 9: 509, 10: 1021, 11: 2039, 12: 4093, 13: 8191, 14: 16381, 15: 32749, 16: 65521, 17: 131071,
}

const usualIndex = 12

func checkMHTable(f *facts) []Line {
	config, where := f.config()
	if config == nil {
		return []Line{warn("modprobe configs && zgrep CONFIG_IP_VS_MH_TAB_INDEX /proc/config.gz",
			"cannot tell the size of the Maglev table: the kernel's configuration cannot be read; all directors need the same")}
	}
	text, set := config["IP_VS_MH_TAB_INDEX"]
	if !set {
		if config["IP_VS_MH"] == "" {
			return nil // that there is no scheduler is another line
		}
		return []Line{warn("boot the same kernel on all directors", "%s does not name the size of the Maglev table; all directors need the same", where)}
	}
	index, err := strconv.Atoi(text)
	size := primes[index]
	switch {
	case err != nil, size == 0:
		return []Line{warn("boot the same kernel on all directors", "CONFIG_IP_VS_MH_TAB_INDEX is %q in %s, which no kernel knows", short(text), where)}
	case index != usualIndex:
		return []Line{warn("boot kernels with CONFIG_IP_VS_MH_TAB_INDEX="+text+" on all directors",
			"the Maglev table has %d slots, not the usual %d: directors with another size pick other real servers", size, primes[usualIndex])}
	}
	return []Line{ok("%d slots (%s)", size, where)}
}

// The kernel's own value of conn_tab_bits, and the one to have.
const (
	defaultTabBits = 12
	goodTabBits    = 20
)

func checkConnTabBits(f *facts) []Line {
	fix := fmt.Sprintf("echo 'options ip_vs conn_tab_bits=%d' > /etc/modprobe.d/ravel.conf, then reboot", goodTabBits)
	judge := func(bits int, where string) []Line {
		if bits <= defaultTabBits {
			return []Line{warn(fix, "%d (%s): %d buckets for all connections, long chains with more than some 10,000", bits, where, 1<<max(bits, 0))}
		}
		return []Line{ok("%d (%s)", bits, where)}
	}
	if f.exists("proc/sys/net/ipv4/vs/conn_lfactor") {
		return []Line{ok("this kernel sizes its table by itself")}
	}
	const parameter = "sys/module/ip_vs/parameters/conn_tab_bits"
	bits, err := f.number(parameter)
	switch {
	case err == nil:
		return judge(bits, "as loaded")
	case !missing(err):
		return []Line{warn(fix, "cannot be read: %v", err)}
	}
	if bits, where := f.optionTabBits(); where != "" {
		return judge(bits, where)
	}
	if f.ipvsThere() {
		return []Line{warn(fix, "cannot be read: there is no /%s", parameter)}
	}
	return judge(defaultTabBits, "the kernel's default, as nothing sets it")
}

// optionTabBits looks for what ip_vs would be loaded with: modprobe's options, or the kernel's command line.
func (f *facts) optionTabBits() (bits int, where string) {
	if text, err := f.read("proc/cmdline"); err == nil {
		for _, argument := range strings.Fields(text) {
			if value, found := strings.CutPrefix(argument, "ip_vs.conn_tab_bits="); found {
				if n, err := strconv.Atoi(value); err == nil {
					return n, "/proc/cmdline"
				}
			}
		}
	}
	// modprobe takes the first of several files of one name, in this order; the last of several options wins.
	seen := map[string]bool{}
	for _, dir := range []string{"etc", "run", "usr/local/lib", "usr/lib", "lib"} {
		files, err := filepath.Glob(filepath.Join(f.path(dir), "modprobe.d", "*.conf"))
		if err != nil {
			continue
		}
		for _, file := range files {
			base := filepath.Base(file)
			if seen[base] {
				continue
			}
			seen[base] = true
			text, err := f.read(dir + "/modprobe.d/" + base)
			if err != nil {
				continue
			}
			if n, found := parseTabBits(text); found && where == "" {
				bits, where = n, "/"+dir+"/modprobe.d/"+base
			}
		}
	}
	return bits, where
}

// parseTabBits finds "options ip_vs … conn_tab_bits=N" in a file of modprobe's.
func parseTabBits(text string) (bits int, found bool) {
	scanner := bufio.NewScanner(strings.NewReader(text))
	for scanner.Scan() {
		fields := strings.Fields(scanner.Text())
		if len(fields) < 3 || fields[0] != "options" || strings.ReplaceAll(fields[1], "-", "_") != "ip_vs" {
			continue
		}
		for _, field := range fields[2:] {
			if value, is := strings.CutPrefix(field, "conn_tab_bits="); is {
				if n, err := strconv.Atoi(value); err == nil {
					bits, found = n, true
				}
			}
		}
	}
	return bits, found
}

// ipvsSettings are what a director sets at its start.
var ipvsSettings = []struct{ name, value string }{
	{"sloppy_tcp", "1"},
	{"sloppy_sctp", "1"},
	{"schedule_icmp", "1"},
	{"conntrack", "0"},
	{"expire_nodest_conn", "0"},
	{"expire_quiescent_template", "0"},
	{"conn_reuse_mode", "1"},
	{"drop_entry", "1"},
	{"run_estimation", "0"},
	{"pmtu_disc", "1"},
	{"ignore_tunneled", "0"},
}

func checkIPVSSysctls(f *facts) []Line {
	const dir = "proc/sys/net/ipv4/vs/"
	if !f.exists("proc/sys/net") {
		return []Line{warn("mount -t proc proc /proc", "there is no /proc/sys/net")}
	}
	if !f.exists(dir) {
		if f.ipvsThere() {
			return []Line{fail("run it in a namespace whose /proc/sys/net is its own", "ip_vs is loaded, but /%s is not there", dir)}
		}
		return []Line{ok("there once ip_vs is loaded; ravel director sets them")}
	}
	var lines []Line
	var absent, wrong []string
	good := 0
	for _, s := range ipvsSettings {
		value, err := f.read(dir + s.name)
		dotted := "net.ipv4.vs." + s.name
		switch {
		case missing(err):
			absent = append(absent, s.name)
			continue
		case err != nil:
			lines = append(lines, warn("sysctl "+dotted, "cannot be read: %v", err))
			continue
		}
		if value == s.value {
			good++
			continue
		}
		if err := f.kernel.writable(f.path(dir + s.name)); err != nil {
			lines = append(lines, fail("sysctl -w "+dotted+"="+s.value, "%s is %s and cannot be set to %s: %v", s.name, short(value), s.value, err))
			continue
		}
		wrong = append(wrong, fmt.Sprintf("%s from %s to %s", s.name, short(value), s.value))
	}
	if len(absent) > 0 {
		lines = append(lines, warn("boot a newer kernel", "this kernel does not have %s", strings.Join(absent, ", ")))
	}
	if len(lines) > 0 {
		return lines
	}
	if len(wrong) > 0 {
		return []Line{ok("%d as they should be; ravel director sets %s", good, strings.Join(wrong, ", "))}
	}
	return []Line{ok("%d as they should be", good)}
}
