"""Every auxiliary loss against its formula, written as loops over tokens, and against known constants."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounter

from moefy.config import AuxLoss
from moefy.config.aux_loss import BALANCE
from moefy.errors import ConfigError, ShapeError
from moefy.nn import MoE, losses
from moefy.nn.losses import BALANCE_LOSSES, GlobalCounts, per_sequence
from moefy.ops import sort_by_expert

T, E, K = 12, 4, 2
UNIFORM = {"switch": 1.0, "megatron": 1.0, "megablocks": 1.0, "gshard": 1.0, "tutel_gshard": 1.0, "deepspeed": 1.0,
           "mixtral": 2.0, "importance": 0.0, "fastmoe_gshard": 1.0, "fastmoe_switch": 0.5}  # fmt: skip
AFTER_DROPS = frozenset(name for name, facts in BALANCE.items() if facts.after_drops)
COUNTED = frozenset(name for name, facts in BALANCE.items() if facts.counted)
COLLAPSED = {name: float(E) for name in BALANCE_LOSSES}  # K = 1: all tokens to one expert with certainty


def sample(seed: int = 0, dropped: bool = True) -> tuple[Tensor, Tensor, Tensor]:
    """Scores, choices (some dropped) and a mask."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(T, E, dtype=torch.float64, generator=generator)
    index = logits.topk(K).indices.clone()
    if dropped:
        index[3, 1], index[5, 0], index[7] = E, -1, E
    return logits.softmax(-1), index, torch.rand(T, generator=generator) < 0.7


def product(scores: Any, index: Any, mask: Any, *, choices: int, over: str = "all") -> float:
    """``E * sum_e (n_e / a) * (sum_t p / b)`` by loops; ``a`` and ``b`` are T * choices and T, or the kept slots."""
    real = [t for t in range(len(scores)) if mask[t]]
    kept = [index[t][k] for t in real for k in range(choices) if 0 <= index[t][k] < E]
    a, b = (len(kept), len(kept)) if over == "kept" else (len(real) * choices, len(real))
    return sum(E * (kept.count(e) / a) * (sum(scores[t][e] for t in real) / b) for e in range(E))


def cv2(values: list[float]) -> float:
    mean = sum(values) / len(values)
    return sum((v - mean) ** 2 for v in values) / (len(values) - 1) / (mean**2 + 1e-10)


def phi(z: float) -> float:
    return (1 + math.erf(z / math.sqrt(2))) / 2


def expected(name: str, scores: Tensor, index: Tensor, mask: Tensor) -> float:
    s, i, m = scores.tolist(), index.tolist(), mask.tolist()
    if name == "importance":
        return cv2([sum(s[t][e] for t in range(len(s)) if m[t]) for e in range(E)])
    if name in ("gshard", "tutel_gshard", "deepspeed", "fastmoe_gshard"):
        return product(s, i, m, choices=1)
    if name == "fastmoe_switch":
        return product(s, i, m, choices=K, over="kept")
    if name == "mixtral":
        return K * product(s, i, m, choices=K)
    return product(s, i, m, choices=K)


@pytest.mark.parametrize("name", BALANCE_LOSSES)
@pytest.mark.parametrize("masked", [False, True])
def test_closed_form(name: str, masked: bool) -> None:
    scores, index, mask = sample()
    mask = mask if masked else torch.ones(T, dtype=torch.bool)
    got = BALANCE_LOSSES[name](scores, index, E, mask_T=mask if masked else None)
    assert got.dtype == torch.float64 and got.shape == ()
    assert got.item() == pytest.approx(expected(name, scores, index, mask), rel=1e-12)


@pytest.mark.parametrize("name", BALANCE_LOSSES)
def test_known_constants(name: str) -> None:
    loss = BALANCE_LOSSES[name]
    uniform = torch.full((T, E), 1 / E, dtype=torch.float64)
    round_robin = torch.arange(T * K).view(T, K) % E
    # First choices are then experts 0 and 2 alone, which a uniform score does not care about.
    assert loss(uniform, round_robin, E).item() == pytest.approx(UNIFORM[name], abs=1e-12)
    sure = torch.zeros(T, E, dtype=torch.float64)
    sure[:, 2] = 1.0
    assert loss(sure, torch.full((T, 1), 2), E).item() == pytest.approx(COLLAPSED[name], rel=1e-9)


