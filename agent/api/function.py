"""The Function document: what is scaled.

In: YAML text (``thaw apply -f``) or the plain maps of the wire. Out: :class:`Function`, an immutable value that travels
in commands and in the ``thaw.functions`` topic. The agent runs it (:mod:`agent.restore`), the planner reads its policy.

Field names in YAML are camelCase as in Kubernetes, because the same document is the custom resource there. Only there it has
``spec.template``, the pod of an instance, and a namespace; both come along, because they say what the process is.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal

import msgpack
import msgspec
import yaml

from agent.errors import FunctionInvalid

Port = Annotated[int, msgspec.Meta(ge=1, le=65535)]
Seconds = Annotated[float, msgspec.Meta(gt=0, le=86400)]
NAME = re.compile(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?")
#: Longest text of documents; a broker takes records of 1 MB and the API server objects of 1.5.
DOCUMENT_BYTES_MAX = 1 << 20
#: Levels of a document. Its digest and its way to the agent are recursive.
DEPTH_MAX = 64
_NODES_MAX = 100_000
_INDEX = re.compile("[0-9]{1,9}")
#: libyaml where the package has it: ten times as fast.
_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


class _Struct(msgspec.Struct, frozen=True, forbid_unknown_fields=True, rename="camel", kw_only=True):
    """Common options: immutable, strict, camelCase outside."""


class Readiness(_Struct, frozen=True, kw_only=True):
    """How to tell that an instance answers: an HTTP GET that returns 2xx, or only an accepted connection."""

    #: Path of the GET; empty: an accepted TCP connection is enough.
    path: str = "/"
    #: Longest wait after the command was started cold, s.
    timeout_seconds: Seconds = 60.0


class WarmUp(_Struct, frozen=True, kw_only=True):
    """One request sent before the freeze, so that the checkpoint holds a warm process."""

    path: str = "/"
    method: Literal["GET", "POST"] = "GET"
    body: str = ""
    repeat: Annotated[int, msgspec.Meta(ge=1, le=10000)] = 1


class RootFile(_Struct, frozen=True, kw_only=True):
    """A file or directory of the node that the function sees at ``target``, read-only in origin."""

    #: Absolute after reading; in YAML relative to the document's folder.
    source: str
    target: str


class Limits(_Struct, frozen=True, kw_only=True):
    """What one instance may use."""

    memory_mb: Annotated[int, msgspec.Meta(ge=4, le=1 << 20)] = 512
    #: Requests that one instance takes at once; the planner's unit of demand.
    concurrency: Annotated[int, msgspec.Meta(ge=1, le=100000)] = 1
    #: Processes and threads.
    pids: Annotated[int, msgspec.Meta(ge=1, le=32768)] = 512


class Instances(_Struct, frozen=True, kw_only=True):
    """Bounds on the number of running instances."""

    min: Annotated[int, msgspec.Meta(ge=0, le=10000)] = 0
    max: Annotated[int, msgspec.Meta(ge=1, le=10000)] = 10


class Policy(_Struct, frozen=True, kw_only=True):
    """How the function is held."""

    #: An instance that nobody needs is released after this long, s. Null: for each idle time as the forecast says, which also has
    #: standbys and instances ready before they are asked for.
    idle_seconds: Annotated[float, msgspec.Meta(ge=0, le=86400)] | None = None
    #: Price of a second of start delay against memory (1 GB held for 99.69 s costs 1): what a late answer of this function is worth.
    delay_weight: Annotated[float, msgspec.Meta(ge=0, le=1e6)] = 10.0
    #: ``auto``: checkpoint after the first cold start and restore from then on. ``off``: every start is cold.
    checkpoint: Literal["auto", "off"] = "auto"
    #: Standbys to hold ready at least, in the whole installation: restored and stopped, each at the memory of its working set.
    standby: Annotated[int, msgspec.Meta(ge=0, le=10000)] = 0
    #: How memory comes back: ``lazy`` on access, the working set ahead; ``whole`` before resume; ``auto`` whole for small images.
    memory: Literal["auto", "lazy", "whole"] = "auto"


class TemplateMetadata(_Struct, frozen=True, kw_only=True):
    """What the pods of a function are labelled with."""

    labels: dict[str, str] = {}
    annotations: dict[str, str] = {}


class PodTemplate(_Struct, frozen=True, kw_only=True):
    """The pod of an instance. Its body is Kubernetes' own, checked when a pod is made of it (:mod:`infra.kubernetes.pods`)."""

    metadata: TemplateMetadata = msgspec.field(default_factory=TemplateMetadata)
    spec: dict[str, Any]


