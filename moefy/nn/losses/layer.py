"""The auxiliary loss of a layer: its value, and its way into the gradients.

Contract: ``AuxLoss`` says what a router computes in each training forward, in fp32 (fp64 for fp64 inputs):

    l_aux = weight * balance + z_weight * z_loss + router_weight * (the router's own losses)

With ``delivery="auto"`` an unchanged training loop minimises the model's loss plus the sum of ``l_aux`` over the layers
that ran. ``transform`` arranges that; for a model of one's own ``moefy.deliver_aux_loss(model)`` does:

    the model's forward returns    what happens                              what holds
    -----------------------------  ----------------------------------------  ------------------------------------------
    its loss: "loss" of a dict or  the sum is added to that loss, value and  exact, whatever the loop does to the loss:
    ModelOutput; a tensor without  gradient                                  GradScaler, loss / n, sum reduction,
    dimensions, alone or the only                                            several forwards in one backward
    one of a tuple
    that loss, when it was given   the sum times this micro-batch's share    HF Trainer: the micro-batches of a step
    HF's num_items_in_batch        of the labels is added                    weigh what their labels weigh
    other tensors (logits)         these stay bitwise as they are; the       exact for a loss that is not scaled; else
                                   gradient of the sum enters by their       tell what the loop multiplies it by:
                                   backward, times the loss scale            moefy.loss_scale(scaler, 1 / n)
    nothing that requires grad     nothing                                   the value is in l_aux

    in evaluation                  nothing is computed, l_aux is None
    under no_grad                  the value alone
    in checkpoints of both kinds   the same gradients, once; also where the first pass of a reentrant one has no graph
    compiled                       the same; of loss scales, a number is a constant inside CUDA graphs, a tensor is not
    a layer called n times         its n losses count
    the backward run twice         twice injected; what was added follows the loss

When injected, the loss scale is read at backward time. A second derivative of the outputs, or a gradient with respect
to the inputs, contains the auxiliary loss like any other term.

With ``delivery="by_hand"`` nobody delivers anything; the graph is in ``layer.l_aux`` and ``moefy.aux_loss(model)``:

    (loss + moefy.aux_loss(model)).backward()

With "auto" both are there to be logged and have no graph, so that what is delivered cannot be delivered twice.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from moefy import ops
from moefy.config import AuxLoss
from moefy.config.declared import BALANCE
from moefy.nn import losses
from moefy.nn.counters import LoadCounter
from moefy.nn.execution import assign
from moefy.nn.routing.routing import Choice, Routing


@dataclasses.dataclass(eq=False)
class AuxState:
    """A router's auxiliary loss between its forward and the delivery. Copies and pickles are empty.

    Attributes:
        live: the loss of the forward that runs, summed over its calls so far, with its graph.
        value: the loss of the last finished forward: with a graph under ``delivery="by_hand"``, else without.
        open: whether a forward of the delivering model runs. While one runs, the calls of one layer add up.
        without_grad: whether gradients were off in the last call, as in a reentrant checkpoint. Its loss has no graph.
        scale: the gradient that reached the captured loss of such a forward. Its recomputation injects ``scale``.
        group: the ranks of ``scope="global_batch"``; ``None`` is all of them once ``torch.distributed`` is up.
    """

    live: Tensor | None = None
    value: Tensor | None = None
    open: bool = False
    without_grad: bool = False
    scale: Tensor | None = None
    group: Any = None

    @property
    def l_aux(self) -> Tensor | None:
        """The weighted auxiliary loss of the last training forward, a 0-dim tensor; ``None`` after evaluation."""
        return self.value if self.live is None else self.live

    def note(self, l_aux: Tensor) -> None:
        """Add the loss of one call to ``live``, or start with it."""
        without_grad = not torch.is_grad_enabled()
        live = self.live
        assign(self, "live", l_aux if live is None or not self.open else live + l_aux)
        assign(self, "without_grad", without_grad)

    def begin(self) -> None:
        """Forget the last forward's loss and scale, and open the state: a forward of the model starts."""
        self.live, self.scale, self.open = None, None, True

    def clear(self) -> None:
        """Drop the losses, since evaluation has none. ``scale`` stays: a backward may still wait for it."""
        if self.live is not None:
            assign(self, "live", None)
        if self.value is not None:
            assign(self, "value", None)

    def __getstate__(self) -> dict[str, Any]:
        return {}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__()


