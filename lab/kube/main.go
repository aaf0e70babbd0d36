// Kube is the control plane of a Kubernetes cluster, and its kube-proxy, in one program, for tests.
//
//	kube etcd | apiserver | controller-manager | proxy [FLAGS]
//
// Each runs as the program of the release does, with its flags; kube COMMAND --help lists them. One program is a third
// of the size of four, and the processes share its pages.
//
// To move to another release, change v1.37.2 and all v0.37.2 in go.mod, and run go mod tidy here.
package main

import (
	"fmt"
	"os"

	"github.com/spf13/cobra"
	"go.etcd.io/etcd/server/v3/etcdmain"
	"k8s.io/component-base/cli"
	_ "k8s.io/component-base/logs/json/register"
	_ "k8s.io/component-base/metrics/prometheus/clientgo"
	apiserver "k8s.io/kubernetes/cmd/kube-apiserver/app"
	manager "k8s.io/kubernetes/cmd/kube-controller-manager/app"
	proxy "k8s.io/kubernetes/cmd/kube-proxy/app"
)

func main() {
	var command func() *cobra.Command
	switch {
	case len(os.Args) < 2:
	case os.Args[1] == "etcd":
		etcdmain.Main(os.Args[1:])
		return
	case os.Args[1] == "apiserver":
		command = apiserver.NewAPIServerCommand
	case os.Args[1] == "controller-manager":
		command = manager.NewControllerManagerCommand
	case os.Args[1] == "proxy":
		command = proxy.NewProxyCommand
	}
	if command == nil {
		fmt.Fprintln(os.Stderr, "kube etcd | apiserver | controller-manager | proxy [FLAGS]")
		os.Exit(2)
	}
	os.Args = append([]string{"kube-" + os.Args[1]}, os.Args[2:]...)
	os.Exit(cli.Run(command()))
}
