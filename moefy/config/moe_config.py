"""``MoEConfig``: how FFNs are rewritten, all options in one object.

>>> MoEConfig(num_experts=8, capacity=1.25).to_json()
'{"schema_version": 1, "num_experts": 8, ...}'
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from typing import Any

from moefy.config.aux_loss import AuxLoss
from moefy.config.capacity import Capacity
from moefy.config.fields import is_finite, is_int
from moefy.config.router_spec import RouterSpec, default_top_k, router_name
from moefy.errors import ConfigError, UnknownOption

SCHEMA_VERSION = 1
MAX_EXPERTS = 4096


@dataclasses.dataclass(frozen=True, kw_only=True)
class MoEConfig:
    """How FFNs are rewritten.

    Args:
        num_experts: global number of experts E per layer, 1 to 4096.
        top_k: experts per token, 1 to ``num_experts``; by default what the router is defined for, 2 for most.
        seed: seeds the router initialisation, together with the layer's FQN, so that every rank agrees.
        router_std: standard deviation of the normal router initialisation. The default 0.02 is that of GPT-2 and
            of Mixtral's ``initializer_range``.
        expert_noise: symmetry breaking. Experts 1 to E-1 get ``noise * std(weight)`` of Gaussian noise added per
            weight tensor; expert 0 stays the dense FFN bitwise. 0 keeps the start exact, but then identical
            experts give the router no gradient until they diverge.
        router: the router's name, a ``RouterSpec`` with options, a ``Router`` subclass, or a factory of any module from
            tokens to logits; see ``moefy.nn.routers``. The last two have no JSON form.
        capacity: how many tokens an expert takes: a capacity factor, or a ``Capacity`` with options. ``None`` drops no
            token.
        aux_loss: the auxiliary loss of every layer: the weight of the canonical balance loss, or an ``AuxLoss`` with
            options. ``None`` adds none.
    """

    num_experts: int
    top_k: int | None = None
    seed: int = 0
    router_std: float = 0.02
    expert_noise: float = 0.0
    router: str | RouterSpec | Callable[..., Any] = "top_k"
    capacity: float | Capacity | None = None
    aux_loss: float | AuxLoss | None = None

    def __post_init__(self) -> None:
        """Refuse values outside their domain."""
        if self.top_k is None and isinstance(self.num_experts, int):
            object.__setattr__(self, "top_k", default_top_k(self.router, self.num_experts))
        for name in ("num_experts", "top_k", "seed"):
            value = getattr(self, name)
            if not is_int(value):
                raise ConfigError(name, got=value, expected="an int")
        if not 1 <= self.num_experts <= MAX_EXPERTS:
            raise ConfigError(
                "num_experts", got=self.num_experts, expected=f"1 <= num_experts <= {MAX_EXPERTS}"
            )
        if not 1 <= self.experts_per_token <= self.num_experts:
            expected = f"1 <= top_k <= num_experts = {self.num_experts}"
            raise ConfigError("top_k", got=self.top_k, expected=expected)
        for name in ("router_std", "expert_noise"):
            value = getattr(self, name)
            if not (is_finite(value) and value >= 0):
                raise ConfigError(name, got=value, expected="a finite number >= 0")
        one_module = hasattr(self.router, "parameters") and not isinstance(self.router, type)
        if one_module or not (isinstance(self.router, str | RouterSpec) or callable(self.router)):
            expected = "a name, a moefy.RouterSpec, or a class or factory, which makes one router per layer"
            raise ConfigError("router", got=self.router, expected=expected)
        Capacity.of(self.capacity)
        AuxLoss.of(self.aux_loss)

    @property
    def experts_per_token(self) -> int:
        """K: ``top_k``, or the router's default, which the constructor fills in."""
        assert self.top_k is not None
        return self.top_k

    @classmethod
    def field_names(cls) -> tuple[str, ...]:
        """The names of all options."""
        return tuple(f.name for f in dataclasses.fields(cls))

    @classmethod
    def resolve(cls, config: MoEConfig | None, **overrides: Any) -> MoEConfig:
        """``config`` with the keywords that are not ``None`` laid over it.

        Raises:
            UnknownOption: for a keyword that is no option.
            ConfigError: for a value outside its domain, or when ``num_experts`` is given nowhere.
        """
        for name in overrides:
            if name not in cls.field_names():
                raise UnknownOption(name, cls.field_names(), where="MoEConfig")
        given = {name: value for name, value in overrides.items() if value is not None}
        if config is not None:
            if not isinstance(config, MoEConfig):
                raise ConfigError("config", got=config, expected="a moefy.MoEConfig")
            return dataclasses.replace(config, **given)
        if "num_experts" not in given:
            raise ConfigError("num_experts", got=None, expected="an int, the number of experts per layer")
        return cls(**given)

    def to_dict(self) -> dict[str, Any]:
        """All options and the schema version, as JSON can hold them.

        Raises:
            ConfigError: for a router that is a class or factory, or has an option without a JSON form.
        """
        if not isinstance(self.router, str | RouterSpec):
            expected = "a name or a moefy.RouterSpec; a class or factory has no JSON form"
            raise ConfigError("router", got=router_name(self.router), expected=expected)
        values = {name: getattr(self, name) for name in self.field_names()}
        data = {k: v.to_dict() if hasattr(v, "to_dict") else v for k, v in values.items()}
        return {"schema_version": SCHEMA_VERSION, **data}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> MoEConfig:
        """The inverse of ``to_dict``; unknown keys and newer versions are errors."""
        if not isinstance(data, dict):
            raise ConfigError("config", got=data, expected="a dict of options")
        options = dict(data)
        version = options.pop("schema_version", SCHEMA_VERSION)
        if version != SCHEMA_VERSION:
            raise ConfigError("schema_version", got=version, expected=f"{SCHEMA_VERSION}")
        for name in options:
            if name not in cls.field_names():
                raise UnknownOption(name, cls.field_names(), where="MoEConfig")
        if "num_experts" not in options:
            raise ConfigError("num_experts", got=None, expected="an int, the number of experts per layer")
        if isinstance(options.get("router"), dict):
            options["router"] = RouterSpec.from_dict(options["router"])
        if isinstance(options.get("capacity"), dict):
            options["capacity"] = Capacity.from_dict(options["capacity"])
        if isinstance(options.get("aux_loss"), dict):
            options["aux_loss"] = AuxLoss.from_dict(options["aux_loss"])
        return cls(**options)

    def to_json(self) -> str:
        """``to_dict`` as the text of one JSON object."""
        return json.dumps(self.to_dict())

    @classmethod
    def from_json(cls, text: str) -> MoEConfig:
        """The inverse of ``to_json``."""
        return cls.from_dict(json.loads(text))
