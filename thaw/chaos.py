"""``thaw bench chaos``: a real installation under load while everything in it fails.

In: the command line. Out: progress on standard error; a table, or nothing, and one JSON line on standard output; the report in a folder;
exit code 1 when a request was lost or answered wrongly, or something leaked. Next: :mod:`loadgen.chaos`.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import click

from infra.settings import Settings
from loadgen.chaos import report
from loadgen.chaos.run import Chaos, ChaosOptions
from loadgen.chaos.schedule import KINDS, kind_named
from loadgen.checks import PROGRAMS, SAMPLES
from thaw import isolated


@click.command("chaos")
@click.option("--minutes", type=click.FloatRange(min=0.5), default=30.0, show_default=True, help="How long the load lasts.")
@click.option("--seed", type=int, default=1, show_default=True, help="Of faults and load.")
@click.option(
    "--sample", "samples", multiple=True, type=click.Choice(PROGRAMS), default=SAMPLES, show_default=True, help="Function; may be repeated."
)
@click.option("--fault", "kinds", multiple=True, type=click.Choice([kind.name for kind in KINDS]), help="May be repeated; default: all.")
@click.option("--calm", "calm_s", type=click.FloatRange(min=1), default=20.0, show_default=True, help="Before the first fault, s.")
@click.option("--pace", type=click.FloatRange(0.1, 10), default=1.0, show_default=True, help="How many times as fast faults come and go.")
@click.option("--json", "as_json", is_flag=True, help="Print the JSON line alone.")
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), help="Folder of the report; default: reports/chaos-TIME here.")
@click.pass_obj
def chaos(
    settings: Settings,
    *,
    minutes: float,
    seed: int,
    samples: tuple[str, ...],
    kinds: tuple[str, ...],
    calm_s: float,
    pace: float,
    as_json: bool,
    out: Path | None,
) -> None:
    """Kill, pause and cut off every part of an installation under load; count what was lost, wrong and leaked, and how long it took."""
    began = time.monotonic()
    folder = (out or Path("reports") / time.strftime("chaos-%Y%m%d-%H%M%S")).resolve()

    def say(line: str) -> None:
        click.echo(f"[{time.monotonic() - began:6.1f} s] {line}", err=True)

    chosen = tuple(kind_named(name) for name in kinds) or KINDS
    options = ChaosOptions(minutes * 60, seed, folder, samples, chosen, calm_s, pace)
    with isolated.installation(settings, "chaos") as (own, arguments):
        outcome = Chaos(own, arguments, options, say).run()
    result = {**report.write(folder, outcome, minutes=minutes, seed=seed), "report": str(folder)}
    if not as_json:
        click.echo((folder / report.TABLE_FILE).read_text())
    click.echo(json.dumps(result))
    if result["lost"] or result["wrong"] or result["leaked"]:
        sys.exit(1)
