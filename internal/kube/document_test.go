package kube

import (
	"fmt"
	"path/filepath"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"

	"github.com/ravel-lb/ravel/internal/desired"
)

// broken are ways in which the ConfigMap is not what it should be, each with the place that is to be named.
var broken = []struct {
	name  string
	data  map[string]string
	bytes map[string][]byte
	where string
	what  string
}{
	{name: "no keys", where: "key cluster.json", what: "is not in the ConfigMap"},
	{name: "another key", data: map[string]string{"cluster.yaml": doc1}, where: "key cluster.json", what: "is not in the ConfigMap"},
	{name: "bytes", bytes: map[string][]byte{"cluster.json": {0xff}}, where: "key cluster.json", what: "binaryData"},
	{name: "empty", data: map[string]string{"cluster.json": ""}, where: "key cluster.json: cluster", what: "is empty"},
	{name: "white space", data: map[string]string{"cluster.json": " \n"}, where: "key cluster.json: cluster", what: "is empty"},
	{name: "null", data: map[string]string{"cluster.json": "null"}, where: "key cluster.json: cluster", what: "is nothing"},
	{name: "a list", data: map[string]string{"cluster.json": "[]"}, where: "key cluster.json: cluster", what: "want a mapping"},
	{name: "cut off", data: map[string]string{"cluster.json": doc1[:len(doc1)-20]}, where: "key cluster.json: cluster", what: "syntax error"},
	{name: "no config", data: map[string]string{"cluster.json": "{}"}, where: "key cluster.json: cluster", what: "config and config6 are missing"},
	{name: "a VIP that is none", data: map[string]string{"cluster.json": strings.Replace(doc1, "192.0.2.20", "192.0.2.300", 1)},
		where: `key cluster.json: cluster.config["192.0.2.300"]`, what: "192.0.2.300"},
	{name: "a port that is none", data: map[string]string{"cluster.json": strings.Replace(doc1, `"80"`, `"http"`, 1)},
		where: `key cluster.json: cluster.config["192.0.2.20"].http`, what: "port"},
	{name: "a service of nothing", data: map[string]string{"cluster.json": `{"config": {"192.0.2.20": {"80": null}}}`},
		where: `key cluster.json: cluster.config["192.0.2.20"]["80"]`, what: "is nothing"},
}

// Whatever is wrong with the ConfigMap, the last good document stays, the place is told, in the value and by an Event, and
// all is well when it is good again.
func TestBrokenDocument(t *testing.T) {
	api := newAPIServer(t, webMap, nodeOf("n1", "10.0.0.1"), serviceOf("shop", "web"), sliceOf("shop", "web", "s", "10.1.0.1@n1"))
	s := source(t, Options{Client: api.client(t), Events: true}, brisk)
	first := waitFor(t, s, "the first", has("10.1.0.1:8080@n1 ready"))
	check := func(name, where, what string) {
		t.Helper()
		told := func(v Value) bool {
			return strings.Contains(text(v), "problem configmap lb/ravel") && strings.Contains(text(v), where) && strings.Contains(text(v), what)
		}
		v := waitFor(t, s, name+": the fault is told", told)
		if len(v.Cluster.Services) != 1 || &v.Cluster.Services[0] != &first.Cluster.Services[0] || v.Document != doc1 {
			t.Errorf("%s: the document in force is %q", name, v.Document)
		}
		if !strings.Contains(text(v), "the last good one stays in force") {
			t.Errorf("%s: it is not told what is in force:\n%s", name, text(v))
		}
		until(t, name+": an Event names the place", func() bool {
			api.mu.Lock()
			defer api.mu.Unlock()
			for _, e := range api.posted {
				if strings.Contains(e.Message, where) && strings.Contains(e.Message, what) && e.InvolvedObject.Name == "ravel" && e.InvolvedObject.UID == "u1" {
					return true
				}
			}
			return false
		})
		// What changes beside the document comes all the same.
		at := fmt.Sprintf("10.1.%d.1", len(name))
		api.set(sliceOf("shop", "web", "s", at+"@n1"))
		waitFor(t, s, name+": endpoints", has(at))
	}
	for _, b := range broken {
		c := configMapOf(b.data)
		c.BinaryData = b.bytes
		api.set(c)
		check(b.name, b.where, b.what)
		api.set(webMap)
		waitFor(t, s, b.name+": good again", func(v Value) bool { return len(v.Problems) == 0 })
	}
	api.remove(webMap)
	check("deleted", "configmap lb/ravel", "is not there")
	api.set(webMap)
	waitFor(t, s, "there again", func(v Value) bool { return len(v.Problems) == 0 })

	// A document that takes all away is a good one.
	empty := `{"config":{},"config6":{}}`
	api.set(configMapOf(map[string]string{"cluster.json": empty}))
	waitFor(t, s, "nothing is wanted", func(v Value) bool {
		return v.Document == empty && len(v.Cluster.Services)+len(v.Cluster.Endpoints)+len(v.Problems) == 0
	})
}

