"""Delivery of auxiliary losses: hooks on the model that add their sum to its loss, or inject its gradient.

Contract: ``deliver_aux_loss(model)`` hangs one ``AuxHook`` on ``model``, which gathers ``l_aux`` of all routers below
at the end of each training forward; ``withdraw(model)`` takes it away.
``moefy.nn.losses.layer`` has a table of what holds.

    loss = model(ids, labels=ids).loss     # loss + sum of l_aux
    logits = model(x)                      # bitwise the logits; their backward also brings the gradient of l_aux

A reentrant checkpoint runs its first pass without a graph. There the value goes out through ``Captured``, whose
backward notes the gradient before any layer's backward starts, and the recomputation injects l_aux times that.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from moefy import ops
from moefy.config import AuxLoss
from moefy.nn.execution import traced
from moefy.nn.losses.layer import AuxState, Injected
from moefy.nn.routers.base import Router

IGNORED_LABEL = -100  # Hugging Face's and torch's ignore_index
SHIFTING_LOSSES = ("ForCausalLM", "ForConditionalGeneration")  # a sequence's first label is nobody's target
_REPLICA_STATES = "_moefy_replica_states"


class AuxHook:
    """What hangs on the model: ``before`` and ``after`` each forward.

    Args:
        auto: states of the routers whose loss is delivered.
        by_hand: states of those whose loss the user takes.
    """

    def __init__(self, auto: list[AuxState], by_hand: list[AuxState]) -> None:
        self.auto, self.by_hand = auto, by_hand

    def before(self, module: nn.Module, args: Any) -> None:
        """A training forward with gradients begins."""
        if module.training and torch.is_grad_enabled():
            auto, by_hand = self.states(module)
            for state in (*auto, *by_hand):
                state.begin()

    def after(self, module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
        """It ends, also with an error (``output`` is None): deliver."""
        auto, by_hand = self.states(module)
        if not any(state.open for state in (*auto, *by_hand)):
            return None
        for state in by_hand:
            state.open, state.value, state.live = False, state.live, None
        total = gather(auto)
        return None if total is None else delivered(output, total, module, kwargs)

    def states(self, module: nn.Module) -> tuple[list[AuxState], list[AuxState]]:
        """``(auto, by_hand)``; a replica of DataParallel gets its own, since replicas run at the same time."""
        if not getattr(module, "_is_replica", False):
            return self.auto, self.by_hand
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
    auto, by_hand = split_states(m for m in model.modules() if isinstance(m, Router))
    if auto or by_hand:
        hook = AuxHook(auto, by_hand)
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


def split_states(routers: Any) -> tuple[list[AuxState], list[AuxState]]:
    """``(auto, by_hand)`` of the routers that have an auxiliary loss."""
    found: dict[str, list[AuxState]] = {"auto": [], "by_hand": []}
    for router in routers:
        if isinstance(router.aux_loss, AuxLoss):
            found[router.aux_loss.delivery].append(router.aux_state)
    return found["auto"], found["by_hand"]


# -- gathering -----------------------------------------------------------------------------------------------------
def gather(states: Sequence[AuxState]) -> Tensor | None:
    """The sum of the losses of the forward that ends, with its graph; each state keeps its value alone."""
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
    """Once the layer's backward has run, drop what its recomputation left.

    A compiled layer inside an eager checkpoint stores l_aux again when it is recomputed. It would keep the layer's
    activations until the next forward.
    """
    if not torch.compiler.is_dynamo_compiling() and live.grad_fn is not None:
        live.grad_fn.register_hook(lambda *_: state.__dict__.update(live=None))


def capture(states: list[AuxState]) -> Tensor:
    """The sum of values without a graph, such that its gradient becomes the ``scale`` of each state."""
    values = [state.value for state in states if state.value is not None]
    value = torch.stack([v.to(values[0].device) for v in values]).sum()
    return Captured.apply(torch.zeros_like(value, requires_grad=True), value, states)  # type: ignore[no-any-return]


capture._torchdynamo_disable = True  # type: ignore[attr-defined]  # what torch.compiler.disable sets


class Captured(torch.autograd.Function):
    """``value``, whose gradient is noted in states.

    Autograd runs the node made last first, so that the note is there before a layer's recomputation reads it.
    """

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, value: Tensor, states: list[AuxState]) -> Tensor:
        """``value``."""
        ctx.states = states
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        """Note the gradient."""
        for state in ctx.states:
            state.scale = grads[0].detach()
        return None, None, None


# -- the model's output --------------------------------------------------------------------------------------------
def delivered(output: Any, total: Tensor, module: nn.Module, kwargs: Mapping[str, Any]) -> Any:
    """``output`` with ``total`` added to its loss, or with the gradient of ``total`` injected."""

    def add(loss: Tensor) -> Tensor:
        return loss + shared(total, module, kwargs).to(loss.device, loss.dtype)

    added, found = with_loss(output, add)
    if found:
        return added
    tensors: list[Tensor] = []
    map_tensors(output, lambda tensor: _collect(tensor, tensors))
    if not tensors or not total.requires_grad:
        return output
    passed = Injected.apply(total, None, *tensors)
    return map_tensors(output, lambda tensor: _replace(tensor, tensors, passed))


def with_loss(output: Any, add: Callable[[Tensor], Tensor]) -> tuple[Any, bool]:
    """``output`` with ``add`` done to its loss, and whether it has one."""
    if is_loss(output):
        return add(output), True
    if isinstance(output, Mapping):
        if not is_loss(output.get("loss"), named=True):
            return output, False
        output["loss"] = add(output["loss"])  # type: ignore[index]
        return output, True
    if isinstance(output, (tuple, list)):
        at = [i for i, item in enumerate(output) if is_loss(item)]
        if len(at) != 1:
            return output, False
        items = list(output)
        items[at[0]] = add(items[at[0]])
        return _like(output, items), True
    if dataclasses.is_dataclass(output) and is_loss(getattr(output, "loss", None), named=True):
        return dataclasses.replace(output, loss=add(output.loss)), True  # type: ignore[type-var, attr-defined]
    return output, False


def is_loss(value: Any, named: bool = False) -> bool:
    """A floating tensor that requires grad and has no dimensions, or one element where its name says so."""
    if not isinstance(value, Tensor) or not value.is_floating_point() or not value.requires_grad:
        return False
    return value.dim() == 0 or (named and value.numel() == 1)


def shared(total: Tensor, module: nn.Module, kwargs: Mapping[str, Any]) -> Tensor:
    """``total``, times this micro-batch's share of ``num_items_in_batch`` where the model was told that number.

    Hugging Face's losses divide by the labels of all micro-batches of a step, so its Trainer does not divide again. It
    counts the labels as it is done here.
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


