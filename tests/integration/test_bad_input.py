"""What cannot be transformed gets the named error, and the model stays as it was, bit by bit."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import moefy
from integration.models import (
    AlignedBlock,
    D,
    H,
    InlineBlock,
    InlineGLUBlock,
    Stack,
    batch,
    call,
    dense,
    llama,
    moe,
)
from integration.snapshot import Snapshot
from moefy import errors

X = torch.randn(2, 6, D)


def small(block: Callable[[], nn.Module] = AlignedBlock) -> nn.Module:
    """A stack in a telling state: mixed modes, gradients present."""
    torch.manual_seed(1)
    model = Stack(block)
    call(model, {"": X}).sum().backward()
    model.layers[0].eval()
    return model


def refused(
    model: Any, error: type[Exception], *parts: str, snapshot: Snapshot | None = None, **options: Any
) -> Exception:
    """``transform`` raises exactly ``error`` with all ``parts`` in its text, and nothing changed."""
    options = {"num_experts": 4, "example_args": (X,), **options}
    before = snapshot or Snapshot(model)
    with pytest.raises(errors.MoefyError) as caught:
        moefy.transform(model, **options)
    before.check(model)
    assert type(caught.value) is error, repr(caught.value)
    for part in parts:
        assert part in str(caught.value), f"{part!r} not in: {caught.value}"
    return caught.value


# -- nothing to find -------------------------------------------------------------------------------------------------
class Head(nn.Module):
    """No residual: a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(D, H), nn.ReLU(), nn.Linear(H, D))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


def test_no_ffn_lists_the_candidates() -> None:
    error = refused(
        Head(), errors.NoFFNFound, "Head has no feed-forward network", "refused candidates", "net: "
    )
    (candidate,) = error.candidates
    assert candidate.code == "no-residual"
    assert candidate.fqn == "net"
    assert str(candidate.reason) in str(error)


def test_no_ffn_and_no_candidate() -> None:
    error = refused(
        nn.LayerNorm(D), errors.NoFFNFound, "LayerNorm has no feed-forward network", "no candidate"
    )
    assert error.candidates == []


def test_everything_excluded() -> None:
    error = refused(small(), errors.NoFFNFound, "left out by exclude", "layers.0.mlp", exclude="*")
    assert [c.code for c in error.candidates] == ["excluded", "excluded"]


# -- options ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("function", [moefy.transform, moefy.find, moefy.report])
@pytest.mark.parametrize(
    ("wrong", "right"), [("topk", "top_k"), ("expert_nois", "expert_noise"), ("sed", "seed")]
)
def test_unknown_option_suggests_the_nearest(function: Any, wrong: str, right: str) -> None:
    model = small()
    before = Snapshot(model)
    with pytest.raises(errors.UnknownOption) as caught:
        function(model, 4, example_args=(X,), **{wrong: 1})
    before.check(model)
    assert repr(wrong) in str(caught.value)
    assert f"did you mean {right!r}?" in str(caught.value)
    assert isinstance(caught.value, TypeError)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"num_experts": 2, "top_k": 3}, "top_k: got 3; expected 1 <= top_k <= num_experts = 2"),
        ({"num_experts": 1, "top_k": 2}, "top_k: got 2; expected 1 <= top_k <= num_experts = 1"),
        ({"num_experts": 4, "top_k": 0}, "top_k: got 0"),
        ({"num_experts": 0}, "num_experts: got 0; expected 1 <= num_experts"),
        ({"num_experts": -3}, "num_experts: got -3"),
        ({"num_experts": None}, "num_experts: got None"),
        ({"num_experts": 4.0}, "num_experts: got 4.0; expected an int"),
        ({"num_experts": "8"}, "num_experts: got '8'; expected an int"),
        ({"num_experts": True}, "num_experts: got True; expected an int"),
        ({"num_experts": 10**6}, "num_experts: got 1000000"),
        ({"router_std": -1.0}, "router_std: got -1.0"),
        ({"expert_noise": float("nan")}, "expert_noise: got nan"),
        ({"seed": 1.5}, "seed: got 1.5"),
        ({"config": {"num_experts": 4}}, "config: got {'num_experts': 4}; expected a moefy.MoEConfig"),
    ],
    ids=str,
)
def test_option_out_of_its_domain(options: dict[str, Any], text: str) -> None:
    error = refused(small(), errors.ConfigError, text, **options)
    assert isinstance(error, ValueError)


