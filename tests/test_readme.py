"""The README says what is true: its Python runs, its report is the one that moefy prints, its commands are CI's.

The report shown in the README is printed again here and compared word for word; only measured numbers (errors) may
differ between machines.
"""

from __future__ import annotations

import re
import runpy
import shlex
from pathlib import Path

import pytest

from moefy import cli

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
MAX_LINES = 250
MEASURED = re.compile(r"\d\.?\d*e[-+]\d+")


def blocks(language: str) -> list[str]:
    """The fenced blocks of one language."""
    return re.findall(rf"```{language}\n(.*?)\n```", README, re.DOTALL)


def test_readme_is_short() -> None:
    assert README.count("\n") < MAX_LINES


def test_twenty_lines_run(capsys: pytest.CaptureFixture[str]) -> None:
    (block,) = [text for text in blocks("python") if "import moefy" in text]
    exec(compile(block, "README.md", "exec"), {"__name__": "readme"})
    assert "found 2 · rewritten 2 · skipped 0" in capsys.readouterr().out


def test_the_noise_block_runs() -> None:
    import torch
    from torch import nn

    import moefy

    (block,) = [text for text in blocks("python") if "expert_noise" in text]
    layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)
    names = {"moefy": moefy, "model": nn.TransformerEncoder(layer, 1)}
    exec(compile(block, "README.md", "exec"), names)
    (up,) = [p for name, p in names["model"].named_parameters() if name.endswith("linear1.weight")]
    assert up.shape[0] == 8
    assert not torch.equal(up[0], up[1])


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


def test_ci_runs_the_readmes_commands() -> None:
    script = (ROOT / ".ci" / "run").read_text()
    assert "readme run" in script and "readme test" in script
