"""Follows a collection of objects: lists it once, then is told of every change, through restarts of the server.

In: a path of the API server, by :mod:`.client`. Out: :class:`Listed` (everything there is; at the start and whenever changes may have
been missed) and :class:`Changed`, for the scaler's edges (:mod:`scaler.edges.kubernetes`) and the agent. A watch that ends or breaks is
resumed from the last version seen; one whose version the server has forgotten (410) begins again with a list.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import AsyncIterator, Iterator, Mapping
from dataclasses import dataclass

from infra.errors import ApiBusy, ApiError, ApiExpired
from infra.kubernetes.client import ApiServer, Object, error_of
from infra.settings import KubernetesSettings

logger = logging.getLogger(__name__)
#: Objects of one answer to a list.
_PAGE = 500


@dataclass(frozen=True)
class Listed:
    """All objects that there are; others that were known are gone."""

    items: list[Object]


@dataclass(frozen=True)
class Changed:
    """One object was made or changed, or (``gone``) deleted."""

    value: Object
    gone: bool = False


def pauses(first_s: float, longest_s: float) -> Iterator[float]:
    """Pauses between attempts, s: they double, and are scattered so that many clients do not come back at once."""
    pause_s = first_s
    while True:
        yield pause_s * random.uniform(0.5, 1.5)
        pause_s = min(pause_s * 2, longest_s)


async def follow(
    server: ApiServer, path: str, settings: KubernetesSettings, *, labels: str = "", fields: str = ""
) -> AsyncIterator[Listed | Changed]:
    """Follow the collection at ``path`` for ever.

    Args:
        server: whom to ask.
        path: of the collection.
        settings: times.
        labels, fields: only objects that these selectors match.
    """
    selector: dict[str, str | int] = {key: text for key, text in (("labelSelector", labels), ("fieldSelector", fields)) if text}
    waits, version, trouble = pauses(settings.retry_s, settings.retry_max_s), "", ""
    while True:
        try:
            if not version:
                listed, version = await list_all(server, path, selector)
                yield listed
            async for kind, value in _watch(server, path, selector, version, settings):
                version = value.get("metadata", {}).get("resourceVersion") or version
                if trouble:
                    logger.info("%s is followed again", path)
                waits, trouble = pauses(settings.retry_s, settings.retry_max_s), ""
                if kind != "BOOKMARK":
                    yield Changed(value, gone=kind == "DELETED")
        except ApiExpired:
            logger.info("%s: changes were missed, listing again", path)
            version = ""
            await asyncio.sleep(next(waits))
        except ApiError as error:
            if str(error) != trouble:  # said once, not with every attempt
                trouble = str(error)
                logger.warning("following %s: %s; trying again", path, trouble)
            await asyncio.sleep(max(next(waits), error.retry_after_s if isinstance(error, ApiBusy) else 0.0))


async def list_all(server: ApiServer, path: str, selector: Mapping[str, str | int]) -> tuple[Listed, str]:
    """All objects of the collection at ``path`` that the selector matches, and the version that they are of.

    Raises:
        ApiError: the server does not say.
    """
    items: list[Object] = []
    more = ""
    while True:
        page = await server.get(path, {**selector, "limit": _PAGE, **({"continue": more} if more else {})})
        kind, version = str(page.get("kind", "")).removesuffix("List"), page.get("apiVersion", "")
        # Items of a list do not say what they are, those of a watch do.
        items += [{"kind": kind, "apiVersion": version, **item} for item in page.get("items") or []]
        more = page["metadata"].get("continue") or ""
        if not more:
            return Listed(items), str(page["metadata"]["resourceVersion"])


async def _watch(
    server: ApiServer, path: str, selector: dict[str, str | int], version: str, settings: KubernetesSettings
) -> AsyncIterator[tuple[str, Object]]:
    """What the server says until it ends the watch; bookmarks are versions without a change, or with nothing at all."""
    query = {
        **selector,
        "watch": "true",
        "allowWatchBookmarks": "true",
        "resourceVersion": version,
        "timeoutSeconds": int(settings.watch_s * random.uniform(1.0, 1.25)),
    }
    async with server.lines(path, query, silence_s=settings.watch_s / 2) as lines:
        yield "BOOKMARK", {}  # the server has taken it up
        async for line in lines:
            kind, value = str(line.get("type")), line.get("object")
            if not isinstance(value, dict):
                continue
            if kind == "ERROR":
                raise error_of(int(value.get("code") or 500), value, f"watch of {path}")
            yield kind, value
