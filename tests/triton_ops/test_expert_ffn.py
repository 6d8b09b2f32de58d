"""The expert FFN's kernels, forward and backward, against a float64 loop over tokens that knows nothing of them.

Under the interpreter fp32 and fp16 (bf16 products are wrong there); on a GPU bf16 too.
"""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from moefy.triton_ops import expert_ffn
from moefy.triton_ops.entry import entry
from moefy.triton_ops.expert_ffn import Experts
from moefy.triton_ops.shared import activations, blocks

ACTIVATIONS = {
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "relu": F.relu,
    "relu2": lambda x: F.relu(x) ** 2,
    "silu": F.silu,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "identity": lambda x: x,
}
TOLERANCE = {torch.float32: 3e-6, torch.float16: 2e-3, torch.bfloat16: 1.5e-2}
DTYPES = [torch.float32, torch.float16] + [torch.bfloat16] * torch.cuda.is_available()
PARAMETERS = ("w_gate", "b_gate", "w_up", "b_up", "w_down", "b_down")


@dataclasses.dataclass(frozen=True)
class Case:
    """T tokens, D in, H hidden, O out, E experts, K choices."""

    T: int = 37
    D: int = 48
    H: int = 40
    O: int = 32
    E: int = 5
    K: int = 2
    glu: str = "separate"
    bias: bool = True
    without: str = ""
    activation: str = "silu"
    routing: str = "random"
    in_place: bool = False
    dtype: torch.dtype = torch.float32


class Layer:
    """A case's tensors, on the device in the case's dtype."""

    def __init__(self, case: Case, device: str) -> None:
        self.case = case
        g = torch.Generator().manual_seed(0)
        T, D, H, O, E, K = case.T, case.D, case.H, case.O, case.E, case.K

        def draw(*shape: int, scale: float = 1.0) -> Tensor:
            return (torch.randn(shape, generator=g) * scale).to(device, case.dtype)

        self.x, self.grad = draw(T, D), draw(T, O)
        self.weights = torch.rand((T, K), generator=g).to(device)
        self.index = choose(case, g).to(device)
        ids = torch.where((self.index < 0) | (self.index >= E), E, self.index).reshape(-1)
        self.order = torch.argsort(ids, stable=True)
        counts = torch.bincount(ids, minlength=E + 1)[:E]
        self.offsets = counts.cumsum(0).to(torch.int32)
        merged = draw(E, 2 * H, D, scale=max(D, 1) ** -0.5)
        merged_bias = draw(E, 2 * H)
        up, gate = (
            (slice(H, None), slice(None, H))
            if case.glu != "merged_gate_last"
            else (slice(None, H), slice(H, None))
        )
        self.w: dict[str, Tensor | None] = dict.fromkeys(PARAMETERS)
        self.w |= {"w_up": merged[:, up], "w_down": draw(E, O, H, scale=H**-0.5)}
        if case.glu != "none":
            self.w["w_gate"] = merged[:, gate]
        if case.bias:
            self.w |= {"b_up": merged_bias[:, up], "b_down": draw(E, O)}
            self.w["b_gate"] = merged_bias[:, gate] if case.glu != "none" else None
        self.w |= {case.without: None} if case.without else {}
        if not case.glu.startswith("merged"):
            self.w = {name: None if w is None else w.contiguous() for name, w in self.w.items()}
        self.w_merged = merged if case.glu.startswith("merged") else None

    def run(self) -> dict[str, Tensor]:
        """Output and gradients of the kernels."""
        case, w = self.case, self.w
        experts = Experts(
            weights_TK=self.weights, order_N=self.order, offsets_E=self.offsets, **w,
            activation=case.activation, w_merged=self.w_merged,
        )  # fmt: skip
        rows, both = (
            self.order.shape[0],
            torch.empty((self.order.shape[0], 2 * case.H), dtype=case.dtype, device=self.x.device),
        )
        gate, up = (both[:, : case.H], both[:, case.H :])
        dboth = torch.empty(both.shape, dtype=both.dtype, device=both.device)
        halves = (dboth[:, : case.H], dboth[:, case.H :])
        if case.glu == "merged_gate_last":
            (up, gate), halves = (gate, up), halves[::-1]
        if not case.glu.startswith("merged"):
            gate, up, *halves = (
                torch.empty((rows, case.H), dtype=case.dtype, device=self.x.device) for _ in range(4)
            )
        has_gate = case.glu != "none"
        out = expert_ffn.forward(self.x, experts, gate if has_gate else None, up)
        wanted = {"x": True, "weights": True, **{name: v is not None for name, v in w.items()}}
        if self.w_merged is not None:
            wanted |= {"w_gate": False, "b_gate": False}
        dall = dboth if case.glu.startswith("merged") else halves[1]
        dentry = (halves[0] if has_gate else None, halves[1], dall)
        if case.in_place:
            dentry = (gate if has_gate else None, up, both if case.glu.startswith("merged") else up)
        pre = (gate if has_gate else None, up)
        found = {"out": out, **expert_ffn.backward(self.grad, self.x, experts, *pre, dentry, wanted)}
        found["x_TD"], found["weights_TK"] = found.pop("x"), found.pop("weights")
        if self.w_merged is not None:
            for name in ("w", "b"):
                whole = found.pop(f"{name}_up", None)
                if whole is not None:
                    first, last = whole.view(case.E, 2, case.H, -1).unbind(1)
                    gate_first = case.glu == "merged_gate_first"
                    pair = (first, last) if gate_first else (last, first)
                    for n, v in zip(("gate", "up"), pair, strict=True):
                        found[f"{name}_{n}"] = v.reshape(self.w[f"{name}_up"].shape)
        return found


