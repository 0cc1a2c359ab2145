"""A node that no scaler can reach starts nothing more: what was asked of it has been asked of another one since.

In: the streams of scalers that are open (:mod:`agent.server`). Out: nothing, or a refusal, when a start's turn has come
(:mod:`agent.starts`, :mod:`agent.standbys`, :mod:`agent.node`). A stream is open as long as the scaler's kernel answers
(:mod:`agent.api.connection`), so nobody has to send anything for it. What serves goes on.
"""

from __future__ import annotations

import time

from agent.api.connection import Connection
from agent.errors import Refused


class Scalers(set[Connection]):
    """The streams of scalers.

    Args:
        lease_s: how long a node goes on with what it was asked after the last of them has broken.
    """

    def __init__(self, lease_s: float) -> None:
        super().__init__()
        self._lease_s = lease_s
        self._heard_s = time.monotonic()

    def discard(self, connection: object, /) -> None:
        """A stream is closed."""
        if connection in self:
            super().discard(connection)
            self._heard_s = time.monotonic()

    def check(self) -> None:
        """Called before something begins to run.

        Raises:
            Refused: no scaler has been heard for too long.
        """
        silent_s = 0.0 if self else time.monotonic() - self._heard_s
        if silent_s > self._lease_s:
            raise Refused(f"no scaler has been heard for {silent_s:.1f} s, and agent.lease_s is {self._lease_s:g}")
