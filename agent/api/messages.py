"""Commands to an agent and reports from it.

In: maps decoded by :mod:`agent.api.connection`. Out: typed structs for :mod:`agent.server` (commands) and for the scaler's
agents edge (reports). One stream per scaler and node; everything on it is one of these, told apart by ``type``.

Order on a stream: each side sends :class:`Hello` first. To a scaler the agent then sends :class:`Inventory`, and reports as things
happen. To a watcher (a router, the load generator) it sends :class:`Endpoints` and then each :class:`EndpointUp` and
:class:`EndpointDown`, so that an address is known one hop after the first response and no broker is on that path.
"""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

from agent.api.function import Function, check
from agent.api.records import StartRecord
from agent.errors import FunctionInvalid, ProtocolError

PROTOCOL_VERSION = 1
#: Of a pointer to a checkpoint (:mod:`agent.store.pointer`): about ns since 1970; 0: not known.
Generation = Annotated[int, msgspec.Meta(ge=0, le=1 << 62)]


class Message(msgspec.Struct, frozen=True, kw_only=True, tag_field="type"):
    """Anything on the stream."""


class Hello(Message, frozen=True, kw_only=True, tag="hello"):
    """First frame of each side."""

    version: int = PROTOCOL_VERSION
    identity: str
    role: Literal["scaler", "watcher", "agent"]
    capabilities: list[str] = []


# Commands


class Command(Message, frozen=True, kw_only=True):
    """What a scaler asks of an agent.

    Attributes:
        id: names the command; the agent carries each id out once and repeats its report on a repeated command.
        deadline_ns: wall clock ns after which the agent gives up, cleans up and reports failure.
        traceparent: W3C trace context of the start that this belongs to; empty when there is none.
        shard: Kafka partition that the function belongs to.
        epoch: generation of the shard's owner; the agent refuses one older than it has seen.
        generation: of the newest pointer to a checkpoint of the function that any node has told of; the agent takes no older one.
    """

    id: str
    deadline_ns: int
    traceparent: str = ""
    shard: int = 0
    epoch: int = 0
    generation: Generation = 0


class Fetch(Command, frozen=True, kw_only=True, tag="fetch"):
    """Bring the function's current checkpoint, if there is one, to rung ``cached``. Answer: FetchDone or CommandFailed."""

    function: Function


class Prepare(Command, frozen=True, kw_only=True, tag="prepare"):
    """Make one standby of the function's current checkpoint, in the background. Answer: PrepareDone or CommandFailed."""

    function: Function


class Start(Command, frozen=True, kw_only=True, tag="start"):
    """Bring up one instance by the fastest way the node has: a standby, its cache, S3, the command. Answer: StartDone or StartFailed.

    A standby that is used up keeps its name: ``StartDone.instance.instance`` is what ``PrepareDone.standby.standby`` was.
    """

    function: Function


class Release(Command, frozen=True, kw_only=True, tag="release"):
    """End an instance, when the requests in progress are answered, or a standby, and everything of it.

    The agent waits no longer than ``agent.drain_timeout_s``, and ends it in time before the deadline. Answer: InstanceExited with reason
    ``released``.
    """

    instance: str


class Evict(Command, frozen=True, kw_only=True, tag="evict"):
    """Drop the function's image from the node's cache. Answer: Evicted."""

    function_name: str


class MakeCheckpoint(Command, frozen=True, kw_only=True, tag="checkpoint"):
    """Freeze a fresh warmed-up instance and publish it. Answer: CheckpointPublished or CommandFailed."""

    function: Function


# Reports


class InstanceInfo(msgspec.Struct, frozen=True, kw_only=True):
    """A running instance as its node knows it."""

    instance: str
    function: str
    function_digest: str
    address: str
    start_mode: str
    started_ns: int
    command_id: str


class StandbyInfo(msgspec.Struct, frozen=True, kw_only=True):
    """An instance that is restored and stopped, as its node knows it.

    Attributes:
        standby: its name; the instance keeps it when it is thawed.
        pss_bytes: memory that it holds alone, and its share of what it shares (proportional set size), when it was made.
    """

    standby: str
    function: str
    function_digest: str
    checkpoint: str
    pss_bytes: int
    made_ns: int
    command_id: str


class CheckpointInfo(msgspec.Struct, frozen=True, kw_only=True):
    """A checkpoint in a node's cache.

    Attributes:
        generation: of the pointer that named it; 0: this agent has not read the pointer yet.
    """

    function: str
    function_digest: str
    checkpoint: str
    image_bytes: int
    complete: bool
    generation: Generation = 0


class CommandTaken(Message, frozen=True, kw_only=True, tag="command_taken"):
    """An agent begins a command that takes a while; for the scalers that did not send it, one of which may decide next.

    It is no answer: that has the id as its ``command_id``.

    Attributes:
        id: the command's.
        kind: ``start``, ``prepare`` or ``checkpoint``.
        until_ns: the command's deadline.
    """

    id: str
    kind: Literal["start", "prepare", "checkpoint"]
    function: str
    function_digest: str
    until_ns: int


