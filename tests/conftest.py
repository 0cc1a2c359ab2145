"""Fixtures for every test: settings that touch nothing of the user's, and one embedded stack for the whole session."""

from __future__ import annotations

from collections.abc import Iterator

import hypothesis
import pytest

from infra import settings as settings_module
from infra.local import stack, terraform
from infra.local.terraform import Terraform
from infra.settings import Settings

# The same examples in every run, so that a failure belongs to the change that it comes with; `pytest --hypothesis-profile=default` looks
# for others.
hypothesis.settings.register_profile("repeatable", derandomize=True)
hypothesis.settings.load_profile("repeatable")

#: What a test with one of these marks meets — processes, disks and clocks of a machine that others use too — may fail it once.
_REAL = ("root", "stack", "cluster")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A test on real parts that fails is run once more. That it was is told at the end, with the failure: see docs/decisions.md."""
    for item in items:
        if any(item.get_closest_marker(name) for name in _REAL):
            item.add_marker(pytest.mark.flaky(reruns=1))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Failures of tests that passed, or failed again, when they were run once more."""
    failures = terminalreporter.stats.get("rerun", [])
    if failures:
        terminalreporter.section("RUN TWICE: the first run failed")
        for report in failures:
            terminalreporter.section(report.nodeid, "_")
            terminalreporter.line(report.longreprtext)


@pytest.fixture(scope="session")
def stack_settings(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Settings]:
    """Settings of a running embedded stack, shared by the session.

    Tests keep apart by topics, buckets and prefixes of their own. Installed tools come from the user's cache, data goes
    into a temporary state folder. Tests that stop or kill parts start a stack of their own.
    """
    settings = settings_module.load(environment={}, flags={"paths.state_dir": tmp_path_factory.mktemp("stack"), "agent.listen_port": 0})
    running = stack.up(settings, print)
    try:
        yield running
    finally:
        stack.down(settings, print, purge=True)


@pytest.fixture(scope="session")
def terraform_tools() -> Terraform:
    """Terraform with providers that need no registry. Of the user's settings it takes the cache and the place of a mirror."""
    return terraform.ensure(settings_module.load(), print)
