"""A whole installation on this machine for one measurement: started by ``thaw`` commands, gone afterwards.

In: settings with a state folder of its own and the ``thaw`` command line. Out: the embedded stack and a background process for as long as a
``with`` block lasts. Every command is printed before it runs, so that a reader can do the same by hand. Used by :mod:`loadgen.demo` and
:mod:`loadgen.bench`.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import yaml

from agent.api.function import Function, read_yaml
from infra import settings as settings_module
from infra.settings import Settings
from loadgen.errors import LoadImpossible

Say = Callable[[str], None]
_AGENT_S, _STOP_S = 60.0, 60.0


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
        self._environment = {**os.environ, "THAW_RUN": str(self.state)}
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
    def background(self, name: str) -> Iterator[None]:
        """``thaw run`` or ``thaw agent`` until the end of the block; begins when the agent listens.

        Raises:
            LoadImpossible: it does not come up.
        """
        self._say(f"$ thaw {name}   (logs in {self._log.parent})")
        with self._log.open("ab") as log:
            process = subprocess.Popen(
                [*self._thaw, name],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                env=self._environment,
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
                env=self._environment,
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

    def keep_logs(self) -> Path:
        """Copy the logs to where they outlive the state folder."""
        kept = self._out / "logs"
        shutil.copytree(self._log.parent, kept, dirs_exist_ok=True)
        return kept

    def remove(self) -> None:
        """Remove the state folder."""
        shutil.rmtree(self.state, ignore_errors=True)