// The fleet document is a key of its own: each stays in force for itself, and without one of them there is no value.
func TestFleetDocument(t *testing.T) {
	both := func(cluster, fleet string) *corev1.ConfigMap {
		return configMapOf(map[string]string{"cluster.json": cluster, "fleet.yaml": fleet})
	}
	api := newAPIServer(t, webMap, nodeOf("n1", "10.0.0.1"), serviceOf("shop", "web"), sliceOf("shop", "web", "s", "10.1.0.1@n1"))
	s := source(t, Options{Client: api.client(t), FleetKey: "fleet.yaml"}, brisk)
	until(t, "the missing key is told", func() bool {
		p := s.Status().Problems
		return len(p) == 1 && p[0].String() == "configmap lb/ravel key fleet.yaml: is not in the ConfigMap: there was no good one before (put the document under that key, or correct --config-key and --fleet-key)"
	})
	if _, known := s.Latest(); known {
		t.Error("there is a value without a fleet document")
	}
	api.set(both(doc1, "asn: 65100\n"))
	v := waitFor(t, s, "the fleet", func(v Value) bool { return v.Fleet != nil && v.Fleet.ASN == 65100 })
	api.set(both("{", "asn: 65101\n"))
	v = waitFor(t, s, "another fleet, beside a broken cluster document", func(v Value) bool { return v.Fleet.ASN == 65101 && len(v.Problems) > 0 })
	if v.Document != doc1 {
		t.Errorf("the document in force is %q", v.Document)
	}
	fleet := v.Fleet
	api.set(both(doc1, "asn: nobody\n"))
	v = waitFor(t, s, "a broken fleet document", has("problem configmap lb/ravel key fleet.yaml: fleet.asn: "))
	if v.Fleet != fleet {
		t.Error("the fleet has moved in memory")
	}
}

// Documents in YAML are as good, and warnings of good ones are told.
func TestYAMLAndWarnings(t *testing.T) {
	v := valueOf(t, Options{}, nodeOf("n1", "10.0.0.1"), serviceOf("shop", "web"), sliceOf("shop", "web", "s", "10.1.0.1@n1"), configMapOf(map[string]string{
		"cluster.json": "config:\n  192.0.2.20:\n    80: {namespace: shop, service: web, portName: http, tcpEnabled: true, color: blue}\n",
	}))
	if len(v.Cluster.Services) != 1 || len(v.Cluster.Endpoints) != 1 || len(v.Warnings) != 1 || !strings.Contains(v.Warnings[0].Where, "color") {
		t.Errorf("%s\nwarnings %v", text(v), v.Warnings)
	}
}

// The default service of the pool is followed like one that the document names.
func TestDefaultService(t *testing.T) {
	v := valueOf(t, Options{Default: &desired.DefaultService{Namespace: "shop", Service: "hello", PortName: "http", Port: 70}},
		nodeOf("n1", "10.0.0.1"), serviceOf("shop", "hello"), sliceOf("shop", "hello", "s", "10.1.0.1@n1"), configMapOf(map[string]string{
			"cluster.json": `{"vipPool": ["192.0.2.20"], "config": {}}`,
		}))
	if !strings.Contains(text(v), "endpoint shop/hello:http tcp 10.1.0.1:8080@n1 ready\n") {
		t.Error(text(v))
	}
}