@pytest.mark.parametrize("workers", [1, 2, 4])
def test_fastmoe_gshard_is_smaller_by_the_square_of_the_workers(workers: int) -> None:
    uniform, index = torch.full((T, E), 1 / E, dtype=torch.float64), torch.arange(T * K).view(T, K) % E
    got = losses.fastmoe_gshard(uniform, index, E, experts_per_worker=E // workers)
    assert got.item() == pytest.approx(1 / workers**2, rel=1e-12)


def test_fastmoe_switch_divides_by_what_was_kept() -> None:
    scores = torch.tensor([[0.5, 0.5], [0.75, 0.25], [1.0, 0.0]], dtype=torch.float64)
    index = torch.tensor([[0], [0], [2]])  # the third was dropped
    # 2 * (2/2 * 2.25/2 + 0/2 * 0.75/2)
    assert losses.fastmoe_switch(scores, index, 2).item() == 2.25
    assert losses.switch(scores, index, 2).item() == pytest.approx(2 * (2 / 3) * (2.25 / 3))
    assert frozenset({"fastmoe_switch"}) == AFTER_DROPS


@pytest.mark.parametrize("name", BALANCE_LOSSES)
def test_gradients_flow_through_the_scores(name: str) -> None:
    scores, index, mask = sample()
    scores.requires_grad_()
    assert torch.autograd.gradcheck(lambda s: BALANCE_LOSSES[name](s, index, E, mask_T=mask), scores)
    (grad,) = torch.autograd.grad(BALANCE_LOSSES[name](scores, index, E, mask_T=mask), scores)
    assert not grad[~mask].any() and grad[mask].any()


@pytest.mark.parametrize("name", BALANCE_LOSSES)
def test_no_tokens_give_zero(name: str) -> None:
    empty = torch.zeros(0, E, requires_grad=True)
    assert BALANCE_LOSSES[name](empty, torch.zeros(0, K, dtype=torch.int64), E).item() == 0
    scores, index, _ = sample()
    nothing = torch.zeros(T, dtype=torch.bool)
    scores.requires_grad_()
    loss = BALANCE_LOSSES[name](scores, index, E, mask_T=nothing)
    loss.backward()
    assert loss.item() == 0 and not scores.grad.any()


@pytest.mark.parametrize("name", BALANCE_LOSSES)
def test_padding_changes_nothing(name: str) -> None:
    scores, index, _ = sample()
    padded = torch.cat([scores, torch.full((3, E), float("nan"), dtype=torch.float64)]).requires_grad_()
    more = torch.cat([index, torch.zeros(3, K, dtype=torch.int64)])
    loss = BALANCE_LOSSES[name](padded, more, E, mask_T=torch.arange(T + 3) < T)
    loss.backward()
    assert loss.item() == pytest.approx(BALANCE_LOSSES[name](scores, index, E).item(), rel=1e-12)
    assert not padded.grad[T:].any()


def test_bf16_scores_are_summed_in_fp32() -> None:
    scores = torch.full((3000, 2), 0.5, dtype=torch.bfloat16)  # summed in bf16 this stops at 128
    loss = losses.switch(scores, torch.zeros(3000, 1, dtype=torch.int64), 2)
    assert loss.dtype == torch.float32 and loss.item() == 1.0


def test_sparse_importance() -> None:
    _, index, mask = sample()
    weights = torch.rand(T, K, dtype=torch.float64, requires_grad=True)
    w, i, m = weights.tolist(), index.tolist(), mask.tolist()
    sums = [sum(w[t][k] for t in range(T) for k in range(K) if m[t] and i[t][k] == e) for e in range(E)]
    assert losses.sparse_importance(weights, index, E, mask_T=mask).item() == pytest.approx(
        cv2(sums), rel=1e-12
    )
    assert torch.autograd.gradcheck(lambda v: losses.sparse_importance(v, index, E, mask_T=mask), weights)
    balanced = torch.arange(T * K).view(T, K) % E
    assert losses.sparse_importance(torch.ones(T, K), balanced, E).item() == 0


@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_load(top_k: int) -> None:
    clean, noisy = torch.randn(2, T, E, dtype=torch.float64)
    std, mask = torch.rand(T, E, dtype=torch.float64) + 0.1, torch.arange(T) % 3 > 0
    sums = [0.0] * E
    for t in range(T):
        for e in range(E):
            others = sorted((noisy[t, j].item() for j in range(E) if j != e), reverse=True)
            z = (clean[t, e] - others[top_k - 1]) / std[t, e]
            sums[e] += phi(z.item()) * mask[t].item()
    got = losses.smooth_load(clean, noisy, std, top_k, mask_T=mask)
    assert got.item() == pytest.approx(cv2(sums), rel=1e-10)
    inputs = [v.clone().requires_grad_() for v in (clean, noisy, std)]
    assert torch.autograd.gradcheck(lambda c, n, s: losses.smooth_load(c, n, s, top_k, mask_T=mask), inputs)


def test_load_of_all_experts_is_balanced() -> None:
    assert losses.smooth_load(torch.randn(T, E), torch.randn(T, E), 1.0, E).item() == 0
    assert losses.smooth_load(torch.zeros(T, 1), torch.zeros(T, 1), 1.0, 1).item() == 0


@pytest.mark.parametrize("name", ["load_importance", "tutel_load_importance"])
def test_load_importance(name: str) -> None:
    clean, noise = torch.randn(2, T, E, dtype=torch.float64)
    gate_noise = 0.8
    std = gate_noise / E
    noisy, mask = clean + std * noise, torch.arange(T) % 3 > 0
    index = noisy.topk(K).indices
    scores = clean.softmax(-1).tolist()
    real = [t for t in range(T) if mask[t]]
    importance = [sum(scores[t][e] for t in real) for e in range(E)]
    load = [0.0] * E
    for t in real:
        threshold = sorted(noisy[t].tolist(), reverse=True)[K - 1]
        for e in range(E):
            minuend = scores[t][e] if name == "tutel_load_importance" else clean[t, e].item()
            load[e] += phi((minuend - threshold) / std)
    loss = getattr(losses, name)
    assert loss(clean, noisy, index, std, mask_T=mask).item() == pytest.approx(
        (cv2(importance) + cv2(load)) / 2, rel=1e-10
    )
    inputs = [v.clone().requires_grad_() for v in (clean, noisy)]
    assert torch.autograd.gradcheck(lambda c, n: loss(c, n, index, std, mask_T=mask), inputs)
    with pytest.raises(ConfigError, match="noisy router"):
        loss(clean, noisy, index, 0.0)


def test_z_loss() -> None:
    logits, mask = 3 * torch.randn(T, E, dtype=torch.float64), torch.arange(T) % 3 > 0
    squares = [math.log(sum(math.exp(v) for v in row)) ** 2 for row in logits.tolist()]
    assert losses.z_loss(logits).item() == pytest.approx(sum(squares) / T, rel=1e-12)
    real = [v for v, m in zip(squares, mask.tolist(), strict=True) if m]
    assert losses.z_loss(logits, mask_T=mask).item() == pytest.approx(sum(real) / len(real), rel=1e-12)
    assert losses.z_loss(torch.zeros(T, E)).item() == pytest.approx(math.log(E) ** 2)
    assert losses.z_loss(torch.zeros(0, E)).item() == 0
    logits.requires_grad_()
    assert torch.autograd.gradcheck(lambda v: losses.z_loss(v, mask_T=mask), logits)


@pytest.mark.parametrize("name", BALANCE_LOSSES)
def test_per_sequence_is_the_mean_over_sequences(name: str) -> None:
    scores, index, mask = sample()
    mask[4:8] = False  # the second of three sequences is padding alone
    parts = [slice(0, 4), slice(4, 8), slice(8, 12)]
    each = [expected(name, scores[p], index[p], mask[p]) for p in (parts[0], parts[2])]
    got = per_sequence(BALANCE_LOSSES[name], scores, index, E, sequences=3, mask_T=mask)
    assert got.item() == pytest.approx(sum(each) / 2, rel=1e-12)
    every = torch.ones(T, dtype=torch.bool)
    each = [expected(name, scores[p], index[p], every[p]) for p in parts]
    got = per_sequence(BALANCE_LOSSES[name], scores, index, E, sequences=3)
    assert got.item() == pytest.approx(sum(each) / 3, rel=1e-12)


def test_sequences_have_one_length() -> None:
    scores, index, _ = sample()
    with pytest.raises(ShapeError, match="12 tokens are not 5 sequences"):
        per_sequence(losses.switch, scores, index, E, sequences=5)
    assert per_sequence(losses.switch, scores[:0], index[:0], E, sequences=0).item() == 0


@pytest.mark.parametrize("name", sorted(COUNTED - AFTER_DROPS))
def test_global_counts_over_micro_batches(name: str) -> None:
    """The counts of all micro-batches so far, the scores of this one."""
    batches = [sample(seed, dropped=False) for seed in range(3)]
    past = None
    for i, (scores, index, mask) in enumerate(batches):
        counts = GlobalCounts(past=past)
        got = BALANCE_LOSSES[name](scores, index, E, mask_T=mask, reduce=counts)
        past = counts.totals
        width = 1 if "gshard" in name or name == "deepspeed" else K
        seen = [x[m][:, :width].flatten().tolist() for _, x, m in batches[: i + 1]]
        slots = [e for part in seen for e in part]
        mean = scores[mask].mean(0).tolist()
        value = E * sum(slots.count(e) / len(slots) * mean[e] for e in range(E))
        assert got.item() == pytest.approx(value * (K if name == "mixtral" else 1), rel=1e-12)


def test_global_counts_over_ranks() -> None:
    """Two ranks by hand: the mean of their losses is the loss of the whole batch."""
    (s0, i0, _), (s1, i1, _) = sample(0, dropped=False), sample(1, dropped=False)
    totals = losses.assignment_totals(i0, E) + losses.assignment_totals(i1, E)
    mean = sum(losses.switch(s, i, E, reduce=lambda _: totals) for s, i in ((s0, i0), (s1, i1))) / 2
    whole = losses.switch(torch.cat([s0, s1]), torch.cat([i0, i1]), E)
    assert mean.item() == pytest.approx(whole.item(), rel=1e-12)


def test_importance_has_no_global_scope() -> None:
    scores, index, _ = sample()
    with pytest.raises(ConfigError, match="counts no slots"):
        losses.importance(scores, index, E, reduce=GlobalCounts())


def test_totals() -> None:
    _, index, _ = sample()
    mask = torch.arange(T) < 6
    counts = [index[:6].flatten().tolist().count(e) for e in range(E)]
    assert losses.assignment_totals(index, E, mask).tolist() == [*counts, 6]
    assert losses.assignment_totals(index.to(torch.int32), E, mask).dtype == torch.int64


@pytest.mark.usefixtures("fresh_dynamo")
def test_one_graph_for_all_lengths() -> None:
    counter = CompileCounter()

    def every(scores: Tensor, index: Tensor, mask: Tensor) -> Tensor:
        values = [loss(scores, index, E, mask_T=mask) for loss in BALANCE_LOSSES.values()]
        values.append(per_sequence(losses.switch, scores, index, E, sequences=2, mask_T=mask))
        values += [losses.smooth_load(scores, scores + 0.1, 1.0, K), losses.z_loss(scores)]
        values.append(losses.switch(scores, index, E, reduce=GlobalCounts(past=torch.ones(E + 1))))
        return torch.stack(values)

    compiled = torch.compile(every, fullgraph=True, dynamic=True, backend=counter)
    for tokens in (8, 4, 64):
        scores = torch.randn(tokens, E).softmax(-1)
        index, mask = scores.topk(K).indices, torch.rand(tokens) < 0.8
        torch.testing.assert_close(compiled(scores, index, mask), every(scores, index, mask))
    assert counter.frame_count == 1


@pytest.mark.parametrize("name", BALANCE_LOSSES)
@pytest.mark.parametrize("choices", [1, K])
def test_offsets_say_what_counting_would(name: str, choices: int) -> None:
    """Sorted slots of two batches, dropped and masked ones left out; K = 1 is also the first choices' case."""
    batches = [sample(seed) for seed in range(2)]
    scores, index, mask = (torch.stack(parts) for parts in zip(*batches, strict=True))
    index = index[..., :choices].masked_fill(~mask.unsqueeze(-1), E)
    offsets = torch.stack([sort_by_expert(one, E)[1] for one in index])
    got = BALANCE_LOSSES[name](scores, index, E, mask_T=mask, offsets_E=offsets)
    for value, s, i, m in zip(got, scores, index, mask, strict=True):
        wanted = BALANCE_LOSSES[name](s, i, E, mask_T=m)
        if choices == K:
            assert wanted.item() == pytest.approx(expected(name, s, i, m), rel=1e-12)
        assert value.item() == pytest.approx(wanted.item(), rel=1e-12)


@pytest.mark.parametrize("name", BALANCE_LOSSES)
@pytest.mark.parametrize("factor", [None, 0.5])
@pytest.mark.parametrize("masked", [False, True])
def test_a_layer_counts_what_its_router_chose(name: str, factor: float | None, masked: bool) -> None:
    """Before capacity dropped slots, but for the losses that are defined after."""
    moe = MoE(8, 8, E, top_k=K, capacity=factor, aux_loss=AuxLoss(balance=name, weight=0.5)).double()
    routings: list[Any] = []
    moe.router.register_forward_hook(lambda *seen: routings.append(seen[2]))
    mask = torch.arange(T) % 3 > 0
    moe(torch.randn(T, 8, dtype=torch.float64), mask=mask if masked else None)
    routing, mask = routings[0], mask if masked else torch.ones(T, dtype=torch.bool)
    index = routing.top_k_index if name in AFTER_DROPS else routing.choice.index
    scores = routing.router_logits.detach().softmax(-1)
    assert moe.l_aux is not None
    assert moe.l_aux.item() == pytest.approx(expected(name, scores, index, mask) / 2, rel=1e-12)
