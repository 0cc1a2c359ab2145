"""Keeps processes running in the foreground, as a service manager would: what dies is started again.

In: named command lines. Out: their output in log files, a line for each start and end. Used by ``thaw run``; on a real node systemd or
Kubernetes does this. It adopts and reaps what a killed agent leaves (PR_SET_CHILD_SUBREAPER), so that no zombie stays.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

_PR_SET_CHILD_SUBREAPER = 36
_BACKOFF_S, _BACKOFF_MAX_S = 0.2, 5.0
#: A process that ran this long is taken to be well; its next start is at once again.
_WELL_S = 10.0
_STOP_S = 20.0


class Supervisor:
    """Runs commands until it is told to stop. One per process: it reaps every child."""

    def __init__(self, commands: Mapping[str, Sequence[str]], logs: Path, report: Callable[[str], None]) -> None:
        self._commands = commands
        self._logs = logs
        self._report = report
        self._running: dict[str, tuple[int, float]] = {}
        self._start_at: dict[str, float] = dict.fromkeys(commands, 0.0)
        self._pause: dict[str, float] = dict.fromkeys(commands, _BACKOFF_S)
        self._stopping = False

    def run(self) -> None:
        """Start everything and keep it running until SIGTERM or SIGINT; then stop everything."""
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
        self._logs.mkdir(parents=True, exist_ok=True)
        signals = {signal.SIGCHLD, signal.SIGTERM, signal.SIGINT}
        signal.pthread_sigmask(signal.SIG_BLOCK, signals)
        try:
            while not self._stopping:
                self._start_due()
                due = [at for name, at in self._start_at.items() if name not in self._running]
                wait_s = max(0.0, min(due) - time.monotonic()) if due else 3600.0
                received = signal.sigtimedwait(signals, wait_s)
                if received is not None and received.si_signo in (signal.SIGTERM, signal.SIGINT):
                    self._stopping = True
                self._reap()
        finally:
            self._stop()
            signal.pthread_sigmask(signal.SIG_UNBLOCK, signals)

    def _start_due(self) -> None:
        for name, arguments in self._commands.items():
            if name not in self._running and time.monotonic() >= self._start_at[name]:
                with (self._logs / f"{name}.log").open("ab") as log:
                    process = subprocess.Popen(
                        arguments,
                        stdin=subprocess.DEVNULL,
                        stdout=log,
                        stderr=log,
                        start_new_session=True,  # Ctrl-C comes to us alone, so that the order of stopping is ours
                        preexec_fn=_unblock_signals,
                    )
                self._running[name] = (process.pid, time.monotonic())
                process.returncode = 0  # reaped below; keeps Popen from warning
                self._report(f"{name}: started (pid {process.pid})")

    def _reap(self) -> None:
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            for name, (known, since) in list(self._running.items()):
                if known == pid:
                    del self._running[name]
                    if not self._stopping:
                        self._ended(name, since, os.waitstatus_to_exitcode(status))

    def _ended(self, name: str, since: float, code: int) -> None:
        if time.monotonic() - since > _WELL_S:
            self._pause[name] = _BACKOFF_S
        self._start_at[name] = time.monotonic() + self._pause[name]
        why = f"signal {-code}" if code < 0 else f"code {code}"
        self._report(f"{name}: ended with {why}; starting it again in {self._pause[name]:.1f} s (log: {self._logs / name}.log)")
        self._pause[name] = min(self._pause[name] * 2, _BACKOFF_MAX_S)

    def _stop(self) -> None:
        """The scaler first, so that it does not take the agent's end for a lost node; in reverse order of the commands."""
        for name in reversed(list(self._commands)):
            if name in self._running:
                pid = self._running[name][0]
                self._signal(pid, signal.SIGTERM)
                if not self._gone(name, _STOP_S):
                    self._report(f"{name}: did not stop within {_STOP_S:.0f} s; killed")
                    self._signal(pid, signal.SIGKILL)
                    self._gone(name, _STOP_S)
        time.sleep(0.05)
        self._reap()

    def _gone(self, name: str, timeout_s: float) -> bool:
        give_up = time.monotonic() + timeout_s
        while name in self._running and time.monotonic() < give_up:
            signal.sigtimedwait({signal.SIGCHLD}, 0.2)
            self._reap()
        return name not in self._running

    @staticmethod
    def _signal(pid: int, number: signal.Signals) -> None:
        try:
            os.kill(pid, number)
        except ProcessLookupError:
            return


def _unblock_signals() -> None:
    signal.pthread_sigmask(signal.SIG_SETMASK, [])
