"""The pager's keeper: ``python -m agent.pager.process LISTENER_FD`` clones the worker, and clones it again whenever it dies.

Keeper and worker share one table of descriptors. What the worker opens, receives, or gets from the kernel (the userfaultfd of a forked
child) is the keeper's too at the same moment, without a word passing between them, and stays open when the worker is killed: no
userfaultfd is ever closed early, which would turn the missing pages of an instance into zeros. The keeper does nothing that can fail.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import gc
import logging
import os
import resource
import signal
import sys
import time

from agent.pager import worker
from agent.pager.journal import JournalFile
from agent.pager.regions import Regions
from agent.pager.state import Kind, State

logger = logging.getLogger(__name__)
_SYS_CLONE = 56  # x86_64
_CLONE_FILES = 0x400
#: A worker that crashes this soon did not get far; after so many in a row, with growing pauses, the keeper gives up, since the next would
#: not either. Being killed from outside says nothing about the next one.
_SHORT_S, _CRASHES_MAX = 2.0, 20
_PAUSE_S = 0.01
#: Exit status of a worker that is done; anything else is an accident.
DONE = 0


def clone() -> int:
    """Fork, sharing the table of descriptors. As :func:`os.fork` for an interpreter of one thread."""
    python = ctypes.pythonapi
    syscall = ctypes.PyDLL(None).syscall  # the interpreter's lock stays held
    python.PyOS_BeforeFork()
    pid = int(syscall(_SYS_CLONE, ctypes.c_ulong(_CLONE_FILES | signal.SIGCHLD), None, None, None, None))
    if pid == 0:
        python.PyOS_AfterFork_Child()
    else:
        python.PyOS_AfterFork_Parent()
    if pid < 0:
        raise OSError("clone failed")
    return pid


def keep() -> int:
    """Have a worker at all times until one says that it is done; returns the exit status."""
    crashes = 0
    while True:
        started = time.monotonic()
        pid = clone()
        if pid == 0:
            status = 1
            try:
                worker.run()
                status = DONE
            except BaseException:
                logger.exception("the worker fails")
            os._exit(status)  # threads may be in the middle of a download; there is nothing to save
        _, wait_status = os.waitpid(pid, 0)
        code = os.waitstatus_to_exitcode(wait_status)
        if code == DONE:
            return DONE
        logger.error("the worker of the pager ended with %d; another one goes on", code)
        if code == -signal.SIGKILL or time.monotonic() - started > _SHORT_S:
            crashes = 0
            continue
        crashes += 1
        if crashes >= _CRASHES_MAX:
            logger.error("%d workers in a row got nowhere; the pager gives up", crashes)
            return 1
        time.sleep(_PAUSE_S * crashes)


def main() -> None:
    """Entry of ``python -m agent.pager.process``."""
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s pager %(levelname)s %(message)s")
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # the agent decides when; a terminal's Ctrl-C reaches us too
    with contextlib.suppress(ValueError, OSError):
        hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    listener = fcntl.fcntl(int(sys.argv[1]), fcntl.F_DUPFD_CLOEXEC, 16)  # out of the way of the fixed numbers
    for fixed in (worker.LISTENER_FD, worker.JOURNAL_FD):
        os.dup2(listener, fixed, inheritable=False)
    JournalFile(worker.JOURNAL_FD, worker.JOURNAL_BYTES).renew(Kind.SNAPSHOT, State(lambda image, pid: Regions()).snapshot())
    gc.collect()
    gc.freeze()
    os._exit(keep())


if __name__ == "__main__":
    main()
