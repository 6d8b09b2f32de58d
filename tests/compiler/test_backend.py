"""``torch.compile`` with the moefy backend: options, inner compilers, and dense models at compile time."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import moefy
from moefy import passes
from moefy.compiler import backend as moefy_backend
from moefy.compiler.options import parse_options
from moefy.errors import BackendError, ConfigError, NoFFNFound, UnknownOption
from moefy.nn import EntryLinear, MoE

ROOT = Path(__file__).resolve().parents[2]
DENSE = {"inner": "eager", "num_experts": 4}


class Block(nn.Module):
    """An inline FFN; ``where`` puts a graph break into it."""

    def __init__(self, width=8, where=None):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.fc1 = nn.Linear(width, 2 * width)
        self.fc2 = nn.Linear(2 * width, width)
        self.where = where

    def forward(self, x):
        h = F.gelu(self.fc1(self.norm(x)))
        if self.where == "between the linears":
            torch._dynamo.graph_break()
        y = self.fc2(h)
        if self.where == "before the residual":
            torch._dynamo.graph_break()
        return x + y


class Mlp(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width)

    def forward(self, x):
        return self.down(F.silu(self.up(x)))


class AlignedBlock(nn.Module):
    def __init__(self, width=8, where=None):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.mlp = Mlp(width)
        self.where = where

    def forward(self, x):
        return x + self.mlp(self.norm(x))


class Net(nn.Module):
    def __init__(self, depth, block=Block, where=None):
        super().__init__()
        self.layers = nn.ModuleList(block(where=where) for _ in range(depth))
        self.where = where

    def forward(self, x):
        if self.where == "at the start":
            torch._dynamo.graph_break()
        for layer in self.layers:
            x = layer(x)
            if self.where == "between layers":
                torch._dynamo.graph_break()
        return x


@pytest.fixture(autouse=True)
def fresh():
    torch.manual_seed(0)
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def quiet():
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*optimizer built before.*")
        yield


def compiled(model, options=None, **kwargs):
    return torch.compile(model, backend=moefy_backend.backend, options=options, **kwargs)


def experts(model):
    """The stacked weights of every MoE, one tuple per FFN's first linear."""
    first = [
        m for m in model.modules() if isinstance(m, MoE) or (isinstance(m, EntryLinear) and m.index == 0)
    ]
    return [next(p for p in m.parameters() if p.dim() == 3) for m in first]


def matched(name):
    return sum(r.matched for r in moefy_backend.records() if r.name == name)


def train_step(model, x):
    model.zero_grad()
    y = model(x)
    y.square().mean().backward()
    return y.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


# -- options ---------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"num_expert": 8}, UnknownOption, "did you mean 'num_experts'"),
        ({"inner": "aot"}, ConfigError, "inductor"),
        ({"num_experts": 0}, ConfigError, "num_experts"),
        ({"num_experts": 2, "top_k": 3}, ConfigError, "top_k"),
        ({"top_k": 2}, ConfigError, "num_experts"),
        ({"include": "layers.*"}, ConfigError, "num_experts"),
        ({"disable": ("fuse_expert",)}, UnknownOption, "did you mean 'fuse_experts'"),
        ({"mode": "fast"}, ConfigError, "max-autotune"),
        ({"inner": "eager", "mode": "max-autotune"}, ConfigError, "inductor"),
        ({"inductor": {"max_autotun": True}}, UnknownOption, "did you mean 'max_autotune'"),
    ],
)
def test_wrong_options_are_named_errors(options, error, text):
    with pytest.raises(error, match=text):
        parse_options(options)
    model = Block()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(error, match=text):  # the error itself, not Dynamo's wrapper around it
        compiled(model, options)(torch.randn(2, 3, 8))
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_mode_is_one_setting():
    assert parse_options({}, mode="max-autotune").mode == "max-autotune"
    with pytest.raises(ConfigError, match="mode"):
        parse_options({"mode": "default"}, mode="max-autotune")
    config = moefy.MoEConfig(num_experts=4, seed=3)
    assert parse_options({"config": config, "top_k": 1}).moe == moefy.MoEConfig(
        num_experts=4, top_k=1, seed=3
    )


