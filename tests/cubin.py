"""Kernels compiled to machine code without a GPU: registers, spills, shared memory, and what else can be read of them.

An architecture is a number: 80, 90, 100 are NVIDIA's sm_80, sm_90, sm_100, and 942 is AMD's gfx942.

Contract: a ``Kernel`` is plain data, so that it can be sent to another process. There has to be one: the tests' own
process interprets Triton, and a process can do only one of the two.

    >>> kernel = Kernel("moefy.triton_ops.top_k:top_k_kernel", {"logits_ptr": "*fp32", ...}, {"K": 8}, {"num_warps": 4})
    >>> resources([kernel], 90)
    [Resources(registers=40, stack=0, local=0, shared=512, fused=0)]
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
# The shared memory that one program may have, in bytes.
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024, 942: 64 * 1024}
AMD = (942,)


@dataclasses.dataclass(frozen=True)
class Kernel:
    """One kernel in one configuration.

    Args:
        name: ``module:attribute`` of the jitted function.
        signature: the type of every argument that is no constant, as ``triton.compile`` names them ("*bf16", "i32").
        constexprs: the constants, among them arguments that are None, and strides that are 1.
        options: ``num_warps`` and ``num_stages``.
        aligned: arguments known to be divisible by 16, beside the pointers, which all are.
        archs: the architectures that it is for.
        stack: bytes of stack that it may take, where a measurement found that faster than taking none.
    """

    name: str
    signature: dict[str, str]
    constexprs: dict[str, Any]
    options: dict[str, int]
    aligned: tuple[str, ...] = ()
    archs: tuple[int, ...] = (80, 90, 100, 942)
    stack: int = 0


@dataclasses.dataclass(frozen=True)
class Resources:
    """What can be read of a compiled kernel.

    Args:
        registers: per thread.
        stack: bytes per thread.
        local: bytes per thread, spills.
        shared: bytes per program.
        fused: sums across lanes whose first addition is fused with a product: lanes that hold the same sum then have
            other last bits. Not counted for AMD.
    """

    registers: int
    stack: int
    local: int
    shared: int
    fused: int = 0


def resources(kernels: Sequence[Kernel], arch: int) -> list[Resources]:
    """What each kernel takes on ``arch``; compiled in one process of its own."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [environment.get("PYTHONPATH")])])
    given = json.dumps([dataclasses.asdict(kernel) for kernel in kernels])
    command = [sys.executable, __file__, str(arch)]
    run = subprocess.run(command, input=given, env=environment, capture_output=True, text=True)
    if run.returncode:
        raise AssertionError(f"no machine code for {arch}:\n{run.stdout}{run.stderr}")
    return [Resources(**found) for found in json.loads(run.stdout.splitlines()[-1])]


def faults(kernel: Kernel, found: Resources, arch: int) -> list[str]:
    """What is wrong with a compiled kernel."""
    wrong = {
        "spills": found.stack > kernel.stack or found.local > 0,
        "too much shared memory": found.shared > SHARED_LIMIT[arch],
        "a product fused into a sum across lanes": found.fused > 0,
    }
    return [
        f"{what}: {kernel.name} {kernel.constexprs} on {arch}: {found}"
        for what, is_so in wrong.items()
        if is_so
    ]


def compile_kernel(kernel: Kernel, arch: int) -> Resources:
    """Compile here; Triton must not be interpreting."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.experimental.gluon._runtime import GluonASTSource

    from moefy.triton_ops.shared import launch

    module, attribute = kernel.name.split(":")
    function = getattr(importlib.import_module(module), attribute).jitted
    types = {**kernel.signature, **dict.fromkeys(kernel.constexprs, "constexpr")}
    signature = {name: types[name] for name in function.arg_names}
    assert len(types) == len(signature), sorted(set(types) - set(signature))
    attributes = {
        (place,): [["tt.divisibility", 16]]
        for place, (name, kind) in enumerate(signature.items())
        if kind.startswith("*") or name in kernel.aligned
    }
    kind = GluonASTSource if function.is_gluon() else ASTSource
    source = kind(fn=function, signature=signature, constexprs=kernel.constexprs, attrs=attributes)
    target = GPUTarget("hip", f"gfx{arch}", 64) if arch in AMD else GPUTarget("cuda", arch, 32)
    compiled = triton.compile(source, target=target, options={**launch.OPTIONS, **kernel.options})
    usage = _amd_usage(compiled.asm["amdgcn"]) if arch in AMD else _read(compiled.asm["cubin"])
    return Resources(**usage, shared=compiled.metadata.shared)


def _read(cubin: bytes) -> dict[str, int]:
    """Registers, stack, local memory and fused sums, read by the tools that come with Triton."""
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = _output(knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name)
        code = _output(knobs.nvidia.nvdisasm.path, "--print-code", file.name)
    names = {"registers": "REG", "stack": "STACK", "local": "LOCAL"}
    found = {name: int(re.findall(rf"\b{word}:(\d+)", usage)[0]) for name, word in names.items()}
    return {**found, "fused": _fused_sums(code)}


def _output(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _fused_sums(code: str) -> int:
    """How often what came from another lane is the addend of a fused multiplication, its first use."""
    lines, count = code.splitlines(), 0
    for place, line in enumerate(lines):
        if shuffled := re.search(r"SHFL\.BFLY PT, (R\d+)", line):
            use = re.compile(rf"\b(F[A-Z]+[0-9]?)\b.*, {shuffled[1]}\b")
            found = (use.search(later) for later in lines[place + 1 : place + 100])
            first = next(filter(None, found), None)
            count += first is not None and first[1] == "FFMA"
    return count


def _amd_usage(assembly: str) -> dict[str, int]:
    """The same from the metadata at the end of the assembly: scratch is the stack, spills are counted in registers."""
    names = {"registers": "vgpr_count", "stack": "private_segment_fixed_size", "local": "vgpr_spill_count"}
    return {name: int(re.findall(rf"\.{word}:\s+(\d+)", assembly)[0]) for name, word in names.items()}


if __name__ == "__main__":
    kernels = [Kernel(**fields) for fields in json.load(sys.stdin)]
    print(json.dumps([dataclasses.asdict(compile_kernel(k, int(sys.argv[1]))) for k in kernels]))
