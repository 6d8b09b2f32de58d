"""moefy's ops: argument checks here in Python, then one registered op under ``torch.ops.moefy``.

The ops are few and coarse. Rows sorted by expert plus the end row of each expert (``offsets``) are the contract between
them; ``reference`` holds the plain torch twin of each.

    >>> top_k_weights_TK, top_k_index_TK = top_k_softmax(router_logits_TE, top_k)
    >>> order_N, offsets_E = sort_by_expert(top_k_index_TK, num_experts)
    >>> rows_NH = grouped_linear(permute(x_TD, order_N, top_k), weight_EHD, bias_EH, offsets_E)
    >>> out_TH = combine(rows_NH, top_k_weights_TK, order_N)
"""

from moefy.ops.combine import combine
from moefy.ops.expert_ffn import expert_ffn
from moefy.ops.first_run import first_run
from moefy.ops.grouped_linear import grouped_linear
from moefy.ops.loss_scale import loss_scale, set_loss_scale
from moefy.ops.permute import permute
from moefy.ops.sort import sort_by_expert
from moefy.ops.top_k import top_k_softmax
from moefy.records import GLU, GLU_FORMS
from moefy.triton_ops.shared.activations import ACTIVATIONS, Activation

__all__ = [
    "ACTIVATIONS",
    "GLU",
    "GLU_FORMS",
    "Activation",
    "combine",
    "expert_ffn",
    "first_run",
    "grouped_linear",
    "loss_scale",
    "permute",
    "set_loss_scale",
    "sort_by_expert",
    "top_k_softmax",
]
