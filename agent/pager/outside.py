"""The pager outlives the pod of the agent that has started it, as it outlives the agent.

In: nothing. Out: what :meth:`agent.pager.client.PagerClient.start` runs it with. A container runtime kills what is in the container's
cgroups, and the network of a pod goes with it. Missing pages of an instance read as zeros once the pager is gone, so it belongs to the
node: beside the pods' cgroups, and in the network of whoever started the agent's container. An agent that runs in no pod has nothing to
leave.
"""

from __future__ import annotations

import logging
import os

from agent.sandbox import cgroup

logger = logging.getLogger(__name__)


def command_prefix() -> list[str]:
    """What a program is started with so that its network is the node's."""
    if not cgroup.outside_pods():
        return []
    # With the host's pids (hostPID) the parent is the container runtime's, which is in no pod.
    return ["nsenter", f"--net=/proc/{os.getppid()}/ns/net", "--"]


def leave_pod(pid: int) -> None:
    """Move a process that has just been started out of the agent's pod."""
    for directory in cgroup.outside_pods():
        try:
            (directory / "cgroup.procs").write_text(str(pid))
        except OSError as error:
            logger.error("the pager stays in the cgroup of the agent's pod and ends with it: %s: %s", directory, error)
