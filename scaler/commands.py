"""What the planner asks for: a message of the agent API, addressed to a node.

In: decided by :mod:`scaler.instances` and :mod:`scaler.checkpoints`. Out: :mod:`scaler.service` adds the trace context
and hands them to :mod:`scaler.edges.agents`.
"""

from __future__ import annotations

import msgspec

from agent.api.messages import AgentCommand
from scaler.events import Origin


class Need(msgspec.Struct, frozen=True):
    """Why an instance is wanted.

    Attributes:
        origin: the demand record that asked; None for instances that are held without demand.
        since_ns: when the need arose: the event time of that demand, or the decision. The delay of a start counts from
            here.
    """

    origin: Origin | None
    since_ns: int


class NodeCommand(msgspec.Struct, frozen=True, kw_only=True):
    """One command for one node.

    Attributes:
        node: who shall do it.
        message: what; id, deadline, shard and epoch are set, the trace context is not.
        need: for starts only.
    """

    node: str
    message: AgentCommand
    need: Need | None = None
