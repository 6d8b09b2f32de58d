"""FastMoE (He et al. 2021) in one process: layers, gates and ``fmoefy`` under their own names.

    from moefy.compat.fastmoe import FMoETransformerMLP
    from moefy.compat.fastmoe.gates import GShardGate

    mlp = FMoETransformerMLP(num_expert=8, d_model=512, d_hidden=2048, gate=GShardGate)
    y = mlp(x)
    (loss(y) + 0.01 * mlp.gate.get_loss()).backward()

``num_expert`` counts the experts of one worker, as in the original; ``moefy.MoE`` counts them all. Where FastMoE
surprises, so does this. A gate's ``traps`` names what can be switched off (``GShardGate(..., traps=())``):

    "gshard_loss_scale"       the balance loss of ``GShardGate``, ``DCGate`` and ``FasterGate`` has the factor
                              ``num_expert ** 2`` on a mean over all experts: W^-2 of the usual loss on W workers
    "switch_additive_noise"   ``SwitchGate`` adds U[1 - eps, 1 + eps] to the logits, where Switch Transformer multiplies
                              the input by it

Always so: scores are not renormalised after drops; capacity is ``ceil(rate * S) * k // E`` per expert for
``GShardGate``, ``ceil(rate * S / num_expert)`` for ``SwitchGate`` and ``ceil(rate * S)`` for ``DCGate``; GShard's
random routing acts in evaluation too; ``FMoELinear`` draws within ``1 / sqrt(in * out)``; a masked row is its
replacement times the sum of its scores. Not so: which tokens lose their seat is not a race but the order of tokens, and
rows are in the order of tokens within an expert.

As in the original, every forward reads the experts' counts from the device: one wait on CUDA. Under ``torch.compile``
the experts run eagerly, behind a graph break. ``moefy.MoE`` has neither.
"""

from moefy.compat.fastmoe.conversion import fmoefy
from moefy.compat.fastmoe.gates import (
    BaseGate,
    DCGate,
    FasterGate,
    GShardGate,
    NaiveGate,
    NoisyGate,
    SwipeGate,
    SwitchGate,
    ZeroGate,
    gen_faster_gate,
)
from moefy.compat.fastmoe.layers import FMoE, FMoETransformerMLP, mark_module_parallel_comm
from moefy.compat.fastmoe.linear import FMoELinear

__all__ = [
    "BaseGate",
    "DCGate",
    "FMoE",
    "FMoELinear",
    "FMoETransformerMLP",
    "FasterGate",
    "GShardGate",
    "NaiveGate",
    "NoisyGate",
    "SwipeGate",
    "SwitchGate",
    "ZeroGate",
    "fmoefy",
    "gen_faster_gate",
    "mark_module_parallel_comm",
]
