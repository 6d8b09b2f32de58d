"""The first stage of every verb: run a model, match its FFNs, judge them against the live modules.

>>> captured = capture(model, (x,))
>>> [match.record.fqn for match in captured.matches]
['layers.0.mlp', 'layers.1.mlp']
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from torch import nn

from moefy.capture.inputs.tensors import example
from moefy.capture.judge import judge
from moefy.capture.not_run import modules_not_run
from moefy.capture.runs import Part, Runs
from moefy.errors import ExampleInputsNeeded
from moefy.passes.match import Match, match_ffns


@dataclasses.dataclass(frozen=True)
class Captured:
    """What the runs of one model showed.

    Attributes:
        parts: the modules that were run by themselves, normally the whole model alone.
        matches: every FFN candidate of all parts, refused ones with their reason.
        not_run: FQNs of the topmost modules that no run reached, hence nobody searched.
    """

    parts: tuple[Part, ...]
    matches: tuple[Match, ...]
    not_run: tuple[str, ...]

    @property
    def source(self) -> str:
        """How the graph was obtained: "fake run", "real run", "fx graph", ..."""
        return self.parts[0].trace.source

    @property
    def inputs(self) -> str:
        """The inputs in words."""
        text, others = self.parts[0].inputs.description, len(self.parts) - 1
        return f"{text}, and {others} more part{'s' * (others > 1)} by themselves" if others else text


def capture(
    model: nn.Module,
    args: tuple[Any, ...] = (),
    kwargs: dict[str, Any] | None = None,
    *,
    outputs: bool = False,
) -> Captured:
    """Run ``model`` on the given inputs, or on derived ones, and match its FFNs.

    Args:
        model: the model. Afterwards it is as it was.
        args: positional inputs of one forward.
        kwargs: keyword inputs. Without any input, candidates are derived from the model and tried.
        outputs: run on real tensors and keep the dense outputs, for a check later on.

    Raises:
        ModelForwardError: the model's own forward fails on the inputs that were given.
        ExampleInputsNeeded: none were given and none could be derived.
    """
    runs = Runs(model, outputs)
    if args or kwargs:
        return capture_traced(model, [runs.given(example(tuple(args), kwargs or {}, "given by the caller"))])
    captured = capture_traced(model, runs.derived())
    whole = captured.parts[0].module is model
    # A child that was run by itself may hide the residual that its parent adds: no match there tells nothing.
    if not whole and not any(match.record.accepted for match in captured.matches):
        raise ExampleInputsNeeded(type(model).__name__, runs.tried)
    return captured


def capture_traced(model: nn.Module, parts: Sequence[Part]) -> Captured:
    """Match and judge the FFNs of runs that were traced before."""
    matches: dict[Any, Match] = {}
    for part in parts:
        for match in match_ffns(part.trace):
            matches.setdefault(match.region.key, match)
    not_run = modules_not_run(model, [part.trace for part in parts])
    return Captured(tuple(parts), tuple(judge(model, matches.values())), tuple(not_run))