// Of a document that stays broken, one Event is posted, whoever sees it, and another one after an hour.
func TestEvents(t *testing.T) {
	api := newAPIServer(t, configMapOf(map[string]string{"cluster.json": "{"}))
	for range 3 {
		s := source(t, Options{Client: api.client(t), Events: true}, brisk)
		until(t, "everything is told", func() bool { return s.Status().Synced })
	}
	until(t, "three posts", func() bool {
		api.mu.Lock()
		defer api.mu.Unlock()
		return api.requests["create events"] == 3
	})
	api.mu.Lock()
	if len(api.posted) != 1 {
		t.Errorf("%d Events of one fault", len(api.posted))
	}
	api.mu.Unlock()

	p := newPoster(Options{Namespace: "lb", Name: "ravel"}, nil)
	now := time.Now()
	p.now = func() time.Time { return now }
	faults := newBare(Options{}).builder.cluster
	faults.look(content{there: true, has: true, text: "{"})
	one := p.event(faults.faults, "u")
	now = now.Add(time.Hour)
	if other := p.event(faults.faults, "u"); one.Name == other.Name {
		t.Errorf("the Event of an hour later is %s too", one.Name)
	}
	for range 200 {
		faults.faults = append(faults.faults, faults.faults[0])
		faults.faults[0].What = strings.Repeat("ü", 600)
	}
	if e := p.event(faults.faults, "u"); len(e.Message) > 1024 {
		t.Errorf("a message of %d bytes", len(e.Message))
	}
}

// The file holds what a start needs, and no start takes what is too old, from the future, another's or broken.
func TestCacheFile(t *testing.T) {
	path := filepath.Join(t.TempDir(), "deep", "cache.json")
	options := Options{Cache: path, StartWait: 50 * time.Millisecond, FleetKey: "fleet.yaml"}
	config := configMapOf(map[string]string{"cluster.json": doc1, "fleet.yaml": "asn: 65100\n"})
	api := newAPIServer(t, config, nodeOf("n1", "10.0.0.1"), change(nodeOf("n2", "10.0.0.2", "fd00::2"), func(n *corev1.Node) {
		n.Spec.Unschedulable, n.Labels = true, map[string]string{"a": "b"}
	}), serviceOf("shop", "web"), sliceOf("shop", "web", "s", "10.1.0.1@n1", "10.1.0.2@n2 going", "10.1.0.3@n1 unready"))
	options.Client = api.client(t)
	var live Value
	t.Run("a life", func(t *testing.T) {
		s := source(t, options, brisk)
		waitFor(t, s, "the first", has("10.1.0.1"))
		api.set(sliceOf("shop", "web", "s", "10.1.0.4@n1", "10.1.0.2@n2 going", "10.1.0.3@n1 unready"))
		live = waitFor(t, s, "another", has("10.1.0.4"))
	}) // its end writes the file

	t.Run("the API server is away", func(t *testing.T) {
		api.behave(closes)
		s := source(t, options, brisk)
		v := waitFor(t, s, "the file's", func(Value) bool { return true })
		if text(v) != text(live) || !v.Cached || v.Fleet == nil || v.Fleet.ASN != 65100 || v.Revision != live.Revision || time.Since(v.Stamp) > time.Minute ||
			v.Stamp.Before(live.Stamp) || v.Cluster.Nodes[1].Labels["a"] != "b" {
			t.Errorf("cached %v, revision %d of %s:\n%swas of %s\n%s", v.Cached, v.Revision, v.Stamp, text(v), live.Stamp, text(live))
		}
		status := s.Status()
		if !status.Cached || status.Age <= 0 || !strings.Contains(fmt.Sprint(status.Problems), "the inputs are those of an earlier process") {
			t.Errorf("status %+v", status)
		}
		api.set(sliceOf("shop", "web", "s", "10.1.0.5@n1"))
		api.behave(good)
		v = waitFor(t, s, "what is so now", has("10.1.0.5"))
		if v.Cached {
			t.Error("what the API server said is taken for the file's")
		}
	})

	t.Run("the document is broken at the start", func(t *testing.T) {
		api.set(configMapOf(map[string]string{"cluster.json": "{"}))
		s := source(t, options, brisk)
		v := waitFor(t, s, "the last good document", has("10.1.0.5"))
		if v.Cached || v.Document != doc1 || v.Fleet.ASN != 65100 || !has("problem configmap lb/ravel key cluster.json: cluster: syntax error")(v) {
			t.Errorf("cached %v, document %q\n%s", v.Cached, v.Document, text(v))
		}
		api.set(config)
		waitFor(t, s, "good again", func(v Value) bool { return len(v.Problems) == 0 })
	})

	api.behave(closes)
	for _, test := range []struct {
		name   string
		change func(*Options)
		at     time.Duration
		want   string
	}{
		{"fresh", func(*Options) {}, time.Hour, ""},
		{"too old", func(*Options) {}, 25 * time.Hour, "which is more than 24h0m0s"},
		{"too old by a setting", func(o *Options) { o.MaxCacheAge = time.Minute }, time.Hour, "which is more than 1m0s"},
		{"from the future", func(*Options) {}, -time.Hour, "from the future"},
		{"of another ConfigMap", func(o *Options) { o.Name = "other" }, 0, "it is of configmap lb/ravel"},
		{"of other keys", func(o *Options) { o.FleetKey = "" }, 0, "it is of configmap lb/ravel"},
	} {
		o := options
		o.Namespace, o.Name, o.Key = "lb", "ravel", "cluster.json"
		test.change(&o)
		s := New(o)
		v := s.load(time.Now().Add(test.at))
		if (v != nil) != (test.want == "") {
			t.Errorf("%s: loaded %v", test.name, v)
		}
		if test.want != "" && !strings.Contains(fmt.Sprint(s.Status().Problems), test.want) {
			t.Errorf("%s: problems %v, want %q", test.name, s.Status().Problems, test.want)
		}
	}
}

