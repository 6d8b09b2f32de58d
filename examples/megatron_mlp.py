"""Megatron-core's own MLP on one CPU rank, rewritten in place.

Its linears are ``ColumnParallelLinear`` and ``RowParallelLinear``, which return ``(output, bias)``
and compute inside an ``autograd.Function``. The MLP as a whole is a feed-forward network, so it
becomes one ``moefy.MoE`` that returns ``(output, None)``: the experts add the bias.
Needs ``pip install --no-deps megatron-core``.

    python examples/megatron_mlp.py
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

import moefy


@contextmanager
def one_rank() -> Iterator[None]:
    """A process group of this process alone, over gloo."""
    with tempfile.NamedTemporaryFile() as store:
        dist.init_process_group("gloo", init_method=f"file://{store.name}", rank=0, world_size=1)
        parallel_state.initialize_model_parallel()
        try:
            yield
        finally:
            parallel_state.destroy_model_parallel()
            dist.destroy_process_group()


class Block(nn.Module):
    """Pre-norm residual around Megatron's MLP, as its transformer layer has it."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(config.hidden_size)
        linears = MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)
        self.mlp = MLP(config, linears)

    def forward(self, x: Tensor) -> Tensor:
        out, bias = self.mlp(self.norm(x))
        return x + (out if bias is None else out + bias)


def build_model() -> nn.Sequential:
    """Two blocks of width 64; Megatron's layout ``[S, B, D]``."""
    config = TransformerConfig(
        num_layers=2,
        hidden_size=64,
        ffn_hidden_size=256,
        num_attention_heads=4,
        use_cpu_initialization=True,
        add_bias_linear=True,
    )
    return nn.Sequential(Block(config), Block(config))


def main() -> None:
    """Transform, compare, backward."""
    torch.manual_seed(0)
    with one_rank():
        model = build_model().eval()
        for parameter in model.parameters():  # Megatron starts biases at zero; make them count
            nn.init.normal_(parameter, std=0.1)
        x = torch.randn(10, 2, 64)
        dense = model(x).detach()

        moefy.transform(model, num_experts=4, top_k=2, example_args=(x,))
        print(moefy.report(model))
        out = model(x)
        error = ((out - dense).norm() / dense.norm()).item()
        print(f"|MoE - dense| / |dense| = {error:.1e}")
        if not error < 1e-5:
            raise SystemExit("Megatron's MLP is not exact")
        out.square().mean().backward()
        names = [name for name, p in model.named_parameters() if p.grad is None]
        if names:
            raise SystemExit(f"no gradient for {names}")


if __name__ == "__main__":
    main()
