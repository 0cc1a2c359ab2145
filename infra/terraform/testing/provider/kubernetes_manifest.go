package main

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"strconv"
	"time"

	"github.com/hashicorp/terraform-plugin-framework/resource"
	"github.com/hashicorp/terraform-plugin-framework/resource/schema"
	"github.com/hashicorp/terraform-plugin-framework/types"
)

const (
	waitMost = 5 * time.Minute
	waitStep = 250 * time.Millisecond
)

type kubernetesManifest struct{ cluster *cluster }

type manifestModel struct {
	Manifest     types.Dynamic      `tfsdk:"manifest"`
	Object       types.Dynamic      `tfsdk:"object"`
	FieldManager *fieldManagerModel `tfsdk:"field_manager"`
	Wait         *waitModel         `tfsdk:"wait"`
}

type fieldManagerModel struct {
	Name           types.String `tfsdk:"name"`
	ForceConflicts types.Bool   `tfsdk:"force_conflicts"`
}

type waitModel struct {
	Rollout   types.Bool       `tfsdk:"rollout"`
	Condition []conditionModel `tfsdk:"condition"`
}

type conditionModel struct {
	Type   types.String `tfsdk:"type"`
	Status types.String `tfsdk:"status"`
}

func (k *kubernetesManifest) Metadata(_ context.Context, _ resource.MetadataRequest, response *resource.MetadataResponse) {
	response.TypeName = "kubernetes_manifest"
}

func (k *kubernetesManifest) Schema(_ context.Context, _ resource.SchemaRequest, response *resource.SchemaResponse) {
	response.Schema = schema.Schema{
		Attributes: map[string]schema.Attribute{
			"manifest": schema.DynamicAttribute{Required: true},
			"object":   schema.DynamicAttribute{Optional: true, Computed: true},
		},
		Blocks: map[string]schema.Block{
			"field_manager": schema.SingleNestedBlock{Attributes: map[string]schema.Attribute{
				"name":            schema.StringAttribute{Optional: true},
				"force_conflicts": schema.BoolAttribute{Optional: true},
			}},
			"wait": schema.SingleNestedBlock{
				Attributes: map[string]schema.Attribute{"rollout": schema.BoolAttribute{Optional: true}},
				Blocks: map[string]schema.Block{"condition": schema.ListNestedBlock{NestedObject: schema.NestedBlockObject{
					Attributes: map[string]schema.Attribute{
						"type":   schema.StringAttribute{Optional: true},
						"status": schema.StringAttribute{Optional: true},
					},
				}}},
			},
		},
	}
}

func (k *kubernetesManifest) Configure(_ context.Context, request resource.ConfigureRequest, _ *resource.ConfigureResponse) {
	if request.ProviderData != nil {
		k.cluster = request.ProviderData.(*cluster)
	}
}

// ModifyPlan plans a change when the manifest changed, or when the object is no longer what the manifest says; and a replacement when
// it names another object.
func (k *kubernetesManifest) ModifyPlan(ctx context.Context, request resource.ModifyPlanRequest, response *resource.ModifyPlanResponse) {
	if request.Plan.Raw.IsNull() || request.State.Raw.IsNull() {
		return
	}
	var plan, state manifestModel
	response.Diagnostics.Append(request.Plan.Get(ctx, &plan)...)
	response.Diagnostics.Append(request.State.Get(ctx, &state)...)
	if response.Diagnostics.HasError() {
		return
	}
	wanted, err := values(ctx, plan.Manifest)
	before, err2 := values(ctx, state.Manifest)
	found, err3 := values(ctx, state.Object)
	if err = errors.Join(err, err2, err3); errors.Is(err, errUnknown) {
		plan.Object = types.DynamicUnknown()
	} else if err != nil {
		response.Diagnostics.AddError("reading a manifest", err.Error())
		return
	} else {
		if identity(wanted) != identity(before) {
			response.RequiresReplace = append(response.RequiresReplace, manifestPath)
		}
		if difference := within(wanted, found, ""); difference != "" || within(before, wanted, "") != "" {
			plan.Object = types.DynamicUnknown()
			if within(before, wanted, "") == "" && within(wanted, before, "") == "" {
				response.Diagnostics.AddWarning("drift", fmt.Sprintf("%s: %s", identity(wanted), difference))
			}
		} else {
			plan.Object = state.Object
		}
	}
	response.Diagnostics.Append(response.Plan.Set(ctx, &plan)...)
}

