"""Posts Events, so that ``kubectl describe`` tells what went wrong with a function or a pod.

In: what failed, from :mod:`.operator` and :mod:`.controller`, handed over without waiting. Out: ``v1`` Events; the same one again counts
up, at most every :data:`AGAIN_S`. Bounded: of :data:`MAX` Events at once the newest are dropped, and counted in the log.
"""

from __future__ import annotations

import asyncio
import datetime
import logging
import time
from dataclasses import dataclass
from typing import Literal

from infra.errors import ApiError, ApiMissing, ApiUnavailable
from infra.kubernetes.client import NAMESPACE_ENDS, ApiServer, Object
from infra.kubernetes.watch import pauses
from infra.settings import KubernetesSettings

logger = logging.getLogger(__name__)
AGAIN_S = 10.0
MAX = 1000
#: One that was not repeated for this long is forgotten: the next is a new Event.
_FORGET_S = 600.0
_MESSAGE_MAX = 1000
_COMPONENT = "thaw-scaler"


@dataclass
class _Told:
    """One Event, told or to be told."""

    about: Object
    first: str
    count: int = 0
    #: Of these the server knows.
    posted: int = 0
    name: str = ""
    #: Monotonic, s.
    posted_s: float = float("-inf")
    seen_s: float = 0.0


def now() -> str:
    """The time as the API server writes it."""
    return datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def about(value: Object) -> Object:
    """How an Event names its object."""
    metadata = value["metadata"]
    return {
        "apiVersion": value["apiVersion"],
        "kind": value["kind"],
        "name": metadata["name"],
        "namespace": metadata["namespace"],
        "uid": metadata["uid"],
    }


class Recorder:
    """All Events of this scaler."""

    def __init__(self, server: ApiServer, settings: KubernetesSettings, identity: str) -> None:
        self._server = server
        self._settings = settings
        self._identity = identity
        self._told: dict[tuple[str, str, str, str], _Told] = {}
        self._due: dict[tuple[str, str, str, str], None] = {}
        self._more = asyncio.Event()
        self.dropped = 0

    def note(self, subject: Object, reason: str, message: str, kind: Literal["Normal", "Warning"] = "Warning") -> None:
        """Tell of ``subject`` (see :func:`about`); never blocks."""
        key = (str(subject["uid"]), kind, reason, message[:_MESSAGE_MAX])
        told = self._told.get(key)
        if told is None:
            if len(self._told) >= MAX:
                self._forget()
            if len(self._told) >= MAX:
                if not self.dropped:
                    logger.error("%d Events wait for the API server; more are dropped", MAX)
                self.dropped += 1
                return
            told = self._told[key] = _Told(subject, now())
        told.count += 1
        told.seen_s = time.monotonic()
        self._due[key] = None
        self._more.set()

    async def run(self) -> None:
        """Post until cancelled."""
        waits = pauses(self._settings.retry_s, self._settings.retry_max_s)
        while True:
            await self._more.wait()
            self._more.clear()
            for key in list(self._due):
                told = self._told[key]
                early_s = told.posted_s + AGAIN_S - time.monotonic()
                if early_s > 0:
                    asyncio.get_running_loop().call_later(early_s, self._more.set)
                    continue
                del self._due[key]
                try:
                    await self._post(key, told)
                    waits = pauses(self._settings.retry_s, self._settings.retry_max_s)
                except ApiUnavailable:
                    self._due[key] = None
                    self._more.set()
                    await asyncio.sleep(next(waits))
                    break
                except ApiError as error:
                    # The namespace is on its way out, or we may not: again would give the same.
                    level = logging.INFO if error.reason == NAMESPACE_ENDS else logging.WARNING
                    logger.log(level, "Event %s of %s %s: %s", key[2], told.about["kind"], told.about["name"], error)
                    told.posted = told.count

    async def _post(self, key: tuple[str, str, str, str], told: _Told) -> None:
        _, kind, reason, message = key
        subject, last, count = told.about, now(), told.count
        path = f"/api/v1/namespaces/{subject['namespace']}/events"
        told.posted_s = time.monotonic()
        if told.name:
            try:
                await self._server.patch(f"{path}/{told.name}", {"count": count, "lastTimestamp": last})
                told.posted = count
                return
            except ApiMissing:
                told.name, told.first = "", last  # the server keeps Events for an hour
        event = {
            "apiVersion": "v1",
            "kind": "Event",
            "metadata": {"generateName": f"{subject['name']}.", "namespace": subject["namespace"]},
            "involvedObject": subject,
            "reason": reason,
            "message": message,
            "type": kind,
            "count": count,
            "firstTimestamp": told.first,
            "lastTimestamp": last,
            "source": {"component": _COMPONENT},
            "reportingComponent": _COMPONENT,
            "reportingInstance": self._identity,
        }
        told.name = (await self._server.create(path, event))["metadata"]["name"]
        told.posted = count

    def _forget(self) -> None:
        old_s = time.monotonic() - _FORGET_S
        for key in [key for key, told in self._told.items() if told.posted == told.count and told.seen_s < old_s]:
            del self._told[key]
