package main

import (
	"context"
	"fmt"
	"strings"

	"github.com/hashicorp/terraform-plugin-framework/resource"
	"github.com/hashicorp/terraform-plugin-framework/resource/schema"
	"github.com/hashicorp/terraform-plugin-framework/resource/schema/planmodifier"
	"github.com/hashicorp/terraform-plugin-framework/resource/schema/stringdefault"
	"github.com/hashicorp/terraform-plugin-framework/resource/schema/stringplanmodifier"
	"github.com/hashicorp/terraform-plugin-framework/types"
	"github.com/twmb/franz-go/pkg/kerr"
	"github.com/twmb/franz-go/pkg/kgo"
	"github.com/twmb/franz-go/pkg/kmsg"
)

type kafkaACL struct{ client *kgo.Client }

type aclModel struct {
	ID             types.String `tfsdk:"id"`
	ResourceName   types.String `tfsdk:"resource_name"`
	ResourceType   types.String `tfsdk:"resource_type"`
	PatternType    types.String `tfsdk:"resource_pattern_type_filter"`
	Principal      types.String `tfsdk:"acl_principal"`
	Host           types.String `tfsdk:"acl_host"`
	Operation      types.String `tfsdk:"acl_operation"`
	PermissionType types.String `tfsdk:"acl_permission_type"`
}

func (a *kafkaACL) Metadata(_ context.Context, _ resource.MetadataRequest, response *resource.MetadataResponse) {
	response.TypeName = "kafka_acl"
}

func (a *kafkaACL) Schema(_ context.Context, _ resource.SchemaRequest, response *resource.SchemaResponse) {
	replace := []planmodifier.String{stringplanmodifier.RequiresReplace()}
	required := schema.StringAttribute{Required: true, PlanModifiers: replace}
	response.Schema = schema.Schema{Attributes: map[string]schema.Attribute{
		"id":                           schema.StringAttribute{Computed: true, PlanModifiers: []planmodifier.String{stringplanmodifier.UseStateForUnknown()}},
		"resource_name":                required,
		"resource_type":                required,
		"resource_pattern_type_filter": schema.StringAttribute{Optional: true, Computed: true, Default: stringdefault.StaticString("Literal"), PlanModifiers: replace},
		"acl_principal":                required,
		"acl_host":                     required,
		"acl_operation":                required,
		"acl_permission_type":          required,
	}}
}

func (a *kafkaACL) Configure(_ context.Context, request resource.ConfigureRequest, _ *resource.ConfigureResponse) {
	if request.ProviderData != nil {
		a.client = request.ProviderData.(*kafkaClients).raw
	}
}

// binding holds the parsed words of one ACL.
type binding struct {
	resource   kmsg.ACLResourceType
	pattern    kmsg.ACLResourcePatternType
	operation  kmsg.ACLOperation
	permission kmsg.ACLPermissionType
}

func (m *aclModel) parse() (parsed binding, err error) {
	for _, step := range []func() error{
		func() (err error) { parsed.resource, err = kmsg.ParseACLResourceType(word(m.ResourceType)); return },
		func() (err error) {
			parsed.pattern, err = kmsg.ParseACLResourcePatternType(word(m.PatternType))
			return
		},
		func() (err error) { parsed.operation, err = kmsg.ParseACLOperation(word(m.Operation)); return },
		func() (err error) {
			parsed.permission, err = kmsg.ParseACLPermissionType(word(m.PermissionType))
			return
		},
	} {
		if err = step(); err != nil {
			return parsed, err
		}
	}
	return parsed, nil
}

// word is the spelling that kmsg parses: TransactionalID, Cluster and so on in any case.
func word(value types.String) string { return strings.ToUpper(value.ValueString()) }

func (m *aclModel) describe(parsed binding) kmsg.DescribeACLsRequest {
	request := kmsg.NewDescribeACLsRequest()
	request.ResourceType, request.ResourceName, request.ResourcePatternType = parsed.resource, m.ResourceName.ValueStringPointer(), parsed.pattern
	request.Principal, request.Host = m.Principal.ValueStringPointer(), m.Host.ValueStringPointer()
	request.Operation, request.PermissionType = parsed.operation, parsed.permission
	return request
}

