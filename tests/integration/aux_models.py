"""Models for the auxiliary-loss tests, and the loss written by hand that every delivery must equal.

Contract: ``explicit`` is the gradient of ``main + sum over router calls of (W * balance + Z * z)``, from closed forms
on what the routers of a model without any auxiliary loss returned. ``pair`` makes it and its twin that has one.

    >>> plain, model = pair("aligned")
    >>> expected = explicit(plain, lambda m: scalar(m(x)))
    >>> scalar(model(x)).backward(); assert_same(gradients(model), expected, 1e-10)
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import moefy
from integration.models import MLP, VOCAB, D, InlineBlock, dense, gradients, randomize, routers, transformed
from moefy.config import AuxLoss
from moefy.nn.routing.routing import Routing

W, Z = 0.3, 0.05
AUX = AuxLoss(weight=W, z_weight=Z)


class LM(nn.Module):
    """nanoGPT's contract: ``(logits, loss)``; without targets ``(logits, None)``."""

    def __init__(self, form: str = "tuple", reduction: str = "mean") -> None:
        super().__init__()
        self.form, self.reduction = form, reduction
        self.embed = nn.Embedding(VOCAB, D)
        self.layers = nn.ModuleList(InlineBlock() for _ in range(2))
        self.head = nn.Linear(D, VOCAB)

    def forward(self, ids: Tensor, targets: Tensor | None = None) -> Any:
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        logits = self.head(x)
        if targets is None:
            return logits, None
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction=self.reduction)
        forms: dict[str, Any] = {"tuple": (logits, loss), "dict": {"loss": loss, "logits": logits}}
        return forms.get(self.form, loss)


class Shared(nn.Module):
    """ALBERT: one block, called three times."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.mlp = nn.LayerNorm(D), MLP()

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(3):
            x = x + self.mlp(self.norm(x))
        return x


def lm(**options: Any) -> nn.Module:
    """A dense ``LM`` in float64, always the same weights."""
    torch.manual_seed(1)
    return LM(**options).double()


def tokens(batch: int = 4, length: int = 6, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Ids and targets."""
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randint(0, VOCAB, (batch, length), generator=generator) for _ in range(2))  # type: ignore[return-value]


def twin(build: Callable[[], nn.Module], aux: AuxLoss = AUX, **example: Any) -> tuple[nn.Module, nn.Module]:
    """``build()`` with experts, without and with ``aux``."""
    pair_ = []
    for loss in (None, aux):
        model = moefy.transform(build(), 4, check=False, aux_loss=loss, **example)
        randomize(model)
        pair_.append(model.train())
    return pair_[0], pair_[1]


def pair(name: str, aux: AuxLoss = AUX, dtype: torch.dtype = torch.float64) -> tuple[nn.Module, nn.Module]:
    """A model of ``integration.models`` with experts, without and with ``aux``."""
    found = [transformed(dense(name, dtype), name, check=False, aux_loss=loss) for loss in (None, aux)]
    for model in found:
        randomize(model)
        model.train()
    return found[0], found[1]


def lm_pair(aux: AuxLoss = AUX, **options: Any) -> tuple[nn.Module, nn.Module]:
    """``LM`` with experts, without and with ``aux``."""
    return twin(lambda: lm(**options), aux, example_args=tokens())


def closed_form(routing: Routing, sequences: int = 1, counts_E: Tensor | None = None) -> Tensor:
    """``W * balance + Z * z`` of one router call: Switch's balance per sequence, its mean, and the z-loss.

    ``counts_E`` are the slots per expert of a wider scope.
    """
    logits_TE, index_TK = routing.choice.logits, routing.choice.index
    total, experts = logits_TE.shape
    length, balance = total // sequences, logits_TE.new_zeros(())
    for s in range(sequences):
        rows = slice(s * length, (s + 1) * length)
        p_E = (logits_TE[rows].exp() / logits_TE[rows].exp().sum(1, keepdim=True)).sum(0) / length
        n_E = [(index_TK[rows] == e).sum() for e in range(experts)] if counts_E is None else list(counts_E)
        f_E = [n.item() / sum(n_E).item() for n in n_E]
        balance = balance + experts * sum(f * p for f, p in zip(f_E, p_E, strict=True)) / sequences
    return W * balance + Z * logits_TE.exp().sum(1).log().square().mean()


def explicit(
    model: nn.Module, main: Callable[[nn.Module], Tensor], sequences: int = 1, share: float = 1.0
) -> dict[str, Tensor]:
    """Gradients of ``main(model)`` plus ``share`` times the closed form of every router call; they accumulate."""
    seen: list[Routing] = []
    handles = [
        r.register_forward_hook(lambda r, args, routing: seen.append(routing))
        for r in routers(model).values()
    ]
    loss = main(model)
    for handle in handles:
        handle.remove()
    assert seen
    (loss + share * sum(closed_form(routing, sequences) for routing in seen)).backward()
    return gradients(model)


def bare(found: dict[str, Tensor]) -> dict[str, Tensor]:
    """Without the prefixes of wrappers."""
    return {n.removeprefix("_orig_mod.").removeprefix("stack."): v for n, v in found.items()}


def clone(model: nn.Module) -> nn.Module:
    """A deep copy without gradients."""
    model = copy.deepcopy(model)
    model.zero_grad(set_to_none=True)
    return model
