"""nn.TransformerEncoder: its fused kernels read ``linear1.weight`` themselves, which stacked experts do not fit."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import moefy
from integration.models import (
    EXACT,
    SAME,
    D,
    H,
    assert_close,
    encoder,
    randomize,
)


def inputs() -> tuple[Tensor, Tensor]:
    """A batch and its padding mask; True is padding."""
    torch.manual_seed(2)
    mask = torch.zeros(3, 6, dtype=torch.bool)
    mask[0, 4:], mask[2, 1:] = True, True
    return torch.randn(3, 6, D), mask


def built(**options: object) -> nn.TransformerEncoder:
    torch.manual_seed(1)
    model = encoder(**options)
    assert model.use_nested_tensor == (not options.get("norm_first", False))
    return model


@pytest.mark.parametrize("activation", ["relu", "gelu"])
@pytest.mark.parametrize("norm_first", [False, True], ids=["post-norm", "pre-norm"])
@pytest.mark.parametrize("grad", [False, True], ids=["no-grad", "grad"])
def test_eval_with_a_padding_mask(activation: str, norm_first: bool, grad: bool) -> None:
    """Where there is no padding the output is the dense one's; the dense one may take its fused path."""
    model, (x, mask) = built(activation=activation, norm_first=norm_first).eval(), inputs()
    reference = copy.deepcopy(model)
    moefy.transform(model, 4, example_args=(x,))
    with torch.set_grad_enabled(grad):
        expected = reference(x, src_key_padding_mask=mask)
        got = model(x, src_key_padding_mask=mask)
    assert got.shape == x.shape
    assert_close(got[~mask], expected[~mask], EXACT[torch.float32])


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_distinct_experts_ignore_padding(training: bool) -> None:
    """Experts act token by token: each sequence alone, without its padding, gives the same."""
    model, (x, mask) = built().double(), inputs()
    x = x.double()
    moefy.transform(model, 4, example_args=(x,))
    randomize(model)
    model.train(training)
    with torch.no_grad():
        together = model(x, src_key_padding_mask=mask)
        for i in range(len(x)):
            length = int((~mask[i]).sum())
            assert_close(together[i, :length], model(x[i : i + 1, :length])[0], SAME[torch.float64])


def test_flags_are_set_and_undone() -> None:
    model, (x, mask) = built().eval(), inputs()
    flags = [layer.activation_relu_or_gelu for layer in model.layers]
    with torch.no_grad():
        before = model(x, src_key_padding_mask=mask)
    moefy.transform(model, 4, example_args=(x,))
    assert not model.use_nested_tensor
    assert [layer.activation_relu_or_gelu for layer in model.layers] == [0, 0]
    moefy.undo(model)
    assert model.use_nested_tensor
    assert [layer.activation_relu_or_gelu for layer in model.layers] == flags != [0, 0]
    with torch.no_grad():
        assert torch.equal(model(x, src_key_padding_mask=mask), before)


def test_one_layer_left_dense() -> None:
    """``exclude`` leaves layer 0 on its fused path."""
    model, (x, mask) = built().eval(), inputs()
    reference = copy.deepcopy(model)
    moefy.transform(model, 4, example_args=(x,), exclude="layers.0*")
    assert model.layers[0].activation_relu_or_gelu == reference.layers[0].activation_relu_or_gelu
    with torch.no_grad():
        got, expected = (m(x, src_key_padding_mask=mask) for m in (model, reference))
    assert_close(got[~mask], expected[~mask], EXACT[torch.float32])


@pytest.mark.parametrize("batch_first", [True, False])
def test_masks_of_both_kinds_and_causality(batch_first: bool) -> None:
    torch.manual_seed(1)
    layer = nn.TransformerEncoderLayer(D, 2, H, dropout=0.0, batch_first=batch_first)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=batch_first).eval()
    x, mask = inputs()
    x = x if batch_first else x.transpose(0, 1)
    causal = nn.Transformer.generate_square_subsequent_mask(6)
    reference = copy.deepcopy(model)
    moefy.transform(model, 4, example_args=(x,))
    with torch.no_grad():
        got, expected = (
            m(x, mask=causal, src_key_padding_mask=torch.zeros(3, 6).masked_fill(mask, -1e9), is_causal=True)
            for m in (model, reference)
        )
    keep = ~mask if batch_first else ~mask.T
    assert_close(got[keep], expected[keep], EXACT[torch.float32])
