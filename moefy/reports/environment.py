"""Versions and devices for a bug report, read without importing triton or transformers.

>>> sorted(environment())[:3]
['accelerators', 'cpu_threads', 'cuda']
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
from typing import Any

import torch

import moefy
from moefy.reports.text.tables import Column, draw, size, stream_width

PACKAGES = ("triton", "transformers", "timm", "torchvision", "tabulate", "tqdm", "numpy")


def environment() -> dict[str, Any]:
    """Versions, threads, accelerators and usable kernels, as JSON types.

    A package that is not installed has version ``None``. Memory is in bytes.
    """
    return {
        "moefy": moefy.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "torch": str(torch.__version__),
        "cuda": torch.version.cuda,
        "packages": {name: package_version(name) for name in PACKAGES},
        "cpu_threads": torch.get_num_threads(),
        "cpus": os.cpu_count(),
        "accelerators": _accelerators(),
        "kernels": _kernels(),
    }


def environment_table(known: dict[str, Any]) -> str:
    """``environment()`` as a table."""
    rows = [[name, str(value)] for name, value in known.items() if isinstance(value, str | int)]
    rows += [[name, version or "-"] for name, version in known["packages"].items()]
    for index, device in enumerate(known["accelerators"]):
        memory = size(device["memory_bytes"])
        rows.append([f"gpu {index}", f"{device['name']}, sm {device['capability']}, {memory}"])
    rows += [[f"{name} kernels", state] for name, state in known["kernels"].items()]
    return draw([Column(title="what"), Column(title="version or state")], rows, stream_width())


def package_version(name: str) -> str | None:
    """The installed version of a distribution, read from its metadata: nothing is imported."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _accelerators() -> list[dict[str, Any]]:
    """Name, compute capability, memory and multiprocessors of each GPU that torch sees."""
    if not torch.cuda.is_available():
        return []
    found = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        found.append(
            {
                "name": properties.name,
                "capability": f"{properties.major}.{properties.minor}",
                "memory_bytes": properties.total_memory,
                "multiprocessors": properties.multi_processor_count,
            }
        )
    return found


def _kernels() -> dict[str, str]:
    """Whether moefy's kernels run on each kind of device, in words."""
    kernels = {"cpu": "usable"}
    if package_version("triton") is None:
        kernels["triton"] = "not usable: triton is not installed"
    elif not torch.cuda.is_available():
        kernels["triton"] = "not usable: no CUDA device (TRITON_INTERPRET=1 runs them on the CPU)"
    elif torch.cuda.get_device_capability() < (8, 0):
        kernels["triton"] = "not usable: compute capability 8.0 or newer is needed"
    else:
        kernels["triton"] = "usable"
    return kernels
