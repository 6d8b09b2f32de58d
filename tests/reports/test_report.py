"""Rewrite reports: folding loses no layer, tables fit and tell every reason, JSON is unfolded."""

from __future__ import annotations

import io
import itertools
import json
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import moefy
from moefy.config import MoEConfig
from moefy.records import LayerRecord, PassRecord
from moefy.reports.rewrite import RewriteReport
from moefy.reports.text import tables
from moefy.reports.text.folding import fold, spell
from moefy.reports.text.progress import LARGE, progress


def layer(fqn: str, *, reason: str | None = None, code: str | None = None, **changes) -> LayerRecord:
    base = LayerRecord(
        fqn=fqn,
        action="skipped" if reason else "moe",
        reason=reason,
        code=code,
        kind="glu",
        activation="silu",
        form="module",
        d_model=64,
        d_hidden=256,
        num_experts=8,
        top_k=2,
        calls=1,
        params_dense=49_152,
        params_total=393_728,
        params_active=98_816,
        flops_dense=98_304,
        flops_active=197_632,
        exactness="exact 3e-08",
    )
    return LayerRecord(**{**vars(base), **changes})


def report(*layers: LayerRecord, **changes) -> RewriteReport:
    fields = {
        "model_class": "Llama",
        "layers": layers,
        "config": MoEConfig(num_experts=8),
        "dry_run": False,
        "params_dense": 1_000_000,
        "params_total": 5_000_000,
        "params_active": 2_000_000,
        "dtype": "float32",
        "device": "cpu",
        "trace_source": "fake run",
        "inputs": "input_ids int64 [1, 8]",
        "check_error": 3e-8,
        "check_tolerance": 1e-5,
    }
    return RewriteReport(**{**fields, **changes})


def expand(pattern: str) -> list[str]:
    """The paths that a brace pattern stands for, written independently of ``spell``."""
    pieces = re.split(r"\{([^}]*)\}", pattern)
    choices = []
    for index, piece in enumerate(pieces):
        if index % 2 == 0:
            choices.append([piece])
            continue
        values: list[str] = []
        for part in piece.split(","):
            ends = [int(number) for number in part.split("..")]
            step = ends[2] if len(ends) == 3 else 1
            values += [str(v) for v in range(ends[0], ends[-1 if len(ends) < 3 else 1] + 1, step)]
        choices.append(values)
    return ["".join(parts) for parts in itertools.product(*choices)]


# ---- folding


def test_a_run_of_layers_is_one_line():
    lines = fold([f"model.layers.{i}.mlp" for i in range(32)])
    assert [(line.pattern, line.count) for line in lines] == [("model.layers.{0..31}.mlp", 32)]


def test_numbers_inside_names_fold_too():
    lines = fold([f"encoder.encoder_layer_{i}.mlp" for i in range(12)])
    assert lines[0].pattern == "encoder.encoder_layer_{0..11}.mlp"


def test_two_numbers_fold_only_where_all_combinations_occur():
    full = [f"stages.{s}.blocks.{b}.mlp" for s in range(2) for b in range(3)]
    assert [line.pattern for line in fold(full)] == ["stages.{0,1}.blocks.{0..2}.mlp"]
    assert [line.pattern for line in fold(full[:-1])] == [
        "stages.0.blocks.{0..2}.mlp",
        "stages.1.blocks.{0,1}.mlp",
    ]


def test_different_keys_stay_apart_and_keep_their_order():
    paths = ["h.0", "h.1", "h.2", "h.3"]
    lines = fold(paths, ["wide", "wide", "narrow", "wide"])
    assert [(line.pattern, line.first) for line in lines] == [("h.{0,1,3}", 0), ("h.2", 2)]


@pytest.mark.parametrize(
    ("values", "text"),
    [([7], "7"), ([1, 2], "{1,2}"), ([0, 2, 4, 6, 9], "{0..6..2,9}"), ([0, 5, 6, 7], "{0,5..7}")],
)
def test_spelling(values, text):
    assert spell(values) == text


