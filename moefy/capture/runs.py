"""Quiet, traced forwards of one model: on which inputs, on fake or real tensors, of the whole or of its parts.

Inputs come from the caller, else from ``derive_inputs``; these candidates are tried until one is accepted. When the
whole model accepts none, its children are tried by themselves: a block alone shows its residual too. So are the modules
that a forward on derived inputs did not reach, such as the vision tower of a model that was given text.

Fake tensors cost time per op and no arithmetic. They are tried first for large models, and where a wrong guess would
poison a device. A real run follows where fake tensors are too weak (a forward reads a value), or where the dense
outputs are wanted. On small models a real forward is faster (measured: 3 against 9 eager forwards at width 256).
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Iterator
from typing import Any

from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensor

from moefy.capture.inputs.derive import derive_inputs
from moefy.capture.inputs.tensors import ExampleInputs
from moefy.capture.not_run import may_hold_ffn, modules_not_run
from moefy.errors import ExampleInputsNeeded, ModelForwardError
from moefy.model.paths import count_parameters
from moefy.model.run_quietly import quiet
from moefy.passes.trace import Trace, fake_inputs, trace_graph, trace_module

MAX_CANDIDATES = 16
LARGE = 100_000_000  # parameters; above this a forward costs more than tracing on fake tensors


@dataclasses.dataclass(frozen=True)
class Part:
    """A module that was run by itself, normally the whole model, with its inputs and its trace.

    ``trace.outputs`` is what the dense forward returned; ``None`` after a run on fake tensors.
    """

    module: nn.Module
    inputs: ExampleInputs
    trace: Trace


class Runs:
    """Traced forwards of ``model``.

    Args:
        model: the model; a part's trace names parameters from here.
        outputs: whether real outputs are wanted.

    Attributes:
        tried: one line for each derived input that was refused, and by which exception.
    """

    def __init__(self, model: nn.Module, outputs: bool = False) -> None:
        self.model, self.tried = model, list[str]()
        self.without_data = any(p.is_meta or isinstance(p, FakeTensor) for p in model.parameters())
        self.outputs = outputs and not self.without_data
        on_device = any(p.device.type != "cpu" for p in model.parameters())
        self.fake_first = self.without_data or on_device or count_parameters(model) > LARGE

    def given(self, inputs: ExampleInputs) -> Part:
        """The whole model on the caller's inputs.

        Raises:
            ModelForwardError: its forward fails on them.
        """
        if not self.outputs and self.fake_first:
            part = self._try(self.model, inputs, fake=True)
            if isinstance(part, Part):
                return part
        part = self._try(self.model, inputs, fake=self.without_data)
        if isinstance(part, Part):
            return part
        raise ModelForwardError(type(self.model).__name__, part) from part

    def derived(self) -> list[Part]:
        """The whole model on derived inputs and the modules that this did not reach; or the parts that run alone.

        Raises:
            ExampleInputsNeeded: nothing runs.
        """
        whole = self.first_accepted(self.model)
        if whole is not None:
            rest = modules_not_run(self.model, [whole.trace])
            return [whole, *(p for fqn in rest for p in self._alone(self.model.get_submodule(fqn)))]
        parts = list(self._children(self.model))
        if not parts:
            raise ExampleInputsNeeded(type(self.model).__name__, self.tried)
        return parts

    def first_accepted(self, module: nn.Module) -> Part | None:
        """``module`` on the first derived inputs that it accepts. Refusals of the whole model go to ``tried``."""
        for index, candidate in enumerate(derive_inputs(module)):
            if index == MAX_CANDIDATES:
                break
            found = self._try(module, candidate, fake=self.fake_first)
            if self.fake_first and (not isinstance(found, Part) or self.outputs):
                retry = isinstance(found, Part) or not _is_misfit(found)
                found = self._try(module, candidate, fake=False) if retry else found
            if isinstance(found, Part):
                return found
            if module is self.model:
                self.tried.append(_refused(candidate, found))
        return None

    def _children(self, module: nn.Module) -> Iterator[Part]:
        """The largest descendants that run by themselves."""
        for child in module.children():
            if may_hold_ffn(child):
                yield from self._alone(child)

    def _alone(self, module: nn.Module) -> Iterator[Part]:
        """``module`` when it runs on derived inputs, else those of its descendants that do."""
        part = self.first_accepted(module)
        if part is not None:
            yield part
        else:
            yield from self._children(module)

    def _try(self, module: nn.Module, inputs: ExampleInputs, *, fake: bool) -> Part | Exception:
        """Trace one forward; the exception when it fails."""
        if not fake and self.without_data:
            return RuntimeError("the model has no data (meta or fake tensors)")
        try:
            with quiet(self.model, values=not fake), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # inputs that do not fit warn before they fail
                return Part(module, inputs, self._trace(module, inputs, fake))
        except Exception as error:  # whatever a user's forward raises means: not with these inputs
            return error

    def _trace(self, module: nn.Module, inputs: ExampleInputs, fake: bool) -> Trace:
        if not isinstance(module, fx.GraphModule) or module is not self.model:
            return trace_module(self.model, inputs.args, inputs.kwargs, fake=fake, run=module)
        ordered = _in_order(module, inputs)
        if not fake:
            return trace_graph(module, ordered)
        with fake_inputs(module, ordered) as converted:
            return dataclasses.replace(trace_graph(module, converted), outputs=None)


def accepted_inputs(model: nn.Module) -> ExampleInputs:
    """The first derived inputs that ``model`` accepts.

    Raises:
        ExampleInputsNeeded: it accepts none of them.
    """
    runs = Runs(model)
    part = runs.first_accepted(model)
    if part is None:
        raise ExampleInputsNeeded(type(model).__name__, runs.tried)
    return part.inputs


def _in_order(module: fx.GraphModule, inputs: ExampleInputs) -> tuple[Any, ...]:
    """The inputs in the order of the graph's placeholders."""
    names = [str(n.target) for n in module.graph.nodes if n.op == "placeholder"]
    rest = names[len(inputs.args) :]
    return (*inputs.args, *(inputs.kwargs[name] for name in rest if name in inputs.kwargs))


def _is_misfit(error: Exception) -> bool:
    """Whether the inputs are wrong, rather than fake tensors too weak."""
    return isinstance(error, TypeError) or "shape" in str(error) or "size" in str(error)


def _refused(candidate: ExampleInputs, error: Exception) -> str:
    lines = str(error).splitlines()
    text = f"{candidate.description}: {type(error).__name__}"
    return f"{text}: {lines[0][:160]}" if lines else text
