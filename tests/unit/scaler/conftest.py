"""What the planner's tests begin with."""

from __future__ import annotations

import pytest
from scaler_harness import Harness


@pytest.fixture
def harness() -> Harness:
    """One node, no functions."""
    harness = Harness()
    harness.node()
    return harness