// A file that cannot be written is told, and nothing else comes of it.
func TestCacheFileFails(t *testing.T) {
	api := newAPIServer(t, webMap, nodeOf("n1", "10.0.0.1"), serviceOf("shop", "web"), sliceOf("shop", "web", "s", "10.1.0.1@n1"))
	s := source(t, Options{Client: api.client(t), Cache: "/proc/no/such/file"}, brisk)
	waitFor(t, s, "the first", has("10.1.0.1"))
	until(t, "the fault is told", func() bool { return strings.Contains(fmt.Sprint(s.Status().Problems), "keeping the inputs") })
}

// No content of the file makes a start panic, or gives a value that breaks what the fields of desired promise.
func FuzzCacheFile(f *testing.F) {
	o := Options{Namespace: "lb", Name: "ravel", Key: "cluster.json", FleetKey: "fleet.yaml"}
	b := newBare(o)
	b.fill(f, configMapOf(map[string]string{"cluster.json": doc1, "fleet.yaml": "asn: 65100\n"}), nodeOf("n1", "10.0.0.1"), serviceOf("shop", "web"),
		sliceOf("shop", "web", "s", "10.1.0.1@n1", "10.1.0.2@n1 going"))
	v, _ := b.value(f)
	good, err := encode(o, v, time.Now())
	if err != nil {
		f.Fatal(err)
	}
	if _, err := decode(o, good); err != nil {
		f.Fatal(err)
	}
	for _, seed := range []string{string(good), "", "null", "{}", "[]", `{"version":1}`, string(good[:len(good)/2]), string(good) + "x",
		strings.Replace(string(good), "10.0.0.1", "", 1), strings.Replace(string(good), `"n1"`, `""`, 1), strings.Replace(string(good), "10.1.0.1:8080", "", 1),
		strings.Replace(string(good), "10.1.0.1:8080", "10.1.0.1:0", 1), strings.Replace(string(good), `"ready":true`, `"ready":7`, 1)} {
		f.Add([]byte(seed))
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		v, err := decode(o, b)
		if err != nil {
			return
		}
		names := map[string]bool{}
		for _, n := range v.Cluster.Nodes {
			if n.Name == "" || names[n.Name] {
				t.Errorf("%q: node %q", b, n.Name)
			}
			names[n.Name] = true
			for _, a := range n.Addrs {
				if !usable(a) {
					t.Errorf("%q: address %s", b, a)
				}
			}
		}
		for _, e := range v.Cluster.Endpoints {
			if !usable(e.Addr) || e.Port == 0 || e.Node == "" || e.Ready && e.Terminating {
				t.Errorf("%q: endpoint %+v", b, e)
			}
		}
		if !v.Cached || v.Fleet == nil {
			t.Errorf("%q: cached %v, fleet %v", b, v.Cached, v.Fleet)
		}
		// What was read is written and read as the same.
		again, err := encode(o, *v, v.Stamp)
		if err != nil {
			return // a year that JSON does not have
		}
		if second, err := decode(o, again); err != nil || text(*second) != text(*v) {
			t.Errorf("%q: read again %v", b, err)
		}
	})
}
