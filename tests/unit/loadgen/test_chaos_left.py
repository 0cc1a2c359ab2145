"""What an idle installation holds more than before; what others make meanwhile is not its own."""

from __future__ import annotations

from infra.leaks import Census
from loadgen.chaos.run import grown

MARKS = ("/state", "thaw-chaos", "thawch")


def test_others_on_the_machine_are_not_counted() -> None:
    after = Census(links={"thawbare": "bridge"}, cgroups={"/sys/fs/cgroup/memory/thaw-cluster": ""}, mounts={"1 /elsewhere": "tmpfs"})
    assert grown(Census(), after, MARKS) == []


def test_more_of_a_kind_is_a_leak_and_others_in_their_place_are_none() -> None:
    before = Census(links={"thawchv1": "veth"}, processes={"1@1": "python"}, descriptors={1: 10, 2: 10})
    assert grown(before, Census(links={"thawchv9": "veth"}, processes={"2@2": "python"}, descriptors={1: 40, 2: 10}), MARKS) == []
    found = grown(before, Census(links={"thawchv1": "veth", "thawchv2": "veth"}, processes={"1@1": "a", "3@3": "sleep"}), MARKS)
    assert len(found) == 2 and "1 more processes" in found[0] and "sleep" in found[0] and "thawchv2" in found[1]
    assert "agent: 10 -> 100" in grown(before, Census(descriptors={1: 100}), MARKS)[0]
