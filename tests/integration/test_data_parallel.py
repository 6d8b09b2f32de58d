"""DataParallel: on a CPU it calls the module itself; its replicas and threads are exercised by themselves.

``torch.nn.parallel.replicate`` needs GPUs for the broadcast alone, which is replaced here by a differentiable copy. The
replicas it makes hold plain tensors instead of parameters, and run at the same time in threads.
"""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import moefy
from integration.models import (
    ALL_CASES,
    SAME,
    TORCH_CASES,
    assert_close,
    assert_same,
    backward,
    batch,
    call,
    dense,
    gradients,
    moe,
    scalar,
)


@pytest.mark.skipif(torch.cuda.is_available(), reason="DataParallel would spread over the GPUs")
@pytest.mark.parametrize("name", ALL_CASES)
def test_data_parallel_on_cpu(name: str) -> None:
    model, inputs = moe(name), batch(name)
    output, expected = backward(model, inputs)
    got, found = backward(nn.DataParallel(model), inputs)
    assert torch.equal(got, output)
    assert_same({k.removeprefix("module."): v for k, v in found.items()}, expected, 0.0)


def replicas(model: nn.Module, count: int, monkeypatch: pytest.MonkeyPatch) -> list[nn.Module]:
    """What ``nn.parallel.replicate`` makes, with copies on the CPU."""

    def copies(tensors: Any, devices: Any, detach: bool = False) -> list[list[Tensor]]:
        return [[t * 1 if t.is_floating_point() else t.clone() for t in tensors] for _ in devices]

    module = __import__("torch.nn.parallel.replicate", fromlist=["replicate"])
    monkeypatch.setattr(module, "_broadcast_coalesced_reshape", copies)
    return module.replicate(model, list(range(count)))


@pytest.mark.parametrize("name", ALL_CASES)
def test_replicas_are_the_model(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = moe(name)
    parts = [batch(name, seed=seed) for seed in range(2)]
    torch.stack([scalar(call(model, part)) for part in parts]).mean().backward()
    expected = gradients(model)
    outputs = [call(model, part) for part in parts]
    model.zero_grad()
    made = replicas(model, 2, monkeypatch)
    got = [call(replica, part) for replica, part in zip(made, parts, strict=True)]
    torch.stack([scalar(y) for y in got]).mean().backward()
    for y, output in zip(got, outputs, strict=True):
        assert_close(y, output, SAME[torch.float64])
    assert_same(gradients(model), expected, SAME[torch.float64], floor=1e-12)


@pytest.mark.parametrize("shared", [True, False], ids=["one-model", "replicas"])
@pytest.mark.parametrize("name", TORCH_CASES)
def test_threads_do_not_mix_their_routing(name: str, shared: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model = moe(name).eval()
    made = [model] * 4 if shared else replicas(model, 4, monkeypatch)
    parts = [batch(name, size=1 + seed, seed=seed) for seed in range(4)]
    with torch.no_grad():
        expected = [call(model, part) for part in parts]
    wrong: list[str] = []
    start = threading.Barrier(4)

    def work(index: int) -> None:
        try:
            start.wait(30)
            for _ in range(20):
                with torch.no_grad():
                    y = call(made[index], parts[index])
                assert_close(y, expected[index], SAME[torch.float64])
        except Exception as error:
            wrong.append(f"{index}: {type(error).__name__}: {error}")

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not wrong, wrong


def test_data_parallel_before_transform_is_refused() -> None:
    model = nn.DataParallel(dense("aligned"))
    with pytest.raises(moefy.errors.ConfigError, match="transform it before DataParallel"):
        moefy.transform(model, 4, example_args=(batch("aligned")[""],))
