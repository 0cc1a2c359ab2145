"""A failing plan made short: what is left is needed for the failure.

In: a plan that violates an invariant. Out: the shortest one found that violates the same, by leaving out steps (delta debugging) and then
replicas and nodes that nothing happens to.
"""

from __future__ import annotations

import dataclasses

from thaw.faults.plan import FOR_GOOD, Plan
from thaw.faults.world import Outcome, run

#: Runs at most; each takes about as long as the one that failed.
_RUNS_MAX = 300


def shrink(plan: Plan, without: str = "") -> tuple[Plan, Outcome]:
    """The shortest plan found, and its outcome with the story.

    Args:
        plan: one that fails.
        without: the safeguard that is left out.
    """
    first = run(plan, without)
    assert first.violation is not None, "only a failing plan can be made shorter"
    kind, runs = first.violation.kind, 0

    def fails(candidate: Plan) -> bool:
        nonlocal runs
        runs += 1
        found = run(candidate, without).violation
        return found is not None and found.kind == kind

    steps, pieces = list(plan.steps), 2
    while len(steps) > 1 and runs < _RUNS_MAX:
        size = -(-len(steps) // pieces)
        for at in range(0, len(steps), size):
            fewer = [*steps[:at], *steps[at + size :]]
            if fails(dataclasses.replace(plan, steps=tuple(fewer))):
                steps, pieces = fewer, max(2, pieces - 1)
                break
        else:
            if size == 1:
                break
            pieces = min(len(steps), 2 * pieces)
    plan = dataclasses.replace(plan, steps=tuple(steps))
    for name in ("scalers", "nodes"):
        for item in getattr(plan, name):
            rest = tuple(other for other in getattr(plan, name) if other != item)
            smaller = dataclasses.replace(plan, scalers=rest) if name == "scalers" else dataclasses.replace(plan, nodes=rest)
            # What is lost for good was not the only one.
            needed = any(item in step.target or step.kind in FOR_GOOD for step in steps)
            if rest and not needed and fails(smaller):
                plan = smaller
    return plan, run(plan, without, story=True)
