"""What the benchmarks read from a command line: devices, lists of names, the time for a figure.

>>> name_list("A, B")
('A', 'B')
"""

from __future__ import annotations

import torch

from moefy.errors import ConfigError

DEFAULT_REP_MS = {"cuda": 200.0, "cpu": 30.0}


def name_list(text: str) -> tuple[str, ...]:
    """``"A, B"`` as ``("A", "B")``."""
    return tuple(part.strip() for part in text.split(",") if part.strip())


def rep_from(rep: float | None, device: torch.device) -> float:
    """Milliseconds to spend on each figure, by default those of the device.

    Raises:
        ConfigError: ``rep`` is not positive.
    """
    rep = DEFAULT_REP_MS[device.type] if rep is None else rep
    if not rep > 0:
        raise ConfigError("rep", got=rep, expected="milliseconds > 0")
    return rep


def device_from(text: str | None) -> torch.device:
    """The device that an option names, by default the GPU that torch uses, or the CPU where there is none.

    Raises:
        ConfigError: torch sees no such device.
    """
    if text is None:
        return _numbered(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    expected = "cpu, or cuda or cuda:N of a GPU that torch sees"
    try:
        device = torch.device(text)
    except RuntimeError as error:
        raise ConfigError("device", got=text, expected=expected) from error
    there = device.type == "cpu" or (
        device.type == "cuda" and (device.index or 0) < torch.cuda.device_count()
    )
    if not there:
        raise ConfigError("device", got=text, expected=expected)
    return _numbered(device)


def _numbered(device: torch.device) -> torch.device:
    """``device`` with an index, which ``torch.cuda.set_device`` needs."""
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return device
