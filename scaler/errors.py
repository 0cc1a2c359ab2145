"""Exceptions of the scaler package.

ScalerError
├── DemandInvalid       a demand record cannot be decoded; it goes to ``thaw.demand.rejected``
├── AgentUnreachable    no stream to a node
├── ShardingChanged     the demand topic has another number of partitions than when the scaler began
├── ForecastInvalid     a record of ``thaw.forecasts`` is not what a scaler wrote; the function is learned anew
├── TraceUnreadable, CostsUnreadable, InstallationTooSmall, UnknownPolicy    what the simulator was asked for
├── SimulationBroken    a simulated installation did what none may: a bug
└── InvalidTransition   the planner was asked for something impossible: a bug, with the function's story
"""

from __future__ import annotations


class ScalerError(Exception):
    """Anything the scaler cannot do."""


class DemandInvalid(ScalerError):
    """A demand record cannot be decoded."""


class AgentUnreachable(ScalerError):
    """There is no stream to the node."""


class ShardingChanged(ScalerError):
    """The demand topic was given other partitions: every function may belong to another shard. Starting again is the cure."""


class InvalidTransition(ScalerError):
    """An event that the planner's state does not allow."""


class ForecastInvalid(ScalerError):
    """A stored forecast cannot be read."""


class TraceUnreadable(ScalerError):
    """A trace for the simulator is none of the known formats, or damaged."""


class CostsUnreadable(ScalerError):
    """A file of measured costs is damaged or something else."""


class SimulationBroken(ScalerError):
    """A simulated installation did what none may: a bug, in the planner or in the simulator."""


class InstallationTooSmall(ScalerError):
    """A simulated installation has no node with memory for one instance of a function."""


class UnknownPolicy(ScalerError):
    """The simulator has no policy of that name."""
