// Two Terraform providers for the tests of Thaw's modules: the same resource names and attributes as Mongey/kafka and
// hashicorp/kubernetes, which the modules are written for and the tests can't download. Never shipped to users.
//
// In: Terraform's plugin protocol. Out: requests to a real broker or API server. One program: its file name, as Terraform's mirror
// layout has it, says which provider it is.
package main

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"github.com/hashicorp/terraform-plugin-framework/provider"
	"github.com/hashicorp/terraform-plugin-framework/providerserver"
)

func main() {
	name := filepath.Base(os.Args[0])
	var make func() provider.Provider
	address := "registry.terraform.io/"
	switch {
	case strings.HasPrefix(name, "terraform-provider-kafka"):
		make, address = func() provider.Provider { return &kafkaProvider{} }, address+"mongey/kafka"
	case strings.HasPrefix(name, "terraform-provider-kubernetes"):
		make, address = func() provider.Provider { return &kubernetesProvider{} }, address+"hashicorp/kubernetes"
	default:
		fail(fmt.Errorf("%s: name this program terraform-provider-kafka or terraform-provider-kubernetes", name))
	}
	if err := providerserver.Serve(context.Background(), make, providerserver.ServeOpts{Address: address, ProtocolVersion: 6}); err != nil {
		fail(err)
	}
}

func fail(err error) {
	fmt.Fprintln(os.Stderr, err)
	os.Exit(1)
}
