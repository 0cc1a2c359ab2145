"""An ordinary pod of a function, made from nothing: what starts look like without Thaw.

In: a sample, its image. Out: ms from the request that makes the pod to the first right answer at its address. The pod is the one of the
function's template, with the function's command and nothing of Thaw. Used by :mod:`.pods`.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from typing import Any

from infra.kubernetes.client import ApiServer, Object
from loadgen.checks import Target
from loadgen.errors import AttemptFailed, LoadImpossible

_ADDRESS_POLL_S, _ANSWER_POLL_S = 0.01, 0.005
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
            while not (address := ((await server.get(f"{path}/{name}")).get("status") or {}).get("podIP")):
                await asyncio.sleep(_ADDRESS_POLL_S)
            while True:
                try:
                    status, body = await target.ask(f"{address}:{port}", target.path(row), "")
                except AttemptFailed:
                    await asyncio.sleep(_ANSWER_POLL_S)
                    continue
                if status == 200:
                    break
                await asyncio.sleep(_ANSWER_POLL_S)
        took_ms = (time.monotonic() - began) * 1e3
    except TimeoutError as error:
        raise LoadImpossible(f"an ordinary pod of {target.function} did not answer within {_LONGEST_S:.0f} s") from error
    finally:
        await server.delete(f"{path}/{name}")
    async with asyncio.timeout(_LONGEST_S):
        while any(item["metadata"]["name"] == name for item in (await server.get(path)).get("items") or []):
            await asyncio.sleep(0.1)
    return took_ms, target.inspect(body, row).problem
