"""How many placeholder pods a function has, and that nothing is sent to a node without a free one."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scaler_harness import Harness, function, only, prepares, starts

from agent.api.function import Function, PodTemplate
from agent.api.messages import Fetch, MakeCheckpoint, Prepare, Start
from scaler.dormant import pack, unpack
from scaler.events import PlaceholdersSeen
from scaler.placeholders import target
from scaler.state import FunctionState
from scaler.world import PlannerConfig

COUNTS = st.integers(min_value=0, max_value=40)
CASES = st.fixed_dictionaries(
    {"wanted": COUNTS, "standbys": COUNTS, "making": st.booleans(), "maximum": st.integers(1, 30), "ahead": st.integers(0, 5)}
)


class TestTarget:
    @given(CASES)
    def test_within_what_may_run_and_enough_for_what_is_wanted(self, case):
        count = target(**case)
        assert min(case["wanted"] + case["standbys"], case["maximum"]) + case["making"] <= count <= case["maximum"] + case["making"]

    @given(CASES, st.sampled_from(["wanted", "standbys", "making", "maximum", "ahead"]))
    def test_more_asked_for_is_never_fewer(self, case, what):
        more = True if what == "making" else case[what] + 1
        assert target(**{**case, what: more}) >= target(**case)

    @pytest.mark.parametrize(
        ("wanted", "standbys", "making", "maximum", "ahead", "count"),
        [
            (0, 0, False, 10, 1, 1),
            (0, 0, False, 10, 0, 0),
            (0, 0, True, 10, 0, 1),
            (0, 0, True, 10, 1, 1),
            (1, 0, True, 1, 1, 2),
            (3, 1, False, 10, 1, 5),
            (8, 0, False, 20, 1, 10),
            (9, 3, False, 10, 1, 10),
        ],
    )
    def test_examples(self, wanted, standbys, making, maximum, ahead, count):
        assert target(wanted=wanted, standbys=standbys, making=making, maximum=maximum, ahead=ahead) == count


def podded(**options) -> Function:
    document = function(**options)
    template = PodTemplate(spec={"containers": [{"name": "function", "image": "i"}]})
    return msgspec.structs.replace(document, spec=msgspec.structs.replace(document.spec, template=template))


@pytest.fixture
def harness() -> Harness:
    harness = Harness(config=PlannerConfig(pods=True))
    harness.node("n1")
    harness.node("n2")
    return harness


def see(harness: Harness, nodes: dict[str, int], document: Function | None = None):
    return harness.do(PlaceholdersSeen(function="f", digest=(document or podded()).digest, nodes=nodes))


def sent(commands, kind) -> list[str]:
    return [command.node for command in commands if isinstance(command.message, kind)]


class TestStarts:
    def test_wait_for_a_placeholder_and_go_where_it_is(self, harness):
        harness.apply(podded())
        assert sent(harness.demand(2), Start) == []
        assert harness.planner.explain("f").owed == 2
        assert sent(see(harness, {"n2": 1}), Start) == ["n2"]
        # It is taken: being told of it again gives nothing.
        assert sent(see(harness, {"n2": 1, "n1": 0}), Start) == []
        assert sent(see(harness, {"n2": 1, "n1": 3}), Start) == ["n1"]
        assert harness.planner.explain("f").owed == 0

    def test_a_document_without_a_template_needs_none(self, harness):
        harness.apply(function())
        assert len(sent(harness.demand(2), Start)) == 2

    def test_a_template_needs_none_where_there_are_no_pods(self):
        harness = Harness()
        harness.node()
        harness.apply(podded())
        assert len(sent(harness.demand(1), Start)) == 1

    def test_placeholders_of_an_older_document_are_none(self, harness):
        harness.apply(podded())
        see(harness, {"n1": 1})
        harness.apply(podded(command="other"))
        assert sent(harness.demand(1), Start) == []
        assert sent(see(harness, {"n1": 1}), Start) == []
        assert sent(see(harness, {"n1": 1}, podded(command="other")), Start) == ["n1"]

    def test_a_failed_start_gives_its_placeholder_back(self, harness):
        harness.apply(podded())
        see(harness, {"n1": 1})
        harness.failed(starts(harness.demand(1))[0])
        assert sent(harness.pass_s(5), Start) == ["n1"]

    def test_each_running_instance_keeps_one(self, harness):
        harness.apply(podded())
        see(harness, {"n1": 2})
        for level in (1, 2, 3):
            for command in starts(harness.demand(level)):
                harness.done(command)
        assert harness.planner.explain("f").owed == 1
        assert len(harness.planner.explain("f").instances) == 2


class TestStandbysAndCheckpoints:
    def test_standbys_go_to_free_placeholders_and_their_starts_need_no_other(self, harness):
        document = podded(standby=2)
        # A node without one is not even asked for a checkpoint.
        assert sent(harness.apply(document), Fetch) == []
        [fetch] = only(Fetch, see(harness, {"n1": 2}, document))
        assert fetch.node == "n1"
        commands = harness.fetched(fetch, checkpoint="cp")
        assert sent(commands, Prepare) == ["n1", "n1"]
        for command in prepares(commands):
            harness.prepared(command)
        assert sent(harness.demand(1), Start) == ["n1"]
        # A second start finds a standby, a third one nothing.
        assert sent(harness.demand(3), Start) == ["n1"]

    def test_a_checkpoint_is_made_when_there_is_a_placeholder_for_it(self, harness):
        document = podded(maximum=1)
        harness.apply(document)
        for fetch in only(Fetch, see(harness, {"n1": 1}, document)):
            harness.fetched(fetch)
        harness.done(starts(harness.demand(1))[0], mode="cold")
        assert sent(harness.commands, MakeCheckpoint) == []
        assert harness.planner.placeholders_wanted("f", 1) == 2
        assert sent(see(harness, {"n1": 1, "n2": 1}, document), MakeCheckpoint) == ["n2"]


def test_what_sleeps_remembers_its_placeholders():
    state = FunctionState("f", 0)
    state.apply(podded())
    state.placeholders = {"n1": 2}
    again, _, _ = unpack("f", pack(state, 1, []), lambda state: (None, None))
    assert again.placeholders == {"n1": 2}
    assert again.function == podded()


def test_only_the_owner_of_the_shard_acts():
    harness = Harness(shards=())
    harness.apply(podded())
    assert not harness.planner.acts_for("f")
    assert Harness().planner.acts_for("f")
