"""Writes each function's status, at most once a second and only when it says something new.

In: names of functions of which something has changed, from :mod:`.operator`. Out: patches of ``status``. A patch that fails is made
again, from what is true then; so the newest is never lost and no older one follows it.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterable

from infra.errors import ApiBusy, ApiConflict, ApiError, ApiMissing, ApiUnavailable
from infra.kubernetes.client import ApiServer, Object
from infra.kubernetes.watch import pauses
from infra.settings import KubernetesSettings
from scaler.edges.kubernetes.functions import Resource

logger = logging.getLogger(__name__)
PER_FUNCTION_S = 1.0
#: What is new is written this much later, s: a start has mostly just happened, and API server and cores are needed for the way to it.
_CALM_S = 0.25
#: A status that was refused is tried again after this long, s.
_REFUSED_S = 60.0


class StatusWriter:
    """Remembers what it wrote last.

    Args:
        server: where it is written.
        settings: times.
        statuses: what is true of a function now, for each of its resources; nothing for functions of other scalers.
    """

    def __init__(
        self, server: ApiServer, settings: KubernetesSettings, statuses: Callable[[str], Iterable[tuple[Resource, Object]]]
    ) -> None:
        self._server = server
        self._settings = settings
        self._statuses = statuses
        self._due: dict[str, None] = {}
        #: name → when its status was last written, monotonic, s.
        self._written_s: dict[str, float] = {}
        self._more = asyncio.Event()

    def note(self, name: str) -> None:
        """Something of it has changed; never blocks."""
        if name not in self._due:
            self._due[name] = None
            self._later(_CALM_S)

    async def run(self) -> None:
        """Write until cancelled."""
        waits = pauses(self._settings.retry_s, self._settings.retry_max_s)
        while True:
            await self._more.wait()
            self._more.clear()
            for name in list(self._due):
                early_s = self._written_s.get(name, float("-inf")) + PER_FUNCTION_S - time.monotonic()
                if early_s > 0:
                    self._later(early_s)
                    continue
                del self._due[name]
                try:
                    await self._write(name)
                    waits = pauses(self._settings.retry_s, self._settings.retry_max_s)
                except ApiUnavailable as error:
                    self._due[name] = None
                    self._later(max(next(waits), error.retry_after_s if isinstance(error, ApiBusy) else 0.0))
                    break
            self._written_s = {name: at_s for name, at_s in self._written_s.items() if at_s > time.monotonic() - PER_FUNCTION_S}

    def _later(self, after_s: float) -> None:
        asyncio.get_running_loop().call_later(after_s, self._more.set)

    async def _write(self, name: str) -> None:
        for resource, status in self._statuses(name):
            if not _differs(resource.value.get("status") or {}, status):
                continue
            self._written_s[name] = time.monotonic()
            path = f"/apis/thaw.dev/v1/namespaces/{resource.namespace}/functions/{resource.name}/status"
            try:
                written = await self._server.patch(path, {"metadata": {"uid": resource.uid}, "status": status})
                # The watch brings it too, but later: until then the same would be written again.
                resource.value["status"] = written.get("status") or {}
            except (ApiConflict, ApiMissing):
                continue  # it is gone, and perhaps there is another of that name: the watch says so
            except ApiUnavailable:
                raise
            except ApiError as error:
                logger.warning("status of function %s: %s", name, error)
                asyncio.get_running_loop().call_later(_REFUSED_S, self.note, name)


def _differs(known: Object, status: Object) -> bool:
    return any(known.get(key) != value for key, value in status.items())
