"""Delivery of auxiliary losses: hooks on the model that add their sum to its loss, or inject its gradient.

Contract: ``deliver_aux_loss(model)`` hangs one ``AuxHook`` on ``model``. The hook gathers ``l_aux`` of all routers
below at the end of each training forward; ``withdraw(model)`` takes the hook away. ``moefy.nn.losses.layer`` has a
table of what holds for each kind of output and loop.

    loss = model(ids, labels=ids).loss     # loss + sum of l_aux
    logits = model(x)                      # bitwise the logits; their backward also brings the gradient of l_aux

A reentrant checkpoint runs its first pass without a graph. There the value goes out through ``Captured``, whose
backward notes the gradient before any layer's backward starts, and the recomputation injects l_aux times that.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from moefy import ops
from moefy.config import AuxLoss
from moefy.nn.execution import traced
from moefy.nn.losses.layer import AuxState, Injected
from moefy.nn.losses.outputs import differentiable_tensors, replace_tensors, with_loss
from moefy.nn.routers.base import Router

IGNORED_LABEL = -100  # Hugging Face's and torch's ignore_index
SHIFTING_LOSSES = ("ForCausalLM", "ForConditionalGeneration")  # a sequence's first label is nobody's target
_REPLICA_STATES = "_moefy_replica_states"


class AuxHook:
    """The model's hooks: ``before`` and ``after`` each forward.

    Args:
        auto: states of the routers whose loss is delivered.
        manual: states of the routers with ``delivery="by_hand"``, whose loss the user adds.
    """

    def __init__(self, auto: list[AuxState], manual: list[AuxState]) -> None:
        self.auto, self.manual = auto, manual

    def before(self, module: nn.Module, args: Any) -> None:
        """Open the states: a training forward with gradients begins."""
        if module.training and torch.is_grad_enabled():
            auto, manual = self.states(module)
            for state in (*auto, *manual):
                state.begin()

    def after(self, module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
        """Close the states and deliver: the forward ends, possibly with an error (``output`` is None)."""
        auto, manual = self.states(module)
        if not any(state.open for state in (*auto, *manual)):
            return None
        for state in manual:
            state.open, state.value, state.live = False, state.live, None
        total = gather(auto)
        return None if total is None else delivered(output, total, module, kwargs)

    def states(self, module: nn.Module) -> tuple[list[AuxState], list[AuxState]]:
        """``(auto, manual)``. A replica of DataParallel gets states of its own, since replicas run at the same time."""
        if not getattr(module, "_is_replica", False):
            return self.auto, self.manual
        held = module.__dict__
        if _REPLICA_STATES not in held:
            routers = [m for m in module.modules() if isinstance(m, Router)]
            for router in routers:
                router.__dict__["aux_state"] = AuxState()
            held[_REPLICA_STATES] = split_states(routers)
        return held[_REPLICA_STATES]


def deliver_aux_loss(model: nn.Module) -> None:
    """Deliver the auxiliary losses of all routers below ``model`` from now on, as ``transform`` does.

    For a model of one's own that holds ``moefy.MoE`` layers, and for a ``GraphModule`` that was unpickled, since
    torch.fx keeps no hooks in a pickle. The losses are those that the routers have now.
    """
    withdraw(model)
    auto, manual = split_states(m for m in model.modules() if isinstance(m, Router))
    if auto or manual:
        hook = AuxHook(auto, manual)
        model.register_forward_pre_hook(hook.before)
        model.register_forward_hook(hook.after, with_kwargs=True, always_call=True)
        if isinstance(model, fx.GraphModule):  # whose copies have no hooks either
            model._register_deepcopy_hook(deliver_aux_loss)


def withdraw(model: nn.Module) -> None:
    """Take the hooks of ``deliver_aux_loss`` off ``model``: nothing is delivered any more."""
    for hooks in (model._forward_pre_hooks, model._forward_hooks):
        for key in [k for k, hook in hooks.items() if isinstance(getattr(hook, "__self__", None), AuxHook)]:
            del hooks[key]
            model._forward_hooks_with_kwargs.pop(key, None)
            model._forward_hooks_always_called.pop(key, None)
    if isinstance(model, fx.GraphModule) and deliver_aux_loss in model._deepcopy_hooks:
        model._unregister_deepcopy_hook(deliver_aux_loss)


def split_states(routers: Iterable[Router]) -> tuple[list[AuxState], list[AuxState]]:
    """``(auto, manual)``: the states of the routers that have an auxiliary loss, by their ``delivery``."""
    found: dict[str, list[AuxState]] = {"auto": [], "by_hand": []}
    for router in routers:
        if isinstance(router.aux_loss, AuxLoss):
            found[router.aux_loss.delivery].append(router.aux_state)
    return found["auto"], found["by_hand"]


# -- gathering -----------------------------------------------------------------------------------------------------
def gather(states: Sequence[AuxState]) -> Tensor | None:
    """The sum of the losses of the forward that ends, with its graph. Each state keeps its value without a graph."""
    total: Tensor | None = None
    captured: list[AuxState] = []
    for state in states:
        live, state.live, state.open = state.live, None, False
        state.value = None if live is None or traced() else live.detach()
        if live is None:
            continue
        if state.without_grad:
            captured.append(state)
        else:
            forget_recomputed(live, state)
            total = live if total is None else total + live.to(total.device)
    if captured:
        total = capture(captured) if total is None else total + capture(captured).to(total.device)
    return total


def forget_recomputed(live: Tensor, state: AuxState) -> None:
    """Drop the loss that a recomputation stored, once the layer's backward has run.

    A compiled layer inside an eager checkpoint stores l_aux again when it is recomputed. That loss would keep the
    layer's activations until the next forward.
    """
    if not torch.compiler.is_dynamo_compiling() and live.grad_fn is not None:
        live.grad_fn.register_hook(lambda *_: state.__dict__.update(live=None))


def capture(states: list[AuxState]) -> Tensor:
    """The sum of the states' values, which have no graph; the sum's gradient becomes ``scale`` of each state."""
    values = [state.value for state in states if state.value is not None]
    value = torch.stack([v.to(values[0].device) for v in values]).sum()
    return Captured.apply(torch.zeros_like(value, requires_grad=True), value, states)  # type: ignore[no-any-return]


capture._torchdynamo_disable = True  # type: ignore[attr-defined]  # what torch.compiler.disable sets


class Captured(torch.autograd.Function):
    """Passes ``value`` through, and writes its gradient into ``scale`` of the states.

    Autograd runs the node made last first, so ``scale`` is set before a layer's recomputation reads it.
    """

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, value: Tensor, states: list[AuxState]) -> Tensor:
        """A copy of ``value``; ``anchor`` is only there to require grad."""
        ctx.states = states
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        """Set ``scale`` of each state to the gradient."""
        for state in ctx.states:
            state.scale = grads[0].detach()
        return None, None, None


# -- the model's output --------------------------------------------------------------------------------------------
def delivered(output: Any, total: Tensor, module: nn.Module, kwargs: Mapping[str, Any]) -> Any:
    """``output`` with ``total`` added to its loss, or with the gradient of ``total`` injected."""

    def add(loss: Tensor) -> Tensor:
        return loss + micro_batch_share(total, module, kwargs).to(loss.device, loss.dtype)

    added, found = with_loss(output, add)
    if found:
        return added
    tensors = differentiable_tensors(output)
    if not tensors or not total.requires_grad:
        return output
    return replace_tensors(output, tensors, Injected.apply(total, None, *tensors))


def micro_batch_share(total: Tensor, module: nn.Module, kwargs: Mapping[str, Any]) -> Tensor:
    """``total``, times this micro-batch's share of ``num_items_in_batch`` where the model was told that number.

    Hugging Face's losses divide by the labels of all micro-batches of a step, so its Trainer does not divide again. Its
    Trainer counts the labels as this function does.
    """
    items, labels = kwargs.get("num_items_in_batch"), kwargs.get("labels")
    if kwargs.get("shift_labels") is not None:
        labels = kwargs["shift_labels"]
    elif isinstance(labels, Tensor) and getattr(module, "loss_type", None) in SHIFTING_LOSSES:
        encoder = getattr(getattr(module, "config", None), "is_encoder_decoder", False)
        labels = labels if encoder else labels[..., 1:]
    if items is None or not isinstance(labels, Tensor):
        return total
    if isinstance(items, Tensor):
        items = items.reshape(-1)[0].to(total.device)
    return total * ((labels != IGNORED_LABEL).sum().to(total) / items)


# -- for training loops --------------------------------------------------------------------------------------------
def aux_loss(model: nn.Module) -> Tensor:
    """The sum of ``l_aux`` over the layers of ``model`` in their last training forward, a 0-dim tensor.

    The sum has a graph where the layers' ``AuxLoss`` has ``delivery="by_hand"``. Delivered losses have none here, so
    adding them again changes a loss's value and not its gradient. The sum is 0 after evaluation and for a model without
    auxiliary losses.
    """
    total: Tensor | None = None
    captured: list[AuxState] = []
    for router in (m for m in model.modules() if isinstance(m, Router)):
        state = router.aux_state
        value = state.l_aux
        if router.aux_loss is None or value is None:
            continue
        if state.without_grad and router.aux_loss.delivery == "by_hand" and torch.is_grad_enabled():
            state.value, state.live = value, None
            captured.append(state)
        else:
            total = value if total is None else total + value.to(total.device)
    if captured:
        total = capture(captured) if total is None else total + capture(captured).to(total.device)
    if total is not None:
        return total
    device = next((p.device for p in model.parameters()), None)
    return torch.zeros((), device=device)


class loss_scale(contextlib.ContextDecorator):
    """Say how the training loop scales the loss, for models that return outputs and no loss.

    The call sets the scale of the process; as a context manager it restores the scale before. Backwards read the scale
    when they run. The default is 1.

    Args:
        factors: numbers, tensors and live gradient scalers that multiply the loss; the scale is their product.

    >>> scaler = torch.amp.GradScaler()
    >>> moefy.loss_scale(scaler, 1 / accumulation_steps)     # scaler.scale(loss / accumulation_steps).backward()
    """

    def __init__(self, *factors: Any) -> None:
        self.factors = factors
        self.before = ops.set_loss_scale(*factors)

    def __enter__(self) -> loss_scale:
        ops.set_loss_scale(*self.factors)
        return self

    def __exit__(self, *error: Any) -> None:
        ops.set_loss_scale(*self.before)
