"""An ordinary pod of a function, made from nothing: what starts look like without Thaw.

In: a sample, its image. Out: ms from the request that makes the pod to the first right answer at its address. The pod is the one of the
function's template, with the function's command and nothing of Thaw. Used by :mod:`.pods`.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Mapping
from typing import Any

from infra.errors import ApiMissing
from infra.kubernetes.client import ApiServer, Object
from loadgen.checks import Target
from loadgen.errors import AttemptFailed, LoadImpossible

_POLL_S, _GONE_POLL_S = 0.005, 0.1
_LONGEST_S = 120.0


def manifest(function: Mapping[str, Any]) -> Object:
    """The pod that a Deployment of the same template would make."""
    metadata, spec = function["metadata"], function["spec"]
    (container,) = spec["template"]["spec"]["containers"]
    environment = [{"name": key, "value": value} for key, value in sorted((spec.get("environment") or {}).items())]
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"generateName": f"{metadata['name']}-plain-", "namespace": metadata["namespace"]},
        "spec": {**spec["template"]["spec"], "containers": [{**container, "command": spec["command"], "env": environment}]},
    }


async def once(server: ApiServer, pod: Object, port: int, target: Target, row: int) -> tuple[float, str]:
    """Make one, ask it, remove it; returns ms and what was wrong with the answer.

    Raises:
        LoadImpossible: it does not answer.
    """
    path = f"/api/v1/namespaces/{pod['metadata']['namespace']}/pods"
    began = time.monotonic()
    name = (await server.create(path, pod))["metadata"]["name"]
    try:
        async with asyncio.timeout(_LONGEST_S):
            body = await _answer(server, f"{path}/{name}", port, target, row)
        took_ms = (time.monotonic() - began) * 1e3
    except TimeoutError as error:
        raise LoadImpossible(f"an ordinary pod of {target.function} did not answer within {_LONGEST_S:.0f} s") from error
    finally:
        await server.delete(f"{path}/{name}")
    await _gone(server, f"{path}/{name}")
    return took_ms, target.inspect(body, row).problem


async def _answer(server: ApiServer, path: str, port: int, target: Target, row: int) -> bytes:
    address = ""
    while True:
        if not address:
            address = ((await server.get(path)).get("status") or {}).get("podIP") or ""
        if address:
            with contextlib.suppress(AttemptFailed):
                status, body = await target.ask(f"{address}:{port}", target.path(row), "")
                if status == 200:
                    return body
        await asyncio.sleep(_POLL_S)


async def _gone(server: ApiServer, path: str) -> None:
    with contextlib.suppress(ApiMissing):
        for _ in range(round(_LONGEST_S / _GONE_POLL_S)):
            await server.get(path)
            await asyncio.sleep(_GONE_POLL_S)
