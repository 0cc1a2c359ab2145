"""Placeholder pods as data: what a pod says, what it requests, and what is to be done."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from infra.errors import PodTemplateInvalid
from scaler.edges.kubernetes import pods
from scaler.edges.kubernetes.pods import Pod, Wanted, plan, quantity, usable_by_node

WANTED = Wanted(owner="u", digest="d", manifest="m", count=2)


def pod(name: str, **fields) -> Pod:
    given_fields = {"owner": "u", "digest": "d", "manifest": "m", "node": "n1", "running": True, "created": name, **fields}
    return Pod(function="f", namespace="ns", name=name, uid=f"uid-{name}", **given_fields)


def deleted(made: pods.Plan) -> list[str]:
    return [item.name for item, _ in made.delete]


class TestPlan:
    def test_what_is_missing_is_made(self):
        assert plan([], WANTED).create == 2
        assert plan([pod("a")], WANTED).create == 1
        assert plan([pod("a"), pod("b")], WANTED) == pods.Plan(delete=[], resize=[])

    def test_pods_that_leave_or_have_ended_do_not_count(self):
        made = plan([pod("a", leaving=True), pod("b", finished=True), pod("c", used_up=True)], WANTED)
        assert made.create == 2
        assert deleted(made) == ["b", "c"]

    def test_of_too_many_the_youngest_empty_ones_go_and_those_that_do_not_run_first(self):
        held = [pod("a"), pod("b"), pod("c", occupied=True), pod("d", running=False), pod("e")]
        assert deleted(plan(held, WANTED)) == ["d", "e", "b"]
        assert deleted(plan(held, WANTED, held=["b"])) == ["d", "e", "a"]

    @pytest.mark.parametrize("waits", [{"settled": False}, {"patient": True}])
    def test_none_goes_while_one_may_be_needed(self, waits):
        made = plan([pod("a"), pod("b"), pod("c")], replace(WANTED, **waits))
        assert deleted(made) == []
        assert made.surplus == 1

    def test_what_is_of_another_document_goes_when_it_is_empty(self):
        held = [pod("a", digest="old"), pod("b", digest="old", occupied=True), pod("c", owner="another"), pod("d")]
        made = plan(held, WANTED, held=[])
        assert deleted(made) == ["a", "c"]
        assert made.create == 1

    def test_what_is_of_an_older_template_serves_until_its_successor_does(self):
        old = [pod("a", manifest="old"), pod("b", manifest="old")]
        assert plan(old, WANTED).create == 2
        assert deleted(plan(old, WANTED)) == []
        assert deleted(plan([*old, pod("c"), pod("d", running=False)], WANTED)) == []
        assert deleted(plan([*old, pod("c"), pod("d")], WANTED)) == ["a", "b"]

    def test_a_function_that_is_gone_has_no_pods(self):
        assert deleted(plan([pod("a"), pod("b", occupied=True), pod("c", leaving=True)], None)) == ["a", "b"]

    def test_requests_follow_what_is_in_it(self):
        full = {"cpu": "500m", "memory": "512Mi"}
        waiting = pod("a", requests={"cpu": "10m", "memory": "16Mi"}, full=full)
        assert plan([waiting], WANTED).resize == []
        serving = replace(waiting, restored=True, occupied=True)
        assert plan([serving], WANTED).resize == [(serving, full)]
        grown = replace(serving, requests={"cpu": "0.5", "memory": "536870912"})
        assert plan([grown], WANTED).resize == []
        empty = replace(grown, restored=False, occupied=False)
        assert plan([empty], WANTED).resize == [(empty, {"cpu": "10m", "memory": "16Mi"})]

    @given(
        st.lists(
            st.builds(
                lambda number, flags, digest, manifest: pod(f"p{number}", digest=digest, manifest=manifest, **flags),
                st.integers(0, 999),
                st.fixed_dictionaries(
                    {name: st.booleans() for name in ("leaving", "running", "finished", "restored", "occupied", "used_up")}
                ),
                st.sampled_from(["d", "old"]),
                st.sampled_from(["m", "old"]),
            ),
            unique_by=lambda item: item.uid,
            max_size=12,
        ),
        st.integers(0, 8),
        st.booleans(),
    )
    def test_it_comes_to_rest_at_what_is_wanted(self, held, count, patient):
        wanted = replace(WANTED, count=count, patient=patient)
        made = plan(held, wanted)
        # What an instance is in is never touched, unless it has ended.
        assert not [item for item, _ in made.delete if item.occupied and not item.finished]
        assert not [item for item, _ in made.delete if item.leaving]
        assert len({item.uid for item, _ in made.delete}) == len(made.delete)
        gone = {item.uid for item, _ in made.delete}
        after = [item for item in held if item.uid not in gone and not item.leaving]
        after += [pod(f"new{number}") for number in range(made.create)]
        again = plan(after, wanted)
        assert again.create == 0
        # What is left serves the document, is in use, or waits for its successor.
        if not patient and all(item.running for item in after):
            final = [item for item in after if item.uid not in {entry.uid for entry, _ in again.delete}]
            assert len([item for item in final if not (item.occupied or item.used_up)]) <= count


def resource(**container) -> dict:
    own = {"name": "function", "image": "i", **container}
    return {
        "apiVersion": "thaw.dev/v1",
        "kind": "Function",
        "metadata": {"name": "f", "namespace": "ns", "uid": "u"},
        "spec": {"command": ["serve"], "port": 80, "limits": {"memoryMb": 512}, "template": {"spec": {"containers": [own]}}},
    }


def manifest(value: dict, *, resizable: bool = True) -> dict:
    return pods.manifest(value, digest="d", agent_image="agent", resizable=resizable)


def requests(value: dict) -> dict:
    (own,) = [item for item in value["spec"]["containers"] if item["name"] == "function"]
    return own["resources"]["requests"]


class TestManifest:
    def test_an_empty_pod_requests_little_and_remembers_how_much_it_is_to_be(self):
        made = manifest(resource(resources={"requests": {"cpu": "1", "memory": "256Mi"}, "limits": {"memory": "512Mi"}}))
        assert requests(made) == {"cpu": "10m", "memory": "16Mi"}
        assert made["metadata"]["annotations"]["thaw.dev/requests"] == '{"cpu": "1", "memory": "256Mi"}'

    def test_what_is_not_requested_is_requested_up_to_its_limit(self):
        made = manifest(resource())
        assert requests(made) == {"memory": "16Mi"}
        assert made["metadata"]["annotations"]["thaw.dev/requests"] == '{"memory": "512Mi"}'
        small = manifest(resource(resources={"limits": {"memory": "8Mi", "ephemeral-storage": "1Gi"}}))
        assert requests(small) == {"memory": "8Mi", "ephemeral-storage": "1Gi"}

    def test_a_server_that_cannot_resize_gets_the_whole_request(self):
        assert requests(manifest(resource(), resizable=False)) == {"memory": "512Mi"}

    def test_another_template_is_another_manifest(self):
        named = {
            manifest(value)["metadata"]["annotations"]["thaw.dev/manifest"]
            for value in (resource(), resource(), resource(image="j"), resource(resources={"limits": {"memory": "1Gi"}}))
        }
        assert len(named) == 3

    def test_what_cannot_be_a_placeholder_names_its_field(self):
        with pytest.raises(PodTemplateInvalid, match=r"containers\[0\]\.command"):
            manifest(resource(command=["sh"]))


def observed(**status) -> dict:
    made = manifest(resource(resources={"requests": {"memory": "256Mi"}}))
    made["metadata"] |= {"name": "f-1", "uid": "p", "creationTimestamp": "2026-01-01T00:00:00Z"}
    made["spec"]["nodeName"] = "n1"
    return {**made, "status": status}


RUNNING = {"name": "function", "restartCount": 0, "state": {"running": {"startedAt": "t"}}}


class TestRead:
    def test_what_was_made_is_found_again(self):
        read = pods.read(observed(phase="Running", containerStatuses=[RUNNING]))
        assert (read.function, read.owner, read.digest, read.node) == ("f", "u", "d", "n1")
        assert read.usable
        assert read.full == {"memory": "256Mi"}
        assert usable_by_node([read, pod("x", leaving=True)], "u", "d") == {"n1": 1}
        assert usable_by_node([read], "another", "d") == usable_by_node([read], "u", "other") == {}

    @pytest.mark.parametrize(
        ("status", "reason"),
        [({"status": "True"}, True), ({"status": "False", "reason": "Standby"}, True), ({"status": "False"}, False)],
    )
    def test_the_agents_condition_says_what_is_in_it(self, status, reason):
        gate = {"type": "thaw.dev/restored", **status}
        assert pods.read(observed(phase="Running", conditions=[gate])).occupied == reason

    @pytest.mark.parametrize(
        "container",
        [{**RUNNING, "restartCount": 1}, {**RUNNING, "state": {"terminated": {"exitCode": 3}}}],
    )
    def test_a_pod_is_used_once(self, container):
        read = pods.read(observed(phase="Running", containerStatuses=[container]))
        assert read.used_up
        assert not read.usable

    @pytest.mark.parametrize(
        ("status", "said"),
        [
            (
                {"conditions": [{"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": "0/2 nodes"}]},
                ("Unschedulable", "0/2 nodes"),
            ),
            (
                {"containerStatuses": [{"name": "function", "state": {"waiting": {"reason": "ErrImageNeverPull", "message": "m"}}}]},
                ("ErrImageNeverPull", "container function: m"),
            ),
            ({"containerStatuses": [{"name": "function", "state": {"waiting": {"reason": "PodInitializing"}}}]}, ("", "")),
            ({"phase": "Failed", "reason": "Evicted", "message": "disk"}, ("Evicted", "disk")),
        ],
    )
    def test_why_it_does_not_run(self, status, said):
        assert pods.read(observed(**{"phase": "Pending", **status})).trouble == said


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("1", 1),
        ("500m", 0.5),
        ("16Mi", 16 << 20),
        ("1k", 1000),
        ("1.5Gi", 3 << 29),
        ("100u", 0.0001),
        ("x", -1),
        ("", -1),
        ("Mi", -1),
        *((word, -1) for word in ("NaN", "sNaN", "InfinityMi", "1e999999999Mi")),
    ],
)
def test_quantities(text, number):
    assert float(quantity(text)) == number
