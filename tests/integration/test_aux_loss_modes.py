"""Auxiliary losses under checkpoints, ``torch.compile`` and replicas: the gradients of the loss written by hand."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import moefy
from integration.aux_models import AUX, bare, explicit, lm_pair, pair, tokens
from integration.models import assert_same, batch, call, gradients, routers, scalar
from integration.test_checkpointing import Checkpointed
from integration.test_data_parallel import replicas
from moefy.nn.losses.delivery import deliver_aux_loss, withdraw

EXACT = 1e-10
KINDS = pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "non-reentrant"])
STEPS = 2


def counted_once(model: nn.Module, forwards: int, slots: int) -> None:
    """Every router counted the slots of its forwards and nothing of a recomputation."""
    for name, router in routers(model).items():
        counter = router.load_counter
        assert counter.tokens_per_expert().sum() == forwards * slots, name
        assert counter.losses[-1] == forwards, name


class CheckpointedLoss(nn.Module):
    """An ``LM`` whose layers run under ``checkpoint``; returns its loss."""

    def __init__(self, lm: nn.Module, **options: Any) -> None:
        super().__init__()
        self.stack, self.options = lm, options

    def forward(self, ids: Tensor, targets: Tensor) -> Tensor:
        x = self.stack.embed(ids).requires_grad_()
        for layer in self.stack.layers:
            x = checkpoint(layer, x, **self.options)
        logits = self.stack.head(x)
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def moved(model: nn.Module, wrapped: nn.Module) -> nn.Module:
    """Deliver from ``wrapped``, which runs the parts of ``model`` itself."""
    withdraw(model)
    deliver_aux_loss(wrapped)
    return wrapped.train()


COMPILED = pytest.mark.parametrize("compiled", ["eager", "layers", "whole"])


def compile_as(model: nn.Module, layers: Any, compiled: str, reentrant: bool) -> nn.Module:
    if compiled == "layers":
        for layer in layers:
            layer.compile(backend="aot_eager", fullgraph=True)
    if compiled == "whole":
        return torch.compile(model, backend="aot_eager", fullgraph=not reentrant)  # type: ignore[return-value]
    return model


@pytest.mark.usefixtures("fresh_dynamo")
@COMPILED
@KINDS
@pytest.mark.parametrize("name", ["aligned", "glu"])
def test_checkpointed_outputs(name: str, reentrant: bool, compiled: str) -> None:
    plain, stack = pair(name)
    x = batch(name)[""].requires_grad_()
    expected = explicit(plain, lambda m: 0.5 * scalar(m(x)), share=0.5)
    model = moved(stack, Checkpointed(stack, use_reentrant=reentrant))
    model = compile_as(model, stack.layers, compiled, reentrant)
    for _ in range(STEPS):
        model.zero_grad(set_to_none=True)
        loss = 0.5 * scalar(model(x))
        with moefy.loss_scale(0.5):
            loss.backward()
        assert_same(bare(gradients(model)), expected, EXACT)
    counted_once(stack, STEPS, 2 * 6 * 2)
    assert all(r.aux_state.live is None for r in routers(stack).values())


@pytest.mark.usefixtures("fresh_dynamo")
@COMPILED
@KINDS
def test_checkpointed_losses(reentrant: bool, compiled: str) -> None:
    """Two forwards in one backward, under different scales."""
    plain, lm = lm_pair()
    for scale, seed in ((1.0, 0), (0.25, 1)):
        expected = explicit(plain, lambda m, w=scale, s=seed: w * m(*tokens(seed=s))[1], share=scale)
    model = moved(lm, CheckpointedLoss(lm, use_reentrant=reentrant))
    model = compile_as(model, lm.layers, compiled, reentrant)
    for _ in range(STEPS):
        model.zero_grad(set_to_none=True)
        (model(*tokens()) + 0.25 * model(*tokens(seed=1))).backward()
        assert_same(bare(gradients(model)), expected, EXACT)
    counted_once(lm, 2 * STEPS, 4 * 6 * 2)


@KINDS
def test_by_hand_under_a_checkpoint(reentrant: bool) -> None:
    aux = moefy.AuxLoss(weight=AUX.weight, z_weight=AUX.z_weight, delivery="by_hand")
    plain, lm = lm_pair(aux)
    expected = explicit(plain, lambda m: m(*tokens())[1])
    model = moved(lm, CheckpointedLoss(lm, use_reentrant=reentrant))
    loss = model(*tokens())
    (loss + moefy.aux_loss(model)).backward()
    assert_same(bare(gradients(model)), expected, EXACT)


@KINDS
def test_gradient_checkpointing_of_transformers(reentrant: bool) -> None:
    plain, model = pair("llama")
    ids = batch("llama")["input_ids"]
    for m in (plain, model):
        m.config.use_cache = False
        m.enable_input_require_grads()
    expected = explicit(plain, lambda m: m(input_ids=ids, labels=ids).loss)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model(input_ids=ids, labels=ids).loss.backward()
    assert_same(gradients(model), expected, EXACT, floor=1e-12)
    counted_once(model, 1, ids.numel() * 2)


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("name", ["aligned", "inline", "glu", "encoder"])
def test_one_graph_of_outputs(name: str) -> None:
    plain, model = pair(name)
    inputs = batch(name)
    expected = explicit(plain, lambda m: 0.5 * scalar(call(m, inputs)), share=0.5)
    fast = torch.compile(model, backend="aot_eager", fullgraph=True)
    for _ in range(STEPS):
        fast.zero_grad(set_to_none=True)
        output = call(fast, inputs)
        with moefy.loss_scale(0.5):  # read when the backward runs
            (0.5 * scalar(output)).backward()
        assert_same(bare(gradients(fast)), expected, EXACT)
    counted_once(model, STEPS, 2 * 6 * 2)


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("form", ["tuple", "dict"])
def test_one_graph_of_a_loss_without_recompiles(form: str) -> None:
    plain, model = lm_pair(form=form)
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    fast = torch.compile(model, backend=counter, fullgraph=True, dynamic=True)

    def loss(m: Any, size: int) -> Tensor:
        out = m(*tokens(size, size + 2))
        return out["loss"] if form == "dict" else out[1]

    frames = []
    for size in (3, 5, 2):
        plain.zero_grad(set_to_none=True)
        fast.zero_grad(set_to_none=True)
        expected = explicit(plain, lambda m, s=size: loss(m, s))
        loss(fast, size).backward()
        assert_same(bare(gradients(fast)), expected, EXACT)
        frames.append(counter.frame_count)
    assert len(set(frames)) == 1


@pytest.mark.usefixtures("fresh_dynamo")
def test_transformers_compile() -> None:
    plain, model = pair("llama")
    ids = batch("llama")["input_ids"]
    expected = explicit(plain, lambda m: m(input_ids=ids, labels=ids).loss)
    fast = torch.compile(model, backend="aot_eager")
    for _ in range(STEPS):
        fast.zero_grad(set_to_none=True)
        fast(input_ids=ids, labels=ids).loss.backward()
        assert_same(bare(gradients(fast)), expected, EXACT, floor=1e-12)
    counted_once(model, STEPS, ids.numel() * 2)


@pytest.mark.usefixtures("fresh_dynamo")
def test_inductor() -> None:
    plain, model = lm_pair()
    expected = explicit(plain, lambda m: m(*tokens())[1])
    fast = torch.compile(model, fullgraph=True)
    fast(*tokens())[1].backward()
    assert_same(bare(gradients(fast)), expected, EXACT)
    counted_once(model, 1, 4 * 6 * 2)


def test_replicas_deliver_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """As DataParallel runs them: at the same time, in threads."""
    plain, model = pair("aligned")
    parts = [batch("aligned", seed=seed) for seed in range(2)]
    for part in parts:
        expected = explicit(plain, lambda m, p=part: scalar(call(m, p)))
    copies = replicas(model, 2, monkeypatch)
    outputs: list[Any] = [None, None]

    def run(i: int) -> None:
        outputs[i] = call(copies[i], parts[i])

    threads = [threading.Thread(target=run, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    sum(scalar(output) for output in outputs).backward()  # type: ignore[union-attr]
    assert_same(gradients(model), expected, EXACT)
    counted_once(model, 2, 2 * 6 * 2)
