package main

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"os"
	"strings"
	"sync"
	"time"

	"github.com/hashicorp/terraform-plugin-framework/datasource"
	"github.com/hashicorp/terraform-plugin-framework/provider"
	"github.com/hashicorp/terraform-plugin-framework/provider/schema"
	"github.com/hashicorp/terraform-plugin-framework/resource"
	"github.com/hashicorp/terraform-plugin-framework/types"
	"go.yaml.in/yaml/v3"
)

// kubernetesProvider has the configuration of hashicorp/kubernetes that the example uses.
type kubernetesProvider struct{}

type kubernetesModel struct {
	ConfigPath    types.String `tfsdk:"config_path"`
	ConfigContext types.String `tfsdk:"config_context"`
}

func (p *kubernetesProvider) Metadata(_ context.Context, _ provider.MetadataRequest, response *provider.MetadataResponse) {
	response.TypeName = "kubernetes"
}

func (p *kubernetesProvider) Schema(_ context.Context, _ provider.SchemaRequest, response *provider.SchemaResponse) {
	response.Schema = schema.Schema{Attributes: map[string]schema.Attribute{
		"config_path":    schema.StringAttribute{Optional: true},
		"config_context": schema.StringAttribute{Optional: true},
	}}
}

func (p *kubernetesProvider) Configure(ctx context.Context, request provider.ConfigureRequest, response *provider.ConfigureResponse) {
	var model kubernetesModel
	response.Diagnostics.Append(request.Config.Get(ctx, &model)...)
	if response.Diagnostics.HasError() {
		return
	}
	// Nothing is read yet: a plan of new objects needs no cluster.
	response.ResourceData = &cluster{path: model.ConfigPath.ValueString(), context: model.ConfigContext.ValueString()}
}

func (p *kubernetesProvider) DataSources(context.Context) []func() datasource.DataSource { return nil }

func (p *kubernetesProvider) Resources(context.Context) []func() resource.Resource {
	return []func() resource.Resource{func() resource.Resource { return &kubernetesManifest{} }}
}

// cluster is a plain HTTP client of one API server.
type cluster struct {
	path, context string

	once   sync.Once
	failed error
	server string
	token  string
	http   *http.Client
}

// errAbsent says that the API server has no such object.
var errAbsent = errors.New("not found")

// kubeconfig is the part of the file that is needed: certificates or a token.
type kubeconfig struct {
	CurrentContext string `yaml:"current-context"`
	Contexts       []struct {
		Name    string                         `yaml:"name"`
		Context struct{ Cluster, User string } `yaml:"context"`
	} `yaml:"contexts"`
	Clusters []struct {
		Name    string `yaml:"name"`
		Cluster struct {
			Server string `yaml:"server"`
			CA     string `yaml:"certificate-authority"`
			CAData string `yaml:"certificate-authority-data"`
		} `yaml:"cluster"`
	} `yaml:"clusters"`
	Users []struct {
		Name string `yaml:"name"`
		User struct {
			Token    string `yaml:"token"`
			Cert     string `yaml:"client-certificate"`
			CertData string `yaml:"client-certificate-data"`
			Key      string `yaml:"client-key"`
			KeyData  string `yaml:"client-key-data"`
		} `yaml:"user"`
	} `yaml:"users"`
}

func (c *cluster) open() error {
	c.once.Do(func() { c.failed = c.configure() })
	return c.failed
}

