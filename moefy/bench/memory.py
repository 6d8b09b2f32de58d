"""The peak of a process's resident memory, as the kernel counts it.

Contract: ``peak_growth(f)`` is the highest rise of the resident set, while ``f`` runs, above its level before, in
bytes. Measure in a fresh process: memory that the allocator keeps after it was freed hides growth.

    >>> peak_growth(lambda: torch.zeros(10_000_000).add_(1)) > 30_000_000      # doctest: +SKIP
    True
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")


def peak_growth(work: Callable[[], object]) -> int:
    """Bytes by which the resident set grew at its highest while ``work`` ran."""
    before = _resident()
    _reset_peak()
    keep = work()
    growth = max(0, _peak() - before)
    del keep
    return growth


def in_fresh_process(module: str, function: str, *arguments: int) -> Any:
    """What ``module.function(*arguments)`` returns in a process of its own; JSON types only."""
    root = str(Path(__file__).resolve().parents[2])
    path = os.pathsep.join(p for p in (root, os.environ.get("PYTHONPATH", "")) if p)
    program = f"import json, {module} as m; print(json.dumps(m.{function}(*{arguments!r})))"
    done = subprocess.run(
        [sys.executable, "-c", program],
        check=True,
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": path},
    )
    return json.loads(done.stdout.splitlines()[-1])


def _resident() -> int:
    fields = _status()
    return fields.get("VmRSS", _peak())


def _peak() -> int:
    fields = _status()
    if "VmHWM" in fields:
        return fields["VmHWM"]
    import resource  # not Linux: the lifetime peak is the best there is

    scale = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale


def _status() -> dict[str, int]:
    """``VmRSS`` and ``VmHWM`` in bytes, where ``/proc`` exists."""
    if not _STATUS.exists():
        return {}
    lines = (line.split() for line in _STATUS.read_text().splitlines())
    wanted = ("VmRSS:", "VmHWM:")
    return {line[0][:-1]: int(line[1]) * 1024 for line in lines if line and line[0] in wanted}


def _reset_peak() -> None:
    """Have the kernel forget the earlier peak. Where the kernel refuses, an earlier peak hides growth."""
    try:
        _CLEAR.write_text("5")
    except OSError:
        return
