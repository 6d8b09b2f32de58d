"""Random cases of every op against a float64 loop over tokens and choices, written here.

Over 2000 cases with ``--hypothesis-profile=long`` (``.ci/matrix``, before a release), a quarter of them without.

T tokens, D model width, H hidden width, E experts, K top-k.

The loop uses only the experts' ids: no sorting, no offsets, nothing of moefy. The tolerance is derived, not chosen: an
element may be off by ``c * u * S``, where u is the unit roundoff of the dtype and S bounds the sum of the absolute
values of all terms that went into it. S comes from the same loop on absolute values, with each activation replaced by
a polynomial with non-negative coefficients that dominates |act|, and whose derivative dominates |act'| plus what a
rounded argument can change in it. So S also exists for every gradient. Where an activation has a kink (relu), inputs
are small integers: then pre-activations are exact in every dtype and both sides see the same side of the kink.

All of it runs with fresh memory filled with NaN, and with NaN in the gaps of strided tensors.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from moefy import ops

EXAMPLES = {"layer": 1500, "sort_by_expert": 600}
SHARE = 1 if settings.get_current_profile_name() == "long" else 4  # one case in this many
C_OUT, C_GRAD = 8, 16
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
UNIT = {torch.float64: 2**-53, torch.float32: 2**-24, torch.bfloat16: 2**-8, torch.float16: 2**-11}
PATTERNS = ("uniform", "distinct", "all_one", "last_one", "ties", "even_only", "dropped", "none")
LAYOUTS = ("contiguous", "transposed", "gaps", "expanded")
KINKED = ("relu", "relu2")


@dataclasses.dataclass(frozen=True)
class Case:
    tokens: int
    d: int
    h: int
    experts: int
    top_k: int
    dtype: torch.dtype
    pattern: str
    layouts: tuple[str, ...]
    activation: str
    glu: str
    bias: bool
    seed: int


@st.composite
def case_strategy(draw: st.DrawFn) -> Case:
    experts = draw(st.one_of(st.integers(1, 9), st.sampled_from([12, 16, 33])))
    # The loop's time is tokens * top_k: many tokens or many choices, seldom both.
    tokens = draw(st.one_of(st.integers(0, 4), st.integers(0, 9), st.integers(0, 33)))
    return Case(
        tokens=tokens,
        d=draw(st.integers(1, 9)),
        h=draw(st.integers(1, 9)),
        experts=experts,
        top_k=draw(st.integers(1, min(experts, 33 if tokens <= 1 else 9 if tokens <= 4 else 3))),
        dtype=draw(st.sampled_from(DTYPES)),
        pattern=draw(st.sampled_from(PATTERNS)),
        layouts=draw(st.tuples(*[st.sampled_from(LAYOUTS)] * 4)),
        activation=draw(st.sampled_from(sorted(ops.ACTIVATIONS))),
        glu=draw(st.sampled_from(ops.GLU_FORMS)),
        bias=draw(st.booleans()),
        seed=draw(st.integers(0, 2**31 - 1)),
    )


# ---- the independent reference ------------------------------------------------------------------

SQRT_HALF = math.sqrt(0.5)
FORMULAS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": lambda x: 0.5 * x * (1 + torch.erf(x * SQRT_HALF)),
    "gelu_tanh": lambda x: 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    "quick_gelu": lambda x: x / (1 + torch.exp(-1.702 * x)),
    "relu": lambda x: x * (x > 0),
    "relu2": lambda x: x * x * (x > 0),
    "silu": lambda x: x / (1 + torch.exp(-x)),
    "sigmoid": lambda x: 1 / (1 + torch.exp(-x)),
    "tanh": lambda x: 1 - 2 / (1 + torch.exp(2 * x)),
    "identity": lambda x: x,
}
# |act| <= 1 + 2s + s^2/2 for |x| <= s; |act'| <= 1.13 and |act''| <= 0.86 <= 1 for all the smooth ones.
BOUNDS: dict[str, Callable[[Tensor], Tensor]] = {
    **dict.fromkeys(FORMULAS, lambda s: 1 + 2 * s + 0.5 * s * s),
    "relu": lambda s: s,
    "relu2": lambda s: 2 * s * s,
    "identity": lambda s: s,
}


def affine(weight_OI: Tensor, bias_O: Tensor | None, x_I: Tensor) -> Tensor:
    y_O = weight_OI @ x_I
    return y_O if bias_O is None else y_O + bias_O


def expert_loop(
    t: dict[str, Tensor | None], ids_TK: list[list[int]], act: Callable[[Tensor], Tensor], glu: str
) -> Tensor:
    """Token by token, choice by choice."""
    experts, width = t["w_down"].shape[:2]
    # unbind once: indexing under autograd would make a full-size zero gradient per use.
    split = {n: None if v is None or v.dim() < 2 else v.unbind(0) for n, v in t.items()}
    pick = lambda n, e: None if split[n] is None else split[n][e]  # noqa: E731
    rows = []
    for token, ids in enumerate(ids_TK):
        y_D = t["x"].new_zeros(width)
        x_D = split["x"][token]
        for k, e in enumerate(ids):
            if not 0 <= e < experts:
                continue
            up = affine(pick("w_up", e), pick("b_up", e), x_D)
            if glu == "none":
                hidden = act(up)
            elif glu == "separate":
                hidden = act(affine(pick("w_gate", e), pick("b_gate", e), x_D)) * up
            else:
                half = len(up) // 2
                first, last = up[:half], up[half:]
                hidden = act(first) * last if glu == "merged_gate_first" else first * act(last)
            y_D = y_D + split["weights"][token][k] * affine(pick("w_down", e), pick("b_down", e), hidden)
        rows.append(y_D)
    out_TD = torch.stack(rows) if rows else t["x"].new_zeros(0, width)
    return out_TD + 0 * t["x"].sum()  # part of the graph even when every slot is dropped


# ---- making a case ------------------------------------------------------------------------------


def lay_out(value: Tensor, layout: str) -> Tensor:
    """The same numbers (for "expanded": the first slice everywhere) in another memory layout."""
    if layout == "transposed":
        return value.transpose(0, -1).contiguous().transpose(0, -1)
    if layout == "gaps":
        wide = torch.full((*value.shape, 3), float("nan"), dtype=value.dtype)
        wide[..., 1] = value
        return wide[..., 1]
    if layout == "expanded" and value.shape[0]:
        return value[:1].expand(value.shape)
    return value


def draw_ids(case: Case, generator: torch.Generator) -> Tensor:
    T, E, K = case.tokens, case.experts, case.top_k
    any_ids = torch.randint(0, E, (T, K), generator=generator)
    if case.pattern == "distinct":
        return torch.rand(T, E, generator=generator).argsort(1)[:, :K]
    if case.pattern == "all_one":
        return torch.zeros_like(any_ids)
    if case.pattern == "last_one":
        return torch.full_like(any_ids, E - 1)
    if case.pattern == "ties":
        return any_ids[:, :1].expand(T, K)
    if case.pattern == "even_only":
        return any_ids // 2 * 2
    if case.pattern == "dropped":
        strange = torch.tensor([-1, E, E + 5, -(2**63), 2**63 - 1])
        chosen = strange[torch.randint(0, 5, (T, K), generator=generator)]
        return torch.where(torch.rand(T, K, generator=generator) < 0.4, chosen, any_ids)
    return torch.full_like(any_ids, -1) if case.pattern == "none" else any_ids


def draw_tensors(case: Case) -> tuple[dict[str, Tensor | None], Tensor, Tensor]:
    """The float arguments, the ids [T, K] and the output's gradient [T, D]."""
    generator = torch.Generator().manual_seed(case.seed)
    wide = torch.float64 if case.dtype is torch.float64 else torch.float32
    exact = case.activation in KINKED
    P = 2 * case.h if case.glu.startswith("merged") else case.h
    gated = case.glu == "separate"

    def make(layout: int, *shape: int, dtype: torch.dtype = case.dtype, integer: bool = False) -> Tensor:
        if integer:
            value = torch.randint(-1, 2, shape, generator=generator).to(dtype)
        else:
            value = (torch.randn(shape, generator=generator, dtype=torch.float64) * 0.5).to(dtype)
        return lay_out(value, case.layouts[layout]).requires_grad_()

    D, H, E = case.d, case.h, case.experts
    tensors = {
        "x": make(0, case.tokens, D, integer=exact),
        "weights": make(1, case.tokens, case.top_k, dtype=wide),
        "w_gate": make(2, E, H, D, integer=exact) if gated else None,
        "b_gate": make(2, E, H, integer=exact) if gated and case.bias else None,
        "w_up": make(2, E, P, D, integer=exact),
        "b_up": make(2, E, P, integer=exact) if case.bias else None,
        "w_down": make(2, E, D, H),
        "b_down": make(2, E, D) if case.bias else None,
    }
    grad = make(3, case.tokens, D).detach()
    return tensors, lay_out(draw_ids(case, generator), "transposed"), grad


