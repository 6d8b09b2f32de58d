"""Auxiliary losses reach the gradients of an unchanged training loop: equal to the loss written by hand."""

from __future__ import annotations

import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

import moefy
from integration.aux_models import (
    AUX,
    Shared,
    W,
    Z,
    clone,
    closed_form,
    explicit,
    lm_pair,
    pair,
    tokens,
    twin,
)
from integration.models import VOCAB, D, assert_same, batch, call, dense, gradients, routers, scalar
from moefy.config import AuxLoss, MoEConfig
from moefy.errors import ConfigError, UnknownOption
from moefy.nn import losses
from moefy.nn.routers import Router

EXACT = 1e-10
NAMES = ("aligned", "inline", "glu", "encoder", "llama")


def lm_loss(model: nn.Module, ids: Tensor, targets: Tensor) -> Tensor:
    """The loss of an ``LM``, whatever form it is returned in."""
    out = model(ids, targets)
    return out["loss"] if isinstance(out, dict) else out[1] if isinstance(out, tuple) else out


# -- the model returns outputs -------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", NAMES)
def test_injected(name: str) -> None:
    plain, model = pair(name)
    inputs = batch(name)
    expected = explicit(plain, lambda m: scalar(call(m, inputs)))
    output = call(model, inputs)
    assert torch.equal(output, call(plain, inputs))
    scalar(output).backward()
    assert_same(gradients(model), expected, EXACT)


def test_a_layer_that_is_called_several_times_counts_each_time() -> None:
    x = torch.randn(2, 5, D, dtype=torch.float64)
    plain, model = twin(lambda: Shared().double(), example_args=(x,))
    model.load_state_dict(plain.state_dict())
    expected = explicit(plain, lambda m: m(x).square().mean())
    for _ in range(2):  # nothing is left of the first time
        model.zero_grad(set_to_none=True)
        model(x).square().mean().backward()
        assert_same(gradients(model), expected, EXACT)


def test_outputs_may_be_changed_in_place_and_left_unused() -> None:
    plain, model = pair("aligned")
    inputs = batch("aligned")
    expected = explicit(plain, lambda m: scalar(call(m, inputs) * 0.5))
    output = call(model, inputs)
    output.mul_(0.5)
    scalar(output).backward()
    assert_same(gradients(model), expected, EXACT)
    model.zero_grad(set_to_none=True)
    call(model, inputs)
    sum(p.square().sum() for p in model.parameters()).backward()  # type: ignore[union-attr]
    assert_same(gradients(model), {n: 2 * p for n, p in model.named_parameters()}, EXACT)


class Outputs(nn.Module):
    """The output of a block in some container, beside things that are no tensors of floats."""

    def __init__(self, form: str) -> None:
        super().__init__()
        self.form, self.block = form, Shared()

    def forward(self, x: Tensor) -> Any:
        y = self.block(x)
        other = self.block(x) if self.form == "two" else None
        forms = {"two": (y, other), "dict": {"y": [y], "n": 3}, "twice": (y, {"again": y}), "none": (None, y)}
        return forms[self.form]


def leaf(out: Any) -> Tensor:
    return out["y"][0] if isinstance(out, dict) else next(v for v in out if isinstance(v, Tensor))


@pytest.mark.parametrize("form", ["two", "dict", "twice", "none"])
def test_containers_of_outputs(form: str) -> None:
    """Each is delivered once, also when only the first of two outputs has a gradient."""
    x = torch.randn(2, 5, D, dtype=torch.float64)
    torch.manual_seed(1)
    dense = Outputs(form).double()
    plain, model = twin(lambda: clone(dense), example_args=(x,))
    expected = explicit(plain, lambda m: scalar(leaf(m(x))))
    out = model(x)
    scalar(leaf(out)).backward()
    assert_same(gradients(model), expected, EXACT)
    if form == "twice":
        assert out[0] is out[1]["again"]


