"""Replayed launches: the same results from other addresses, and nothing replayed that would not be the same call.

The kernel here stands for a compiled one: it is launched with addresses, and works on the memory behind them.
"""

from __future__ import annotations

import ctypes
import dataclasses
import threading
from typing import Any

import pytest
import torch

from moefy.triton_ops.shared import launch, recorded
from moefy.triton_ops.shared.recorded import Recorded


def values(address: int, count: int):
    return (ctypes.c_float * count).from_address(address)


class Compiled:
    """``out[i] = a[i] + b[i] + n``; a may be a descriptor."""

    def __getitem__(self, grid):
        def run(a, b, out, count, n, stream=None):
            a, b, out = (values(self.address(t), count) for t in (a, b, out))
            for i in range(count):
                out[i] = a[i] + b[i] + n

        return run

    @staticmethod
    def address(value) -> int:
        value = getattr(value, "base", value)
        return value if isinstance(value, int) else value.data_ptr()


class Jitted:
    arg_names = ("a", "b", "out", "count", "n")

    def __getitem__(self, grid):
        def first_launch(*args, n, **options):
            Compiled()[grid](*args, n)
            return Compiled()

        return first_launch


@pytest.fixture
def add(kernel_of):
    kernel = kernel_of(Jitted())

    def add(a, b, out, n=0):
        kernel[(1,)](a, b, out, out.numel(), n=n)
        return out

    return add


class Calls:
    """``Recorded(body)`` and how often the body itself ran."""

    def __init__(self, body) -> None:
        self.ran = 0
        self.recorded = Recorded(self._run)
        self._body = body

    def _run(self, tensors, options):
        self.ran += 1
        return self._body(tensors, *options)

    def __call__(self, *tensors, options=()):
        return self.recorded(tensors, options)


def chain(add):
    """a + b + a + b + ... through buffers that live for different times."""

    def body(tensors, steps=4):
        a, b = tensors
        kept = add(a, b, torch.empty_like(a))
        current = kept
        for _ in range(steps):
            current = add(current, b, torch.empty(a.shape, dtype=a.dtype, device=a.device))
        return add(current, kept, a.new_empty(a.shape)), add(a, kept, a.new_empty(a.shape), n=1)

    return body


def test_a_replay_gives_what_the_function_gives(add):
    calls = Calls(chain(add))
    held = []
    for i in range(6):
        a, b = torch.randn(5, 8), torch.randn(5, 8)
        first, second = calls(a, b)
        torch.testing.assert_close(first, 2 * a + 6 * b)
        torch.testing.assert_close(second, 2 * a + b + 1)
        held.append((first, first.clone()))
        assert calls.ran == min(i + 1, 2)
    assert all(torch.equal(now, then) for now, then in held)  # a later replay leaves earlier results alone


@pytest.mark.parametrize(
    "other",
    [
        lambda a: a[:4],
        lambda a: a.t(),
        lambda a: torch.randn(41)[1:].view(5, 8),
        lambda a: a.double(),
    ],
    ids=["shape", "strides", "alignment", "dtype"],
)
def test_another_kind_is_recorded_by_itself(add, other):
    calls = Calls(lambda tensors: (add(tensors[0], tensors[0], torch.empty(8)),))
    for _ in range(3):
        calls(torch.randn(5, 8))
    assert calls.ran == 2
    calls(other(torch.randn(5, 8)))
    assert calls.ran == 3


def test_another_option_is_another_kind(add):
    calls = Calls(chain(add))
    a, b = torch.randn(2, 8), torch.randn(2, 8)
    for _ in range(3):
        for steps in (1, 5):
            torch.testing.assert_close(calls(a, b, options=(steps,))[0], 2 * a + (steps + 2) * b)
    assert calls.ran == 4


def test_views_and_arguments_that_are_written_to(add):
    def body(tensors):
        left, right = tensors[0].chunk(2)
        add(left, right[None, :].view(-1), right)
        buffer = torch.empty(2, 8)
        add(left, left, buffer[1])
        return (add(buffer[1], right, torch.empty(8)),)

    calls = Calls(body)
    for _ in range(4):
        a = torch.randn(16)
        want = a[:8] + a[8:]
        (out,) = calls(a)
        torch.testing.assert_close(a[8:], want)
        torch.testing.assert_close(out, 2 * a[:8] + want)
    assert calls.ran == 2


@dataclasses.dataclass
class Tiles:
    base: Any
    block_shape: list[int]


def test_descriptors_move(add):
    def body(tensors):
        (a,) = tensors
        return (add(Tiles(a[2:], [8]), a, torch.empty(8)),)

    calls = Calls(body)
    for _ in range(4):
        a = torch.randn(12, 8)[:, 0].contiguous()
        torch.testing.assert_close(calls(a)[0], a[2:10] + a[:8])
    assert calls.ran == 2


def test_whether_tf32_is_allowed_is_of_the_kind(add):
    calls = Calls(chain(add))
    before = torch.backends.cuda.matmul.fp32_precision
    try:
        for precision in ("ieee", "tf32"):
            torch.backends.cuda.matmul.fp32_precision = precision
            for _ in range(3):
                calls(torch.randn(8), torch.randn(8))
    finally:
        torch.backends.cuda.matmul.fp32_precision = before
    assert calls.ran == 4


def test_results_without_elements(add):
    calls = Calls(lambda t: (t[0].new_empty(0), add(t[0], t[0], torch.empty(8)), torch.empty(0, 3)))
    for _ in range(4):
        a = torch.randn(8)
        none, twice, rows = calls(a)
        assert torch.equal(twice, a + a) and none.shape == (0,) and rows.shape == (0, 3)
    assert calls.ran == 2


