"""GPU kernels in Triton, imported as ``moefy.triton_ops``. There is none yet, only the contract.

The contract of the kernels to come: rows sorted by expert plus ``offsets`` on the device, where
``offsets[e]`` is the exclusive end row of expert ``e``; no host synchronisation; no float atomics,
so results are bit-repeatable. This package may import torch and triton and nothing of moefy. Until
it holds kernels, the ops in ``moefy.ops`` run on PyTorch's own, on the GPU too:

    >>> import moefy.triton_ops
    >>> moefy.triton_ops.__all__
    []
"""

from __future__ import annotations

__all__: list[str] = []