@pytest.mark.parametrize("option", ["include", "exclude"])
def test_wrong_glob_suggests_the_nearest(option: str) -> None:
    refused(
        small(),
        errors.PatternError,
        f"{option}: 'layers.0.mpl' matches no candidate; did you mean 'layers.0.mlp'?",
        **{option: "layers.0.mpl"},
    )
    refused(
        small(),
        errors.PatternError,
        "'layers.7*'",
        "did you mean 'layers.",
        **{option: ["layers.0*", "layers.7*"]},
    )
    refused(small(), errors.PatternError, option, "3", **{option: [3]})


# -- the model -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["aligned", "inline", "glu"])
def test_already_transformed(name: str) -> None:
    model = moe(name, torch.float32)
    call(model, batch(name, dtype=torch.float32)).sum().backward()
    fqn = {"aligned": "layers.0.mlp", "inline": "layers.0.fc1", "glu": "layers.0.w1"}[name]
    refused(
        model, errors.AlreadyTransformed, f"{fqn} is already a Mixture-of-Experts", "moefy.undo(model) first"
    )
    refused(nn.Sequential(model), errors.AlreadyTransformed, f"0.{fqn} is already")
    refused(model.layers[0], errors.AlreadyTransformed, fqn.removeprefix("layers.0."))


@pytest.mark.parametrize(
    "thing",
    [None, 3, "model", lambda x: x, torch.ones(2), nn.Linear],
    ids=["none", "int", "str", "lambda", "tensor", "class"],
)
@pytest.mark.parametrize("function", [moefy.transform, moefy.find, moefy.report])
def test_no_module(function: Any, thing: Any) -> None:
    with pytest.raises(errors.ConfigError, match=r"model: got .*; expected an nn.Module"):
        function(thing, 4, example_args=(X,))
    with pytest.raises(errors.ConfigError, match=r"model: got .*; expected an nn.Module"):
        moefy.undo(thing)


class Failing(Stack):
    """Its own forward raises after it has done something."""

    def forward(self, x: Tensor) -> Tensor:
        super().forward(x)
        raise ValueError("the sky is falling")


def test_a_model_that_fails_its_own_forward() -> None:
    torch.manual_seed(1)
    model = Failing(AlignedBlock)
    error = refused(model, errors.ModelForwardError, "Failing", "before any rewrite", "the sky is falling")
    assert isinstance(error.__cause__, ValueError)


def test_inputs_of_the_wrong_width() -> None:
    error = refused(small(), errors.ModelForwardError, "Stack", example_args=(torch.randn(2, 6, D + 1),))
    assert isinstance(error.__cause__, RuntimeError)
    refused(small(), errors.ModelForwardError, "nonsense", example_kwargs={"nonsense": 1})


class Opaque(nn.Module):
    """No inputs can be guessed for it, nor for its only child."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = AlignedBlock()
        self.inner.forward = None  # type: ignore[assignment]

    def forward(self, first: Any, second: Any) -> Any:
        raise KeyError(first["key"])


def test_no_inputs_can_be_derived() -> None:
    refused(Opaque(), errors.ExampleInputsNeeded, "Opaque", "example_args=(...)", "Tried:", example_args=())


def test_torchscript_is_refused() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = torch.jit.script(nn.Sequential(nn.Linear(D, H), nn.ReLU(), nn.Linear(H, D)))
    with pytest.raises(errors.ConfigError, match="TorchScript"):
        moefy.transform(model, 4, example_args=(X,))


# -- layers that cannot become experts -------------------------------------------------------------------------------
@pytest.mark.parametrize("block", [AlignedBlock, InlineBlock, InlineGLUBlock])
def test_dynamically_quantised_layers(block: type[nn.Module]) -> None:
    if "fbgemm" not in torch.backends.quantized.supported_engines:
        pytest.fail("no quantised engine in this build of torch")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = torch.ao.quantization.quantize_dynamic(small(block).eval(), {nn.Linear}, torch.qint8)
    output = model(X)
    with pytest.raises(errors.NoFFNFound) as caught:
        moefy.transform(model, 4, example_args=(X,))
    assert torch.equal(model(X), output)
    assert {c.code for c in caught.value.candidates} == {"quantized"}, caught.value
    assert "quanti" in str(caught.value)


class Int8Linear(nn.Module):
    """Weight-only quantisation as many libraries write it: int8 weight, scale, dequantised in the forward."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        scale = linear.weight.detach().abs().amax(1, keepdim=True) / 127
        self.register_buffer("weight", (linear.weight.detach() / scale).round().to(torch.int8))
        self.register_buffer("scale", scale)
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype) * self.scale, self.bias)


def test_weight_only_quantised_layers() -> None:
    model = small()
    for layer in model.layers:
        layer.mlp.up, layer.mlp.down = Int8Linear(layer.mlp.up), Int8Linear(layer.mlp.down)
    error = refused(model, errors.NoFFNFound, "layers.0.mlp")
    assert {c.code for c in error.candidates} <= {"quantized", "computed-weight"}


