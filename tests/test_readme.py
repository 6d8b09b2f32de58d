"""The README says what is true: its Python runs, its report is the one that moefy prints, its commands are CI's.

The report shown in the README is printed again here and compared word for word; only measured numbers (errors) may
differ between machines. The files and the names of moefy that any of our pages mentions exist.
"""

from __future__ import annotations

import importlib
import re
import runpy
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import moefy
from moefy.cli import main as cli
from moefy.nn.routers import ROUTERS

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
MAX_LINES = 250
MEASURED = re.compile(r"\d\.?\d*e[-+]\d+")
PAGES = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "examples/migration.md", "triton_ops/README.md")
PATH = re.compile(r"(?<![\w/.~])(?:\.ci|moefy|passes|triton_ops|examples|tests)/[\w./-]*<?")
NAME = re.compile(r"\bmoefy(?:\.[a-zA-Z_]\w*)+")
ANNOUNCED = {"moefy.parallelize"}  # the migration guide names what comes next


def blocks(language: str) -> list[str]:
    """The fenced blocks of one language."""
    return re.findall(rf"```{language}\n(.*?)\n```", README, re.DOTALL)


def test_readme_is_short() -> None:
    assert README.count("\n") < MAX_LINES


def test_twenty_lines_run(capsys: pytest.CaptureFixture[str]) -> None:
    (block,) = [text for text in blocks("python") if "import moefy" in text]
    exec(compile(block, "README.md", "exec"), {"__name__": "readme"})
    assert "found 2 · rewritten 2 · skipped 0" in capsys.readouterr().out


class Block(nn.Module):
    """A pre-norm FFN of width 16 with a residual."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(16), nn.Linear(16, 64), nn.Linear(64, 16)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(nn.functional.gelu(self.up(self.norm(x))))


def router_gradient(model: nn.Module, x: Tensor, target: Tensor) -> float:
    """The norm of the loss's gradient for the routers, beside that for the experts."""
    model.zero_grad()
    (model(x) - target).square().mean().backward()
    norms = {True: 0.0, False: 0.0}
    for name, parameter in model.named_parameters():
        norms["router" in name] += parameter.grad.square().sum().item()
    return (norms[True] / norms[False]) ** 0.5


def test_symmetry_is_as_the_readme_says() -> None:
    """No gradient for the router of identical experts; one after the first step of the optimizer."""
    model = nn.Sequential(Block(), Block()).double()
    x, target = torch.randn(2, 64, 16).double(), torch.randn(2, 64, 16).double()
    moefy.transform(model, num_experts=4, top_k=2, example_args=(x,))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    assert router_gradient(model, x, target) < 1e-12
    optimizer.step()
    assert router_gradient(model, x, target) > 1e-6


def test_the_noise_block_runs_and_undo_still_gives_the_dense_model() -> None:
    (block,) = [text for text in blocks("python") if "expert_noise" in text]
    layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)
    model = nn.TransformerEncoder(layer, 1)
    dense = {name: value.clone() for name, value in model.state_dict().items()}
    exec(compile(block, "README.md", "exec"), {"moefy": moefy, "model": model})
    (up,) = [p for name, p in model.named_parameters() if name.endswith("linear1.weight")]
    assert up.shape[0] == 8
    relative = (up[1] - up[0]).std() / up[0].std()
    assert 0.015 < relative < 0.025
    moefy.undo(model)
    assert all(torch.equal(value, dense[name]) for name, value in model.state_dict().items())


def test_the_layer_block_runs(capsys: pytest.CaptureFixture[str]) -> None:
    """Its backward brings the auxiliary loss; a masked token passes the shared expert alone."""
    (block,) = [text for text in blocks("python") if "moefy.MoE(" in text]
    names: dict[str, Any] = {"moefy": moefy, "torch": torch, "nn": nn}
    exec(compile(block, "README.md", "exec"), names)
    assert "moefy load: Sequential" in capsys.readouterr().out
    layer, x, real, y = (names[name] for name in ("layer", "x", "real", "y"))
    assert torch.equal(layer(x, mask=real, top_k=1, capacity_factor=0), y)
    torch.testing.assert_close(y[~real], layer.shared_experts(x)[~real])
    assert not torch.allclose(y[real], layer.shared_experts(x)[real])


