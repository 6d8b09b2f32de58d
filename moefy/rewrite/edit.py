"""``Edit``: new modules that were built beside the old ones, put in and taken out as one.

    build       touches nothing of the model
    install     swaps the new modules in
    remove      swaps the old modules back in; after half an ``install`` too
    seal        lets go of the dense weights; the old modules stay as shells, for ``undo``

``installed`` runs a block between ``install`` and ``seal``. Whatever fails in it leaves the model as it was.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Protocol

from torch import Tensor, nn


class Edit(Protocol):
    """One change of a model. ``weights`` maps the FQN of each dense weight to the experts' parameter."""

    @property
    def weights(self) -> Mapping[str, Tensor]:
        """The stacked parameters by the FQNs of the dense ones."""
        ...

    def install(self, model: nn.Module) -> None:
        """Swap the new modules in."""
        ...

    def remove(self, model: nn.Module) -> None:
        """Swap the old modules back in."""
        ...

    def seal(self) -> None:
        """Let go of the dense weights. From here on only ``undo`` leads back."""
        ...


@contextlib.contextmanager
def installed(model: nn.Module, edits: Sequence[Edit], *, keep: bool = True) -> Iterator[None]:
    """Within the block the edits are in. They stay when it ends well, unless ``keep`` is False."""
    done: list[Edit] = []
    try:
        for edit in edits:
            done.append(edit)
            edit.install(model)
        yield
    except BaseException:
        _remove(model, done)
        raise
    if not keep:
        _remove(model, done)


def _remove(model: nn.Module, edits: Sequence[Edit]) -> None:
    for edit in reversed(edits):
        edit.remove(model)
