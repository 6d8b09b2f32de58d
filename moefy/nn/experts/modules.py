"""``ExpertList``: a module of one's own for every expert, all of one kind or each of another.

Contract: expert e is called with its rows, ``[n_e, ...]`` (a tree when the tokens are one), and returns a tensor or
tree of n_e rows, of the same structure and row shape as the other experts. It works row by row. An expert without rows
is called with none, so that its parameters get a zero gradient on every rank and DDP waits for nobody.

    >>> experts = ExpertList([nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 9), nn.ReLU(), nn.Linear(9, 4))])
    >>> experts(torch.randn(5, 4), torch.tensor([3, 5], dtype=torch.int32)).shape     # rows 0 to 2, rows 3 and 4
    torch.Size([5, 4])

The sizes n_e are read from the device, one wait per layer on CUDA, and under ``torch.compile`` the experts run eagerly
behind a graph break. With ``seats``, a capacity, every expert gets exactly that many rows: no wait, static shapes, one
graph.

Shape letters: R rows, E experts, C seats of one expert.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from moefy.config.fields import positive_int
from moefy.errors import ConfigError
from moefy.nn.experts.buffers import places
from moefy.nn.routing import token_tree
from moefy.nn.routing.token_tree import Tree

ExpertFactory = Callable[[], nn.Module]
Experts = ExpertFactory | nn.Module | Sequence[nn.Module | ExpertFactory]


class ExpertList(nn.ModuleList):
    """Experts that are modules. See the top of the file."""

    def forward(self, rows: Tree, offsets_E: Tensor, seats: int | None = None) -> Tree:
        """Every row through the expert that owns it.

        Args:
            rows: ``[R, ...]`` sorted by expert.
            offsets_E: ``[E]`` int32, the end row of each expert; later rows come back as zeros.
            seats: C, at least the rows of any expert, for static shapes.

        Returns:
            ``[R, ...]`` in the order of ``rows`` and in the structure that the experts return.
        """
        return self._in_slices(rows, offsets_E) if seats is None else self._in_seats(rows, offsets_E, seats)

    # Not compiled: sizes that differ at every call would compile it again each time.
    @torch.compiler.disable(recursive=True)
    def _in_slices(self, rows: Tree, offsets_E: Tensor) -> Tree:
        """Each expert on its own rows."""
        ends = offsets_E.tolist()
        starts = [0, *ends[:-1]]
        outputs = [
            expert(token_tree.map_leaves(lambda row, s=start, e=end: row[s:e], rows))
            for expert, start, end in zip(self, starts, ends, strict=True)
        ]
        total = token_tree.leaves(rows)[0].shape[0]
        return token_tree.concatenate(outputs, total - ends[-1])

    def _in_seats(self, rows: Tree, offsets_E: Tensor, seats: int) -> Tree:
        """Each expert on C rows: its own, then copies of other rows, whose outputs are discarded.

        Copies, not zeros: a row of zeros has no finite gradient in a norm, and NaN times 0 is NaN.
        """
        total = token_tree.leaves(rows)[0].shape[0]
        if total == 0:
            return token_tree.concatenate([expert(rows) for expert in self], 0)
        end_E = offsets_E.to(torch.int64)
        start_E = torch.cat([end_E.new_zeros(1), end_E[:-1]])
        seat_C = torch.arange(seats, device=end_E.device)
        source_EC = (start_E[:, None] + seat_C).clamp(max=total - 1)
        outputs = [
            expert(token_tree.map_leaves(lambda row, i=source_C: row.index_select(0, i), rows))
            for expert, source_C in zip(self, source_EC.unbind(0), strict=True)
        ]
        place_R = places(offsets_E, total, seats)
        seated = token_tree.concatenate(outputs, 0)
        return token_tree.map_leaves(lambda y: _from_seats(y, place_R), seated)


def make_experts(experts: Experts, num_experts: int | None) -> tuple[nn.Module, int]:
    """The module that runs all experts, and E.

    Args:
        experts: a factory, called E times; a list of modules or factories, one per expert; or one module for all,
            which is called with ``(rows, offsets_E)``.
        num_experts: E; ``None`` where a list says it.

    Raises:
        ConfigError: without E, for an E that is not the list's length, and for a factory that makes no module.
    """
    if isinstance(experts, nn.Module) and not isinstance(experts, nn.ModuleList):
        return experts, positive_int("num_experts", num_experts)
    if callable(experts) and not isinstance(experts, nn.ModuleList):
        count = positive_int("num_experts", num_experts)
        return ExpertList([_make(experts) for _ in range(count)]), count
    if not isinstance(experts, Sequence | nn.ModuleList):
        raise ConfigError("experts", got=experts, expected="a factory, a module, or a list of these")
    made = [_make(expert) for expert in experts]
    if num_experts not in (None, len(made)):
        raise ConfigError("num_experts", got=num_experts, expected=f"{len(made)}, the length of experts")
    if not made:
        raise ConfigError("experts", got=experts, expected="at least one expert")
    return ExpertList(made), len(made)


def _make(expert: nn.Module | ExpertFactory) -> nn.Module:
    """The expert itself, or the one that its factory makes."""
    made = expert() if callable(expert) and not isinstance(expert, nn.Module) else expert
    if not isinstance(made, nn.Module):
        raise ConfigError("experts", got=made, expected="modules or factories of modules")
    return made


def _from_seats(y: Tensor, place_R: Tensor) -> Tensor:
    """``[R, ...]`` of ``[E * C, ...]``; zeros for the rows that have no seat."""
    has_seat_R = (place_R < y.shape[0]).view(-1, *[1] * (y.dim() - 1))
    return y.index_select(0, place_R.clamp(max=y.shape[0] - 1)).masked_fill(~has_seat_R, 0.0)
