"""``MoEConfig``: everything that decides how a dense FFN becomes a Mixture-of-Experts. Plain, frozen data.

``RouterSpec`` names a router and its options. Names and options are checked where the routers are known. ``Capacity``
limits how many tokens an expert takes. ``AuxLoss`` says what is minimised beside the model's own loss.

>>> config = MoEConfig(num_experts=8, top_k=2)
>>> MoEConfig.from_json(config.to_json()) == config
True
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from typing import Any

from moefy.errors import ConfigError, UnknownOption, suggest

SCHEMA_VERSION = 1
MAX_EXPERTS = 4096


class RouterSpec:
    """A router by name, with options: ``RouterSpec("switch", jitter=0.01)``. Immutable, hashable, JSON round trip.

    Args:
        name: a key of ``moefy.nn.routers.ROUTERS``.
        options: keyword arguments of that router. Numbers, strings, booleans, ``None``, specs, and tuples of these have
            a JSON form; anything else (a module) works but has none.
    """

    __slots__ = ("_items", "name")

    name: str
    _items: tuple[tuple[str, Any], ...]

    def __init__(self, name: str, /, **options: Any) -> None:
        if not isinstance(name, str):
            raise ConfigError("router", got=name, expected="a name, a RouterSpec or a router")
        object.__setattr__(self, "name", name)
        items = {k: tuple(v) if isinstance(v, list) else v for k, v in options.items()}
        object.__setattr__(self, "_items", tuple(sorted(items.items(), key=lambda item: item[0])))

    @classmethod
    def of(cls, router: str | RouterSpec) -> RouterSpec:
        """``router`` itself, or the spec of that name without options."""
        return router if isinstance(router, RouterSpec) else cls(router)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> RouterSpec:
        """The inverse of ``to_dict``."""
        return cls(data["name"], **{k: _from_plain(v) for k, v in data.get("options", {}).items()})

    @property
    def options(self) -> dict[str, Any]:
        """The options by name, a copy."""
        return dict(self._items)

    def to_dict(self) -> dict[str, Any]:
        """Name and options, for JSON.

        Raises:
            ConfigError: for an option without a JSON form.
        """
        options = {k: _plain(v, f"router option {k!r}") for k, v in self._items}
        return {"name": self.name, "options": options}

    def __setattr__(self, name: str, value: Any) -> None:
        raise AttributeError(f"RouterSpec is immutable; cannot set {name!r}")

    def __eq__(self, other: object) -> bool:
        return isinstance(other, RouterSpec) and (self.name, self._items) == (other.name, other._items)

    def __hash__(self) -> int:
        return hash((self.name, self._items))

    def __reduce__(self) -> tuple[Any, ...]:
        return _spec, (self.name, self.options)

    def __repr__(self) -> str:
        return f"RouterSpec({', '.join([repr(self.name), *(f'{k}={v!r}' for k, v in self._items)])})"


def _spec(name: str, options: dict[str, Any]) -> RouterSpec:
    return RouterSpec(name, **options)


def _plain(value: Any, where: str) -> Any:
    """``value`` in JSON types."""
    if isinstance(value, RouterSpec):
        return value.to_dict()
    if isinstance(value, tuple | list):
        return [_plain(item, where) for item in value]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise ConfigError(where, got=value, expected="a value that JSON can hold")


def _from_plain(value: Any) -> Any:
    if isinstance(value, list):
        return tuple(_from_plain(item) for item in value)
    return RouterSpec.from_dict(value) if isinstance(value, dict) else value


ONE_EXPERT_ROUTERS = ("switch", "hash")
"""Routers whose papers send each token to one expert, which is then the default."""


def default_top_k(router: Any, num_experts: int) -> int:
    """K where nobody names one: what the router is defined for, else 2; at most E."""
    name = router.name if isinstance(router, RouterSpec) else router
    usual = 1 if name in ONE_EXPERT_ROUTERS else getattr(router, "only_top_k", None) or 2
    return max(1, min(usual, num_experts))


def router_name(router: Any) -> str:
    """``router`` in words: a name with options, or where a class or factory was defined."""
    if isinstance(router, str):
        return router
    if isinstance(router, RouterSpec):
        return ", ".join([router.name, *(f"{k}={v}" for k, v in router.options.items())])
    named = getattr(router, "func", router)  # functools.partial
    return f"{named.__module__}.{named.__qualname__}" if hasattr(named, "__qualname__") else repr(router)


CAPACITY_RULES = (
    "megatron",
    "deepspeed",
    "gshard",
    "switch",
    "tutel",
    "fastmoe_gshard",
    "fastmoe_switch",
    "fastmoe_dc",
)
DROP_POLICIES = ("position", "probability", "batch_prioritized", "random")
SLOT_ORDERS = ("token", "choice")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Capacity:
    """How many tokens an expert takes, and which lose when more come. Without one nothing is dropped.

    Args:
        factor: > 0: the capacity is ``rule(factor)``. 0: exactly the need, so that nothing is dropped. < 0: the need,
            at most ``rule(|factor|)`` (Tutel).
        eval_factor: the factor in evaluation mode; ``None`` is ``factor``.
        rule: the formula, one of ``CAPACITY_RULES``; ``moefy.nn.capacity`` has them.
        min_capacity: the least that the rule may give; ``None`` is the rule's own, 4 for "deepspeed" and else 0.
        align: the capacity is rounded up to a multiple of this.
        drop: who is seated first. "position": the slots in their order. "probability": the largest routing weight
            (Megatron-Core's "probs"). "batch_prioritized": tokens by their largest score (V-MoE, Tutel). "random":
            tokens by lot (DeepSpeed's random token selection), in evaluation by position.
        order: the order of slots among tokens of one rank, also where "probability" ties. "token": token by token.
            "choice": all first choices before any second. ``None`` is the rule's own.
        renormalize: the kept weights of a token are scaled up to the sum that all of them had.
        residual: a token that lost all its slots passes through, ``y = x``; else it gets 0. One that kept some gets
            the weighted sum of these, either way.
        experts_per_worker: what "fastmoe_switch" divides by; ``None`` is all experts.
    """

    factor: float = 1.0
    eval_factor: float | None = None
    rule: str = "megatron"
    min_capacity: int | None = None
    align: int = 1
    drop: str = "position"
    order: str | None = None
    renormalize: bool = False
    residual: bool = False
    experts_per_worker: int | None = None

    def __post_init__(self) -> None:
        """Refuse values outside their domain."""
        for name in ("factor", "eval_factor"):
            value = getattr(self, name)
            if not (name == "eval_factor" and value is None) and not _is_finite(value):
                raise ConfigError(f"capacity.{name}", got=value, expected="a finite number")
        for name, known in (("rule", CAPACITY_RULES), ("drop", DROP_POLICIES), ("order", SLOT_ORDERS)):
            value = getattr(self, name)
            if value not in known and not (name == "order" and value is None):
                expected = f"one of {list(known)}{suggest(str(value), known)}"
                raise ConfigError(f"capacity.{name}", got=value, expected=expected)
        for name, least in (("min_capacity", 0), ("align", 1), ("experts_per_worker", 1)):
            value = getattr(self, name)
            if not (name != "align" and value is None) and not _is_int(value, least):
                raise ConfigError(f"capacity.{name}", got=value, expected=f"an int >= {least}")
        for name in ("renormalize", "residual"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"capacity.{name}", got=getattr(self, name), expected="True or False")

    @classmethod
    def of(cls, capacity: float | Capacity | None) -> Capacity | None:
        """``capacity`` itself, or the capacity of that factor.

        Raises:
            ConfigError: for anything else.
        """
        if capacity is None or isinstance(capacity, Capacity):
            return capacity
        if not _is_finite(capacity):
            raise ConfigError("capacity", got=capacity, expected="a number, a moefy.Capacity or None")
        return cls(factor=capacity)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Capacity:
        """The inverse of ``to_dict``; unknown keys are errors."""
        return _from_fields(cls, data)

    @property
    def dropless(self) -> bool:
        """Whether nothing can be dropped, in training and evaluation."""
        return self.factor == 0 and self.eval_factor in (None, 0)

    def to_dict(self) -> dict[str, Any]:
        """All fields, for JSON."""
        return dataclasses.asdict(self)


BALANCE_NAMES = (
    "switch",
    "gshard",
    "mixtral",
    "importance",
    "megatron",
    "megablocks",
    "tutel_gshard",
    "deepspeed",
    "fastmoe_gshard",
    "fastmoe_switch",
)
AUX_SCOPES = ("micro_batch", "sequence", "global_batch")
AUX_DELIVERIES = ("auto", "by_hand")


@dataclasses.dataclass(frozen=True, kw_only=True)
class AuxLoss:
    """The auxiliary loss of every layer: ``weight * balance + z_weight * z_loss + router_weight * the router's own``.

    Args:
        weight: of the balance loss; 0.01 is that of Switch Transformer. A weight of 0 leaves its term out.
        balance: the balance loss, one of ``BALANCE_NAMES``; ``moefy.nn.losses`` has the formulas. "switch" is the
            canonical one.
        z_weight: of the z-loss; 0.001 in ST-MoE.
        router_weight: of the sum of the router's own losses ("importance" and "load" of noisy top-k).
        scope: what the balance loss is taken over. "micro_batch": the tokens of one forward on one rank. "sequence":
            each sequence by itself, then the mean over them. "global_batch": expert counts summed over the ranks.
        batch_dim: with "sequence", the axis of the hidden states that counts sequences: 0, or 1 where time comes first.
        delivery: "auto": an unchanged training loop minimises it; ``l_aux`` is there to look at, without a graph.
            "by_hand": nobody adds it for you; ``l_aux`` and ``moefy.aux_loss(model)`` have a graph.
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
            if not _is_finite(value) or value < 0:
                raise ConfigError(f"aux_loss.{name}", got=value, expected="a finite number >= 0")
        choices = {"balance": BALANCE_NAMES, "scope": AUX_SCOPES, "delivery": AUX_DELIVERIES}
        for name, known in choices.items():
            value = getattr(self, name)
            if value not in known:
                expected = f"one of {list(known)}{suggest(str(value), known)}"
                raise ConfigError(f"aux_loss.{name}", got=value, expected=expected)
        if not _is_int(self.batch_dim, 0):
            raise ConfigError("aux_loss.batch_dim", got=self.batch_dim, expected="an int >= 0")
        if (self.balance, self.scope) == ("importance", "global_batch"):
            expected = '"micro_batch" or "sequence": importance counts no slots to sum over ranks'
            raise ConfigError("aux_loss.scope", got=self.scope, expected=expected)

    @classmethod
    def of(cls, aux_loss: float | AuxLoss | None) -> AuxLoss | None:
        """``aux_loss`` itself, or the canonical balance loss of that weight.

        Raises:
            ConfigError: for anything else.
        """
        if aux_loss is None or isinstance(aux_loss, AuxLoss):
            return aux_loss
        if not _is_finite(aux_loss):
            raise ConfigError("aux_loss", got=aux_loss, expected="a number, a moefy.AuxLoss or None")
        return cls(weight=aux_loss)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> AuxLoss:
        """The inverse of ``to_dict``; unknown keys are errors."""
        return _from_fields(cls, data)

    def to_dict(self) -> dict[str, Any]:
        """All fields, for JSON."""
        return dataclasses.asdict(self)


def _from_fields(cls: Any, data: dict[str, Any]) -> Any:
    """The dataclass of these fields."""
    known = [f.name for f in dataclasses.fields(cls)]
    for name in data:
        if name not in known:
            raise UnknownOption(name, known, where=cls.__name__)
    return cls(**data)


def _is_finite(value: Any) -> bool:
    return not isinstance(value, bool) and isinstance(value, int | float) and abs(value) < float("inf")


def _is_int(value: Any, least: int) -> bool:
    return not isinstance(value, bool) and isinstance(value, int) and value >= least


@dataclasses.dataclass(frozen=True, kw_only=True)
class MoEConfig:
    """How FFNs are rewritten.

    Args:
        num_experts: global number of experts E per layer, 1 to 4096.
        top_k: experts per token, 1 to ``num_experts``.
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
    top_k: int = 2
    seed: int = 0
    router_std: float = 0.02
    expert_noise: float = 0.0
    router: str | RouterSpec | Callable[..., Any] = "top_k"
    capacity: float | Capacity | None = None
    aux_loss: float | AuxLoss | None = None

    def __post_init__(self) -> None:
        """Refuse values outside their domain."""
        for name in ("num_experts", "top_k", "seed"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int):
                raise ConfigError(name, got=value, expected="an int")
        if not 1 <= self.num_experts <= MAX_EXPERTS:
            raise ConfigError(
                "num_experts", got=self.num_experts, expected=f"1 <= num_experts <= {MAX_EXPERTS}"
            )
        if not 1 <= self.top_k <= self.num_experts:
            raise ConfigError(
                "top_k", got=self.top_k, expected=f"1 <= top_k <= num_experts = {self.num_experts}"
            )
        for name in ("router_std", "expert_noise"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < float("inf"):
                raise ConfigError(name, got=value, expected="a finite number >= 0")
        one_module = hasattr(self.router, "parameters") and not isinstance(self.router, type)
        if one_module or not (isinstance(self.router, str | RouterSpec) or callable(self.router)):
            expected = "a name, a moefy.RouterSpec, or a class or factory, which makes one router per layer"
            raise ConfigError("router", got=self.router, expected=expected)
        Capacity.of(self.capacity)
        AuxLoss.of(self.aux_loss)

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
        if "top_k" not in given and isinstance(given["num_experts"], int):
            given["top_k"] = default_top_k(given.get("router", "top_k"), given["num_experts"])
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
        """One JSON object."""
        return json.dumps(self.to_dict())

    @classmethod
    def from_json(cls, text: str) -> MoEConfig:
        """The inverse of ``to_json``."""
        return cls.from_dict(json.loads(text))