func (a *kafkaACL) Create(ctx context.Context, request resource.CreateRequest, response *resource.CreateResponse) {
	var plan aclModel
	response.Diagnostics.Append(request.Plan.Get(ctx, &plan)...)
	if response.Diagnostics.HasError() {
		return
	}
	parsed, err := plan.parse()
	if err != nil {
		response.Diagnostics.AddError("an ACL", err.Error())
		return
	}
	creation := kmsg.NewCreateACLsRequestCreation()
	creation.ResourceType, creation.ResourceName, creation.ResourcePatternType = parsed.resource, plan.ResourceName.ValueString(), parsed.pattern
	creation.Principal, creation.Host = plan.Principal.ValueString(), plan.Host.ValueString()
	creation.Operation, creation.PermissionType = parsed.operation, parsed.permission
	message := kmsg.NewCreateACLsRequest()
	message.Creations = append(message.Creations, creation)
	answer, err := message.RequestWith(ctx, a.client)
	if err == nil {
		err = outcome(answer.Results[0].ErrorCode, answer.Results[0].ErrorMessage)
	}
	if err != nil {
		response.Diagnostics.AddError("creating the ACL", err.Error())
		return
	}
	plan.ID = types.StringValue(strings.Join([]string{
		plan.Principal.ValueString(), plan.Host.ValueString(), plan.Operation.ValueString(), plan.PermissionType.ValueString(),
		plan.ResourceType.ValueString(), plan.ResourceName.ValueString(), plan.PatternType.ValueString(),
	}, "|"))
	response.Diagnostics.Append(response.State.Set(ctx, &plan)...)
}

func (a *kafkaACL) Read(ctx context.Context, request resource.ReadRequest, response *resource.ReadResponse) {
	var state aclModel
	response.Diagnostics.Append(request.State.Get(ctx, &state)...)
	if response.Diagnostics.HasError() {
		return
	}
	parsed, err := state.parse()
	if err == nil {
		message := state.describe(parsed)
		var answer *kmsg.DescribeACLsResponse
		if answer, err = message.RequestWith(ctx, a.client); err == nil {
			if err = outcome(answer.ErrorCode, answer.ErrorMessage); err == nil && len(answer.Resources) == 0 {
				response.State.RemoveResource(ctx)
			}
		}
	}
	if err != nil {
		response.Diagnostics.AddError("reading the ACL", err.Error())
	}
}

func (a *kafkaACL) Update(context.Context, resource.UpdateRequest, *resource.UpdateResponse) {}

func (a *kafkaACL) Delete(ctx context.Context, request resource.DeleteRequest, response *resource.DeleteResponse) {
	var state aclModel
	response.Diagnostics.Append(request.State.Get(ctx, &state)...)
	if response.Diagnostics.HasError() {
		return
	}
	parsed, err := state.parse()
	if err == nil {
		filter := kmsg.NewDeleteACLsRequestFilter()
		filter.ResourceType, filter.ResourceName, filter.ResourcePatternType = parsed.resource, state.ResourceName.ValueStringPointer(), parsed.pattern
		filter.Principal, filter.Host = state.Principal.ValueStringPointer(), state.Host.ValueStringPointer()
		filter.Operation, filter.PermissionType = parsed.operation, parsed.permission
		message := kmsg.NewDeleteACLsRequest()
		message.Filters = append(message.Filters, filter)
		var answer *kmsg.DeleteACLsResponse
		if answer, err = message.RequestWith(ctx, a.client); err == nil {
			err = outcome(answer.Results[0].ErrorCode, answer.Results[0].ErrorMessage)
		}
	}
	if err != nil {
		response.Diagnostics.AddError("deleting the ACL", err.Error())
	}
}

func outcome(code int16, message *string) error {
	err := kerr.ErrorForCode(code)
	if err != nil && message != nil {
		return fmt.Errorf("%w: %s", err, *message)
	}
	return err
}
