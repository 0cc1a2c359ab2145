"""Settings and command line of an installation that one command makes for itself and removes again."""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import os
from collections.abc import Iterator
from typing import Any

from infra.errors import SettingsError
from infra.settings import Settings
from thaw import invocation


@contextlib.contextmanager
def installation(settings: Settings, name: str, *, subnet: str = "198.19.128.0/17") -> Iterator[tuple[Settings, list[str]]]:
    """A state folder, node name and bridge of its own, for one process at a time.

    Args:
        settings: everything else.
        name: of the folder below the state folder, and of the node.
        subnet: addresses of its instances; different ones where two are up at the same time.

    Yields:
        The settings, and the command line of ``thaw`` with them.

    Raises:
        SettingsError: not root, or another process has it.
    """
    if os.geteuid() != 0:
        raise SettingsError(f"the {name} makes namespaces and restores processes with CRIU, so it needs root: run it with sudo")
    state = settings.paths.state_dir / name
    state.mkdir(parents=True, exist_ok=True)
    agent: dict[str, Any] = {"listen_port": 0, "node_name": name, "bridge": f"thaw{name[:8]}", "subnet": subnet}
    own = dataclasses.replace(
        settings,
        paths=dataclasses.replace(settings.paths, state_dir=state),
        agent=dataclasses.replace(settings.agent, **agent),
    )
    arguments = [*invocation.arguments(), "--state-dir", str(state)]
    for key, value in agent.items():
        arguments += ["--set", f"agent.{key}={value}"]
    with (state.parent / f"{name}.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise SettingsError(f"another {name} runs in {state}; wait for it, or use another --state-dir") from error
        yield own, arguments
