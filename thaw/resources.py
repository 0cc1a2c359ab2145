"""Functions of a cluster, for ``thaw get`` and ``thaw explain``: there they are resources of the API server.

In: the settings ``scaler.functions = "kubernetes"`` and ``kubernetes.*``. Out: the documents in force, as the scaler takes them. They are
changed with ``kubectl`` only: two tables of the same functions would contradict each other.
"""

from __future__ import annotations

import datetime

import click

from agent.api.function import Function
from infra.kubernetes import client, watch
from infra.settings import Settings
from scaler.edges.kubernetes.functions import FunctionTable


def instead(settings: Settings, command: str) -> None:
    """End a command that would write to the topic, where nobody reads it.

    Raises:
        click.UsageError: functions are the cluster's; it names the command to use.
    """
    if settings.scaler.functions == "kubernetes":
        raise click.UsageError(f"functions are resources of the cluster here (scaler.functions=kubernetes): use `{command}`")


async def read_resources(settings: Settings) -> dict[str, tuple[Function, int]]:
    """Each function in force and when it was made, ns; of resources of one name the oldest is the function.

    Raises:
        ApiError, SettingsError: the API server cannot be asked.
    """
    space = f"/namespaces/{settings.kubernetes.functions_namespace}" if settings.kubernetes.functions_namespace else ""
    async with client.connect(settings.kubernetes) as server:
        listed, _ = await watch.list_all(server, f"/apis/thaw.dev/v1{space}/functions", {})
    table = FunctionTable(settings.kubernetes.agent_image, lambda event: None, lambda name: None)
    table.take(listed)
    known = {}
    for name in table.names():
        resource = table.applied(name)
        if resource is not None and resource.function is not None:
            made = datetime.datetime.fromisoformat(resource.value["metadata"]["creationTimestamp"])
            known[name] = (resource.function, int(made.timestamp()) * 1_000_000_000)
    return known