@pytest.mark.parametrize("capacity", ["capacity=1.25, ", ""])
def test_the_balance_block_runs(capacity: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Its loop minimises the auxiliary loss: without a capacity nothing else moves the routers of equal experts."""
    (block,) = [text for text in blocks("python") if "AuxLoss(" in text]
    model, x = nn.Sequential(Block(), Block()), torch.randn(2, 16, 16)
    names: dict[str, Any] = {"moefy": moefy, "model": model, "x": x, "batches": [(x, x)]}
    loop = block.index("for x")
    assert "capacity=1.25, " in block
    exec(compile(block[:loop].replace("capacity=1.25, ", capacity), "README.md", "exec"), names)
    routers = {name: p for name, p in model.named_parameters() if "router" in name}
    start = {name: p.detach().clone() for name, p in routers.items()}
    names |= {"loss_fn": nn.functional.mse_loss, "optimizer": torch.optim.SGD(model.parameters(), lr=1.0)}
    exec(compile(block[loop:], "README.md", "exec"), names)
    assert len(routers) == 2
    assert all((p - start[name]).norm() > 1e-5 for name, p in routers.items())
    assert "max/mean at most" in capsys.readouterr().out


def test_the_table_of_routers_has_all_of_them() -> None:
    table = README[README.index("| `router=` |") :].split("\n\n")[0]
    assert sorted(re.findall(r'"(\w+)"', table)) == sorted(ROUTERS)


def test_the_shown_report_is_what_moefy_prints(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The block starts with ``$ moefy ...``: that command is run in the repository root."""
    (block,) = [text for text in blocks("console") if text.startswith("$ moefy report")]
    monkeypatch.chdir(ROOT)
    command, shown = block.split("\n", 1)
    assert cli.main(shlex.split(command)[2:]) == 0
    printed = capsys.readouterr().out.rstrip("\n")
    assert MEASURED.sub("#", printed).split("\n") == MEASURED.sub("#", shown).split("\n")


@pytest.mark.parametrize("name", ["run", "test"])
def test_set_up_commands_are_found(name: str) -> None:
    command = runpy.run_path(str(ROOT / ".ci" / "readme_command.py"))["command"](README, name)
    assert command.startswith("python3 -m venv") and "pip install" in command


def missing_files(text: str) -> list[str]:
    """Paths of the repository in ``text`` that do not exist; of ``passes/<name>.py`` the folder is looked for."""
    named = {
        path.rpartition("/")[0] if path.endswith("<") else path.rstrip(".") for path in PATH.findall(text)
    }
    return sorted(path for path in named if not (ROOT / path).exists())


def missing_names(text: str) -> list[str]:
    """Dotted names of moefy in ``text`` that lead nowhere."""
    return sorted(name for name in set(NAME.findall(text)) - ANNOUNCED if not exists(name))


def exists(name: str) -> bool:
    """Whether ``moefy.a.b`` is a module, or something in one."""
    at, known = moefy, "moefy"
    for part in name.split(".")[1:]:
        known += f".{part}"
        try:
            at = getattr(at, part) if hasattr(at, part) else importlib.import_module(known)
        except ImportError:
            return False
    return True


@pytest.mark.parametrize("page", PAGES)
def test_every_file_that_a_page_names_exists(page: str) -> None:
    assert missing_files((ROOT / page).read_text()) == []


@pytest.mark.parametrize("page", PAGES)
def test_every_name_that_a_page_uses_exists(page: str) -> None:
    assert missing_names((ROOT / page).read_text()) == []


def test_what_is_missing_is_seen() -> None:
    text = (
        "`passes/trace/`, passes/gone.py. moefy/<name>.py tests/gone/<name>.py; moefy.nn.MoE, moefy.nn.gone.f"
    )
    assert missing_files(text) == ["passes/gone.py", "tests/gone"]
    assert missing_names(text) == ["moefy.nn.gone.f"]


def test_ci_runs_the_readmes_commands() -> None:
    script = (ROOT / ".ci" / "run").read_text()
    assert "readme run" in script and "readme test" in script
