"""Epochs: an older owner of a shard is refused, also by the next agent."""

from __future__ import annotations

from pathlib import Path

import pytest

from agent.epochs import Epochs
from agent.errors import Refused


def test_an_older_epoch_is_refused_and_the_same_one_is_not(tmp_path: Path) -> None:
    epochs = Epochs(tmp_path / "epochs.json")
    epochs.check(0, 3)
    epochs.check(0, 3)
    epochs.check(1, 1)
    with pytest.raises(Refused, match="epoch 2 of shard 0, which epoch 3 has taken over"):
        epochs.check(0, 2)
    epochs.check(0, 4)


def test_the_next_agent_knows_them(tmp_path: Path) -> None:
    Epochs(tmp_path / "epochs.json").check(2, 7)
    with pytest.raises(Refused):
        Epochs(tmp_path / "epochs.json").check(2, 6)


def test_a_file_that_is_none_is_no_obstacle(tmp_path: Path) -> None:
    (tmp_path / "epochs.json").write_bytes(b"\xff")
    Epochs(tmp_path / "epochs.json").check(0, 1)