#: Fields of a pod and of a container that say where it runs and what it may take, not what runs in it. All others are part of the
#: digest, also those that are not known here: a checkpoint too few is made again, one too many would be restored.
_NOT_SHAPING = {
    *("activeDeadlineSeconds", "affinity", "imagePullSecrets", "nodeName", "nodeSelector", "overhead", "preemptionPolicy", "priority"),
    *("priorityClassName", "readinessGates", "resources", "schedulerName", "schedulingGates", "terminationGracePeriodSeconds"),
    *("tolerations", "topologySpreadConstraints"),
}
_NOT_SHAPING_CONTAINER = {"imagePullPolicy", "resizePolicy", "resources", "terminationMessagePath", "terminationMessagePolicy"}


class FunctionSpec(_Struct, frozen=True, kw_only=True):
    """The body of a Function document."""

    command: Annotated[list[str], msgspec.Meta(min_length=1, max_length=256)]
    port: Port
    working_directory: str = "/"
    environment: dict[str, str] = {}
    #: Directory of the node that is the function's read-only root.
    root: str = "/"
    files: list[RootFile] = []
    readiness: Readiness = msgspec.field(default_factory=Readiness)
    warm_up: list[WarmUp] = []
    #: Sent to the main process before a restored instance serves, if it has a handler: it may read /run/thaw/instance.json again.
    resume_signal: Literal["", "SIGUSR1", "SIGUSR2", "SIGHUP", "SIGWINCH"] = ""
    limits: Limits = msgspec.field(default_factory=Limits)
    instances: Instances = msgspec.field(default_factory=Instances)
    policy: Policy = msgspec.field(default_factory=Policy)
    #: The pod of an instance, in Kubernetes; its image is the root.
    template: PodTemplate | None = None


class Metadata(_Struct, frozen=True, kw_only=True):
    """Identity of the document."""

    name: str
    #: In Kubernetes: where its pods are. Names are unique in an installation all the same.
    namespace: str = ""
    labels: dict[str, str] = {}


class Function(_Struct, frozen=True, kw_only=True):
    """One Function document.

    Attributes:
        metadata: name (a DNS label) and labels.
        spec: what to run and how to hold it.
    """

    api_version: Literal["thaw.dev/v1"] = "thaw.dev/v1"
    kind: Literal["Function"] = "Function"
    metadata: Metadata
    spec: FunctionSpec

    @property
    def name(self) -> str:
        """The function's name, unique in an installation."""
        return self.metadata.name

    @property
    def digest(self) -> str:
        """Names what the process is (not how it is scaled): a checkpoint of another digest is not of this function.

        Hex SHA-256 over the fields that shape the process. Contents of ``files`` are digested by the agent, which has them.
        """
        spec = self.spec
        shape: list[Any] = [
            self.name,
            spec.command,
            spec.port,
            spec.working_directory,
            sorted(spec.environment.items()),
            spec.root,
            [(item.source, item.target) for item in spec.files],
        ]
        if spec.template is not None:
            # With the namespace: what one tenant's process held must not be restored for another.
            shape += [self.metadata.namespace, _shape(spec.template.spec)]
        return hashlib.sha256(msgpack.packb(shape)).hexdigest()


def read_yaml(text: str, origin: str, base: Path) -> list[Function]:
    """Read one or more Function documents.

    Args:
        text: YAML, documents separated by ``---``.
        origin: file name for messages.
        base: folder that relative ``files[].source`` and ``root`` refer to.

    Raises:
        FunctionInvalid: not YAML, not a Function, a wrong field; the message is ``origin:line: field: what``.
    """
    if len(text) > DOCUMENT_BYTES_MAX:
        raise FunctionInvalid(f"{origin}:1: {len(text)} characters; {DOCUMENT_BYTES_MAX} is the most")
    try:
        documents = [(node, value) for node, value in _documents(text) if value is not None]
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = mark.line + 1 if mark else 1
        raise FunctionInvalid(f"{origin}:{line}: not valid YAML: {getattr(error, 'problem', error)}") from error
    except (RecursionError, ValueError, TypeError, LookupError, AttributeError, OverflowError) as error:
        # What the library's constructors raise for a value that does not fit its tag, such as an empty !!int.
        raise FunctionInvalid(f"{origin}:1: not valid YAML: {error}") from error
    if not documents:
        raise FunctionInvalid(f"{origin}:1: no document; expected kind: Function")
    functions = []
    for node, value in documents:
        if isinstance(value, dict):
            value.pop("status", None)  # what ``thaw get -o yaml`` adds, and what Kubernetes ignores too
        try:
            functions.append(_resolve(from_builtins(value), base))
        except FunctionInvalid as error:
            raise FunctionInvalid(f"{origin}:{_line(node, str(error))}: {error}") from error
    return functions