# ---- comparing ----------------------------------------------------------------------------------


def in_float64(tensors: dict[str, Tensor | None], absolute: bool) -> dict[str, Tensor | None]:
    found = {}
    for name, value in tensors.items():
        wide = None if value is None else value.detach().double()
        found[name] = None if wide is None else (wide.abs() if absolute else wide).requires_grad_()
    return found


def with_gradients(out: Tensor, tensors: dict[str, Tensor | None], grad: Tensor) -> dict[str, Tensor]:
    names = [n for n, v in tensors.items() if v is not None]
    values = torch.autograd.grad(out, [tensors[n] for n in names], grad, allow_unused=True)
    zeros = (torch.zeros_like(tensors[n]) if g is None else g for n, g in zip(names, values, strict=True))
    return {"out": out.detach(), **dict(zip(names, zeros, strict=True))}


def compare(case: Case, got: dict[str, Tensor], want: dict[str, Tensor], bound: dict[str, Tensor]) -> None:
    info = torch.finfo(case.dtype)
    for name, value in got.items():
        assert value.shape == want[name].shape, name
        if not value.numel():
            continue
        factor = C_OUT if name == "out" else C_GRAD
        # Below the smallest normal number rounding is absolute; a later factor can enlarge it.
        underflow = info.tiny * info.eps * (1 + bound[name].max())
        allowed = factor * (UNIT[case.dtype] * bound[name] + underflow)
        error = (value.double() - want[name]).abs()
        assert (error <= allowed).all(), f"{name}: {float((error / allowed).max()):.2f} of what {case} allows"


