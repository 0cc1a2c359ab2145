"""What happens in one simulation: demand and faults, made of a seed.

In: a seed. Out: :class:`Plan`, a list of independent steps. Each fault undoes itself after its duration, so any of them can be left out
(:mod:`thaw.faults.shrink`) and the rest means the same. Carried out by :mod:`thaw.faults.world`.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from agent.api.function import Function, FunctionSpec, Instances, Limits, Metadata, Policy, Readiness

#: Demand and faults begin before this, s.
BUSY_S = 30.0
#: Faults that are never undone.
FOR_GOOD = ("lose node", "lose scaler", "wedge node")
#: A fault that waits for an event happens without it after this, s.
PATIENCE_S = 4.0
#: What happens on a node or at a scaler.
EVENTS = {
    "scaler": ("it sends a command", "it sends a start"),
    "node": ("it gets a command", "it gets a start", "an instance serves", "it ends a command"),
}
_NAMES = ("alpha", "beta", "gamma", "delta")
#: Chance of each kind of fault, how long it lasts at least and at most (s), and what it is done to.
_FAULTS: dict[str, tuple[float, float, float, str]] = {
    "kill scaler": (3.0, 0.2, 8.0, "scaler"),
    "end scaler": (1.5, 0.2, 8.0, "scaler"),
    "stop scaler": (3.0, 0.5, 14.0, "scaler"),
    "kill agent": (3.0, 0.2, 5.0, "node"),
    "stop agent": (1.5, 0.5, 8.0, "node"),
    "power off": (1.5, 1.0, 15.0, "node"),
    "kill pager": (1.0, 0.0, 0.0, "node"),
    "kill instance": (1.5, 0.0, 0.0, "node"),
    "cut link": (2.0, 0.1, 15.0, "link"),
    "cut off node": (1.5, 0.1, 12.0, "node"),
    "reset link": (2.5, 0.0, 0.0, "link"),
    "stop broker": (1.5, 0.2, 10.0, ""),
    "stop store": (1.0, 0.5, 10.0, ""),
    "bad images": (0.7, 1.0, 15.0, ""),
    "restores fail": (1.0, 0.5, 10.0, "node"),
    "cold starts fail": (1.0, 0.5, 10.0, "node"),
    "starts hang": (1.0, 0.5, 8.0, "node"),
    "slow node": (1.5, 1.0, 10.0, "node"),
    "full node": (1.0, 0.5, 10.0, "node"),
    "clock jump of node": (1.0, 0.5, 10.0, "node"),
    "clock jump of scaler": (1.0, 0.5, 10.0, "scaler"),
    "bad record": (0.5, 0.0, 0.0, ""),
    "lose node": (1.0, 0.0, 0.0, "node"),
    "lose scaler": (0.7, 0.0, 0.0, "scaler"),
    "wedge node": (0.7, 0.0, 0.0, "node"),
}


@dataclass(frozen=True)
class Step:
    """One thing that happens.

    Attributes:
        at_s: when.
        kind: ``demand``, ``silence``, ``apply``, ``delete`` or a fault.
        target: names of what it is done to.
        lasts_s: of a fault that is undone.
        amount: a level, or seconds of a clock jump.
        document: of ``apply``.
    """

    at_s: float
    kind: str
    target: tuple[str, ...] = ()
    lasts_s: float = 0.0
    amount: float = 0.0
    document: Function | None = None
    #: Of a fault: the event of its target that it waits for, at most :data:`PATIENCE_S`; empty: none.
    when: str = ""
    #: And so long after that, s.
    after_s: float = 0.0

    def __str__(self) -> str:
        text = f"{self.at_s:7.2f} s  {self.kind} {' '.join(self.target)}".rstrip()
        if self.kind == "demand":
            return f"{text}: level {self.amount:.0f}"
        if self.kind.startswith("clock"):
            text += f" by {self.amount:+.1f} s"
        if self.document is not None:
            spec = self.document.spec
            text += (
                f": {' '.join(spec.command)}, {spec.instances.min} to {spec.instances.max} of {spec.limits.concurrency} requests, "
                f"idle {spec.policy.idle_seconds} s, standby {spec.policy.standby}, checkpoint {spec.policy.checkpoint}"
            )
        if self.lasts_s:
            text += f" for {self.lasts_s:.1f} s"
        return f"{text}, {self.after_s * 1000:.1f} ms after {self.when}" if self.when else text


@dataclass(frozen=True)
class Plan:
    """One simulation."""

    seed: int
    scalers: tuple[str, ...]
    nodes: tuple[str, ...]
    partitions: int
    steps: tuple[Step, ...]

    @property
    def faults(self) -> tuple[Step, ...]:
        """What goes wrong."""
        return tuple(step for step in self.steps if step.kind not in ("demand", "silence", "apply", "delete"))

    @property
    def ends_s(self) -> float:
        """When everything is undone."""
        return max([BUSY_S / 2, *(step.at_s + step.lasts_s + (PATIENCE_S if step.when else 0) for step in self.steps)])


def make(seed: int) -> Plan:
    """The plan of a seed."""
    draw = random.Random(f"{seed}/plan")
    scalers = tuple(f"s{number}" for number in range(draw.choice([1, 2, 2, 3])))
    nodes = tuple(f"n{number}" for number in range(draw.choice([1, 2, 2, 3])))
    names = _NAMES[: draw.choice([1, 2, 3, 4])]
    steps = [Step(0.05, "apply", (name,), document=_document(draw, name)) for name in names]
    for _ in range(draw.randint(0, 2)):
        name = draw.choice(names)
        at_s = draw.uniform(3.0, BUSY_S)
        if draw.random() < 0.4:
            steps.append(Step(at_s, "delete", (name,)))
            if draw.random() < 0.6:
                steps.append(Step(at_s + draw.uniform(0.5, 10.0), "apply", (name,), document=_document(draw, name)))
        else:
            steps.append(Step(at_s, "apply", (name,), document=_document(draw, name)))
    for name in names:
        steps += _demand(draw, name)
    # Half of them close to each other: what goes wrong while something else does is what nobody has thought of.
    moment_s = draw.uniform(2.0, BUSY_S)
    for _ in range(draw.choice([1, 1, 2, 2, 3, 4, 6, 8])):
        at_s = moment_s + draw.uniform(0.0, 3.0) if draw.random() < 0.5 else draw.uniform(1.0, BUSY_S)
        steps.append(_fault(draw, scalers, nodes, at_s))
    if draw.random() < 0.25:
        steps += _two_at_once(draw, draw.choice(scalers), draw.choice(nodes))
    if draw.random() < 0.12:
        steps += _forgotten(draw, draw.choice(names), scalers, draw.choice(nodes))
    partitions = draw.choice([1, 2, 3])
    if draw.random() < 0.06:
        steps += _alone(draw, names, scalers)
    return Plan(seed, scalers, nodes, partitions, tuple(sorted(steps, key=lambda step: step.at_s)))


def _document(draw: random.Random, name: str) -> Function:
    least = draw.choice([0, 0, 0, 1])
    return Function(
        metadata=Metadata(name=name),
        spec=FunctionSpec(
            command=[draw.choice(["serve", "serve", "serve-2"])],
            port=8080,
            readiness=Readiness(timeout_seconds=4.0),
            limits=Limits(memory_mb=draw.choice([100, 300]), concurrency=draw.choice([1, 1, 2])),
            instances=Instances(min=least, max=draw.randint(max(1, least), 5)),
            policy=Policy(
                idle_seconds=draw.choice([0.0, 1.0, 3.0, None]),
                checkpoint=draw.choice(["auto", "auto", "auto", "off"]),
                standby=draw.choice([0, 0, 1, 2]),
            ),
        ),
    )


def _demand(draw: random.Random, name: str) -> list[Step]:
    """Sources of two kinds: a gateway repeats its level and is forgotten when it is silent; a batch speaks once, which counts for long."""
    steps = []
    for source in ("gateway", "gateway-2", "batch")[: draw.randint(1, 3)]:
        for _ in range(draw.randint(1, 4)):
            at_s = draw.uniform(0.5, BUSY_S)
            steps.append(Step(at_s, "demand", (name, source), amount=draw.choice([0, 1, 1, 2, 3, 6])))
            if draw.random() < 0.3:
                # Soon another word: the two may arrive the other way round.
                steps.append(Step(at_s + draw.uniform(0.01, 1.0), "demand", (name, source), amount=draw.choice([0, 1, 2])))
        if draw.random() < 0.2:
            steps.append(Step(draw.uniform(5.0, BUSY_S), "silence", (name, source)))
    return steps


def _two_at_once(draw: random.Random, scaler: str, node: str) -> list[Step]:
    """Two faults of which the second meets what the first has left behind."""
    at_s = draw.uniform(3.0, BUSY_S - 8.0)
    if draw.random() < 0.5:
        # Another scaler has taken over, the agent is a new one, and the first scaler goes on.
        lasts_s = draw.uniform(7.0, 14.0)
        killed_s = at_s + draw.uniform(6.0, lasts_s)
        return [Step(at_s, "stop scaler", (scaler,), lasts_s), Step(killed_s, "kill agent", (node,), draw.uniform(0.1, 1.5))]
    # The answer is lost with the agent that gave it.
    when = draw.choice(["it ends a command", "an instance serves"])
    return [
        Step(at_s, "cut link", (scaler, node), draw.uniform(2.0, 8.0), when="it gets a start", after_s=draw.uniform(0.0, 0.005)),
        Step(at_s + 0.1, "kill agent", (node,), 0.1, when=when, after_s=draw.uniform(0.002, 0.05)),
    ]


def _forgotten(draw: random.Random, name: str, scalers: tuple[str, ...], node: str) -> list[Step]:
    """A function is deleted while a node cannot be reached, and whoever knew of it is gone when it can."""
    at_s = draw.uniform(4.0, BUSY_S - 8.0)
    return [
        Step(at_s - 0.5, "cut off node", (node,), draw.uniform(3.0, 8.0)),
        Step(at_s, "delete", (name,)),
        *(Step(at_s + draw.uniform(0.2, 1.5), "kill scaler", (scaler,), draw.uniform(0.1, 1.0)) for scaler in scalers),
    ]


def _alone(draw: random.Random, names: tuple[str, ...], scalers: tuple[str, ...]) -> list[Step]:
    """Nodes have more to start than they can at once, and every scaler is gone before it is done."""
    at_s = draw.uniform(3.0, BUSY_S - 8.0)
    spec = FunctionSpec(
        command=["serve-3"], port=8080, readiness=Readiness(timeout_seconds=4.0), limits=Limits(memory_mb=100),
        instances=Instances(max=6), policy=Policy(idle_seconds=3.0, checkpoint="off"),
    )  # fmt: skip
    return [
        *(Step(at_s - 1.0, "apply", (name,), document=Function(metadata=Metadata(name=name), spec=spec)) for name in names),
        *(Step(at_s, "demand", (name, "gateway"), amount=6) for name in names),
        *(Step(at_s + draw.uniform(0.05, 0.5), "kill scaler", (scaler,), draw.uniform(3.0, 8.0)) for scaler in scalers),
    ]


def _fault(draw: random.Random, scalers: tuple[str, ...], nodes: tuple[str, ...], at_s: float) -> Step:
    kind = draw.choices(list(_FAULTS), [weight for weight, *_ in _FAULTS.values()])[0]
    _, least_s, most_s, where = _FAULTS[kind]
    lasts_s = 0.0 if not most_s else least_s + (most_s - least_s) * draw.random() ** 2
    target: dict[str, tuple[str, ...]] = {
        "": (),
        "scaler": (draw.choice(scalers),),
        "node": (draw.choice(nodes),),
        "link": (draw.choice(scalers), draw.choice(nodes)),
    }
    amount = draw.choice([-1, 1]) * draw.choice([0.5, 3.0, 8.0, 60.0]) if kind.startswith("clock") else 0.0
    when, after_s = "", 0.0
    events = EVENTS.get("node" if where == "link" else where)
    if events is not None and kind not in FOR_GOOD and draw.random() < 0.5:
        when, after_s = draw.choice(events), draw.choice([0.0, 0.0, 0.0005, 0.002, 0.01, 0.1]) * draw.random()
    if kind in FOR_GOOD:
        # One of each is left.
        several = scalers if where == "scaler" else nodes
        if len(several) > 1:
            target[where] = (several[-1],)
        else:
            kind, target[where] = "bad record", ()
    return Step(at_s, kind, target[where], lasts_s, amount, when=when, after_s=after_s)
