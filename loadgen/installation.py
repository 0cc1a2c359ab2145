"""A whole installation on this machine for one measurement: started by ``thaw`` commands, gone afterwards.

In: settings with a state folder of its own and the ``thaw`` command line. Out: the embedded stack and a background process for as long as a
``with`` block lasts. Every command is printed before it runs, so that a reader can do the same by hand. Used by :mod:`loadgen.demo` and
:mod:`loadgen.bench`.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from agent.api.function import Function, read_yaml
from infra import settings as settings_module
from infra.settings import Settings
from loadgen.errors import LoadImpossible

Say = Callable[[str], None]
_AGENT_S, _STOP_S = 60.0, 60.0
#: Longest wait for all checkpoints after a cold start of each, s, and how often that is tried.
_CHECKPOINTS_S, _CHECKPOINT_ATTEMPTS = 60.0, 3
#: Longest wait until every instance is released, s.
_IDLE_S = 60.0


class Installation:
    """Runs ``thaw`` commands on a state folder.

    Attributes:
        state: the state folder.
        marks: whatever belongs to this installation has one of these in its command line, environment, cgroup, name or path.
    """

    def __init__(self, settings: Settings, thaw: Sequence[str], out: Path, say: Say) -> None:
        self._settings = settings
        self._thaw = thaw
        self._out = out
        self._say = say
        self.state = settings.paths.state_dir
        self.marks = (str(self.state), f"thaw-{settings.agent.node_name}", settings.agent.bridge[:6])
        self._log = self.state / "logs" / "installation.log"
        #: Of every command.
        self.environment = {**os.environ, "THAW_RUN": str(self.state)}
        self._log.parent.mkdir(parents=True, exist_ok=True)

    @contextlib.contextmanager
    def stack(self) -> Iterator[Settings]:
        """``thaw stack up``, and ``down --purge`` on every way out; yields the settings with its addresses."""
        try:
            self.command("stack", "up")
            yield settings_module.with_embedded_stack(self._settings)
        finally:
            self.command("stack", "down", "--purge", check=False)

    @contextlib.contextmanager
    def background(self, *arguments: str) -> Iterator[None]:
        """``thaw run`` or ``thaw agent`` until the end of the block; begins when the agent listens.

        Raises:
            LoadImpossible: it does not come up.
        """
        self._say(f"$ thaw {' '.join(arguments)}   (logs in {self._log.parent})")
        with self._log.open("ab") as log:
            process = subprocess.Popen(
                [*self._thaw, *arguments],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                env=self.environment,
            )
        try:
            give_up = time.monotonic() + _AGENT_S
            while not self._settings.agent_file.exists():
                if process.poll() is not None or time.monotonic() > give_up:
                    raise LoadImpossible(f"the agent did not come up; see {self.keep_logs()}")
                time.sleep(0.05)
            yield
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(_STOP_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def command(self, *arguments: str, check: bool = True) -> None:
        """Run a ``thaw`` command and show what it says while it says it.

        Raises:
            LoadImpossible: it failed, and ``check`` is set.
        """
        self._say(f"$ thaw {' '.join(arguments)}")
        with (
            self._log.open("a") as log,
            subprocess.Popen(
                [*self._thaw, *arguments],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                env=self.environment,
            ) as process,
        ):
            assert process.stdout is not None
            for line in process.stdout:
                log.write(line)
                self._say(f"  {line.rstrip()}")
        if check and process.returncode:
            raise LoadImpossible(f"thaw {' '.join(arguments)} failed with code {process.returncode}; see {self.keep_logs()}")

    def apply(self, documents: Sequence[Path], **policy: object) -> dict[str, Function]:
        """``thaw apply`` documents with other policies than they were written with.

        Args:
            documents: Function documents.
            **policy: fields of ``spec.policy``, as in YAML.

        Returns:
            The functions by name, as the documents have them.
        """
        folder = self.state / "functions"
        folder.mkdir(parents=True, exist_ok=True)
        functions = {}
        paths: list[str] = []
        for document in documents:
            text = document.read_text()
            (function,) = read_yaml(text, str(document), document.parent)
            value = yaml.safe_load(text)
            value["spec"].setdefault("policy", {}).update(policy)
            for item in value["spec"].get("files", []):
                item["source"] = str((document.parent / item["source"]).resolve())
            path = folder / f"{function.name}.yaml"
            path.write_text(yaml.safe_dump(value, sort_keys=False))
            functions[function.name] = function
            paths += ["-f", str(path)]
        self.command("apply", *paths)
        return functions

    async def until(self, reached: Callable[[dict[str, Any]], bool], timeout_s: float, what: str) -> None:
        """Poll ``thaw get functions`` until its answer, the status of each function by name, fulfils a condition.

        Raises:
            LoadImpossible: it does not within ``timeout_s``.
        """
        give_up = time.monotonic() + timeout_s
        self._say(f"$ thaw get functions   (until {what})")
        while True:
            process = await asyncio.create_subprocess_exec(
                *[*self._thaw, "get", "functions", "-o", "json"],
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env=self.environment,
            )
            text, _ = await process.communicate()
            state = {item["metadata"]["name"]: item.get("status", {}) for item in json.loads(text or b"[]")}
            if state and reached(state):
                return
            if time.monotonic() > give_up:
                raise LoadImpossible(f"waited {timeout_s:.0f} s in vain until {what}: {state}; see {self.keep_logs()}")
            await asyncio.sleep(0.3)

    async def until_idle(self, timeout_s: float = _IDLE_S) -> None:
        """Wait until every instance is released and the pool of sandboxes is full again.

        Raises:
            LoadImpossible: there are some after ``timeout_s``.
        """

        def idle(state: dict[str, Any]) -> bool:
            return all(item.get("instances") == [] and item.get("starting") == item.get("level") == 0 for item in state.values())

        await self.until(idle, timeout_s, "all instances are released")
        await asyncio.sleep(1.0)

    async def until_checkpointed(self, names: Sequence[str], ask_once: Callable[[Sequence[str]], Awaitable[None]]) -> None:
        """Start functions cold once, and wait for their checkpoints; again for those whose checkpoint a crash came in between.

        Args:
            names: of the functions.
            ask_once: sends one request to each function that it is given.

        Raises:
            LoadImpossible: one has no checkpoint in the end.
        """
        missing = list(names)

        def checkpointed(state: dict[str, Any]) -> bool:
            missing[:] = [name for name in names if not state.get(name, {}).get("checkpoint")]
            return not missing

        for attempt in range(1, _CHECKPOINT_ATTEMPTS + 1):
            self._say(f"one cold start of each of {', '.join(missing)}; a checkpoint of each follows by itself")
            await ask_once(tuple(missing))
            try:
                await self.until(checkpointed, _CHECKPOINTS_S, "each has a checkpoint")
                return
            except LoadImpossible:
                if attempt == _CHECKPOINT_ATTEMPTS:
                    raise

    def scratch_files(self) -> list[Path]:
        """Files that an instance or a checkpoint should have taken along."""
        agent = self.state / "agent"
        return [*(agent / "work").glob("*"), *(agent / "mount").glob("*"), *agent.rglob(".building-*")]

    def keep_logs(self) -> Path:
        """Copy the logs to where they outlive the state folder."""
        kept = self._out / "logs"
        shutil.copytree(self._log.parent, kept, dirs_exist_ok=True)
        return kept

    def remove(self) -> None:
        """Remove the state folder."""
        shutil.rmtree(self.state, ignore_errors=True)
