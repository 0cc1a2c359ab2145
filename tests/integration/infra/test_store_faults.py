"""The client of the object store on the store's bad days."""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Callable, Iterator

import pytest

from infra.errors import StoreError, StoreRefused, StoreUnavailable
from infra.s3 import ObjectStore
from infra.settings import Settings
from tests.integration.faulty_store import FaultyStore, faulty_store

pytestmark = pytest.mark.stack
CONTENT = os.urandom(300_000)


@pytest.fixture(scope="module")
def proxy(stack_settings: Settings) -> Iterator[FaultyStore]:
    with faulty_store(stack_settings.s3.endpoint_url) as running:
        yield running


@pytest.fixture(scope="module")
def shared(stack_settings: Settings, proxy: FaultyStore) -> Iterator[ObjectStore]:
    settings = dataclasses.replace(stack_settings.s3, endpoint_url=proxy.url, read_timeout_s=0.5)
    opened = ObjectStore(settings, warm=2)
    yield opened
    opened.close()


@pytest.fixture
def store(shared: ObjectStore, proxy: FaultyStore) -> ObjectStore:
    """Well, and with an object."""
    proxy.heal()
    shared.put("bad-days/x", CONTENT)
    return shared


def get(store: ObjectStore, timeout_s: float | None = None) -> bytes:
    return store.get("bad-days/x", size_max=len(CONTENT), timeout_s=timeout_s)


def wait_for(condition: Callable[[], bool]) -> None:
    give_up = time.monotonic() + 6
    while not condition():
        assert time.monotonic() < give_up
        time.sleep(0.02)


@pytest.mark.parametrize("fault", ["InternalError", "SlowDown", "reset", "truncate", "hang"])
def test_two_bad_answers_cost_time_and_no_error(proxy: FaultyStore, store: ObjectStore, fault: str) -> None:
    proxy.fail(fault, times=2, only="bad-days/x")
    before = time.monotonic()
    assert get(store) == CONTENT
    assert time.monotonic() - before < 3
    assert store.guard.condition().ok


@pytest.mark.parametrize("fault", ["InternalError", "SlowDown", "reset", "truncate", "hang", "drip"])
def test_whatever_it_does_the_time_is_kept(proxy: FaultyStore, store: ObjectStore, fault: str) -> None:
    proxy.fail(fault, only="bad-days/x", pause_s=0.1 if fault == "drip" else 0.0)
    before = time.monotonic()
    with pytest.raises(StoreUnavailable):
        get(store, timeout_s=1.0)
    assert time.monotonic() - before < 1.3


@pytest.mark.parametrize("fault", ["SlowDown", "hang", "ExpiredToken", "InvalidAccessKeyId", "RequestTimeTooSkewed"])
def test_a_dead_store_is_asked_by_a_probe_only_until_it_answers(proxy: FaultyStore, store: ObjectStore, fault: str) -> None:
    proxy.fail(fault)
    for _ in range(3):
        with pytest.raises((StoreUnavailable, StoreRefused)):
            get(store, timeout_s=0.6)
    proxy.asked.clear()
    before = time.monotonic()
    for _ in range(100):
        with pytest.raises(StoreUnavailable, match="is not asked, it has not worked for"):
            get(store)
    assert time.monotonic() - before < 0.5
    assert not any("bad-days" in path for path in proxy.asked)
    condition = store.guard.condition()
    assert not condition.ok and time.time() - 10 < condition.since_s <= time.time()
    assert (fault if fault != "hang" else "timed out") in condition.reason or "too long" in condition.reason
    proxy.heal()
    wait_for(lambda: store.guard.condition().ok)
    assert get(store) == CONTENT


def test_what_one_object_is_denied_says_nothing_of_the_others(proxy: FaultyStore, store: ObjectStore) -> None:
    """A store that may not be listed answers so for what is not there."""
    proxy.fail("AccessDenied", only="bad-days/none")
    for _ in range(5):
        with pytest.raises(StoreError, match="refuses the credentials"):
            store.get("bad-days/none", size_max=1)
        assert get(store) == CONTENT
    assert store.guard.condition().ok


def test_a_write_is_made_though_the_store_seemed_dead(proxy: FaultyStore, store: ObjectStore) -> None:
    proxy.fail("reset")
    for _ in range(2):
        with pytest.raises(StoreUnavailable):
            get(store)
    proxy.heal()
    store.put("bad-days/y", b"written")
    assert store.get("bad-days/y", size_max=7) == b"written", "and has shown that it is not"
