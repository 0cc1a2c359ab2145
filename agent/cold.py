"""The cold start: run the command and wait until it answers.

In: a function and its layers. Out: a ready :class:`~agent.instance.Instance` of start mode ``cold``; also the donor of a checkpoint
(:mod:`agent.checkpoint`), whose output CRIU can hand over to other descriptors later.
"""

from __future__ import annotations

import time

from agent.api.function import Function
from agent.api.records import PhaseClock
from agent.errors import AgentError
from agent.furnish import last_output
from agent.instance import Instance, Workshop
from agent.ready import wait_ready
from agent.sandbox.protocol import Process
from agent.sandbox.rootfs import RootLayers

DEFAULT_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


async def start_cold(
    workshop: Workshop,
    function: Function,
    layers: RootLayers,
    instance_id: str,
    deadline_ns: int,
    clock: PhaseClock,
    *,
    donor: bool = False,
) -> Instance:
    """Start ``function`` by running its command.

    Args:
        workshop: what the node works with.
        function: what to run.
        layers: its root files.
        instance_id: name of the new instance, if its sandbox gives it none.
        deadline_ns: wall clock ns at which to give up; the readiness rule's own timeout may be earlier.
        clock: gets the phases ``sandbox``, ``exec``, ``ready``, ``first_response``.
        donor: it will be dumped.

    Raises:
        AgentError: it did not come up; nothing is left.
    """
    with clock.phase("sandbox"):
        sandbox = await workshop.pool.take(function, layers)
        name = sandbox.name(instance_id)
        instance = Instance(name, function, sandbox, sandbox.output or workshop.furnisher.log(name))
    try:
        with clock.phase("sandbox.root"):
            await workshop.furnisher.furnish(sandbox, function, layers, instance.id, "")
            if sandbox.worker is not None:
                sandbox.worker.close()  # nothing is restored here
        with clock.phase("exec"):
            spec = function.spec
            environment = {"PATH": DEFAULT_PATH, "LANG": "C.UTF-8", **spec.environment}
            process = Process(spec.command, environment, spec.working_directory)
            started = await sandbox.start_application(process, instance.log, donor=donor)
            instance.root_pid, instance.outputs = started.pid, started.outputs
            instance.watch()
        limit_ns = time.time_ns() + int(spec.readiness.timeout_seconds * 1e9)
        start_ns = time.time_ns()
        readiness = await wait_ready(sandbox.address, function, min(deadline_ns, limit_ns), instance.ended)
        clock.add("ready", start_ns, readiness.accepted_ns)
        clock.add("first_response", readiness.accepted_ns, readiness.responded_ns)
        instance.started_ns = readiness.responded_ns
    except BaseException as error:
        instance.keep_log(workshop.furnisher.log(instance.id))
        await instance.stop(workshop)
        said = last_output(instance.log)
        if isinstance(error, AgentError) and said:
            raise type(error)(f"{error}; its last output: {said}") from error
        raise
    return instance
