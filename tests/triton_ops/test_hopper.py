"""When the kernels for Hopper run, and on such a card: what only they could get wrong.

What they compute is tested by ``test_expert_ffn.py``: its wide cases run them on a Hopper card. They
are written in Gluon, which has no interpreter: without a card they are compiled (``test_compile.py``), not run.
"""

from __future__ import annotations

import pytest
import torch
import triton

from moefy.triton_ops import expert_ffn, hopper, linear, weight_grad
from moefy.triton_ops.shared.tiles import schedule

HALF = torch.bfloat16
needs_hopper = pytest.mark.skipif(
    not (torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9),
    reason="needs a Hopper card",
)


@pytest.fixture
def everywhere(monkeypatch):
    """As if every device were a Hopper card."""
    monkeypatch.setattr(hopper, "supported", lambda device: True)


def half(*shape: int) -> torch.Tensor:
    return torch.empty(shape, dtype=HALF)


def test_other_devices_run_the_other_kernels():
    assert not hopper.supported(torch.device("cpu"))
    assert not hopper.takes_entry(half(256, 64), None, half(2, 64, 64), 512)


def test_triton_versions():
    known = {"3.5.1": False, "3.6.0": True, "3.9.0+git12": True, "3.10.0": False, "4.0.0": False}
    assert {version: hopper.knows(version) for version in known} == known
    assert hopper.knows(triton.__version__), "a newer Triton: compile the kernels for Hopper with it"


def test_what_the_entry_takes(everywhere):
    x, w = half(256, 64), half(2, 96, 64)
    assert hopper.takes_entry(x, None, w, 512)
    assert hopper.takes_entry(
        x, *half(2, 192, 64).unflatten(1, (2, 96)).unbind(1), 512
    )  # a merged weight's halves
    assert not hopper.takes_entry(x, None, w, 127)  # few rows
    assert not hopper.takes_entry(x.float(), None, w.float(), 512)
    assert not hopper.takes_entry(x, None, w.to(torch.float16), 512)
    assert not hopper.takes_entry(half(256, 72), None, half(2, 96, 72), 512)  # no multiple of 16
    assert not hopper.takes_entry(half(257, 64)[:, 1:61], None, w, 512)  # not on 16 bytes


def test_what_the_linear_takes(everywhere):
    a, w, out = half(512, 72), half(2, 96, 72), half(512, 96)
    assert hopper.takes_linear(a, w, out, False, None)
    assert hopper.takes_linear(a, half(2, 192, 72)[:, 96:], out, False, None)  # a merged weight's half
    assert not hopper.takes_linear(a[:127], w, out[:127], False, None)  # few rows
    assert not hopper.takes_linear(a, half(2, 72, 96), out, True, None)  # a step would reach the next expert
    a, w = half(512, 128), half(2, 128, 96)
    assert hopper.takes_linear(a, w, out, True, (a, w))
    assert not hopper.takes_linear(a, w, out, True, (half(512, 129)[:, 1:], w))  # not on 16 bytes
    assert not hopper.takes_linear(a, w, half(512, 100)[:, :96], True, None)  # rows of 200 bytes
    assert not hopper.takes_linear(a, w.to(torch.float16), out, True, None)
    assert not hopper.takes_linear(a, w, out.float(), True, None)


def test_what_the_hidden_gradient_takes(everywhere):
    grad, w, up = half(512, 192), half(2, 192, 96), half(512, 96)
    assert hopper.takes_hidden_grad(grad, w, None, up)
    assert hopper.takes_hidden_grad(grad, w, *half(512, 192).chunk(2, 1))
    assert not hopper.takes_hidden_grad(
        half(512, 224), half(2, 224, 96), None, up
    )  # its last step would be half a step
    assert not hopper.takes_hidden_grad(grad, w, None, up.to(torch.float16))
    assert not hopper.takes_hidden_grad(half(512, 128), half(2, 128, 96), None, up)  # fewer steps than stages
    assert not hopper.takes_hidden_grad(
        grad, half(2, 224, 96)[:, :192], None, up
    )  # experts with a gap between
    assert not hopper.takes_hidden_grad(grad, w, None, half(512, 100)[:, :96])  # rows of 200 bytes


def test_what_the_weight_gradient_takes(everywhere):
    g, x, out = half(512, 256), half(512, 96), half(2, 256, 96)
    assert hopper.takes_weight_grad(g, x, out)
    assert hopper.takes_weight_grad(g, x[:, :32], out[:, :, 64:])  # a block of columns
    assert not hopper.takes_weight_grad(
        half(512, 192), x, half(2, 192, 96)
    )  # a tile would reach the next expert
    assert not hopper.takes_weight_grad(half(64, 256), x[:64], out)
    assert not hopper.takes_weight_grad(g, x.to(torch.float16), out)