def choose(case: Case, g: torch.Generator) -> Tensor:
    """[T, K] expert ids."""
    T, E, K = case.T, case.E, case.K
    chosen = (
        torch.stack([torch.randperm(E, generator=g)[:K] for _ in range(T)])
        if T
        else torch.zeros((0, K), dtype=torch.int64)
    )
    if case.routing == "one expert":
        chosen[:, 0] = E - 1
        chosen[:, 1:] = 0
    if case.routing == "dropped":
        chosen[::3, 0] = E + 7
        chosen[1::4, -1] = -1
    return chosen


def oracle(layer: Layer) -> dict[str, Tensor]:
    """The same in float64, token by token, by autograd."""
    case = layer.case
    leaf = {n: v.detach().cpu().double().requires_grad_() for n, v in layer.w.items() if v is not None}
    x = layer.x.cpu().double().requires_grad_()
    weights = layer.weights.cpu().double().requires_grad_()
    act = ACTIVATIONS[case.activation]
    rows = []
    for t in range(case.T):
        total = torch.zeros(case.O, dtype=torch.float64)
        for k in range(case.K):
            e = int(layer.index[t, k])
            if not 0 <= e < case.E:
                continue
            pick = {n: v[e] for n, v in leaf.items()}
            up = F.linear(x[t], pick["w_up"], pick.get("b_up"))
            hidden = (
                act(F.linear(x[t], pick["w_gate"], pick.get("b_gate"))) * up if "w_gate" in pick else act(up)
            )
            total = total + weights[t, k] * F.linear(hidden, pick["w_down"], pick.get("b_down"))
        rows.append(total)
    out = (
        torch.stack(rows)
        if rows
        else (x.sum() + weights.sum()) * torch.zeros((0, case.O), dtype=torch.float64)
    )
    named = {"x_TD": x, "weights_TK": weights, **leaf}
    grads = torch.autograd.grad(out, list(named.values()), layer.grad.cpu().double(), allow_unused=True)
    zeros = (torch.zeros_like(v) if g is None else g for g, v in zip(grads, named.values(), strict=True))
    return {"out": out.detach(), **dict(zip(named, zeros, strict=True))}


def check(case: Case, device: str, guard_bands) -> None:
    layer = Layer(case, device)
    with guard_bands():
        found = layer.run()
    expected = oracle(layer)
    assert found.keys() == expected.keys()
    for name, want in expected.items():
        got = found[name].cpu().double()
        assert got.isfinite().all(), name
        error = float((got - want).norm() / want.norm().clamp_min(1e-12)) if want.numel() else 0.0
        assert error <= TOLERANCE[case.dtype], f"{name}: {error:.1e}"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("glu", ["none", "separate", "merged_gate_first", "merged_gate_last"])
def test_equals_the_token_loop(glu, dtype, device, guard_bands):
    check(Case(glu=glu, dtype=dtype), device, guard_bands)


