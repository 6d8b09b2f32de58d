"""Look-ups by attribute name in a Hugging Face config and the configs nested in it.

>>> ConfigFacts(clip_config).find("image_size", prefer=("vision",))
224
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

VISION = ("vision", "image", "backbone", "encoder", "video")
TEXT = ("text", "llm", "language", "decoder", "thinker")
AUDIO = ("audio", "speech", "encoder")


class ConfigFacts:
    """One config with its sub-configs, nearest first."""

    def __init__(self, config: Any) -> None:
        self._configs = list(_walk(config))

    def find(self, *names: str, default: Any = None, prefer: Sequence[str] = ()) -> Any:
        """The first of ``names`` that is set in any config.

        Configs whose path contains a word of ``prefer`` come first, then the others from the outside in.
        """
        ranked = sorted(self._configs, key=lambda item: not any(w in item[0] for w in prefer))
        for _, config in ranked:
            for name in names:
                value = getattr(config, name, None)
                if value is not None and not callable(value):
                    return value
        return default

    def integer(self, *names: str, default: int, prefer: Sequence[str] = ()) -> int:
        """Like ``find``, for an integer (the first of a list of integers)."""
        value = self.find(*names, default=default, prefer=prefer)
        if isinstance(value, list | tuple) and value:
            value = value[0]
        return value if isinstance(value, int) and not isinstance(value, bool) else default

    def has(self, *names: str) -> bool:
        """Whether any config sets one of ``names``."""
        return self.find(*names) is not None

    def special_ids(self) -> set[int]:
        """Every id that a config calls special: padding, end, image placeholders, ..."""
        found: set[int] = set()
        for _, config in self._configs:
            for name in _attributes(config):
                if name.endswith(("_token_id", "_token_index", "_token_ids")):
                    value = getattr(config, name, None)
                    values = value if isinstance(value, list | tuple) else [value]
                    found.update(v for v in values if isinstance(v, int))
        return found

    def image_size(self) -> tuple[int, int]:
        """Height and width of a picture in pixels."""
        return _pair(self.find("image_size", "img_size", "crop_size", prefer=VISION), default=224)

    def patch_size(self) -> tuple[int, int]:
        """Height and width of a patch in pixels."""
        return _pair(self.find("patch_size", prefer=VISION), default=16)


def _pair(value: Any, default: int) -> tuple[int, int]:
    """Two sides from an int, a pair, a triple (frames first) or a ``{"height": .., "width": ..}``."""
    if isinstance(value, dict):
        value = [value.get("height", default), value.get("width", default)]
    if isinstance(value, list | tuple) and len(value) == 1:
        value = value[0]
    if isinstance(value, list | tuple) and value and all(isinstance(v, int) for v in value):
        return value[-2], value[-1]
    return (value, value) if isinstance(value, int) else (default, default)


def _walk(config: Any) -> Iterator[tuple[str, Any]]:
    """The config and its sub-configs, breadth first, each with its dotted path."""
    queue: list[tuple[str, Any]] = [("", config)]
    seen: set[int] = set()
    while queue:
        path, current = queue.pop(0)
        if current is None or id(current) in seen:
            continue
        seen.add(id(current))
        yield path, current
        for name in _attributes(current):
            value = getattr(current, name, None)
            if hasattr(value, "model_type") and hasattr(value, "to_dict"):
                queue.append((f"{path}.{name}" if path else name, value))


def _attributes(config: Any) -> list[str]:
    try:
        return [name for name in vars(config) if not name.startswith("_")]
    except TypeError:
        return []