@needs_hopper
def test_they_run_on_hopper():
    device = torch.device("cuda", torch.cuda.current_device())
    assert hopper.supported(device)


@needs_hopper
@pytest.mark.parametrize("processors", [2, 132])
@pytest.mark.parametrize("counts", [[130, 0, 257, 63], [0, 450, 0, 0], [1, 64, 65, 385]])
@pytest.mark.parametrize(
    ("form", "depth", "width"), [("bias", 72, 520), ("transposed", 128, 136), ("two", 192, 256)]
)
def test_linear(form, depth, width, counts, processors, monkeypatch):
    """Equals a product an expert in float64; the rows behind the last expert's become zeros."""
    monkeypatch.setattr("moefy.triton_ops.hopper.linear.processors", lambda device: processors)
    ends_E, experts = torch.tensor(counts).cumsum(0).int().cuda(), len(counts)
    rows, transposed = int(ends_E[-1]) + 40, form != "bias"
    pairs = []
    for _ in range(2 if form == "two" else 1):
        a = torch.randn(rows, depth, device="cuda").to(HALF)
        w = torch.randn(experts, *((depth, width) if transposed else (width, depth)), device="cuda").to(HALF)
        pairs.append((a, w))
    bias = torch.randn(experts, width, device="cuda").to(HALF) if form == "bias" else None
    out = torch.full((rows, width), float("nan"), dtype=HALF, device="cuda")
    second = pairs[1] if form == "two" else None
    assert hopper.takes_linear(*pairs[0], out, transposed, second)
    linear.linear(*pairs[0], bias, schedule(ends_E, rows, 128), out, transposed=transposed, second=second)
    start = 0
    for e, end in enumerate(ends_E.tolist()):
        want = sum(a[start:end].double() @ (w[e] if transposed else w[e].T).double() for a, w in pairs)
        want += 0 if bias is None else bias[e].double()
        torch.testing.assert_close(out[start:end].double(), want, rtol=2**-8, atol=2**-8)
        start = end
    assert not out[start:].any()


@needs_hopper
@pytest.mark.parametrize("counts", [[130, 0, 257, 63], [0, 450, 0, 0], [1, 31, 33, 385]])
def test_another_experts_nan_stays_there(counts):
    """Rows behind an expert's last lie in its last stage, whatever they hold."""
    counts_E = torch.tensor(counts)
    offsets_E = counts_E.cumsum(0).int().cuda()
    rows, spoilt = int(counts_E.sum()), int(counts_E.argmax())
    g, x = torch.randn(rows, 256).cuda().to(HALF), torch.randn(rows, 320).cuda().to(HALF)
    start = int(offsets_E[spoilt]) - counts[spoilt]
    g[start : int(offsets_E[spoilt])] = x[start : int(offsets_E[spoilt])] = float("nan")
    out_EOI = torch.empty(4, 256, 320, dtype=HALF, device="cuda")
    assert hopper.takes_weight_grad(g, x, out_EOI)
    order_N = torch.arange(rows, device="cuda")
    weight_grad.weight_grad(g, x, order_N, 1, schedule(offsets_E, rows, 128), out_EOI)
    for e, count in enumerate(counts):
        first = int(counts_E[:e].sum())
        want = g[first : first + count].double().T @ x[first : first + count].double()
        if e == spoilt:
            assert out_EOI[e].isnan().all()
        else:
            assert torch.allclose(out_EOI[e].double(), want, rtol=2**-8, atol=1e-3 * max(count, 1) ** 0.5)


@needs_hopper
def test_short_experts_one_after_another(monkeypatch):
    """One program clears the last stage of tile after tile, which are only a stage or two long."""
    monkeypatch.setattr("moefy.triton_ops.hopper.weight_grad.processors", lambda device: 1)
    counts = [1, 31, 33, 65, 0, 2, 500, 7] * 8
    offsets_E, rows = torch.tensor(counts).cumsum(0).int().cuda(), sum(counts)
    g, x = torch.randn(rows, 256).cuda().to(HALF), torch.randn(rows, 512).cuda().to(HALF)
    out_EOI = torch.empty(len(counts), 256, 512, dtype=HALF, device="cuda")
    assert hopper.takes_weight_grad(g, x, out_EOI)
    weight_grad.weight_grad(
        g, x, torch.arange(rows, device="cuda"), 1, schedule(offsets_E, rows, 128), out_EOI
    )
    parts = zip(g.double().split(counts), x.double().split(counts), out_EOI.double(), strict=True)
    for of_g, of_x, got in parts:
        torch.testing.assert_close(got, of_g.T @ of_x, rtol=2**-8, atol=1e-3)


