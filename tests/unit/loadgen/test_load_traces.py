"""Replay of production traces: both forms, slices, speed, mapping, and what is not a trace."""

import gzip
import itertools
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loadgen.errors import TraceInvalid
from loadgen.traces import REST, SHIPPED, read, replay

EVENTS = "app,func,end_timestamp,duration\n"
MINUTES = "HashOwner,HashApp,HashFunction,Trigger,480,481,482\n"
INVOCATIONS = st.lists(st.tuples(st.floats(0, 1000), st.sampled_from("abcdefgh")), max_size=60).map(sorted)


def written(tmp_path, text, name="trace.csv"):
    path = tmp_path / name
    path.write_bytes(gzip.compress(text.encode()) if name.endswith(".gz") else text.encode())
    return path


def test_the_shipped_trace_is_whole():
    invocations = read(SHIPPED)
    assert len(invocations) == 998
    assert len({name for _, name in invocations}) == 49
    assert invocations == sorted(invocations)
    assert 0 <= invocations[0][0] < 1
    assert 6400 < invocations[-1][0] < 6500


def test_the_shipped_trace_has_its_licence_and_citation_beside_it():
    readme = (SHIPPED.parent / "README.md").read_text()
    assert "CC-BY 4.0" in readme
    assert "Shahrad" in readme


def test_slices_of_a_trace_add_up_to_the_whole():
    whole = read(SHIPPED)
    cuts = [0, 60, 61.5, 600, 7000]
    parts = [(time + start, name) for start, end in itertools.pairwise(cuts) for time, name in read(SHIPPED, from_s=start, to_s=end)]
    assert [name for _, name in parts] == [name for _, name in whole]
    assert [time for time, _ in parts] == pytest.approx([time for time, _ in whole])


def test_an_event_begins_its_duration_before_its_end(tmp_path):
    path = written(tmp_path, EVENTS + "app,f,12.5,2.5\napp,g,3,1\n")
    assert read(path) == [(2.0, "g/app"), (10.0, "f/app")]
    assert read(path, from_s=9, to_s=11) == [(1.0, "f/app")]


def test_the_same_function_name_in_two_apps_is_two_functions(tmp_path):
    path = written(tmp_path, EVENTS + "one,f,1,0\ntwo,f,1,0\n")
    assert len({name for _, name in read(path)}) == 2