@pytest.mark.parametrize("glu", ["none", "separate"])
@pytest.mark.parametrize("activation", activations.ACTIVATIONS)
def test_every_activation(activation, glu, device, guard_bands):
    check(Case(T=9, D=16, H=24, O=16, E=3, activation=activation, glu=glu), device, guard_bands)


@pytest.mark.parametrize("routing", ["one expert", "dropped"])
@pytest.mark.parametrize("activation", ["silu", "sigmoid"])
def test_uneven_routing(routing, activation, device, guard_bands):
    check(Case(T=75, routing=routing, activation=activation, glu="none"), device, guard_bands)
    check(Case(T=21, routing=routing, glu="merged_gate_first", bias=False), device, guard_bands)


ODD = {
    "no tokens": Case(T=0),
    "one token, one expert": Case(T=1, E=1, K=1),
    "odd widths": Case(D=33, H=17, O=19, dtype=torch.float16),
    "narrow": Case(D=3, H=1, O=2, K=3),
    "more experts than rows": Case(T=3, E=130, K=1),
    "every expert": Case(T=5, E=4, K=4, glu="none"),
}


@pytest.mark.parametrize("name", ODD)
def test_odd_sizes(name, device, guard_bands):
    check(ODD[name], device, guard_bands)


WIDE = {
    "whole tiles": Case(T=256, D=128, H=256, O=256, E=2, glu="merged_gate_first"),
    "uneven": Case(T=230, D=208, H=136, O=192, E=3, glu="separate"),
    "merged, in place": Case(T=250, D=64, H=264, O=256, E=3, glu="merged_gate_last", in_place=True),
    "plain": Case(T=210, D=192, H=384, O=192, E=3, glu="none", activation="gelu_tanh"),
    "no biases": Case(T=330, D=64, H=512, O=256, E=2, glu="none", bias=False, activation="relu2"),
    "dropped": Case(T=240, D=80, H=128, O=192, E=3, routing="dropped", activation="sigmoid"),
    "one expert": Case(T=170, D=128, H=128, O=320, E=5, routing="one expert", glu="merged_gate_first"),
    "narrow": Case(T=200, D=128, H=128, O=64, E=3),
}


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("name", WIDE)
def test_rows_enough_for_wide_tiles(name, dtype, device, guard_bands):
    """Tiles of 128 rows; on a Hopper card the kernels of ``triton_ops.hopper``."""
    check(dataclasses.replace(WIDE[name], dtype=dtype), device, guard_bands)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="interpreted programs take many tiles as it is")
@pytest.mark.parametrize("processors", [1, 3])
@pytest.mark.parametrize("name", WIDE)
def test_programs_that_take_many_tiles(name, processors, device, guard_bands, monkeypatch):
    """A program's barriers and stages go on from tile to tile."""
    kernels = ("entry", "linear", "hidden_grad", "weight_grad")
    for module in (*kernels, *(f"hopper.{kernel}" for kernel in kernels)):
        monkeypatch.setattr(f"moefy.triton_ops.{module}.processors", lambda device: processors)
    check(dataclasses.replace(WIDE[name], dtype=torch.bfloat16), device, guard_bands)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("T", [100, 130])
@pytest.mark.parametrize("glu", ["none", "separate"])
def test_some_tens_of_rows_an_expert(glu, T, dtype, device, guard_bands):
    """Tiles of 64 rows in the forward; in the backward of 32, from 48 rows an expert on of 128."""
    case = Case(T=T, D=72, H=136, O=192, E=5, glu=glu, dtype=dtype)
    assert blocks.blocks("linear", dtype, case.T * case.K, case.E, torch.device("cpu")).m == 64
    check(case, device, guard_bands)


@pytest.mark.parametrize("glu", ["none", "separate", "merged_gate_first", "merged_gate_last"])
def test_gradients_may_take_the_place_of_the_pre_activations(glu, device, guard_bands):
    check(Case(glu=glu, in_place=True), device, guard_bands)


