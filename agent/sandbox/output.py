"""Where an instance's output goes: a file of its own, and for donors a pipe into it.

In: paths. Out: descriptors. CRIU can put any descriptor in the place of an inherited pipe, but not of a file.
"""

from __future__ import annotations

import asyncio
import os
from pathlib import Path


def open_output(path: Path) -> int:
    """A descriptor that an instance writes its output to; the caller closes its copy."""
    return os.open(path, os.O_CREAT | os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC, 0o640)


class OutputPipe:
    """A pipe whose content goes to a file, until the last writer is gone."""

    def __init__(self, log: Path) -> None:
        """Make it.

        Args:
            log: gets what is written.
        """
        self._read_fd, self.write_fd = os.pipe2(os.O_CLOEXEC)
        #: By which CRIU knows it.
        self.name = f"pipe:[{os.fstat(self.write_fd).st_ino}]"
        self._output = open_output(log)
        os.set_blocking(self._read_fd, False)
        asyncio.get_running_loop().add_reader(self._read_fd, self._drain)

    def _drain(self) -> None:
        piece = os.read(self._read_fd, 65536)
        if piece:
            os.write(self._output, piece)
            return
        asyncio.get_running_loop().remove_reader(self._read_fd)
        os.close(self._read_fd)
        os.close(self._output)
