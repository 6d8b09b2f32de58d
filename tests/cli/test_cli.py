"""The command line: exit codes, JSON alone on stdout, errors in one line, models from config files."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor

from moefy.cli import main as cli
from moefy.cli.targets import TargetFailed, load_target
from moefy.errors import UsageError

ROOT = Path(__file__).resolve().parents[2]

FACTORIES = '''
"""Factories for the tests of the command line."""
import sys
import torch
from torch import nn

print("importing prints")

class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(16), nn.Linear(16, 64), nn.Linear(64, 16)

    def forward(self, x):
        return x + self.down(torch.relu(self.up(self.norm(x))))

def blocks():
    print("the factory prints")
    return nn.Sequential(*[Block() for _ in range(3)])

def with_inputs():
    return blocks(), (torch.randn(2, 5, 16),)

def no_ffn():
    return nn.Sequential(nn.Linear(4, 4))

def picky():
    class Picky(Block):
        def forward(self, x):
            raise RuntimeError("these inputs are wrong")
    return Picky(), (torch.randn(2, 5, 16),)

def broken():
    return 1 / 0

def leaves():
    sys.exit(0)

def nothing():
    return "no model"

class Namespace:
    inner = staticmethod(blocks)

instance = Block()
'''

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_attention_heads": 64,
    "num_hidden_layers": 80,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "torch_dtype": "bfloat16",
}


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A folder with a module of factories, as the working directory."""
    name = f"factories_{tmp_path.name.replace('-', '_')}"
    (tmp_path / f"{name}.py").write_text(FACTORIES)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield name
    sys.modules.pop(name, None)


