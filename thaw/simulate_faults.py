"""``thaw simulate-faults``: the scaler and the agents under faults, from seeds.

In: seeds. Out: how many runs kept every promise; of the first one that did not, the shortest story (:mod:`thaw.faults`).
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any

import click

from thaw.faults import campaign, plan
from thaw.faults.safeguards import SAFEGUARDS
from thaw.faults.shrink import shrink

#: Lines of the story that are printed: its end.
_STORY_LINES = 40


@click.command(name="simulate-faults")
@click.option("--seeds", type=click.IntRange(min=1), default=1000, show_default=True, help="How many runs.")
@click.option("--seed", type=click.IntRange(min=0), default=1, show_default=True, help="The first one.")
@click.option(
    "--without",
    type=click.Choice(list(SAFEGUARDS)),
    metavar="SAFEGUARD",
    help="Leave one out and look for a failure; see --safeguards.",
)
@click.option("--processes", type=click.IntRange(min=1), help="Runs at once; default: one per core.")
@click.option("--safeguards", "listed", is_flag=True, help="List what can be left out, and end.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def command(seeds: int, seed: int, without: str | None, processes: int | None, listed: bool, as_json: bool) -> None:
    """Run the scaler and the agents in a simulated installation in which things go wrong.

    Exits with 1 when a promise is broken; with --without when none is.
    """
    if listed:
        for name, safeguard in SAFEGUARDS.items():
            click.echo(f"{name:16} {safeguard.what}")
        return
    began = time.monotonic()
    done, failed, faults, virtual_s, steps = 0, list[campaign.Result](), 0, 0.0, 0
    for result in campaign.many(seed, seeds, without or "", processes):
        done, faults, virtual_s, steps = done + 1, faults + result.faults, virtual_s + result.took_s, steps + result.steps
        if result.violation is not None:
            failed.append(result)
            if without:
                break
        if not done % 500:
            click.echo(f"{done:,} of {seeds:,} runs, {len(failed)} failed", err=True)
    story = _story(failed[0].seed, without or "") if failed else None
    if as_json:
        figures: dict[str, Any] = {
            "runs": done, "first_seed": seed, "without": without, "faults": faults, "virtual_s": round(virtual_s, 1), "steps": steps,
            "took_s": round(time.monotonic() - began, 1),
            "failed": [{"seed": item.seed, "kind": item.violation.kind, "text": item.violation.text} for item in failed if item.violation],
            "story": story,
        }  # fmt: skip
        click.echo(json.dumps(figures, indent=2))
    else:
        took_s = time.monotonic() - began
        click.echo(f"{done:,} runs with {faults:,} faults in {virtual_s / 3600:.1f} simulated hours: {len(failed)} failed ({took_s:.0f} s)")
        for item in failed[:10]:
            assert item.violation is not None
            click.echo(f"  seed {item.seed}: {item.violation.kind}: {item.violation.text}")
        for line in story or ():
            click.echo(line)
    if bool(failed) != bool(without):
        sys.exit(1)


def _story(seed: int, without: str) -> list[str]:
    """What is needed for a failure, and what the parts did then."""
    shortest, outcome = shrink(plan.make(seed), without)
    scalers, nodes = ", ".join(shortest.scalers), ", ".join(shortest.nodes)
    assert outcome.violation is not None
    return [
        f"seed {seed} made short: scalers {scalers}; nodes {nodes}; {shortest.partitions} partitions",
        *map(str, shortest.steps),
        f"{outcome.violation.at_s:7.2f} s  {outcome.violation.kind}: {outcome.violation.text}",
        "the end of what was said and done:",
        *outcome.story[-_STORY_LINES:],
    ]
