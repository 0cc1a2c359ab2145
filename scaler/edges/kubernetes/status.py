"""What is told of a function in its resource's ``status``. Pure.

In: a resource, its pods, the planner's snapshot, what went wrong with its pods. Out: the status, for :mod:`.writer`.

Conditions. ``Ready``: demand can be answered: there is an instance, a standby or a pod for one, or it needs no pod. ``Checkpointed``:
starts restore. ``Degraded``: starts that are wanted fail.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from infra.kubernetes.client import Object
from scaler.edges.kubernetes.functions import Fault, Resource
from scaler.edges.kubernetes.pods import Pod
from scaler.snapshots import FunctionSnapshot

#: Longest message of a condition; the schema allows more, people do not read it.
_MESSAGE_MAX = 1024
_OFF = ("Off", "spec.policy.checkpoint is off: every start is cold")


@dataclass(frozen=True)
class Seen:
    """All that a status is made of.

    Attributes:
        fault: why the resource is not in force as it is.
        snapshot: None: the planner knows nothing of it.
        pods: its placeholders.
        pods_fault: why pods could not be made.
    """

    resource: Resource
    fault: Fault | None
    snapshot: FunctionSnapshot | None
    pods: Sequence[Pod]
    pods_fault: Fault | None = None


def status_of(seen: Seen, now: str) -> Object:
    """The whole status.

    Args:
        seen: what there is.
        now: for conditions that have changed, as the API server writes times.
    """
    snapshot, generation = seen.snapshot, seen.resource.value["metadata"].get("generation", 0)
    conditions = [("Ready", *_ready(seen)), ("Checkpointed", *_checkpointed(seen)), ("Degraded", *_degraded(seen))]
    status: Object = {
        "observedGeneration": generation,
        "conditions": _timed(conditions, generation, seen.resource.value.get("status") or {}, now),
        "placeholders": sum(pod.usable for pod in seen.pods),
    }
    if snapshot is not None and not (seen.fault and seen.fault.reason == "NameTaken"):
        status |= {
            "rung": snapshot.rung,
            "instances": sum(instance.state != "releasing" for instance in snapshot.instances),
            "wanted": snapshot.wanted,
            "standbys": snapshot.standbys,
            "checkpoint": snapshot.checkpoint,
            "lastStartMs": round(snapshot.last_start_ms, 1),
            "lastStartMode": snapshot.last_start_mode,
            "lastError": snapshot.last_error[:_MESSAGE_MAX],
        }
    return status


def _ready(seen: Seen) -> tuple[str, str, str]:
    snapshot = seen.snapshot
    if seen.fault is not None:
        return "False", seen.fault.reason, seen.fault.message
    if snapshot is None:
        return "Unknown", "NotSeen", "the scaler has not decided on it yet"
    if snapshot.instances or snapshot.standbys:
        return "True", "Serving" if snapshot.instances else "Standby", ""
    function = seen.resource.function
    if function is None or function.spec.template is None:
        return "True", "NeedsNoPod", ""
    if any(pod.usable for pod in seen.pods):
        return "True", "Placeholder", ""
    if seen.pods_fault is not None:
        return "False", seen.pods_fault.reason, seen.pods_fault.message
    for pod in seen.pods:
        if pod.trouble[0] and not pod.leaving:
            return "False", pod.trouble[0], f"pod {pod.name}: {pod.trouble[1]}"
    return "False", "NoPlaceholder", "no pod waits for an instance" + (" yet" if seen.pods else "")


def _checkpointed(seen: Seen) -> tuple[str, str, str]:
    snapshot, function = seen.snapshot, seen.resource.function
    if function is not None and function.spec.policy.checkpoint == "off":
        return "False", *_OFF
    if snapshot is None:
        return "Unknown", "NotSeen", ""
    if snapshot.checkpoint:
        return "True", "Published", ""
    if snapshot.making_checkpoint:
        return "False", "Making", ""
    if snapshot.last_error.startswith("checkpoint on "):
        return "False", "CannotBeMade", snapshot.last_error
    return "False", "NoneYet", "the first cold start is followed by one"


def _degraded(seen: Seen) -> tuple[str, str, str]:
    snapshot = seen.snapshot
    if snapshot is None or not snapshot.last_error:
        return "False", "NothingFailed", ""
    if snapshot.owed:
        return "True", "StartsFail", snapshot.last_error
    return "False", "Recovered", ""


def _timed(conditions: Sequence[tuple[str, str, str, str]], generation: int, before: Mapping[str, Any], now: str) -> list[Object]:
    known = {item.get("type"): item for item in before.get("conditions") or []}
    result = []
    for kind, value, reason, message in conditions:
        old = known.get(kind) or {}
        since = old.get("lastTransitionTime") if old.get("status") == value else None
        result.append(
            {
                "type": kind,
                "status": value,
                "reason": reason,
                "message": message[:_MESSAGE_MAX],
                "observedGeneration": generation,
                "lastTransitionTime": since or now,
            }
        )
    return result
