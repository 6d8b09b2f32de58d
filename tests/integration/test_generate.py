"""Hugging Face ``generate()`` and Trainer on transformed models."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import moefy
from integration.models import (
    SAME,
    D,
    H,
    assert_same,
    batch,
    call,
    dense,
    hugging_face,
    randomize,
    transformed,
)

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("ignore")

WAYS: dict[str, dict[str, Any]] = {
    "greedy": {"num_beams": 1},
    "beam": {"num_beams": 3, "num_return_sequences": 2, "length_penalty": 0.7},
}


def opt() -> nn.Module:
    """Decoder-only with the FFN's linears in the block."""
    return hugging_face("OPTForCausalLM", ffn_dim=H, dropout=0.0, word_embed_proj_dim=D)


def dense_generator(name: str) -> nn.Module:
    """Decisive logits (ties would be broken by rounding) that do not settle on one token."""
    torch.manual_seed(3)
    model = opt().double() if name == "opt" else dense(name)
    scales = {"position": 3.0, "encoder_attn": 0.05, "embed": 1.0, "shared": 1.0, "head": 1.0, "weight": 0.3}
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if parameter.dim() == 2:
                parameter.normal_(std=next(std for part, std in scales.items() if part in key))
    return model.eval()


def moe_generator(name: str, random: bool) -> nn.Module:
    """The transformed generator, experts copied or distinct."""
    model = dense_generator(name)
    if name == "opt":
        moefy.transform(model, 4)
    else:
        transformed(model, name)
    if random:
        randomize(model)
    return model


def generate(model: nn.Module, way: str, **options: Any) -> Tensor:
    """From prompts of two lengths, the shorter one padded on the left."""
    torch.manual_seed(3)
    ids = torch.randint(3, 40, (3, 7))
    mask = torch.ones_like(ids)
    ids[0, :3], mask[0, :3] = 0, 0
    config = transformers.GenerationConfig(
        max_new_tokens=9,
        do_sample=False,
        pad_token_id=0,
        eos_token_id=2,
        bos_token_id=1,
        decoder_start_token_id=2,
        **WAYS[way],
        **options,
    )
    tokens = model.generate(ids, attention_mask=mask, generation_config=config)
    assert max(len(row.unique()) for row in tokens[:, -config.max_new_tokens :]) >= 3, "it repeats itself"
    return tokens


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", ["llama", "opt", "bart"])
def test_copies_generate_the_dense_tokens(name: str, way: str) -> None:
    expected = generate(dense_generator(name), way)
    assert torch.equal(generate(moe_generator(name, random=False), way), expected)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", ["llama", "opt", "bart"])
def test_distinct_experts_generate_the_same_with_and_without_cache(name: str, way: str) -> None:
    """One token a step against the whole prefix a step: tokens are routed one by one."""
    model = moe_generator(name, random=True)
    with_cache = generate(model, way, use_cache=True)
    assert torch.equal(with_cache, generate(model, way, use_cache=False))
    assert not torch.equal(with_cache, generate(dense_generator(name), way))


@pytest.mark.parametrize("name", ["llama", "opt"])
def test_greedy_tokens_are_the_argmax_of_the_forward(name: str) -> None:
    model = moe_generator(name, random=True)
    ids = torch.randint(3, 40, (2, 5))
    with torch.no_grad():
        expected = ids
        for _ in range(6):
            expected = torch.cat([expected, model(expected).logits[:, -1:].argmax(-1)], 1)
        got = model.generate(ids, max_new_tokens=6, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert torch.equal(got, expected)


@pytest.mark.parametrize("name", ["llama", "bart"])
def test_sampling_is_repeatable(name: str) -> None:
    """Copies draw what the dense model draws."""
    drawn = []
    for model in (dense_generator(name), moe_generator(name, random=False)):
        torch.manual_seed(5)
        ids = batch(name)["input_ids"]
        drawn.append(model.generate(ids, do_sample=True, top_k=0, max_new_tokens=8, pad_token_id=0))
    assert torch.equal(*drawn)


# -- Trainer ---------------------------------------------------------------------------------------------------------
class Tokens(torch.utils.data.Dataset):
    """Random sequences with labels."""

    def __init__(self, name: str) -> None:
        pytest.importorskip("accelerate")
        self.rows = [batch(name, 1, seed=i)["input_ids"][0] for i in range(16)]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.rows[index], "labels": self.rows[index]}


