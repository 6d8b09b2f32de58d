"""Every example runs as a reader would run it, and checks itself: an example whose claim fails exits non-zero.

python -m pytest tests/test_examples.py -k quickstart
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SECONDS = 180  # to end a hang: each example takes well under a minute on one free core
zoo = pytest.mark.zoo

# (example and its options, a text that it must print: an example that does nothing fails)
EXAMPLES = [
    pytest.param("quickstart.py", "step 19", id="quickstart"),
    pytest.param("upcycle_gpt.py", "steps the MoE is at", id="upcycle_gpt"),
    pytest.param("hf_llama_bert.py", "gradient norm of each expert", id="hf_llama_bert"),
    pytest.param("nn_transformer.py", "compiled training: loss", id="nn_transformer"),
    pytest.param("tutel_hello.py --quick", "cosine         2             -0.5", id="tutel_hello"),
    pytest.param("image_classifier.py --quick", "encoder.layers.2", id="image_classifier"),
    pytest.param("balance_methods.py --quick", "hash of the position", id="balance_methods"),
    pytest.param("custom_pass.py", "the pass matched", id="custom_pass"),
    pytest.param("vit.py", "torchvision: |MoE", id="vit", marks=zoo("timm", "torchvision")),
    pytest.param("megatron_mlp.py", "|MoE", id="megatron_mlp", marks=zoo("megatron.core")),
]


@pytest.mark.slow
@pytest.mark.parametrize(("line", "says"), EXAMPLES)
def test_example_runs(line: str, says: str) -> None:
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    name, *options = line.split()
    command = [sys.executable, str(ROOT / "examples" / name), *options]
    run = subprocess.run(command, env=env, capture_output=True, text=True, timeout=SECONDS)
    assert run.returncode == 0, run.stdout + run.stderr
    assert says in run.stdout


def test_every_example_is_listed() -> None:
    listed = {str(param.values[0]).split()[0] for param in EXAMPLES}
    assert listed == {path.name for path in (ROOT / "examples").glob("*.py")}
