package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"math/big"
	"reflect"

	"github.com/hashicorp/terraform-plugin-framework/attr"
	"github.com/hashicorp/terraform-plugin-framework/path"
	"github.com/hashicorp/terraform-plugin-framework/types"
	"github.com/hashicorp/terraform-plugin-go/tftypes"
)

var (
	errUnknown   = errors.New("a value is not known yet")
	manifestPath = path.Root("manifest")
)

// values turns a dynamic value into what encoding/json would have read.
func values(ctx context.Context, value types.Dynamic) (map[string]any, error) {
	if value.IsNull() || value.IsUnknown() || value.IsUnderlyingValueUnknown() {
		return nil, errUnknown
	}
	raw, err := value.UnderlyingValue().ToTerraformValue(ctx)
	if err != nil {
		return nil, err
	}
	decoded, err := decode(raw)
	if err != nil {
		return nil, err
	}
	object, ok := decoded.(map[string]any)
	if !ok {
		return nil, errors.New("a manifest is an object")
	}
	return object, nil
}

func decode(value tftypes.Value) (any, error) {
	switch {
	case !value.IsKnown():
		return nil, errUnknown
	case value.IsNull():
		return nil, nil
	case value.Type().Is(tftypes.String):
		var text string
		err := value.As(&text)
		return text, err
	case value.Type().Is(tftypes.Bool):
		var truth bool
		err := value.As(&truth)
		return truth, err
	case value.Type().Is(tftypes.Number):
		number := new(big.Float)
		if err := value.As(&number); err != nil {
			return nil, err
		}
		float, _ := number.Float64()
		return float, nil
	}
	entries := map[string]tftypes.Value{}
	if value.As(&entries) == nil {
		object := map[string]any{}
		for name, entry := range entries {
			decoded, err := decode(entry)
			if err != nil {
				return nil, err
			}
			if decoded != nil {
				object[name] = decoded
			}
		}
		return object, nil
	}
	var items []tftypes.Value
	if err := value.As(&items); err != nil {
		return nil, err
	}
	list := []any{}
	for _, item := range items {
		decoded, err := decode(item)
		if err != nil {
			return nil, err
		}
		list = append(list, decoded)
	}
	return list, nil
}

// dynamic turns what encoding/json read into a dynamic value.
func dynamic(value any) (types.Dynamic, error) {
	encoded, err := encode(value)
	if err != nil {
		return types.DynamicNull(), err
	}
	return types.DynamicValue(encoded), nil
}

func encode(value any) (attr.Value, error) {
	switch value := value.(type) {
	case nil:
		return types.DynamicNull(), nil
	case string:
		return types.StringValue(value), nil
	case bool:
		return types.BoolValue(value), nil
	case float64:
		return types.NumberValue(big.NewFloat(value)), nil
	case []any:
		kinds, members := []attr.Type{}, []attr.Value{}
		for _, item := range value {
			encoded, err := encode(item)
			if err != nil {
				return nil, err
			}
			kinds, members = append(kinds, encoded.Type(context.Background())), append(members, encoded)
		}
		list, diagnostics := types.TupleValue(kinds, members)
		if diagnostics.HasError() {
			return nil, fmt.Errorf("%v", diagnostics)
		}
		return list, nil
	case map[string]any:
		kinds, members := map[string]attr.Type{}, map[string]attr.Value{}
		for name, entry := range value {
			encoded, err := encode(entry)
			if err != nil {
				return nil, err
			}
			kinds[name], members[name] = encoded.Type(context.Background()), encoded
		}
		object, diagnostics := types.ObjectValue(kinds, members)
		if diagnostics.HasError() {
			return nil, fmt.Errorf("%v", diagnostics)
		}
		return object, nil
	}
	return nil, fmt.Errorf("JSON has no %T", value)
}

// within says where found lacks or contradicts what is wanted; empty: nowhere. Lists of a different length contradict.
func within(wanted, found any, where string) string {
	switch wanted := wanted.(type) {
	case map[string]any:
		object, ok := found.(map[string]any)
		if !ok {
			if len(wanted) == 0 && found == nil {
				return ""
			}
			return where + " is no object"
		}
		for name, entry := range wanted {
			if difference := within(entry, object[name], where+"."+name); difference != "" {
				return difference
			}
		}
		return ""
	case []any:
		list, ok := found.([]any)
		if !ok && len(wanted) == 0 && found == nil {
			return ""
		}
		if !ok || len(list) != len(wanted) {
			return fmt.Sprintf("%s has not %d items", where, len(wanted))
		}
		for index, item := range wanted {
			if difference := within(item, list[index], fmt.Sprintf("%s[%d]", where, index)); difference != "" {
				return difference
			}
		}
		return ""
	}
	if !reflect.DeepEqual(wanted, found) {
		was, _ := json.Marshal(found)
		is, _ := json.Marshal(wanted)
		return fmt.Sprintf("%s is %s, not %s", where, was, is)
	}
	return ""
}

// identity names an object: another identity is another object.
func identity(manifest map[string]any) string {
	metadata, _ := manifest["metadata"].(map[string]any)
	return fmt.Sprintf("%v %v %v/%v", manifest["apiVersion"], manifest["kind"], metadata["namespace"], metadata["name"])
}

// tidy leaves out what changes by itself: a clean plan must stay clean while controllers work.
func tidy(object map[string]any) map[string]any {
	kept := map[string]any{}
	for name, value := range object {
		if name != "status" {
			kept[name] = value
		}
	}
	if metadata, ok := object["metadata"].(map[string]any); ok {
		shown := map[string]any{}
		for name, value := range metadata {
			if name != "managedFields" && name != "resourceVersion" && name != "generation" {
				shown[name] = value
			}
		}
		kept["metadata"] = shown
	}
	return kept
}

// lacking says what a waiting apply still waits for; empty: nothing.
func lacking(object map[string]any, wait *waitModel) string {
	status, _ := object["status"].(map[string]any)
	for _, wanted := range wait.Condition {
		met := false
		conditions, _ := status["conditions"].([]any)
		for _, entry := range conditions {
			one, _ := entry.(map[string]any)
			met = met || one["type"] == wanted.Type.ValueString() && one["status"] == wanted.Status.ValueString()
		}
		if !met {
			return fmt.Sprintf("the condition %s is not %s", wanted.Type.ValueString(), wanted.Status.ValueString())
		}
	}
	if wait.Rollout.ValueBool() {
		metadata, _ := object["metadata"].(map[string]any)
		if number(status["observedGeneration"]) < number(metadata["generation"]) {
			return "the controller has not seen it yet"
		}
		spec, _ := object["spec"].(map[string]any)
		wanted, updated, available := spec["replicas"], status["updatedReplicas"], status["availableReplicas"]
		if object["kind"] == "DaemonSet" {
			wanted, updated, available = status["desiredNumberScheduled"], status["updatedNumberScheduled"], status["numberAvailable"]
		}
		if number(updated) < number(wanted) || number(available) < number(wanted) {
			return fmt.Sprintf("%v of %v are available", available, wanted)
		}
	}
	return ""
}

func number(value any) float64 {
	float, _ := value.(float64)
	return float
}
