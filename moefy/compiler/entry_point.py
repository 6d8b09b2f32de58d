"""The backend's name where moefy is not installed: in a checkout that lies on the path.

torch finds the backends of other packages by the entry points in their metadata, which pip writes at installation.
Contract: after ``offer`` a plain checkout has that one entry point too, so ``torch.compile(model, backend="moefy")``
works. ``offer`` imports nothing of torch. Where moefy is installed, the metadata names the backend and ``offer`` adds
nothing.

    >>> [entry.value for entry in importlib.metadata.entry_points(group=GROUP, name=NAME)]
    ['moefy.compiler.backend:backend']
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from importlib.metadata import Distribution, DistributionFinder, EntryPoint
from pathlib import Path
from typing import Any

GROUP, NAME, VALUE = "torch_dynamo_backends", "moefy", "moefy.compiler.backend:backend"
_REGISTRY = "torch._dynamo.backends.registry"
_ANY, _MOEFY = DistributionFinder.Context(), DistributionFinder.Context(name=NAME)
_ROOT = Path(__file__).resolve().parents[2]


class _Checkout(Distribution):
    """The metadata that an installation of this checkout would have, as far as torch asks for it."""

    def read_text(self, filename: Any) -> str | None:
        """The file's contents, or None for a file that does not exist."""
        texts = {
            "METADATA": f"Metadata-Version: 2.1\nName: {NAME}\nVersion: {sys.modules['moefy'].__version__}\n",
            "entry_points.txt": f"[{GROUP}]\n{NAME} = {VALUE}\n",
        }
        return texts.get(str(filename))

    def locate_file(self, path: Any) -> Path:
        """Where a file of the distribution lies."""
        return _ROOT / path


class _CheckoutFinder(DistributionFinder):
    """Finds the metadata of the checkout, and no module."""

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> None:
        """None: the checkout's modules are on ``sys.path``."""

    def find_distributions(self, context: DistributionFinder.Context = _ANY) -> Iterator[Distribution]:
        """The checkout, where moefy or anything is looked for on ``sys.path`` and moefy is not installed."""
        if context.name in (None, NAME) and context.path is sys.path and not self._installed():
            yield _Checkout()

    def _installed(self) -> bool:
        finders = [getattr(f, "find_distributions", None) for f in sys.meta_path if f is not self]
        return any(True for find in finders if find is not None for _ in find(_MOEFY))


def offer() -> None:
    """Make the backend known to ``importlib.metadata``, and to Dynamo if Dynamo has already looked there."""
    if not any(isinstance(finder, _CheckoutFinder) for finder in sys.meta_path):
        sys.meta_path.append(_CheckoutFinder())
    # Dynamo reads the entry points once. A torch that keeps them elsewhere is left alone.
    known = getattr(sys.modules.get(_REGISTRY), "_BACKENDS", None)
    if isinstance(known, dict):
        known.setdefault(NAME, EntryPoint(NAME, VALUE, GROUP))
