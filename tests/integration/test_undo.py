"""``undo``: bitwise back to the dense model, from copies, parts and after training."""

from __future__ import annotations

import copy
import io
import pickle
import re
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, fx, nn

import moefy
from integration.models import (
    ALL_CASES,
    EXACT,
    SAME,
    TORCH_CASES,
    D,
    InlineBlock,
    Stack,
    assert_close,
    backward,
    batch,
    call,
    dense,
    moe,
    scalar,
    stacked_parameters,
    transformed,
)
from integration.snapshot import Snapshot
from moefy import errors


def described(model: nn.Module) -> list[tuple[str, str]]:
    return [(name, repr(module)) for name, module in model.named_modules(remove_duplicate=False)]


def assert_dense(model: nn.Module, name: str) -> None:
    """``model`` is what ``dense(name)`` builds, bitwise."""
    expected = dense(name)
    assert described(model) == described(expected)
    state, wanted = model.state_dict(), expected.state_dict()
    assert list(state) == list(wanted)
    assert all(torch.equal(state[k], wanted[k]) and state[k].dtype == wanted[k].dtype for k in wanted)
    assert all(state[k].stride() == wanted[k].stride() for k in wanted)
    inputs = batch(name)
    output, found = backward(model, inputs)
    other_output, other_found = backward(expected, inputs)
    assert torch.equal(output, other_output)
    assert found.keys() == other_found.keys()
    assert all(torch.equal(found[k], other_found[k]) for k in found)


@pytest.mark.parametrize("noise", [0.0, 0.1], ids=["copies", "noise"])
@pytest.mark.parametrize("name", ALL_CASES)
def test_undo_is_bitwise(name: str, noise: float) -> None:
    model = transformed(dense(name), name, expert_noise=noise)
    assert moefy.undo(model) is model
    assert_dense(model, name)


@pytest.mark.parametrize(
    "way",
    [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), lambda m: through_file(m)],
    ids=["deepcopy", "pickle", "torch.save"],
)
@pytest.mark.parametrize("name", ALL_CASES)
def test_undo_of_a_copy(name: str, way: Callable[[nn.Module], nn.Module]) -> None:
    """The copy becomes dense, the original does not."""
    model = transformed(dense(name), name)
    keys = list(model.state_dict())
    twin = way(model)
    moefy.undo(twin)
    assert_dense(twin, name)
    assert list(model.state_dict()) == keys
    moefy.undo(model)
    assert_dense(model, name)


