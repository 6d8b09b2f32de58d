"""What a Mixture-of-Experts layer must compute, written as a loop over tokens in float64. Imports nothing of moefy.

The contract: ``y_t = sum over the k chosen experts of p * (W_down[e] @ body(W_i[e] @ x_t + b_i[e], ...) + b_down[e])``
where the experts are those of the k largest router logits (ties go to the lowest id) and p is the softmax over the
chosen logits alone. Gradients come from autograd through that very loop.

    >>> spec = LoopLayer(entries=[(up_EHD, None)], exit=(down_EDH, None), body=torch.relu, router_ED=r, top_k=2)
    >>> y_TD = spec(x_TD)

Shape letters: T tokens, D model width, H hidden width, E experts, K top-k.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Stacked = tuple[Tensor, "Tensor | None"]  # weight [E, out, in] and bias [E, out]


def choose(logits_E: Tensor, top_k: int) -> list[int]:
    """The ids of the ``top_k`` largest logits, best first; equal logits in the order of their ids."""
    values = logits_E.tolist()
    return sorted(range(len(values)), key=lambda e: (-values[e], e))[:top_k]


@dataclasses.dataclass(kw_only=True)
class LoopLayer:
    """One MoE layer, token by token.

    Args:
        entries: for each entry linear its stacked weight [E, H_i, D] and bias [E, H_i].
        exit: stacked weight [E, D, H] and bias [E, D] of the exit linear.
        body: maps the entry outputs of one token, each [1, H_i], to the exit's input [1, H].
        router_ED: the router matrix.
        top_k: experts per token.
    """

    entries: Sequence[Stacked]
    exit: Stacked
    body: Callable[..., Tensor]
    router_ED: Tensor
    top_k: int
    chosen: list[list[int]] = dataclasses.field(default_factory=list)

    def expert(self, e: int, x_D: Tensor) -> Tensor:
        """The dense FFN with the weights of expert ``e``, on one token."""
        hidden = [affine(w[e], None if b is None else b[e], x_D)[None] for w, b in self.entries]
        weight, bias = self.exit
        return affine(weight[e], None if bias is None else bias[e], self.body(*hidden)[0])

    def token(self, x_D: Tensor) -> Tensor:
        """Route one token, run its experts, mix them."""
        logits_E = affine(self.router_ED, None, x_D)
        chosen = choose(logits_E, self.top_k)
        self.chosen.append(chosen)
        weights_K = torch.softmax(torch.stack([logits_E[e] for e in chosen]), dim=0)
        return sum(weights_K[k] * self.expert(e, x_D) for k, e in enumerate(chosen))  # type: ignore[return-value]

    def __call__(self, x: Tensor, feature_dim: int = -1) -> Tensor:
        """``x`` of any rank with its features on ``feature_dim``; the output has x's shape."""
        rows = x.movedim(feature_dim, -1)
        flat_TD = rows.reshape(-1, rows.shape[-1])
        self.chosen = []
        if not len(flat_TD):
            return x.clone()
        y_TD = torch.stack([self.token(x_D) for x_D in flat_TD.unbind(0)])
        return y_TD.reshape(rows.shape).movedim(-1, feature_dim)


def affine(weight_OI: Tensor, bias_O: Tensor | None, x_I: Tensor) -> Tensor:
    """``W x + b`` for one token, as a product and a sum so that no library GEMM is shared with the product."""
    y_O = (weight_OI * x_I).sum(dim=1)
    return y_O if bias_O is None else y_O + bias_O


def gradients(output: Tensor, wanted: Sequence[Tensor], cotangent: Tensor) -> list[Tensor]:
    """d<output, cotangent>/d(each wanted); a tensor that the output does not depend on gets zeros."""
    found = torch.autograd.grad(output, list(wanted), cotangent, allow_unused=True, retain_graph=True)
    return [torch.zeros_like(w) if g is None else g for w, g in zip(wanted, found, strict=True)]


def relative_error(got: Tensor, expected: Tensor) -> float:
    """``|got - expected| / |expected|`` in the 2-norm, in float64; infinite when a NaN appears on one side only."""
    if got.shape != expected.shape:
        return float("inf")
    a, b = got.detach().to(torch.float64), expected.detach().to(torch.float64)
    same = (a == b) | (a.isnan() & b.isnan())  # infinities of masks must agree exactly
    a, b = a.masked_fill(same & ~b.isfinite(), 0.0), b.masked_fill(same & ~b.isfinite(), 0.0)
    if not bool(a.isfinite().all() and b.isfinite().all()):
        return float("inf")
    scale = float(b.norm())
    return float((a - b).norm()) / scale if scale > 0 else float((a - b).norm())
