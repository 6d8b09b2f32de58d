"""Median times, CUDA graphs and peak memory for ``moefy bench layer``.

Contract: on CUDA a time is the median of ``triton.testing.do_bench`` (events; the L2 cache is flushed before every
repeat). On a CPU the candidates take turns, so that other work on the machine hits all alike. A candidate that raises
gets its exception in place of a time, and the others go on.

    >>> sorted(median_ms({"sum": lambda: sum(range(9))}, torch.device("cpu"), rep=1))
    ['sum']
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from moefy.bench.layer.contract import Unsupported

Work = Callable[[], object]
WARM_UP_MS = 40
MIN_ROUNDS, MAX_ROUNDS = 3, 200
MIB = 1 << 20


def median_ms(works: Mapping[str, Work], device: torch.device, rep: float) -> dict[str, float | Exception]:
    """Milliseconds of every piece of work, each repeated for about ``rep`` ms."""
    if device.type == "cuda":
        return {name: _attempt(lambda work=work: _cuda_ms(work, rep)) for name, work in works.items()}
    return _in_turns(works, rep)


def _cuda_ms(work: Work, rep: float) -> float:
    from triton.testing import do_bench

    ms: Any = do_bench(work, warmup=WARM_UP_MS, rep=int(rep), return_mode="median")
    return float(ms)


def _in_turns(works: Mapping[str, Work], rep: float) -> dict[str, float | Exception]:
    times: dict[str, list[float]] = {name: [] for name in works}
    failed: dict[str, Exception] = {}
    deadline = time.perf_counter() + rep * len(works) / 1e3
    for turn in range(MAX_ROUNDS):
        if turn >= MIN_ROUNDS and time.perf_counter() > deadline:
            break
        for name in [name for name in works if name not in failed]:
            taken = _attempt(lambda name=name: _wall_ms(works[name]))
            if isinstance(taken, Exception):
                failed[name] = taken
            else:
                times[name].append(taken)
    return {name: failed.get(name) or statistics.median(times[name]) for name in works}


def _wall_ms(work: Work) -> float:
    start = time.perf_counter()
    work()
    return (time.perf_counter() - start) * 1e3


def _attempt(measure: Callable[[], float]) -> float | Exception:
    try:
        return measure()
    except Exception as error:
        return error


def captured(forward: Callable[[], Tensor]) -> tuple[Work, Tensor]:
    """``(replay, output)`` of ``forward`` as a CUDA graph; the output is rewritten by every replay.

    Raises:
        Unsupported: ``forward`` waits for the device, which no graph can capture. torch's sync debug mode tells so
            before the capture, since a failed capture may leave the device unusable.
    """
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            forward()
        torch.cuda.synchronize()
        _without_waits(forward)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = forward()
    graph.replay()
    return graph.replay, out


def _without_waits(forward: Callable[[], Tensor]) -> None:
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        forward()
    except RuntimeError as error:
        if "synchronizing CUDA operation" not in str(error):
            raise
        raise Unsupported("no CUDA graph: it waits for the device") from error
    finally:
        torch.cuda.set_sync_debug_mode(mode)


def peak_mib(work: Work, device: torch.device) -> float | None:
    """MiB that ``work`` had allocated at its peak, beyond what was live before; None on a CPU."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize(device)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    work()
    torch.cuda.synchronize(device)
    return (torch.cuda.max_memory_allocated(device) - before) / MIB
