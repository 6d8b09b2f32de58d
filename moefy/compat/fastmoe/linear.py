"""``FMoELinear``: the linears of one worker's experts, on rows sorted by expert and the number of rows of each.

>>> FMoELinear(2, 4, 8)(torch.randn(5, 4), torch.tensor([3, 2])).shape
torch.Size([5, 8])
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from moefy import ops


class FMoELinear(nn.Module):
    """Linears of ``num_expert`` experts.

    Args:
        num_expert: E.
        in_feat: input width.
        out_feat: output width.
        bias: whether they have biases, which start at zero.
        rank: kept, without effect.

    Parameters:
        ``weight [E, out, in]``, ``bias [E, out]``.
    """

    def __init__(
        self, num_expert: int, in_feat: int, out_feat: int, bias: bool = True, rank: int = 0
    ) -> None:
        super().__init__()
        self.num_expert, self.in_feat, self.out_feat, self.rank = num_expert, in_feat, out_feat, rank
        self.weight = nn.Parameter(torch.empty(num_expert, out_feat, in_feat))
        self.bias = nn.Parameter(torch.zeros(num_expert, out_feat)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Kaiming's uniform over the whole stack: torch takes ``in * out`` for the fan-in of a rank 3 tensor."""
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))

    def forward(self, inp: Tensor, fwd_expert_count: Tensor | Sequence[int]) -> Tensor:
        """``[N, in] -> [N, out]``; rows behind the last expert's are zero."""
        counts_E = torch.as_tensor(fwd_expert_count, device=inp.device)
        offsets_E = counts_E.cumsum(0).to(torch.int32)
        return ops.grouped_linear(inp.type_as(self.weight), self.weight, self.bias, offsets_E)

    def extra_repr(self) -> str:
        """Number of experts, widths, bias and rank."""
        return (
            f"num_expert={self.num_expert}, in_features={self.in_feat}, out_features={self.out_feat}, "
            f"bias={self.bias is not None}, rank={self.rank}"
        )
