"""Refuses the commands of a scaler that has been replaced, also when the agent was replaced meanwhile.

In: shard and epoch of each command (:mod:`agent.node`). Out: nothing, or a refusal. The newest epoch of each shard is kept in the agent's
runtime folder, beside what the next agent adopts: after a crash of the agent it is as well known as before. It ends with what it protects,
with a clean end of the agent or of the machine.
"""

from __future__ import annotations

import contextlib
from pathlib import Path

import msgspec

from agent.errors import Refused
from infra import files


class Epochs:
    """The newest epoch by shard.

    Args:
        path: where it is kept.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._newest: dict[int, int] = {}
        with contextlib.suppress(OSError, msgspec.MsgspecError):
            self._newest = msgspec.json.decode(path.read_bytes(), type=dict[int, int])

    def check(self, shard: int, epoch: int) -> None:
        """Take note of a command's epoch.

        Raises:
            Refused: a newer one has been seen.
        """
        newest = self._newest.get(shard, 0)
        if epoch < newest:
            raise Refused(f"the command is of epoch {epoch} of shard {shard}, which epoch {newest} has taken over")
        if epoch > newest:
            self._newest[shard] = epoch
            self._write()

    def _write(self) -> None:
        # A few bytes on a tmpfs, and only after a change of scalers.
        files.write(self._path, msgspec.json.encode(self._newest))
