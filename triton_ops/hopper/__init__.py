"""The products of an FFN for Hopper, in Gluon: warps that load, warps that multiply, warps that finish.

In ``moefy.triton_ops`` proper a program multiplies a tile, then finishes it, and the tensor cores wait. Here some
warps of a program finish the last tile while two groups of four multiply the next one, and loads are ahead of both.

Contract: each module does what its namesake one level up does, for bf16 and fp16 on compute capability 9.x, when the
function ``takes_...`` here says so. Gluon changes with Triton's versions: with one that these kernels were never
compiled with nothing is taken, and the kernels one level up run.

    pipeline                                     the ring of stages, the products, how a tile is handed over
    entry, linear, hidden_grad, weight_grad      the kernels
"""

from __future__ import annotations

import functools

import torch
import triton
from torch import Tensor

from moefy.triton_ops.shared.blocks import Kernel, describable, fills_wide_tiles

# A tile of every kernel here, rows by columns.
TILE_M, TILE_N = 128, 256
# The first and the last version of Triton whose Gluon these kernels were compiled with.
TRITON = ((3, 6), (3, 9))


@functools.cache
def supported(device: torch.device) -> bool:
    """Whether ``device`` is a Hopper card and the installed Triton has the Gluon that is written here."""
    if device.type != "cuda" or torch.version.hip is not None:
        return False
    return torch.cuda.get_device_capability(device)[0] == 9 and knows(triton.__version__)


def knows(version: str) -> bool:
    """Whether the kernels were compiled with this version of Triton. Most names are looked up only when they are."""
    major, minor = version.split(".")[:2]
    return TRITON[0] <= (int(major), int(minor)) <= TRITON[1]


def takes_entry(x_TD: Tensor, w_gate: Tensor | None, w_up: Tensor, rows: int) -> bool:
    """Whether ``entry`` can read these tokens and matrices."""
    weights = (w_up,) if w_gate is None else (w_gate, w_up)
    return (
        _takes("entry" if w_gate is None else "glu_entry", rows, w_up.shape[0], x_TD, *weights)
        and x_TD.shape[1] % 16 == 0  # Triton knows of multiples of 16 alone, and masks eight columns as one
        and all(rows_apart(w) for w in weights)
    )


def takes_linear(
    a: Tensor, w: Tensor, out: Tensor, transposed: bool, second: tuple[Tensor, Tensor] | None
) -> bool:
    """Whether ``linear`` can read these rows and matrices and write there."""
    depth, weights = a.shape[1], (w,) if second is None else (w, second[1])
    return (
        _takes("linear", a.shape[0], w.shape[0], a, w, out, *(second or ()))
        and depth % (64 if transposed else 8) == 0
        and all(rows_apart(each) for each in weights)
    )


def takes_hidden_grad(grad: Tensor, w_down: Tensor, gate: Tensor | None, up: Tensor) -> bool:
    """Whether ``hidden_grad`` can read these; ``grad`` stands for the tokens' gradient or its rows."""
    width = up.shape[1]
    saved = (up,) if gate is None else (gate, up)
    return (
        _takes("hidden_grad", up.shape[0], w_down.shape[0], grad, w_down, *saved)
        and width % 8 == 0
        and grad.shape[1] % 64 == 0
        and grad.shape[1] >= 192  # a step is asked for three ahead, of the next tile at most
        and rows_apart(w_down) == w_down.shape[1]
    )


def takes_weight_grad(g: Tensor, x: Tensor, out_EOI: Tensor) -> bool:
    """Whether ``weight_grad`` can read these rows and write there."""
    return (
        _takes("weight_grad", g.shape[0], out_EOI.shape[0], g, x, out_EOI)
        and out_EOI.shape[1] % TILE_M == 0
        and rows_apart(out_EOI) == out_EOI.shape[1]
    )


def rows_apart(w: Tensor) -> int:
    """How many rows of ``w`` [E, rows, columns] one expert's first row lies before the next's; 0 if not whole."""
    apart, rest = divmod(w.stride(0), w.stride(1))
    return 0 if rest else apart


def _takes(kernel: Kernel, rows: int, experts: int, x: Tensor, *others: Tensor) -> bool:
    """What all kernels ask: a Hopper card, rows enough, one half-precision dtype, tensors that can be described."""
    half = x.dtype in (torch.bfloat16, torch.float16) and all(t.dtype is x.dtype for t in others)
    return (
        half and fills_wide_tiles(kernel, rows, experts) and supported(x.device) and describable(x, *others)
    )
