package kube

import (
	"fmt"

	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"
)

// NewClient returns a client for the API server of a kubeconfig file, or, where that is empty, of the cluster whose pod this
// process is. It asks nothing yet.
func NewClient(kubeconfig, version string) (kubernetes.Interface, error) {
	c, err := clientConfig(kubeconfig)
	if err != nil {
		return nil, err
	}
	c.UserAgent = "ravel/" + version
	// Four watches and a few events: what is more is a fault of ours, which the API server is to be spared.
	c.QPS, c.Burst = 20, 40
	c.ContentType = runtime.ContentTypeProtobuf
	c.AcceptContentTypes = runtime.ContentTypeProtobuf + "," + runtime.ContentTypeJSON
	c.WarningHandler = rest.NoWarnings{}
	client, err := kubernetes.NewForConfig(c)
	if err != nil {
		return nil, fmt.Errorf("making a client of %s: %w", c.Host, err)
	}
	return client, nil
}

func clientConfig(kubeconfig string) (*rest.Config, error) {
	if kubeconfig == "" {
		c, err := rest.InClusterConfig()
		if err != nil {
			return nil, fmt.Errorf("no kubeconfig is given, and as a pod: %w", err)
		}
		return c, nil
	}
	c, err := clientcmd.BuildConfigFromFlags("", kubeconfig)
	if err != nil {
		return nil, fmt.Errorf("reading kubeconfig %s: %w", kubeconfig, err)
	}
	return c, nil
}
