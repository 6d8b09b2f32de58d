"""Every kernel in its default configurations becomes machine code for four architectures, and spills nothing.

A kernel joins by a row in ``KERNELS``. Contract: what a row holds comes from the launcher's own choice of blocks.
"""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
from cubin import ROOT, SHARED_LIMIT, Kernel, Resources, faults, resources

from moefy.triton_ops import sort, top_k
from moefy.triton_ops.shared import blocks, launch
from moefy.triton_ops.shared.activations import ACTIVATIONS

POINTER = {torch_name: f"*{name}" for torch_name, name in (("float32", "fp32"), ("bfloat16", "bf16"))}


def split(config: dict[str, int]) -> tuple[dict[str, int], dict[str, int]]:
    """A launcher's blocks as (constants, options)."""
    return (
        {k: v for k, v in config.items() if k != "num_warps"},
        {"num_warps": config["num_warps"]},
    )


def top_k_kernels(experts: int, k: int, dtype: str) -> list[Kernel]:
    constants, options = split(top_k.blocks(experts))
    constants |= {"E": experts, "K": k}
    forward = {
        "logits_ptr": POINTER[dtype],
        "weights_ptr": POINTER[dtype],
        "index_ptr": "*i64",
        "T": "i32",
        "stride_t": "i32",
    }
    backward = {
        "grad_ptr": POINTER[dtype],
        "weights_ptr": POINTER[dtype],
        "index_ptr": "*i64",
        "dlogits_ptr": POINTER[dtype],
        "T": "i32",
    }
    block_k = 1 << (k - 1).bit_length()
    name = "moefy.triton_ops.top_k:top_k_kernel"
    return [
        Kernel(name, forward, {**constants, "BLOCK_K": block_k, "stride_e": 1}, options, ("stride_t",)),
        Kernel("moefy.triton_ops.top_k:top_k_backward_kernel", backward, constants, options),
    ]


