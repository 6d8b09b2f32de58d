"""How a kernel finds what it compiled: anything that Triton specialises on must make it ask Triton again."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch


class Jitted:
    """Stands for Triton: compiles into a recorder of launches and counts how often."""

    arg_names = ("x", "n", "tiles", "M", "FLAG")

    def __init__(self) -> None:
        self.compiled, self.launches, self.given = 0, [], {}

    def __getitem__(self, grid):
        def first_launch(*args, **constants):
            self.compiled += 1
            self.given = constants
            return Compiled(self, self.compiled)

        return first_launch


class Compiled:
    def __init__(self, jitted: Jitted, number: int) -> None:
        self.jitted, self.number = jitted, number

    def __getitem__(self, grid):
        return lambda *args, stream: self.jitted.launches.append((self.number, grid, args, stream))


@pytest.fixture
def kernel(kernel_of):
    return kernel_of(Jitted())


def arguments(**changes):
    given = {"x": torch.empty(64), "n": 32, "tiles": None, "M": 16, "FLAG": True, "num_warps": 4, **changes}
    return [given.pop(name) for name in ("x", "n", "tiles")], given


CHANGES = {
    "dtype": {"x": torch.empty(64, dtype=torch.float16)},
    "alignment": {"x": torch.empty(65)[1:]},
    "an int that is 1": {"n": 1},
    "an int that is no multiple of 16": {"n": 33},
    "a long int": {"n": 2**33},
    "a tensor in place of None": {"tiles": torch.empty(64)},
    "a descriptor": {"tiles": SimpleNamespace(base=torch.empty(64), block_shape=[1, 64])},
    "a constant": {"M": 32},
    "a flag": {"FLAG": False},
    "an option": {"num_warps": 8},
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_specialises_a_kernel_compiles_it_again(kernel, change):
    for _ in range(2):
        for changes in ({}, CHANGES[change]):
            args, constants = arguments(**changes)
            kernel[(3,)](*args, **constants)
    assert kernel.jitted.compiled == 2
    assert [number for number, *_ in kernel.jitted.launches] == [1, 2]


def test_another_device_compiles_again(kernel, monkeypatch):
    args, constants = arguments()
    kernel[(3,)](*args, **constants)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    kernel[(3,)](*args, **constants)
    assert kernel.jitted.compiled == 2


def test_what_does_not_specialise_is_passed_on(kernel):
    kernel[(3,)](*arguments()[0], **arguments()[1])
    args, constants = arguments(x=torch.empty(128), n=48)
    kernel[(5, 2)](*args, FLAG=True, M=16, num_warps=4)
    kernel[(5, 2)](*args, **constants)
    assert kernel.jitted.compiled == 2  # another order of keywords is another key, never another kernel
    _, grid, passed, stream = kernel.jitted.launches[-1]
    assert grid == (5, 2, 1) and stream == 7
    assert passed == (args[0].data_ptr(), 48, None, 16, True)  # an address costs the launcher less


def test_products_are_fused_with_sums_whatever_triton_does_by_itself(kernel):
    args, constants = arguments()
    kernel[(3,)](*args, **constants)
    assert kernel.jitted.given == {**constants, "enable_fp_fusion": True}