def test_hot_experts_come_first_and_counters_are_zero(device):
    from moefy.triton_ops.shared.tiles import COUNTERS, schedule

    counts_E = torch.tensor([3, 40, 0, 5, 90, 2])  # the mean is 23.3: only expert 4 has twice as many
    made = schedule(counts_E.cumsum(0).int().to(device), int(counts_E.sum()), 16)
    E = len(counts_E)
    assert made.experts[4 * (E + 1) : 4 * (E + 1) + E].tolist() == [4, 0, 1, 2, 3, 5]
    first = made.next_counter()
    assert not made.experts[first : first + COUNTERS].any() and made.next_counter() == first + 1


def test_a_backward_has_fewer_launches_than_counters():
    from moefy.triton_ops.shared.tiles import COUNTERS

    for width in (1, 512, 2048, 12288, 65536, 100_000):
        blocks_ = expert_ffn._column_blocks(1 << 28, torch.empty((0, width)))
        assert 1 + 2 * len(blocks_) <= COUNTERS
        ends = [end for _, end in blocks_]
        assert [0, *ends[:-1]] == [first for first, _ in blocks_] and ends[-1] == width


@pytest.mark.parametrize("glu", ["separate", "merged_gate_last"])
def test_x_is_copied_in_blocks_of_columns(glu, device, guard_bands, monkeypatch):
    monkeypatch.setattr(expert_ffn, "MAX_COPY", 1)
    case = Case(T=9, D=1032, glu=glu)
    assert len(expert_ffn._column_blocks(18, torch.empty(9, case.D))) == 3
    check(case, device, guard_bands)


@pytest.mark.parametrize(
    "change", [{"store": True}, {"flatten": True}, {"pair": False}, {"pieces": 4}, {"group": 1}], ids=str
)
def test_every_form_of_a_kernel(change, device, guard_bands, monkeypatch):
    """Whole and partial tiles, by descriptor and by pointer, one operand or two."""
    monkeypatch.setattr(
        blocks, "_FULL_PRECISION", dataclasses.replace(blocks._FULL_PRECISION, m=32, n=32, k=16, **change)
    )
    check(Case(T=75), device, guard_bands)


def test_without_descriptors(device, guard_bands, monkeypatch):
    """The form for devices without a tensor memory accelerator."""
    for module in ("entry", "linear", "hidden_grad", "weight_grad"):
        monkeypatch.setattr(f"moefy.triton_ops.{module}.has_tma", lambda device: False)
    check(Case(), device, guard_bands)
    check(Case(glu="none", dtype=torch.float16), device, guard_bands)
    monkeypatch.setattr(f"{entry.__module__}.COPY_TOKENS_FROM", 1)  # wide experts: nothing to copy for
    check(Case(), device, guard_bands)


@pytest.mark.parametrize("waiting", [-1, 384 << 20])
def test_copied_rows(waiting, device, guard_bands, monkeypatch):
    """Wide experts read copies of the rows, and the gradient of the exit's matrix may wait for an entry's."""
    monkeypatch.setattr(expert_ffn, "COPY_GRADIENT_FROM", 1)
    monkeypatch.setattr(expert_ffn, "MAX_WAITING", waiting)
    monkeypatch.setattr(f"{entry.__module__}.COPY_TOKENS_FROM", 1)
    check(Case(), device, guard_bands)
    check(Case(T=9, D=0), device, guard_bands)


@pytest.mark.parametrize("without", ["b_up", "b_gate", "b_down"])
def test_some_biases(without, device, guard_bands):
    check(Case(T=9, without=without), device, guard_bands)


def test_the_bits_repeat(device):
    layer = Layer(Case(T=75), device)
    first = layer.run()
    for _ in range(3):
        assert all(torch.equal(a, b) for a, b in zip(first.values(), layer.run().values(), strict=True))


def test_planted_faults_are_caught(device, guard_bands):
    """Two experts' rows swapped, one routing weight dropped, offsets shifted by one."""
    for plant in ("swap", "weight", "shift"):
        layer = Layer(Case(), device)
        expected = oracle(layer)
        if plant == "swap":
            layer.w["w_up"] = layer.w["w_up"][[1, 0, *range(2, layer.case.E)]].contiguous()
        elif plant == "weight":
            layer.weights[3, 1] = 0
        else:
            layer.offsets[1] += 1
        got = layer.run()["out"].cpu().double()
        assert float((got - expected["out"]).norm() / expected["out"].norm()) > 1e-3, plant
        assert math.isfinite(float(got.norm()))