@pytest.mark.parametrize("name", ["trace.csv", "trace.csv.gz"])
def test_minutes_hold_their_counts(tmp_path, name):
    path = written(tmp_path, MINUTES + "o,a,f,http,2,0,5\no,a,g,timer,0,1,0\n", name)
    found = Counter((function, int(time // 60)) for time, function in read(path))
    assert found == {("f", 0): 2, ("f", 2): 5, ("g", 1): 1}


def test_minutes_of_the_other_published_header(tmp_path):
    path = written(tmp_path, "HashFunction,HashOwner,HashApp,1_minute,2_minute\nf,o,a,0,3\n")
    assert Counter(int(time // 60) for time, _ in read(path)) == {1: 3}


@given(st.integers(0, 4), st.integers(0, 100))
def test_a_slice_of_minutes_is_what_the_whole_holds_there(tmp_path_factory, minute, seed):
    header = "HashOwner,HashApp,HashFunction,Trigger," + ",".join(str(480 + n) for n in range(6)) + "\n"
    path = written(tmp_path_factory.mktemp("t"), header + "o,a,f,http,3,1,4,1,5,9\no,a,g,http,2,7,1,8,2,8\n")
    whole = read(path, seed=seed)
    start, end = 60.0 * minute + 13, 60.0 * minute + 95
    expected = [(time - start, name) for time, name in whole if start <= time < end]
    assert read(path, from_s=start, to_s=end, seed=seed) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "trace.csv:1: this is neither"),
        ("a,b\n1,2\n", "trace.csv:1: this is neither"),
        ("HashOwner,HashApp,HashFunction,Trigger\n", "neither"),
        (EVENTS + "a,f,1,0\na,f,x,0\n", "trace.csv:3: .*'x'"),
        (EVENTS + "a,f,inf,0\n", "trace.csv:2: .*not times"),
        (EVENTS + "a,f\n", "trace.csv:2"),
        (MINUTES + "o,a,f,http,1,2,x\n", "trace.csv:2: .*'x'"),
        (MINUTES + "o,a,f,http,1,-2,3\n", "trace.csv:2: -2 invocations"),
    ],
)
def test_what_is_not_a_trace_is_refused_by_line(tmp_path, text, message):
    with pytest.raises(TraceInvalid, match=message):
        read(written(tmp_path, text))


def test_a_missing_a_damaged_and_a_binary_trace_are_clear_errors(tmp_path):
    with pytest.raises(TraceInvalid, match=r"cannot read trace .*nowhere"):
        read(tmp_path / "nowhere.csv")
    damaged = tmp_path / "damaged.csv.gz"
    damaged.write_bytes(SHIPPED.read_bytes()[:9000])
    with pytest.raises(TraceInvalid, match=r"cannot read trace .*damaged"):
        read(damaged)
    corrupt = bytearray(SHIPPED.read_bytes())
    corrupt[3000:3100] = bytes(100)
    damaged.write_bytes(corrupt)
    with pytest.raises(TraceInvalid, match="damaged"):
        read(damaged)
    binary = tmp_path / "binary.csv"
    binary.write_bytes(bytes(range(256)))
    with pytest.raises(TraceInvalid, match="binary"):
        read(binary)


def test_an_empty_slice_is_refused():
    with pytest.raises(TraceInvalid, match="empty"):
        read(SHIPPED, from_s=10, to_s=10)


@given(INVOCATIONS, st.floats(0.1, 1000), st.integers(0, 5))
def test_replay_keeps_every_invocation_in_order_and_only_changes_the_speed(invocations, factor, seed):
    arrivals = replay(invocations, ["x", "y", "z"], time_factor=factor, seed=seed)
    assert [arrival.at_s for arrival in arrivals] == [time / factor for time, _ in invocations]
    assert [arrival.trace_function for arrival in arrivals] == [name for _, name in invocations]
    assert arrivals == replay(invocations, ["x", "y", "z"], time_factor=factor, seed=seed)


@given(INVOCATIONS, st.integers(1, 4))
def test_functions_of_the_trace_stand_for_deployed_ones_by_popularity(invocations, number):
    functions = [f"deployed-{n}" for n in range(number)]
    stands_for = {a.trace_function: a.function for a in replay(invocations, functions)}
    counts = Counter(name for _, name in invocations)
    ranked = sorted(counts, key=lambda name: (-counts[name], name))
    assert [stands_for[name] for name in ranked] == [functions[rank % number] for rank in range(len(ranked))]


def test_an_explicit_mapping_takes_prefixes_the_longest_first_and_leaves_out_the_rest():
    invocations = [(1.0, "abc"), (2.0, "abd"), (3.0, "xyz")]
    arrivals = replay(invocations, [], mapping={"ab": "one", "abd": "two"})
    assert [(a.trace_function, a.function) for a in arrivals] == [("abc", "one"), ("abd", "two")]
    arrivals = replay(invocations, [], mapping={"abc": "one", REST: "other"})
    assert [a.function for a in arrivals] == ["one", "other", "other"]


def test_a_mapping_that_matches_nothing_and_an_impossible_speed_are_refused():
    with pytest.raises(TraceInvalid, match="matches none"):
        replay([(1.0, "abc")], [], mapping={"x": "one"})
    with pytest.raises(TraceInvalid, match="time factor"):
        replay([(1.0, "abc")], ["one"], time_factor=0)
    with pytest.raises(TraceInvalid, match="no function"):
        replay([(1.0, "abc")], [])
