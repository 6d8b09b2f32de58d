"""The pass protocol, the registry and the runner."""

from __future__ import annotations

import logging

import pytest
import torch
import torch.nn.functional as F
from torch import fx

from moefy.errors import ConfigError, UnknownOption
from moefy.passes import base, graphs, pipeline


class ReluToGelu(base.Pass):
    name = "relu_to_gelu"
    preserving = False

    def __init__(self, limit: int = 10) -> None:
        self.limit = limit

    def rewrite(self, gm):
        nodes = [n for n in gm.graph.nodes if n.target is F.relu][: self.limit]
        for node in nodes:
            node.target, node.kwargs = F.gelu, {}
        self.note = f"at most {self.limit}"
        return len(nodes)


@pytest.fixture(autouse=True)
def clean_registry(monkeypatch):
    monkeypatch.setattr(pipeline, "_registry", dict(pipeline._registry))
    pipeline.clear_history()


def graph_with_relu() -> fx.GraphModule:
    def f(x):
        return F.relu(F.relu(x) + 1)

    return fx.symbolic_trace(f)


def test_a_pass_edits_recompiles_and_records():
    gm = graph_with_relu()
    x = torch.randn(5)
    record = pipeline.run_pass(ReluToGelu(), gm)
    assert (record.matched, record.nodes_before, record.nodes_after) == (2, 5, 5)
    assert not record.preserving and record.note == "at most 10" and record.ms >= 0
    torch.testing.assert_close(gm(x), F.gelu(F.gelu(x) + 1))
    assert graphs.op_counts(gm) == {"gelu": 2, "add": 1}
    assert pipeline.run_pass(ReluToGelu(), gm).matched == 0


def test_a_broken_graph_is_caught_by_lint():
    class Broken(base.Pass):
        name = "broken"

        def rewrite(self, gm):
            output = next(n for n in gm.graph.nodes if n.op == "output")
            relu = next(n for n in gm.graph.nodes if n.target is F.relu)
            output.append(relu)
            return 1

    with pytest.raises(RuntimeError, match="defined"):
        pipeline.run_pass(Broken(), graph_with_relu())


def test_uuid_follows_settings_and_is_stable():
    assert ReluToGelu().uuid() == ReluToGelu().uuid()
    assert ReluToGelu(1).uuid() != ReluToGelu(2).uuid()


def test_uuid_is_the_same_after_a_run():
    a_pass = ReluToGelu()
    before = a_pass.uuid()
    pipeline.run_pass(a_pass, graph_with_relu())
    assert a_pass.note and a_pass.uuid() == before


def test_pipeline_order_disable_and_history():
    pipeline.register_pass(ReluToGelu)
    assert pipeline.registered_passes()[-1] == "relu_to_gelu"
    records = pipeline.run_pipeline(graph_with_relu(), graph="mine")
    assert records[-1].name == "relu_to_gelu"
    assert pipeline.history()[-1] == pipeline.PipelineRun(graph="mine", records=records)
    gm = graph_with_relu()
    assert "relu_to_gelu" not in [r.name for r in pipeline.run_pipeline(gm, disable=("relu_to_gelu",))]
    assert graphs.op_counts(gm)["relu"] == 2
    pipeline.unregister_pass("relu_to_gelu")
    assert "relu_to_gelu" not in pipeline.registered_passes()
    pipeline.clear_history()
    assert pipeline.history() == ()


def test_explicit_passes_need_no_registration():
    (record,) = pipeline.run_pipeline(graph_with_relu(), [ReluToGelu(limit=1)])
    assert record.matched == 1


def test_names_are_checked():
    pipeline.register_pass(ReluToGelu)
    pipeline.register_pass(ReluToGelu)  # a re-run cell
    with pytest.raises(UnknownOption, match="did you mean 'relu_to_gelu'"):
        pipeline.run_pipeline(graph_with_relu(), disable=("relu_to_gelo",))

    class Other(ReluToGelu):
        pass

    with pytest.raises(ConfigError, match="relu_to_gelu"):
        pipeline.register_pass(Other)

    class NoName(base.Pass):
        def rewrite(self, gm):
            return 0

    with pytest.raises(ConfigError, match="NoName"):
        pipeline.register_pass(NoName)


def test_a_stage_that_does_not_exist():
    class Late(ReluToGelu):
        name = "late"
        stage = "after_lunch"

    with pytest.raises(ConfigError, match="stage"):
        pipeline.register_pass(Late)


def test_a_capture_pass_is_run_and_not_registered():
    class Early(ReluToGelu):
        name = "early"
        stage = "capture"

    assert pipeline.run_pass(Early(), graph_with_relu()).matched == 2
    assert pipeline.history() == (), "the history is the caller's"
    with pytest.raises(ConfigError, match=r"pre_grad.*for a registered pass"):
        pipeline.register_pass(Early)


def test_passes_of_a_stage_run_in_order_of_registration():
    order: list[str] = []

    def planted(label: str, place: str) -> None:
        class Planted(base.Pass):
            name, stage = label, place

            def rewrite(self, gm):
                order.append(self.name)
                return 0

        Planted.__qualname__ = label
        pipeline.register_pass(Planted)

    for label, place in (("z", "pre_grad"), ("late", "post_grad"), ("a", "pre_grad"), ("m", "pre_grad")):
        planted(label, place)
    pipeline.run_pipeline(graph_with_relu())
    assert order == ["z", "a", "m"]
    pipeline.run_pipeline(graph_with_relu(), pipeline.passes_of("post_grad"))
    assert order[3:] == ["late"]


def test_a_pass_runs_in_its_stage_alone():
    class Late(ReluToGelu):
        name = "late"
        stage = "post_grad"

    pipeline.register_pass(ReluToGelu)
    pipeline.register_pass(Late)
    assert pipeline.registered_passes("post_grad") == ("late",)
    assert {"late", "relu_to_gelu"} <= set(pipeline.registered_passes())
    assert "late" not in [r.name for r in pipeline.run_pipeline(graph_with_relu())]
    assert [p.name for p in pipeline.passes_of("post_grad")] == ["late"]
    assert pipeline.passes_of("post_grad", disable=("late",)) == []


def test_recording_counts_before_and_after():
    nodes = [1, 2]
    with pipeline.recording("work", lambda: len(nodes), preserving=False) as run:
        nodes.append(3)
        run.matched, run.note = 7, "said"
    record = run.record
    assert (record.name, record.matched, record.nodes_before, record.nodes_after) == ("work", 7, 2, 3)
    assert not record.preserving and record.note == "said" and record.ms >= 0


def test_debug_log_shows_each_pass(caplog):
    with caplog.at_level(logging.DEBUG, logger="moefy"):
        pipeline.run_pipeline(graph_with_relu(), [ReluToGelu()])
    (message,) = [r.getMessage() for r in caplog.records if r.name.startswith("moefy")]
    assert "relu_to_gelu: 2 matched, 5 -> 5 nodes" in message
    assert "gone {'relu': 2}" in message and "new {'gelu': 2}" in message
