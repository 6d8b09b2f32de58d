"""``RouterSpec``: a router by name, with options.

>>> RouterSpec("switch", jitter=0.01).to_dict()
{'name': 'switch', 'options': {'jitter': 0.01}}
"""

from __future__ import annotations

from typing import Any

from moefy.config.declared import DEFAULT_TOP_K, known
from moefy.errors import ConfigError


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
        """The inverse of ``to_dict``; unknown keys are errors."""
        options = data.get("options", {})
        if "name" not in data or not isinstance(options, dict) or data.keys() - {"name", "options"}:
            raise ConfigError("router", got=data, expected='{"name": ..., "options": {...}}')
        return cls(data["name"], **{k: _from_plain(v) for k, v in options.items()})

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
    """``value`` in JSON types: a spec as a dict, a tuple as a list."""
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


USUAL_TOP_K = 2
"""K of a router that says nothing about it: Mixtral's, and GShard's."""


def default_top_k(router: Any, num_experts: int) -> int:
    """The K of a router for which none is given: the router's own, else 2; at most E."""
    name = router.name if isinstance(router, RouterSpec) else router
    if isinstance(name, str):
        usual = known(DEFAULT_TOP_K).get(name, USUAL_TOP_K)
    else:
        usual = getattr(router, "only_top_k", None) or USUAL_TOP_K
    return max(1, min(usual, num_experts))


def router_name(router: Any) -> str:
    """``router`` in words: a name with options, or where a class or factory was defined."""
    if isinstance(router, str):
        return router
    if isinstance(router, RouterSpec):
        return ", ".join([router.name, *(f"{k}={v}" for k, v in router.options.items())])
    named = getattr(router, "func", router)  # functools.partial
    return f"{named.__module__}.{named.__qualname__}" if hasattr(named, "__qualname__") else repr(router)
