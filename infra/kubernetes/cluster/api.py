"""The few questions that the bring-up asks the API server, as its administrator.

In: the keys of :mod:`.certificates`. Out: JSON objects. Only for starting the cluster: everything else uses kubectl or a real client.
"""

from __future__ import annotations

import http.client
import json
import ssl
from typing import Any

from infra.kubernetes.cluster.layout import API_PORT, Layout

_TIMEOUT_S = 3.0


class Api:
    """A client of one cluster's API server."""

    def __init__(self, layout: Layout) -> None:
        self._layout = layout
        self._context = ssl.create_default_context(cafile=str(layout.keys / "ca.crt"))
        self._context.load_cert_chain(layout.keys / "admin.crt", layout.keys / "admin.key")

    def ready(self, *, by_service: bool = False) -> bool:
        """Tell whether it answers that it is ready, at its own address or at that of its Service."""
        host, port = (self._layout.api_service, 443) if by_service else (self._layout.node(1).address, API_PORT)
        try:
            return self._ask("GET", "/readyz", host=str(host), port=port) == (200, b"ok")
        except (OSError, http.client.HTTPException):
            return False

    def get(self, path: str) -> dict[str, Any] | None:
        """Return an object, None when there is none or nobody answers."""
        try:
            status, body = self._ask("GET", path)
        except (OSError, http.client.HTTPException):
            return None
        value = json.loads(body) if status == 200 else None
        return value if isinstance(value, dict) else None

    def create(self, path: str, value: dict[str, Any]) -> None:
        """Create an object; one that is there stays."""
        self._ask("POST", path, json.dumps(value))

    def node_ready(self, name: str) -> bool:
        """Tell whether pods can be scheduled on a node."""
        node = self.get(f"/api/v1/nodes/{name}")
        if node is None or node["spec"].get("taints"):
            return False
        return any(condition["type"] == "Ready" and condition["status"] == "True" for condition in node["status"].get("conditions", []))

    def _ask(self, method: str, path: str, body: str | None = None, *, host: str = "", port: int = API_PORT) -> tuple[int, bytes]:
        address = host or str(self._layout.node(1).address)
        connection = http.client.HTTPSConnection(address, port, timeout=_TIMEOUT_S, context=self._context)
        try:
            connection.request(method, path, body, {"Content-Type": "application/json"})
            response = connection.getresponse()
            return response.status, response.read()
        finally:
            connection.close()
