from __future__ import annotations

import os
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from agent.api.function import Function, from_builtins
from agent.errors import NoRoom
from agent.sandbox.placeholders import Placeholders
from agent.sandbox.pod import Pod, PodRecord
from infra.local.processes import identity_of
from infra.tasks import TaskGroup


def function(**metadata: str) -> Function:
    template = {"spec": {"containers": [{"name": "function", "image": "shop:1"}]}}
    return from_builtins(
        {
            "kind": "Function",
            "metadata": {"name": "shop", "namespace": "sales", **metadata},
            "spec": {"command": ["/bin/true"], "port": 80, "template": template},
        }
    )


def pod(uid: str = "u1", **changes: str) -> Pod:
    own = function()
    made = Pod("sales", f"shop-{uid}", uid, own.name, own.digest, "10.0.0.7", "c1", "shop@sha256:1")
    return msgspec.structs.replace(made, **changes)


class Stub:
    """A pod's sandbox without the pod."""

    def __init__(self, record: PodRecord, *rest: Any) -> None:
        self.pod, self.id, self.spent = record.pod, record.pod.uid, False

    async def greet(self) -> None:
        pass


@pytest.fixture
async def placeholders(tmp_path: Path) -> AsyncIterator[Placeholders]:
    tasks, gate = TaskGroup("test"), Any
    yield Placeholders(tmp_path / "pods", tmp_path / "enter", gate, tasks)  # type: ignore[arg-type]
    await tasks.close()


async def test_a_root_is_named_by_the_image_of_the_pods(placeholders: Placeholders) -> None:
    placeholders.see([pod()])
    first = placeholders.layers(function())
    assert first.search == () and len(first.files_digest) == 64
    placeholders.keep_only([])
    placeholders.see([pod("u2", image="shop@sha256:2")])
    assert placeholders.layers(function()).files_digest != first.files_digest


@pytest.mark.parametrize("changes", [{"namespace": "others"}, {"function": "else"}, {"digest": "d0"}])
async def test_a_pod_that_only_looks_like_one_of_the_function_is_not_used(placeholders: Placeholders, changes: dict[str, str]) -> None:
    placeholders.see([pod(**changes)])
    with pytest.raises(NoRoom):
        placeholders.layers(function())


async def test_none_that_is_free_is_a_refusal(placeholders: Placeholders) -> None:
    placeholders.see([pod()])
    with pytest.raises(NoRoom):
        placeholders.check_room(function(), 0)
    with pytest.raises(NoRoom):
        await placeholders.take(function(), placeholders.layers(function()))


async def test_a_pod_taken_over_counts_as_one_of_this_node(placeholders: Placeholders, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before the API server has told of it, and also later: of pods in use it tells nothing but that they live."""
    folder = placeholders._folders / "u1"
    folder.mkdir()
    init = identity_of(os.getpid())
    assert init is not None
    (folder / "pod").write_bytes(msgspec.msgpack.encode(PodRecord(pod(), init)))
    monkeypatch.setattr("agent.sandbox.placeholders.PodSandbox", Stub)
    await placeholders.adopt(folder)
    adopted = placeholders.layers(function())
    with pytest.raises(NoRoom):
        placeholders.check_room(function(), 0)
    placeholders.keep_only(["u1"])
    assert placeholders.layers(function()) == adopted
    placeholders.keep_only([])
    with pytest.raises(NoRoom):
        placeholders.layers(function())


async def test_another_image_under_the_same_document_is_told(placeholders: Placeholders) -> None:
    moved: list[str] = []
    placeholders._moved = moved.append
    placeholders.see([pod("u1"), pod("u2")])
    assert moved == []
    placeholders.see([pod("u3", image="shop@sha256:2")])
    assert moved == ["shop"]
