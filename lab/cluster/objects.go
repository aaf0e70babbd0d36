package cluster

import (
	"context"
	"maps"
	"net/http"
	"net/netip"
)

type object = map[string]any

// AddNode tells the cluster of a node, which is Ready and has InternalIPs.
func (c *Cluster) AddNode(ctx context.Context, name string, labels map[string]string, internal ...netip.Addr) error {
	addresses := []any{object{"type": "Hostname", "address": name}}
	for _, addr := range internal {
		addresses = append(addresses, object{"type": "InternalIP", "address": addr})
	}
	all := map[string]string{"kubernetes.io/os": "linux"}
	maps.Copy(all, labels)
	return c.Call(ctx, http.MethodPost, "/api/v1/nodes", object{
		"metadata": object{"name": name, "labels": all},
		"status":   object{"addresses": addresses, "conditions": ready(true)},
	}, nil)
}

// SetNodeReady changes a node's condition Ready.
func (c *Cluster) SetNodeReady(ctx context.Context, name string, is bool) error {
	return c.Call(ctx, http.MethodPatch, "/api/v1/nodes/"+name+"/status", object{"status": object{"conditions": ready(is)}}, nil)
}

// Pod is what there is to say of a pod that a node runs.
type Pod struct {
	Namespace, Name, Node string
	Labels                map[string]string
	Addrs                 []netip.Addr // the first is the family that counts
	HostNetwork           bool
}

// AddPod tells the cluster of a pod that runs and is Ready.
func (c *Cluster) AddPod(ctx context.Context, p Pod) error {
	pods := "/api/v1/namespaces/" + p.Namespace + "/pods"
	err := c.Call(ctx, http.MethodPost, pods, object{
		"metadata": object{"name": p.Name, "labels": p.Labels},
		"spec": object{
			"nodeName":    p.Node,
			"hostNetwork": p.HostNetwork,
			"containers":  []any{object{"name": "pod", "image": "none"}},
		},
	}, nil)
	if err != nil {
		return err
	}
	return c.RunPod(ctx, p.Namespace, p.Name, p.Addrs...)
}

// BindPod gives a pod that a controller made to a node, as a scheduler does.
func (c *Cluster) BindPod(ctx context.Context, namespace, name, node string) error {
	return c.Call(ctx, http.MethodPost, "/api/v1/namespaces/"+namespace+"/pods/"+name+"/binding", object{
		"apiVersion": "v1", "kind": "Binding", "metadata": object{"name": name}, "target": object{"kind": "Node", "name": node},
	}, nil)
}

// RunPod says of a pod that it runs, has addrs and is Ready, as its kubelet does.
func (c *Cluster) RunPod(ctx context.Context, namespace, name string, addrs ...netip.Addr) error {
	var ips []any
	for _, addr := range addrs {
		ips = append(ips, object{"ip": addr})
	}
	return c.Call(ctx, http.MethodPatch, "/api/v1/namespaces/"+namespace+"/pods/"+name+"/status", object{"status": object{
		"phase": "Running", "podIP": addrs[0], "podIPs": ips, "conditions": ready(true),
	}}, nil)
}

// SetPodReady changes a pod's condition Ready.
func (c *Cluster) SetPodReady(ctx context.Context, namespace, name string, is bool) error {
	return c.Call(ctx, http.MethodPatch, "/api/v1/namespaces/"+namespace+"/pods/"+name+"/status",
		object{"status": object{"conditions": ready(is)}}, nil)
}

// EndPod deletes a pod: gently, it is Terminating until EndPod is called for it again, at once; there is no kubelet that
// would do that.
func (c *Cluster) EndPod(ctx context.Context, namespace, name string, gently bool) error {
	path := "/api/v1/namespaces/" + namespace + "/pods/" + name
	if !gently {
		path += "?gracePeriodSeconds=0"
	}
	return c.Call(ctx, http.MethodDelete, path, nil, nil)
}

func ready(is bool) []any {
	status := "False"
	if is {
		status = "True"
	}
	return []any{object{"type": "Ready", "status": status}}
}
