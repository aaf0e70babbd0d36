package cluster

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"fmt"
	"math/big"
	"net"
	"net/netip"
	"os"
	"time"
)

// authority is the cluster's certificate authority: it signs the API server's certificate and those of its users.
type authority struct {
	key  *ecdsa.PrivateKey
	cert *x509.Certificate
}

// pair is a certificate and its key, in PEM.
type pair struct{ cert, key []byte }

// lifetime is that of all certificates. They hold from a day ago on, for clocks that differ.
const lifetime = 30 * 24 * time.Hour

func newAuthority() (*authority, pair, error) {
	template := template(pkix.Name{CommonName: "ravel-lab"})
	template.IsCA, template.BasicConstraintsValid = true, true
	template.KeyUsage = x509.KeyUsageCertSign | x509.KeyUsageDigitalSignature
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, pair{}, err
	}
	a := &authority{key: key, cert: template}
	der, p, err := a.sign(template, key)
	if err != nil {
		return nil, pair{}, err
	}
	a.cert, err = x509.ParseCertificate(der)
	return a, p, err
}

// server makes the API server's certificate: for addresses, and for the names that pods know it by.
func (a *authority) server(addrs ...netip.Addr) (pair, error) {
	t := template(pkix.Name{CommonName: "kube-apiserver"})
	t.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}
	t.DNSNames = []string{"localhost", "kubernetes", "kubernetes.default", "kubernetes.default.svc"}
	for _, addr := range addrs {
		t.IPAddresses = append(t.IPAddresses, net.IP(addr.AsSlice()))
	}
	return a.issue(t)
}

// user makes the certificate of a user, who is of groups.
func (a *authority) user(name string, groups ...string) (pair, error) {
	t := template(pkix.Name{CommonName: name, Organization: groups})
	t.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}
	return a.issue(t)
}

func template(name pkix.Name) *x509.Certificate {
	now := time.Now()
	return &x509.Certificate{
		Subject:   name,
		NotBefore: now.Add(-24 * time.Hour),
		NotAfter:  now.Add(lifetime),
		KeyUsage:  x509.KeyUsageDigitalSignature,
	}
}

func (a *authority) issue(template *x509.Certificate) (pair, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return pair{}, err
	}
	_, p, err := a.sign(template, key)
	return p, err
}

func (a *authority) sign(template *x509.Certificate, key *ecdsa.PrivateKey) (der []byte, p pair, err error) {
	if template.SerialNumber, err = rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 120)); err != nil {
		return nil, pair{}, err
	}
	if der, err = x509.CreateCertificate(rand.Reader, template, a.cert, &key.PublicKey, a.key); err != nil {
		return nil, pair{}, err
	}
	private, err := x509.MarshalECPrivateKey(key)
	if err != nil {
		return nil, pair{}, err
	}
	return der, pair{
		cert: pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}),
		key:  pem.EncodeToMemory(&pem.Block{Type: "EC PRIVATE KEY", Bytes: private}),
	}, nil
}

// certify makes what the API server and its first client need.
func (c *Cluster) certify() error {
	a, ca, err := newAuthority()
	if err != nil {
		return fmt.Errorf("making a certificate authority: %w", err)
	}
	c.ca = a
	addrs := []netip.Addr{c.opts.Addr, netip.AddrFrom4([4]byte{127, 0, 0, 1}), netip.IPv6Loopback()}
	for _, p := range c.opts.ServiceCIDRs {
		addrs = append(addrs, p.Masked().Addr().Next()) // Service kubernetes
	}
	server, err := a.server(addrs...)
	if err != nil {
		return fmt.Errorf("certifying the API server: %w", err)
	}
	for name, text := range map[string][]byte{
		"ca.crt": ca.cert, "ca.key": ca.key, "apiserver.crt": server.cert, "apiserver.key": server.key,
	} {
		if err := os.WriteFile(c.file(name), text, 0o600); err != nil {
			return err
		}
	}
	admin, err := a.user("admin", "system:masters")
	if err != nil {
		return fmt.Errorf("certifying the admin: %w", err)
	}
	own, err := tls.X509KeyPair(admin.cert, admin.key)
	if err != nil {
		return err
	}
	c.client = c.newClient(own)
	c.admin = c.file("admin.kubeconfig")
	return c.writeKubeconfig(c.admin, "admin", admin)
}
