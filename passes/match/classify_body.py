"""Name the activation of an FFN body by probing it with numbers.

``fn`` maps the entry outputs (one tensor, or gate and up) to the exit's input. It is run on float64
samples and compared with the activations that the expert op knows, alone and in every GLU
arrangement. Numbers cannot be fooled by spelling: a hand-written gelu of eight nodes is a gelu.

    >>> classify_body(lambda h: 0.5 * h * (1 + torch.erf(h / 2**0.5)), [64])
    KnownBody(activation='gelu', glu='none', gate=0)
    >>> classify_body(lambda a, b: torch.nn.functional.silu(b) * a, [64, 64])
    KnownBody(activation='silu', glu='separate', gate=1)

Contract: ``fn`` is element-wise over tokens (the matcher's walk made sure of that) and reads no
parameter: a learnable activation may *today* have the values of a known one. A body that is random,
learnable or merely similar gives ``None``; the caller then keeps it as it is. Nothing global
changes: no RNG draw, no mode.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from moefy.ops import ACTIVATIONS
from moefy.records import KnownBody

# Constants cut to 8 digits (Megatron's 0.79788456) and casts to fp32 inside a body cost about 1e-7
# in float64.
TOLERANCE_FP64 = 1e-13
TOLERANCE = 5e-7

Body = Callable[..., Tensor]


def classify_body(
    fn: Body,
    widths: Sequence[int],
    *,
    feature_dim: int = -1,
    rank: int = 3,
    dtype: torch.dtype = torch.float32,
) -> KnownBody | None:
    """Probe ``fn`` and return its name, or ``None``.

    Args:
        fn: takes ``len(widths)`` (1 or 2) tensors and returns one; must be in eval mode.
        widths: feature width of each entry's output.
        feature_dim: the axis that holds the features (1 for NCHW).
        rank: rank of the tensors that ``fn`` expects; the probes have shape ``[1, n, width]``, or
            ``[n, width, 1, 1]`` when the features are on axis 1.
        dtype: the model's dtype. In float64 a body must agree to 1e-13, so that replacing it keeps
            float64 models exact; else to 5e-7, which lets constants of eight digits and casts to
            fp32 pass.
    """
    if not 1 <= len(widths) <= 2:
        return None
    if isinstance(fn, torch.nn.Module) and any(True for _ in fn.parameters()):
        return None
    with _disable_current_modes(), torch.no_grad(), torch.random.fork_rng(devices=[]):
        probes = [_probe(width, i, feature_dim, rank) for i, width in enumerate(widths)]
        got = _run(fn, probes)
        if got is None:
            return None
        best, least = None, float("inf")
        for known, expected in _candidates(probes, feature_dim):
            error = _distance(got, expected)
            if error < least:
                best, least = known, error
    limit = TOLERANCE_FP64 if dtype == torch.float64 else TOLERANCE
    return best if least <= limit else None


def _probe(width: int, index: int, feature_dim: int, rank: int) -> Tensor:
    """Float64 samples: normal ones, a fine sweep over [-12, 12], far tails where clamps show."""
    rows = max(3, -(-2048 // width))
    generator = torch.Generator().manual_seed(index + 1)
    flat = torch.randn(rows * width, generator=generator, dtype=torch.float64, device="cpu") * 3
    sweep = torch.linspace(-12, 12, 193, dtype=torch.float64, device="cpu")
    special = torch.cat([sweep, sweep.new_tensor([0.0, -0.0, 40.0, -40.0, 900.0, -900.0])])
    where = torch.randperm(flat.numel(), generator=generator, device="cpu")[: special.numel()]
    flat[where] = special[: where.numel()]
    if feature_dim % rank == rank - 1:
        return flat.reshape((1,) * (rank - 2) + (rows, width))
    return flat.reshape((rows, width) + (1,) * (rank - 2))


def _run(fn: Body, probes: Sequence[Tensor]) -> Tensor | None:
    """``fn``'s answer in float64 when it is finite and the same twice, else ``None``."""
    try:
        first, second = (fn(*(p.clone() for p in probes)) for _ in range(2))
    except Exception:  # a body tied to another dtype, device or shape is not a known one
        return None
    if not isinstance(first, Tensor) or not first.is_floating_point():
        return None
    same = torch.equal(first, second) and bool(torch.isfinite(first).all())
    return first.double() if same else None


def _candidates(probes: Sequence[Tensor], feature_dim: int) -> Iterator[tuple[KnownBody, Tensor]]:
    """Every known body with its value at the probes."""
    for name, activation in ACTIVATIONS.items():
        act = activation.forward
        if len(probes) == 2:
            yield KnownBody(name, "separate", 0), act(probes[0]) * probes[1]
            yield KnownBody(name, "separate", 1), probes[0] * act(probes[1])
            continue
        yield KnownBody(name, "none"), act(probes[0])
        if probes[0].shape[feature_dim] % 2 == 0:
            first, last = probes[0].chunk(2, dim=feature_dim)
            yield KnownBody(name, "merged_gate_first"), act(first) * last
            yield KnownBody(name, "merged_gate_last"), first * act(last)


def _distance(got: Tensor, expected: Tensor) -> float:
    """Largest ``|got - expected| / max(1, |expected|)``, infinite when the shapes differ."""
    if got.shape != expected.shape:
        return float("inf")
    return float(((got - expected).abs() / expected.abs().clamp_min(1)).max())
