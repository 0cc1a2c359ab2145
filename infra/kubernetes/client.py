"""Requests to the Kubernetes API server: plain maps in, plain maps out, one kind of exception per kind of refusal.

In: paths and objects from the scaler's edges (:mod:`scaler.edges.kubernetes`) and the agent. Out: HTTP requests by kubernetes-asyncio,
which also finds server and credentials and renews tokens. Its models are not used: a map that the server sent is passed on whole, with
fields that no model knows. Next: :mod:`.watch` follows a collection of objects.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
from collections.abc import AsyncIterator, Mapping
from typing import Any, Literal

import aiohttp
from kubernetes_asyncio import client as kubernetes
from kubernetes_asyncio import config
from kubernetes_asyncio.config import ConfigException

from infra.errors import (
    ApiBusy,
    ApiConflict,
    ApiError,
    ApiExpired,
    ApiForbidden,
    ApiInvalid,
    ApiMissing,
    ApiUnavailable,
    SettingsError,
)
from infra.settings import KubernetesSettings

Object = dict[str, Any]
_PATCHES = {"merge": "application/merge-patch+json", "strategic": "application/strategic-merge-patch+json"}
_ERRORS: dict[int, type[ApiError]] = {
    400: ApiInvalid,
    401: ApiForbidden,
    403: ApiForbidden,
    404: ApiMissing,
    409: ApiConflict,
    410: ApiExpired,
    415: ApiInvalid,
    422: ApiInvalid,
}
_AGENT = "thaw"
#: Reason of a refusal: the namespace is being deleted, and with it all that is in it.
NAMESPACE_ENDS = "NamespaceTerminating"


class ApiServer:
    """One API server. Made by :func:`connect`."""

    def __init__(self, settings: KubernetesSettings, api: kubernetes.ApiClient) -> None:
        self._settings = settings
        self._api = api

    async def get(self, path: str, query: Mapping[str, str | int] | None = None) -> Object:
        """One object or a list of them. Raises :class:`infra.errors.ApiError`, as all requests do."""
        return await self._ask("GET", path, query=query)

    async def create(self, path: str, value: Object) -> Object:
        """Create an object in the collection at ``path``; returns it as the server made it."""
        return await self._ask("POST", path, body=value)

    async def patch(self, path: str, value: Object, kind: Literal["merge", "strategic"] = "merge") -> Object:
        """Change an object; returns it as it is then."""
        return await self._ask("PATCH", path, body=value, content=_PATCHES[kind])

    async def delete(self, path: str, *, uid: str = "") -> None:
        """Delete an object, if it is the one of this ``uid``; one that is gone is fine."""
        with contextlib.suppress(ApiMissing):
            await self._ask("DELETE", path, body={"preconditions": {"uid": uid}} if uid else None)

    @contextlib.asynccontextmanager
    async def lines(self, path: str, query: Mapping[str, str | int], silence_s: float) -> AsyncIterator[AsyncIterator[Object]]:
        """An answer that goes on: the maps it consists of, one per line, until the server ends it.

        Args:
            path: what is asked.
            query: with ``watch=true``.
            silence_s: a server that says nothing for this long counts as gone.
        """
        patience_s = self._settings.request_timeout_s
        timeout = aiohttp.ClientTimeout(connect=patience_s, sock_connect=patience_s, sock_read=silence_s)
        async with self._asked("GET", path, query, None, "", timeout) as response:

            async def read() -> AsyncIterator[Object]:
                with _translated(path):
                    async for line in response.content:
                        yield _parse(line, path)

            yield read()

    async def _ask(
        self, method: str, path: str, *, body: Object | None = None, query: Mapping[str, str | int] | None = None, content: str = ""
    ) -> Object:
        timeout = aiohttp.ClientTimeout(total=self._settings.request_timeout_s)
        async with self._asked(method, path, query or {}, body, content, timeout) as response:
            return _parse(await response.read(), path)

    @contextlib.asynccontextmanager
    async def _asked(
        self,
        method: str,
        path: str,
        query: Mapping[str, str | int],
        body: Object | None,
        content: str,
        timeout: aiohttp.ClientTimeout,
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        headers = {"Accept": "application/json", "Content-Type": content or "application/json", "User-Agent": _AGENT}
        with _translated(f"{method} {path}"):
            await self._api.update_params_for_auth(headers, [], ["BearerToken"])
            response = await self._api.rest_client.request(
                method,
                f"{self._api.configuration.host}{path}",
                query_params=dict(query),
                headers=headers,
                body=body,
                _preload_content=False,
                _request_timeout=timeout,
            )
            async with response:
                if response.status >= 400:
                    raise _refusal(response.status, await response.read(), response.headers, f"{method} {path}")
                yield response


@contextlib.asynccontextmanager
async def connect(settings: KubernetesSettings) -> AsyncIterator[ApiServer]:
    """Find server and credentials. Nothing is asked yet: a server that is away now is tried again by who asks.

    Raises:
        SettingsError: there are no usable credentials.
    """
    configuration = kubernetes.Configuration()
    try:
        if not settings.kubeconfig and os.environ.get("KUBERNETES_SERVICE_HOST"):
            config.load_incluster_config(client_configuration=configuration)  # type: ignore[no-untyped-call]
        else:
            file = settings.kubeconfig or os.environ.get("KUBECONFIG") or "~/.kube/config"
            await config.load_kube_config(file, client_configuration=configuration, persist_config=False)
    except (ConfigException, OSError, ValueError, TypeError) as error:
        raise SettingsError(f"no way to the Kubernetes API server: {error}; set kubernetes.kubeconfig, or run in a pod") from error
    async with kubernetes.ApiClient(configuration) as api:
        yield ApiServer(settings, api)


def error_of(status: int, said: Object, what: str, retry_after: object = None) -> ApiError:
    """The exception for a refusal; its message is the server's own.

    Args:
        status: the HTTP code.
        said: the Status object that came with it; empty when none did.
        what: what was asked.
        retry_after: what a header says of when to ask again.
    """
    details = said.get("details") or {}
    causes = details.get("causes") or []
    fields = tuple(str(cause["field"]) for cause in causes if cause.get("field"))
    ends = any(cause.get("reason") == NAMESPACE_ENDS for cause in causes)
    reason = NAMESPACE_ENDS if ends else str(said.get("reason") or status)
    message = f"{what}: {said.get('message') or f'{status} without a reason'}"
    if status == 429:
        return ApiBusy(message, reason=reason, retry_after_s=_seconds(retry_after or details.get("retryAfterSeconds") or 1))
    kind = _ERRORS.get(status, ApiUnavailable if status >= 500 else ApiError)
    return kind(message, reason=reason, fields=fields)


def _refusal(status: int, body: bytes, headers: Mapping[str, str], what: str) -> ApiError:
    try:
        said = json.loads(body)
    except ValueError:
        said = {"message": f"{status} {body[:200].decode(errors='replace')}"}
    return error_of(status, said if isinstance(said, dict) else {}, what, headers.get("Retry-After"))


def _seconds(value: object) -> float:
    try:
        return min(60.0, max(0.0, float(str(value))))
    except ValueError:
        return 1.0


def _parse(data: bytes, path: str) -> Object:
    try:
        value = json.loads(data)
    except ValueError as error:
        raise ApiUnavailable(f"{path}: the answer is cut short or no JSON: {error}", reason="Garbled") from error
    if not isinstance(value, dict):
        raise ApiUnavailable(f"{path}: the answer is no object", reason="Garbled")
    return value


@contextlib.contextmanager
def _translated(what: str) -> Any:
    """Turn what the HTTP client raises into this project's own."""
    try:
        yield
    except TimeoutError as error:
        raise ApiUnavailable(f"{what}: no answer in time", reason="Timeout") from error
    except (aiohttp.ClientError, OSError, asyncio.IncompleteReadError, ValueError) as error:
        raise ApiUnavailable(f"{what}: {error or type(error).__name__}", reason="Unreachable") from error
