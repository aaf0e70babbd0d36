package cluster

import (
	"bufio"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// fake makes a program in the place of the real one.
func fake(t *testing.T, script string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "kube")
	if err := os.WriteFile(path, []byte("#!/bin/bash\n"+script), 0o755); err != nil {
		t.Fatal(err)
	}
	return path
}

// gone waits until a process is gone, or dead and nobody's to bury.
func gone(t *testing.T, pid string) {
	t.Helper()
	eventually(t, "process "+pid+" ends", 10*time.Second, func() error {
		stat, err := os.ReadFile("/proc/" + pid + "/stat")
		if err != nil || strings.Contains(string(stat), ") Z ") {
			return nil
		}
		return fmt.Errorf("it runs: %s", stat)
	})
}

// eventually polls until fn has no error.
func eventually(t *testing.T, what string, deadline time.Duration, fn func() error) time.Duration {
	t.Helper()
	began := time.Now()
	for {
		err := fn()
		took := time.Since(began)
		if err == nil {
			return took
		}
		if took > deadline {
			t.Fatalf("%s: not within %v: %v", what, deadline, err)
		}
		time.Sleep(10 * time.Millisecond)
	}
}

func TestAStartThatFailsSaysWhy(t *testing.T) {
	binary := fake(t, `[ "$1" != apiserver ] && exec sleep 1000; echo "unknown flag: --nonsense"; exit 3`)
	dir := t.TempDir()
	_, err := Start(t.Context(), dir, Options{Binary: binary})
	if err == nil {
		t.Fatal("a cluster without an API server started")
	}
	for _, want := range []string{"apiserver ended by itself: exit status 3", "unknown flag: --nonsense"} {
		if !strings.Contains(err.Error(), want) {
			t.Errorf("the error does not say %q: %v", want, err)
		}
	}
	if _, err := Start(t.Context(), dir, Options{Binary: binary}); err == nil || !strings.Contains(err.Error(), "empty directory") {
		t.Errorf("a second cluster in the same directory: %v", err)
	}
	if _, err := Start(t.Context(), t.TempDir(), Options{Binary: "/nonexistent"}); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("without the program: %v", err)
	}
}

// What a program of the cluster starts ends with it, also when the start takes too long.
func TestNothingIsLeftBehind(t *testing.T) {
	binary := fake(t, `sleep 1000 & echo $! >"$PWD/child-of-$1"; trap '' TERM HUP INT; while :; do wait; done`)
	dir := t.TempDir()
	_, err := Start(t.Context(), dir, Options{Binary: binary, Deadline: time.Second})
	if !errors.Is(err, context.DeadlineExceeded) {
		t.Fatalf("error is %v, want a deadline", err)
	}
	for _, name := range []string{"etcd", "apiserver"} {
		pid, err := os.ReadFile(filepath.Join(dir, "child-of-"+name))
		if err != nil {
			t.Fatal(err)
		}
		gone(t, strings.TrimSpace(string(pid)))
	}
}

// The end of this process is the end of the cluster, even when nobody calls Stop.
func TestTheClusterEndsWithThisProcess(t *testing.T) {
	const variable = "RAVEL_TEST_CLUSTER_STARTS"
	if binary := os.Getenv(variable); binary != "" {
		_, err := Start(t.Context(), t.TempDir(), Options{Binary: binary})
		t.Fatal("Start returned:", err)
	}
	cmd := exec.Command(os.Args[0], "-test.run=^TestTheClusterEndsWithThisProcess$")
	pids := filepath.Join(t.TempDir(), "pids")
	cmd.Env = append(os.Environ(), variable+"="+fake(t, `echo $$ >>`+pids+`; exec sleep 1000`))
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	var started []string
	eventually(t, "two programs start", 20*time.Second, func() error {
		text, err := os.ReadFile(pids)
		if started = strings.Fields(string(text)); err == nil && len(started) < 2 {
			err = fmt.Errorf("%d did", len(started))
		}
		return err
	})
	if err := cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	_ = cmd.Wait()
	for _, pid := range started {
		gone(t, pid)
	}
}

// certified returns a cluster of which nothing runs.
func certified(t *testing.T, opts Options) *Cluster {
	t.Helper()
	if err := opts.complete(); err != nil {
		t.Fatal(err)
	}
	c := &Cluster{dir: t.TempDir(), opts: opts}
	if err := c.certify(); err != nil {
		t.Fatal(err)
	}
	return c
}

func readCert(t *testing.T, text []byte) *x509.Certificate {
	t.Helper()
	block, _ := pem.Decode(text)
	if block == nil {
		t.Fatalf("no PEM: %q", text)
	}
	cert, err := x509.ParseCertificate(block.Bytes)
	if err != nil {
		t.Fatal(err)
	}
	return cert
}