@needs_hopper
@pytest.mark.parametrize("counts", [[130, 0, 257, 63], [0, 450, 0, 0], [1, 31, 33, 3850]])
@pytest.mark.parametrize(
    "sizes", [((256, 320), (128, 1032)), ((128, 64), (384, 256)), ((1024, 8), (256, 96))]
)
def test_two_weight_gradients_in_one_launch(counts, sizes):
    """Each as by a launch of its own, and as a product in float64."""
    counts_E = torch.tensor(counts)
    offsets_E, rows = counts_E.cumsum(0).int().cuda(), int(counts_E.sum())
    products = []
    for height, width in sizes:
        g, x = torch.randn(rows, height).cuda().to(HALF), torch.randn(rows, width).cuda().to(HALF)
        products.append((g, x, torch.full((4, height, width), float("nan"), dtype=HALF, device="cuda")))
        assert hopper.takes_weight_grad(*products[-1])
    order_N, at = torch.arange(rows, device="cuda"), schedule(offsets_E, rows, 128)
    weight_grad.weight_grad(*products[0][:2], order_N, 1, at, products[0][2], also=products[1])
    for g, x, out_EOI in products:
        alone_EOI = torch.empty_like(out_EOI)
        weight_grad.weight_grad(g, x, order_N, 1, at, alone_EOI)
        assert torch.equal(out_EOI, alone_EOI)
        parts = zip(g.double().split(counts), x.double().split(counts), strict=True)
        want_EOI = torch.stack([a.T @ b for a, b in parts])
        assert (out_EOI.double() - want_EOI).norm() <= 2**-8 * want_EOI.norm()


def test_a_second_weight_gradient_where_there_is_one_launch_for_each(device):
    """The other kernels take one product at a time."""
    ends_E = torch.tensor([3, 3, 10], dtype=torch.int32, device=device)
    made = [[torch.randn(*s, device=device) for s in ((10, 5), (10, 7), (3, 5, 7))] for _ in range(2)]
    weight_grad.weight_grad(
        *made[0][:2], ends_E.long(), 1, schedule(ends_E, 10, 32), made[0][2], also=made[1]
    )
    for g, x, out_EOI in made:
        for e, (start, end) in enumerate([(0, 3), (3, 3), (3, 10)]):
            want = g[start:end].double().T @ x[start:end].double()
            torch.testing.assert_close(out_EOI[e].double(), want, rtol=1e-5, atol=1e-5)


def identity_layer(w_up: torch.Tensor, ends: list[int]) -> expert_ffn.Experts:
    """Experts of ``w_up`` [E, H, D] and nothing else, for rows that lie sorted."""
    E, H, D = w_up.shape
    device = w_up.device
    return expert_ffn.Experts(
        weights_TK=torch.ones(ends[-1], 1, device=device), order_N=torch.arange(ends[-1], device=device),
        offsets_E=torch.tensor(ends, dtype=torch.int32, device=device), w_gate=None, b_gate=None, w_up=w_up, b_up=None,
        w_down=torch.zeros(E, D, H, device=device, dtype=w_up.dtype), b_down=None, activation="identity",
    )  # fmt: skip


@needs_hopper
@pytest.mark.parametrize("spoilt", [2.0**100, float("inf"), float("nan")])
def test_another_experts_matrix_does_not_set_the_scale(spoilt):
    """Behind a matrix of 136 rows a tile reads on in the next expert's."""
    x, w_up = torch.randn(512, 64).cuda().to(HALF), torch.randn(2, 136, 64).cuda().to(HALF)
    want = expert_ffn.hidden(x, identity_layer(w_up, [200, 512]), None, None)[:200]
    w_up[1] *= spoilt
    assert hopper.takes_entry(x, None, w_up, 512)
    assert torch.equal(expert_ffn.hidden(x, identity_layer(w_up, [200, 512]), None, None)[:200], want)


@needs_hopper
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rows_of_very_different_size(dtype):
    """A row is handed over in fp16 with a power of two of its own; each value keeps the precision of its dtype."""
    E, T, D, H = 2, 512, 64, 256
    device = torch.device("cuda", torch.cuda.current_device())
    reach = 12 if dtype is torch.float16 else 60
    x = torch.randn(T, D, device=device) * torch.exp2(torch.randint(-reach, 3, (T, 1), device=device).float())
    x, w_up = x.to(dtype), torch.randn(E, H, D, device=device).to(dtype)
    assert hopper.takes_entry(x, None, w_up, T)
    got = expert_ffn.hidden(x, identity_layer(w_up, [200, 512]), None, None).double()
    want = torch.cat([x[:200].double() @ w_up[0].double().T, x[200:].double() @ w_up[1].double().T])
    rounding = 2**-11 + (2**-8 if dtype is torch.bfloat16 else 0)  # fp16's, then that of the dtype
    size = x.double().norm(dim=1, keepdim=True) * D**0.5  # a sum in fp32 is exact to 2^-20 of that
    assert ((got - want).abs() <= rounding * want.abs() + 2**-20 * size + 6e-8).all()
