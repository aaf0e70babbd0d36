package cluster

import (
	"context"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"net"
	"net/http"
	"os"
	"strconv"
	"strings"
)

// Kubeconfig returns the file by which clients are the cluster's admin, who may do everything.
func (c *Cluster) Kubeconfig() string { return c.admin }

// NewKubeconfig writes a file by which clients are the user name, of groups, and returns its path. What they may do is
// for RBAC to say: system:serviceaccount:NAMESPACE:NAME is that service account to it.
func (c *Cluster) NewKubeconfig(name string, groups ...string) (string, error) {
	user, err := c.ca.user(name, groups...)
	if err != nil {
		return "", fmt.Errorf("certifying %s: %w", name, err)
	}
	path := c.file(strings.NewReplacer(":", "-", "/", "-").Replace(name) + ".kubeconfig")
	return path, c.writeKubeconfig(path, name, user)
}

// URL returns where the API server is, without a path.
func (c *Cluster) URL() string {
	return "https://" + net.JoinHostPort(c.opts.Addr.String(), strconv.Itoa(int(c.opts.Port)))
}

func (c *Cluster) authorityPEM() []byte {
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: c.ca.cert.Raw})
}

func (c *Cluster) pool() *x509.CertPool {
	pool := x509.NewCertPool()
	pool.AddCert(c.ca.cert)
	return pool
}

// writeKubeconfig writes JSON, which is YAML too; its byte slices are in base64, as a kubeconfig's data is.
func (c *Cluster) writeKubeconfig(path, name string, user pair) error {
	text, err := json.MarshalIndent(map[string]any{
		"apiVersion": "v1",
		"kind":       "Config",
		"clusters": []any{map[string]any{
			"name":    "lab",
			"cluster": map[string]any{"server": c.URL(), "certificate-authority-data": c.authorityPEM()},
		}},
		"users": []any{map[string]any{
			"name": name,
			"user": map[string]any{"client-certificate-data": user.cert, "client-key-data": user.key},
		}},
		"contexts": []any{map[string]any{
			"name":    "lab",
			"context": map[string]any{"cluster": "lab", "user": name},
		}},
		"current-context": "lab",
	}, "", "  ")
	if err != nil {
		return err
	}
	return os.WriteFile(path, text, 0o600)
}

// CA returns the certificate of the authority that the API server's is of, in PEM.
func (c *Cluster) CA() []byte { return c.authorityPEM() }

// Token returns a token of a service account, which must be there, for an hour.
func (c *Cluster) Token(ctx context.Context, namespace, account string) (string, error) {
	var answer struct{ Status struct{ Token string } }
	err := c.Call(ctx, http.MethodPost, "/api/v1/namespaces/"+namespace+"/serviceaccounts/"+account+"/token", object{
		"apiVersion": "authentication.k8s.io/v1", "kind": "TokenRequest", "spec": object{"expirationSeconds": 3600},
	}, &answer)
	return answer.Status.Token, err
}
