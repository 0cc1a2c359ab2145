"""Functions as resources: what the planner is told, what is said of those that are none, and their status."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from scaler_harness import Harness, running

from infra.kubernetes.watch import Changed, Listed
from scaler.edges.kubernetes.agents import AgentTable
from scaler.edges.kubernetes.functions import Fault, FunctionTable, Resource, read
from scaler.edges.kubernetes.pods import Pod
from scaler.edges.kubernetes.status import Seen, status_of
from scaler.events import FunctionApplied, FunctionDeleted

NOW = "2026-01-01T00:00:00Z"


def resource(name: str = "f", namespace: str = "ns", uid: str = "u", *, made: str = "1", generation: int = 1, **spec: Any) -> dict:
    template = {"spec": {"containers": [{"name": "function", "image": "i"}]}}
    return {
        "apiVersion": "thaw.dev/v1",
        "kind": "Function",
        "metadata": {"name": name, "namespace": namespace, "uid": uid, "creationTimestamp": made, "generation": generation},
        "spec": {"command": ["serve"], "port": 80, "template": template, **spec},
    }


class Told:
    def __init__(self) -> None:
        self.events: list[FunctionApplied | FunctionDeleted] = []
        self.changed: list[str] = []
        self.table = FunctionTable("agent", self.events.append, self.changed.append)

    def words(self) -> list[str]:
        """Events as words, and forget them."""
        words = [
            f"+{event.function.name} {event.function.spec.port}" if isinstance(event, FunctionApplied) else f"-{event.name}"
            for event in self.events
        ]
        self.events.clear()
        return words

    def put(self, *values: dict) -> list[str]:
        for value in values:
            self.table.take(Changed(value))
        return self.words()

    def fault(self, name: str = "f", at: int = 0) -> Fault | None:
        return self.table.fault(self.table.resources(name)[at])


@pytest.fixture
def told() -> Told:
    return Told()


class TestTable:
    def test_what_is_applied_changed_and_deleted(self, told):
        assert told.put(resource()) == ["+f 80"]
        assert told.put(resource(port=81, generation=2)) == ["+f 81"]
        told.table.take(Changed(resource(), gone=True))
        assert told.words() == ["-f"]
        assert told.table.names() == []

    def test_status_is_no_change(self, told):
        told.put(resource())
        told.changed.clear()
        assert told.put({**resource(), "status": {"rung": "cached"}}) == []
        assert told.changed == []
        assert told.table.resources("f")[0].value["status"] == {"rung": "cached"}

    def test_a_list_tells_of_what_went_while_nobody_looked(self, told):
        told.put(resource(), resource("g", uid="v"))
        told.table.take(Listed([resource("g", uid="v", port=81, generation=2), resource("h", uid="w")]))
        assert told.words() == ["-f", "+g 81", "+h 80"]

    def test_another_one_of_that_name_is_another_function(self, told):
        told.put(resource())
        told.table.take(Listed([resource(uid="v")]))
        assert told.words() == ["-f", "+f 80"]

    def test_one_that_is_being_deleted_is_gone(self, told):
        told.put(resource())
        leaving = resource()
        leaving["metadata"]["deletionTimestamp"] = NOW
        assert told.put(leaving) == ["-f"]

    @pytest.mark.parametrize(
        ("spec", "reason", "field"),
        [
            ({"port": 0}, "InvalidDocument", "spec.port"),
            ({"instances": {"min": 3, "max": 1}}, "InvalidDocument", "spec.instances"),
            ({"environment": {"A=B": "c"}}, "InvalidDocument", "spec.environment"),
            ({"template": {"spec": {"containers": []}}}, "InvalidDocument", "spec.template.spec.containers"),
            ({"template": {"spec": {"hostPID": True, "containers": [{"name": "a", "image": "i"}]}}}, "InvalidTemplate", "hostPID"),
            ({"template": {"spec": {"containers": [{"name": "a", "image": "i", "resources": 1}]}}}, "InvalidTemplate", "spec.template"),
            ({"template": {"spec": {"volumes": 3, "containers": [{"name": "a", "image": "i"}]}}}, "InvalidTemplate", "spec.template"),
        ],
    )
    def test_a_wrong_one_is_no_function_and_says_why(self, told, spec, reason, field):
        assert told.put(resource(**spec)) == []
        fault = told.fault()
        assert fault is not None
        assert fault.reason == reason
        assert field in fault.message

    def test_a_wrong_change_leaves_in_force_what_was(self, told):
        told.put(resource())
        assert told.put(resource(port=0, generation=2)) == []
        applied = told.table.applied("f")
        assert applied is not None
        assert applied.function is not None
        assert applied.function.spec.port == 80
        assert told.fault() is not None
        assert told.put(resource(port=82, generation=3)) == ["+f 82"]
        assert told.fault() is None

    def test_of_one_name_the_oldest_is_the_function(self, told):
        told.put(resource(namespace="b", uid="1", made="1"))
        assert told.put(resource(namespace="a", uid="2", made="2", port=81)) == []
        assert told.fault(at=0) is None
        assert told.fault(at=1) == Fault("NameTaken", "metadata.name: the function f of namespace b is older; names are unique")
        told.table.take(Changed(resource(namespace="b", uid="1"), gone=True))
        assert told.words() == ["-f", "+f 81"]
        assert told.fault() is None


def pod(**fields) -> Pod:
    return Pod(function="f", namespace="ns", name="f-1", uid="p", **fields)


USABLE = pod(node="n1", running=True)


def conditions(status: dict) -> dict[str, tuple[str, str]]:
    return {item["type"]: (item["status"], item["reason"]) for item in status["conditions"]}


class TestStatus:
    def seen(self, **fields) -> Seen:
        harness = Harness()
        harness.node()
        running(harness, fields.pop("instances", 0))
        resource_of = read(fields.pop("value", resource(generation=3)), "agent")
        return Seen(**{"resource": resource_of, "fault": None, "snapshot": harness.planner.explain("f"), "pods": [], **fields})

    def test_what_the_planner_knows_is_told(self):
        status = status_of(self.seen(instances=2, pods=[USABLE, USABLE]), NOW)
        assert (status["rung"], status["instances"], status["wanted"], status["checkpoint"]) == ("running", 2, 2, "cp")
        assert status["observedGeneration"] == 3
        assert status["placeholders"] == 2
        assert conditions(status) == {
            "Ready": ("True", "Serving"),
            "Checkpointed": ("True", "Published"),
            "Degraded": ("False", "NothingFailed"),
        }

    @pytest.mark.parametrize(
        ("fields", "said"),
        [
            ({"pods": [USABLE]}, ("True", "Placeholder")),
            ({"pods": [replace(USABLE, leaving=True)]}, ("False", "NoPlaceholder")),
            ({}, ("False", "NoPlaceholder")),
            ({"pods": [pod(trouble=("Unschedulable", "0/2 nodes"))]}, ("False", "Unschedulable")),
            ({"pods_fault": Fault("PlaceholderRefused", "exceeded quota")}, ("False", "PlaceholderRefused")),
            ({"fault": Fault("InvalidDocument", "spec.port: no")}, ("False", "InvalidDocument")),
            ({"snapshot": None}, ("Unknown", "NotSeen")),
            ({"value": {**resource(), "spec": {"command": ["serve"], "port": 80}}}, ("True", "NeedsNoPod")),
        ],
    )
    def test_why_it_is_ready_or_not(self, fields, said):
        assert conditions(status_of(self.seen(**fields), NOW))["Ready"] == said

    def test_a_condition_keeps_the_time_of_its_change(self):
        first = status_of(self.seen(pods=[USABLE]), NOW)
        again = status_of(self.seen(value={**resource(), "status": first}), "2026-02-02T00:00:00Z")
        times = {item["type"]: item["lastTransitionTime"] for item in again["conditions"]}
        assert times == {"Ready": "2026-02-02T00:00:00Z", "Checkpointed": NOW, "Degraded": NOW}

    def test_one_whose_name_is_taken_has_no_figures_of_the_other(self):
        status = status_of(self.seen(fault=Fault("NameTaken", "metadata.name: …")), NOW)
        assert "instances" not in status
        assert conditions(status)["Ready"] == ("False", "NameTaken")


class TestAgents:
    @staticmethod
    def agent(node: str, address: str, *, uid: str = "", phase: str = "Running", made: str = "1", leaving=False, ports=None) -> dict:
        metadata = {"uid": uid or node, "creationTimestamp": made, **({"deletionTimestamp": NOW} if leaving else {})}
        containers = [{"name": "agent", "ports": [{"name": "agent", "containerPort": 7071}] if ports is None else ports}]
        return {"metadata": metadata, "spec": {"nodeName": node, "containers": containers}, "status": {"phase": phase, "podIP": address}}

    def test_they_come_and_go(self):
        told: list[dict] = []
        table = AgentTable(7070, lambda found: told.append(dict(found)))
        table.take(Listed([]))
        table.take(Changed(self.agent("n1", "", phase="Pending")))
        assert told == [{}]
        table.take(Changed(self.agent("n1", "10.0.0.1")))
        table.take(Changed(self.agent("n2", "10.0.0.2", ports=[])))
        assert told[-1] == {"n1": ("10.0.0.1", 7071), "n2": ("10.0.0.2", 7070)}
        # The next pod of a node takes over; the one before it may still be there.
        table.take(Changed(self.agent("n1", "10.0.0.1", leaving=True)))
        assert told[-1]["n1"] == ("10.0.0.1", 7071)
        table.take(Changed(self.agent("n1", "10.0.0.9", uid="x", made="2")))
        assert told[-1]["n1"] == ("10.0.0.9", 7071)
        count = len(told)
        table.take(Changed(self.agent("n1", "10.0.0.1", leaving=True), gone=True))
        assert len(told) == count
        table.take(Listed([self.agent("n2", "10.0.0.2", ports=[])]))
        assert told[-1] == {"n2": ("10.0.0.2", 7070)}


def test_a_resource_says_where_it_is():
    found = Resource(resource("f", "ns", "u"))
    assert (found.name, found.namespace, found.uid) == ("f", "ns", "u")
