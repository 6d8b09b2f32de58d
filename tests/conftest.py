"""Test setup: one thread a process, fixed seeds, Triton interpreted without a GPU, no hidden skips.

Contract for the tests:

- The lines before the first import decide how torch and triton start; nothing may import either one
  before them.
- ``@pytest.mark.zoo("timm", "torchvision")`` names the libraries that a test needs (all of them, if
  none is named). Where one is missing the test is skipped, unless ``MOEFY_REQUIRE_ZOO=1``: then a
  missing library, or any skip for one, is a failure.
- A bare ``pytest`` runs the light leg, a path runs all that lies there, ``--leg NAME`` (repeatable, or
  ``all``) a leg: ``legs.py`` says which test is in which.
- Nothing may import the folders ``passes`` and ``triton_ops`` under their bare names: a second copy
  of a module would register the ops twice.

    MOEFY_REQUIRE_ZOO=1 python -m pytest --leg zoo
"""

from __future__ import annotations

import os
from pathlib import Path


def _has_gpu() -> bool:
    """Whether this machine has a GPU, told without importing torch or triton."""
    return any(Path("/dev", name).exists() for name in ("nvidiactl", "kfd"))


os.environ.setdefault("OMP_NUM_THREADS", "1")
if not _has_gpu():
    os.environ.setdefault("TRITON_INTERPRET", "1")

import gc
import importlib.util
import random
import sys
from collections.abc import Iterator

import pytest
import torch
from hypothesis import settings
from legs import LEGS, is_long, leg_of

REQUIRE_ZOO = os.environ.get("MOEFY_REQUIRE_ZOO") == "1"
ZOO_LIBRARIES = ("torchvision", "timm", "transformers", "x_transformers", "megatron.core", "peft")
ROOT = Path(__file__).resolve().parent.parent
BARE_NAMES = ("passes", "triton_ops")

torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
# By default the collector walks all of torch and every collected test each few thousand objects, which takes a tenth
# of the time of the tests that compile.
gc.set_threshold(20_000, 20, 20)
# The cases that .ci/matrix draws for a property before a release; ops/test_property.py takes fewer otherwise.
settings.register_profile("long", settings.default)


def _missing(libraries: tuple[str, ...]) -> list[str]:
    """Those of ``libraries`` that this environment does not have."""
    missing = []
    for name in libraries:
        try:
            found = importlib.util.find_spec(name) is not None
        except ModuleNotFoundError:  # the parent of a dotted name is missing
            found = False
        if not found:
            missing.append(name)
    return missing


def pytest_addoption(parser: pytest.Parser) -> None:
    """``--leg``."""
    parser.addoption(
        "--leg", action="append", choices=[*LEGS, "all"], help="run these legs of CI (tests/legs.py)"
    )


def pytest_configure(config: pytest.Config) -> None:
    """Settle which legs run. Where the zoo is required, stop at once when one of its libraries is missing."""
    if (
        config.option.leg is None
    ):  # xdist hands the options over to its workers, but not where paths came from
        bare = config.args_source is pytest.Config.ArgsSource.TESTPATHS
        config.option.leg = ["light"] if bare else ["all"]
    if REQUIRE_ZOO and (missing := _missing(ZOO_LIBRARIES)):
        raise pytest.UsageError(f"MOEFY_REQUIRE_ZOO=1, but not installed: {', '.join(missing)}")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """The longest tests first, without those of the legs that do not run."""
    legs = config.option.leg
    items.sort(
        key=lambda item: not is_long(item.nodeid)
    )  # else one worker ends with it while the others wait
    if "all" in legs:
        return
    leg = {item: leg_of(item.nodeid, needs_libraries=_needs_libraries(item)) for item in items}
    config.hook.pytest_deselected(items=[item for item in items if leg[item] not in legs])
    items[:] = [item for item in items if leg[item] in legs]


def _needs_libraries(item: pytest.Item) -> bool:
    return item.get_closest_marker("zoo") is not None


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip a zoo test whose libraries are missing."""
    for mark in item.iter_markers("zoo"):
        if missing := _missing(mark.args or ZOO_LIBRARIES):
            pytest.skip(f"zoo: not installed: {', '.join(missing)}")


def _skip_is_failure(reason: str, is_zoo: bool) -> bool:
    """Whether a skip hides a missing library."""
    return REQUIRE_ZOO and (is_zoo or "could not import" in reason)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    """Turn a skip for a missing library into a failure where the zoo is required."""
    report = yield
    if report.skipped and not hasattr(report, "wasxfail"):
        reason = str(report.longrepr)
        if _skip_is_failure(reason, _needs_libraries(item)):
            report.outcome = "failed"
            report.longrepr = f"MOEFY_REQUIRE_ZOO=1, but skipped: {reason}"
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector: pytest.Collector) -> Iterator[None]:
    """The same for a whole file that skips itself with ``pytest.importorskip``."""
    report = yield
    if report.outcome == "skipped" and _skip_is_failure(str(report.longrepr), is_zoo=False):
        report.outcome = "failed"
        report.longrepr = f"MOEFY_REQUIRE_ZOO=1, but {collector.nodeid} was skipped: {report.longrepr}"
    return report


@pytest.fixture(autouse=True)
def _seeded() -> Iterator[None]:
    """Every test starts from the same seeds and leaves no global torch mode behind."""
    random.seed(0)
    torch.manual_seed(0)
    dtype, grad = torch.get_default_dtype(), torch.is_grad_enabled()
    yield
    assert torch.get_default_dtype() == dtype, "the test left another default dtype behind"
    assert torch.is_grad_enabled() == grad, "the test left another grad mode behind"


@pytest.fixture(autouse=True)
def _no_process_group() -> Iterator[None]:
    """A process group that a library starts in a test (accelerate does) ends with it."""
    yield
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def _is_the_products(name: str) -> bool:
    """Whether the top-level module ``name`` is loaded and is the product's folder."""
    where = list(getattr(sys.modules.get(name), "__path__", []))
    return any(Path(at).resolve() == ROOT / name for at in where)


@pytest.fixture(autouse=True)
def _one_copy() -> Iterator[None]:
    """No test may import a second copy of moefy's rooms."""
    yield
    copies = [name for name in BARE_NAMES if _is_the_products(name)]
    assert not copies, f"imported under a bare name: {copies}; use moefy.passes, moefy.triton_ops"


@pytest.fixture
def fresh_dynamo() -> Iterator[None]:
    """Compiled code from other tests is neither reused nor left behind."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()
