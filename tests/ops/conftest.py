"""Fixtures of the op tests."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture
def nan_in_fresh_memory():
    """``torch.empty`` gives NaN, so that an element that no kernel wrote shows up."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(before)
