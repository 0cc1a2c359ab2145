"""What the agent stands on, as far as its bookkeeping can tell: the store, images and their cache, sandboxes, the pager.

In: calls of the shipped agent. Out: what the real parts answer, later, or their errors. They fail as their node (:class:`.machine.Machine`)
says.
"""

from __future__ import annotations

import asyncio
import random
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from agent.api.function import Function
from agent.epochs import Epochs
from agent.errors import CriuError, NoRoom, PagerError
from agent.instance import Instance, Workshop
from agent.store.cache import CachedImage
from infra.errors import StoreError

if TYPE_CHECKING:
    from thaw.faults.machine import Machine

#: A folder of which nothing is ever read.
NOWHERE = Path("/nonexistent")


@dataclass
class Image:
    """As :class:`agent.store.cache.CachedImage`."""

    checkpoint: str
    function: str
    digest: str
    #: No restore of it ever works.
    corrupt: bool
    complete: bool = False
    users: int = 0
    used_at: float = 0.0
    failures: int = 0
    unusable: str = ""
    opened: bool = False
    opening: None = None
    generation: int = 0
    directory: Path = NOWHERE

    @property
    def manifest(self) -> SimpleNamespace:
        """As far as reports name it."""
        return SimpleNamespace(function=self.function, function_digest=self.digest, image_bytes=50 << 20)

    #: The shipped one.
    held = CachedImage.held

    def mark_complete(self) -> None:
        """Every page is here."""
        self.complete = True


class Store:
    """S3: the current checkpoint of each function."""

    def __init__(self, seed: str) -> None:
        self._random = random.Random(f"{seed}/store")
        self.current: dict[str, Image] = {}
        self.down = False
        #: Chance that a new checkpoint is one that never restores.
        self.corrupting = False
        self._made = 0

    async def reached(self) -> None:
        """Wait for an answer.

        Raises:
            StoreError: the store is down.
        """
        await asyncio.sleep(self._random.uniform(0.002, 0.05))
        if self.down:
            await asyncio.sleep(self._random.choice([0.01, 2.0]))
            raise StoreError("the store is down")

    def publish(self, function: Function) -> Image:
        """Make a checkpoint current."""
        self._made += 1
        image = Image(f"cp{self._made}", function.name, function.digest, self.corrupting)
        self.current[function.name] = image
        return image


@dataclass(eq=False)
class Sandbox:
    """As :class:`agent.sandbox.local.Sandbox`, and what is in it."""

    id: str
    machine: Machine
    function: Function
    command_id: str
    shard: int
    epoch: int
    #: ``making``, ``standby``, ``running``.
    state: str = "making"
    #: Memory is served by this pager.
    pager: int | None = None
    #: What the agent wrote down for its successor; empty: nothing yet.
    record: dict[str, Any] = field(default_factory=dict)
    image: Image | None = None
    lives: bool = True
    gone: Any = None
    on_exit: Any = None
    address: str = "198.18.0.2"
    folder: Path = NOWHERE
    output: None = None
    worker: None = None
    cgroup: Any = field(default_factory=lambda: SimpleNamespace(was_oom_killed=lambda: False))

    def ended(self, pid: int) -> int | None:
        """The wait status of its main process, when it has ended."""
        return None if self.lives else 9

    def die(self) -> None:
        """Its processes end."""
        self.lives = False
        if self.on_exit is not None:
            self.on_exit(1, 9)

    def processes(self) -> list[int]:
        """Nothing is measured here."""
        return []

    def signal_all(self, number: int) -> None:
        """They obey."""
        self.die()

    def was_oom_killed(self) -> bool:
        """Never."""
        return False

    def retire(self) -> None:
        """Of no consequence here."""

    def rest(self) -> None:
        """Of no consequence here."""

    def complete(self, pid: int) -> None:
        """Of no consequence here."""

    async def unrouted(self, timeout_s: float) -> None:
        """Nothing routes to it."""


class KeptEpochs(Epochs):
    """With a dictionary in the place of the file."""

    def __init__(self, machine: Machine) -> None:
        self._disk = machine.disk
        self._newest = dict(self._disk.get("run/epochs", {}))

    def _write(self) -> None:
        self._disk["run/epochs"] = dict(self._newest)


class Pool:
    """As :class:`agent.sandbox.pool.SandboxPool`, as far as ends need it."""

    def __init__(self, machine: Machine) -> None:
        self._machine = machine

    async def give_back(self, sandbox: Sandbox) -> None:
        """Remove everything of it: the processes whatever happens, then its network, then what is left of it."""
        sandbox.lives = False
        if not sandbox.gone.done():
            await asyncio.sleep(self._machine.random.uniform(0.001, 0.02))
            if not sandbox.gone.done():
                sandbox.gone.set_result(None)
        await asyncio.sleep(self._machine.random.uniform(0.001, 0.05))
        self._machine.sandboxes.pop(sandbox.id, None)

    def check_room(self, function: Function, wanted_mb: int) -> None:
        """Whether there is memory."""
        if self._machine.free_mb < wanted_mb:
            raise NoRoom("the memory is full")