func TestTheServerIsKnownByItsAddresses(t *testing.T) {
	c := certified(t, Options{Addr: netip.MustParseAddr("fd00:1::7")})
	text, err := os.ReadFile(c.file("apiserver.crt"))
	if err != nil {
		t.Fatal(err)
	}
	cert := readCert(t, text)
	for _, name := range []string{"fd00:1::7", "127.0.0.1", "::1", "10.96.0.1", "fd00:10:96::1", "localhost", "kubernetes.default.svc"} {
		if _, err := cert.Verify(x509.VerifyOptions{DNSName: name, Roots: c.pool()}); err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
	if _, err := cert.Verify(x509.VerifyOptions{DNSName: "10.0.0.1", Roots: c.pool()}); err == nil {
		t.Error("the certificate is for any address")
	}
	if c.URL() != fmt.Sprintf("https://[fd00:1::7]:%d", c.opts.Port) {
		t.Errorf("URL is %s", c.URL())
	}
}

// kubeconfig is what the tests read of a kubeconfig.
type kubeconfig struct {
	Clusters []struct {
		Cluster struct {
			Server string
			CA     []byte `json:"certificate-authority-data"`
		}
	}
	Users []struct {
		User struct {
			Cert []byte `json:"client-certificate-data"`
			Key  []byte `json:"client-key-data"`
		}
	}
}

func readKubeconfig(t *testing.T, path string) kubeconfig {
	t.Helper()
	text, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	var k kubeconfig
	if err := json.Unmarshal(text, &k); err != nil {
		t.Fatal(err)
	}
	if len(k.Clusters) != 1 || len(k.Users) != 1 {
		t.Fatalf("kubeconfig is %s", text)
	}
	return k
}

func TestUsersOfKubeconfigs(t *testing.T) {
	c := certified(t, Options{})
	other, err := c.NewKubeconfig("system:serviceaccount:lb:ravel", "system:serviceaccounts", "system:authenticated")
	if err != nil {
		t.Fatal(err)
	}
	for path, want := range map[string]string{
		c.Kubeconfig(): "CN=admin,O=system:masters",
		other:          "CN=system:serviceaccount:lb:ravel,O=system:authenticated+O=system:serviceaccounts",
	} {
		k := readKubeconfig(t, path)
		if _, err := tls.X509KeyPair(k.Users[0].User.Cert, k.Users[0].User.Key); err != nil {
			t.Errorf("%s: %v", path, err)
		}
		roots := x509.NewCertPool()
		roots.AppendCertsFromPEM(k.Clusters[0].Cluster.CA)
		cert := readCert(t, k.Users[0].User.Cert)
		_, err := cert.Verify(x509.VerifyOptions{Roots: roots, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}})
		if err != nil {
			t.Errorf("%s: %v", path, err)
		}
		if got := cert.Subject.String(); got != want {
			t.Errorf("%s is of %s, want %s", path, got, want)
		}
	}
}

// Call speaks as admin, to no server but the cluster's, and tells refusals apart.
func TestCall(t *testing.T) {
	c := certified(t, Options{})
	server := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		who := r.TLS.PeerCertificates[0].Subject.CommonName
		body, _ := bufio.NewReader(r.Body).ReadString('\n')
		switch r.URL.Path {
		case "/echo":
			fmt.Fprintf(w, `{"who":%q,"said":%q,"type":%q}`, who, r.Method+" "+body, r.Header.Get("Content-Type"))
		case "/taken":
			w.WriteHeader(http.StatusConflict)
			fmt.Fprint(w, `{"kind":"Status","code":409,"reason":"AlreadyExists","message":"it is there"}`)
		default:
			w.WriteHeader(http.StatusInternalServerError)
			fmt.Fprint(w, "[-]etcd failed")
		}
	}))
	own, err := tls.LoadX509KeyPair(c.file("apiserver.crt"), c.file("apiserver.key"))
	if err != nil {
		t.Fatal(err)
	}
	server.TLS = &tls.Config{Certificates: []tls.Certificate{own}, ClientCAs: c.pool(), ClientAuth: tls.RequireAndVerifyClientCert}
	server.StartTLS()
	t.Cleanup(server.Close)
	c.opts.Port = netip.MustParseAddrPort(server.Listener.Addr().String()).Port()

	var echo struct{ Who, Said, Type string }
	if err := c.Call(t.Context(), http.MethodPatch, "/echo", object{"a": 1}, &echo); err != nil {
		t.Fatal(err)
	}
	if want := (struct{ Who, Said, Type string }{"admin", `PATCH {"a":1}`, "application/merge-patch+json"}); echo != want {
		t.Errorf("the server heard %+v, want %+v", echo, want)
	}
	for path, want := range map[string]StatusError{
		"/taken":  {409, "AlreadyExists", "it is there"},
		"/readyz": {500, "", "[-]etcd failed"},
	} {
		var got *StatusError
		if err := c.Call(t.Context(), http.MethodGet, path, nil, nil); !errors.As(err, &got) || *got != want {
			t.Errorf("%s: %v, want %+v", path, err, want)
		}
	}

	stranger := certified(t, Options{Port: c.opts.Port})
	if err := stranger.Call(t.Context(), http.MethodGet, "/echo", nil, nil); err == nil {
		t.Error("a cluster took another one's server for its own")
	}
}

// A port of the range for connections would be taken by a client that tries to connect to it again and again.
func TestFreePortsAreNoConnections(t *testing.T) {
	for range 50 {
		if port, err := freePort(0); err != nil || port >= 32768 {
			t.Fatalf("port %d, %v", port, err)
		}
	}
}