def map_tensors(value: Any, fn: Callable[[Tensor], Tensor]) -> Any:
    """``value`` with ``fn`` done to the tensors that a loss can come from, in tuples, lists, dicts and dataclasses."""
    if isinstance(value, Tensor):
        return fn(value) if value.is_floating_point() and value.requires_grad else value
    if isinstance(value, Mapping):
        for key, item in list(value.items()):
            new = map_tensors(item, fn)
            if new is not item:
                value[key] = new  # type: ignore[index]
        return value
    if isinstance(value, (tuple, list)):
        return _like(value, [map_tensors(item, fn) for item in value])
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = [f.name for f in dataclasses.fields(value) if f.init]
        return dataclasses.replace(value, **{n: map_tensors(getattr(value, n), fn) for n in fields})
    return value


def _collect(tensor: Tensor, found: list[Tensor]) -> Tensor:
    if not any(tensor is other for other in found):
        found.append(tensor)
    return tensor


def _replace(tensor: Tensor, found: Sequence[Tensor], by: Sequence[Tensor]) -> Tensor:
    for old, new in zip(found, by, strict=True):
        if tensor is old:
            return new
    return tensor


def _like(value: Any, items: list[Any]) -> Any:
    """``items`` as the list, tuple or named tuple that ``value`` is."""
    if all(old is new for old, new in zip(value, items, strict=True)):
        return value
    return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)


# -- by hand -------------------------------------------------------------------------------------------------------
def aux_loss(model: nn.Module) -> Tensor:
    """The sum of ``l_aux`` over the layers of ``model`` in their last training forward, a 0-dim tensor.

    It has a graph where the layers' ``AuxLoss`` has ``delivery="by_hand"``; what is delivered has none, so that adding
    it to a loss changes the value and never the gradient. 0 after evaluation and for a model without auxiliary losses.
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

    Sets the scale at once, for the process; as a context manager it restores the one before. It is read at backward
    time. The default is 1.

    Args:
        factors: what the loss is multiplied by: numbers, tensors, and live gradient scalers; the scale is their
            product.

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