func (c *cluster) configure() error {
	if c.path == "" {
		return errors.New("config_path is not set")
	}
	text, err := os.ReadFile(c.path)
	if err != nil {
		return err
	}
	var file kubeconfig
	if err := yaml.Unmarshal(text, &file); err != nil {
		return fmt.Errorf("%s: %w", c.path, err)
	}
	wanted := file.CurrentContext
	if c.context != "" {
		wanted = c.context
	}
	config := &tls.Config{}
	for _, entry := range file.Contexts {
		if entry.Name != wanted {
			continue
		}
		for _, one := range file.Clusters {
			if one.Name != entry.Context.Cluster {
				continue
			}
			c.server = strings.TrimSuffix(one.Cluster.Server, "/")
			authority, err := material(one.Cluster.CA, one.Cluster.CAData)
			if err != nil {
				return err
			}
			if len(authority) > 0 {
				config.RootCAs = x509.NewCertPool()
				config.RootCAs.AppendCertsFromPEM(authority)
			}
		}
		for _, one := range file.Users {
			if one.Name != entry.Context.User {
				continue
			}
			c.token = one.User.Token
			certificate, err := material(one.User.Cert, one.User.CertData)
			if err != nil {
				return err
			}
			key, err := material(one.User.Key, one.User.KeyData)
			if err != nil {
				return err
			}
			if len(certificate) > 0 {
				pair, err := tls.X509KeyPair(certificate, key)
				if err != nil {
					return err
				}
				config.Certificates = []tls.Certificate{pair}
			}
		}
	}
	if c.server == "" {
		return fmt.Errorf("%s: no cluster for the context %q", c.path, wanted)
	}
	c.http = &http.Client{Timeout: 30 * time.Second, Transport: &http.Transport{TLSClientConfig: config}}
	return nil
}

// material is the content of a file, or of the file's text in the kubeconfig.
func material(path, data string) ([]byte, error) {
	if data != "" {
		return base64.StdEncoding.DecodeString(data)
	}
	if path == "" {
		return nil, nil
	}
	return os.ReadFile(path)
}

// ask sends one request and decodes its answer, which may be none.
func (c *cluster) ask(ctx context.Context, method, path, contentType string, body any) (map[string]any, error) {
	if err := c.open(); err != nil {
		return nil, err
	}
	var content io.Reader
	if body != nil {
		text, err := json.Marshal(body)
		if err != nil {
			return nil, err
		}
		content = bytes.NewReader(text)
	}
	request, err := http.NewRequestWithContext(ctx, method, c.server+path, content)
	if err != nil {
		return nil, err
	}
	request.Header.Set("Accept", "application/json")
	if contentType != "" {
		request.Header.Set("Content-Type", contentType)
	}
	if c.token != "" {
		request.Header.Set("Authorization", "Bearer "+c.token)
	}
	answer, err := c.http.Do(request)
	if err != nil {
		return nil, err
	}
	defer answer.Body.Close()
	text, err := io.ReadAll(answer.Body)
	if err != nil {
		return nil, err
	}
	if answer.StatusCode == http.StatusNotFound {
		return nil, fmt.Errorf("%s %s: %w", method, path, errAbsent)
	}
	decoded := map[string]any{}
	if err := json.Unmarshal(text, &decoded); err != nil {
		return nil, fmt.Errorf("%s %s: %s: %w", method, path, answer.Status, err)
	}
	if answer.StatusCode >= 300 {
		return nil, fmt.Errorf("%s %s: %s: %v", method, path, answer.Status, decoded["message"])
	}
	return decoded, nil
}

// locate finds the path of an object from what the API server says about its kind.
func (c *cluster) locate(ctx context.Context, manifest map[string]any) (string, error) {
	version, _ := manifest["apiVersion"].(string)
	kind, _ := manifest["kind"].(string)
	metadata, _ := manifest["metadata"].(map[string]any)
	name, _ := metadata["name"].(string)
	namespace, _ := metadata["namespace"].(string)
	if version == "" || kind == "" || name == "" {
		return "", errors.New("a manifest needs apiVersion, kind and metadata.name")
	}
	base := "/apis/" + version
	if !strings.Contains(version, "/") {
		base = "/api/" + version
	}
	found, err := c.ask(ctx, http.MethodGet, base, "", nil)
	if err != nil {
		return "", fmt.Errorf("the API server has no %s: %w", version, err)
	}
	resources, _ := found["resources"].([]any)
	for _, entry := range resources {
		one, _ := entry.(map[string]any)
		plural, _ := one["name"].(string)
		if one["kind"] != kind || strings.Contains(plural, "/") {
			continue
		}
		if one["namespaced"] == true {
			if namespace == "" {
				return "", fmt.Errorf("%s %s needs metadata.namespace", kind, name)
			}
			base += "/namespaces/" + url.PathEscape(namespace)
		}
		return base + "/" + plural + "/" + url.PathEscape(name), nil
	}
	return "", fmt.Errorf("the API server has no %s in %s", kind, version)
}