names = st.sampled_from(["a", "layers.{}.mlp", "s.{}.b.{}.fc", "x{}y", "w.0{}", "t.{}.007.{}.{}"])


@settings(max_examples=300, deadline=None)
@given(st.lists(st.tuples(names, st.tuples(*[st.integers(0, 12)] * 3)), max_size=30))
def test_expanded_patterns_are_exactly_the_paths(drawn):
    paths = [name.format(*numbers) for name, numbers in drawn]
    lines = fold(paths)
    expanded = [path for line in lines for path in expand(line.pattern)]
    assert sorted(expanded) == sorted(paths)
    assert sum(line.count for line in lines) == len(paths)


# ---- numbers and tables


@pytest.mark.parametrize(
    ("number", "text"),
    [(0, "0"), (999, "999"), (1000, "1.00K"), (999_600, "1.00M"), (8_030_261_248, "8.03B"), (95e9, "95.0B")],
)
def test_counts(number, text):
    assert tables.count(int(number)) == text


def test_sizes_and_flops_have_their_own_units():
    assert tables.size(141_107_412_992) == "141 GB"
    assert tables.flops(2_818_572_288) == "2.82G"


@pytest.mark.parametrize("width", [60, 80, 100, 140])
def test_tables_fit_the_width(width):
    skipped = [layer(f"encoder.{i}.attention", reason="a norm between " * 8, code="norm") for i in range(9)]
    text = report(*[layer(f"model.layers.{i}.mlp") for i in range(32)], *skipped).render(width)
    assert max(map(len, text.split("\n"))) <= width


def test_a_narrow_table_keeps_names_sizes_and_exactness():
    text = report(*[layer(f"model.layers.{i}.mlp") for i in range(32)]).render(72)
    line = next(line for line in text.split("\n") if "{0..31}" in line)
    assert line.split()[:4] == ["model.layers.{0..31}.mlp", "32", "glu/silu", "64×256"]
    assert line.endswith("exact 3e-08")


def test_ascii_only_when_the_stream_cannot_encode(monkeypatch):
    made = report(layer("layers.0.mlp"), layer("layers.1.mlp"))
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(io.BytesIO(), encoding="ascii"))
    assert str(made).isascii() and "64x256" in str(made)
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(io.BytesIO(), encoding="utf-8"))
    assert "64×256" in str(made) and "─" in str(made)


# ---- the report


def test_every_skipped_candidate_shows_its_reason():
    text = report(
        layer("layers.0.mlp"),
        layer("head", reason="no residual add takes the output", code="no-residual"),
        layer("se.fc", reason="a convolution stands between", code="conv-between"),
    ).render(120)
    assert "no residual add takes the output" in text
    assert "a convolution stands between" in text
    assert "found 3 · rewritten 1 · skipped 2 (no-residual 1, conv-between 1)" in text


def test_reasons_that_name_their_layer_still_fold():
    layers = [layer(f"h.{i}.attn", reason=f"h.{i}.norm stands between", code="norm") for i in range(4)]
    text = report(*layers).render(120)
    assert "h.{0..3}.attn" in text
    assert "h.*.norm stands between" in text


def test_a_single_reason_is_verbatim():
    text = report(layer("h.7.attn", reason="h.7.norm stands between", code="norm")).render(120)
    assert "h.7.norm stands between" in text


def test_layers_of_other_shape_get_their_own_line():
    text = report(layer("h.0.mlp"), layer("h.1.mlp", d_hidden=512), layer("h.2.mlp")).render(140)
    assert "h.{0,2}.mlp" in text and "64×512" in text


def test_an_error_beyond_the_tolerance_is_loud():
    assert "outputs match the dense model to 3.0e-08" in str(report(layer("a")))
    assert "outputs DIFFER from the dense model" in str(report(layer("a"), check_error=1e-3))
    assert "outputs DIFFER from the dense model" in str(report(layer("a"), check_error=float("nan")))


def test_unchecked_is_said():
    unchecked = report(layer("a"), check_error=None, check_tolerance=None)
    assert "not compared" in str(unchecked)


