package main

import (
	"context"
	"errors"
	"fmt"

	"github.com/hashicorp/terraform-plugin-framework/path"
	"github.com/hashicorp/terraform-plugin-framework/resource"
	"github.com/hashicorp/terraform-plugin-framework/resource/schema"
	"github.com/hashicorp/terraform-plugin-framework/resource/schema/int64planmodifier"
	"github.com/hashicorp/terraform-plugin-framework/resource/schema/planmodifier"
	"github.com/hashicorp/terraform-plugin-framework/resource/schema/stringplanmodifier"
	"github.com/hashicorp/terraform-plugin-framework/types"
	"github.com/twmb/franz-go/pkg/kadm"
	"github.com/twmb/franz-go/pkg/kerr"
	"github.com/twmb/franz-go/pkg/kmsg"
)

type kafkaTopic struct{ client *kadm.Client }

type topicModel struct {
	ID                types.String      `tfsdk:"id"`
	Name              types.String      `tfsdk:"name"`
	Partitions        types.Int64       `tfsdk:"partitions"`
	ReplicationFactor types.Int64       `tfsdk:"replication_factor"`
	Config            map[string]string `tfsdk:"config"`
}

func (t *kafkaTopic) Metadata(_ context.Context, _ resource.MetadataRequest, response *resource.MetadataResponse) {
	response.TypeName = "kafka_topic"
}

func (t *kafkaTopic) Schema(_ context.Context, _ resource.SchemaRequest, response *resource.SchemaResponse) {
	response.Schema = schema.Schema{Attributes: map[string]schema.Attribute{
		"id":                 schema.StringAttribute{Computed: true, PlanModifiers: []planmodifier.String{stringplanmodifier.UseStateForUnknown()}},
		"name":               schema.StringAttribute{Required: true, PlanModifiers: []planmodifier.String{stringplanmodifier.RequiresReplace()}},
		"partitions":         schema.Int64Attribute{Required: true, PlanModifiers: []planmodifier.Int64{int64planmodifier.RequiresReplaceIf(shrinks, shrinking, shrinking)}},
		"replication_factor": schema.Int64Attribute{Required: true, PlanModifiers: []planmodifier.Int64{int64planmodifier.RequiresReplace()}},
		"config":             schema.MapAttribute{Optional: true, ElementType: types.StringType},
	}}
}

const shrinking = "Kafka adds partitions and never removes them."

func shrinks(_ context.Context, request planmodifier.Int64Request, response *int64planmodifier.RequiresReplaceIfFuncResponse) {
	response.RequiresReplace = request.PlanValue.ValueInt64() < request.StateValue.ValueInt64()
}

func (t *kafkaTopic) Configure(_ context.Context, request resource.ConfigureRequest, _ *resource.ConfigureResponse) {
	if request.ProviderData != nil {
		t.client = request.ProviderData.(*kafkaClients).admin
	}
}

func (t *kafkaTopic) Create(ctx context.Context, request resource.CreateRequest, response *resource.CreateResponse) {
	var plan topicModel
	response.Diagnostics.Append(request.Plan.Get(ctx, &plan)...)
	if response.Diagnostics.HasError() {
		return
	}
	config := map[string]*string{}
	for key, value := range plan.Config {
		config[key] = kadm.StringPtr(value)
	}
	made, err := t.client.CreateTopic(ctx, int32(plan.Partitions.ValueInt64()), int16(plan.ReplicationFactor.ValueInt64()), config, plan.Name.ValueString())
	if err = errors.Join(err, made.Err); err != nil {
		response.Diagnostics.AddError("creating the topic", err.Error())
		return
	}
	plan.ID = plan.Name
	response.Diagnostics.Append(response.State.Set(ctx, &plan)...)
}

func (t *kafkaTopic) Read(ctx context.Context, request resource.ReadRequest, response *resource.ReadResponse) {
	var state topicModel
	response.Diagnostics.Append(request.State.Get(ctx, &state)...)
	if response.Diagnostics.HasError() {
		return
	}
	name := state.ID.ValueString()
	topics, err := t.client.ListTopics(ctx, name)
	if err == nil {
		err = topics[name].Err
	}
	if errors.Is(err, kerr.UnknownTopicOrPartition) {
		response.State.RemoveResource(ctx)
		return
	}
	if err != nil {
		response.Diagnostics.AddError("reading the topic", err.Error())
		return
	}
	described, err := t.client.DescribeTopicConfigs(ctx, name)
	if err != nil {
		response.Diagnostics.AddError("reading the topic's configuration", err.Error())
		return
	}
	set := map[string]string{}
	for _, config := range described {
		for _, entry := range config.Configs {
			if entry.Source == kmsg.ConfigSourceDynamicTopicConfig {
				set[entry.Key] = entry.MaybeValue()
			}
		}
	}
	state.Name = types.StringValue(name)
	state.Partitions = types.Int64Value(int64(len(topics[name].Partitions)))
	state.ReplicationFactor = types.Int64Value(int64(topics[name].Partitions.NumReplicas()))
	// No configuration and an empty one are the same to Kafka, not to Terraform.
	if len(set) > 0 || state.Config != nil {
		state.Config = set
	}
	response.Diagnostics.Append(response.State.Set(ctx, &state)...)
}

func (t *kafkaTopic) Update(ctx context.Context, request resource.UpdateRequest, response *resource.UpdateResponse) {
	var plan, state topicModel
	response.Diagnostics.Append(request.Plan.Get(ctx, &plan)...)
	response.Diagnostics.Append(request.State.Get(ctx, &state)...)
	if response.Diagnostics.HasError() {
		return
	}
	name := plan.Name.ValueString()
	if plan.Partitions.ValueInt64() > state.Partitions.ValueInt64() {
		made, err := t.client.UpdatePartitions(ctx, int(plan.Partitions.ValueInt64()), name)
		if err = errors.Join(err, made.Error()); err != nil {
			response.Diagnostics.AddError("adding partitions", err.Error())
			return
		}
	}
	var changes []kadm.AlterConfig
	for key, value := range plan.Config {
		changes = append(changes, kadm.AlterConfig{Op: kadm.SetConfig, Name: key, Value: kadm.StringPtr(value)})
	}
	for key := range state.Config {
		if _, kept := plan.Config[key]; !kept {
			changes = append(changes, kadm.AlterConfig{Op: kadm.DeleteConfig, Name: key})
		}
	}
	if len(changes) > 0 {
		altered, err := t.client.AlterTopicConfigs(ctx, changes, name)
		for _, one := range altered {
			err = errors.Join(err, one.Err)
		}
		if err != nil {
			response.Diagnostics.AddError(fmt.Sprintf("changing the configuration of %s", name), err.Error())
			return
		}
	}
	response.Diagnostics.Append(response.State.Set(ctx, &plan)...)
}

func (t *kafkaTopic) Delete(ctx context.Context, request resource.DeleteRequest, response *resource.DeleteResponse) {
	var state topicModel
	response.Diagnostics.Append(request.State.Get(ctx, &state)...)
	if response.Diagnostics.HasError() {
		return
	}
	gone, err := t.client.DeleteTopic(ctx, state.ID.ValueString())
	if err = errors.Join(err, gone.Err); err != nil && !errors.Is(err, kerr.UnknownTopicOrPartition) {
		response.Diagnostics.AddError("deleting the topic", err.Error())
	}
}

func (t *kafkaTopic) ImportState(ctx context.Context, request resource.ImportStateRequest, response *resource.ImportStateResponse) {
	resource.ImportStatePassthroughID(ctx, path.Root("id"), request, response)
}
