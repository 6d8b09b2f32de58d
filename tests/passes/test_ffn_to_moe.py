"""The graph pass: a caller's GraphModule is rewritten node by node, exactly, and can be taken back."""

from __future__ import annotations

import copy
import logging
import pickle
from collections import Counter
from collections.abc import Callable

import oracles
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

import moefy
from moefy import passes
from moefy.nn import dispatch
from moefy.passes.moe.ffn_to_moe import FFNToMoE

D, H, E, K = 8, 12, 4, 2


class Block(nn.Module):
    """Inline gelu MLP."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.fc1, self.fc2 = nn.LayerNorm(D), nn.Linear(D, H), nn.Linear(H, D)
        self.act, self.drop = nn.GELU(), nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.drop(self.fc2(self.act(self.fc1(self.norm(x)))))


class Conv1D(nn.Module):
    """Hugging Face's transposed linear."""

    def __init__(self, out: int, width: int) -> None:
        super().__init__()
        self.out = out
        self.weight, self.bias = nn.Parameter(torch.randn(width, out) / 3), nn.Parameter(torch.randn(out) / 3)

    def forward(self, x: Tensor) -> Tensor:
        flat = torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight)
        return flat.view(x.size()[:-1] + (self.out,))  # noqa: RUF005 -- symbolic tracing cannot unpack


class Flat(nn.Module):
    """addmm on a flattened view."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = Conv1D(H, D), Conv1D(D, H)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.fc2(F.gelu(self.fc1(x)))


class Glu(nn.Module):
    """Sibling entries and a raw-parameter twin of them."""

    def __init__(self) -> None:
        super().__init__()
        self.w1, self.w3 = nn.Parameter(torch.randn(D, H) / 3), nn.Parameter(torch.randn(D, H) / 3)
        self.w2 = nn.Parameter(torch.randn(H, D) / 3)

    def forward(self, x: Tensor) -> Tensor:
        return x + (F.silu(x @ self.w1) * (x @ self.w3)) @ self.w2


class Conv(nn.Module):
    """1x1 convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Conv2d(D, H, 1), nn.Conv2d(H, D, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.fc2(F.gelu(self.fc1(x)))


def shared() -> nn.Module:
    block = Block()
    return nn.Sequential(block, block)


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], int]] = {
    "linear": (lambda: nn.Sequential(Block(), Block()), (2, 5, D), 2),
    "addmm": (lambda: nn.Sequential(Flat(), Flat()), (2, 5, D), 2),
    "raw glu": (lambda: nn.Sequential(Glu()), (2, 5, D), 1),
    "conv": (lambda: nn.Sequential(Conv()), (2, D, 3, 4), 1),
    "shared": (shared, (2, 5, D), 1),
}
KINDS: dict[str, Callable[[nn.Module, Tensor], fx.GraphModule]] = {
    "symbolic_trace": lambda model, x: fx.symbolic_trace(model),
    "export": lambda model, x: torch.export.export(model, (x,), strict=False).module(),  # type: ignore[return-value]
    "strict export": lambda model, x: torch.export.export(model, (x,), strict=True).module(),  # type: ignore[return-value]
}
both = pytest.mark.parametrize("name", MODELS), pytest.mark.parametrize("kind", KINDS)


def make(name: str, kind: str) -> tuple[nn.Module, fx.GraphModule, Tensor, int]:
    torch.manual_seed(0)
    build, shape, count = MODELS[name]
    model, x = build().eval(), torch.randn(shape)
    return model, KINDS[kind](copy.deepcopy(model), x), x, count


def targets(gm: fx.GraphModule) -> Counter:
    return Counter(n.target for n in gm.graph.nodes if n.op == "call_function")


