"""Functions as resources of the API server, in the place of the topic ``thaw.functions``.

In: what :mod:`infra.kubernetes.watch` tells of ``functions.thaw.dev``. Out: :class:`FunctionApplied` and :class:`FunctionDeleted` for the
planner, and the resources themselves for status and pods (:mod:`.operator`). Pure but for what it calls.

A resource that is no valid document has a :class:`Fault`, which becomes its status; the document that it replaced stays in force. A
function's name is unique in the installation, because demand knows nothing else of it: of resources of one name in several namespaces
the oldest is the function, the others have a fault.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass

from agent.api.function import Function, from_builtins
from agent.errors import FunctionInvalid
from infra.errors import PodTemplateInvalid
from infra.kubernetes.client import Object
from infra.kubernetes.watch import Changed, Listed
from scaler.edges.kubernetes import pods
from scaler.events import FunctionApplied, FunctionDeleted

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Fault:
    """Why a resource is no function: a word, and a sentence that names the field."""

    reason: str
    message: str


@dataclass(frozen=True)
class Resource:
    """One resource as the server has it.

    Attributes:
        value: the object.
        function: the document in it; None: it is none.
        fault: why it is not in force as it is.
        manifest: digest of the pod that is made of it; empty: it has no template.
    """

    value: Object
    function: Function | None = None
    fault: Fault | None = None
    manifest: str = ""

    @property
    def name(self) -> str:
        """The function's name."""
        return str(self.value["metadata"]["name"])

    @property
    def namespace(self) -> str:
        """Where it is, and its pods."""
        return str(self.value["metadata"]["namespace"])

    @property
    def uid(self) -> str:
        """Tells it from another one of that name."""
        return str(self.value["metadata"]["uid"])

    @property
    def age(self) -> tuple[str, str]:
        """Orders resources of one name: the first is the function."""
        return str(self.value["metadata"].get("creationTimestamp", "")), self.namespace


def read(value: Object, agent_image: str) -> Resource:
    """A resource of the server, with its fault if it has one."""
    metadata, spec = value["metadata"], value.get("spec")
    document = {
        "apiVersion": value.get("apiVersion"),
        "kind": value.get("kind"),
        "metadata": {"name": metadata["name"], "namespace": metadata["namespace"], "labels": metadata.get("labels") or {}},
        "spec": spec,
    }
    try:
        function = from_builtins(document)
        if function.spec.template is None:
            return Resource(value, function)
        made = pods.manifest(value, digest=function.digest, agent_image=agent_image, resizable=True)
        return Resource(value, function, manifest=made["metadata"]["annotations"][pods.MANIFEST_ANNOTATION])
    except FunctionInvalid as error:
        return Resource(value, fault=Fault("InvalidDocument", str(error)))
    except PodTemplateInvalid as error:
        return Resource(value, fault=Fault("InvalidTemplate", str(error)))
    except (AttributeError, KeyError, TypeError, ValueError, RecursionError) as error:
        # The server lets anything into the parts of a template that it has no schema for.
        return Resource(value, fault=Fault("InvalidTemplate", f"spec.template.spec: cannot be read: {type(error).__name__}: {error}"))


class FunctionTable:
    """All resources, and what the planner was told of them.

    Args:
        agent_image: see :func:`scaler.edges.kubernetes.pods.manifest`.
        sink: is told what the planner has to know.
        changed: is told which function's resources are others than before.
    """

    def __init__(self, agent_image: str, sink: Callable[[FunctionApplied | FunctionDeleted], None], changed: Callable[[str], None]) -> None:
        self._agent_image = agent_image
        self._sink = sink
        self._changed = changed
        #: name → uid → resource
        self._by_name: dict[str, dict[str, Resource]] = {}
        #: name → the resource whose document the planner has
        self._applied: dict[str, Resource] = {}

    def names(self) -> list[str]:
        """Of all functions, also of those that are none yet."""
        return list(self._by_name)

    def resources(self, name: str) -> list[Resource]:
        """All resources of a name; the first is the function."""
        return sorted(self._by_name.get(name, {}).values(), key=lambda item: item.age)

    def applied(self, name: str) -> Resource | None:
        """The resource whose document is in force: it may be older than the newest, which may have a fault."""
        return self._applied.get(name)

    def fault(self, resource: Resource) -> Fault | None:
        """Why a resource is not in force as it is."""
        first = self.resources(resource.name)[:1]
        if first and first[0].uid != resource.uid:
            taken = f"metadata.name: the function {resource.name} of namespace {first[0].namespace} is older; names are unique"
            return Fault("NameTaken", taken)
        return resource.fault

    def take(self, news: Listed | Changed) -> None:
        """What the server has told."""
        if isinstance(news, Changed):
            self._put(news.value, gone=news.gone)
            return
        present = {item["metadata"]["uid"] for item in news.items}
        for known in [item for group in self._by_name.values() for item in group.values()]:
            if known.uid not in present:
                self._put(known.value, gone=True)
        for item in news.items:
            self._put(item, gone=False)

    def _put(self, value: Object, *, gone: bool) -> None:
        name, uid = str(value["metadata"]["name"]), str(value["metadata"]["uid"])
        group = self._by_name.setdefault(name, {})
        # One that is being deleted is on its way out, whatever keeps it.
        if gone or "deletionTimestamp" in value["metadata"]:
            group.pop(uid, None)
        else:
            known = group.get(uid)
            if known is not None and _same(known.value, value):
                group[uid] = Resource(value, known.function, known.fault, known.manifest)
                return
            group[uid] = read(value, self._agent_image)
            if (fault := group[uid].fault) is not None:
                logger.warning("Function %s of namespace %s: %s", name, value["metadata"]["namespace"], fault.message)
        if not group:
            del self._by_name[name]
        self._settle(name)
        self._changed(name)

    def _settle(self, name: str) -> None:
        """Tell the planner what it does not know yet."""
        first = next(iter(self.resources(name)), None)
        before = self._applied.get(name)
        if first is None or (before is not None and before.uid != first.uid):
            if before is not None:
                del self._applied[name]
                self._sink(FunctionDeleted(name=name))
            before = None
        if first is not None and first.function is not None:
            self._applied[name] = first
            if before is None or before.function != first.function:
                self._sink(FunctionApplied(function=first.function))


def _same(one: Object, other: Object) -> bool:
    """Nothing but status has changed."""
    labels = one["metadata"].get("labels") == other["metadata"].get("labels")
    return labels and one["metadata"].get("generation") == other["metadata"].get("generation") and one.get("spec") == other.get("spec")
