"""Top-k of the router's scores and the softmax over the chosen K, in one kernel; its gradient in another.

T tokens, E experts, K top-k.

Contract: ``index[t]`` holds the K best ids of row t, best first; ties go to the lowest id and NaN counts as the largest
score, so ids are valid whatever the scores. ``weights[t]`` is the softmax over these K scores, computed in fp32 and
rounded once to the scores' dtype. No atomics: the bits repeat. The caller keeps 1 <= K <= E.

    >>> top_k_softmax(torch.tensor([[0.0, 2.0, 2.0]], device="cuda"), top_k=2)
    (tensor([[0.5000, 0.5000]]), tensor([[1, 2]]))

K rounds of a maximum over a tile of rows held in registers. A score and its id are one int64 key, so that the maximum
breaks ties by itself: the score's bits, made to sort as integers, above ``BLOCK_E - 1 - id``.
"""

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor

from moefy.triton_ops.shared.blocks import cdiv, next_power_of_2
from moefy.triton_ops.shared.launch import jit, kernel, on_device

MAX_EXPERTS = 4096
MAX_TOP_K = 64
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Scores in one program's tile.
TILE = 1024

# Below the key of every score: no float has these upper bits.
_LOWEST = tl.constexpr(-(2**63))


def supported(dtype: torch.dtype, num_experts: int, top_k: int) -> bool:
    """Whether the kernels take scores of this dtype and size."""
    return dtype in DTYPES and num_experts <= MAX_EXPERTS and top_k <= MAX_TOP_K


def blocks(num_experts: int) -> dict[str, int]:
    """``BLOCK_T``, ``BLOCK_E`` and ``num_warps`` for E experts."""
    block_e = next_power_of_2(num_experts)
    block_t = min(128, max(1, TILE // block_e))
    return {"BLOCK_T": block_t, "BLOCK_E": block_e, "num_warps": 4 if block_t * block_e <= 1024 else 8}


def top_k_softmax(logits_TE: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """``(weights [T, K] in the scores' dtype, index [T, K] int64)`` of scores [T, E] with any strides."""
    tokens, experts = logits_TE.shape
    weights_TK = torch.empty((tokens, top_k), dtype=logits_TE.dtype, device=logits_TE.device)
    index_TK = torch.empty((tokens, top_k), dtype=torch.int64, device=logits_TE.device)
    if tokens:
        config = blocks(experts)
        with on_device(logits_TE):
            top_k_kernel[(cdiv(tokens, config["BLOCK_T"]),)](
                logits_TE,
                weights_TK,
                index_TK,
                tokens,
                *logits_TE.stride(),
                E=experts,
                K=top_k,
                BLOCK_K=next_power_of_2(top_k),
                **config,
            )
    return weights_TK, index_TK


def top_k_softmax_backward(grad_TK: Tensor, weights_TK: Tensor, index_TK: Tensor, num_experts: int) -> Tensor:
    """The scores' gradient [T, E] in the weights' dtype: ``w * (grad - sum(w * grad))`` at the chosen, else zero."""
    tokens, top_k = weights_TK.shape
    dlogits_TE = torch.empty((tokens, num_experts), dtype=weights_TK.dtype, device=weights_TK.device)
    if tokens:
        config = blocks(num_experts)
        with on_device(weights_TK):
            top_k_backward_kernel[(cdiv(tokens, config["BLOCK_T"]),)](
                grad_TK.contiguous(),
                weights_TK.contiguous(),
                index_TK.contiguous(),
                dlogits_TE,
                tokens,
                E=num_experts,
                K=top_k,
                **config,
            )
    return dlogits_TE


@jit
def _sortable(x):
    """fp32 as int32 of the same order: NaN above all else, -0.0 equal to 0.0."""
    bits = tl.where(x == 0.0, 0.0, x).to(tl.int32, bitcast=True)
    return tl.where(x != x, 0x7FFFFFFF, bits ^ ((bits >> 31) & 0x7FFFFFFF))


@jit
def _score(sortable):
    """The fp32 that ``_sortable`` was made from."""
    return (sortable ^ ((sortable >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@kernel(do_not_specialize=["T"])
def top_k_kernel(
    logits_ptr,
    weights_ptr,
    index_ptr,
    T,
    stride_t,
    stride_e,
    E: tl.constexpr,
    K: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One program: BLOCK_T rows of scores."""
    rows = (tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T))[:, None]
    ids = tl.arange(0, BLOCK_E)[None, :]
    at = logits_ptr + rows * stride_t + ids.to(tl.int64) * stride_e
    x = tl.load(at, mask=(rows < T) & (ids < E), other=0.0).to(tl.float32)
    key = (_sortable(x).to(tl.int64) << 32) | (BLOCK_E - 1 - ids).to(tl.int64)
    key = tl.where(ids < E, key, _LOWEST)

    choice = tl.arange(0, BLOCK_K)[None, :]
    chosen = tl.zeros([BLOCK_T, BLOCK_K], dtype=tl.int64)
    for k in range(K):
        best = tl.max(key, axis=1, keep_dims=True)
        chosen = tl.where(choice == k, best, chosen)
        key = tl.where(key == best, _LOWEST, key)

    score = _score((chosen >> 32).to(tl.int32))
    index = BLOCK_E - 1 - (chosen & (BLOCK_E - 1))
    # A NaN score is not the peak here, but every exp of its row is NaN or is divided by NaN.
    peak = tl.max(tl.where(choice < K, score, -float("inf")), axis=1, keep_dims=True)
    power = tl.where(choice < K, tl.exp(score - peak), 0.0)
    weights = power / tl.sum(power, axis=1, keep_dims=True)
    inside = (rows < T) & (choice < K)
    tl.store(weights_ptr + rows * K + choice, weights.to(weights_ptr.dtype.element_ty), mask=inside)
    tl.store(index_ptr + rows * K + choice, index, mask=inside)


@kernel(do_not_specialize=["T"])
def top_k_backward_kernel(
    grad_ptr,
    weights_ptr,
    index_ptr,
    dlogits_ptr,
    T,
    E: tl.constexpr,
    K: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """One program: BLOCK_T whole rows of the gradient, zeros included. An id is compared, never an address."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    live = rows < T
    total = tl.zeros([BLOCK_T], dtype=tl.float32)
    for k in range(K):
        w = tl.load(weights_ptr + rows * K + k, mask=live, other=0.0).to(tl.float32)
        total += w * tl.load(grad_ptr + rows * K + k, mask=live, other=0.0).to(tl.float32)

    ids = tl.arange(0, BLOCK_E)[None, :]
    dlogits = tl.zeros([BLOCK_T, BLOCK_E], dtype=tl.float32)
    for k in range(K):
        w = tl.load(weights_ptr + rows * K + k, mask=live, other=0.0).to(tl.float32)
        grad = tl.load(grad_ptr + rows * K + k, mask=live, other=0.0).to(tl.float32)
        index = tl.load(index_ptr + rows * K + k, mask=live, other=-1)
        dlogits = tl.where(ids == index[:, None], (w * (grad - total))[:, None], dlogits)
    at = dlogits_ptr + rows[:, None] * E + ids
    tl.store(at, dlogits.to(dlogits_ptr.dtype.element_ty), mask=live[:, None] & (ids < E))
