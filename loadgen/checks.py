"""What the sample functions are asked, and what they must answer: computed here independently, byte by byte.

In: a function's answer and the row it was asked for. Out: the token that the answer proves its process by, or what is
wrong with it. A value follows from the row *and* from the token drawn when the process was first started, so a restored
process that reads a zeroed, misplaced or foreign page gives itself away. ``web`` draws no token: nginx has nothing that
could; its content is known. Used by :mod:`loadgen.driver`.
"""

from __future__ import annotations

import functools
import hashlib
import json
import re
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from agent.api.function import Function, read_yaml
from loadgen import http, resp

FUNCTIONS_DIR = Path(__file__).parent / "functions"
#: The samples of the demo.
SAMPLES = ("index", "model", "ledger", "echo")
#: Every sample: one of each kind of program that Thaw is measured with.
PROGRAMS = (*SAMPLES, "node", "web", "cache", "router")
#: A Function document with this label is asked and checked as the sample function of that name.
CHECK_LABEL = "thaw.dev/check"

#: Contents of the samples ``web`` and ``cache``.
WEB_ENTRIES, WEB_PAGES, CACHE_ENTRIES = 8192, 256, 65536
_MASK = (1 << 64) - 1


@dataclass(frozen=True)
class Verdict:
    """What an answer proves.

    Attributes:
        token: drawn by the process when it was started, before any freeze; empty when the function sends none.
        problem: what is wrong with the answer; empty when it is right.
    """

    token: str = ""
    problem: str = ""


@dataclass(frozen=True)
class Target:
    """A function that load can be sent to.

    Attributes:
        function: its deployed name.
        concurrency: requests that one instance takes at once.
        path: of the request for a row; what ``ask`` takes.
        inspect: judges the body of a 200 answer to a row.
        ask: sends one request over a connection of its own: address, path and traceparent to status and body.
    """

    function: str
    concurrency: int
    path: Callable[[int], str]
    inspect: Callable[[bytes, int], Verdict]
    ask: Callable[[str, str, str], Awaitable[tuple[int, bytes]]] = http.get


def target_of(function: Function) -> Target:
    """How to ask a deployed function.

    One that has :data:`CHECK_LABEL` is checked fully. Of any other only the status is checked; it is asked what its
    document names first: the first warm-up GET, or else the readiness path.
    """
    sample = function.metadata.labels.get(CHECK_LABEL, "")
    if sample in PROGRAMS:
        inspect = functools.partial(inspect_sample, sample)
        ask = resp.get if sample == "cache" else http.get
        return Target(function.name, function.spec.limits.concurrency, _PATHS[sample], inspect, ask)
    gets = [request.path for request in function.spec.warm_up if request.method == "GET"]
    path = next(iter(gets), function.spec.readiness.path or "/")
    return Target(function.name, function.spec.limits.concurrency, lambda _row: path, lambda _body, _row: Verdict())


def sample_targets() -> dict[str, Target]:
    """Targets of the shipped sample functions, by name, from their own documents."""
    targets = {}
    for name in PROGRAMS:
        path = FUNCTIONS_DIR / name / "function.yaml"
        (function,) = read_yaml(path.read_text(), str(path), path.parent)
        targets[function.name] = target_of(function)
    return targets


