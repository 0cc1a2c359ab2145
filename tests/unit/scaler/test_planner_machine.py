"""The planner against a random world: what must always hold, whatever happens in whatever order.

The world is a model of agents: it knows which commands are unanswered and which instances and standbys exist on which node, and
answers or fails them in any order, loses nodes and brings them back with what they held.
"""

from __future__ import annotations

import gc
import sys

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from scaler_harness import NS, Harness, function, prepares, starts

from agent.api.messages import Evict, Fetch, InstanceInfo, MakeCheckpoint, Prepare, Release, StandbyInfo, Start
from scaler.commands import NodeCommand
from scaler.events import NodeDown, ShardGained, ShardLost, ShardReady
from scaler.planner import Planner

NAMES = ("f", "g")
NODES = ("n1", "n2", "n3")
SOURCES = ("a", "b")
MAXIMUM = 6


class PlannerMachine(RuleBasedStateMachine):
    """Random events, checked after each."""

    def __init__(self) -> None:
        super().__init__()
        self.harness = Harness()
        self.harness.do = self._checked(self.harness.do)  # type: ignore[method-assign]
        self.open: dict[str, NodeCommand] = {}
        #: Starts from before the shard moved, which a node may still be at.
        self.foreign: list[NodeCommand] = []
        self.ids: set[str] = set()
        #: What exists, by node: also on nodes that the planner cannot see now.
        self.exists: dict[str, dict[str, InstanceInfo]] = {name: {} for name in NODES}
        self.standbys: dict[str, dict[str, StandbyInfo]] = {name: {} for name in NODES}
        #: Every standby that was ever made: name → function.
        self.standby_of: dict[str, str] = {}
        self.up: set[str] = set()
        #: Nodes that are down and not lost: what happens there is not known.
        self.away: set[str] = set()
        self.documents: dict[str, object] = {}
        #: (function, source) → (epoch, seq, in_flight, expires)
        self.said: dict[tuple[str, str], tuple[int, int, int, int]] = {}
        self.owned = True

    def _checked(self, do):
        def checked(event):
            serving = {
                name: len([item for item in state.instances if item.state != "releasing"])
                for name in NAMES
                if (state := self.harness.planner.explain(name)) is not None
            }
            commands = do(event)
            for command in commands:
                self._check_command(command)
            for name in NAMES:
                count = len([c for c in commands if isinstance(c.message, Release) and self._owner(c) == name])
                state = self.harness.planner.explain(name)
                if count and state is not None:
                    left = len([item for item in state.instances if item.state != "releasing"])
                    # What was not answered is asked for again, and counts for nobody since it was asked for first.
                    assert left >= min(state.wanted, serving.get(name, 0)), (
                        f"{name} needs {state.wanted}, had {serving[name]}, keeps {left}"
                    )
                if state is not None and any(command.message.function.name == name for command in starts(commands)):
                    # Late and adopted instances may exceed max until they are released; a start may never do so.
                    ready = len([item for item in state.instances if item.state == "ready"])
                    assert ready + state.starting <= self.documents[name].spec.instances.max
                if any(command.message.function.name == name for command in prepares(commands)):
                    assert state.standbys + state.standbys_making <= state.standbys_wanted, "never more than wanted are asked for"
            return commands

        return checked

    def _owner(self, command: NodeCommand) -> str:
        for name in NAMES:
            state = self.harness.planner.explain(name)
            if state and command.message.instance in [item.instance for item in state.instances]:
                return name
        return ""

    def _check_command(self, command: NodeCommand) -> None:
        message = command.message
        assert message.id not in self.ids, "an id is used once"
        self.ids.add(message.id)
        assert message.deadline_ns > self.harness.now
        assert message.epoch >= 1
        assert self.owned, "commands only for owned shards"
        if isinstance(message, Release):
            known = self._owner(command) or self.standby_of.get(message.instance)
            assert known, f"release of {message.instance}, which the planner does not know"
            if not self._owner(command):
                overdue_ns = self.harness.now - self.harness.config.answer_grace_ns
                under_way = [*starts(self.open.values()), *self.foreign]
                starting = [c for c in under_way if c.node == command.node and c.message.deadline_ns > overdue_ns]
                assert known not in [c.message.function.name for c in starting], f"{message.instance} may be in use by a start"
        elif not isinstance(message, Evict):
            assert command.node in self.up, "only nodes that are up get work"
        if isinstance(message, Start):
            assert message.function == self.documents.get(message.function.name)
        if isinstance(message, Prepare):
            assert message.function == self.documents.get(message.function.name)
            assert command.node in self.harness.planner.explain(message.function.name).cached_on
        self.open[message.id] = command

    def _take(self, data, kind) -> NodeCommand:
        options = [c for c in self.open.values() if isinstance(c.message, kind) and c.node in self.up]
        command = data.draw(st.sampled_from(options))
        del self.open[command.message.id]
        return command

    def _any(self, kind) -> bool:
        return any(isinstance(c.message, kind) and c.node in self.up for c in self.open.values())

    @initialize(standbys=st.integers(0, 3))
    def one_node(self, standbys) -> None:
        """Often with standbys: random steps alone seldom get that far."""
        self._connect("n1", 8000)
        if standbys:
            self.documents["f"] = function("f", command="x", maximum=MAXIMUM, standby=standbys)
            self.harness.apply(self.documents["f"])
            for kind, answer in ((Fetch, lambda fetch: self.harness.fetched(fetch, checkpoint="cp")), (Prepare, self._make_standby)):
                for command in [command for command in self.open.values() if isinstance(command.message, kind)]:
                    del self.open[command.message.id]
                    answer(command)

    @rule(name=st.sampled_from(NAMES), command=st.sampled_from(["x", "y"]), minimum=st.integers(0, 2), data=st.data())
    def apply(self, name, command, minimum, data) -> None:
        document = function(
            name,
            command=command,
            minimum=minimum,
            maximum=data.draw(st.integers(max(minimum, 1), MAXIMUM)),
            concurrency=data.draw(st.integers(1, 3)),
            idle_s=data.draw(st.sampled_from([0.0, 1.0, 30.0, None])),
            checkpoint=data.draw(st.sampled_from(["auto", "auto", "off"])),
            standby=data.draw(st.integers(0, 6)),
        )
        self.documents[name] = document
        self.harness.apply(document)

    @rule(name=st.sampled_from(NAMES))
    def delete(self, name) -> None:
        self.documents.pop(name, None)
        self.harness.delete(name)

    @precondition(lambda self: self.owned)
    @rule(
        name=st.sampled_from(NAMES),
        source=st.sampled_from(SOURCES),
        in_flight=st.integers(0, 12),
        epoch=st.integers(1, 3),
        seq=st.integers(0, 50),
        ttl=st.sampled_from([1.0, 20.0, 3600.0]),
    )
    def demand(self, name, source, in_flight, epoch, seq, ttl) -> None:
        known = self.said.get((name, source))
        if known is None or (epoch, seq) > known[:2]:
            self.said[name, source] = (epoch, seq, in_flight, self.harness.now + int(ttl * NS))
        self.harness.demand(in_flight, name=name, source=source, epoch=epoch, seq=seq, ttl=ttl)

    @precondition(lambda self: self._any(Start))
    @rule(data=st.data(), mode=st.sampled_from(["cold", "restore", "thaw", "thaw"]))
    def start_done(self, data, mode) -> None:
        self._started(data, self._take(data, Start), mode)

    @precondition(lambda self: self.owned and any(self.standbys[name] for name in self.up))
    @rule(data=st.data(), in_flight=st.integers(0, MAXIMUM), mode=st.sampled_from(["restore", "thaw", "thaw", "thaw"]))
    def demand_where_standbys_wait(self, data, in_flight, mode) -> None:
        """Some of what is started is answered at once."""
        name = data.draw(st.sampled_from(sorted({info.function for node in self.up for info in self.standbys[node].values()})))
        self.said[name, "c"] = (1, len(self.harness.log), in_flight, self.harness.now + 3600 * NS)
        commands = self.harness.demand(in_flight, name=name, source="c", epoch=1, seq=len(self.harness.log), ttl=3600.0)
        for command in starts(commands)[: data.draw(st.integers(0, MAXIMUM))]:
            del self.open[command.message.id]
            self._started(data, command, mode)

    def _started(self, data, command, mode) -> None:
        name = f"i{len(self.ids)}-{self.harness.made}"
        document = command.message.function
        usable = self._usable(command.node, document)
        if mode == "thaw" and usable:
            name = data.draw(st.sampled_from(usable))
            del self.standbys[command.node][name]
        elif mode == "thaw":
            mode = "restore"
        self.exists[command.node][name] = self.harness.info(name, document, mode=mode, command_id=command.message.id)
        self.harness.done(command, mode=mode, instance=name)

    def _usable(self, node: str, document) -> list[str]:
        """Standbys that the node's agent may thaw: it takes releases in the order in which they came."""
        asked = {c.message.instance for c in self.open.values() if isinstance(c.message, Release)}
        return [name for name, info in self.standbys[node].items() if info.function_digest == document.digest and name not in asked]

    @precondition(lambda self: self._any(Prepare))
    @rule(data=st.data(), outcome=st.sampled_from(["done", "done", "done", "fails", "refused", "done unheard"]))
    def prepare_answered(self, data, outcome) -> None:
        command = self._take(data, Prepare)
        if outcome in ("fails", "refused"):
            self.harness.command_failed(command, name=command.message.function.name, refused=outcome == "refused")
            return
        self._make_standby(command, data.draw(st.sampled_from(["cp", "cp", "cp2"])), heard=outcome == "done")

    def _make_standby(self, command, checkpoint: str = "cp", heard: bool = True) -> None:
        name = f"s{len(self.ids)}-{self.harness.made}"
        document = command.message.function
        self.standby_of[name] = document.name
        self.standbys[command.node][name] = self.harness.standby(name, document, checkpoint=checkpoint, command_id=command.message.id)
        if heard:
            self.harness.prepared(command, checkpoint=checkpoint, standby=name)
        else:  # the stream broke
            self._connect(command.node, 8000)

    @precondition(lambda self: any(self.standbys[name] for name in self.up))
    @rule(data=st.data())
    def standby_exits(self, data) -> None:
        node = data.draw(st.sampled_from(sorted(name for name in self.up if self.standbys[name])))
        standby = data.draw(st.sampled_from(sorted(self.standbys[node])))
        info = self.standbys[node].pop(standby)
        self.harness.exited(standby, node=node, name=info.function)

    @precondition(lambda self: self._any(Start))
    @rule(data=st.data(), refused=st.booleans())
    def start_failed(self, data, refused) -> None:
        self.harness.failed(self._take(data, Start), refused=refused)

    @precondition(lambda self: self._any(Release))
    @rule(data=st.data(), fails=st.booleans())
    def release_answered(self, data, fails) -> None:
        command = self._take(data, Release)
        group = self.exists if command.message.instance in self.exists[command.node] else self.standbys
        gone = group[command.node].get(command.message.instance)
        if fails or gone is None:
            name = gone.function if gone else "f"
            self.harness.command_failed(command, reason="sandbox" if gone else "instance_gone", name=name)
        else:
            del group[command.node][command.message.instance]
            self.harness.released(command, name=gone.function)

    @precondition(lambda self: self._any(Fetch))
    @rule(data=st.data(), outcome=st.sampled_from(["", "cp", "cp", "cp", "cp2", "fails"]))
    def fetch_answered(self, data, outcome) -> None:
        command = self._take(data, Fetch)
        if outcome == "fails":
            self.harness.command_failed(command, name=command.message.function.name)
        else:
            self.harness.fetched(command, checkpoint=outcome)

    @precondition(lambda self: self._any(MakeCheckpoint))
    @rule(data=st.data(), fails=st.booleans())
    def checkpoint_answered(self, data, fails) -> None:
        command = self._take(data, MakeCheckpoint)
        if fails:
            self.harness.command_failed(command, name=command.message.function.name)
        else:
            self.harness.published(command)

    @precondition(lambda self: self._any(Evict))
    @rule(data=st.data())
    def evict_answered(self, data) -> None:
        self.harness.evicted(self._take(data, Evict))

    @precondition(lambda self: any(self.exists[name] for name in self.up))
    @rule(data=st.data())
    def instance_exits(self, data) -> None:
        node = data.draw(st.sampled_from(sorted(name for name in self.up if self.exists[name])))
        instance = data.draw(st.sampled_from(sorted(self.exists[node])))
        info = self.exists[node].pop(instance)
        self.harness.exited(instance, node=node, name=info.function)

    @rule(name=st.sampled_from(NODES), room=st.sampled_from([0, 300, 8000]))
    def node_connects(self, name, room) -> None:
        self._connect(name, room)

    def _connect(self, name: str, room: int) -> None:
        self.up.add(name)
        self.away.discard(name)
        self.foreign = [c for c in self.foreign if c.node != name]  # its inventory says that nothing is under way
        self.harness.node(name, memory_free_mb=room, instances=self.exists[name].values(), standbys=self.standbys[name].values())

    @precondition(lambda self: self.up)
    @rule(data=st.data(), keeps=st.booleans(), only_down=st.booleans())
    def node_goes(self, data, keeps, only_down) -> None:
        name = data.draw(st.sampled_from(sorted(self.up)))
        self.up.discard(name)
        self.harness.do(NodeDown(node=name))
        if not keeps:
            self.exists[name].clear()
            self.standbys[name].clear()
        if not only_down:
            self.open = {key: c for key, c in self.open.items() if c.node != name}
            self.harness.lost(name)
        else:
            self.away.add(name)

    @rule(seconds=st.sampled_from([0.1, 0.5, 2.0, 40.0, 400.0]))
    def time_passes(self, seconds) -> None:
        steps = 4
        for _ in range(steps):
            self.harness.pass_s(max(0.1, seconds / steps))
        self.said = {key: value for key, value in self.said.items() if value[3] > self.harness.now}

    @precondition(lambda self: self.owned)
    @rule(epoch=st.integers(2, 9))
    def epoch_moves_on(self, epoch) -> None:
        self.harness.do(ShardGained(shard=0, epoch=epoch))

    @rule()
    def shard_moves_and_comes_back(self) -> None:
        self.harness.do(ShardLost(shard=0))
        self.owned = False
        self.said.clear()
        # What is being started is started all the same, and whoever owns the shard next knows of it.
        self.foreign += starts(self.open.values())
        self.open.clear()
        self.harness.pass_s(0.1)
        self.owned = True
        self.harness.do(ShardGained(shard=0, epoch=10))
        self.harness.do(ShardReady(shard=0))

    @invariant()
    def level_is_the_sum_of_the_newest(self) -> None:
        for name in NAMES:
            state = self.harness.planner.explain(name)
            expected = sum(value[2] for key, value in self.said.items() if key[0] == name)
            assert (state.level if state else 0) == expected

    @invariant()
    def each_source_has_one_timer(self) -> None:
        known = [self.harness.planner.explain(name) for name in NAMES]
        assert self.harness.planner._world.timers.sources == sum(state.sources for state in known if state is not None)

    @invariant()
    def within_bounds_and_nothing_lost(self) -> None:
        for name in NAMES:
            state, document = self.harness.planner.explain(name), self.documents.get(name)
            if state is None or document is None:
                continue
            ready = len([item for item in state.instances if item.state == "ready"])
            bounds = document.spec.instances
            assert state.wanted <= bounds.max
            started = [c for c in [*starts(self.open.values()), *self.foreign] if c.message.function.name == name]
            assert state.starting <= len(started)
            assert ready + state.starting + state.owed >= state.demanded, "every missing instance is started or owed"

    @invariant()
    def standbys_in_the_books_are_those_that_exist(self) -> None:
        for name in NAMES:
            state = self.harness.planner.explain(name)
            exist = [info for node in self.up for info in self.standbys[node].values() if info.function == name]
            if not self.away:
                assert round(1e6 * (state.standbys_mb if state else 0)) == sum(info.pss_bytes for info in exist)

    @invariant()
    def no_more_standbys_than_wanted(self) -> None:
        for name in NAMES:
            state = self.harness.planner.explain(name)
            if state is not None and self.owned:
                assert state.standbys <= state.standbys_wanted, "what is too much leaves at once"

    @invariant()
    def at_most_one_checkpoint_at_a_time(self) -> None:
        for name in NAMES:
            making = [
                c
                for c in self.open.values()
                if isinstance(c.message, MakeCheckpoint) and c.message.function.name == name and c.message.deadline_ns > self.harness.now
            ]
            assert len(making) <= 1

    def teardown(self) -> None:
        """Whatever happened: with one good node, every function reaches its level and its standbys; and the log replays."""
        for name in NODES:
            if name not in self.up:  # the service says so when the grace is over
                self.open = {key: c for key, c in self.open.items() if c.node != name}
                self.harness.lost(name)
        self.up.add("good")
        self.exists["good"], self.standbys["good"] = {}, {}
        self.harness.node("good", memory_free_mb=1 << 20)
        for _ in range(1200):
            for command in list(self.open.values()):
                del self.open[command.message.id]
                if command.node not in self.up:
                    continue
                if isinstance(command.message, Start):
                    self.harness.done(command, mode="cold", instance=f"z{len(self.ids)}-{self.harness.made}")
                elif isinstance(command.message, Release):
                    self.standbys[command.node].pop(command.message.instance, None)
                    self.harness.released(command, name=self._owner(command) or self.standby_of.get(command.message.instance, "f"))
                elif isinstance(command.message, Prepare):
                    self._make_standby(command)
                elif isinstance(command.message, Fetch):
                    self.harness.fetched(command, checkpoint="cp")
                elif isinstance(command.message, MakeCheckpoint):
                    self.harness.published(command)
            self.harness.pass_s(0.1)
            if all(self._at_level(name) and self._has_standbys(name) for name in NAMES):
                break
        for name in NAMES:
            assert self._at_level(name), self.harness.planner.explain(name)
            assert self._has_standbys(name), (self.harness.planner.explain(name), self.standbys)
        twin = Planner("t", lambda name: 0, self.harness.config)
        again = [command for event, now in self.harness.log for command in twin.handle(event, now)]
        assert again == self.harness.commands

    def _has_standbys(self, name: str) -> bool:
        """Exactly as many exist as are wanted and counted; where no checkpoint is there can be none to come."""
        state = self.harness.planner.explain(name)
        exist = [info for node in self.up for info in self.standbys[node].values() if info.function == name]
        if state is None:
            return not exist
        wanted = state.standbys_wanted if state.checkpoint else state.standbys
        return len(exist) == state.standbys == wanted and not state.standbys_making

    def _at_level(self, name: str) -> bool:
        state = self.harness.planner.explain(name)
        return state is None or len([item for item in state.instances if item.state == "ready"]) >= state.demanded