class Injected(torch.autograd.Function):
    """Passes ``tensors`` through; their backward gives ``l_aux`` the gradient ``scale``, by default the loss scale."""

    @staticmethod
    def forward(ctx: Any, l_aux: Tensor, scale: Tensor | None, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Aliases of ``tensors``, which later in-place operations may change."""
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(l_aux, scale)
        return tuple(tensor.detach() for tensor in tensors)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        """The gradients as they are, and ``scale`` for ``l_aux``, once for all tensors."""
        l_aux, scale = ctx.saved_tensors
        if scale is None:
            scale = ops.loss_scale(next(grad for grad in grads if grad is not None), l_aux)
        scale = scale.to(l_aux.device, l_aux.dtype)
        return scale.expand_as(l_aux), None, *grads


def layer_loss(
    aux: AuxLoss, routing: Routing, num_experts: int, counter: LoadCounter, group: Any = None
) -> Tensor:
    """``l_aux`` of one call of a router, with its graph. ``counter`` gets its terms.

    Args:
        aux: terms, weights and scope.
        routing: the routing, with the router's choice in it.
        num_experts: E.
        counter: gets the value and the terms without their weights.
        group: the ranks of the global batch.
    """
    choice = routing.choice
    scores_TE = choice.all_scores() if aux.weight else None
    balance = None if scores_TE is None else balance_term(aux, routing, scores_TE, num_experts, group)
    z_loss = None
    if aux.z_weight:
        softmax_TE = scores_TE if choice.scores is None else None
        z_loss = losses.z_loss(choice.logits, mask_T=choice.mask, softmax_TE=softmax_TE)
    own = _sum([(1, value) for value in choice.losses.values()]) if aux.router_weight else None
    like = choice.weights
    l_aux = _sum([(aux.weight, balance), (aux.z_weight, z_loss), (aux.router_weight, own)])
    l_aux = like.new_zeros(()) if l_aux is None else l_aux
    counter.add_losses([l_aux, balance, z_loss, own], like)
    return l_aux


def _sum(terms: list[tuple[float, Tensor | None]]) -> Tensor | None:
    """The weighted sum of the values that are not ``None``; ``None`` without any."""
    total = None
    for weight, value in terms:
        if value is not None:
            total = weight * value if total is None else torch.add(total, value, alpha=weight)
    return total


def balance_term(
    aux: AuxLoss, routing: Routing, scores_TE: Tensor, num_experts: int, group: Any = None
) -> Tensor:
    """The balance loss of ``aux`` over its scope, without its weight; ``scores_TE`` are the scores of all experts."""
    choice = routing.choice
    loss = losses.BALANCE_LOSSES[aux.balance]
    index_TK = routing.top_k_index if BALANCE[aux.balance].after_drops else choice.index
    if aux.scope == "sequence" and len(routing.leading) > 1:
        return _per_sequence(loss, choice, scores_TE, index_TK, num_experts, routing.leading, aux.batch_dim)
    # The sort counted the slots that kept their seats.
    offsets_E = routing.offsets if index_TK is routing.top_k_index else None
    counts = None
    if aux.scope == "global_batch" and dist.is_available() and dist.is_initialized():
        counts = losses.GlobalCounts(dist.group.WORLD if group is None else group)
    return loss(scores_TE, index_TK, num_experts, mask_T=choice.mask, reduce=counts, offsets_E=offsets_E)


def _per_sequence(
    loss: losses.BalanceLoss,
    choice: Choice,
    scores_TE: Tensor,
    index_TK: Tensor,
    num_experts: int,
    leading: tuple[int, ...],
    batch_dim: int,
) -> Tensor:
    axis = min(batch_dim, len(leading) - 1)

    def by_sequence(value_TX: Tensor) -> Tensor:
        if axis == 0:
            return value_TX
        return value_TX.reshape(*leading, *value_TX.shape[1:]).movedim(axis, 0).reshape(value_TX.shape)

    mask_T = None if choice.mask is None else by_sequence(choice.mask)
    return losses.per_sequence(
        loss,
        by_sequence(scores_TE),
        by_sequence(index_TK),
        num_experts,
        sequences=leading[axis],
        mask_T=mask_T,
    )
