"""What the dataclasses of options share: reading fields by name, and domains.

>>> is_int(True, 1), is_int(2, 1), is_finite(float("inf"))
(False, True, False)
"""

from __future__ import annotations

import dataclasses
from typing import Any

from moefy.errors import ConfigError, UnknownOption


def from_fields(cls: Any, data: dict[str, Any]) -> Any:
    """The dataclass of these fields."""
    known = [f.name for f in dataclasses.fields(cls)]
    for name in data:
        if name not in known:
            raise UnknownOption(name, known, where=cls.__name__)
    return cls(**data)


def is_finite(value: Any) -> bool:
    """Whether ``value`` is a finite number; a bool is none."""
    return not isinstance(value, bool) and isinstance(value, int | float) and abs(value) < float("inf")


def is_int(value: Any, least: int | None = None) -> bool:
    """Whether ``value`` is an int of at least ``least``; a bool is none."""
    return not isinstance(value, bool) and isinstance(value, int) and (least is None or value >= least)


def positive_int(name: str, value: Any) -> int:
    """``value``, an int of at least 1.

    Raises:
        ConfigError: for any other value of the option ``name``.
    """
    if not is_int(value, 1):
        raise ConfigError(name, got=value, expected="an int >= 1")
    return value