def trainer(model: nn.Module, name: str, folder: Path, **options: Any) -> Any:
    arguments = transformers.TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=4,
        max_steps=3,
        learning_rate=1e-2,
        report_to=[],
        logging_steps=1,
        use_cpu=True,
        disable_tqdm=True,
        dataloader_pin_memory=False,
        **{"save_strategy": "no", **options},
    )
    assert arguments.max_grad_norm == 1.0
    return transformers.Trainer(model=model, args=arguments, train_dataset=Tokens(name))


def manual_steps(model: nn.Module, name: str, order: list[list[int]]) -> list[float]:
    """The Trainer's defaults by hand: AdamW, linear decay, clipping at 1."""
    data = Tokens(name)
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    norms = []
    for step, rows in enumerate(order):
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 * (1 - step / len(order))
        ids = torch.stack([data.rows[i] for i in rows])
        loss = model(input_ids=ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        norms.append(float(nn.utils.clip_grad_norm_(model.parameters(), 1.0)))
        optimizer.step()
    return norms


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_trainer_takes_the_steps_of_a_plain_loop(name: str, tmp_path: Path) -> None:
    model = transformed(dense(name), name)
    randomize(model)
    reference = copy.deepcopy(model)
    run = trainer(model, name, tmp_path)
    order: list[list[int]] = []
    data = run.train_dataset
    collate = run.data_collator

    def noting(features: list[dict[str, Tensor]]) -> Any:
        order.append([next(i for i, r in enumerate(data.rows) if r is f["input_ids"]) for f in features])
        return collate(features)

    run.data_collator = noting
    run.train()
    norms = manual_steps(reference, name, order[:3])
    logged = [entry["grad_norm"] for entry in run.state.log_history if "grad_norm" in entry]
    assert logged == pytest.approx(norms, rel=1e-6)
    assert min(norms) > 0
    assert_same(dict(model.state_dict()), dict(reference.state_dict()), SAME[torch.float64], floor=1e-12)


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_trainer_with_checkpointing_and_autocast(name: str, tmp_path: Path) -> None:
    """Gradient checkpointing and bf16, as users turn them on; every router learns."""
    model = transformed(dense(name, torch.float32), name, expert_noise=0.1)
    model.config.use_cache = False
    before = {n: p.detach().clone() for n, p in model.named_parameters() if "router" in n}
    run = trainer(model, name, tmp_path, bf16=True, gradient_checkpointing=True)
    result = run.train()
    assert result.training_loss == result.training_loss
    after = dict(model.named_parameters())
    assert before
    assert all(not torch.equal(after[n], p) for n, p in before.items())


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_a_saved_model_is_loaded_into_a_transformed_one(name: str, tmp_path: Path) -> None:
    """``save_pretrained`` writes the experts; they go back through ``load_state_dict``."""
    from safetensors.torch import load_file

    model = transformed(dense(name, torch.float32), name).eval()
    randomize(model)
    model.save_pretrained(tmp_path)
    other = transformed(dense(name, torch.float32), name).eval()
    missing = other.load_state_dict(load_file(tmp_path / "model.safetensors"), strict=False)
    tied = set(getattr(other, "_tied_weights_keys", None) or ())
    assert set(missing.missing_keys) <= tied, missing
    assert not missing.unexpected_keys
    inputs = batch(name, dtype=torch.float32)
    with torch.no_grad():
        assert torch.equal(call(other, inputs), call(model, inputs))