def test_nothing_found_draws():
    text = str(report(dry_run=True, check_error=None))
    assert "no feed-forward network to rewrite" in text
    assert "found 0 · rewritten 0 · skipped 0" in text


def test_without_a_config_there_are_no_expert_columns():
    text = report(layer("h.0.mlp"), config=None, dry_run=True, check_error=None).render(140)
    assert "1 feed-forward network can become a Mixture-of-Experts" in text
    assert "active" not in text and "49.2K" in text


def test_passes_and_warnings_are_drawn():
    fuse = PassRecord(name="fuse_experts", matched=2, nodes_before=40, nodes_after=34, ms=1.25, note="n")
    text = report(layer("a"), passes=(fuse,), warnings=("experts are identical",)).render(120)
    assert re.search(r"fuse_experts\s+preserving\s+2\s+40 → 34\s+1.2\s+n", text)
    assert "warning: experts are identical" in text
    assert "no graph pass ran" in report(layer("a")).render(120, passes=True)


def test_json_is_unfolded_and_says_units():
    layers = [layer(f"h.{i}.mlp") for i in range(3)]
    data = json.loads(report(*layers, layer("head", reason="no residual", code="no-residual")).to_json())
    assert data["schema_version"] == 1
    assert [entry["fqn"] for entry in data["layers"]] == ["h.0.mlp", "h.1.mlp", "h.2.mlp", "head"]
    assert data["layers"][0]["flops_per_token_active"] == 197_632
    assert data["totals"] == {
        "found": 4,
        "rewritten": 3,
        "skipped": 1,
        "skipped_by_code": {"no-residual": 1},
        "flops_per_token_dense": 3 * 98_304,
        "flops_per_token_active": 3 * 197_632,
    }
    assert data["check_error_relative_norm"] == 3e-8
    assert data["config"]["num_experts"] == 8
    assert data["environment"]["torch"] == str(torch.__version__)


def test_json_has_every_field_of_the_report():
    data = report(layer("a")).to_dict()
    renamed = {"check_error", "check_tolerance"}
    fields = {name for name in RewriteReport.__dataclass_fields__ if name not in renamed}
    assert fields <= set(data)


# ---- on a real model


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(16)
        self.mlp = nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 16))

    def forward(self, x):
        return x + self.mlp(self.norm(x))


def test_the_report_of_a_model_counts_its_parameters():
    model = nn.Sequential(Block(), Block())
    made = moefy.report(model, num_experts=4, top_k=2)
    ffn = 2 * 16 * 64 + 64 + 16
    assert [entry.fqn for entry in made.rewritten] == ["0.mlp", "1.mlp"]
    assert made.params_dense == sum(p.numel() for p in model.parameters())
    assert made.params_total == made.params_dense + 2 * (3 * ffn + 4 * 16)
    assert made.flops_dense == 2 * 2 * 2 * 16 * 64
    assert "{0,1}.mlp" in str(made)
    moefy.transform(model, num_experts=4, top_k=2)
    done = moefy.report(model)
    assert not done.dry_run and done.check_error is not None
    assert done.params_total == sum(p.numel() for p in model.parameters())


# ---- progress


def test_progress_is_silent_without_a_terminal(capfd):
    assert list(progress([1, 2, 3], "layers", work=2 * LARGE)) == [1, 2, 3]
    assert capfd.readouterr() == ("", "")


def test_progress_shows_a_bar_to_a_person(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    stream = Terminal()
    monkeypatch.setattr("sys.stderr", stream)
    monkeypatch.delenv("RANK", raising=False)
    assert list(progress([1, 2], "layers", work=1)) == [1, 2]
    assert stream.getvalue() == ""
    assert list(progress([1, 2], "layers", work=2 * LARGE)) == [1, 2]
    assert "moefy: layers" in stream.getvalue()
    monkeypatch.setenv("RANK", "1")
    before = stream.getvalue()
    assert list(progress([1, 2], "layers", work=2 * LARGE)) == [1, 2]
    assert stream.getvalue() == before
