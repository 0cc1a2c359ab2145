"""Which instances get all of their memory in the background, and how fast. Pure.

In: what each restore had faulted, time. Out: for :mod:`agent.pager.worker`, whose turn it is and when. Only instances that are old enough
and still miss pages are filled: one that is idle, or on standby, costs what it has touched and no more.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from agent.pager.state import Restore


class Filling:
    """Restores being filled, in turn."""

    def __init__(self) -> None:
        self._after_ns = 0.0
        self._bytes_per_s = 0.0
        self._turns: list[Restore] = []
        #: Pages that each had faulted at the last look.
        self._faulted: dict[str, int] = {}
        #: When the next piece is due, monotonic s.
        self.due_s = 0.0

    def configure(self, after_s: float, mb_per_s: float) -> None:
        """From now on fill restores that are so old, at this rate; 0: none."""
        self._after_ns, self._bytes_per_s = after_s * 1e9, mb_per_s * 1e6

    def __bool__(self) -> bool:
        return bool(self._turns)

    def choose(self, restores: Iterable[Restore], here: Callable[[Restore], bool], now_ns: int) -> None:
        """Look at all restores: those that missed pages since the last look are filled until the next.

        Args:
            restores: all of them.
            here: whether the image of one is wholly on the node.
            now_ns: wall clock.
        """
        self._turns = []
        for restore in restores:
            if restore.pages_faulted != self._faulted.get(restore.name, 0):
                self._faulted[restore.name] = restore.pages_faulted
                old = now_ns - restore.begun_ns > self._after_ns
                if self._bytes_per_s > 0 and old and restore.finished and restore.spaces and not restore.record and here(restore):
                    self._turns.append(restore)

    def take_turn(self) -> Restore:
        """Whose turn it is; give it back with :meth:`filled` unless it is done."""
        return self._turns.pop(0)

    def filled(self, restore: Restore, size: int, now_s: float, slack_s: float) -> None:
        """``size`` bytes were put in place; time that nobody used counts for ``slack_s`` at most."""
        self._turns.append(restore)
        self.due_s = max(self.due_s, now_s - slack_s) + size / self._bytes_per_s

    def forget(self, restore: Restore) -> None:
        """It was released."""
        if restore in self._turns:
            self._turns.remove(restore)
        self._faulted.pop(restore.name, None)