# -- a transformed model ---------------------------------------------------------------------------
@pytest.mark.parametrize("block", [Block, AlignedBlock])
@pytest.mark.parametrize("inner", ["eager", "aot_eager", "inductor"])
def test_each_inner_compiler_forward_and_backward(inner, block):
    x = torch.randn(2, 5, 8)
    model = moefy.transform(Net(2, block), num_experts=4, example_args=(x,))
    y, grads = train_step(model, x)
    got, got_grads = train_step(compiled(model, {"inner": inner}, fullgraph=True), x)
    torch.testing.assert_close(got, y, rtol=1e-5, atol=1e-5)
    assert grads.keys() == {k.removeprefix("_orig_mod.") for k in got_grads}
    for name, grad in got_grads.items():
        torch.testing.assert_close(grad, grads[name.removeprefix("_orig_mod.")], rtol=1e-4, atol=1e-5)
    assert matched("fuse_experts") == (2 if block is Block else 0)


def test_the_backend_is_hit_by_name_and_by_module_compile():
    x = torch.randn(2, 5, 8)
    model = moefy.transform(Net(1), num_experts=4, example_args=(x,))
    if "moefy" in torch._dynamo.list_backends(exclude_tags=()):  # installed
        torch.compile(model, backend="moefy", options={"inner": "eager"})(x)
        assert len(passes.history()) == 1
        torch._dynamo.reset()
    assert passes.history() == ()
    model.compile(backend=moefy_backend.backend, options={"inner": "eager"})
    model(x)
    (run,) = passes.history()
    assert run.graph == "0/0" and [r.name for r in run.records] == list(passes.registered_passes())


def test_a_pass_is_disabled_by_name():
    x = torch.randn(2, 5, 8)
    model = moefy.transform(Net(1), num_experts=4, example_args=(x,))
    y = compiled(model, {"inner": "eager", "disable": ("fuse_experts",)})(x)
    assert moefy_backend.records() == ()
    torch.testing.assert_close(y, model(x))


def test_inductor_patches_reach_inductor(monkeypatch):
    from torch._inductor import compile_fx as module

    seen = {}

    def spy(gm, inputs, *, config_patches):
        seen.update(config_patches)
        return gm.forward

    monkeypatch.setattr(module, "compile_fx", spy)
    compiled(Block(), {"mode": "max-autotune", "inductor": {"fallback_random": True}})(torch.randn(1, 2, 8))
    assert seen["max_autotune"] is True and seen["fallback_random"] is True


def test_a_dense_model_without_num_experts_stays_dense():
    model, x = Net(2), torch.randn(2, 5, 8)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        y = compiled(model, {"inner": "aot_eager"})(x)
    torch.testing.assert_close(y, model(x))
    assert experts(model) == [] and matched("transform") == 0


# -- a dense model ---------------------------------------------------------------------------------
@pytest.mark.parametrize("inner", ["eager", "aot_eager", "inductor"])
@pytest.mark.parametrize("block", [Block, AlignedBlock])
def test_a_dense_model_becomes_an_moe(inner, block, quiet):
    model, x = Net(3, block), torch.randn(2, 5, 8)
    dense = model(x).detach()
    twin = moefy.transform(copy.deepcopy(model), num_experts=4, example_args=(x,))
    y, grads = train_step(compiled(model, {**DENSE, "inner": inner}, fullgraph=True), x)
    torch.testing.assert_close(y, dense, rtol=1e-5, atol=1e-5)
    assert len(experts(model)) == matched("transform") == 3
    assert len(moefy.report(model).layers) == 3
    # the very model that moefy.transform makes: names, values, gradients
    state, expected = model.state_dict(), twin.state_dict()
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[k], expected[k]) for k in state)
    _, twin_grads = train_step(twin, x)
    for name, grad in grads.items():
        torch.testing.assert_close(grad, twin_grads[name.removeprefix("_orig_mod.")], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "where", ["at the start", "between layers", "between the linears", "before the residual"]
)
def test_graph_breaks(where, quiet):
    model, x = Net(12, where=where), torch.randn(2, 5, 8)
    dense = model(x).detach()
    run = compiled(model, DENSE)
    for _ in range(2):
        y, _ = train_step(run, x)
        torch.testing.assert_close(y, dense, rtol=1e-5, atol=1e-5)
    assert len(experts(model)) == 12
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.slow
@pytest.mark.parametrize(("how", "block"), [("Module.compile", Block), ("torch.compile", AlignedBlock)])
def test_24_layers_compiled_one_by_one(how, block, quiet):
    model, x = Net(24, block), torch.randn(2, 5, 8)
    dense = model(x).detach()
    limit = torch._dynamo.config.recompile_limit
    for i, layer in enumerate(model.layers):
        if how == "Module.compile":
            layer.compile(backend=moefy_backend.backend, options=DENSE)
        else:
            model.layers[i] = compiled(layer, DENSE)
    torch.testing.assert_close(model(x), dense, rtol=1e-5, atol=1e-5)
    weights = experts(model)
    assert len({id(w) for w in weights}) == 24 > limit
    routers = [p for n, p in model.named_parameters() if n.endswith("router.weight")]
    assert len(routers) == 24 and len({p.detach().numpy().tobytes() for p in routers}) == 24
    with torch.no_grad():  # every layer computes with its own weights
        for i, weight in enumerate(weights):
            before = model(x)
            weight += torch.randn_like(weight)
            assert not torch.allclose(model(x), before), i
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = [w.detach().clone() for w in weights]
    train_step(model, x)
    optimizer.step()
    assert all(not torch.equal(w, b) for w, b in zip(weights, before, strict=True))
    assert torch._dynamo.config.recompile_limit == limit


