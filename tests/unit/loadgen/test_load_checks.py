"""Checks of the sample functions' answers: each kind of wrong answer is noticed."""

import hashlib
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.api.function import from_builtins
from loadgen import checks, http, resp
from loadgen.checks import PROGRAMS, inspect_sample, sample_targets, target_of, verify, web_entry, web_page

TOKENS = {
    "index": "0123456789abcdef" * 2,
    "model": "f" * 32,
    "ledger": "89abcdef01234567",
    "echo": "0" * 16,
    "node": "fedcba9876543210",
    "router": "1" * 16,
}
#: The samples that answer in JSON.
JSON = tuple(TOKENS)
CACHE_TOKEN = "00ff" * 8


def answer_of(sample, row, token):
    value = checks._EXPECTED[sample](row, token)
    return {"function": sample, "token": token, "row": row, "value": value, "count": 3}


@pytest.mark.parametrize("sample", JSON)
@given(row=st.integers(0, 10**9))
def test_a_right_answer_proves_its_token(sample, row):
    body = json.dumps(answer_of(sample, row, TOKENS[sample])).encode()
    verdict = inspect_sample(sample, body, row)
    assert (verdict.problem, verdict.token) == ("", TOKENS[sample])


@pytest.mark.parametrize("sample", JSON)
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"function": "other"}, "comes from 'other'"),
        ({"row": 8}, "about row 8"),
        ({"token": ""}, "token"),
        ({"token": "Z" * 32}, "token"),
        ({"token": None}, "token"),
        ({"count": 0}, "count"),
        ({"count": "3"}, "count"),
        ({"value": "0" * 16}, "its value is"),
        ({"value": None}, "its value is"),
    ],
)
def test_each_wrong_field_is_named(sample, change, message):
    assert message in verify(sample, answer_of(sample, 7, TOKENS[sample]) | change, 7)


@pytest.mark.parametrize("sample", ["index", "ledger", "echo", "node", "router"])
def test_a_value_made_under_another_token_is_wrong(sample):
    stale = answer_of(sample, 7, TOKENS[sample])
    other = f"{int(TOKENS[sample], 16) ^ 1:0{len(TOKENS[sample])}x}"
    assert verify(sample, stale | {"token": other}, 7)


@pytest.mark.parametrize("sample", JSON)
@given(row=st.integers(0, 10**6), other=st.integers(0, 10**6))
def test_the_value_of_another_row_is_wrong(sample, row, other):
    same = {"index": 512 * 1024, "model": 1797, "ledger": 819200, "echo": 1 << 62, "node": 400_000, "router": 409_600}[sample]
    answer = answer_of(sample, other, TOKENS[sample]) | {"row": row}
    assert bool(verify(sample, answer, row)) == (row % same != other % same)


@pytest.mark.parametrize("body", [b"", b"<html>", b"[1]", b"null", b"\xff"])
def test_an_answer_that_is_not_json_is_wrong(body):
    assert "JSON" in inspect_sample("echo", body, 1).problem


def body_of(sample, row):
    """The right answer of a sample that does not speak JSON."""
    if sample == "cache":
        return b"*2\r\n$32\r\n" + CACHE_TOKEN.encode() + b"\r\n$400\r\n" + hashed(f"{CACHE_TOKEN}:{row % 65536}") * 10 + b"\r\n"
    return web_page(row // 2) if row % 2 else f"{row} {web_entry(row // 2)}\n".encode()


def hashed(text):
    return hashlib.sha1(text.encode()).hexdigest().encode()


@pytest.mark.parametrize(("sample", "token"), [("web", ""), ("cache", CACHE_TOKEN)])
@given(row=st.integers(0, 10**9))
def test_right_bytes_are_right(sample, token, row):
    verdict = inspect_sample(sample, body_of(sample, row), row)
    assert (verdict.problem, verdict.token) == ("", token)


@pytest.mark.parametrize("sample", ["web", "cache"])
@given(row=st.integers(0, 1000), data=st.data())
def test_one_wrong_byte_is_noticed_and_named(sample, row, data):
    body = bytearray(body_of(sample, row))
    at = data.draw(st.integers(0, len(body) - 1))
    body[at] ^= 1
    problem = inspect_sample(sample, bytes(body), row).problem
    in_token = sample == "cache" and 9 <= at < 41
    assert problem and (in_token or f"differ from byte {at}:" in problem)


@pytest.mark.parametrize("sample", ["web", "cache"])
@pytest.mark.parametrize("row", [6, 7])
def test_a_cut_a_longer_and_another_rows_answer_are_noticed(sample, row):
    right = body_of(sample, row)
    for body in (b"", right[:-1], right + b"\n", body_of(sample, row + 2)):
        assert inspect_sample(sample, body, row).problem


def test_the_samples_documents_say_how_each_is_asked():
    targets = sample_targets()
    assert list(targets) == list(PROGRAMS)
    assert targets["index"].path(5) == "/lookup?row=5"
    assert targets["echo"].path(5) == "/?row=5"
    assert (targets["web"].path(5), targets["web"].path(6)) == ("/page/2", "/entry?row=6&key=3")
    assert (targets["cache"].path(65537), targets["cache"].ask) == ("entry:1", resp.get)
    assert {target.ask for name, target in targets.items() if name != "cache"} == {http.get}
    assert all(target.concurrency >= 1 for target in targets.values())


def function(**spec):
    return from_builtins({"metadata": {"name": "mine"}, "spec": {"command": ["x"], "port": 80, **spec}})


def test_another_function_is_asked_what_its_document_names():
    assert target_of(function()).path(1) == "/"
    assert target_of(function(readiness={"path": "/ok"})).path(1) == "/ok"
    warm = [{"path": "/post", "method": "POST"}, {"path": "/get"}]
    target = target_of(function(readiness={"path": "/ok"}, warmUp=warm, limits={"concurrency": 7}))
    assert (target.path(1), target.concurrency) == ("/get", 7)
    assert target.inspect(b"anything", 1).problem == ""


def test_a_renamed_sample_is_still_checked_as_what_it_is():
    document = {
        "metadata": {"name": "mine", "labels": {"thaw.dev/check": "echo"}},
        "spec": {"command": ["x"], "port": 80},
    }
    target = target_of(from_builtins(document))
    assert (target.function, target.path(3)) == ("mine", "/?row=3")
    assert target.inspect(b"{}", 3).problem
