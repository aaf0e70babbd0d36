package kube

import (
	"context"
	"fmt"
	"time"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/runtime/serializer"
	apiwatch "k8s.io/apimachinery/pkg/watch"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"
)

// Client asks an API server. It knows the two API groups that this package needs: client-go's own clientset knows all of
// them, which makes a program twice as large, and each process larger by 20 MB.
type Client struct {
	core, discovery *rest.RESTClient
	parameters      runtime.ParameterCodec
}

// NewClient returns a client for the API server of a kubeconfig file, or, where that is empty, of the cluster whose pod this
// process is. It asks nothing yet.
func NewClient(kubeconfig, version string) (*Client, error) {
	c, err := clientConfig(kubeconfig)
	if err != nil {
		return nil, err
	}
	c.UserAgent = "ravel/" + version
	// Four watches and a few events: what is more is a fault of ours, which the API server is to be spared.
	c.QPS, c.Burst = 20, 40
	return newClient(c)
}

func newClient(c *rest.Config) (*Client, error) {
	scheme := runtime.NewScheme()
	for _, add := range []func(*runtime.Scheme) error{corev1.AddToScheme, discoveryv1.AddToScheme} {
		if err := add(scheme); err != nil {
			return nil, fmt.Errorf("making a client: %w", err)
		}
	}
	metav1.AddToGroupVersion(scheme, schema.GroupVersion{Version: "v1"})
	c.NegotiatedSerializer = serializer.NewCodecFactory(scheme).WithoutConversion()
	c.ContentType = runtime.ContentTypeProtobuf
	c.AcceptContentTypes = runtime.ContentTypeProtobuf + "," + runtime.ContentTypeJSON
	c.WarningHandler = rest.NoWarnings{}
	transport, err := rest.HTTPClientFor(c)
	if err != nil {
		return nil, fmt.Errorf("making a client of %s: %w", c.Host, err)
	}
	group := func(root string, version schema.GroupVersion) (*rest.RESTClient, error) {
		c := rest.CopyConfig(c)
		c.APIPath, c.GroupVersion = root, &version
		client, err := rest.RESTClientForConfigAndClient(c, transport)
		if err != nil {
			return nil, fmt.Errorf("making a client of %s for %s: %w", c.Host, version, err)
		}
		return client, nil
	}
	client := &Client{parameters: runtime.NewParameterCodec(scheme)}
	if client.core, err = group("/api", corev1.SchemeGroupVersion); err == nil {
		client.discovery, err = group("/apis", discoveryv1.SchemeGroupVersion)
	}
	return client, err
}

func clientConfig(kubeconfig string) (*rest.Config, error) {
	if kubeconfig == "" {
		c, err := rest.InClusterConfig()
		if err != nil {
			return nil, fmt.Errorf("no kubeconfig is given, and this is no pod with a ServiceAccount: set --kubeconfig FILE: %w", err)
		}
		return c, nil
	}
	c, err := clientcmd.BuildConfigFromFlags("", kubeconfig)
	if err != nil {
		return nil, fmt.Errorf("reading kubeconfig %s: %w; set --kubeconfig to a file with server, authority and credentials of the cluster", kubeconfig, err)
	}
	return c, nil
}

// server is the address of the API server.
func (c *Client) server() string {
	at := c.core.Get().URL()
	return at.Scheme + "://" + at.Host
}

// get begins a request for the objects of a kind, of one namespace or, where that is empty, of all.
func (c *Client) get(kind, namespace string, o metav1.ListOptions) *rest.Request {
	client := c.core
	if kind == kindSlices {
		client = c.discovery
	}
	r := client.Get().Resource(kind).VersionedParams(&o, c.parameters)
	if namespace != "" {
		r = r.Namespace(namespace)
	}
	if o.TimeoutSeconds != nil {
		r = r.Timeout(time.Duration(*o.TimeoutSeconds) * time.Second)
	}
	return r
}

// list asks for all objects of a kind and puts them into list.
func (c *Client) list(ctx context.Context, kind, namespace string, o metav1.ListOptions, list runtime.Object) error {
	return c.get(kind, namespace, o).Do(ctx).Into(list)
}

// watch asks for all changes of objects of a kind.
func (c *Client) watch(ctx context.Context, kind, namespace string, o metav1.ListOptions) (apiwatch.Interface, error) {
	o.Watch = true
	return c.get(kind, namespace, o).Watch(ctx)
}

// post makes an Event.
func (c *Client) post(ctx context.Context, e *corev1.Event) error {
	return c.core.Post().Namespace(e.Namespace).Resource("events").Body(e).Do(ctx).Error()
}