# -- the model returns its loss ------------------------------------------------------------------------------------
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("form", ["tuple", "dict", "tensor"])
def test_added(form: str, reduction: str) -> None:
    plain, model = lm_pair(form=form, reduction=reduction)
    expected = explicit(plain, lambda m: lm_loss(m, *tokens()))
    loss = lm_loss(model, *tokens())
    loss.backward()
    assert_same(gradients(model), expected, EXACT)
    total = sum(r.l_aux for r in routers(model).values())
    assert torch.isclose(loss.detach(), lm_loss(plain, *tokens()).detach() + total, rtol=1e-12)


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_added_to_a_model_output(name: str) -> None:
    plain, model = pair(name)
    ids = batch(name)["input_ids"]
    expected = explicit(plain, lambda m: m(input_ids=ids, labels=ids).loss)
    out = model(input_ids=ids, labels=ids)
    assert out.loss is out["loss"] is out[0]
    out.loss.backward()
    assert_same(gradients(model), expected, EXACT, floor=1e-12)  # a key's bias has no gradient but rounding


def test_labels_of_a_micro_batch_give_its_share() -> None:
    """As HF Trainer calls it: unequal micro-batches, ``num_items_in_batch``, no division in the loop."""
    plain, model = pair("llama")
    ids = torch.randint(3, VOCAB, (4, 7))
    labels = ids.clone()
    labels[0, 2:] = -100
    items = (labels[:, 1:] != -100).sum()
    for rows in (slice(0, 1), slice(1, 4)):
        part = {"input_ids": ids[rows], "labels": labels[rows], "num_items_in_batch": items}
        share = (labels[rows, 1:] != -100).sum().item() / items.item()
        expected = explicit(plain, lambda m, part=part: m(**part).loss, share=share)
        model(**part).loss.backward()
    assert_same(gradients(model), expected, EXACT)


# -- scales --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("returns_loss", [True, False])
def test_grad_scaler(returns_loss: bool) -> None:
    """fp32 against the closed form in fp64; the bound is the issue's 1e-6 of the whole gradient."""
    plain, model = lm_pair()
    model = model.float()
    ids, targets = tokens()

    def main(m: nn.Module) -> Tensor:
        if returns_loss:
            return m(ids, targets)[1]
        return F.cross_entropy(m(ids)[0].flatten(0, 1), targets.flatten())

    expected = explicit(plain, main)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)  # type: ignore[attr-defined]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with moefy.loss_scale(scaler):
        scaler.scale(main(model)).backward()
    scaler.unscale_(optimizer)
    got = gradients(model)
    norm = torch.cat([g.flatten() for g in expected.values()]).norm()
    for name, value in expected.items():
        assert (got[name].double() - value).norm() <= 1e-6 * norm, name


@pytest.mark.parametrize("returns_loss", [True, False])
def test_four_micro_batches_equal_one_batch(returns_loss: bool) -> None:
    plain, model = lm_pair(AuxLoss(weight=W, z_weight=Z, scope="sequence"))
    ids, targets = tokens(8)

    def main(m: nn.Module, rows: slice) -> Tensor:
        if returns_loss:
            return m(ids[rows], targets[rows])[1]
        return F.cross_entropy(m(ids[rows])[0].flatten(0, 1), targets[rows].flatten())

    expected = explicit(plain, lambda m: main(m, slice(None)), sequences=8)
    with moefy.loss_scale(1 / 4):
        for i in range(4):
            (main(model, slice(2 * i, 2 * i + 2)) / 4).backward()
            with torch.no_grad():  # an evaluation in between leaves nothing behind
                model.eval()(ids)
                model.train()
    assert_same(gradients(model), expected, EXACT)


def test_a_sum_reduced_loss_of_outputs() -> None:
    plain, model = lm_pair()
    ids, targets = tokens()

    def main(m: nn.Module) -> Tensor:
        return F.cross_entropy(m(ids)[0].flatten(0, 1), targets.flatten(), reduction="sum")

    expected = explicit(plain, main)
    main(model).backward()
    assert_same(gradients(model), expected, EXACT)


def test_several_forwards_in_one_backward() -> None:
    plain, model = lm_pair()
    for weight, seed in ((1.0, 0), (0.25, 1)):
        expected = explicit(plain, lambda m, w=weight, s=seed: w * lm_loss(m, *tokens(seed=s)), share=weight)
    losses_ = [lm_loss(model, *tokens(seed=s)) for s in (0, 1)]
    (losses_[0] + 0.25 * losses_[1]).backward()
    assert_same(gradients(model), expected, EXACT)