class Pager:
    """As :class:`agent.pager.client.PagerClient`."""

    def __init__(self, machine: Machine) -> None:
        self._machine = machine

    @property
    def lost(self) -> asyncio.Future[None]:
        """Completed when it is gone; the next one is the same object here."""
        gone: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        if not self._machine.pager_lives:
            gone.set_result(None)
        return gone

    async def _reached(self) -> None:
        await asyncio.sleep(0.001)
        if not self._machine.pager_lives:
            raise PagerError("the pager is gone")

    async def open_image(self, checkpoint: str, directory: Path, *, complete: bool) -> None:
        """Know an image."""
        await self._reached()

    async def close_image(self, checkpoint: str) -> None:
        """Forget an image."""
        await self._reached()

    async def complete_image(self, checkpoint: str, timeout_s: float) -> None:
        """Bring all pages."""
        await self._reached()
        try:
            await self._machine.store.reached()
        except StoreError as error:
            raise PagerError("pages cannot be had") from error

    async def prefetched(self, name: str, timeout_s: float) -> None:
        """Wait for the working set."""
        await self._reached()

    async def release(self, name: str) -> None:
        """An instance is gone."""


class Cache:
    """As :class:`agent.store.cache.ImageCache`."""

    def __init__(self, machine: Machine) -> None:
        self._images = machine.images
        for image in self._images.values():
            image.users, image.opened, image.failures = 0, False, 0

    def __iter__(self) -> Any:
        return iter(list(self._images.values()))

    def get(self, checkpoint: str) -> Image | None:
        """One of them."""
        return self._images.get(checkpoint)

    def over_budget(self) -> list[Image]:
        """None: images are small."""
        return []

    def evict(self, checkpoint: str) -> None:
        """Drop one."""
        self._images.pop(checkpoint, None)


class Fetcher:
    """As :class:`agent.fetch.Fetcher`."""

    def __init__(self, cache: Cache, store: Store) -> None:
        self._cache, self._store = cache, store

    async def current(self, function: Function, layers: Any, clock: Any, fetched: Any, **_: Any) -> Image | None:
        """The current checkpoint, on this node."""
        await self._store.reached()
        published = self._store.current.get(function.name)
        if published is None or published.digest != function.digest:
            return None
        images = self._cache._images
        if published.checkpoint not in images:
            await self._store.reached()
            images[published.checkpoint] = Image(published.checkpoint, published.function, published.digest, published.corrupt)
        return images[published.checkpoint]

    async def held(self, function: Function, layers: Any, clock: Any) -> Image | None:
        """What is on this node."""
        found = [image for image in self._cache if image.complete and (image.function, image.digest) == (function.name, function.digest)]
        return found[-1] if found else None

    def expect(self, function_name: str, generation: int) -> None:
        """Nobody rolls a pointer back here."""

    def trouble(self) -> str:
        """The breaker is not modelled."""
        return ""


class Checkpoints:
    """As :class:`agent.checkpoint.Checkpointer`."""

    def __init__(self, machine: Machine, workshop: Workshop) -> None:
        self._machine, self._workshop = machine, workshop

    async def make(
        self, function: Function, layers: Any, name: str, deadline_ns: int, *, heal: bool = False
    ) -> tuple[Image, dict[str, float]]:
        """Freeze a fresh instance and publish it."""
        machine = self._machine
        instance = Instance(name, function, await machine.begin(function), NOWHERE)  # type: ignore[arg-type]
        try:
            await machine.wait(0.5, 3.0, deadline_ns)
            if machine.restores_fail:
                raise CriuError("the trial restore failed")
            await machine.store.reached()
        finally:
            await instance.stop(self._workshop)
        image = machine.store.publish(function)
        mine = Image(image.checkpoint, image.function, image.digest, image.corrupt, complete=True)
        machine.images[image.checkpoint] = mine
        return mine, {}


class Drains:
    """As :class:`agent.drain.Drainer`."""

    def __init__(self, machine: Machine) -> None:
        self._machine = machine

    async def drain(self, instance: Instance, timeout_s: float) -> bool:
        """Wait for requests in progress."""
        waits_s = min(timeout_s, self._machine.random.choice([0.0, 0.0, 0.1, 1.0]))
        if waits_s:
            hurry = asyncio.ensure_future(instance.hurry.wait())
            await asyncio.wait((hurry, instance.ended), timeout=waits_s, return_when=asyncio.FIRST_COMPLETED)
            hurry.cancel()
        return not waits_s


def layers(function: Function) -> Any:
    """Of a root that has none."""
    return SimpleNamespace(root="/", layer="", targets=(), binds=())
