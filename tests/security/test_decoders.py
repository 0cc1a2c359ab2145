"""Decoders of what comes from outside refuse with their own exception, soon, in bounded memory. For millions: tests.security.fuzz."""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from tests.security import fuzz
from tests.security.decoders import DECODERS, MB, Decode, Decoder

pytestmark = pytest.mark.root  # layers have owners

EXPLOSIVE = [decoder for decoder in DECODERS.values() if decoder.bombs is not list]


@pytest.fixture(autouse=True)
def alarm() -> Iterator[None]:
    before = signal.signal(signal.SIGALRM, fuzz._alarm)
    yield
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize("decoder", DECODERS.values(), ids=DECODERS)
def test_what_is_valid_is_taken(decoder: Decoder) -> None:
    decode, samples = fuzz._made(decoder)
    taken = 0
    for sample in samples:
        with contextlib.suppress(*decoder.refusals):
            decode(sample)
            taken += 1
    assert taken, "not every sample, because some try to get out of their folder"


@pytest.mark.parametrize("decoder", DECODERS.values(), ids=DECODERS)
def test_thousands_of_hostile_inputs(decoder: Decoder) -> None:
    tally, failures = fuzz.run_inputs(decoder, f"test/{decoder.name}", 500 if decoder.slow else 3000, None)
    assert not failures, "\n".join(failures)
    assert tally.accepted + tally.rejected == tally.inputs


@pytest.mark.parametrize("decoder", DECODERS.values(), ids=DECODERS)
def test_any_bytes(decoder: Decoder) -> None:
    decode, samples = fuzz._made(decoder)

    @settings(max_examples=60, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @example(b"")
    @given(
        st.binary(max_size=400)
        | st.sampled_from(samples).flatmap(lambda sample: st.binary(max_size=8).map(lambda more: sample[: -len(more) or None] + more))
    )
    def check(data: bytes) -> None:
        with contextlib.suppress(*decoder.refusals):
            decode(data)

    check()


@pytest.mark.parametrize("decoder", EXPLOSIVE, ids=[decoder.name for decoder in EXPLOSIVE])
def test_a_bomb_takes_no_more_memory_than_is_said(decoder: Decoder) -> None:
    decode, _ = fuzz._made(decoder)
    for number, bomb in enumerate(decoder.bombs()):
        pid = os.fork()
        if pid == 0:
            _explode(decoder, decode, bomb, f"{decoder.name}: bomb {number} of {len(bomb) / MB:.1f} MB")
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0, f"bomb {number}"


def _explode(decoder: Decoder, decode: Decode, bomb: bytes, what: str) -> NoReturn:
    """In a child that has just so much memory, and ends here."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        most = pages * 4096 + decoder.memory_mb * MB
        resource.setrlimit(resource.RLIMIT_AS, (most, most))
        before_kb, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.thread_time()
        with contextlib.suppress(*decoder.refusals):
            decode(bomb)
        took_s = time.thread_time() - began
        print(f"{what}: {(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before_kb) / 1024:.0f} MB, {took_s:.2f} s", flush=True)
        os._exit(0 if took_s < 5 else 2)
    except BaseException:
        traceback.print_exc()
        os._exit(1)
