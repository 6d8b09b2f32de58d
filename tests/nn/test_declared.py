"""Facts of routers that options know: a router's K is written once, beside the router."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

import pytest

import moefy
from moefy.config import MoEConfig, default_top_k
from moefy.config.declared import DEFAULT_TOP_K
from moefy.nn.routers import ROUTERS, Router, register_router

ROOT = Path(__file__).resolve().parents[2]


def test_every_router_says_its_k() -> None:
    assert set(DEFAULT_TOP_K) >= set(ROUTERS)
    assert {name for name in ROUTERS if default_top_k(name, 8) == 1} == {"switch", "hash"}
    assert {default_top_k(name, 8) for name in ROUTERS} == {1, 2}
    assert default_top_k("nobody", 8) == 2 and default_top_k("nobody", 1) == 1


@pytest.fixture
def registries() -> Iterator[None]:
    """The tables, put back afterwards."""
    before = dict(ROUTERS), dict(DEFAULT_TOP_K)
    yield
    for table, entries in zip((ROUTERS, DEFAULT_TOP_K), before, strict=True):
        table.clear()
        table.update(entries)  # type: ignore[arg-type]


def test_a_new_router_brings_its_k(registries: None) -> None:
    class OnlyOne(Router):
        """Top-1."""

        only_top_k: ClassVar[int | None] = 1

    class Three(Router):
        """Three by default, any K on request."""

    register_router("only_one")(OnlyOne)
    register_router("three", default_top_k=3)(Three)
    assert MoEConfig(num_experts=8, router="only_one").top_k == 1
    config = MoEConfig(num_experts=8, router="three")
    assert config.top_k == 3 and MoEConfig.from_json(config.to_json()) == config
    assert moefy.MoE(8, 16, 4, router="three").top_k == 3
    assert moefy.MoE(8, 16, 4, router="three", top_k=2).top_k == 2


@pytest.mark.parametrize("router", ["switch", "hash"])
def test_a_fresh_process_knows_it(router: str) -> None:
    program = f"from moefy.config import MoEConfig; print(MoEConfig(num_experts=8, router={router!r}).top_k)"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "1", done.stderr


def test_options_are_plain_data_until_a_name_is_looked_up() -> None:
    program = (
        "import sys, moefy; moefy.AuxLoss, moefy.Capacity(), moefy.MoEConfig; print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "False", done.stderr