def _documents(text: str) -> Iterator[tuple[yaml.Node, Any]]:
    """Each document, as nodes, which know their lines, and as plain values."""
    loader = _LOADER(text)
    try:
        while loader.check_node():
            node = loader.get_node()
            assert node is not None  # there is one, as it said
            _measure(node, {}, 0)
            yield node, loader.construct_document(node)
    finally:
        loader.dispose()


def _measure(node: yaml.Node, known: dict[int, int], depth: int) -> int:
    """How many nodes there are when every alias is written out: a few lines of aliases of aliases can stand for billions."""
    if id(node) in known:
        size = known[id(node)]
    elif depth > DEPTH_MAX:
        raise ValueError(f"more than {DEPTH_MAX} levels")
    else:
        known[id(node)] = _NODES_MAX  # met again below itself: it has no end
        size = 1
        if isinstance(node, yaml.MappingNode):
            size += sum(_measure(part, known, depth + 1) for pair in node.value for part in pair)
        elif isinstance(node, yaml.SequenceNode):
            size += sum(_measure(part, known, depth + 1) for part in node.value)
        known[id(node)] = size
    if size >= _NODES_MAX:
        raise ValueError(f"its aliases stand for more than {_NODES_MAX} values")
    return size


def from_builtins(value: Any) -> Function:
    """Validate plain maps as a Function.

    Raises:
        FunctionInvalid: the message begins with the field's path, such as ``spec.port: …``.
    """
    try:
        function = msgspec.convert(value, Function)
    except RecursionError as error:
        raise FunctionInvalid(f"document: more than {DEPTH_MAX} levels") from error
    except msgspec.ValidationError as error:
        text, _, path = str(error).partition(" - at `")
        field = path.rstrip("`").removeprefix("$").lstrip(".") or "document"
        raise FunctionInvalid(f"{field}: {text}") from error
    check(function)
    return function


def to_builtins(function: Function) -> Any:
    """The plain maps of the wire and of ``thaw get -o yaml``."""
    return msgspec.to_builtins(function)


def check(function: Function) -> None:
    """What types cannot say.

    Raises:
        FunctionInvalid: the message begins with the field's path.
    """
    spec = function.spec
    _check_text(function)
    if not NAME.fullmatch(function.name):
        raise FunctionInvalid(f"metadata.name: {function.name!r} must be lower-case letters, digits and dashes, 63 at most, as in DNS")
    if not spec.command[0]:
        raise FunctionInvalid("spec.command: the program's name is empty")
    if any("\0" in part for part in [*spec.command, *spec.environment, *spec.environment.values()]):
        raise FunctionInvalid("spec.command: NUL characters cannot be passed to a program")
    for name in spec.environment:
        if not name or "=" in name:
            raise FunctionInvalid(f"spec.environment: {name!r} is not a variable name")
    if not spec.working_directory.startswith("/"):
        raise FunctionInvalid(f"spec.workingDirectory: {spec.working_directory!r} must be an absolute path")
    if spec.instances.min > spec.instances.max:
        raise FunctionInvalid(f"spec.instances: min {spec.instances.min} is above max {spec.instances.max}")
    if spec.readiness.path and not spec.readiness.path.startswith("/"):
        raise FunctionInvalid(f"spec.readiness.path: {spec.readiness.path!r} must begin with / or be empty")
    if spec.template is not None:
        _check_template(spec.template.spec)
    for index, item in enumerate(spec.files):
        target = PurePosixPath(item.target)
        if not target.is_absolute() or ".." in target.parts or len(target.parts) == 1:  # / and //
            raise FunctionInvalid(f"spec.files[{index}].target: {item.target!r} must be an absolute path without ..")
        if target.parts[1] in ("proc", "sys", "dev", "run", "tmp"):
            raise FunctionInvalid(f"spec.files[{index}].target: /{target.parts[1]} is made by the sandbox; choose another")
    for index, request in enumerate(spec.warm_up):
        if not request.path.startswith("/") or any(char in request.path for char in " \r\n"):
            raise FunctionInvalid(f"spec.warmUp[{index}].path: {request.path!r} must begin with / and hold no white space")


