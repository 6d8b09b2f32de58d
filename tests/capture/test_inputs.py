"""Derived inputs: one of the first candidates is accepted by the model, for every family a user may bring.

Each model runs under ``FakeTensorMode`` in eval mode, as ``transform`` does it, so sizes do not matter.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import zoo.families  # noqa: F401  (registers the families)
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from zoo.family import FAMILIES, Family

from moefy.capture.inputs.derive import derive_inputs
from moefy.capture.inputs.tensors import ExampleInputs, Sampler, describe

ROOT = Path(__file__).resolve().parents[2]
TRIES = 16  # as many as transform tries


def accepted(model: nn.Module, mode: FakeTensorMode | None = None) -> tuple[int, ExampleInputs]:
    """The index and value of the first candidate that the model's forward takes."""
    errors = []
    with mode or FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        for index, candidate in zip(range(TRIES), derive_inputs(model), strict=False):
            try:
                model.eval()(*candidate.args, **candidate.kwargs)
            except Exception as error:
                errors.append(f"{candidate.description}: {type(error).__name__}: {error}")
            else:
                return index, candidate
    raise AssertionError("no candidate is accepted:\n" + "\n".join(errors))


# ---- torch's own transformers


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("kind", ["Transformer", "Encoder", "Decoder", "EncoderLayer", "DecoderLayer"])
def test_torch_transformers_are_known(kind, batch_first):
    options = {"dim_feedforward": 32, "batch_first": batch_first}
    layers = {
        "Encoder": lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, **options), 1),
        "Decoder": lambda: nn.TransformerDecoder(nn.TransformerDecoderLayer(16, 2, **options), 1),
        "EncoderLayer": lambda: nn.TransformerEncoderLayer(16, 2, **options),
        "DecoderLayer": lambda: nn.TransformerDecoderLayer(16, 2, **options),
        "Transformer": lambda: nn.Transformer(16, 2, 1, 1, **options),
    }
    index, inputs = accepted(layers[kind]())
    assert index == 0
    assert inputs.args[0].shape == ((1, 8, 16) if batch_first else (8, 1, 16))
    assert len(inputs.args) == (1 if "Encoder" in kind else 2)


# ---- plain modules


class TokenModel(nn.Module):
    """nanoGPT's interface: ids, optional targets, positions from a table of eight."""

    def __init__(self) -> None:
        super().__init__()
        self.wte, self.wpe = nn.Embedding(65, 16), nn.Embedding(8, 16)
        self.body = nn.Linear(16, 16)

    def forward(self, idx, targets=None):
        assert idx.shape[1] <= 8
        return self.body(self.wte(idx) + self.wpe(torch.arange(idx.shape[1])))