def sort_kernels(experts: int, slots: int) -> list[Kernel]:
    module = "moefy.triton_ops.sort"
    ids, table, sizes = {"ids_ptr": "*i64"}, {"upto_ptr": "*i32"}, {"N": "i32", "C": "i32"}
    results = {"order_ptr": "*i64", "row_ptr": "*i32"}
    expert = {"E": experts}
    block_e = 1 << (experts - 1).bit_length()
    pairs, pairs_options = split(sort.pairs_blocks(min(slots, sort.MAX_PAIRS_SLOTS)))
    place, _ = split(sort.place_blocks(experts))
    tile, tile_options = split(sort.tile_blocks(experts))
    scan, scan_options = split(sort.scan_blocks(slots // tile["BLOCK"]))
    base = {**table, "base_ptr": "*i32", "offsets_ptr": "*i32", "C": "i32"}
    return [
        Kernel(
            f"{module}:pairs_kernel",
            {**ids, **results, "offsets_ptr": "*i32", "N": "i32"},
            {**expert, **pairs},
            pairs_options,
        ),
        Kernel(
            f"{module}:count_kernel",
            {**ids, **table, **sizes},
            {**expert, **tile, "BLOCK_E": block_e},
            tile_options,
        ),
        Kernel(f"{module}:base_kernel", base, {**expert, "BLOCK": tile["BLOCK"], **scan}, scan_options),
        Kernel(
            f"{module}:place_kernel",
            {**ids, "base_ptr": "*i32", **results, **sizes},
            {**expert, **place},
            tile_options,
        ),
    ]


TABLES = {"expert_of_tile": "*i32", "experts": "*i32"}
DTYPES = {torch.bfloat16: "bf16", torch.float32: "fp32"}
HALF, FULL = torch.bfloat16, torch.float32


def row_kernel(
    module: str, kind: str, dtype: torch.dtype, pointers: str, tiles: dict[str, tuple[int, ...]], *,
    rows: int, tma: bool, stack: int = 0, **constants: object,
) -> Kernel:  # fmt: skip
    """A kernel over rows in its launcher's blocks: ``tiles`` are descriptors, in the pointer form plain pointers."""
    device = torch.device("cpu") if tma else torch.device("meta")
    block = blocks.blocks(kind, dtype, rows, 64, device)
    pieces = block.pieces_for(bool(constants.get("GLU")))
    name = DTYPES[dtype]
    function = getattr(importlib.import_module(f"moefy.triton_ops.{module}"), f"_{module}_kernel")
    sizes = {"m": block.m, "n": block.n, "k": block.k, "p": block.n // pieces, "1": 1, "2": 2}
    types = (
        dict.fromkeys(pointers.split(), f"*{name}")
        | {"order": "*i64", "parts": "*fp32", "weights": "*fp32"}
        | TABLES
    )
    for tile, letters in tiles.items():
        shape = ", ".join(str(sizes[letter]) for letter in letters)
        types[tile] = f"tensordesc<{name}[{shape}]>" if tma else f"*{name}"
    constants |= {"M": block.m, "N": block.n, "STEP": block.k, "GROUP": block.group, "FLATTEN": block.flatten}
    constants |= {
        "PRECISION": "ieee",
        "TMA": tma,
        "STORE": block.store and tma,
        "PIECES": pieces,
        "K": 8,
        "EVEN": tma,
    }
    constants = {key: value for key, value in constants.items() if key in function.arg_names}
    signature = {n: types.get(n, "i32") for n in function.arg_names if n not in constants}
    if not constants.get("STORE"):
        signature |= {n: f"*{name}" for n in signature if n.endswith("_tiles") and n in ("out_tiles", *OUTS)}
    aligned = tuple(n for n, kind in signature.items() if kind == "i32") if tma else ()
    archs = (90, 100) if tma else (80, 90, 942)
    return Kernel(
        f"moefy.triton_ops.{module}:_{module}_kernel",
        signature,
        constants,
        block.options,
        aligned,
        archs,
        stack,
    )


OUTS = ("gate_tiles", "up_tiles", "hidden_tiles", "dgate_tiles", "dup_tiles", "weighted_tiles")


def ffn_kernels(dtype: torch.dtype, rows: int, *, tma: bool) -> list[Kernel]:
    """The products of one FFN, GLU and plain, forward and backward."""
    common = {"rows": rows, "tma": tma}
    pair = {"w_gate": "12nk", "w_up": "12nk"} if tma else {"w_gate": "1nk", "w_up": "1nk"}
    outs = "gate_out up_out hidden_out gate_tiles up_tiles hidden_tiles b_gate b_up"
    entry = {"GATE_BIAS": True, "UP_BIAS": True, "SAVE": True, "GATHER": True}
    kernels = [
        row_kernel("entry", "glu_entry", dtype, f"x {outs}", pair, ACT="silu", GLU=True, PAIR=int(tma),
                   **entry, **common),
        row_kernel("entry", "entry", dtype, f"x {outs}", {"w_up": "1nk", "w_gate": "1nk"}, ACT="gelu", GLU=False,
                   PAIR=0, **entry, **common),
    ]  # fmt: skip
    for transposed in (False, True):
        weight = "1kn" if transposed else "1nk"
        tiles = {"a": "mk", "a2": "mk", "w": weight, "w2": weight, "out_tiles": "mn"}
        forms = {"TRANSPOSED": transposed, "TWO": transposed, "BIAS": not transposed}
        kernels.append(row_kernel("linear", "linear", dtype, "bias out", tiles, **forms, **common))
    outs = "grad gate up dgate dup weighted dgate_tiles dup_tiles weighted_tiles"
    for glu, act in ((True, "silu"), (False, "gelu")):
        kernels.append(
            row_kernel("hidden_grad", "hidden_grad", dtype, outs, {"w_down": "1kn"}, ACT=act, GLU=glu, GATHER=True,
                       stack=64 if tma else 0, **common)
        )  # fmt: skip
    for gathered in (False, True):
        tiles = {"x_tiles": "kn"} if gathered else {"g_tiles": "km", "x_tiles": "kn"}
        pointers = "g x out" + " g_tiles" * gathered
        forms = {"GATHER_G": gathered, "GATHER_X": False, "G_TMA": tma and not gathered, "X_TMA": tma}
        kind = "gathered_weight_grad" if gathered else "weight_grad"
        kernels.append(row_kernel("weight_grad", kind, dtype, pointers, tiles, **forms, **common))
    return kernels


def row_movers(dtype: torch.dtype) -> list[Kernel]:
    """The kernels that move and sum rows, and the schedule."""
    name = f"*{DTYPES[dtype]}"
    wide = {"BLOCK": 2048, "K": 8}
    tables = {**TABLES, "num_experts": "i32"}
    experts = {"experts": "*i32"}
    schedule = {"offsets": "*i32", **tables, "order": "*i64", "row_of_slot": "*i32", "rows": "i32",
                "max_tiles": "i32", "listing": "i32"}  # fmt: skip
    parts = {"parts": "*fp32", "order": "*i64", "grad": name, "b_down": name, "out": "*fp32", **tables,
             "num_rows": "i32", "num_parts": "i32", "depth": "i32", "stride_grad": "i32"}  # fmt: skip
    bias = {
        "g": name,
        "weights": "*fp32",
        "order": "*i64",
        "out": name,
        **experts,
        "width": "i32",
        "stride": "i32",
    }
    total = {"y": name, "weights": "*fp32", "row_of_slot": "*i32", "out": name, "width": "i32",
             "stride_y": "i32", "stride_out": "i32"}  # fmt: skip
    spread = {"x": name, "row_of_slot": "*i32", "rows": name, "width": "i32", "stride_x": "i32"}
    return [
        Kernel("moefy.triton_ops.shared.tiles:_schedule_kernel", schedule,
               {"M": 128, "PADDED": 128, "TILES": 128, "BLOCK": 1024, "COUNTERS": 64}, {"num_warps": 4}),
        Kernel("moefy.triton_ops.hidden_grad:_weights_grad_kernel", parts,
               {"K": 8, "BIAS": True, "M": 128, "STEP": 32}, {"num_warps": 4}),
        Kernel("moefy.triton_ops.weight_grad:_bias_grad_kernel", bias,
               {"K": 8, "GATHER": True, "WEIGHTED": True, "N": 64, "STEP": 64}, {"num_warps": 4}),
        Kernel("moefy.triton_ops.gather_sum:_gather_sum_kernel", total, {**wide, "WEIGHTED": True}, {"num_warps": 8}),
        Kernel("moefy.triton_ops.gather_sum:_spread_kernel", spread, wide, {"num_warps": 8}),
    ]  # fmt: skip


def hopper_kernels() -> list[Kernel]:
    """What runs on Hopper alone, in Gluon: GLU and plain, with every epilogue there is, in bf16."""
    from triton.experimental.gluon.language import NVMMASharedLayout, bfloat16

    from moefy.triton_ops.hopper import TILE_M, TILE_N, entry, hidden_grad, linear, weight_grad

    def tile(*block: int) -> str:
        layout = NVMMASharedLayout.get_default_for(list(block), bfloat16)
        return f"tensordesc<bf16[{block[0]}, {block[1]}],{layout!r}>"

    def row(module: Any, pointers: str, tiles: dict[str, str], **constants: object) -> Kernel:
        name = module.__name__.rpartition(".")[2]
        function = getattr(module, f"_{name}_kernel")
        types = (
            dict.fromkeys(pointers.split(), "*bf16")
            | {"order": "*i64", "parts": "*fp32", "weights": "*fp32"}
            | TABLES
            | tiles
        )
        constants |= {
            "M": TILE_M,
            "N": TILE_N,
            "STEP": module.STEP,
            "STAGES": module.STAGES,
            "GROUP": module.GROUP,
        }
        signature = {n: types.get(n, "i32") for n in function.arg_names if n not in constants}
        aligned = tuple(n for n, kind in signature.items() if kind == "i32")
        return Kernel(
            f"{module.__name__}:_{name}_kernel",
            signature,
            constants,
            {"num_warps": 8 if name == "hidden_grad" else 4},
            aligned,
            (90,),
        )

    kernels = []
    for glu, act in ((True, "silu"), (False, "gelu")):
        weights = tile(TILE_N // 2 if glu else TILE_N, entry.STEP)
        kernels += [
            row(entry, "x b_gate b_up gate_out up_out hidden_out", {"gate_tiles": weights, "up_tiles": weights},
                K=8, ACT=act, GLU=glu, GATE_BIAS=glu, UP_BIAS=True, SAVE=True, EVEN=even, WHOLE=even,
                CLEAR=not glu and not ACTIVATIONS[act].zero_at_zero)
            for even in (True, False)
        ]  # fmt: skip
        tiles = {"grad_tiles": tile(TILE_M, hidden_grad.STEP), "w_tiles": tile(hidden_grad.STEP, TILE_N)}
        kernels += [row(hidden_grad, "gate up dgate dup weighted", tiles, ACT=act, GLU=glu, EVEN=even,
                        PIECE=hidden_grad.PIECE, WIDE=hidden_grad.GLU_WIDE if glu else TILE_N)
                    for even in (True, False)]  # fmt: skip
    for transposed, two, bias in (
        (False, False, True),
        (False, False, False),
        (True, False, False),
        (True, True, False),
    ):
        weights = tile(linear.STEP, TILE_N) if transposed else tile(TILE_N, linear.STEP)
        rows = tile(TILE_M, linear.STEP)
        tiles = {"a_tiles": rows, "a2_tiles": rows, "w_tiles": weights, "w2_tiles": weights}
        tiles["out_tiles"] = tile(TILE_M // 2, TILE_N)
        kernels.append(row(linear, "bias out", tiles, TRANSPOSED=transposed, TWO=two, BIAS=bias))
    tiles = {"g_tiles": tile(weight_grad.STEP, TILE_M), "x_tiles": tile(weight_grad.STEP, TILE_N)}
    tiles["out_tiles"] = tile(TILE_M // 2, TILE_N)
    tiles |= {f"also_{name}": kind for name, kind in tiles.items()}
    kernels += [row(weight_grad, "", tiles, TWO=two, TAKEN=weight_grad.TAKEN) for two in (False, True)]
    return kernels


KERNELS: dict[str, list[Kernel]] = {
    "on Hopper": hopper_kernels(),
    "rows in bf16": row_movers(HALF),
    "rows in fp32": row_movers(FULL),
    "expert FFN in bf16": ffn_kernels(HALF, 262144, tma=True),
    "expert FFN in bf16, few rows": ffn_kernels(HALF, 128, tma=True),
    "expert FFN in bf16, 32 rows an expert": ffn_kernels(HALF, 32 * 64, tma=True),
    "expert FFN in fp32": ffn_kernels(FULL, 262144, tma=True),
    "expert FFN in bf16 by pointers": ffn_kernels(HALF, 262144, tma=False),
    "expert FFN in fp32 by pointers": ffn_kernels(FULL, 262144, tma=False),
    "top_k 1 of 1": top_k_kernels(1, 1, "float32"),
    "top_k 2 of 8": top_k_kernels(8, 2, "float32"),
    "top_k 8 of 64": top_k_kernels(64, 8, "float32"),
    "top_k 8 of 64 in bf16": top_k_kernels(64, 8, "bfloat16"),
    "top_k 64 of 4096": top_k_kernels(4096, 64, "float32"),
    "sort 8 experts": sort_kernels(8, 65536),
    "sort 64 experts": sort_kernels(64, 262144),
    "sort 4096 experts": sort_kernels(4096, 262144),
}


@pytest.mark.slow
@pytest.mark.parametrize("arch", SHARED_LIMIT)
def test_every_kernel_compiles_without_faults(arch):
    kernels = [kernel for several in KERNELS.values() for kernel in several if arch in kernel.archs]
    found = resources(kernels, arch)
    assert all(each.registers > 0 for each in found)
    wrong = [
        fault for kernel, each in zip(kernels, found, strict=True) for fault in faults(kernel, each, arch)
    ]
    assert not wrong, "\n".join(wrong)


def test_what_is_a_fault():
    kernel = KERNELS["sort 8 experts"][0]
    assert faults(kernel, Resources(registers=255, stack=0, local=0, shared=1024), 80) == []
    assert len(faults(kernel, Resources(registers=255, stack=0, local=8, shared=1024), 80)) == 1
    assert len(faults(kernel, Resources(registers=255, stack=8, local=0, shared=200 * 1024), 80)) == 2
    assert len(faults(kernel, Resources(registers=255, stack=0, local=0, shared=0, fused=1), 90)) == 1
    assert len(faults(kernel, Resources(registers=255, stack=0, local=0, shared=200 * 1024), 90)) == 0


@pytest.mark.slow
@pytest.mark.parametrize("arch", [80, 90, 100])
def test_a_product_that_is_fused_into_a_sum_is_seen(arch):
    pointers = dict.fromkeys(("x", "y", "out"), "*fp32")
    (found,) = resources([Kernel("fused_sum:fused_sum_kernel", pointers, {"N": 32}, {"num_warps": 1})], arch)
    assert found.fused > 0


def test_every_kernel_of_the_package_has_a_row():
    """A kernel that joins the package joins this list."""
    package = ROOT / "triton_ops"
    modules = [
        ".".join(("moefy.triton_ops", *path.relative_to(package).with_suffix("").parts))
        for path in package.rglob("*.py")
        if path.stem not in ("__init__", "launch")
    ]
    found = {
        f"{module}:{name}"
        for module in modules
        for name, value in vars(importlib.import_module(module)).items()
        if isinstance(value, launch.Kernel) and value.__module__ == module
    }
    assert found == {kernel.name for several in KERNELS.values() for kernel in several}
