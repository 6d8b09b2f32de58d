"""The eager twin of every op: what it computes, in the plainest torch, with torch's own autograd.

T tokens, D model width, H expert hidden width, E experts, K top-k, N = T*K rows.

Contract: same arguments and results as the op of that name. No op of moefy is called here, so the two check each other;
slow, since every expert looks at every row.

    >>> sort_by_expert(torch.tensor([[1, 0]]), 2)
    (tensor([1, 0]), tensor([1, 2], dtype=torch.int32))
"""

from __future__ import annotations

import torch
from torch import Tensor

from moefy.triton_ops.shared.activations import ACTIVATIONS


def top_k_softmax(logits_TE: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """The K largest scores' softmax and ids; of equal scores the lowest id first, NaN as the largest."""
    index_TK = logits_TE.argsort(stable=True, dim=1, descending=True)[:, :top_k]
    return logits_TE.gather(1, index_TK).softmax(1), index_TK


def sort_by_expert(top_k_index_TK: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """Slots in expert order, dropped ones last, and the end row of each expert."""
    ids_N = top_k_index_TK.flatten()
    ids_N = torch.where((ids_N >= 0) & (ids_N < num_experts), ids_N, num_experts)
    experts_E = torch.arange(num_experts, device=ids_N.device)
    ends_E = (ids_N[None, :] <= experts_E[:, None]).sum(1)
    return ids_N.argsort(stable=True), ends_E.to(torch.int32)


def permute(x_TD: Tensor, order_N: Tensor, top_k: int) -> Tensor:
    """``x[order // top_k]``."""
    return x_TD[order_N // top_k]


def grouped_linear(x_NI: Tensor, weight_EOI: Tensor, bias_EO: Tensor | None, offsets_E: Tensor) -> Tensor:
    """Every expert on every row, each row keeping only its own expert's result."""
    row_N = torch.arange(x_NI.shape[0], device=x_NI.device)
    out_NO = x_NI.new_zeros(x_NI.shape[0], weight_EOI.shape[1])
    first = torch.zeros((), dtype=offsets_E.dtype, device=offsets_E.device)
    for e, end in enumerate(offsets_E.unbind(0)):
        mine_N1 = ((row_N >= first) & (row_N < end)).unsqueeze(1)
        bias_O = None if bias_EO is None else bias_EO[e]
        # Rows of other experts go in as zeros, so that their NaN cannot reach this expert's gradient.
        rows_NI = torch.where(mine_N1, x_NI, 0)
        y_NO = torch.nn.functional.linear(rows_NI, weight_EOI[e], bias_O)
        out_NO = torch.where(mine_N1, y_NO, out_NO)
        first = end
    return out_NO


def combine(y_ND: Tensor, top_k_weights_TK: Tensor, order_N: Tensor) -> Tensor:
    """``sum_k w[t, k] * y[row of slot t*K + k]`` in fp32, or fp64 if y or w is."""
    wide = torch.float64 in (y_ND.dtype, top_k_weights_TK.dtype)
    dtype = torch.float64 if wide else torch.float32
    slots_TKD = y_ND[order_N.argsort()].unflatten(0, top_k_weights_TK.shape).to(dtype)
    return (slots_TKD * top_k_weights_TK.unsqueeze(2).to(dtype)).sum(1).to(y_ND.dtype)


def expert_ffn(
    x_TD: Tensor,
    top_k_weights_TK: Tensor,
    order_N: Tensor,
    offsets_E: Tensor,
    w_up: Tensor,
    b_up: Tensor | None,
    w_down: Tensor,
    b_down: Tensor | None,
    *,
    w_gate: Tensor | None = None,
    b_gate: Tensor | None = None,
    activation: str,
    glu: str = "none",
) -> Tensor:
    """Permute, entry, activation, exit, combine."""
    act = ACTIVATIONS[activation].forward
    rows_ND = permute(x_TD, order_N, top_k_weights_TK.shape[1])
    hidden_NH = grouped_linear(rows_ND, w_up, b_up, offsets_E)
    if glu == "none":
        hidden_NH = act(hidden_NH)
    elif w_gate is not None:
        hidden_NH = act(grouped_linear(rows_ND, w_gate, b_gate, offsets_E)) * hidden_NH
    else:
        first_NH, last_NH = hidden_NH.chunk(2, dim=1)
        merged_first = glu == "merged_gate_first"
        hidden_NH = act(first_NH) * last_NH if merged_first else act(last_NH) * first_NH
    y_ND = grouped_linear(hidden_NH, w_down, b_down, offsets_E)
    return combine(y_ND, top_k_weights_TK, order_N)