def layer(case: Case) -> None:
    """One op and the small ops, in the case's dtype, against the loop and its bound."""
    tensors, ids_TK, grad_TD = draw_tensors(case)
    got = []
    for forward in (whole_op, small_ops):
        out_TD = forward(case, tensors, ids_TK)
        assert out_TD.dtype is case.dtype
        got.append(with_gradients(out_TD, tensors, grad_TD))
    ids, grad_TD = ids_TK.tolist(), grad_TD.double()
    loop = in_float64(tensors, absolute=False)
    want = with_gradients(expert_loop(loop, ids, FORMULAS[case.activation], case.glu), loop, grad_TD)
    size = in_float64(tensors, absolute=True)
    most = expert_loop(size, ids, BOUNDS[case.activation], case.glu)
    bound = with_gradients(most, size, grad_TD.abs())
    for results in got:
        compare(case, results, want, bound)


class Counter:
    """Runs a property and counts the cases that it really saw."""

    def __init__(self, name: str, check: Callable[[Case], None]) -> None:
        self.seen = 0
        self.wanted = EXAMPLES[name] // SHARE
        config = settings(
            max_examples=self.wanted,
            derandomize=True,
            deadline=None,
            database=None,
            suppress_health_check=list(HealthCheck),
        )

        @config
        @given(case_strategy())
        def run(case: Case) -> None:
            self.seen += 1
            check(case)

        self.run = run

    def __call__(self) -> None:
        self.run()
        assert self.seen >= self.wanted


def whole_op(case: Case, t: dict, ids_TK: Tensor) -> Tensor:
    order_N, offsets_E = ops.sort_by_expert(ids_TK, case.experts)
    return ops.expert_ffn(
        t["x"], t["weights"], order_N, offsets_E, t["w_up"], t["b_up"], t["w_down"], t["b_down"],
        w_gate=t["w_gate"], b_gate=t["b_gate"], activation=case.activation, glu=case.glu,
    )  # fmt: skip


def small_ops(case: Case, t: dict, ids_TK: Tensor) -> Tensor:
    act = ops.ACTIVATIONS[case.activation].forward
    order_N, offsets_E = ops.sort_by_expert(ids_TK, case.experts)
    rows_ND = ops.permute(t["x"], order_N, case.top_k)
    up = ops.grouped_linear(rows_ND, t["w_up"], t["b_up"], offsets_E)
    if case.glu == "none":
        hidden = act(up)
    elif case.glu == "separate":
        hidden = act(ops.grouped_linear(rows_ND, t["w_gate"], t["b_gate"], offsets_E)) * up
    else:
        first, last = up.chunk(2, dim=1)
        hidden = act(first) * last if case.glu == "merged_gate_first" else first * act(last)
    y_ND = ops.grouped_linear(hidden, t["w_down"], t["b_down"], offsets_E)
    return ops.combine(y_ND, t["weights"], order_N)


def sorting(case: Case) -> None:
    """Exact: one bucket of slots per expert, in slot order, dropped slots behind them."""
    ids_TK = lay_out(draw_ids(case, torch.Generator().manual_seed(case.seed)), "transposed")
    order_N, offsets_E = ops.sort_by_expert(ids_TK, case.experts)
    flat = [e for ids in ids_TK.tolist() for e in ids]
    buckets = [[slot for slot, e in enumerate(flat) if e == expert] for expert in range(case.experts)]
    dropped = [slot for slot, e in enumerate(flat) if not 0 <= e < case.experts]
    ends = [sum(len(b) for b in buckets[: e + 1]) for e in range(case.experts)]
    assert order_N.tolist() == [slot for b in buckets for slot in b] + dropped
    assert offsets_E.tolist() == ends
    assert (order_N.dtype, offsets_E.dtype) == (torch.int64, torch.int32)


def test_at_least_2000_cases():
    assert sum(EXAMPLES.values()) >= 2000


def test_layer_equals_the_loop(nan_in_fresh_memory):
    Counter("layer", layer)()


def test_sort_by_expert_equals_buckets(nan_in_fresh_memory):
    Counter("sort_by_expert", sorting)()