def test_loss_scale_multiplies_and_restores() -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)  # type: ignore[attr-defined]
    like = torch.zeros(2, dtype=torch.float64)

    def read(like: Tensor) -> Tensor:
        return torch.ops.moefy.loss_scale(like, like)

    with moefy.loss_scale(scaler, torch.tensor(0.5), 0.25):
        assert read(like).item() == 1.0 and read(like).dtype == torch.float64
        moefy.loss_scale(3)
        assert read(like).item() == 3.0
    assert read(like).item() == 1.0


# -- modes ---------------------------------------------------------------------------------------------------------
def test_evaluation_has_none() -> None:
    _, model = lm_pair()
    lm_loss(model, *tokens())
    model.eval()
    plain_loss = lm_loss(model, *tokens())
    assert all(r.l_aux is None for r in routers(model).values()) and moefy.aux_loss(model) == 0
    model.train()
    assert lm_loss(model, *tokens()) > plain_loss


def test_no_grad_in_training_gives_the_value_alone() -> None:
    _, model = lm_pair()
    with torch.no_grad():
        assert not lm_loss(model, *tokens()).requires_grad
    value = moefy.aux_loss(model)
    assert value > 0 and not value.requires_grad


def test_autocast_computes_it_in_fp32() -> None:
    _, model = pair("aligned", dtype=torch.float32)
    x = batch("aligned", dtype=torch.float32)[""]
    with torch.autocast("cpu", torch.bfloat16):
        output = model(x)
    scalar(output.float()).backward()
    for router in routers(model).values():
        assert router.l_aux is not None and router.l_aux.dtype == torch.float32


def test_no_tokens() -> None:
    _, model = pair("aligned")
    model(torch.zeros(0, 6, D, dtype=torch.float64)).sum().backward()
    assert all(r.l_aux == 0 for r in routers(model).values())
    assert all(g.isfinite().all() for g in gradients(model).values())


def test_frozen_routers_and_inputs_change_the_value_alone() -> None:
    plain, model = lm_pair()
    for m in (plain, model):
        for name, p in m.named_parameters():
            p.requires_grad_(name.startswith("head"))
    lm_loss(plain, *tokens()).backward()
    loss = lm_loss(model, *tokens())
    loss.backward()
    assert_same(gradients(model), gradients(plain), 0.0)
    assert torch.isclose(loss, lm_loss(plain, *tokens()) + moefy.aux_loss(model), rtol=1e-12)


# -- by hand -------------------------------------------------------------------------------------------------------
def test_by_hand() -> None:
    plain, model = lm_pair(AuxLoss(weight=W, z_weight=Z, delivery="by_hand"))
    expected = explicit(plain, lambda m: lm_loss(m, *tokens()))
    for _ in range(2):
        model.zero_grad(set_to_none=True)
        loss = lm_loss(model, *tokens())
        assert torch.equal(loss, lm_loss(plain, *tokens()))
        aux = moefy.aux_loss(model)
        assert torch.isclose(aux, sum(r.l_aux for r in routers(model).values()), rtol=1e-12)  # type: ignore[arg-type]
        (loss + aux).backward()
        assert_same(gradients(model), expected, EXACT)


def test_what_is_delivered_is_not_delivered_twice_by_hand() -> None:
    plain, model = lm_pair()
    expected = explicit(plain, lambda m: lm_loss(m, *tokens()))
    loss = lm_loss(model, *tokens())
    (loss + moefy.aux_loss(model)).backward()
    assert_same(gradients(model), expected, EXACT)


def test_a_layer_of_ones_own() -> None:
    """Without a transformed model around it nothing is delivered, unless asked."""
    router = Router(D, 4, 2, std=1.0)
    router.aux_loss = AUX
    model = nn.Sequential(nn.Linear(D, D), moefy.MoE(D, 8, 4, router=router)).double()
    x = torch.randn(3, 5, D, dtype=torch.float64)
    for _ in range(2):
        model(x)
        assert router.l_aux is not None and router.l_aux.requires_grad
        assert torch.isclose(router.l_aux, closed_form(router(model[0](x))), rtol=1e-12)
    plain = clone(model)
    plain[1].router.aux_loss = None
    expected = explicit(plain, lambda m: m(x).square().mean())
    moefy.deliver_aux_loss(model)
    moefy.deliver_aux_loss(model)
    model(x).square().mean().backward()
    assert_same(gradients(model), expected, EXACT)