func (k *kubernetesManifest) Create(ctx context.Context, request resource.CreateRequest, response *resource.CreateResponse) {
	var plan manifestModel
	response.Diagnostics.Append(request.Plan.Get(ctx, &plan)...)
	if response.Diagnostics.HasError() {
		return
	}
	wanted, err := values(ctx, plan.Manifest)
	if err == nil {
		var path string
		if path, err = k.cluster.locate(ctx, wanted); err == nil {
			if _, err = k.cluster.ask(ctx, http.MethodGet, path, "", nil); err == nil {
				err = errors.New("it exists already; import it or remove it")
			} else if errors.Is(err, errAbsent) {
				err = k.apply(ctx, wanted, &plan)
			}
		}
	}
	if err != nil {
		response.Diagnostics.AddError("creating "+identity(wanted), err.Error())
		return
	}
	response.Diagnostics.Append(response.State.Set(ctx, &plan)...)
}

func (k *kubernetesManifest) Update(ctx context.Context, request resource.UpdateRequest, response *resource.UpdateResponse) {
	var plan manifestModel
	response.Diagnostics.Append(request.Plan.Get(ctx, &plan)...)
	if response.Diagnostics.HasError() {
		return
	}
	wanted, err := values(ctx, plan.Manifest)
	if err == nil {
		err = k.apply(ctx, wanted, &plan)
	}
	if err != nil {
		response.Diagnostics.AddError("changing "+identity(wanted), err.Error())
		return
	}
	response.Diagnostics.Append(response.State.Set(ctx, &plan)...)
}

// apply sends the manifest by server-side apply, waits as asked, and notes what came out.
func (k *kubernetesManifest) apply(ctx context.Context, wanted map[string]any, plan *manifestModel) error {
	path, err := k.cluster.locate(ctx, wanted)
	if err != nil {
		return err
	}
	query := url.Values{"fieldManager": {"Terraform"}}
	if manager := plan.FieldManager; manager != nil {
		if name := manager.Name.ValueString(); name != "" {
			query.Set("fieldManager", name)
		}
		query.Set("force", strconv.FormatBool(manager.ForceConflicts.ValueBool()))
	}
	found, err := k.cluster.ask(ctx, http.MethodPatch, path+"?"+query.Encode(), "application/apply-patch+yaml", wanted)
	if err != nil {
		return err
	}
	if plan.Wait != nil {
		for deadline := time.Now().Add(waitMost); ; {
			reason := lacking(found, plan.Wait)
			if reason == "" {
				break
			}
			if time.Now().After(deadline) {
				return fmt.Errorf("not ready after %s: %s", waitMost, reason)
			}
			time.Sleep(waitStep)
			if found, err = k.cluster.ask(ctx, http.MethodGet, path, "", nil); err != nil {
				return err
			}
		}
	}
	if difference := within(wanted, found, ""); difference != "" {
		// What the provider it stands for calls an inconsistent result.
		return fmt.Errorf("the API server changed a value: %s", difference)
	}
	plan.Object, err = dynamic(tidy(found))
	return err
}

func (k *kubernetesManifest) Read(ctx context.Context, request resource.ReadRequest, response *resource.ReadResponse) {
	var state manifestModel
	response.Diagnostics.Append(request.State.Get(ctx, &state)...)
	if response.Diagnostics.HasError() {
		return
	}
	wanted, err := values(ctx, state.Manifest)
	if err == nil {
		var path string
		if path, err = k.cluster.locate(ctx, wanted); err == nil {
			var found map[string]any
			if found, err = k.cluster.ask(ctx, http.MethodGet, path, "", nil); err == nil {
				state.Object, err = dynamic(tidy(found))
			}
		}
	}
	if errors.Is(err, errAbsent) {
		response.State.RemoveResource(ctx)
		return
	}
	if err != nil {
		response.Diagnostics.AddError("reading "+identity(wanted), err.Error())
		return
	}
	response.Diagnostics.Append(response.State.Set(ctx, &state)...)
}

func (k *kubernetesManifest) Delete(ctx context.Context, request resource.DeleteRequest, response *resource.DeleteResponse) {
	var state manifestModel
	response.Diagnostics.Append(request.State.Get(ctx, &state)...)
	if response.Diagnostics.HasError() {
		return
	}
	wanted, err := values(ctx, state.Manifest)
	if err == nil {
		err = k.remove(ctx, wanted)
	}
	if err != nil && !errors.Is(err, errAbsent) {
		response.Diagnostics.AddError("deleting "+identity(wanted), err.Error())
	}
}

// remove deletes the object and what belongs to it, and returns when both are gone.
func (k *kubernetesManifest) remove(ctx context.Context, wanted map[string]any) error {
	path, err := k.cluster.locate(ctx, wanted)
	if err != nil {
		return err
	}
	options := map[string]any{"apiVersion": "v1", "kind": "DeleteOptions", "propagationPolicy": "Foreground"}
	if _, err := k.cluster.ask(ctx, http.MethodDelete, path, "application/json", options); err != nil {
		return err
	}
	for deadline := time.Now().Add(waitMost); time.Now().Before(deadline); time.Sleep(waitStep) {
		if _, err := k.cluster.ask(ctx, http.MethodGet, path, "", nil); err != nil {
			return err
		}
	}
	return fmt.Errorf("still there after %s", waitMost)
}