@pytest.mark.parametrize("limit", ["recompile_limit", "accumulated_recompile_limit"])
def test_a_layer_beyond_dynamos_limit_is_an_error_not_dense(limit, quiet):
    model, x = Net(4), torch.randn(2, 5, 8)
    for layer in model.layers:
        layer.compile(backend=moefy_backend.backend, options=DENSE)
    with torch._dynamo.config.patch({limit: 1}):
        with pytest.raises(BackendError, match=f"Block stays dense.*{limit}.*moefy.transform"):
            model(x)
        model.layers = model.layers[:1]  # what became an MoE runs on, whatever the limit
        for tokens in (5, 6, 7):
            x = torch.randn(2, tokens, 8)
            torch.testing.assert_close(model(x), model(x))


def test_load_state_dict_assign_is_followed(quiet):
    model, x = Net(2), torch.randn(2, 5, 8)
    run = compiled(model, DENSE, fullgraph=True)
    first = run(x)
    state = {k: v.clone() * 1.5 for k, v in model.state_dict().items()}
    model.load_state_dict(state, assign=True)
    second, _ = train_step(run, x)
    assert not torch.allclose(first, second)
    torch.testing.assert_close(second, model(x))
    assert all(p.grad is not None for p in model.parameters())


def test_shape_changes_and_modes_swap_once(quiet):
    model = Net(2)
    run = compiled(model, DENSE)
    for tokens in (3, 5, 7, 9):
        x = torch.randn(2, tokens, 8)
        torch.testing.assert_close(run(x), model(x))
    model.eval()
    with torch.no_grad():
        torch.testing.assert_close(run(x), model(x))
    model.train()
    torch.testing.assert_close(run(x), model(x))
    assert matched("transform") == 2 and len(experts(model)) == 2