class RawWeights(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w1, self.w2 = nn.Parameter(torch.randn(64, 16)), nn.Parameter(torch.randn(16, 64))

    def forward(self, x):
        return x + (x @ self.w1.T).relu() @ self.w2.T


class Positions(nn.Module):
    """A sequence length fixed by a position table."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(1, 21, 16))
        self.body = nn.Linear(16, 16)

    def forward(self, x):
        return self.body(x + self.table)


class Masked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.attention = nn.LayerNorm(16), nn.MultiheadAttention(16, 2, batch_first=True)

    def forward(self, x, mask):
        y = self.norm(x)
        return x + self.attention(y, y, y, attn_mask=mask)[0]


class Diffusion(nn.Module):
    """A DiT's interface: picture, time, class."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(4, 16, 2, 2)
        self.time, self.label = nn.Linear(1, 16), nn.Embedding(11, 16)

    def forward(self, x, t, y):
        c = self.time(t[:, None].to(x.dtype)) + self.label(y)
        return self.patches(x) + c[:, :, None, None]


class Conditioned(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.kv = nn.Linear(16, 16), nn.Linear(24, 16)

    def forward(self, x, *, context):
        return self.q(x) + self.kv(context).mean(1, keepdim=True)


class Cached(nn.Module):
    """Llama's reference interface: an integer position beside the tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(40, 16)

    def forward(self, tokens: Tensor, start_pos: int):
        return self.embed(tokens) * (start_pos + 1)


def channels_first() -> nn.Module:
    return nn.Sequential(nn.Conv2d(5, 16, 3, padding=1), nn.BatchNorm2d(16), nn.GELU())


@pytest.mark.parametrize(
    ("build", "shapes"),
    [
        (TokenModel, [(1, 8)]),
        (RawWeights, [(1, 8, 16)]),
        (Positions, [(1, 21, 16)]),
        (Masked, [(1, 8, 16)]),
        (Diffusion, [(1, 4, 32, 32), (1,), (1,)]),
        (Conditioned, [(1, 8, 16)]),
        (Cached, [(1, 8)]),
        (lambda: nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 16)), [(1, 8, 16)]),
        (lambda: nn.Sequential(nn.LayerNorm(16), nn.Linear(16, 3)), [(1, 8, 16)]),
        (lambda: nn.ModuleDict({"x": nn.Linear(4, 4)})["x"], [(1, 8, 4)]),
        (channels_first, [(1, 5, 32, 32)]),
        (lambda: nn.Sequential(nn.Conv1d(3, 8, 5), nn.ReLU()), [(1, 3, 16)]),
        (lambda: nn.Sequential(nn.Conv3d(2, 4, 3), nn.ReLU()), [(1, 2, 16, 16, 16)]),
        (lambda: nn.Sequential(nn.Conv2d(1, 6, 5), nn.Flatten(), nn.Linear(3456, 10)), [(1, 1, 28, 28)]),
    ],
)
def test_plain_modules_are_guessed(build, shapes):
    _, inputs = accepted(build())
    assert [tuple(a.shape) for a in inputs.args if isinstance(a, Tensor)] == shapes


def test_tokens_stay_inside_every_table():
    model = nn.Sequential(nn.Embedding(3, 8), nn.Linear(8, 8))
    ids = next(derive_inputs(model)).args[0]
    assert ids.dtype == torch.int64 and int(ids.min()) >= 0 and int(ids.max()) < 3


def test_an_fx_graph_answers_with_its_own_placeholders():
    class Two(nn.Module):
        def forward(self, x, ids):
            return x * ids

    exported = torch.export.export(Two(), (torch.randn(3, 7), torch.ones(7, dtype=torch.int32)))
    inputs = next(derive_inputs(exported.graph_module))
    assert [(tuple(a.shape), a.dtype) for a in inputs.args] == [((3, 7), torch.float32), ((7,), torch.int32)]


# ---- libraries: Hugging Face, timm, torchvision, x-transformers, Megatron-core and the zoo's own models

LIGHT = {"torch", "transformers"}


@pytest.mark.parametrize(
    "family",
    [
        pytest.param(f, id=f.name, marks=[] if f.library in LIGHT else [pytest.mark.zoo])
        for f in FAMILIES.values()
    ],
)
def test_every_family_accepts_a_derived_input(family: Family):
    model, _, _ = family.make()
    errors = []
    for _, candidate in zip(range(TRIES), derive_inputs(model), strict=False):
        try:
            with torch.no_grad():
                model(*candidate.args, **candidate.kwargs)
        except Exception as error:
            errors.append(f"{candidate.description}: {type(error).__name__}: {error}")
        else:
            return
    raise AssertionError("no candidate is accepted:\n" + "\n".join(errors))


def test_both_towers_of_a_two_tower_model_are_fed():
    from transformers import CLIPConfig, CLIPModel

    tower = {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "projection_dim": 8,
    }
    text = {**tower, "vocab_size": 40, "max_position_embeddings": 16}
    vision = {**tower, "image_size": 8, "patch_size": 4}
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8))
    index, inputs = accepted(model)
    assert index == 0
    assert {name: tuple(v.shape) for name, v in inputs.kwargs.items()} == {
        "input_ids": (1, 8),
        "pixel_values": (1, 3, 8, 8),
    }


def test_text_avoids_special_ids_and_ends_with_the_end_of_text():
    from transformers import BartConfig, BartForSequenceClassification

    config = BartConfig(
        vocab_size=12,
        d_model=16,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=16,
        decoder_ffn_dim=16,
        pad_token_id=1,
        bos_token_id=0,
        eos_token_id=2,
        max_position_embeddings=32,
    )
    model = BartForSequenceClassification(config).eval()
    inputs = next(derive_inputs(model))
    with torch.no_grad():
        model(**inputs.kwargs)
    ids = inputs.kwargs["input_ids"]
    assert int(ids[0, -1]) == 2
    assert not set(ids[0, :-1].tolist()) & {0, 1, 2}


def test_multiple_choice_gets_its_extra_axis():
    from transformers import BertConfig, BertForMultipleChoice

    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    _, inputs = accepted(BertForMultipleChoice(BertConfig(vocab_size=40, **small)))
    assert inputs.kwargs["input_ids"].ndim == 3


# ---- contract


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_floats_follow_the_models_dtype(dtype):
    inputs = next(derive_inputs(nn.Linear(4, 4).to(dtype)))
    assert inputs.args[0].dtype == dtype


def test_inputs_live_on_the_models_device():
    assert next(derive_inputs(nn.Linear(4, 4, device="meta"))).args[0].is_meta


def test_the_model_does_not_run_and_nothing_random_moves():
    class Untouchable(TokenModel):
        def forward(self, idx, targets=None):
            raise AssertionError("derive_inputs ran the model")

    model, state = Untouchable(), torch.random.get_rng_state()
    candidates = list(derive_inputs(model))
    assert candidates and model.training
    assert torch.equal(state, torch.random.get_rng_state())
    again = list(derive_inputs(model))
    assert [c.description for c in candidates] == [c.description for c in again]
    assert torch.equal(candidates[0].args[0], again[0].args[0])


def test_descriptions_are_one_line():
    for candidate in derive_inputs(TokenModel()):
        assert "\n" not in candidate.description and candidate.description.endswith(")")


def test_description_of_values():
    assert describe(torch.zeros(2, 3, dtype=torch.bfloat16)) == "bfloat16 [2, 3]"
    assert describe([torch.zeros(1)]) == "(float32 [1])"
    assert describe(0) == "0"


def test_a_sampler_repeats_itself():
    first, second = (Sampler(torch.device("cpu"), torch.float32) for _ in range(2))
    assert torch.equal(first.floats(2, 3), second.floats(2, 3))
    assert not torch.equal(first.floats(2, 3), first.floats(2, 3))


def test_no_third_party_library_is_imported():
    program = (
        "import sys, torch; from moefy.capture.inputs.derive import derive_inputs;"
        "list(derive_inputs(torch.nn.Linear(2, 2)));"
        "print([m for m in ('transformers', 'timm', 'torchvision', 'triton') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"
