"""Placeholder pods as data: what a pod object says, and what is to be done about the pods of a function. Pure.

In: pod objects and a Function resource. Out: :class:`Pod`, manifests, and a :class:`Plan` for :mod:`.controller`. The manifest itself is
:mod:`infra.kubernetes.pods`'; here it is given what only its life needs: honest requests and the digest of what it was made of.

Requests. A placeholder asks for :data:`WAITING` only, so that hundreds fit on a node; while an instance runs in it, it asks for what
the function's template does (what it shows then is what the scheduler counts), and afterwards for little again. Limits are the
function's from the beginning: a start must not wait for the API server.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any

from infra.kubernetes import pods as placeholders
from infra.kubernetes.client import Object

#: Names the manifest: another template, limit or agent image gives another.
MANIFEST_ANNOTATION = "thaw.dev/manifest"
#: What the pod requests while an instance runs in it, as JSON.
REQUESTS_ANNOTATION = "thaw.dev/requests"
#: What an empty placeholder requests of these, at most: a stopped process of one page, and a standby's working set.
WAITING = {"cpu": "10m", "memory": "16Mi"}
#: Reason of the condition ``thaw.dev/restored`` when it is false: nothing may be put into this pod any more.
USED_UP = "Ended"
#: The same: something is in it, or on its way, that has not answered yet.
OCCUPIED = ("Standby", "Starting", "Freezing")

_UNITS = {"": 1, "k": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "P": 10**15, "E": 10**18}
_UNITS |= {"Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40, "Pi": 2**50, "Ei": 2**60}
_FRACTIONS = {"m": Decimal(1) / 1000, "u": Decimal(1) / 10**6, "n": Decimal(1) / 10**9}


@dataclass(frozen=True)
class Pod:
    """What matters of a placeholder pod.

    Attributes:
        function: its label.
        owner: uid of the Function that it was made for.
        node: empty: not scheduled.
        digest: of the document that it was made for.
        manifest: digest of what it was made of.
        leaving: it is being deleted.
        running: its container runs.
        finished: it ran and never will again.
        restored: an instance has answered in it.
        occupied: something is in it, or will be soon.
        used_up: nothing may be put into it any more: a pod is used once, because what an instance wrote into its volumes stays.
        requests: what its container requests now.
        full: what it shall request while an instance runs in it.
        resize_trouble: why the node has not changed its requests as asked.
        trouble: why it does not run: reason and message.
    """

    function: str
    namespace: str
    name: str
    uid: str
    owner: str = ""
    node: str = ""
    created: str = ""
    digest: str = ""
    manifest: str = ""
    leaving: bool = False
    running: bool = False
    finished: bool = False
    restored: bool = False
    occupied: bool = False
    used_up: bool = False
    requests: Mapping[str, str] = field(default_factory=dict)
    full: Mapping[str, str] = field(default_factory=dict)
    resize_trouble: str = ""
    trouble: tuple[str, str] = ("", "")

    @property
    def usable(self) -> bool:
        """An agent can put something into it, or has."""
        return self.running and bool(self.node) and not (self.leaving or self.finished or self.used_up)


@dataclass(frozen=True)
class Wanted:
    """The pods that a function shall have.

    Attributes:
        owner: uid of the Function.
        digest: of its document.
        manifest: digest of the manifest.
        count: how many, those in use included.
        settled: nothing is on its way to a node, so an empty placeholder is known to be empty.
        patient: more than ``count`` are kept; they have not been too many for long enough.
    """

    owner: str
    digest: str
    manifest: str
    count: int
    settled: bool = True
    patient: bool = False


@dataclass(frozen=True)
class Plan:
    """What to do.

    Attributes:
        create: how many pods.
        delete: which pods, and why.
        resize: pods whose requests are to become these.
        surplus: pods that are too many, whether they may be deleted now or not.
    """

    create: int = 0
    delete: Sequence[tuple[Pod, str]] = ()
    resize: Sequence[tuple[Pod, Mapping[str, str]]] = ()
    surplus: int = 0


def read(value: Object) -> Pod:
    """A pod object."""
    metadata, spec, status = value["metadata"], value.get("spec") or {}, value.get("status") or {}
    annotations, labels = metadata.get("annotations") or {}, metadata.get("labels") or {}
    conditions = {item["type"]: item for item in status.get("conditions") or []}
    gate = conditions.get(placeholders.GATE) or {}
    phase = status.get("phase", "Pending")
    restored = gate.get("status") == "True"
    containers: list[Object] = spec.get("containers") or []
    own = next((item for item in containers if item.get("name") == placeholders.CONTAINER), {})
    requests = (own.get("resources") or {}).get("requests") or {}
    container: Object = next((item for item in status.get("containerStatuses") or [] if item.get("name") == placeholders.CONTAINER), {})
    state = container.get("state") or {}
    resize = conditions.get("PodResizePending") or {}
    return Pod(
        function=labels.get(placeholders.FUNCTION_LABEL, ""),
        namespace=metadata["namespace"],
        name=metadata["name"],
        uid=metadata["uid"],
        owner=next((item["uid"] for item in metadata.get("ownerReferences") or [] if item.get("kind") == "Function"), ""),
        node=spec.get("nodeName") or "",
        created=metadata.get("creationTimestamp") or "",
        digest=annotations.get(placeholders.DIGEST_ANNOTATION, ""),
        manifest=annotations.get(MANIFEST_ANNOTATION, ""),
        leaving="deletionTimestamp" in metadata,
        running=phase == "Running" and "running" in state,
        finished=phase in ("Succeeded", "Failed"),
        restored=restored,
        occupied=restored or gate.get("reason") in OCCUPIED,
        # Its first process ends with the instance, so a container that was started again had one.
        used_up=bool(container.get("restartCount")) or "terminated" in state or (not restored and gate.get("reason") == USED_UP),
        requests=dict(requests),
        full=_full(annotations, requests),
        resize_trouble=f"{resize.get('reason')}: {resize.get('message', '')}" if resize.get("status") == "True" else "",
        trouble=("", "") if phase == "Running" else _trouble(status, conditions),
    )


def manifest(value: Object, *, digest: str, agent_image: str, resizable: bool) -> Object:
    """The manifest of a placeholder pod of a Function resource.

    Args:
        value: the resource.
        digest: of its document.
        agent_image: see :func:`infra.kubernetes.pods.placeholder`.
        resizable: the server can change requests later; else they are the full ones from the beginning.

    Raises:
        PodTemplateInvalid: the template can't be a placeholder.
    """
    pod = placeholders.placeholder(value, digest=digest, agent_image=agent_image)
    named = hashlib.sha256(json.dumps(pod, sort_keys=True).encode()).hexdigest()[:16]
    own = next(item for item in pod["spec"]["containers"] if item["name"] == placeholders.CONTAINER)
    resources = own["resources"]
    # What is not requested is requested up to its limit: the server's own rule.
    full = {**(resources.get("limits") or {}), **(resources.get("requests") or {})}
    waiting = {key: _smaller(full[key], most) for key, most in WAITING.items() if key in full}
    resources["requests"] = {**full, **waiting} if resizable else full
    pod["metadata"]["annotations"] |= {
        MANIFEST_ANNOTATION: named,
        REQUESTS_ANNOTATION: json.dumps({key: str(full[key]) for key in WAITING if key in full}, sort_keys=True),
    }
    return pod


def plan(pods: Sequence[Pod], wanted: Wanted | None, held: Container[str] = ()) -> Plan:
    """What is to be done about the pods of a function.

    Args:
        pods: all that exist.
        wanted: None: the function is gone.
        held: names of instances and standbys that its agents have; a pod of that name is occupied.
    """
    alive = [pod for pod in pods if not pod.leaving]
    if wanted is None:
        return Plan(delete=[(pod, "its function is gone") for pod in alive])
    delete = [(pod, "it has ended") for pod in alive if pod.finished]
    used = [pod for pod in alive if pod.used_up and not pod.finished]
    delete += [(pod, "it was used") for pod in used if not (pod.occupied or pod.name in held)]
    rest = [pod for pod in alive if not (pod.finished or pod.used_up)]
    resize = [(pod, requests) for pod in rest if (requests := _requests(pod, busy=pod.restored))]
    ours = [pod for pod in rest if pod.owner == wanted.owner and pod.digest == wanted.digest]
    empty = [pod for pod in rest if not (pod.occupied or pod.name in held)]
    other = [pod for pod in empty if pod.owner != wanted.owner or pod.digest != wanted.digest]
    delete += [(pod, "it is of an older document") for pod in other]
    # An older manifest of the same process serves until its successor does.
    old = [pod for pod in empty if pod in ours and pod.manifest != wanted.manifest]
    new = [pod for pod in ours if pod not in old]
    if sum(pod.running for pod in new) >= wanted.count:
        delete += [(pod, "it is of an older template") for pod in old]
    surplus = max(0, len(new) - wanted.count)
    if wanted.settled and not wanted.patient:
        candidates = [pod for pod in empty if pod in new]
        # Those that serve least first: not yet running, then the newest.
        candidates.sort(key=lambda pod: (pod.created, pod.name), reverse=True)
        candidates.sort(key=lambda pod: pod.running)
        delete += [(pod, "it is one too many") for pod in candidates[:surplus]]
    return Plan(create=max(0, wanted.count - len(new)), delete=delete, resize=resize, surplus=surplus)


def usable_by_node(pods: Sequence[Pod], owner: str, digest: str) -> dict[str, int]:
    """Pods of a document that agents can use or do, by node."""
    nodes: dict[str, int] = {}
    for pod in pods:
        if pod.usable and pod.digest == digest and pod.owner == owner:
            nodes[pod.node] = nodes.get(pod.node, 0) + 1
    return nodes


def quantity(text: object) -> Decimal:
    """The number that a quantity of Kubernetes is, such as ``16Mi``; -1 when it is none."""
    word = str(text)
    for cut in (2, 1, 0):
        unit = word[len(word) - cut :] if cut else ""
        if cut <= len(word) and (unit in _UNITS or unit in _FRACTIONS):
            try:
                number = Decimal(word[: len(word) - cut]) * (_FRACTIONS[unit] if unit in _FRACTIONS else _UNITS[unit])
            except ArithmeticError:  # no number, or one that is too long
                return Decimal(-1)
            return number if number.is_finite() else Decimal(-1)
    return Decimal(-1)


def _smaller(one: object, other: str) -> str:
    return str(one) if quantity(one) <= quantity(other) else other


def _requests(pod: Pod, *, busy: bool) -> dict[str, str]:
    """What the pod shall request beside what it does; empty: it does."""
    wanted = {key: value if busy or key not in WAITING else _smaller(value, WAITING[key]) for key, value in pod.full.items()}
    return {key: value for key, value in wanted.items() if quantity(value) != quantity(pod.requests.get(key, 0))}


def _full(annotations: Mapping[str, str], requests: Mapping[str, Any]) -> dict[str, str]:
    try:
        value = json.loads(annotations.get(REQUESTS_ANNOTATION, "{}"))
    except ValueError:
        return {}
    # A resource can't be added to a pod's requests nor taken away.
    return {str(key): str(text) for key, text in value.items() if key in requests} if isinstance(value, dict) else {}


def _trouble(status: Mapping[str, Any], conditions: Mapping[str, Mapping[str, Any]]) -> tuple[str, str]:
    scheduled = conditions.get("PodScheduled") or {}
    if scheduled.get("status") == "False":
        return str(scheduled.get("reason") or "Unschedulable"), str(scheduled.get("message") or "")
    for item in [*(status.get("initContainerStatuses") or []), *(status.get("containerStatuses") or [])]:
        waiting = (item.get("state") or {}).get("waiting") or {}
        if waiting.get("reason") and waiting["reason"] not in ("PodInitializing", "ContainerCreating"):
            return str(waiting["reason"]), f"container {item.get('name')}: {waiting.get('message', '')}"
    return ("", "") if status.get("phase") != "Failed" else (str(status.get("reason") or "Failed"), str(status.get("message") or ""))