class Inventory(Message, frozen=True, kw_only=True, tag="inventory"):
    """Everything that exists on the node, and what is being made; the agent is the authority."""

    node: str
    memory_mb: int
    memory_free_mb: int
    instances: list[InstanceInfo] = []
    standbys: list[StandbyInfo] = []
    checkpoints: list[CheckpointInfo] = []
    underway: list[CommandTaken] = []


class PrepareDone(Message, frozen=True, kw_only=True, tag="prepare_done"):
    """A standby waits. It ends with a StartDone of the same name, or with InstanceExited."""

    command_id: str
    standby: StandbyInfo
    #: Seconds of each step.
    seconds: dict[str, float] = {}


class StartDone(Message, frozen=True, kw_only=True, tag="start_done"):
    """An instance answered for the first time."""

    command_id: str
    instance: InstanceInfo
    record: StartRecord


class StartFailed(Message, frozen=True, kw_only=True, tag="start_failed"):
    """No instance came of a start; nothing of it is left on the node."""

    command_id: str
    function: str
    #: AgentError.reason of the cause.
    reason: str
    message: str
    #: The agent had no room or did not accept the sender: another node may do.
    refused: bool = False
    record: StartRecord | None = None


class InstanceExited(Message, frozen=True, kw_only=True, tag="instance_exited"):
    """An instance or a standby is gone and nothing of it is left."""

    instance: str
    function: str
    #: ``released``, ``exited``, ``killed`` or ``pager_lost``.
    reason: str
    exit_code: int | None = None
    command_id: str = ""
    #: What an instance held just before it was released, idle (proportional set size); 0: not measured.
    pss_bytes: int = 0


class FetchDone(Message, frozen=True, kw_only=True, tag="fetch_done"):
    """The function's checkpoint state is known; ``checkpoint`` is None when none is published for this digest."""

    command_id: str
    function: str
    function_digest: str
    checkpoint: CheckpointInfo | None = None


class CheckpointPublished(Message, frozen=True, kw_only=True, tag="checkpoint_published"):
    """A new checkpoint is current and on this node."""

    command_id: str
    function: str
    function_digest: str
    checkpoint: CheckpointInfo
    seconds: dict[str, float] = {}


class Evicted(Message, frozen=True, kw_only=True, tag="evicted"):
    """The image is not in the node's cache (any more)."""

    command_id: str
    function: str


class CommandFailed(Message, frozen=True, kw_only=True, tag="command_failed"):
    """A fetch, prepare, checkpoint, release or evict failed; nothing of it is left."""

    command_id: str
    function: str
    command: str
    reason: str
    message: str
    refused: bool = False


class Endpoint(msgspec.Struct, frozen=True):
    """Where an instance answers: ``host:port``."""

    function: str
    instance: str
    address: str
    start_mode: str


class Endpoints(Message, frozen=True, kw_only=True, tag="endpoints"):
    """All endpoints of the node, at the start of a watch."""

    node: str
    endpoints: list[Endpoint]


class EndpointUp(Message, frozen=True, kw_only=True, tag="endpoint_up"):
    """An instance answers."""

    endpoint: Endpoint


class EndpointDown(Message, frozen=True, kw_only=True, tag="endpoint_down"):
    """An instance must get no new requests.

    Attributes:
        drain_s: requests that run there are answered for so long at most. When they are, or the time is over, it comes again with 0: the
            instance is gone, maybe without a word to who is connected to it.
    """

    function: str
    instance: str
    drain_s: float = 0.0


AgentCommand = Fetch | Prepare | Start | Release | Evict | MakeCheckpoint
AgentReport = (
    Inventory
    | CommandTaken
    | PrepareDone
    | StartDone
    | StartFailed
    | InstanceExited
    | FetchDone
    | CheckpointPublished
    | Evicted
    | CommandFailed
    | Endpoints
    | EndpointUp
    | EndpointDown
)
AnyMessage = Hello | AgentCommand | AgentReport


def encode(message: Message) -> bytes:
    """One message as msgpack."""
    return msgspec.msgpack.encode(message)


def decode(payload: bytes) -> AnyMessage:
    """One message from msgpack.

    Raises:
        ProtocolError: not msgpack, an unknown type, a missing or wrong field, a function that cannot be one.
    """
    try:
        # Into the types at once: what a frame of a few MB can hold as plain maps and lists takes a hundred times its size.
        message: AnyMessage = _DECODER.decode(payload)
        if isinstance(message, Fetch | Prepare | Start | MakeCheckpoint):
            check(message.function)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError, FunctionInvalid) as error:
        raise ProtocolError(f"a frame is not an agent message: {error}") from error
    return message


_DECODER = msgspec.msgpack.Decoder(AnyMessage)
