from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from scaler import compiled

#: A policy's figures to the last digit, and what it ran as.
PLAY = """
import numpy as np
from scaler import planner
from scaler.simulate import run
from scaler.simulate.model import FunctionTrace, Trace, World
random = np.random.default_rng(1)
at_s = np.sort(np.concatenate([np.arange(0, 9_000, 300.0) + random.uniform(-0.05, 0.05, 30) + 1, random.uniform(0, 9_000, 400)]))
trace = Trace("mixed", 9_000.0, [FunctionTrace("mixed", at_s, random.uniform(0.01, 20, len(at_s)), 170.0)])
result = next(run.run(trace, ["thaw"], delay_weight=10.0, world=World()))
print(planner.__file__.rpartition(".")[2], result)
"""


def play(**environment: str) -> tuple[str, str]:
    done = subprocess.run([sys.executable, "-c", PLAY], capture_output=True, text=True, env=os.environ | environment, check=False)
    assert done.returncode == 0, done.stderr
    kind, _, result = done.stdout.partition(" ")
    return kind, result


def test_the_compiled_planner_decides_as_the_sources_do() -> None:
    if what := compiled.lacking():
        pytest.skip(f"nothing can be compiled here: {what} is missing")
    compiled.build()
    as_code, as_source = play(THAW_COMPILED="1"), play(THAW_COMPILED="0")
    assert (as_code[0], as_source[0]) == ("so", "py")
    assert as_code[1] == as_source[1]


def test_what_was_compiled_of_other_sources_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = compiled.folder()
    changed = tmp_path / "planner.py"
    changed.write_text("changed = True")
    sources = compiled.sources()
    monkeypatch.setattr(compiled, "sources", lambda: [changed, *sources[1:]])
    assert compiled.folder() != before
    monkeypatch.setattr(compiled, "_FOLDERS", tmp_path / "none")
    finders = list(sys.meta_path)
    compiled.use()
    assert sys.meta_path == finders
