"""Checks of the sample functions' answers: each kind of wrong answer is noticed."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.api.function import from_builtins
from loadgen import checks
from loadgen.checks import SAMPLES, inspect_sample, sample_targets, target_of, verify

TOKENS = {"index": "0123456789abcdef" * 2, "model": "f" * 32, "ledger": "89abcdef01234567", "echo": "0" * 16}


def answer_of(sample, row, token):
    value = checks._EXPECTED[sample](row, token)
    return {"function": sample, "token": token, "row": row, "value": value, "count": 3}


@pytest.mark.parametrize("sample", SAMPLES)
@given(row=st.integers(0, 10**9))
def test_a_right_answer_proves_its_token(sample, row):
    body = json.dumps(answer_of(sample, row, TOKENS[sample])).encode()
    verdict = inspect_sample(sample, body, row)
    assert (verdict.problem, verdict.token) == ("", TOKENS[sample])


@pytest.mark.parametrize("sample", SAMPLES)
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


@pytest.mark.parametrize("sample", ["index", "ledger", "echo"])
def test_a_value_made_under_another_token_is_wrong(sample):
    stale = answer_of(sample, 7, TOKENS[sample])
    assert verify(sample, stale | {"token": TOKENS[sample].replace("0", "1")}, 7)


@pytest.mark.parametrize("sample", SAMPLES)
@given(row=st.integers(0, 10**6), other=st.integers(0, 10**6))
def test_the_value_of_another_row_is_wrong(sample, row, other):
    same = {"index": 512 * 1024, "model": 1797, "ledger": 819200, "echo": 1 << 62}[sample]
    answer = answer_of(sample, other, TOKENS[sample]) | {"row": row}
    assert bool(verify(sample, answer, row)) == (row % same != other % same)


@pytest.mark.parametrize("body", [b"", b"<html>", b"[1]", b"null", b"\xff"])
def test_an_answer_that_is_not_json_is_wrong(body):
    assert "JSON" in inspect_sample("echo", body, 1).problem


def test_the_samples_documents_say_how_each_is_asked():
    targets = sample_targets()
    assert list(targets) == list(SAMPLES)
    assert targets["index"].path(5) == "/lookup?row=5"
    assert targets["echo"].path(5) == "/?row=5"
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
