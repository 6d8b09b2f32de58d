"""In which leg of CI a test runs. Each test runs in one, where it tells most.

    light     a bare ``pytest``, which is README's test command: a small CPU build of torch
    zoo       the newest torch with every third-party library: compilers, tracers, models of others, examples
    house     beside the linters, in one process: imports, packaging
    release   ``.ci/matrix``, before a release: what is slow, and says little more than its like in another leg

``pytest PATH`` runs whatever lies there, ``pytest --leg NAME`` one leg, ``--leg all`` everything. A test that is in no
table below is in the light leg, so none can fall between the legs.

    >>> leg_of("tests/nn/test_moe.py::test_empty", needs_libraries=False)
    'light'
"""

from __future__ import annotations

from collections.abc import Iterable
from fnmatch import fnmatchcase

LEGS = ("light", "zoo", "house", "release")

# Patterns of test ids below tests/, the first that fits decides. "[" stands for itself.
TABLE = {
    "release": (
        "triton_ops/test_compile.py::test_every_kernel_compiles_without_faults[80]",
        "triton_ops/test_compile.py::test_every_kernel_compiles_without_faults[100]",
        "triton_ops/test_compile.py::test_every_kernel_compiles_without_faults[942]",
        "triton_ops/test_compile.py::test_a_product_that_is_fused_into_a_sum_is_seen[80]",
        "triton_ops/test_compile.py::test_a_product_that_is_fused_into_a_sum_is_seen[100]",
        "compiler/test_backend.py::test_24_layers_compiled_one_by_one[torch.compile-AlignedBlock]",
        # Beside the same case of a plain FFN, or of a gated one of three linears.
        "nn/test_tracing.py::test_inductor_with_a_checkpoint_or_a_graph_break[*-BareGlu]",
        "nn/test_tracing.py::test_inductor_with_a_checkpoint_or_a_graph_break[entry-Glu]",
        "nn/test_tracing.py::test_inductor_with_a_checkpoint_or_a_graph_break[exit-Glu]",
        "integration/test_aux_loss_modes.py::test_checkpointed_outputs[glu-*]",
        # Beside the same with the fused op, and with a merged stack.
        "ops/test_compile.py::test_three_graphs_for_all_token_counts[inductor-small ops]",
        "triton_ops/test_expert_ffn.py::test_x_is_copied_in_blocks_of_columns[merged_gate_last]",
        # README's first command, which .ci/run types as a reader does.
        "test_examples.py::test_example_runs[quickstart]",
    ),
    "house": ("test_layering.py::*", "test_packaging.py::*"),
    "zoo": (
        "zoo/*",
        "compiler/*",
        "capture/test_inputs.py::*",
        "integration/test_aux_loss_modes.py::*",
        "integration/test_checkpointing.py::*",
        "integration/test_compile.py::*",
        "integration/test_data_parallel.py::*",
        "integration/test_distributed.py::*",
        "integration/test_export.py::*",
        "integration/test_generate.py::*",
        "nn/test_tracing.py::*",
        "*::*inductor*",
        "ops/test_compile.py::*",
        "ops/test_registry.py::*",
        "passes/test_fuse_experts.py::*",
        "bench/test_bench_layer.py::test_bars_are_drawn",  # needs matplotlib
        "reports/test_expert_load.py::*",
        "test_examples.py::*",
    ),
}

# More than 20 s each (2 cores, torch 2.14).
LONG = (
    "triton_ops/test_compile.py::test_every_kernel_compiles_without_faults*",
    "compiler/test_backend.py::test_24_layers_compiled_one_by_one*",
    "nn/test_capacity_layer.py::test_inductor_has_the_same_gradients",
    "test_examples.py::test_example_runs[upcycle_gpt]",
)


def leg_of(nodeid: str, *, needs_libraries: bool) -> str:
    """The leg of the test ``nodeid``; ``needs_libraries`` when it is marked with ``zoo``."""
    for leg, patterns in TABLE.items():
        if _fits(nodeid, patterns):
            return leg
    return "zoo" if needs_libraries else "light"


def is_long(nodeid: str) -> bool:
    """Whether the test should start first."""
    return _fits(nodeid, LONG)


def _fits(nodeid: str, patterns: Iterable[str]) -> bool:
    name = nodeid.removeprefix("tests/")
    return any(fnmatchcase(name, pattern.replace("[", "[[]")) for pattern in patterns)
