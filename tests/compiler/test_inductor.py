"""Passes of the later stages run as hooks of Inductor, and only when they are registered."""

from __future__ import annotations

import pytest
import torch
from torch import fx, nn
from torch._dynamo.utils import counters
from torch._inductor.utils import fresh_cache

from moefy.compiler import options
from moefy.compiler.backend import backend
from moefy.compiler.inductor import HOOKS, stage_hooks
from moefy.errors import ConfigError
from moefy.passes import Pass, clear_history, history, pipeline, register_pass


@pytest.fixture(autouse=True)
def clean(monkeypatch, fresh_dynamo):
    """A registry, a history and a cache of its own: where the cache has the graph, Inductor runs no pass."""
    monkeypatch.setattr(pipeline, "_registry", dict(pipeline._registry))
    clear_history()
    with fresh_cache():
        yield


def seen(stage: str) -> list[int]:
    """Register a pass that doubles every sine, and return the numbers of nodes of the graphs that it saw."""
    graphs: list[int] = []

    @register_pass
    class DoubleSine(Pass):
        name = f"double_sine_{stage}"
        preserving = False

        def rewrite(self, gm: fx.GraphModule) -> int:
            sines = gm.graph.find_nodes(op="call_function", target=torch.ops.aten.sin.default)
            for node in sines:
                with gm.graph.inserting_after(node):
                    twice = gm.graph.call_function(torch.ops.aten.add.Tensor, (node, node))
                twice.meta.update(node.meta)
                node.replace_all_uses_with(twice, delete_user_cb=lambda user, new=twice: user is not new)
            graphs.append(len(gm.graph.nodes))
            return len(sines)

    DoubleSine.stage = stage  # type: ignore[assignment]
    return graphs


class Sine(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.sin(self.fc(x))


@pytest.mark.parametrize("stage", HOOKS)
def test_inductor_runs_registered_passes_of_a_later_stage(stage):
    graphs, model, x = seen(stage), Sine(), torch.randn(3, 8)
    compiled = torch.compile(model, backend=backend)
    y = compiled(x)
    torch.testing.assert_close(y, 2 * model(x))
    y.sum().backward()
    assert len(graphs) == {"joint": 1, "post_grad": 2}[stage]  # post-grad: forward and backward apart
    records = [r for run in history() for r in run.records if r.name == f"double_sine_{stage}"]
    assert [r.matched > 0 for r in records] == [True] + [False] * (len(graphs) - 1)
    assert {run.graph for run in history()} == {"0/0"}


def test_without_such_a_pass_inductor_sees_no_hook():
    assert stage_hooks((), "0/0") == {}
    seen("post_grad")
    assert list(stage_hooks((), "0/0")) == ["post_grad_custom_post_pass"]
    assert stage_hooks(("double_sine_post_grad",), "0/0") == {}


def test_a_hook_changes_inductors_cache_key_with_its_passes():
    seen("post_grad")
    (one,) = stage_hooks((), "0/0").values()
    seen("post_grad")
    (same,) = stage_hooks((), "0/1").values()
    assert one.uuid() == same.uuid()

    @register_pass
    class Another(Pass):
        name, stage = "another", "post_grad"

        def rewrite(self, gm: fx.GraphModule) -> int:
            return 0

    (other,) = stage_hooks((), "0/0").values()
    assert other.uuid() != one.uuid()


def silent(place: str, setting: int) -> None:
    """Register a pass that does nothing, with a setting."""

    @register_pass
    class Silent(Pass):
        name, stage = "silent", place

        def __init__(self) -> None:
            self.setting = setting

        def rewrite(self, gm: fx.GraphModule) -> int:
            return 0


@pytest.mark.parametrize("stage", HOOKS)
def test_inductors_cache_tells_passes_apart_by_their_uuids(stage):
    def misses() -> int:
        torch._dynamo.reset()
        counters.clear()
        model = Sine()
        torch.compile(model, backend=backend)(torch.ones(3, 8)).sum().backward()
        return counters["inductor"]["fxgraph_cache_miss"]

    assert misses() > 0 and misses() == 0, "without a pass the second compilation is a hit"
    for setting, missed in ((1, True), (1, False), (2, True), (1, False)):
        silent(stage, setting)
        assert (misses() > 0) == missed, (setting, counters["inductor"])


def test_a_users_patch_of_the_same_hook_is_refused():
    seen("post_grad")
    hooks = stage_hooks((), "0/0")
    with pytest.raises(ConfigError, match="post_grad_custom_post_pass"):
        options.with_hooks({"post_grad_custom_post_pass": print}, hooks)
    assert options.with_hooks({"max_autotune": True}, hooks) == {"max_autotune": True, **hooks}
