"""An activation is its entry and two branches in one file: a planted one goes through every place that knows names."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import torch

from moefy.triton_ops.shared import activations

ROOT = Path(__file__).resolve().parents[2]
SOURCE = ROOT / "triton_ops" / "shared" / "activations.py"

ENTRY = """
def _softplus_backward(grad, x, out):
    torch.mul(grad, torch.sigmoid(x), out=out)


ACTIVATIONS["softplus"] = Activation(
    forward=F.softplus,
    backward=_softplus_backward,
    functions=(F.softplus,),
    module=_is(nn.Softplus),
    zero_at_zero=False,  # log 2
)
"""
FORWARD = """    elif NAME == "softplus":
        y = tl.log(1 + tl.exp(x))
"""
BACKWARD = """    elif NAME == "softplus":
        y = tl.log(1 + tl.exp(x))
        dy = _sigmoid(x)
"""


def test_only_the_entries_file_knows_names() -> None:
    """No other file of the product asks whether an activation is this one or that."""
    names = "|".join(activations.ACTIVATIONS)
    asks = re.compile(rf"""(ACT|activation|NAME) (==|!=|in) .*["']({names})["']""")
    for folder in ("moefy", "passes", "triton_ops"):
        for path in (ROOT / folder).rglob("*.py"):
            if path.resolve() != SOURCE:
                assert not asks.search(path.read_text()), path


def test_the_file_brings_no_triton() -> None:
    code = "import sys, moefy.ops; print('triton' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "False"


def test_zero_at_zero_is_what_the_kernels_compute() -> None:
    for name, activation in activations.ACTIVATIONS.items():
        exact = activation.forward(torch.zeros(1, dtype=torch.float64)).item() == 0
        assert exact or not activation.zero_at_zero, name


def planted(tmp_path: Path) -> Path:
    """A copy of the product with one more activation, written into its one file."""
    import shutil

    for folder in ("moefy", "passes", "triton_ops"):
        shutil.copytree(
            ROOT / folder, tmp_path / folder, symlinks=True, ignore=shutil.ignore_patterns("__pycache__")
        )
    file = tmp_path / "triton_ops" / "shared" / "activations.py"
    text = file.read_text()
    marker = "# -- in Triton's language"
    assert text.count(marker) == 1 and text.count('    elif NAME == "tanh":\n') == 2
    text = text.replace(marker, f"{ENTRY}\n\n{marker}")
    forward, backward, rest = text.split('    elif NAME == "tanh":\n')
    tanh = '    elif NAME == "tanh":\n'
    file.write_text(f"{forward}{FORWARD}{tanh}{backward}{BACKWARD}{tanh}{rest}")
    return tmp_path


PROGRAM = """
import torch, torch.nn.functional as F
from torch import nn
import moefy
from moefy import ops
from moefy.ops import reference
from moefy.passes.match.classify_body import classify_body

assert classify_body(lambda a, b: F.softplus(a) * b, [64, 64]).activation == "softplus"
for spelled in ("softplus", F.softplus, nn.Softplus()):
    layer = moefy.MoE(8, 16, 4, activation=spelled)
    assert layer.body.known.activation == "softplus", spelled

torch.manual_seed(0)
T, D, H, E, K = 40, 16, 32, 4, 2
x = torch.randn(T, D, requires_grad=True)
weights, index = ops.top_k_softmax(torch.randn(T, E), K)
index[:5] = E                                    # dropped slots: act(0) is not 0 and must not come out
order, offsets = ops.sort_by_expert(index, E)
w_up, w_down = torch.randn(E, H, D, requires_grad=True), torch.randn(E, D, H, requires_grad=True)
args = (x, weights, order, offsets, w_up, None, w_down, None)
got = ops.expert_ffn(*args, activation="softplus")
wanted = sum(
    torch.where((index[:, k] < E)[:, None], weights[:, k, None] * torch.stack([
        F.softplus(x[t] @ w_up[min(int(index[t, k]), E - 1)].T) @ w_down[min(int(index[t, k]), E - 1)].T
        for t in range(T)]), 0.0)
    for k in range(K)
)
torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)
for a, b in zip(*(torch.autograd.grad(y.square().sum(), (x, w_up, w_down)) for y in (got, wanted))):
    torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)

from moefy.triton_ops.expert_ffn import Experts, forward
experts = Experts(weights_TK=weights, order_N=order, offsets_E=offsets, w_gate=None, b_gate=None, w_up=w_up.detach(),
                  b_up=None, w_down=w_down.detach(), b_down=None, activation="softplus")
torch.testing.assert_close(forward(x.detach(), experts, None, None), wanted.detach(), rtol=1e-4, atol=1e-4)
print("right")
"""


def test_a_new_activation_is_written_in_one_file(tmp_path: Path) -> None:
    root = planted(tmp_path)
    run = subprocess.run([sys.executable, "-c", PROGRAM], cwd=root, capture_output=True, text=True)
    assert run.stdout.strip() == "right", run.stdout + run.stderr
