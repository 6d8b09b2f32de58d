"""``sort_by_expert``: from each token's chosen experts to the order in which rows are sorted by expert.

T tokens, K top-k, E experts, N = T*K slots. A slot is one (token, choice) pair, numbered ``t * K + k``.

Contract: ``order[r]`` is the slot that becomes sorted row r; rows of one expert keep slot order (the sort is stable);
``offsets[e]`` is the row behind expert e's last one, as ``torch.nn.functional.grouped_mm`` counts. Ids outside
``[0, E)`` mean "dropped": their rows come last, behind ``offsets[-1]``, and are never used as addresses.

    >>> sort_by_expert(torch.tensor([[1, 0], [1, 2]]), num_experts=3)
    (tensor([1, 0, 2, 3]), tensor([1, 3, 4], dtype=torch.int32))
"""

from __future__ import annotations

import torch
from torch import Tensor

from moefy.errors import ShapeError
from moefy.ops import checks
from moefy.ops.cuda.routing import sort_cuda
from moefy.ops.library import register

MAX_ROWS = 2**31 - 1


def _slot_ids(top_k_index_TK: Tensor) -> Tensor:
    """The ids as [N]; N is a number that int32 offsets can hold."""
    if top_k_index_TK.numel() > MAX_ROWS:
        raise ShapeError(
            f"moefy.sort_by_expert: too many slots for int32 offsets; got T * K = {top_k_index_TK.numel()}; "
            f"expected at most {MAX_ROWS}"
        )
    return top_k_index_TK.reshape(-1)


def _kernel(top_k_index_TK: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    ids_N = _slot_ids(top_k_index_TK)
    dropped_N = (ids_N < 0) | (ids_N >= num_experts)
    sorted_N, order_N = torch.where(dropped_N, num_experts, ids_N).sort(stable=True)
    experts_E = torch.arange(num_experts, dtype=sorted_N.dtype, device=ids_N.device)
    # searchsorted, not bincount: it needs no host sync on CUDA.
    return order_N, torch.searchsorted(sorted_N, experts_E, right=True, out_int32=True)


def _fake(top_k_index_TK: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    order_N = top_k_index_TK.new_empty(top_k_index_TK.numel(), dtype=torch.int64)
    return order_N, top_k_index_TK.new_empty(num_experts, dtype=torch.int32)


_op = register(
    "sort_by_expert(Tensor top_k_index, SymInt num_experts) -> (Tensor, Tensor)",
    kernel=_kernel,
    cuda=sort_cuda(_kernel, _slot_ids),
    fake=_fake,
)


def sort_by_expert(top_k_index_TK: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """Sort slots by expert.

    Args:
        top_k_index_TK: [T, K] int64 or int32 expert ids; an id outside ``[0, num_experts)`` drops its slot.
        num_experts: E >= 1.

    Returns:
        ``order`` [T*K] int64 and ``offsets`` [E] int32, see the top of the file.

    Raises:
        ShapeError, DtypeError, ConfigError: for arguments that are not as above.
    """
    checks.shape("sort_by_expert", "top_k_index", top_k_index_TK, "[T, K]", 2)
    checks.index("sort_by_expert", "top_k_index", top_k_index_TK, torch.int64, torch.int32)
    checks.num_experts("sort_by_expert", num_experts)
    if top_k_index_TK.shape[1] < 1:
        raise ShapeError(
            f"moefy.sort_by_expert: top_k_index has no choices; got shape {list(top_k_index_TK.shape)}; "
            "expected [T, K] with K >= 1"
        )
    return _op(top_k_index_TK, num_experts)