def moefy(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """``python -m moefy`` as a user runs it."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "108"}
    command = [sys.executable, "-m", "moefy", *arguments]
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True)


# ---- as a process


def test_a_report_in_json_is_alone_on_stdout(project, tmp_path):
    done = moefy("report", f"{project}:blocks", "--num-experts", "4", "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    data = json.loads(done.stdout)
    assert [layer["fqn"] for layer in data["layers"]] == ["0", "1", "2"]
    assert data["totals"]["rewritten"] == 3
    assert data["config"]["num_experts"] == 4
    assert "the factory prints" in done.stderr and "importing prints" in done.stderr


def test_a_failing_factory_shows_the_users_traceback(project, tmp_path):
    done = moefy("report", f"{project}:broken", cwd=tmp_path)
    assert done.returncode == 1 and done.stdout == ""
    lines = done.stderr.strip().split("\n")
    assert lines[-1] == f"moefy: factory '{project}:broken' failed"
    assert lines[-2] == "ZeroDivisionError: division by zero"
    assert "targets.py" not in done.stderr, "a frame of moefy's own"


def test_bad_usage_is_one_line_and_exit_code_2(tmp_path):
    done = moefy("report", "model.pt", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("moefy: expected MODULE:FACTORY") and "got 'model.pt'" in done.stderr
    assert done.stderr.count("\n") == 1


def test_a_70b_config_needs_no_memory(tmp_path):
    pytest.importorskip("transformers")
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    program = (
        "import resource, sys; from moefy.cli.main import main; code = main(['report', '.', '--json']);"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, file=sys.stderr); sys.exit(code)"
    )
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    data = json.loads(done.stdout)
    assert data["params_dense"] == 70_553_706_496
    assert data["totals"]["rewritten"] == 80
    assert data["dtype"] == "bfloat16"
    assert int(done.stderr.strip().split("\n")[-1]) < 2e6, "more than 2 GB"


# ---- in this process


def run(capsys, *arguments: str) -> tuple[int, str, str]:
    code = cli.main(arguments)
    return code, *capsys.readouterr()


def test_the_table_folds_layers(project, capsys):
    code, out, _ = run(capsys, "report", f"{project}:blocks", "-e", "4", "-k", "1")
    assert code == 0
    assert "{0..2}" in out and "4 experts, top-1" in out and "dry run" in out


def test_a_factory_may_give_inputs(project, capsys):
    code, out, _ = run(capsys, "report", f"{project}:with_inputs")
    assert code == 0 and "float32 [2, 5, 16] (given by the caller)" in out


def test_include_and_exclude_reach_the_matcher(project, capsys):
    code, out, _ = run(capsys, "report", f"{project}:blocks", "--exclude", "1*", "--json")
    assert code == 0 and json.loads(out)["totals"]["skipped_by_code"] == {"excluded": 1}
    code, _, err = run(capsys, "report", f"{project}:blocks", "--include", "nowhere.*")
    assert code == 2 and "matches no candidate" in err


def test_a_router_by_name(project, capsys):
    code, out, _ = run(capsys, "report", f"{project}:blocks", "--router", "switch")
    assert code == 0 and "8 experts, top-1, router switch" in out and "not exact" in out
    code, out, _ = run(capsys, "report", f"{project}:blocks", "--router", "gshard", "--passes", "--json")
    report = json.loads(out)
    assert (code, report["config"]["router"], report["config"]["top_k"]) == (0, "gshard", 2)
    code, _, err = run(capsys, "report", f"{project}:blocks", "--router", "swich")
    assert code == 2 and "did you mean 'switch'" in err


def test_no_ffn_is_exit_code_3_with_the_report(project, capsys):
    code, out, _ = run(capsys, "report", f"{project}:no_ffn")
    assert code == 3 and "no feed-forward network" in out


def test_a_model_that_fails_its_own_forward_is_exit_code_1(project, capsys):
    code, out, err = run(capsys, "report", f"{project}:picky")
    assert (code, out) == (1, "")
    assert (
        err.strip().split("\n")[-1].startswith("moefy: the forward of Picky fails")
        and "these inputs are wrong" in err
    )


@pytest.mark.parametrize(
    ("experts", "top_k"),
    [("0", "1"), ("4", "5"), ("-1", "2")],
)
def test_options_outside_their_domain_are_bad_usage(project, capsys, experts, top_k):
    code, out, err = run(capsys, "report", f"{project}:blocks", "-e", experts, "-k", top_k)
    assert (code, out) == (2, "") and "moefy: " in err


@pytest.mark.parametrize(
    "arguments", [(), ("unknown",), ("report",), ("report", "a:b", "--nope"), ("bench",)]
)
def test_argparse_errors_are_exit_code_2(capsys, arguments):
    code, out, err = run(capsys, *arguments)
    assert (code, out) == (2, "") and "usage:" in err


def test_help_says_that_code_runs(capsys):
    code, out, _ = run(capsys, "report", "--help")
    assert code == 0 and "this runs that code" in out and "exit codes" in out


def test_version(capsys):
    code, out, _ = run(capsys, "--version")
    assert code == 0 and re.fullmatch(r"moefy \d+\.\d+\.\d+\S*\n", out)


def test_env_as_table_and_as_json(capsys):
    code, out, _ = run(capsys, "env", "--json")
    data = json.loads(out)
    assert code == 0 and data["torch"] == str(torch.__version__) and data["packages"]["triton"]
    code, out, _ = run(capsys, "env")
    assert code == 0 and str(torch.__version__) in out and "triton kernels" in out


def test_passes_lists_what_the_backend_did(project, capsys):
    code, out, err = run(capsys, "report", f"{project}:blocks", "--passes", "--json")
    assert code == 0, err
    data = json.loads(out)
    assert data["dry_run"] is True
    names = [record["name"] for record in data["passes"]]
    assert "fuse_experts" in names and len(names) == len(set(names))
    assert all(record["nodes_before"] > 0 and record["ms"] >= 0 for record in data["passes"])


def test_passes_of_a_config_need_no_memory_either(tmp_path, capsys):
    pytest.importorskip("transformers")
    (tmp_path / "config.json").write_text(json.dumps({**LLAMA, "num_hidden_layers": 1}))
    code, out, err = run(capsys, "report", str(tmp_path), "--passes", "--json")
    assert code == 0, err
    data = json.loads(out)
    assert data["params_dense"] > 2e9 and data["dry_run"]
    assert [record["name"] for record in data["passes"]].count("fuse_experts") == 1


# ---- targets


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{}:missing", "has no 'missing'"),
        ("{}:block", "did you mean 'blocks'"),
        ("{}:nothing", "returned str; expected an nn.Module"),
        ("{}:FACTORIES", "has no"),
        ("no_such_module_anywhere:f", "there is no module 'no_such_module_anywhere'"),
        ("{}:", "expected MODULE:FACTORY"),
        (":f", "expected MODULE:FACTORY"),
        ("a b:f", "expected MODULE:FACTORY"),
        ("missing.json", "no such file"),
        (".", "no config.json there"),
    ],
)
def test_what_is_no_target_is_a_usage_error(project, text, message):
    with pytest.raises(UsageError, match=re.escape(message)):
        load_target(text.format(project))


def test_targets_may_be_nested_or_instances(project):
    assert isinstance(load_target(f"{project}:Namespace.inner").model, nn.Sequential)
    assert not load_target(f"{project}:instance").model.training


def test_a_factory_that_exits_is_a_failure(project):
    with pytest.raises(TargetFailed, match="leaves' failed"):
        load_target(f"{project}:leaves")


def test_a_module_that_fails_to_import_is_the_users_failure(tmp_path, monkeypatch):
    (tmp_path / "needs_more.py").write_text("import a_library_that_is_not_there")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    with pytest.raises(TargetFailed, match="importing 'needs_more' failed"):
        load_target("needs_more:f")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "cannot be read as JSON"),
        ("[1]", "no 'model_type'"),
        ('{"hidden_size": 3}', "no 'model_type'"),
        ('{"model_type": "no_such_model"}', "is not part of transformers"),
        ('{"model_type": "llama", "hidden_size": "wide"}', "config.json"),
    ],
)
def test_a_file_that_is_no_config_is_a_usage_error(tmp_path, text, message):
    pytest.importorskip("transformers")
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(UsageError, match=re.escape(message)):
        load_target(str(tmp_path))


@pytest.mark.parametrize(
    ("config", "kind"),
    [
        ({"model_type": "gpt2", "n_layer": 1}, "GPT2LMHeadModel"),
        ({"model_type": "bert", "num_hidden_layers": 1}, "BertForMaskedLM"),
        ({"model_type": "t5", "num_layers": 1}, "T5ForConditionalGeneration"),
        ({"model_type": "vit", "num_hidden_layers": 1}, "ViTForImageClassification"),
        ({"model_type": "bert", "num_hidden_layers": 1, "architectures": ["BertModel"]}, "BertModel"),
        ({"model_type": "gpt2", "n_layer": 1, "architectures": ["NotThere"]}, "GPT2LMHeadModel"),
    ],
)
def test_the_class_is_the_configs_or_the_most_telling(tmp_path, config, kind):
    pytest.importorskip("transformers")
    (tmp_path / "config.json").write_text(json.dumps(config))
    model = load_target(str(tmp_path / "config.json")).model
    assert type(model).__name__ == kind
    assert all(isinstance(p, FakeTensor) and p.device.type == "cpu" for p in model.parameters())


def test_tied_weights_stay_tied(tmp_path):
    pytest.importorskip("transformers")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2", "n_layer": 1}))
    model = load_target(str(tmp_path)).model
    assert model.get_submodule("lm_head").weight is model.get_submodule("transformer.wte").weight


def test_code_in_the_folder_does_not_run(tmp_path):
    pytest.importorskip("transformers")
    (tmp_path / "modeling_evil.py").write_text("open('ran', 'w').close()")
    config = {"model_type": "evil", "auto_map": {"AutoModel": "modeling_evil.Evil"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UsageError, match="not part of transformers"):
        load_target(str(tmp_path))
    assert not (tmp_path / "ran").exists()
