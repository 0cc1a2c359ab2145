package main

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"

	"github.com/hashicorp/terraform-plugin-framework/datasource"
	"github.com/hashicorp/terraform-plugin-framework/provider"
	"github.com/hashicorp/terraform-plugin-framework/provider/schema"
	"github.com/hashicorp/terraform-plugin-framework/resource"
	"github.com/hashicorp/terraform-plugin-framework/types"
	"github.com/twmb/franz-go/pkg/kadm"
	"github.com/twmb/franz-go/pkg/kgo"
	"github.com/twmb/franz-go/pkg/sasl"
	"github.com/twmb/franz-go/pkg/sasl/plain"
	"github.com/twmb/franz-go/pkg/sasl/scram"
)

// kafkaProvider has the configuration of Mongey/kafka that the example uses.
type kafkaProvider struct{}

type kafkaModel struct {
	BootstrapServers []string     `tfsdk:"bootstrap_servers"`
	TLSEnabled       types.Bool   `tfsdk:"tls_enabled"`
	CACert           types.String `tfsdk:"ca_cert"`
	SASLUsername     types.String `tfsdk:"sasl_username"`
	SASLPassword     types.String `tfsdk:"sasl_password"`
	SASLMechanism    types.String `tfsdk:"sasl_mechanism"`
}

func (p *kafkaProvider) Metadata(_ context.Context, _ provider.MetadataRequest, response *provider.MetadataResponse) {
	response.TypeName = "kafka"
}

func (p *kafkaProvider) Schema(_ context.Context, _ provider.SchemaRequest, response *provider.SchemaResponse) {
	response.Schema = schema.Schema{Attributes: map[string]schema.Attribute{
		"bootstrap_servers": schema.ListAttribute{Required: true, ElementType: types.StringType},
		"tls_enabled":       schema.BoolAttribute{Optional: true},
		"ca_cert":           schema.StringAttribute{Optional: true},
		"sasl_username":     schema.StringAttribute{Optional: true},
		"sasl_password":     schema.StringAttribute{Optional: true, Sensitive: true},
		"sasl_mechanism":    schema.StringAttribute{Optional: true},
	}}
}

func (p *kafkaProvider) Configure(ctx context.Context, request provider.ConfigureRequest, response *provider.ConfigureResponse) {
	var model kafkaModel
	response.Diagnostics.Append(request.Config.Get(ctx, &model)...)
	if response.Diagnostics.HasError() {
		return
	}
	options := []kgo.Opt{kgo.SeedBrokers(model.BootstrapServers...)}
	// As the provider it stands for: TLS unless told otherwise.
	if model.TLSEnabled.IsNull() || model.TLSEnabled.ValueBool() {
		config := &tls.Config{}
		if pem := model.CACert.ValueString(); pem != "" {
			config.RootCAs = x509.NewCertPool()
			if !config.RootCAs.AppendCertsFromPEM([]byte(pem)) {
				response.Diagnostics.AddError("ca_cert", "holds no certificate")
				return
			}
		}
		options = append(options, kgo.DialTLSConfig(config))
	}
	if user := model.SASLUsername.ValueString(); user != "" {
		mechanism, err := saslMechanism(model.SASLMechanism.ValueString(), user, model.SASLPassword.ValueString())
		if err != nil {
			response.Diagnostics.AddError("sasl_mechanism", err.Error())
			return
		}
		options = append(options, kgo.SASL(mechanism))
	}
	client, err := kgo.NewClient(options...)
	if err != nil {
		response.Diagnostics.AddError("bootstrap_servers", err.Error())
		return
	}
	response.ResourceData = &kafkaClients{admin: kadm.NewClient(client), raw: client}
}

// kafkaClients reach one cluster: by requests of topics, and by any request.
type kafkaClients struct {
	admin *kadm.Client
	raw   *kgo.Client
}

func saslMechanism(name, user, password string) (sasl.Mechanism, error) {
	switch name {
	case "", "plain":
		return plain.Auth{User: user, Pass: password}.AsMechanism(), nil
	case "scram-sha256":
		return scram.Auth{User: user, Pass: password}.AsSha256Mechanism(), nil
	case "scram-sha512":
		return scram.Auth{User: user, Pass: password}.AsSha512Mechanism(), nil
	}
	return nil, errors.New("plain, scram-sha256 or scram-sha512, not " + name)
}

func (p *kafkaProvider) DataSources(context.Context) []func() datasource.DataSource { return nil }

func (p *kafkaProvider) Resources(context.Context) []func() resource.Resource {
	return []func() resource.Resource{
		func() resource.Resource { return &kafkaTopic{} },
		func() resource.Resource { return &kafkaACL{} },
	}
}
