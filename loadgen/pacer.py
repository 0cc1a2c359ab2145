"""The driver's time: one clock for all its measurements, and a timer that wakes it to about 0.1 ms.

In: instants. Out: a coroutine that ends then. asyncio rounds its own timers up to whole
milliseconds, which would put half a millisecond of the generator's own into every latency. Used by
:mod:`loadgen.driver`.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import time

_CLOCK_MONOTONIC = 1
_TFD_TIMER_ABSTIME = 1


class _Timespec(ctypes.Structure):
    _fields_ = (("seconds", ctypes.c_long), ("nanoseconds", ctypes.c_long))


class _Itimerspec(ctypes.Structure):
    _fields_ = (("interval", _Timespec), ("value", _Timespec))


class Clock:
    """Wall clock time that only goes forward: the wall clock at the start, then the monotonic clock."""

    def __init__(self) -> None:
        self._offset_ns = time.time_ns() - time.monotonic_ns()

    def now_ns(self) -> int:
        """Now, ns since the epoch."""
        return time.monotonic_ns() + self._offset_ns

    def monotonic_ns(self, wall_ns: int) -> int:
        """The monotonic instant of a wall clock time."""
        return wall_ns - self._offset_ns


class Pacer:
    """One timer of the kernel (timerfd); for one waiter at a time."""

    def __init__(self) -> None:
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._file = self._libc.timerfd_create(_CLOCK_MONOTONIC, os.O_NONBLOCK | os.O_CLOEXEC)
        if self._file < 0:
            raise OSError(ctypes.get_errno(), "timerfd_create")

    async def until(self, monotonic_ns: int) -> None:
        """Return at ``monotonic_ns`` of :func:`time.monotonic_ns`, or at once when that is past."""
        if monotonic_ns <= time.monotonic_ns():
            await asyncio.sleep(0)  # others get their turn even when the generator is behind
            return
        seconds, nanoseconds = divmod(monotonic_ns, 1_000_000_000)
        setting = _Itimerspec(_Timespec(0, 0), _Timespec(seconds, nanoseconds))
        if self._libc.timerfd_settime(self._file, _TFD_TIMER_ABSTIME, ctypes.byref(setting), None):
            raise OSError(ctypes.get_errno(), "timerfd_settime")
        loop = asyncio.get_running_loop()
        expired = loop.create_future()
        loop.add_reader(self._file, _end, expired)
        try:
            await expired
        finally:
            loop.remove_reader(self._file)
            with contextlib.suppress(BlockingIOError):
                os.read(self._file, 8)

    def close(self) -> None:
        """Give the timer back."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1


def _end(expired: asyncio.Future[None]) -> None:
    if not expired.done():
        expired.set_result(None)
