"""``AuxLoss``: the loss that is minimised beside the model's own. ``moefy.nn.losses.layer`` computes and delivers it.

>>> AuxLoss.of(0.01)
AuxLoss(weight=0.01, balance='switch', ...)
"""

from __future__ import annotations

import dataclasses
from typing import Any

from moefy.config.declared import BALANCE, known
from moefy.config.fields import from_fields, is_finite, is_int
from moefy.errors import ConfigError, suggest

AUX_SCOPES = ("micro_batch", "sequence", "global_batch")
AUX_DELIVERIES = ("auto", "by_hand")


@dataclasses.dataclass(frozen=True, kw_only=True)
class AuxLoss:
    """The auxiliary loss of every layer: ``weight * balance + z_weight * z_loss + router_weight * the router's own``.

    Args:
        weight: of the balance loss; 0.01 is that of Switch Transformer. A weight of 0 leaves its term out.
        balance: the balance loss, a name of ``moefy.nn.losses.BALANCE_LOSSES``. "switch" is the canonical one.
        z_weight: of the z-loss; 0.001 in ST-MoE.
        router_weight: of the sum of the router's own losses ("importance" and "load" of noisy top-k).
        scope: what the balance loss is taken over. "micro_batch": the tokens of one forward on one rank. "sequence":
            each sequence by itself, then the mean over them. "global_batch": expert counts summed over the ranks.
        batch_dim: with "sequence", the axis of the hidden states that counts sequences: 0, or 1 where time comes first.
        delivery: "auto": an unchanged training loop minimises the loss, and ``l_aux`` has no graph. "by_hand": the
            training loop adds ``l_aux`` or ``moefy.aux_loss(model)``, which have a graph.
    """

    weight: float = 0.01
    balance: str = "switch"
    z_weight: float = 0.0
    router_weight: float = 0.0
    scope: str = "micro_batch"
    batch_dim: int = 0
    delivery: str = "auto"

    def __post_init__(self) -> None:
        """Refuse values outside their domain."""
        for name in ("weight", "z_weight", "router_weight"):
            value = getattr(self, name)
            if not is_finite(value) or value < 0:
                raise ConfigError(f"aux_loss.{name}", got=value, expected="a finite number >= 0")
        check_balance(self.balance)
        for name, names in (("scope", AUX_SCOPES), ("delivery", AUX_DELIVERIES)):
            _check_name(f"aux_loss.{name}", getattr(self, name), names)
        if not is_int(self.batch_dim, 0):
            raise ConfigError("aux_loss.batch_dim", got=self.batch_dim, expected="an int >= 0")
        if not BALANCE[self.balance].counted and self.scope == "global_batch":
            expected = f'"micro_batch" or "sequence": {self.balance} counts no slots to sum over ranks'
            raise ConfigError("aux_loss.scope", got=self.scope, expected=expected)

    @classmethod
    def of(cls, aux_loss: float | AuxLoss | None) -> AuxLoss | None:
        """``aux_loss`` itself, or the canonical balance loss of that weight.

        Raises:
            ConfigError: for anything else, and for a balance loss that does not exist.
        """
        if isinstance(aux_loss, AuxLoss):  # a pickle may name a loss that this process has not registered
            check_balance(aux_loss.balance)
        if aux_loss is None or isinstance(aux_loss, AuxLoss):
            return aux_loss
        if not is_finite(aux_loss):
            raise ConfigError("aux_loss", got=aux_loss, expected="a number, a moefy.AuxLoss or None")
        return cls(weight=aux_loss)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> AuxLoss:
        """The inverse of ``to_dict``; unknown keys are errors."""
        return from_fields(cls, data)

    def to_dict(self) -> dict[str, Any]:
        """All fields, for JSON."""
        return dataclasses.asdict(self)


def check_balance(name: Any) -> None:
    """Raise ``ConfigError`` for a balance loss that does not exist."""
    _check_name("aux_loss.balance", name, tuple(known(BALANCE)))


def _check_name(option: str, value: Any, known: tuple[str, ...]) -> None:
    if value not in known:
        expected = f"one of {list(known)}{suggest(str(value), known)}"
        raise ConfigError(option, got=value, expected=expected)
