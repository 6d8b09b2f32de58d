"""Trace by execution: what is recorded, under which names, and that nothing else happens."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import DataDependentOutputException

from moefy.passes.trace import trace_graph, trace_module
from moefy.passes.trace.vocabulary import op_name, shape_of


def names(trace) -> list[str]:
    return [op_name(n) for n in trace.graph.nodes if n.op == "call_function"]


class Branchy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.linear(x)) if x.sum() > 0 else torch.sigmoid(self.linear(x))


def test_records_calls_shapes_and_names() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.GELU(), nn.Linear(6, 4))
    trace = trace_module(model, (torch.ones(2, 3, 4),))
    assert names(trace) == ["linear", "gelu", "linear"]
    assert [n.target for n in trace.graph.nodes if n.op == "get_attr"] == [
        "0.weight",
        "0.bias",
        "2.weight",
        "2.bias",
    ]
    shapes = [shape_of(n) for n in trace.graph.nodes if n.op == "call_function"]
    assert shapes == [(2, 3, 6), (2, 3, 6), (2, 3, 4)]
    assert [c.fqn for c in trace.calls] == ["", "0", "1", "2"]
    assert trace.calls[1].parent == 0
    trace.graph.lint()


def test_real_run_gives_the_outputs() -> None:
    model, x = nn.Linear(4, 4), torch.randn(2, 4)
    assert torch.equal(trace_module(model, (x,)).outputs, model(x))


def test_fake_run_equals_real_run_and_computes_nothing() -> None:
    model = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    x = torch.randn(2, 3, 8)
    with torch.no_grad():
        real, fake = trace_module(model, (x,)), trace_module(model, (x,), fake=True)
    assert names(real) == names(fake)
    assert fake.outputs is None


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_data_dependent_code_takes_the_path_of_the_data(sign: float) -> None:
    trace = trace_module(Branchy(), (sign * torch.ones(1, 4),))
    assert ("relu" in names(trace), "sigmoid" in names(trace)) == (sign > 0, sign < 0)
    with pytest.raises(DataDependentOutputException):
        trace_module(Branchy(), (torch.ones(1, 4),), fake=True)


def test_in_place_ops_rebind_the_tensor() -> None:
    class InPlace(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            y = x * 2
            y += 1
            y[0] = 0
            y.relu_()
            return y + 1

    trace = trace_module(InPlace(), (torch.ones(3),))
    chain = [n for n in trace.graph.nodes if n.op == "call_function"]
    assert names(trace) == ["mul", "add", "setitem", "relu", "add"]
    for before, after in itertools.pairwise(chain):
        assert before in after.all_input_nodes


def test_a_write_to_a_view_changes_its_base() -> None:
    class Viewed(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            y = x * 2
            y[:, 0].add_(1)
            return y + 1

    trace = trace_module(Viewed(), (torch.ones(3, 3),))
    last = next(n for n in reversed(trace.graph.nodes) if n.op == "call_function")
    assert op_name(last.all_input_nodes[0]) == "mutated_by_view"


def test_tied_parameters_have_one_node_and_aliases() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.head = nn.Embedding(5, 4), nn.Linear(4, 5, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, ids: Tensor) -> Tensor:
            return self.head(self.embed(ids))

    trace = trace_module(Tied(), (torch.arange(3),))
    weights = [n for n in trace.graph.nodes if n.op == "get_attr"]
    assert len(weights) == 1 and len(weights[0].users) == 2
    assert trace.aliases == {"embed.weight": ("embed.weight", "head.weight")}


def test_a_failing_forward_leaves_nn_module_alone() -> None:
    class Fails(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise ValueError("mine")

    before = nn.Module.__call__
    with pytest.raises(ValueError, match="mine"):
        trace_module(Fails(), (torch.ones(1),))
    assert nn.Module.__call__ is before


@pytest.mark.parametrize("kind", ["symbolic", "export"])
def test_graphs_give_the_same_operations_with_origins(kind: str) -> None:
    model, x = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 4)), torch.randn(2, 4)
    gm = (
        fx.symbolic_trace(model)
        if kind == "symbolic"
        else torch.export.export(model, (x,), strict=False).module()
    )
    assert isinstance(gm, fx.GraphModule)
    trace = trace_graph(gm, (x,))
    assert names(trace) == ["linear", "relu", "linear"]
    origins = [n.meta["origin"] for n in trace.graph.nodes if n.op == "call_function"]
    assert all(o in gm.graph.nodes for o in origins)
    assert torch.equal(trace.outputs if isinstance(trace.outputs, Tensor) else trace.outputs[0], model(x))