@pytest.mark.parametrize("dynamic", [False, True])
def test_a_compiled_function(dynamic, quiet):
    model, x = Net(3), torch.randn(2, 5, 8)
    dense = model(x).detach()

    def step(x):
        return model(x) * 2

    got = compiled(step, DENSE, fullgraph=True, dynamic=dynamic)(x)
    torch.testing.assert_close(got, dense * 2, rtol=1e-5, atol=1e-5)
    assert len(experts(model)) == 3
    got.sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_arguments_that_cannot_be_run_again(quiet):
    class Box:
        def __init__(self, x):
            self.x = x

    class Reader(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = Net(2)

        def forward(self, box):
            return self.net(box.x)

    model, x = Reader(), torch.randn(2, 5, 8)
    dense = model.net(x).detach()
    torch.testing.assert_close(compiled(model, DENSE)(Box(x)), dense, rtol=1e-5, atol=1e-5)
    assert len(experts(model)) == 2


def test_under_inference_mode_the_experts_stay_trainable(quiet):
    model, x = Net(1), torch.randn(2, 5, 8)
    run = compiled(model, DENSE)
    with torch.inference_mode():
        run(x)
    assert not any(p.is_inference() for p in model.parameters())
    train_step(run, x)
    assert all(p.grad is not None for p in model.parameters())


def test_include_and_exclude(quiet):
    model, x = Net(3), torch.randn(2, 5, 8)
    compiled(model, {**DENSE, "exclude": ["layers.1*"]})(x)
    assert [type(layer.fc1) is nn.Linear for layer in model.layers] == [False, True, False]
    (record,) = [r for r in moefy_backend.records() if r.name == "transform"]
    assert record.matched == 2 and "layers.1" in record.note


def test_the_optimizer_warning_comes_once():
    x = torch.randn(2, 5, 8)
    with pytest.warns(UserWarning, match="optimizer built before"):
        compiled(Net(1), DENSE)(x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        compiled(Net(1), DENSE)(x)


def test_no_ffn_is_a_warning_with_the_reason():
    class Head(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(8, 16), nn.Linear(16, 4)

        def forward(self, x):
            return self.b(F.relu(self.a(x)))

    head, x = Head(), torch.randn(2, 8)
    with pytest.warns(UserWarning, match="no feed-forward network"):
        got = compiled(head, DENSE)(x)
    torch.testing.assert_close(got, head(x))
    (record,) = [r for r in moefy_backend.records() if r.name == "transform"]
    assert record.matched == 0 and "refused" in record.note
    with pytest.raises(NoFFNFound):
        moefy.transform(head, num_experts=4, example_args=(x,))


def test_a_transformed_model_is_left_alone():
    x = torch.randn(2, 5, 8)
    model = moefy.transform(Net(2), num_experts=4, example_args=(x,))
    weights = [id(w) for w in experts(model)]
    compiled(model, DENSE)(x)
    assert [id(w) for w in experts(model)] == weights


def test_functional_call_is_refused():
    model, x = Net(1), torch.randn(2, 5, 8)
    state = {k: v.detach().clone() for k, v in model.named_parameters()}

    def run(x):
        return torch.func.functional_call(compiled(model, DENSE), state, (x,))

    with pytest.raises((BackendError, torch._dynamo.exc.BackendCompilerFailed, KeyError)):
        run(x)
    assert experts(model) == []


def test_a_backend_called_by_hand_is_refused():
    gm = torch.fx.symbolic_trace(Net(1))
    with pytest.raises(BackendError, match=r"torch\.compile"):
        moefy_backend.backend(gm, [torch.randn(2, 5, 8)], options=DENSE)


@pytest.fixture
def process_group():
    import torch.distributed as dist

    store = dist.HashStore()
    dist.init_process_group("gloo", rank=0, world_size=1, store=store)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("order", ["compile inside", "compile outside"])
def test_ddp_is_refused(order, process_group):
    model, x = Net(1), torch.randn(2, 5, 8)
    ddp = nn.parallel.DistributedDataParallel
    run = ddp(compiled(model, DENSE)) if order == "compile inside" else compiled(ddp(model), DENSE)
    with pytest.raises(BackendError, match=r"DistributedDataParallel.*moefy\.transform"):
        run(x)
    assert experts(model) == []


def test_fsdp_is_refused(process_group):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model, x = Net(1), torch.randn(2, 5, 8)
    fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
    with pytest.raises(BackendError, match=r"moefy\.transform"):
        compiled(model, DENSE)(x)
    assert experts(model) == []


# -- logs and a bare process -----------------------------------------------------------------------
SCRIPT = """
import torch
from moefy.compiler.backend import backend
class Block(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.fc1, self.fc2 = torch.nn.Linear(8, 16), torch.nn.Linear(16, 8)
    def forward(self, x):
        return x + self.fc2(torch.relu(self.fc1(x)))
torch.compile(Block(), backend=backend, options={"inner": "eager", "num_experts": 2})(torch.ones(2, 3, 8))
"""


def test_torch_logs_shows_each_pass():
    env = {**os.environ, "TORCH_LOGS": "+moefy", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", SCRIPT], env=env, capture_output=True, text=True, check=True)
    assert "fuse_experts: 1 matched" in done.stderr
    assert "transform: 1 layers of Block" in done.stderr