class LoRALinear(nn.Module):
    """``base(x) + B(A(x))``, as everybody writes it."""

    def __init__(self, base: nn.Linear, rank: int = 2) -> None:
        super().__init__()
        self.base_layer = base
        self.lora_A = nn.Linear(base.in_features, rank, bias=False)
        self.lora_B = nn.Linear(rank, base.out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base_layer(x) + self.lora_B(self.lora_A(x))


@pytest.mark.parametrize("which", ["both", "entry", "exit"])
@pytest.mark.parametrize("block", [AlignedBlock, InlineBlock])
def test_lora_layers(block: type[nn.Module], which: str) -> None:
    model = small(block)
    for layer in model.layers:
        owner, (up, down) = (layer.mlp, ("up", "down")) if block is AlignedBlock else (layer, ("fc1", "fc2"))
        for name in {"both": (up, down), "entry": (up,), "exit": (down,)}[which]:
            setattr(owner, name, LoRALinear(getattr(owner, name)))
    error = refused(model, errors.NoFFNFound, "LoRA")
    assert "lora" in {c.code for c in error.candidates}


def test_one_lora_layer_is_left_and_the_other_rewritten() -> None:
    model = small()
    model.layers[0].mlp.up = LoRALinear(model.layers[0].mlp.up)
    moefy.transform(model, 4, example_args=(X,))
    layers = moefy.report(model).layers
    assert {(r.fqn, r.action) for r in layers if r.action == "moe"} == {("layers.1.mlp", "moe")}
    assert "lora" in {r.code for r in layers}


@pytest.mark.zoo("peft", "transformers")
@pytest.mark.parametrize("targets", [["up_proj", "down_proj", "gate_proj"], ["down_proj"]], ids=str)
def test_peft_layers(targets: list[str]) -> None:
    peft = pytest.importorskip("peft")
    inputs = batch("llama")
    model = peft.get_peft_model(llama(), peft.LoraConfig(r=2, target_modules=targets))
    error = refused(model, errors.NoFFNFound, "LoRA", example_args=(), example_kwargs=inputs)
    assert "lora" in {c.code for c in error.candidates}


@pytest.mark.parametrize("kind", ["forward", "pre", "backward", "instance"])
@pytest.mark.parametrize("block", [AlignedBlock, InlineBlock])
def test_hooks_on_linears(block: type[nn.Module], kind: str) -> None:
    """A hook on a replaced module would silently be lost."""
    model = small(block)
    for layer in model.layers:
        linear = layer.mlp.up if block is AlignedBlock else layer.fc1
        if kind == "forward":
            linear.register_forward_hook(lambda m, a, y: y * 2)
        elif kind == "pre":
            linear.register_forward_pre_hook(lambda m, a: a)
        elif kind == "backward":
            linear.register_full_backward_hook(lambda m, i, o: None)
        else:
            linear.forward = linear.forward
    error = refused(model, errors.NoFFNFound, "hook")
    assert {c.code for c in error.candidates} == {"unsupported-hook"}


def test_hooks_on_the_owner_and_on_parts_of_it() -> None:
    model = small()
    model.layers[0].mlp.register_forward_hook(lambda m, a, y: y)
    model.layers[1].mlp.act.register_forward_hook(lambda m, a, y: y * 2)
    error = refused(model, errors.NoFFNFound, "hook", include="layers.0*")
    assert {c.fqn: c.code for c in error.candidates}["layers.0.mlp"] == "unsupported-hook"
    reference = copy.deepcopy(model)
    found = {c.fqn: c for c in moefy.find(model, example_args=(X,))}
    if found["layers.1.mlp"].accepted:  # then the hook must still act
        moefy.transform(model, 4, example_args=(X,))
        torch.testing.assert_close(model(X), reference(X))


def test_parametrized_linears() -> None:
    """Weight norm computes the weight at each call: no parameter to stack."""
    model = small()
    for layer in model.layers:
        nn.utils.parametrizations.weight_norm(layer.mlp.up)
    error = refused(model, errors.NoFFNFound, "layers.0.mlp")
    assert error.candidates


def test_weight_tied_to_another_module() -> None:
    model = small(InlineGLUBlock)
    model.layers[0].w1.weight = model.layers[1].w1.weight
    error = refused(model, errors.NoFFNFound, "layers.0.w1.weight is also used elsewhere")
    assert {c.code for c in error.candidates} == {"shared-weight"}


# -- name clashes ----------------------------------------------------------------------------------------------------
def clash_in_entry() -> nn.Module:
    model = small(InlineBlock)
    model.layers[1].fc1.router = nn.Identity()
    return model


def clash_as_buffer() -> nn.Module:
    model = small(InlineBlock)
    model.layers[1].fc1.register_buffer("router", torch.ones(1))
    return model


def clash_in_owner() -> nn.Module:
    model = small()
    model.layers[1].mlp.router = nn.Identity()
    return model


def clash_as_attribute() -> nn.Module:
    model = small()
    model.layers[1].mlp.router = "a plain attribute"
    return model


@pytest.mark.parametrize("build", [clash_in_entry, clash_as_buffer, clash_in_owner, clash_as_attribute])
def test_name_clash(build: Callable[[], nn.Module]) -> None:
    """The second layer clashes after the first was built: still nothing changes."""
    error = refused(
        build(), errors.NameClash, "already has an attribute 'router'", "exclude the layer", "layers.1."
    )
    assert isinstance(error, ValueError)


def test_the_way_out_of_a_name_clash_works() -> None:
    """What the error says to do does it."""
    for build in (clash_in_entry, clash_in_owner):
        model = build()
        with pytest.raises(errors.NameClash) as caught:
            moefy.transform(model, 4, example_args=(X,))
        advice = str(caught.value).rpartition("exclude=['")[2].rstrip("]'")
        moefy.transform(model, 4, example_args=(X,), exclude=[advice])
        assert [r.fqn for r in moefy.report(model).layers if r.action == "moe"] != []


# -- the check -------------------------------------------------------------------------------------------------------
class RandomInEval(Stack):
    """Adds noise in eval mode too."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 0.1 * torch.randn(x.shape[:2])[..., None]


class Counting(Stack):
    """Its output depends on how often it was called, through a closure that nobody can see."""

    def __init__(self, block: Callable[[], nn.Module]) -> None:
        super().__init__(block)
        calls: list[int] = []
        self.count = lambda: calls.append(1) or len(calls)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.count()


def test_a_failed_check_restores_the_model() -> None:
    torch.manual_seed(1)
    model = Counting(AlignedBlock)
    error = refused(model, errors.CheckFailed, "relative norm", "The model was restored", "check=False")
    assert error.error > error.tolerance == 1e-5
    moefy.transform(model, 4, example_args=(X,), check=False)
    assert moefy.report(model).check_error is None


def test_a_model_that_is_random_in_eval_mode() -> None:
    """Both runs see the same random numbers, or the named error comes; never a half-transformed model."""
    torch.manual_seed(1)
    model = RandomInEval(AlignedBlock)
    before = Snapshot(model)
    try:
        moefy.transform(model, 4, example_args=(X,))
    except errors.CheckFailed as error:
        before.check(model)
        assert "random in eval mode" in str(error)
    else:
        before.check_random()
        assert moefy.report(model).check_error <= 1e-5


# -- empty ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("block", [AlignedBlock, InlineBlock, InlineGLUBlock])
def test_empty_batch(block: type[nn.Module]) -> None:
    """Transform on no tokens works or is refused by name; a transformed model takes an empty batch."""
    model = small(block)
    moefy.transform(model, 4, example_args=(X[:0],))
    reference = small(block)
    model.train()
    torch.testing.assert_close(model(X), reference.train()(X))
    x = X[:0].clone().requires_grad_()
    output = model(x)
    assert output.shape == (0, 6, 5)
    model.zero_grad()
    output.sum().backward()
    assert x.grad is not None
    assert x.grad.shape == x.shape
    experts = [p for n, p in model.named_parameters() if p.dim() == 3]
    assert experts
    assert all(p.grad is not None and not bool(p.grad.any()) for p in experts)


def test_undo_of_what_was_not_transformed() -> None:
    model = small()
    before = Snapshot(model)
    with pytest.raises(errors.NotTransformed, match="Stack holds no layer made by moefy"):
        moefy.undo(model)
    before.check(model)


def test_every_error_is_a_moefy_error_and_a_builtin_one() -> None:
    named = [e for e in vars(errors).values() if isinstance(e, type) and e.__module__ == errors.__name__]
    assert len(named) > 15
    for error in named:
        assert issubclass(error, errors.MoefyError)
        if error is not errors.MoefyError:
            assert issubclass(error, ValueError | TypeError | RuntimeError), error


@pytest.mark.parametrize("name", ["aligned", "inline", "glu", "encoder"])
def test_wrong_inputs_of_a_transformed_model(name: str) -> None:
    """The model's own error or moefy's, never garbage."""
    model = moe(name, torch.float32)
    with pytest.raises((RuntimeError, ValueError, AssertionError)):
        model(torch.randn(2, 6, D + 1))
    with torch.no_grad():
        assert torch.equal(call(model, {"": X}), call(model, {"": X}))
    assert dense(name) is not None