def inspect_sample(sample: str, body: bytes, row: int) -> Verdict:
    """Judge the answer of a sample function."""
    if sample == "web":
        expected = web_page(row // 2) if row % 2 else f"{row} {web_entry(row // 2)}\n".encode()
        return Verdict(problem=_difference(body, expected))
    if sample == "cache":
        token = body[9:41].decode(errors="replace")  # behind *2 and $32, each on a line of its own
        return Verdict(token, _difference(body, _cache_reply(row, token)))
    try:
        answer = json.loads(body)
    except ValueError:
        return Verdict(problem=f"the answer is not JSON: {body[:80]!r}")
    if not isinstance(answer, dict):
        return Verdict(problem=f"the answer is not a JSON object: {body[:80]!r}")
    return Verdict(str(answer.get("token", "")), verify(sample, answer, row))


def verify(sample: str, answer: Mapping[str, object], row: int) -> str:
    """What is wrong with the JSON of a sample function's answer to ``row``; empty when it is right."""
    if answer.get("function") != sample:
        return f"it comes from {answer.get('function')!r}, not from {sample!r}"
    if answer.get("row") != row:
        return f"it is about row {answer.get('row')!r}, not about row {row}"
    token = answer.get("token")
    digits = 32 if sample in ("index", "model") else 16
    if not isinstance(token, str) or not re.fullmatch(f"[0-9a-f]{{{digits}}}", token):
        return f"its token {token!r} is not {digits} hex digits"
    count = answer.get("count")
    if not isinstance(count, int) or count < 1:
        return f"its count {count!r} is not a number of requests"
    expected = _EXPECTED[sample](row, token)
    if answer.get("value") != expected:
        return f"its value is {answer.get('value')!r}; row {row} with token {token} has {expected!r}"
    return ""


def web_entry(number: int) -> str:
    """An entry that ``web`` has in memory."""
    return hashlib.sha256(f"thaw sample web entry {number % WEB_ENTRIES}".encode()).hexdigest()


def web_page(number: int) -> bytes:
    """A file that ``web`` serves: 16 KiB of text."""
    return hashlib.shake_256(f"thaw sample web page {number % WEB_PAGES}".encode()).hexdigest(8192).encode()


def _difference(body: bytes, expected: bytes) -> str:
    if body == expected:
        return ""
    at = next((index for index, (found, wanted) in enumerate(zip(body, expected, strict=False)) if found != wanted), len(expected))
    there, wanted = body[at : at + 40], expected[at : at + 40]
    return f"its {len(body)} bytes should be {len(expected)} and differ from byte {at}: {there!r} in place of {wanted!r}"


def _cache_reply(row: int, token: str) -> bytes:
    value = hashlib.sha1(f"{token}:{row % CACHE_ENTRIES}".encode()).hexdigest() * 10
    return f"*2\r\n$32\r\n{token}\r\n$400\r\n{value}\r\n".encode()


def _index_value(row: int, token: str) -> str:
    row %= 512 * 1024
    start = row % 1024 * 1024
    record = row.to_bytes(8, "little") + bytes.fromhex(token) + _index_noise()[start + 24 : start + 1024]
    return hashlib.blake2b(record, digest_size=16).hexdigest()


@functools.cache
def _index_noise() -> bytes:
    return hashlib.shake_256(b"thaw sample index").digest(1 << 20)


def _model_value(row: int, _token: str) -> str:
    labels = _model_labels()
    return labels[row % len(labels)]


@functools.cache
def _model_labels() -> list[str]:
    """True class and checksum of each sample of the UCI digits, which the classifier has learnt without an error."""
    lines = (FUNCTIONS_DIR / "model" / "expected.csv").read_text().splitlines()[1:]
    return [line.replace(",", "-") for line in lines]


def _ledger_value(row: int, token: str) -> str:
    return _hash_of_entry(int(token, 16), row % (200 * 4096))


def _router_value(row: int, token: str) -> str:
    return _hash_of_entry(int(token, 16), row % (16 * 25600))


def _hash_of_entry(seed: int, entry: int) -> str:
    """Hash of 32 consecutive numbers that follow from a seed."""
    value = 0
    for position in range(entry * 32, entry * 32 + 32):
        value = mix(value ^ mix(seed ^ position))
    return f"{value:016x}"


def _echo_value(row: int, token: str) -> str:
    return f"{mix(mix(int(token, 16) ^ (row % 65536)) ^ row):016x}"


def _node_value(row: int, token: str) -> str:
    high, low = int(token[:8], 16), int(token[8:], 16)
    first = row % 400_000 * 32
    value = 0
    for position in range(first, first + 32):
        value = _mix32(value ^ _mix32(_mix32(high ^ position) ^ low))
    return f"{value:08x}"


def _mix32(number: int) -> int:
    """MurmurHash3's 32-bit finalizer, as in ``server.js``."""
    number = ((number ^ (number >> 16)) * 0x85EBCA6B) & 0xFFFFFFFF
    number = ((number ^ (number >> 13)) * 0xC2B2AE35) & 0xFFFFFFFF
    return number ^ (number >> 16)


def mix(number: int) -> int:
    """splitmix64's output function, as in ``Ledger.java``, ``router.go`` and ``echo.c``."""
    number = (number + 0x9E3779B97F4A7C15) & _MASK
    number = ((number ^ (number >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    number = ((number ^ (number >> 27)) * 0x94D049BB133111EB) & _MASK
    return number ^ (number >> 31)


_EXPECTED: dict[str, Callable[[int, str], str]] = {
    "index": _index_value,
    "model": _model_value,
    "ledger": _ledger_value,
    "echo": _echo_value,
    "node": _node_value,
    "router": _router_value,
}
_PATHS: dict[str, Callable[[int], str]] = {
    "index": lambda row: f"/lookup?row={row}",
    "model": lambda row: f"/predict?row={row}",
    "ledger": lambda row: f"/entry?row={row}",
    "echo": lambda row: f"/?row={row}",
    "node": lambda row: f"/entry?row={row}",
    # Odd rows from files, even ones from the workers' memory.
    "web": lambda row: f"/page/{row // 2 % WEB_PAGES}" if row % 2 else f"/entry?row={row}&key={row // 2 % WEB_ENTRIES}",
    # A key of redis.
    "cache": lambda row: f"entry:{row % CACHE_ENTRIES}",
    "router": lambda row: f"/route?row={row}",
}
