"""The placeholder pods of one node: those that wait, with a CRIU worker in each, and those that are in use.

In: pods as :mod:`agent.kubernetes` finds them. Out: a :class:`~agent.sandbox.pod.PodSandbox` for a function, at once, or a refusal with
which the planner tries another node. Pods are made and deleted by the scaler; a pod whose instance has answered is never used again,
another one is used again when nothing was left in it.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
import os
import shutil
import signal
from collections.abc import Awaitable, Callable, Collection, Iterable
from pathlib import Path

import msgspec

from agent.api.function import Function
from agent.errors import AgentError, NoRoom, SandboxError
from agent.sandbox import cgroup
from agent.sandbox.pod import Gate, Pod, PodRecord, PodSandbox, init_of
from agent.sandbox.protocol import Sandbox
from agent.sandbox.rootfs import RootLayers
from infra.local.processes import identity_of
from infra.tasks import TaskGroup

logger = logging.getLogger(__name__)
#: Files in a sandbox's folder: which pod it is; there when something was put into it.
_RECORD, _TAKEN = "pod", "taken"
_TRIES, _PAUSE_S = 10, 0.3
_RENEW_S = 1.0


class Placeholders:
    """The pods of this node. Also finds those that an agent which is gone had in use (:class:`~agent.sandbox.protocol.Keeper`)."""

    def __init__(self, folders: Path, enter: Path, gate: Gate, tasks: TaskGroup) -> None:
        """Begin with none.

        Args:
            folders: gets one folder per pod.
            enter: the compiled ``enter.c``.
            gate: tells the cluster what becomes of a pod.
            tasks: runs what nobody waits for.
        """
        self._folders = folders
        self._enter = enter
        self._gate = gate
        self._tasks = tasks
        self._prepare: Callable[[PodSandbox], Awaitable[None]] | None = None
        self._moved: Callable[[str], None] = lambda function: None
        #: By uid: pods that may be used; sandboxes that wait; uids that are being prepared or are in use.
        self._pods: dict[str, Pod] = {}
        self._free: dict[str, PodSandbox] = {}
        self._busy: set[str] = set()
        folders.mkdir(parents=True, exist_ok=True)

    def begin(self, prepare: Callable[[PodSandbox], Awaitable[None]], moved: Callable[[str], None]) -> None:
        """Prepare pods from now on.

        Args:
            prepare: leaves in a pod what a start needs.
            moved: called with the name of a function whose pods have another image than before.
        """
        self._prepare, self._moved = prepare, moved
        self.see(list(self._pods.values()))

    def see(self, pods: Iterable[Pod]) -> None:
        """These pods can be used."""
        for pod in pods:
            known = self._pods.get(pod.uid)
            if known is None and any(_same(pod, other) and pod.image != other.image for other in self._pods.values()):
                self._moved(pod.function)
            self._pods[pod.uid] = pod
            if self._prepare is not None and pod.uid not in self._busy and pod.uid not in self._free:
                self._busy.add(pod.uid)
                self._tasks.spawn(self._make_ready(pod), f"placeholder {pod.name}")

    def keep_only(self, uids: Collection[str]) -> None:
        """There are no other pods than these."""
        for uid in set(self._pods) - set(uids):
            self.lose(uid)

    def lose(self, uid: str) -> None:
        """This pod cannot be used any more. What is in it goes on until its end."""
        self._pods.pop(uid, None)
        self._busy.discard(uid)
        sandbox = self._free.pop(uid, None)
        if sandbox is not None:
            self._tasks.spawn(self._let_go(sandbox), f"end of placeholder {uid}")

    async def take(self, function: Function, layers: RootLayers) -> PodSandbox:
        """A pod of this function with this image, owned by the caller, who gives it back.

        Raises:
            NoRoom: none is free.
        """
        for uid, sandbox in self._free.items():
            if _is_of(sandbox.pod, function) and _image_digest(sandbox.pod) == layers.files_digest and not sandbox.gone.done():
                del self._free[uid]
                self._busy.add(uid)
                (sandbox.folder / _TAKEN).touch()
                return sandbox
        raise NoRoom("no placeholder pod of it is free on this node", function=function.name)

    async def give_back(self, sandbox: Sandbox) -> None:
        """Empty a pod. If it is as it was, it waits again; if not, it is left to whoever deletes it."""
        assert isinstance(sandbox, PodSandbox)
        # To its end, also when the start that failed has no time left.
        await asyncio.shield(self._tasks.spawn(self._take_back(sandbox), f"return of pod {sandbox.pod.name}"))

    def check_room(self, function: Function, memory_mb: int) -> None:
        """Whether a pod of the function waits; its memory is the pod's, which the scheduler found room for.

        Raises:
            NoRoom: none does.
        """
        if not any(_is_of(sandbox.pod, function) for sandbox in self._free.values()):
            raise NoRoom("no placeholder pod of it is free on this node", function=function.name)

    def layers(self, function: Function) -> RootLayers:
        """The root of the function's pods here, named by its image.

        Raises:
            NoRoom: there is no such pod.
        """
        found = [pod for pod in self._pods.values() if _is_of(pod, function)]
        if not found:
            raise NoRoom("no placeholder pod of it is on this node", function=function.name)
        newest = next((pod for pod in reversed(found) if pod.uid in self._free), found[-1])
        return RootLayers("", "", (), _image_digest(newest))

    async def close(self) -> None:
        """Let go of pods that wait; they stay as they are."""
        for sandbox in list(self._free.values()):
            await self._let_go(sandbox)
        self._free.clear()

    def left(self) -> list[Path]:
        """Folders of pods that an agent which is gone has left."""
        return sorted(self._folders.iterdir())

    async def adopt(self, folder: Path) -> PodSandbox:
        """Take over a pod.

        Raises:
            SandboxError: it does not live any more.
        """
        try:
            record = msgspec.msgpack.decode((folder / _RECORD).read_bytes(), type=PodRecord)
        except msgspec.MsgspecError as error:
            raise SandboxError(f"it cannot be taken over: {error}", sandbox=folder.name) from error
        sandbox = PodSandbox(record, folder, self._enter, self._gate)
        try:
            await sandbox.greet()
        except SandboxError:
            sandbox.close()
            raise
        sandbox.spent = True  # what was in its volumes before is not known any more
        self._busy.add(sandbox.id)
        # A standby in it is thawed before the API server has told of any pod, and where no other pod of the function is.
        self._pods[sandbox.id] = sandbox.pod
        return sandbox

    async def discard(self, folder: Path) -> None:
        """End what was in a pod that is not taken over; if nothing was, it is found again."""
        if (folder / _TAKEN).exists():
            with contextlib.suppress(OSError, msgspec.MsgspecError):
                record = msgspec.msgpack.decode((folder / _RECORD).read_bytes(), type=PodRecord)
                self._busy.add(record.pod.uid)
                self._gate.ended(record.pod)
                if record.init.alive():
                    for pid in cgroup.limited(cgroup.directories_of(record.init.pid)).processes():
                        if pid != record.init.pid:
                            os.kill(pid, signal.SIGKILL)
        await asyncio.to_thread(shutil.rmtree, folder, True)

    def _set_free(self, sandbox: PodSandbox) -> None:
        """It waits, until its worker ends (out of memory, or killed by the pod's root): then it gets another."""

        def ended(pid: int, status: int) -> None:
            if sandbox.worker is not None and pid == sandbox.worker.pid and self._free.pop(sandbox.id, None) is not None:
                logger.warning("the worker in pod %s/%s has ended with status %d", sandbox.pod.namespace, sandbox.pod.name, status)
                self._busy.add(sandbox.id)
                self._tasks.spawn(self._renew(sandbox), f"another worker in pod {sandbox.pod.name}")

        sandbox.on_exit = ended
        self._free[sandbox.id] = sandbox

    async def _renew(self, sandbox: PodSandbox) -> None:
        await asyncio.sleep(_RENEW_S)  # whoever kills it may do so again and again
        await self._take_back(sandbox)

    async def _take_back(self, sandbox: PodSandbox) -> None:
        if await sandbox.empty() and sandbox.id in self._pods and self._prepare is not None:
            try:
                await self._prepare(sandbox)
            except (AgentError, OSError) as error:
                logger.warning("pod %s/%s cannot be used again: %s", sandbox.pod.namespace, sandbox.pod.name, error)
            else:
                (sandbox.folder / _TAKEN).unlink(missing_ok=True)
                self._gate.waits(sandbox.pod)
                self._busy.discard(sandbox.id)
                self._set_free(sandbox)
                return
        self._pods.pop(sandbox.id, None)
        await sandbox.destroy()

    async def _make_ready(self, pod: Pod) -> None:
        try:
            for _ in range(_TRIES):
                if self._pods.get(pod.uid) != pod:
                    return
                try:
                    self._set_free(await self._prepared(pod))
                    logger.info("pod %s/%s of %s waits for an instance", pod.namespace, pod.name, pod.function)
                    return
                except (AgentError, OSError) as error:
                    logger.warning("pod %s/%s cannot be prepared: %s", pod.namespace, pod.name, error)
                    await asyncio.sleep(_PAUSE_S)
        finally:
            self._busy.discard(pod.uid)
            if pod.uid not in self._pods and pod.uid in self._free:
                self.lose(pod.uid)  # it went while it was being prepared

    async def _prepared(self, pod: Pod) -> PodSandbox:
        assert self._prepare is not None
        pid = await asyncio.to_thread(init_of, pod.container)
        init = identity_of(pid) if pid is not None else None
        if init is None:
            raise SandboxError("its PID 1 is not found; does the agent see the host's processes (hostPID)?", sandbox=pod.uid)
        folder = self._folders / pod.uid
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(mode=0o700)
        record = PodRecord(pod, init)
        (folder / _RECORD).write_bytes(msgspec.msgpack.encode(record))
        sandbox = PodSandbox(record, folder, self._enter, self._gate)
        try:
            await sandbox.greet()
            await self._prepare(sandbox)
        except BaseException:
            await self._let_go(sandbox)
            raise
        return sandbox

    async def _let_go(self, sandbox: PodSandbox) -> None:
        """Stop using a pod in which nothing is."""
        if sandbox.worker is not None:
            sandbox.worker.close()
        sandbox.close()
        await asyncio.to_thread(shutil.rmtree, sandbox.folder, True)
        self._busy.discard(sandbox.id)


def _same(one: Pod, other: Pod) -> bool:
    return (one.namespace, one.function, one.digest) == (other.namespace, other.function, other.digest)


def _is_of(pod: Pod, function: Function) -> bool:
    # The namespace too: labels and annotations are whatever the author of a pod wrote, and memory of one tenant is not for another's pod.
    return (pod.namespace, pod.function, pod.digest) == (function.metadata.namespace, function.name, function.digest)


def _image_digest(pod: Pod) -> str:
    return hashlib.sha256(pod.image.encode()).hexdigest()
