"""What a measurement was made on.

In: /proc. Out: facts by name, in the order in which the report shows them.
"""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Mapping
from pathlib import Path


def facts(more: Mapping[str, str] | None = None) -> dict[str, str]:
    """Processor, memory, kernel and interpreter of this machine, then what the caller knows (versions of tools)."""
    memory_kib = int(_first(r"MemTotal:\s*(\d+)", "/proc/meminfo") or 0)
    return {
        "processor": _first(r"model name\s*:\s*(.+)", "/proc/cpuinfo") or platform.machine(),
        "cores": str(len(os.sched_getaffinity(0))),
        "memory": f"{memory_kib / 2**20:.1f} GiB",
        "load average at the end": load_average(),
        "kernel": platform.release(),
        "system": _first(r'PRETTY_NAME="?([^"\n]+)', "/etc/os-release") or platform.system(),
        "Python": platform.python_version(),
        **(more or {}),
    }


def load_average() -> str:
    """Of the last 1, 5 and 15 minutes: whether the machine was quiet."""
    return " ".join(f"{value:.1f}" for value in os.getloadavg())


def _first(pattern: str, path: str) -> str:
    try:
        match = re.search(pattern, Path(path).read_text())
    except OSError:
        return ""
    return match[1].strip() if match else ""
