"""A kernel with the fault that ``Resources.fused`` counts: each lane has one product, which is fused into the sum."""

from __future__ import annotations

import triton.language as tl

from moefy.triton_ops.shared.launch import kernel


@kernel
def fused_sum_kernel(x, y, out, N: tl.constexpr):
    n = tl.arange(0, N)
    tl.store(out, tl.sum(tl.load(x + n) * tl.load(y + n), 0))
