"""GPU kernels in Triton and their launchers, imported as ``moefy.triton_ops``; see README.md beside this file.

Contract: rows sorted by expert plus ``offsets`` on the device, where ``offsets[e]`` is the exclusive end row of expert
``e``. Launchers take and return tensors, allocate with ``torch.empty`` and never wait for the device; no float atomics,
so results are bit-repeatable. This package imports torch and triton and nothing of moefy; ``moefy.ops`` picks it.

    shared/                                launching, tile sizes, the schedule of tiles, activations
    top_k, sort                            from router logits to sorted rows
    entry, linear, hidden_grad,
    weight_grad, gather_sum                the products of an FFN and their gradients
    hopper/                                four of them for Hopper cards, in Gluon
    expert_ffn                             the whole FFN out of these
"""
