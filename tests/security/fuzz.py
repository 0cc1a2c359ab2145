"""``python -m tests.security.fuzz``: hostile inputs by the million for every decoder of :mod:`tests.security.decoders`.

In: names of decoders, how many inputs, a seed. Out: a table (or JSON): how many were taken and how many refused, the slowest, the memory.
It ends with 1 when a decoder raised something that it does not declare, took longer than :data:`SECONDS_MAX`, or more memory than it may;
the input is kept. The same seed gives the same inputs, whatever the number of processes.

With ``--engine atheris`` libFuzzer chooses the inputs by what code they reach (one decoder, one process; ``requirements-fuzz.lock``).
"""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import gc
import json
import logging
import os
import random
import resource
import signal
import sys
import time
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from types import FrameType, FunctionType

from tests.security.decoders import DECODERS, Decode, Decoder
from tests.security.mutations import mutate, take_apart

#: Processor time of one input, s; and wall clock after which it counts as hanging.
SECONDS_MAX, HANG_S = 0.1, 10
BATCH = 20_000
#: Memory of a worker, decoder and all: what asks for more fails.
_ADDRESS_SPACE = 3 << 30
_FAILURES_MAX = 20
#: Whose code libFuzzer watches.
_PACKAGES = ("agent", "infra", "loadgen", "scaler")


@dataclass
class Tally:
    """What became of the inputs of one decoder."""

    decoder: str
    inputs: int = 0
    accepted: int = 0
    rejected: int = 0
    slowest_ms: float = 0.0
    #: Most that a worker's memory grew from its first sample on.
    memory_mb: float = 0.0
    seconds: float = 0.0
    failures: int = 0

    def add(self, other: Tally) -> None:
        self.inputs += other.inputs
        self.accepted += other.accepted
        self.rejected += other.rejected
        self.seconds += other.seconds
        self.failures += other.failures
        self.slowest_ms = max(self.slowest_ms, other.slowest_ms)
        self.memory_mb = max(self.memory_mb, other.memory_mb)


class Hang(BaseException):
    """An input takes too long."""


def run_inputs(decoder: Decoder, seed: str, inputs: int, kept: Path | None) -> tuple[Tally, list[str]]:
    """Feed a decoder; the failures come with the input that caused each."""
    decode, samples = _made(decoder)
    values = take_apart(samples, decoder.form)
    rng = random.Random(seed)
    tally, failures = Tally(decoder.name), []
    for sample in samples:
        _once(decoder, decode, sample)
    gc.collect()
    before_kb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    began, slowest_s, clock = time.monotonic(), 0.0, time.thread_time
    for _ in range(inputs):
        data = mutate(rng, samples, decoder.form, values)
        start = clock()
        signal.setitimer(signal.ITIMER_REAL, HANG_S)
        try:
            decode(data)
            tally.accepted += 1
        except decoder.refusals:
            tally.rejected += 1
        except (Exception, Hang) as error:
            failures.append(_keep(decoder, data, f"{type(error).__name__}: {error}", kept))
        took_s = clock() - start
        if took_s > slowest_s:
            slowest_s = took_s
            if took_s > SECONDS_MAX and _once(decoder, decode, data) > SECONDS_MAX:  # not the collector's turn
                failures.append(_keep(decoder, data, f"took {took_s:.3f} s", kept))
        if len(failures) >= _FAILURES_MAX:
            break
    signal.setitimer(signal.ITIMER_REAL, 0)
    tally.inputs, tally.slowest_ms, tally.seconds = (
        tally.accepted + tally.rejected + len(failures),
        slowest_s * 1000,
        time.monotonic() - began,
    )
    tally.memory_mb = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before_kb) / 1024
    tally.failures = len(failures)
    return tally, failures


_known: dict[str, tuple[Decode, list[bytes]]] = {}


def _made(decoder: Decoder) -> tuple[Decode, list[bytes]]:
    if decoder.name not in _known:
        _known[decoder.name] = decoder.make()
    return _known[decoder.name]


def _once(decoder: Decoder, decode: Decode, data: bytes) -> float:
    start = time.thread_time()
    with contextlib.suppress(*decoder.refusals):
        decode(data)
    return time.thread_time() - start


def _keep(decoder: Decoder, data: bytes, what: str, kept: Path | None) -> str:
    if kept is not None:
        kept.mkdir(parents=True, exist_ok=True)
        (kept / f"{decoder.name}-{abs(hash(data)):x}").write_bytes(data)
    return f"{decoder.name}: {what}\n  input: {data[:120].hex()}{'…' if len(data) > 120 else ''}"