PlannerMachine.TestCase.settings = settings(
    max_examples=100,
    stateful_step_count=50,
    deadline=None,
    suppress_health_check=list(HealthCheck),
    report_multiple_bugs=False,
)
TestPlannerMachine = PlannerMachine.TestCase


@pytest.mark.parametrize("options", [{"checkpoint": "off"}, {"idle_s": None}], ids=["by level", "by forecast"])
def test_cost_of_an_event_does_not_grow_with_functions(options) -> None:
    """Counted, not timed: the calls that one demand event causes are the same among 10 and among 10,000 functions."""
    counts = []
    for size in (10, 10_000):
        harness = Harness()
        harness.node()
        for index in range(size):
            harness.apply(function(f"f{index}", **options))
        for in_flight in (1, 0, 1):
            for command in starts(harness.demand(in_flight, name="f5")):
                harness.done(command)
        calls = 0

        def count(frame, kind, argument) -> None:
            nonlocal calls
            calls += kind in ("call", "c_call")

        # The collector's callbacks are nobody's cost.
        gc.collect()
        gc.disable()
        sys.setprofile(count)
        try:
            harness.demand(1, name="f5")
        finally:
            sys.setprofile(None)
            gc.enable()
        counts.append(calls)
    assert counts[0] == counts[1]
