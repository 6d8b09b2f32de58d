"""Bad arguments: a named error that says what was got and what was expected, before any op runs."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from moefy import errors, ops

T, D, H, E, K = 5, 3, 4, 4, 2
INDEX = torch.tensor([[0, 1], [3, 0], [1, -1], [0, 3], [3, 1]])
ORDER, OFFSETS = ops.sort_by_expert(INDEX, E)


def sort(**change):
    return ops.sort_by_expert(**{"top_k_index_TK": INDEX, "num_experts": E, **change})


def top_k(**change):
    return ops.top_k_softmax(**{"logits_TE": torch.zeros(T, E), "top_k": K, **change})


def permute(**change):
    return ops.permute(**{"x_TD": torch.zeros(T, D), "order_N": ORDER, "top_k": K, **change})


def linear(**change):
    rows, weight, bias = torch.zeros(T * K, D), torch.zeros(E, H, D), torch.zeros(E, H)
    given = {"x_NI": rows, "weight_EOI": weight, "bias_EO": bias, "offsets_E": OFFSETS}
    return ops.grouped_linear(**{**given, **change})


def combine(**change):
    given = {"y_ND": torch.zeros(T * K, D), "top_k_weights_TK": torch.zeros(T, K), "order_N": ORDER}
    return ops.combine(**{**given, **change})


def ffn(**change):
    given = {
        "x_TD": torch.zeros(T, D),
        "top_k_weights_TK": torch.zeros(T, K),
        "order_N": ORDER,
        "offsets_E": OFFSETS,
        "w_up": torch.zeros(E, H, D),
        "b_up": torch.zeros(E, H),
        "w_down": torch.zeros(E, D, H),
        "b_down": torch.zeros(E, D),
        "activation": "gelu",
    }
    return ops.expert_ffn(**{**given, **change})


meta = torch.device("meta")
Z = torch.zeros
Shape, Dtype, Device, Config = errors.ShapeError, errors.DtypeError, errors.DeviceError, errors.ConfigError
gate = Z(E, H, D)

BAD = [
    (sort, {"top_k_index_TK": INDEX[0]}, Shape, "top_k_index.*shape [2]; expected [T, K]"),
    (sort, {"top_k_index_TK": INDEX.float()}, Dtype, "got torch.float32; expected torch.int64"),
    (sort, {"top_k_index_TK": INDEX.tolist()}, Dtype, "top_k_index must be a tensor; got list"),
    (sort, {"top_k_index_TK": INDEX[:, :0]}, Shape, "K >= 1"),
    (sort, {"num_experts": 0}, Config, "num_experts: got 0; expected num_experts >= 1"),
    (sort, {"num_experts": 2.0}, Config, "num_experts: got 2.0; expected an int"),
    (sort, {"num_experts": True}, Config, "num_experts: got True; expected an int"),
    (top_k, {"logits_TE": Z(E)}, Shape, "logits.*shape [4]; expected [T, E]"),
    (top_k, {"logits_TE": INDEX}, Dtype, "logits must be floating point; got torch.int64"),
    (top_k, {"top_k": 0}, Config, "top_k: got 0; expected top_k >= 1"),
    (top_k, {"top_k": E + 1}, Config, "top_k: got 5; expected top_k <= E = 4"),
    (permute, {"x_TD": Z(())}, Shape, "x.*shape []; expected [T, D]"),
    (permute, {"x_TD": Z(T, 2, D)}, Shape, "expected [T, D]"),
    (permute, {"x_TD": Z(T, D).int()}, Dtype, "x must be floating point; got torch.int32"),
    (permute, {"x_TD": Z(T, D).to(torch.complex64)}, Dtype, "got torch.complex64"),
    (permute, {"x_TD": Z(T, D).to_sparse()}, Dtype, "layout is not supported; got torch.sparse_coo"),
    (permute, {"x_TD": Z(T + 1, D)}, Shape, "order length does not fit; got 10; expected T * top_k = 12"),
    (permute, {"order_N": ORDER.int()}, Dtype, "order has the wrong dtype; got torch.int32"),
    (permute, {"order_N": ORDER[None]}, Shape, "order.*expected [T*K]"),
    (permute, {"order_N": ORDER.to(meta)}, Device, "order is on meta but x on cpu"),
    (permute, {"top_k": 0}, Config, "top_k: got 0; expected top_k >= 1"),
    (permute, {"top_k": "2"}, Config, "top_k: got '2'; expected an int"),
    (permute, {"order_N": ORDER - 1}, errors.RoutingError, "got range [-1, 8]; expected a permutation"),
    (permute, {"order_N": ORDER + 1}, errors.RoutingError, "got range [1, 10]"),
    (
        linear,
        {"x_NI": Z(T * K, D + 4)},
        Shape,
        "x.shape[-1] does not fit; got 7; expected weight.shape[2] = 3",
    ),
    (linear, {"weight_EOI": Z(H, D)}, Shape, "weight.*shape [4, 3]; expected [E, out, in]"),
    (linear, {"weight_EOI": Z(E, H, D).bfloat16()}, Dtype, "weight dtype torch.bfloat16 != x dtype"),
    (linear, {"weight_EOI": Z(E, H, D, device=meta)}, Device, "weight is on meta but x on cpu"),
    (linear, {"bias_EO": Z(E, H + 1)}, Shape, "bias.shape[1] does not fit; got 5"),
    (linear, {"bias_EO": Z(E + 1, H)}, Shape, "bias.shape[0] does not fit; got 5"),
    (linear, {"bias_EO": Z(H)}, Shape, "bias.*expected [E, out]"),
    (linear, {"bias_EO": Z(E, H).double()}, Dtype, "bias dtype torch.float64"),
    (linear, {"offsets_E": OFFSETS.long()}, Dtype, "offsets has the wrong dtype; got torch.int64"),
    (linear, {"offsets_E": OFFSETS[1:]}, Shape, "offsets length does not fit; got 3"),
    (linear, {"offsets_E": OFFSETS + 9}, errors.RoutingError, "got 12; expected 0 <= end <= rows = 10"),
    (linear, {"offsets_E": -OFFSETS}, errors.RoutingError, "offsets[0] is out of order; got -3"),
    (linear, {"offsets_E": OFFSETS.flip(0).contiguous()}, errors.RoutingError, "out of order"),
    (combine, {"y_ND": Z(T * K + 1, D)}, Shape, "number of rows of y does not fit; got 11"),
    (combine, {"top_k_weights_TK": Z(T * K)}, Shape, "top_k_weights.*expected [T, K]"),
    (combine, {"top_k_weights_TK": Z(T, K).int()}, Dtype, "top_k_weights must be floating point"),
    (combine, {"top_k_weights_TK": Z(T, 0), "order_N": ORDER[:0], "y_ND": Z(0, D)}, Config, "top_k: got 0"),
    (combine, {"order_N": ORDER[1:]}, Shape, "order length does not fit; got 9; expected T * K = 10"),
    (combine, {"y_ND": Z(T * K, D, device=meta)}, Device, "top_k_weights is on cpu but y on meta"),
    (combine, {"order_N": ORDER + 1}, errors.RoutingError, "got range [1, 10]"),
    (ffn, {"activation": "swish"}, Config, "activation: got 'swish'; expected one of gelu, "),
    (ffn, {"glu": "merged"}, Config, "glu: got 'merged'; expected one of none, separate"),
    (ffn, {"glu": "separate"}, Config, "w_gate: got 'nothing'; expected a tensor if and only if"),
    (ffn, {"w_gate": gate}, Config, "w_gate: got 'a tensor'"),
    (ffn, {"b_gate": Z(E, H)}, Config, "b_gate: got 'a tensor'; expected None where"),
    (ffn, {"w_gate": gate[:, 1:], "glu": "separate"}, Shape, "w_gate.shape[1] does not fit; got 3"),
    (ffn, {"w_gate": gate[1:], "glu": "separate"}, Shape, "w_gate.shape[0] does not fit; got 3"),
    (ffn, {"w_gate": gate.half(), "glu": "separate"}, Dtype, "w_gate dtype torch.float16"),
    (ffn, {"w_up": Z(E, 5, D), "b_up": None, "glu": "merged_gate_last"}, Shape, "cannot be halved; got 5"),
    (
        ffn,
        {"glu": "merged_gate_first"},
        Shape,
        "w_down.shape[2] does not fit; got 4; expected hidden width = 2",
    ),
    (ffn, {"w_down": Z(E, D, H + 1)}, Shape, "w_down.shape[2] does not fit; got 5"),
    (ffn, {"w_down": Z(E + 1, D, H), "b_down": None}, Shape, "w_down.shape[0] does not fit; got 5"),
    (ffn, {"b_down": Z(E, D + 1)}, Shape, "b_down.shape[1] does not fit; got 4"),
    (ffn, {"w_down": Z(E, D, H).double(), "b_down": None}, Dtype, "w_down dtype torch.float64"),
    (ffn, {"x_TD": Z(T, D + 1)}, Shape, "x.shape[-1] does not fit; got 4; expected w_up.shape[2] = 3"),
    (ffn, {"x_TD": Z(T + 1, D)}, Shape, "top_k_weights.shape[0] does not fit; got 5; expected T = 6"),
    (ffn, {"x_TD": Z(T, D).bool()}, Dtype, "x must be floating point; got torch.bool"),
    (ffn, {"top_k_weights_TK": Z(T, K, device=meta)}, Device, "top_k_weights is on meta but x on cpu"),
    (ffn, {"order_N": ORDER[2:]}, Shape, "order length does not fit; got 8"),
    (ffn, {"order_N": ORDER * 2}, errors.RoutingError, "got range [0, 18]"),
    (ffn, {"offsets_E": OFFSETS * 2}, errors.RoutingError, "rows = 10"),
]


class Seen(TorchDispatchMode):
    """Counts the ops of moefy that reach the dispatcher."""

    def __init__(self) -> None:
        super().__init__()
        self.ops: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "moefy":
            self.ops.append(str(func))
        return func(*args, **(kwargs or {}))


def matches(pattern: str, message: str) -> bool:
    """Every piece between ``.*`` in the message, in that order."""
    position = 0
    for piece in pattern.split(".*"):
        position = message.find(piece, position)
        if position < 0:
            return False
    return True


@pytest.mark.parametrize(
    ("call", "change", "error", "pattern"),
    BAD,
    ids=[f"{i}-{b[0].__name__}-{b[3][:30]}" for i, b in enumerate(BAD)],
)
def test_named_error(call, change, error, pattern):
    with Seen() as seen, pytest.raises(error) as caught:
        call(**change)
    message = str(caught.value)
    assert matches(pattern, message), message
    assert isinstance(caught.value, errors.MoefyError)
    assert "got" in message and "expected" in message
    # Only what reads data is found out by the op itself.
    assert len(seen.ops) == (1 if error is errors.RoutingError else 0)


def test_the_unchanged_calls_are_fine():
    for call in (sort, top_k, permute, linear, combine, ffn):
        call()


def test_no_error_for_what_is_allowed():
    sort(top_k_index_TK=INDEX.int())
    sort(top_k_index_TK=INDEX[:0])
    permute(x_TD=Z(D, T).t())
    linear(bias_EO=None)
    combine(top_k_weights_TK=Z(T, K, dtype=torch.float64))
    combine(y_ND=Z(T * K, D).half())
    with torch.autocast("cpu", torch.bfloat16):
        linear(weight_EOI=Z(E, H, D).bfloat16())
        with pytest.raises(Dtype):
            linear(weight_EOI=Z(E, H, D).double(), bias_EO=None)


@pytest.mark.parametrize(
    ("call", "change"), [(permute, {"x_TD": Z(T + 1, D)}), (ffn, {"activation": "swish"})]
)
def test_same_error_in_a_compiled_function(call, change):
    torch._dynamo.reset()
    with pytest.raises((Shape, Config)):
        torch.compile(lambda: call(**change), backend="eager")()