def _check_template(pod: dict[str, Any]) -> None:
    containers = pod.get("containers")
    if not isinstance(containers, list) or not containers:
        raise FunctionInvalid("spec.template.spec.containers: the function's container is missing")
    for kind in ("containers", "initContainers"):
        items = pod.get(kind) or []
        if not isinstance(items, list):
            raise FunctionInvalid(f"spec.template.spec.{kind}: must be a list")
        for index, item in enumerate(items):
            if not isinstance(item, dict):
                raise FunctionInvalid(f"spec.template.spec.{kind}[{index}]: must be a container")
            for field in ("name", "image"):
                if not isinstance(item.get(field), str) or not item[field]:
                    raise FunctionInvalid(f"spec.template.spec.{kind}[{index}].{field}: must be given")
    if _check_plain(pod, "spec.template.spec", 0) > _NODES_MAX:
        raise FunctionInvalid(f"spec.template.spec: more than {_NODES_MAX} values")


def _check_text(function: Function) -> None:
    """Half of a surrogate pair is a character for YAML and JSON, and cannot be sent anywhere."""
    metadata, spec = function.metadata, function.spec
    texts = [metadata.name, metadata.namespace, *metadata.labels, *metadata.labels.values(), *spec.command, spec.working_directory]
    texts += [*spec.environment, *spec.environment.values(), spec.root, spec.readiness.path]
    texts += [text for item in spec.files for text in (item.source, item.target)]
    texts += [text for request in spec.warm_up for text in (request.path, request.body)]
    if spec.template is not None:
        labels = spec.template.metadata
        texts += [*labels.labels, *labels.labels.values(), *labels.annotations, *labels.annotations.values()]
    for text in texts:
        if not _sendable(text):
            raise FunctionInvalid(f"document: {text!r} is not text")
    for name, text in (("spec.root", spec.root), *((f"spec.files[{at}].source", item.source) for at, item in enumerate(spec.files))):
        if "\0" in text:
            raise FunctionInvalid(f"{name}: {text!r} holds a NUL character")


def _sendable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _check_plain(value: Any, where: str, depth: int) -> int:
    """Only what JSON has, and what can be sent: YAML has dates too, and numbers of any size. Returns how many values there are."""
    count = 1
    if isinstance(value, (dict, list)) and len(value) > _NODES_MAX:
        return len(value)
    if depth > DEPTH_MAX:
        raise FunctionInvalid(f"spec.template.spec: more than {DEPTH_MAX} levels")
    if isinstance(value, dict):
        for key, item in value.items():
            if not isinstance(key, str) or not _sendable(key):
                raise FunctionInvalid(f"{where}: the name {key!r} must be a string")
            count += _check_plain(item, f"{where}.{key}", depth + 1)
    elif isinstance(value, list):
        for index, item in enumerate(value):
            count += _check_plain(item, f"{where}[{index}]", depth + 1)
    elif isinstance(value, str) and not _sendable(value):
        raise FunctionInvalid(f"{where}: {value!r} is not text")
    elif value is not None and not isinstance(value, (str, bool, float)) and not (isinstance(value, int) and abs(value) < 1 << 63):
        raise FunctionInvalid(f"{where}: {value!r} must be a string, a number or true or false")
    return count


def _shape(pod: dict[str, Any]) -> Any:
    """What of a pod says what runs in it, in an order of its own."""
    shape = {key: value for key, value in pod.items() if key not in _NOT_SHAPING}
    for kind in ("containers", "initContainers"):
        shape[kind] = [{key: value for key, value in item.items() if key not in _NOT_SHAPING_CONTAINER} for item in pod.get(kind) or []]
    return _ordered(shape)


def _ordered(value: Any) -> Any:
    """The same with every map's keys in order: two that are equal give the same bytes."""
    if isinstance(value, dict):
        return [[key, _ordered(value[key])] for key in sorted(value)]
    return [_ordered(item) for item in value] if isinstance(value, list) else value


def _resolve(function: Function, base: Path) -> Function:
    spec = function.spec
    files = [msgspec.structs.replace(item, source=str((base / item.source).resolve())) for item in spec.files]
    root = str((base / spec.root).resolve())
    return msgspec.structs.replace(function, spec=msgspec.structs.replace(spec, files=files, root=root))


def _line(node: yaml.Node, message: str) -> int:
    """Line of the deepest node that the field path at the start of ``message`` leads to."""
    path = message.partition(":")[0]
    unknown = re.search(r"unknown field `([^`]+)`", message)
    steps: list[str] = re.findall(r"[^.\[\]]+", path) if path != "document" else []
    if unknown:
        steps.append(unknown.group(1))
    line = node.start_mark.line + 1
    for step in steps:
        found: yaml.Node | None = None
        if isinstance(node, yaml.MappingNode):
            for key, value in node.value:
                if key.value == step:
                    line, found = key.start_mark.line + 1, value
        elif isinstance(node, yaml.SequenceNode) and _INDEX.fullmatch(step) and int(step) < len(node.value):
            found = node.value[int(step)]
            line = found.start_mark.line + 1
        if found is None:
            break
        node = found
    return line