def _alarm(_: int, __: FrameType | None) -> None:
    raise Hang(f"no end after {HANG_S} s")


def _begin_worker() -> None:
    logging.disable(logging.CRITICAL)
    signal.signal(signal.SIGALRM, _alarm)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_AS, (_ADDRESS_SPACE, _ADDRESS_SPACE))


def _batch(name: str, seed: str, inputs: int, kept: str) -> tuple[Tally, list[str]]:
    return run_inputs(DECODERS[name], seed, inputs, Path(kept))


def fuzz(names: list[str], inputs: int, seed: str, workers: int, kept: Path) -> list[Tally]:
    """Run batches of all decoders in processes."""
    tallies = []
    for name in names:
        total = Tally(name)
        sizes = [min(BATCH, inputs - at) for at in range(0, inputs, BATCH)]
        # New processes for each decoder: the memory that one took is not the next one's.
        with concurrent.futures.ProcessPoolExecutor(workers, get_context("spawn"), _begin_worker) as pool:
            waiting = [pool.submit(_batch, name, f"{seed}/{name}/{at}", size, str(kept)) for at, size in enumerate(sizes)]
            for done in concurrent.futures.as_completed(waiting):
                tally, failures = done.result()
                total.add(tally)
                for failure in failures[:5]:
                    print(failure, file=sys.stderr)
                if total.failures >= _FAILURES_MAX:
                    pool.shutdown(cancel_futures=True)
                    break
        if total.memory_mb > DECODERS[name].memory_mb + 64:  # and what the mutations hold
            print(f"{name}: {total.memory_mb:.0f} MB", file=sys.stderr)
            total.failures += 1
        tallies.append(total)
        print(_row(total), file=sys.stderr, flush=True)
    return tallies


def _row(tally: Tally) -> str:
    rate = tally.inputs / max(tally.seconds, 1e-9)
    return (
        f"| {tally.decoder} | {tally.inputs:,} | {tally.accepted:,} | {tally.rejected:,} | {tally.slowest_ms:.1f} | {tally.memory_mb:.0f} |"
        f" {tally.failures} | {rate:,.0f}/s"
    )


def _guided(decoder: Decoder, inputs: int, seed: int) -> None:
    """libFuzzer chooses; does not return."""
    try:
        import atheris  # type: ignore[import-not-found]
    except ImportError as error:
        raise SystemExit("--engine atheris needs: pip install --require-hashes -r requirements-fuzz.lock") from error
    logging.disable(logging.CRITICAL)
    decode, samples = _made(decoder)
    for item in gc.get_objects():
        if isinstance(item, FunctionType) and str(item.__module__).partition(".")[0] in _PACKAGES:
            atheris.instrument_func(item)
    folder = Path(f"/tmp/thaw-fuzz-corpus-{os.getpid()}")
    folder.mkdir()
    for number, sample in enumerate(samples):
        (folder / str(number)).write_bytes(sample)

    def one(data: bytes) -> None:
        with contextlib.suppress(*decoder.refusals):
            decode(data)

    atheris.Setup([sys.argv[0], f"-runs={inputs}", f"-seed={seed}", "-timeout=10", "-rss_limit_mb=3072", "-max_len=4096", str(folder)], one)
    atheris.Fuzz()


def main() -> None:
    """Parse arguments, run, print."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.security.fuzz", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--decoder", action="append", choices=sorted(DECODERS), help="only this one (may be repeated)")
    parser.add_argument("--inputs", type=int, default=1_000_000, help="for each decoder")
    parser.add_argument("--seed", default="1")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--kept", type=Path, default=Path("reports/fuzz"), help="folder for inputs that failed")
    parser.add_argument("--engine", choices=("mutations", "atheris"), default="mutations")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    names = arguments.decoder or list(DECODERS)
    if arguments.engine == "atheris":
        if len(names) != 1:
            parser.error("--engine atheris takes one --decoder")
        _guided(DECODERS[names[0]], arguments.inputs, abs(hash(arguments.seed)) % (1 << 31))
    tallies = fuzz(names, arguments.inputs, arguments.seed, arguments.workers, arguments.kept)
    if arguments.json:
        print(json.dumps([asdict(tally) for tally in tallies]))
    sys.exit(1 if any(tally.failures for tally in tallies) else 0)


if __name__ == "__main__":
    main()
