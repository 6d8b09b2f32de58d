"""``moefy.expert_load``: numbers by hand, tables, plots, the command line, HF Trainer's logs."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from integration.aux_models import LM, explicit, lm_pair, tokens
from integration.models import hugging_face, moe, randomize, routers
from torch import nn

import moefy
from moefy.cli.main import main
from moefy.config import AuxLoss
from moefy.errors import ConfigError, NoMoELayer
from moefy.reports.expert_load import LayerLoad, LoadReport, bars, layer_name
from moefy.reports.text import tables

COUNTS = (6, 2, 0, 8)


@pytest.mark.parametrize(
    ("counts", "cv", "max_over_mean", "max_over_min", "entropy", "dead"),
    [
        (COUNTS, math.sqrt(40 / 4) / 4, 2.0, 9.0, 1.4056390622295665 / 2, (2,)),
        ((5, 5, 5, 5), 0.0, 1.0, 1.0, 1.0, ()),
        ((0, 12, 0, 0), math.sqrt(3), 4.0, 13.0, 0.0, (0, 2, 3)),
        ((0, 0, 0, 0), 0.0, 0.0, 0.0, 0.0, ()),
        ((7,), 0.0, 1.0, 1.0, 1.0, ()),
    ],
)
def test_metrics(
    counts: Any, cv: float, max_over_mean: float, max_over_min: float, entropy: float, dead: Any
) -> None:
    layer = LayerLoad(fqn="a", tokens_per_expert=counts)
    got = (layer.cv, layer.max_over_mean, layer.max_over_min, layer.entropy)
    assert got == pytest.approx((cv, max_over_mean, max_over_min, entropy), abs=1e-12)
    assert layer.dead == dead


def test_dropped_share() -> None:
    assert LayerLoad(fqn="a", tokens_per_expert=COUNTS, dropped=4).dropped_share == 4 / 20
    assert LayerLoad(fqn="a", tokens_per_expert=(0, 0)).dropped_share == 0


def test_bars() -> None:
    assert bars((8, 1, 0, 4)) == "█▁·▄"
    assert bars([1] * 256) == "█" * 64
    assert tables.to_ascii(bars((8, 1, 0, 4))) == "81-4"


def test_names() -> None:
    assert layer_name("module._orig_mod.layers.0.mlp.router") == "layers.0.mlp"
    assert layer_name("router") == ""


def test_load_of_a_model() -> None:
    _, model = lm_pair(AuxLoss(weight=0.5, z_weight=0.1))
    losses = []
    for seed in range(2):
        model(*tokens(seed=seed))[1].backward()
        losses.append(float(moefy.aux_loss(model)))
    report = moefy.expert_load(nn.Sequential(model).train(), reset=True)
    assert [layer.fqn for layer in report.layers] == ["0.layers.0.fc1", "0.layers.1.fc1"]
    assert all(layer.total == 2 * 4 * 6 * 2 for layer in report.layers)
    assert report.l_aux == pytest.approx(sum(losses) / 2, rel=1e-6)
    for layer in report.layers:
        weighted = 0.5 * layer.losses["balance"] + 0.1 * layer.losses["z_loss"]
        assert layer.losses["l_aux"] == pytest.approx(weighted, rel=1e-6) and "router" not in layer.losses
    again = moefy.expert_load(model)
    assert all(layer.total == 0 and layer.losses == {} for layer in again.layers)
    assert "no training forward was counted" in str(again)


def test_a_table() -> None:
    layer = LayerLoad(fqn="mlp", tokens_per_expert=COUNTS, dropped=4, losses={"l_aux": 0.25, "balance": 2.5})
    text = LoadReport(model_class="GPT", layers=(layer,), ranks=2).render(120)
    assert "moefy load: GPT, 2 ranks, max/mean at most 2.00 (mlp), dead experts 1" in text
    (row,) = (line.split() for line in text.splitlines() if line.startswith("mlp"))
    assert row == ["mlp", "16", "▆▂·█", "0.79", "2.00", "9.00", "0.703", "1", "20.0%", "0.25"]
    assert max(map(len, LoadReport(model_class="GPT", layers=(layer,)).render(60).splitlines())) <= 60
    data = json.loads(LoadReport(model_class="GPT", layers=(layer,)).to_json())
    assert data["layers"][0]["dead"] == [2] and data["l_aux"] == 0.25


def test_wrappers_do_not_show() -> None:
    model = moe("aligned")
    assert moefy.expert_load(nn.DataParallel(model)).layers[0].fqn == "layers.0.mlp"
    assert moefy.expert_load(nn.DataParallel(model)).model_class == "Stack"


def test_a_dense_model_has_no_load() -> None:
    with pytest.raises(NoMoELayer, match="Linear"):
        moefy.expert_load(nn.Linear(2, 2))


# -- over training -------------------------------------------------------------------------------------------------
def test_history() -> None:
    _, model = lm_pair()
    history = moefy.LoadHistory(model, every=2)
    expected = []
    for step in range(5):
        model(*tokens(seed=step))
        history.step()
        if step % 2:
            expected.append(moefy.expert_load(model, reset=True))
    shares = history.shares()
    assert history.steps == [0, 2, 4] and list(shares) == ["layers.0.fc1", "layers.1.fc1"]
    for i, report in enumerate(expected):
        for layer in report.layers:
            got = shares[layer.fqn][i]
            assert got.tolist() == pytest.approx([n / layer.total for n in layer.tokens_per_expert])
    with pytest.raises(ConfigError, match="every"):
        moefy.LoadHistory(model, every=0)


def test_plots(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    _, model = lm_pair()
    history = moefy.LoadHistory(model)
    for seed in range(3):
        model(*tokens(seed=seed))
        history.step()
    history.plot(tmp_path / "history.png")
    moefy.expert_load(model).plot(tmp_path / "layers.png")
    for name in ("history.png", "layers.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


# -- the command line ----------------------------------------------------------------------------------------------
def make() -> tuple[nn.Module, tuple[torch.Tensor]]:
    """A target."""
    torch.manual_seed(0)
    return LM(), (tokens()[0],)


def test_command(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    assert main(["report", "test_expert_load:make", "--load", "-e", "4"]) == 0
    assert "layers.1.fc1" in capsys.readouterr().out
    assert main(["report", "test_expert_load:make", "--load", "-e", "4", "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert [layer["total"] for layer in data["layers"]] == [4 * 4 * 6 * 2] * 2
    assert main(["report", "test_expert_load:make", "--load", "--passes"]) == 2


def test_command_on_a_config(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hugging_face("LlamaForCausalLM", num_key_value_heads=1).config.save_pretrained(tmp_path)  # type: ignore[union-attr, operator]
    data = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**data, "architectures": ["LlamaForCausalLM"]}))
    assert main(["report", str(tmp_path), "--load"]) == 2
    assert "MODULE:FACTORY" in capsys.readouterr().err


# -- Hugging Face's Trainer ----------------------------------------------------------------------------------------
def test_trainer(tmp_path: Path) -> None:
    """One step of two micro-batches: SGD moves by the gradient of the explicit loss; the load is in the logs."""
    transformers = pytest.importorskip("transformers")
    from moefy.hf.callback import log_load

    ids = torch.randint(3, 40, (4, 7), generator=torch.Generator().manual_seed(0))
    labels = ids.clone()
    labels[3, 2:] = -100
    data = [{"input_ids": i, "labels": l} for i, l in zip(ids, labels, strict=True)]

    def build(aux: AuxLoss | None) -> nn.Module:
        torch.manual_seed(1)
        model = hugging_face("LlamaForCausalLM", num_key_value_heads=1, use_cache=False).double()
        moefy.transform(model, 4, example_kwargs={"input_ids": ids}, check=False, aux_loss=aux)
        randomize(model)
        return model.train()

    plain, model = build(None), build(AuxLoss(weight=0.3, z_weight=0.05))
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    args = transformers.TrainingArguments(
        output_dir=str(tmp_path),
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        max_steps=1,
        logging_steps=1,
        max_grad_norm=0.0,
        report_to=[],
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
        lr_scheduler_type="constant",
    )
    sgd = torch.optim.SGD(model.parameters(), lr=1.0)
    trainer = transformers.Trainer(model, args, train_dataset=data, optimizers=(sgd, None))
    trainer._get_train_sampler = lambda *_: None  # in order
    log_load(trainer)
    trainer.train()

    items = (labels[:, 1:] != -100).sum()
    for rows in (slice(0, 2), slice(2, 4)):
        part = {"input_ids": ids[rows], "labels": labels[rows], "num_items_in_batch": items}
        share = (labels[rows, 1:] != -100).sum().item() / items.item()
        expected = explicit(plain, lambda m, part=part: m(**part).loss, share=share)
    for name, p in model.named_parameters():
        moved = before[name] - p.detach()
        assert (moved - expected[name]).norm() <= 1e-6 * expected[name].norm() + 1e-12, name
    (record,) = (r for r in trainer.state.log_history if "moe/l_aux" in r)
    assert record["moe/l_aux"] > 0 and record["moe/max_over_mean"] >= 1
    assert 0 < record["moe/model.layers.0.mlp/entropy"] <= 1
    assert all(r.load_counter.ends.sum() == 0 for r in routers(model).values())
    with pytest.raises(ConfigError, match="did you mean 'entropy'"):
        log_load(trainer, metrics=["entropi"])