@pytest.mark.parametrize(
    "body",
    [
        lambda add: lambda t: (add(t[0], t[1] * 2, torch.empty(8)),),
        lambda add: lambda t: (add(t[0], torch.zeros(8), torch.empty(8)),),
        lambda add: lambda t: (add(t[0], t[2].t().contiguous().view(-1), torch.empty(8)),),
        lambda add: lambda t: (add(t[0], t[2].t().reshape(-1), torch.empty(8)),),
        lambda add: lambda t: (add(t[0], torch.empty(8, out=t[3]), torch.empty(8)),),
        lambda add: lambda t: (torch.empty(8, device="meta"), add(t[0], t[1], torch.empty(8)))[1:],
        lambda add: lambda t: (add(t[0], CONSTANT, torch.empty(8)),),
        lambda add: lambda t: (add(t[0], t[1], t[3]),),
        lambda add: lambda t: (add(t[0], t[1], torch.empty(16))[8:],),
        lambda add: lambda t: (add(t[0], t[1], torch.empty(8, 2).t()[0]),),
    ],
    ids=[
        "arithmetic",
        "zeros",
        "copy",
        "reshape",
        "into",
        "device",
        "outside",
        "returns an argument",
        "a part",
        "strided",
    ],
)
def test_what_is_more_than_launches_is_never_replayed(add, body):
    calls = Calls(body(add))
    tensors = torch.ones(8), torch.ones(8), torch.ones(2, 4), torch.ones(8)
    for i in range(4):
        calls(*tensors)
        assert calls.ran == i + 1


CONSTANT = torch.ones(8)


def test_arguments_that_overlap_are_never_replayed(add):
    calls = Calls(chain(add))
    whole = torch.randn(12)
    for i in range(4):
        calls(whole[:8], whole[4:])
        assert calls.ran == i + 1
    for _ in range(3):  # in one storage, but apart
        calls(whole[:4], whole[4:8])
    assert calls.ran == 6


def test_interpreted_kernels_are_never_replayed(kernel_of):
    kernel = kernel_of(Jitted(), interpreted=True)
    calls = Calls(lambda t: (kernel[(1,)](t[0], t[0], t[1], 8, n=0), t[0].new_empty(0))[1:])
    for i in range(4):
        calls(torch.randn(8), torch.randn(8))
        assert calls.ran == i + 1


def test_an_error_ends_the_recording(add):
    fail = True

    def body(tensors):
        if fail and calls.ran == 2:
            raise MemoryError
        return (add(tensors[0], tensors[0], torch.empty(8)),)

    calls = Calls(body)
    calls(torch.ones(8))
    with pytest.raises(MemoryError):
        calls(torch.ones(8))
    assert launch._watching.watcher is None
    fail = False
    for _ in range(3):
        assert calls(torch.ones(8))[0].tolist() == [2.0] * 8
    assert calls.ran == 3


def test_one_recorded_function_within_another(add):
    """The inner one's replays would be launched unseen."""
    inner = Calls(lambda t: (add(t[0], t[0], torch.empty(8)),))
    outer = Calls(lambda t: (add(inner(t[0])[0], t[0], torch.empty(8)),))
    for _ in range(3):
        inner(torch.randn(8))
    for _ in range(5):
        a = torch.randn(8)
        torch.testing.assert_close(outer(a)[0], 3 * a)
    assert outer.ran == 2


def test_two_threads_that_record_at_once(add):
    """Overlapping modes would leave torch's flags behind; the second thread just runs."""
    entered, left = threading.Event(), threading.Event()

    def body(tensors):
        if slow.ran == 2 and threading.current_thread() is not threading.main_thread():
            entered.set()
            assert left.wait(30)
        return (add(tensors[0], tensors[0], torch.empty(8)),)

    slow, quick = Calls(body), Calls(body)
    for calls in (slow, quick):
        calls(torch.ones(8))
    thread = threading.Thread(target=slow, args=(torch.ones(8),))
    thread.start()
    assert entered.wait(30)
    assert quick(torch.ones(8))[0].tolist() == [2.0] * 8
    assert recorded._ONCE in quick.recorded._tapes.values()  # recorded when it is free again
    left.set()
    thread.join()
    for _ in range(2):
        quick(torch.ones(8)), slow(torch.ones(8))
    assert (slow.ran, quick.ran) == (2, 3)


def test_other_threads_are_not_recorded(add):
    def body(tensors):
        thread = threading.Thread(target=add, args=(CONSTANT, CONSTANT, tensors[1]))
        thread.start()
        thread.join()
        return (add(tensors[0], tensors[0], torch.empty(8)),)

    calls = Calls(body)
    for _ in range(3):
        calls(torch.randn(8), torch.randn(8))
    (tape,) = calls.recorded._tapes.values()
    assert len(tape.launches) == 1


def test_kinds_that_never_repeat_do_not_fill_the_memory(add, monkeypatch):
    monkeypatch.setattr(recorded, "MAX_KINDS", 4)
    calls = Calls(chain(add))
    for size in range(1, 20):
        calls(torch.randn(size), torch.randn(size))
        assert len(calls.recorded._tapes) <= 4
    for _ in range(2):
        calls(torch.randn(19), torch.randn(19))
    assert calls.ran == 20


def test_a_replay_holds_no_more_than_it_needs(add, monkeypatch):
    """Buffers are there from their first launch to their last, results from their first."""
    calls = Calls(chain(add))
    for _ in range(3):
        calls(torch.randn(8), torch.randn(8))
    (tape,) = calls.recorded._tapes.values()
    begins, ends = [one.begins for one in tape.launches], [one.ends for one in tape.launches]
    assert begins == [[i] for i in range(7)]
    assert ends == [[], [], [1], [2], [3], [4], [0]] and tape.results == [5, 6]