def through_file(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("name", TORCH_CASES)
def test_transform_undo_transform(name: str) -> None:
    model = transformed(dense(name), name)
    first = {k: v.clone() for k, v in model.state_dict().items()}
    moefy.undo(model)
    transformed(model, name)
    second = model.state_dict()
    assert list(second) == list(first)
    assert all(torch.equal(second[k], first[k]) for k in first)
    moefy.undo(model)
    assert_dense(model, name)


@pytest.mark.parametrize("name", TORCH_CASES)
def test_second_undo(name: str) -> None:
    model = moefy.undo(transformed(dense(name), name))
    before = Snapshot(model)
    with pytest.raises(errors.NotTransformed, match="nothing to undo"):
        moefy.undo(model)
    before.check(model)


@pytest.mark.parametrize("name", ALL_CASES)
def test_after_training_an_expert_must_be_named(name: str) -> None:
    """``undo(expert=2)`` is the dense model with that expert's weights: the MoE whose router only picks it."""
    model, inputs = transformed(dense(name), name), batch(name)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(2):
        scalar(call(model, inputs)).backward()
        optimizer.step()
    with torch.no_grad():  # experts that were trained far apart
        for index, fqn in enumerate(stacked_parameters(model)):
            model.get_parameter(fqn).add_(0.1 * torch.randn_like(model.get_parameter(fqn)) + 0.01 * index)
    before = Snapshot(model)
    with pytest.raises(errors.ExpertsDiverged, match=r"undo\(model, expert=i\) with 0 <= i < 4") as caught:
        moefy.undo(model)
    before.check(model)
    fqn = str(caught.value).split(":")[0]
    assert fqn in stacked_parameters(model)
    trained = {n: model.get_parameter(n).detach().clone() for n in stacked_parameters(model)}
    only_two = copy.deepcopy(model)
    for parameter in (only_two.get_parameter(n) for n in trained):
        with torch.no_grad():
            parameter.copy_(parameter[2].clone())
    expected = call(only_two, inputs)
    moefy.undo(model, expert=2)
    for n, value in trained.items():
        assert torch.equal(model.get_parameter(n).detach().reshape(value[2].shape), value[2]), n
    assert_close(call(model, inputs), expected, EXACT[torch.float64])


@pytest.mark.parametrize("expert", [-1, 4, 1.0, "0", True])
def test_no_such_expert(expert: object) -> None:
    model = moe("glu")
    before = Snapshot(model)
    with pytest.raises(
        errors.ConfigError, match=re.escape(f"expert: got {expert!r}; expected 0 <= expert < 4")
    ):
        moefy.undo(model, expert=expert)
    before.check(model)


def test_one_trained_layer_is_enough() -> None:
    """All layers are judged before the first is undone."""
    model = transformed(dense("inline"), "inline")
    with torch.no_grad():
        model.layers[1].fc2.bias[0, 0] += 1.0
    before = Snapshot(model)
    with pytest.raises(errors.ExpertsDiverged, match=r"layers\.1\.fc2\.bias"):
        moefy.undo(model)
    before.check(model)


# -- parts of a larger model -----------------------------------------------------------------------------------------
class Holder(nn.Module):
    """Two models in one."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.first, self.second = dense(name), dense(name)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.first(x), self.second(x)


@pytest.mark.parametrize("name", TORCH_CASES)
def test_submodule_transformed_and_undone(name: str) -> None:
    whole, x = Holder(name), batch(name)[""]
    expected = whole(x)[0]
    moefy.transform(whole.first, 4, example_args=(x,))
    assert_close(whole(x)[0], expected, EXACT[torch.float64])
    assert_dense(whole.second, name)
    moefy.undo(whole.first)
    assert_dense(whole.first, name)
    moefy.transform(whole.first, 4, example_args=(x,))
    moefy.transform(whole.second, 8, example_args=(x,))
    moefy.undo(whole.second)
    assert_dense(whole.second, name)
    moefy.undo(whole.first)
    assert_dense(whole.first, name)


@pytest.mark.parametrize("name", TORCH_CASES)
def test_submodule_transformed_and_the_whole_undone(name: str) -> None:
    """After it the whole can be transformed: nothing of the part's transform is left."""
    whole, x = Holder(name), batch(name)[""]
    moefy.transform(whole.first, 4, example_args=(x,))
    moefy.undo(whole)
    assert_dense(whole.first, name)
    assert_dense(whole.second, name)
    moefy.transform(whole, 4, example_args=(x,))
    assert len(moefy.report(whole).rewritten) == 4


@pytest.mark.parametrize("name", TORCH_CASES)
def test_whole_transformed_and_a_part_undone(name: str) -> None:
    whole, x = Holder(name), batch(name)[""]
    moefy.transform(whole, 4, example_args=(x,))
    moefy.undo(whole.first)
    assert_dense(whole.first, name)
    with pytest.raises(errors.NotTransformed):
        moefy.undo(whole.first)
    moefy.undo(whole)
    assert_dense(whole.second, name)
    assert_dense(whole.first, name)


def test_one_block_of_a_stack() -> None:
    model, x = dense("aligned"), batch("aligned")[""]
    expected = model(x)
    moefy.transform(model.layers[0], 4, example_args=(x,))
    assert_close(model(x), expected, EXACT[torch.float64])
    moefy.undo(model.layers[0])
    assert_dense(model, "aligned")


@pytest.mark.parametrize("name", TORCH_CASES)
def test_all_parts_undone_one_by_one(name: str) -> None:
    """Then the whole is dense: nothing to undo, a report is a dry run, and it can be transformed again."""
    whole, x = Holder(name), batch(name)[""]
    moefy.transform(whole, 4, example_args=(x,))
    for layer in (*whole.first.layers, *whole.second.layers):
        moefy.undo(layer)
    assert_dense(whole.first, name)
    assert_dense(whole.second, name)
    with pytest.raises(errors.NotTransformed):
        moefy.undo(whole)
    assert moefy.report(whole, 4, example_args=(x,)).dry_run
    moefy.transform(whole, 4, example_args=(x,))
    assert not moefy.report(whole).dry_run


def test_one_layer_of_an_encoder_undone() -> None:
    """The other layer still holds experts: nested tensors, which they do not take, stay off."""
    model, x = dense("encoder").eval(), batch("encoder")[""]
    mask = torch.zeros(x.shape[:2], dtype=torch.bool)
    mask[0, 3:] = True
    with torch.no_grad():
        expected = model(x, src_key_padding_mask=mask)
        moefy.transform(model, 4, example_args=(x,))
        moefy.undo(model.layers[0])
        assert not model.use_nested_tensor
        assert_close(model(x, src_key_padding_mask=mask)[~mask], expected[~mask], EXACT[torch.float64])
        moefy.undo(model)
        assert model.use_nested_tensor
        assert torch.equal(model(x, src_key_padding_mask=mask), expected)


# -- modules under several names -------------------------------------------------------------------------------------
class Shared(nn.Module):
    """One block, registered twice and called three times (ALBERT)."""

    def __init__(self, block: type[nn.Module]) -> None:
        super().__init__()
        self.block = block()
        self.groups = nn.ModuleList([self.block])

    def forward(self, x: Tensor) -> Tensor:
        for block in (self.block, self.groups[0], self.block):
            x = block(x)
        return x


@pytest.mark.parametrize("name", ["aligned", "inline", "glu"])
def test_shared_block(name: str) -> None:
    torch.manual_seed(1)
    model = Shared(type(dense(name).layers[0])).double()
    reference, x = copy.deepcopy(model), batch(name)[""]
    moefy.transform(model, 4, example_args=(x,))
    (layer,) = moefy.report(model).rewritten
    assert layer.calls == 3
    assert model.groups[0] is model.block
    inner = dict(model.named_modules(remove_duplicate=False))
    for path in ("mlp", "mlp.up") if name == "aligned" else ("fc1",) if name == "inline" else ("w1", "w3"):
        assert inner[f"block.{path}"] is inner[f"groups.0.{path}"]
    assert_close(model(x), reference(x), EXACT[torch.float64])
    twin = copy.deepcopy(model)
    assert twin.groups[0] is twin.block
    for undone in (moefy.undo(model), moefy.undo(twin)):
        assert undone.groups[0] is undone.block
        assert described(undone) == described(reference)
        assert all(torch.equal(v, reference.state_dict()[k]) for k, v in undone.state_dict().items())
        assert_close(undone(x), reference(x), SAME[torch.float64])


def test_albert() -> None:
    transformers = pytest.importorskip("transformers")
    from integration.models import TEXT

    torch.manual_seed(1)
    model = transformers.AlbertModel(
        transformers.AlbertConfig(**{**TEXT, "embedding_size": 8, "num_hidden_layers": 3})
    ).eval()
    inputs = batch("bert")
    with torch.no_grad():
        expected = call(model, inputs)
        moefy.transform(model, 4, example_kwargs=inputs)
        (layer,) = moefy.report(model).rewritten
        assert layer.calls == 3
        assert_close(call(model, inputs), expected, EXACT[torch.float32])
        moefy.undo(model)
        assert torch.equal(call(model, inputs), expected)


# -- graph modules ---------------------------------------------------------------------------------------------------
GRAPHS = {
    "symbolic": lambda model, x: fx.symbolic_trace(model),
    "export": lambda model, x: torch.export.export(model, (x,), strict=False).module(),
}


@pytest.mark.parametrize("kind", GRAPHS)
@pytest.mark.parametrize("name", ["aligned", "inline", "glu"])
def test_graph_module(name: str, kind: str) -> None:
    x = batch(name)[""]
    model = GRAPHS[kind](dense(name), x)
    code, state, expected = model.code, {k: v.clone() for k, v in model.state_dict().items()}, model(x)
    moefy.transform(model, 4, example_args=(x,))
    assert len(moefy.report(model).rewritten) == 2
    assert_close(model(x), expected, EXACT[torch.float64])
    with pytest.raises(errors.AlreadyTransformed):
        moefy.transform(model, 4, example_args=(x,))
    twin = copy.deepcopy(model)
    for undone in (model, twin):
        moefy.undo(undone)
        assert undone.code == code
        after = undone.state_dict()
        assert list(after) == list(state)
        assert all(torch.equal(after[k], state[k]) for k in state)
        assert torch.equal(undone(x), expected)
        with pytest.raises(errors.NotTransformed):
            moefy.undo(undone)


def test_graph_module_inside_another_module() -> None:
    x = batch("inline")[""]
    whole = nn.Sequential(fx.symbolic_trace(dense("inline")), nn.Linear(5, 5).double())
    expected, code = whole(x), whole[0].code
    moefy.transform(whole[0], 4, example_args=(x,))
    assert_close(whole(x), expected, EXACT[torch.float64])
    moefy.undo(whole)
    assert whole[0].code == code
    assert torch.equal(whole(x), expected)
    moefy.transform(whole, 4, example_args=(x,))
    assert len(moefy.report(whole).rewritten) == 2
    assert_close(whole(x), expected, EXACT[torch.float64])
    moefy.undo(whole)
    assert torch.equal(whole(x), expected)


# -- what undo brings back besides weights ---------------------------------------------------------------------------
def test_requires_grad_mode_and_hooks_of_neighbours() -> None:
    torch.manual_seed(1)
    model = Stack(InlineBlock)
    model.layers[0].fc1.weight.requires_grad_(False)
    seen: list[int] = []
    model.layers[0].register_forward_hook(lambda *a: seen.append(1))
    x = torch.randn(2, 6, D)
    moefy.transform(model, 4, example_args=(x,))
    model.eval()
    moefy.undo(model)
    assert not model.layers[0].fc1.weight.requires_grad
    assert model.layers[0].fc2.weight.requires_grad
    assert not any(m.training for m in model.modules())
    seen.clear()
    model(x)
    assert seen == [1]


def test_undo_after_a_cast_and_a_state_dict() -> None:
    """The dense weights are the experts' current ones, in their current dtype."""
    model = transformed(dense("inline"), "inline").float()
    other = transformed(dense("inline"), "inline").float()
    other.load_state_dict(model.state_dict())
    for each in (model, other):
        moefy.undo(each)
        expected = dense("inline").float().state_dict()
        assert each.state_dict().keys() == expected.keys()
        assert all(torch.equal(v, expected[k]) for k, v in each.state_dict().items())


def test_undo_of_other_weights_than_at_the_transform() -> None:
    """Equal experts are unambiguous, whatever they hold."""
    model = transformed(dense("glu"), "glu")
    with torch.no_grad():
        for fqn in stacked_parameters(model):
            model.get_parameter(fqn).mul_(2.0)
    moefy.undo(model)
    wanted = dense("glu").state_dict()
    factor = {k: 2.0 if k.split(".")[-2] in ("w1", "w2", "w3") else 1.0 for k in wanted}
    assert all(torch.equal(v, wanted[k] * factor[k]) for k, v in model.state_dict().items())