def test_transform_adds_none_unless_asked() -> None:
    plain, _ = lm_pair()
    assert all(r.aux_loss is None and r.l_aux is None for r in routers(plain).values())
    assert not plain._forward_hooks and not plain._forward_pre_hooks


# -- copies --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("copied", [clone, lambda m: pickle.loads(pickle.dumps(m))], ids=["copy", "pickle"])
def test_copies_deliver_their_own(copied: Any) -> None:
    plain, model = lm_pair()
    expected = explicit(plain, lambda m: lm_loss(m, *tokens()))
    lm_loss(model, *tokens())
    other = copied(model)
    lm_loss(model, *tokens())  # the original's forward is not mistaken for the copy's
    lm_loss(other, *tokens()).backward()
    assert_same(gradients(other), expected, EXACT)
    assert not gradients(model)


def test_a_graph_module_and_its_copy() -> None:
    x = batch("aligned")[""]
    plain, model = twin(lambda: fx.symbolic_trace(dense("aligned")), example_args=(x,))
    expected = explicit(plain, lambda m: scalar(m(x)))
    for module in (model, clone(model), clone(clone(model))):
        scalar(module(x)).backward()
        assert_same(gradients(module), expected, EXACT)
    copied = clone(model)
    moefy.undo(model, expert=0)
    assert not model._forward_hooks and not clone(model)._forward_hooks and copied._forward_hooks


def test_nested_in_another_module() -> None:
    plain, model = pair("aligned")
    inputs = batch("aligned")
    expected = explicit(plain, lambda m: scalar(call(m, inputs)))
    outer = nn.Sequential(model, nn.Identity())
    scalar(call(outer, inputs)).backward()
    assert_same(gradients(model), expected, EXACT)


def test_undo_takes_the_hooks_away() -> None:
    _, model = lm_pair()
    moefy.undo(model, expert=0)
    assert not model._forward_hooks and not model._forward_pre_hooks
    assert not model._forward_hooks_with_kwargs and not model._forward_hooks_always_called
    lm_loss(model, *tokens()).backward()


def test_a_failing_forward_keeps_no_graph() -> None:
    _, model = lm_pair()
    with pytest.raises(ValueError):
        model(tokens()[0], torch.zeros(1, dtype=torch.int64))
    assert all(r.aux_state.live is None and not r.aux_state.open for r in routers(model).values())


# -- the config ----------------------------------------------------------------------------------------------------
def test_config_round_trip() -> None:
    for aux in (None, 0.02, AuxLoss(weight=0.1, balance="gshard", scope="sequence", delivery="by_hand")):
        config = MoEConfig(num_experts=4, aux_loss=aux)
        assert MoEConfig.from_json(config.to_json()) == config
    assert AuxLoss.of(0.02) == AuxLoss(weight=0.02, balance="switch")
    with pytest.raises(UnknownOption, match="did you mean 'weight'"):
        AuxLoss.from_dict({"wieght": 1.0})


@pytest.mark.parametrize(
    "options",
    [
        {"weight": -1.0},
        {"weight": float("nan")},
        {"z_weight": "1"},
        {"balance": "swich"},
        {"scope": "batch"},
        {"batch_dim": -1},
        {"delivery": "hand"},
        {"balance": "importance", "scope": "global_batch"},
    ],
)
def test_bad_options(options: Any) -> None:
    with pytest.raises(ConfigError, match=r"aux_loss\."):
        AuxLoss(**options)
    with pytest.raises(ConfigError, match="aux_loss"):
        MoEConfig(num_experts=4, aux_loss="switch")  # type: ignore[arg-type]


def test_the_config_knows_all_balance_losses() -> None:
    from moefy.config.aux_loss import BALANCE

    assert set(BALANCE) == set(losses.BALANCE_LOSSES)
    for name, facts in BALANCE.items():
        if not facts.counted:
            with pytest.raises(ConfigError, match="scope"):
                AuxLoss(balance=name, scope="global_batch")
