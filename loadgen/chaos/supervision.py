"""Starts the broker and the store again when they die, as a service manager would, and tells when a part is back.

In: parts of the embedded stack, the installation's processes. Out: running parts. (Scalers and agent are kept by ``thaw run``, the pager by
its keeper and the agent.) Used by :mod:`loadgen.chaos.faults` and :mod:`loadgen.chaos.run`.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Collection
from pathlib import Path

from infra.errors import InfraError
from infra.local import ports
from infra.local.health import check_kafka
from infra.local.parts import Part
from infra.settings import KafkaSettings, Settings
from loadgen.chaos.targets import Targets

#: From the death of a part to its next start, s, as systemd's RestartSec; and longest wait until one is back.
RESTART_S, BACK_S = 0.2, 30.0
_LOOK_S = 0.05


class Supervision:
    """Of one installation."""

    def __init__(self, settings: Settings, targets: Targets, broker: Part, store: Part, scalers: int) -> None:
        self._settings = settings
        self._targets = targets
        self._broker = broker
        self._store = store
        self._scalers = scalers
        #: Starts of each part after a death.
        self.restarts = {"broker": 0, "store": 0}

    async def keep(self) -> None:
        """Start a part that has died again, until cancelled."""
        await asyncio.gather(self._keep("broker", self._broker), self._keep("store", self._store))

    async def _keep(self, name: str, part: Part) -> None:
        while True:
            await asyncio.sleep(_LOOK_S)
            if not part.alive:
                await asyncio.sleep(RESTART_S)
                self.restarts[name] += 1
                # To the end, also when this is cancelled: a process that is half started would have no record.
                await asyncio.shield(asyncio.to_thread(self._launch, part))

    @staticmethod
    def _launch(part: Part) -> None:
        try:
            part.launch()
        except InfraError:
            return  # no room for its files, say: tried again in a moment
        except OSError:
            return

    async def back(self, role: str, gone: Collection[int]) -> bool:
        """Wait until what was killed has a successor that does its job; False when it has none after :data:`BACK_S`.

        Args:
            role: what was killed.
            gone: its pids.
        """
        answers = self._question(role, frozenset(gone))
        if answers is None:
            return True
        give_up = time.monotonic() + BACK_S
        while time.monotonic() < give_up:
            if await asyncio.to_thread(answers):
                return True
            await asyncio.sleep(_LOOK_S)
        return False

    def _question(self, role: str, gone: frozenset[int]) -> Callable[[], bool] | None:
        match role:
            case "broker":
                return self._broker_answers
            case "store":
                return lambda: self._store.alive and _answers(self._store)
            case "agent":
                return lambda: self._agent_pid() not in (0, *gone)
            case "scaler" | "scalers":
                return self._scalers_joined
            case "pager-worker" | "pager-keeper":
                return lambda: bool(set(self._pids("pager-worker")) - gone) and bool(set(self._pids("pager-keeper")) - gone)
            case _:
                return None  # nobody has to start an instance again: the next request does

    def _pids(self, role: str) -> list[int]:
        return [pid for pids in self._targets.find(role) for pid in pids]

    def _broker_answers(self) -> bool:
        try:
            check_kafka(KafkaSettings(bootstrap_servers=self._broker.address), write=False, timeout_s=2.0)
        except InfraError:
            return False
        return True

    def _agent_pid(self) -> int:
        """Of the agent that listens; 0 when none has said so."""
        try:
            pid = int(json.loads(self._settings.agent_file.read_text())["pid"])
        except (OSError, ValueError, KeyError):
            return 0
        return pid if Path(f"/proc/{pid}").exists() else 0

    def _scalers_joined(self) -> bool:
        """As many scalers as there should be are members of the group: each has noted its membership."""
        folder = self._settings.paths.state_dir / "scaler"
        alive = {pid for pids in self._targets.find("scaler") for pid in pids}
        return sum((folder / f"member-{pid}.json").exists() for pid in alive) >= self._scalers


def _answers(part: Part) -> bool:
    host, _, port = part.address.rpartition("//")[2].partition(":")
    return ports.answers(host, int(port))
