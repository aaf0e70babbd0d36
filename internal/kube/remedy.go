package kube

import (
	"crypto/x509"
	"errors"
	"net"
	"os"
	"syscall"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
)

// remedy is what an operator can do about an error of the API server, or of the way there. server is its address, as
// the kubeconfig has it.
func remedy(err error, server string) string {
	var authority x509.UnknownAuthorityError
	var certificate x509.CertificateInvalidError
	var name x509.HostnameError
	var lookup *net.DNSError
	switch {
	case apierrors.IsForbidden(err):
		return "give this account list and watch of it: the ClusterRole and Role of deploy/kustomize/base or deploy/systemd/rbac.yaml"
	case apierrors.IsUnauthorized(err):
		return "put a token or certificate that holds into the kubeconfig for " + server + " (a pod's comes with its ServiceAccount)"
	case errors.As(err, &authority):
		return "put the certificate authority of " + server + " into the kubeconfig (certificate-authority-data)"
	case errors.As(err, &certificate) && certificate.Reason == x509.Expired:
		return "set this host's clock (timedatectl), or renew the certificate of " + server
	case errors.As(err, &name):
		return "call the API server in the kubeconfig by a name of its certificate, instead of " + server
	case errors.As(err, &lookup):
		return "have this host resolve that name, or write an address into the kubeconfig instead of " + server
	case errors.Is(err, syscall.ECONNREFUSED):
		return "start the API server at " + server + ", or correct server: in the kubeconfig"
	case errors.Is(err, syscall.ENETUNREACH), errors.Is(err, syscall.EHOSTUNREACH):
		return "give this host a route to " + server + " (ip route get ADDRESS), or correct server: in the kubeconfig"
	case errors.Is(err, errSilent), errors.Is(err, os.ErrDeadlineExceeded):
		return "let TCP to " + server + " through, or correct server: in the kubeconfig"
	}
	return "see that " + server + " answers: kubectl --kubeconfig FILE get --raw /readyz"
}
