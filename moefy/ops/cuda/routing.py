"""The CUDA side of ``sort_by_expert`` and ``top_k_softmax``.

Contract: each maker takes the kernel in plain torch and returns one that runs by Triton, where Triton's kernels have
the sizes and the dtype, to the same results.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from moefy.ops.cuda.choose import recorded

Kernel = Callable[..., Any]


def sort_cuda(otherwise: Kernel, slot_ids: Callable[[Tensor], Tensor]) -> Kernel:
    """``sort_by_expert``. ``slot_ids`` makes the ids [N]; more experts than a kernel takes go to ``otherwise``."""

    def run(top_k_index_TK: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
        from moefy.triton_ops import sort as kernels

        if num_experts > kernels.MAX_EXPERTS:
            return otherwise(top_k_index_TK, num_experts)
        ids_N = slot_ids(top_k_index_TK).contiguous()
        order_N, offsets_E = recorded(_sort)((ids_N,), (num_experts,))
        return order_N, offsets_E

    return run


def _sort(tensors: Sequence[Any], options: tuple[Any, ...]) -> tuple[Tensor, ...]:
    from moefy.triton_ops import sort as kernels

    return kernels.sort_by_expert(*tensors, *options)[:2]


def top_k_cuda(otherwise: Kernel) -> Kernel:
    """``top_k_softmax`` of scores [T, E]."""

    def run(logits_TE: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
        from moefy.triton_ops import top_k as kernels

        if not kernels.supported(logits_TE.dtype, logits_TE.shape[1], top_k):
            return otherwise(logits_TE, top_k)
        return kernels.top_k_softmax(logits_TE, top_k)

    return run


def top_k_backward_cuda(otherwise: Kernel) -> Kernel:
    """``top_k_softmax_backward``."""

    def run(grad_TK: Tensor, weights_TK: Tensor, index_TK: Tensor, num_experts: int) -> Tensor:
        from moefy.triton_ops import top_k as kernels

        if not kernels.supported(weights_TK.dtype, num_experts, weights_TK.shape[1]):
            return otherwise(grad_TK, weights_TK, index_TK, num_experts)
        return kernels.top_k_softmax_backward(grad_TK, weights_TK, index_TK, num_experts)

    return run
