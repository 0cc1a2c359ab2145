"""Fixtures for every test: settings that touch nothing of the user's, and one embedded stack for the whole session."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from infra import settings as settings_module
from infra.local import stack, terraform
from infra.local.terraform import Terraform
from infra.settings import Settings


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