@both[0]
@both[1]
def test_exact_rewritten_and_undone(name: str, kind: str) -> None:
    dense, gm, x, count = make(name, kind)
    before, code = {k: v.clone() for k, v in gm.state_dict().items()}, gm.code
    moefy.transform(gm, E, example_args=(x,))
    report = moefy.report(gm)
    assert [record.matched for record in report.passes] == [count]
    sites = count * (2 if name == "shared" else 1)
    assert targets(gm)[dispatch.route_by] == sites
    assert targets(gm)[dispatch.expert_exit] == sites
    gm.graph.lint()
    expected = dense(x)
    got = gm(x)
    assert oracles.relative_error(got, expected) < 1e-6
    got.square().sum().backward()
    assert all(p.grad is not None for p in gm.parameters())
    moefy.undo(gm)
    after = gm.state_dict()
    assert gm.code == code and before.keys() == after.keys()
    assert all(torch.equal(before[k], after[k]) for k in before)
    assert torch.equal(gm(x), expected)


def test_it_is_a_pass_of_the_stage_capture(caplog: pytest.LogCaptureFixture) -> None:
    _, gm, x, _ = make("linear", "symbolic_trace")
    before = len(gm.graph.nodes)
    passes.clear_history()
    with caplog.at_level(logging.DEBUG, logger="moefy"):
        moefy.transform(gm, E, example_args=(x,))
    (record,) = moefy.report(gm).passes
    assert issubclass(FFNToMoE, passes.Pass) and FFNToMoE.stage == "capture"
    assert (record.name, record.matched, record.preserving) == ("ffn_to_moe", 2, True)
    assert (record.nodes_before, record.nodes_after) == (before, len(gm.graph.nodes))
    assert any("ffn_to_moe: 2 matched" in r.getMessage() for r in caplog.records)
    assert "ffn_to_moe" not in passes.registered_passes() and passes.history() == ()


@pytest.mark.parametrize("kind", KINDS)
def test_distinct_experts_equal_the_token_loop(kind: str) -> None:
    torch.manual_seed(1)
    block, x = Block().double().eval(), torch.randn(2, 5, D, dtype=torch.float64)
    gm = KINDS[kind](block, x)
    moefy.transform(gm, E, top_k=K, example_args=(x,))
    for name, parameter in gm.named_parameters():
        if "fc" in name:
            nn.init.normal_(parameter, std=0.3)
    p = dict(gm.named_parameters())
    loop = oracles.LoopLayer(
        entries=[(p["fc1.weight"], p["fc1.bias"])],
        exit=(p["fc2.weight"], p["fc2.bias"]),
        body=F.gelu,
        router_ED=p["fc1.router.weight"],
        top_k=K,
    )
    hidden = F.layer_norm(x, (D,), p["norm.weight"], p["norm.bias"])
    expected = x + loop(hidden.reshape(-1, D)).reshape(x.shape)
    assert oracles.relative_error(gm(x), expected) < 1e-12


def test_other_sizes_and_training_mode() -> None:
    dense, gm, x, _ = make("linear", "symbolic_trace")
    moefy.transform(gm, E, example_args=(x,))
    other = torch.randn(3, 7, D)
    assert oracles.relative_error(gm(other), dense(other)) < 1e-6
    gm.train()
    assert not torch.equal(gm(x), gm(x)), "dropout follows the graph module's mode"


def test_copies_and_pickles_run() -> None:
    _, gm, x, _ = make("linear", "symbolic_trace")
    moefy.transform(gm, E, example_args=(x,))
    expected = gm(x)
    for twin in (copy.deepcopy(gm), pickle.loads(pickle.dumps(gm))):
        assert torch.equal(twin(x), expected)
    moefy.undo(copy.deepcopy(gm))


def test_a_failed_check_restores_the_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    from moefy.model.compare import Comparison
    from moefy.rewrite import verify

    dense, gm, x, _ = make("linear", "symbolic_trace")
    code, keys = gm.code, list(gm.state_dict())
    monkeypatch.setattr(verify, "compare", lambda *a: Comparison(1.0, 1e-5, "float32", "output 0"))
    with pytest.raises(moefy.errors.CheckFailed):
        moefy.transform(gm, E, example_args=(x,))
    assert gm.code == code and list(gm.state_dict()) == keys
    assert torch.equal(gm(x), dense(x))
