"""Exceptions of the agent package.

AgentError
├── FunctionInvalid          a Function document is wrong; names line and field
├── ProtocolError            a peer broke the agent protocol
│   └── PeerUntrusted        its certificate is not trusted, or does not let it do this
├── Refused                  the agent will not do it (room, epoch, quarantine); another node may
│   ├── NoRoom
│   └── Overloaded           too much waits already
├── SandboxError             namespaces, mounts, network or cgroup of an instance
├── CriuError                CRIU failed; carries its own words
│   └── NotFreezable         the function holds something CRIU cannot freeze
├── PagerError               the pager failed or is gone
├── ImageInvalid             a checkpoint is corrupt, incompatible or hostile
│   ├── ImageRolledBack      the pointer is older than one that was seen
│   └── KeyUnknown           it was sealed or signed with a key that this agent lacks
├── NotReady                 the instance did not answer in time
└── InstanceGone             the instance ended while it was needed

Each carries the context it was raised in (``function``, ``node``, ``bucket``, ``key``, ``stage``) in :attr:`context`.
"""

from __future__ import annotations


class AgentError(Exception):
    """Something on the node failed.

    Args:
        message: what happened and what to do about it.
        context: where: function, node, instance, stage, bucket, key.
    """

    #: Machine-readable kind, used in reports and metrics.
    reason = "agent_error"

    def __init__(self, message: str, **context: str) -> None:
        self.context = context
        where = ", ".join(f"{name}={value}" for name, value in context.items())
        super().__init__(f"{message} [{where}]" if where else message)


class FunctionInvalid(AgentError):
    """A Function document is wrong."""

    reason = "function_invalid"


class ProtocolError(AgentError):
    """A peer sent something that is not the agent protocol."""

    reason = "protocol"


class PeerSilent(ProtocolError):
    """A peer went without a word, as probes do that only look whether a port is open."""


class PeerUntrusted(ProtocolError):
    """A peer is not who it must be: its certificate is not trusted, or is for another role or node."""

    reason = "untrusted"


class Refused(AgentError):
    """The agent will not carry out a command; the planner may try another node."""

    reason = "refused"


class NotAllowed(Refused):
    """The sender may not do this to this function."""

    reason = "not_allowed"


class NoRoom(Refused):
    """The node has no memory for one more instance now."""

    reason = "no_room"


class Overloaded(Refused):
    """Too much waits on the node already."""

    reason = "overloaded"


class SandboxError(AgentError):
    """A sandbox could not be made or used."""

    reason = "sandbox"


class CriuError(AgentError):
    """CRIU failed."""

    reason = "criu"


class NotFreezable(CriuError):
    """The function holds something that cannot be frozen."""

    reason = "not_freezable"


class PagerError(AgentError):
    """The pager failed."""

    reason = "pager"


class ImageInvalid(AgentError):
    """A checkpoint is corrupt, incompatible with this node or function, or hostile."""

    reason = "image_invalid"


class ImageRolledBack(ImageInvalid):
    """The pointer to the current checkpoint is older than one that this node has seen."""

    reason = "image_rolled_back"


class KeyUnknown(ImageInvalid):
    """A checkpoint was sealed or signed with a key that this agent does not have, or its keys cannot be used."""

    reason = "key_unknown"


class NotReady(AgentError):
    """The instance did not answer its readiness request in time."""

    reason = "not_ready"


class InstanceGone(AgentError):
    """The instance ended while it was needed."""

    reason = "instance_gone"
