"""Every error that a user of moefy can cause, one class each.

Each subclasses ``MoefyError`` and the builtin that a PyTorch user would expect, and each message names the
layer (FQN), what was found, what was expected and what to do:

    >>> raise ConfigError("top_k", got=5, expected="1 <= top_k <= num_experts = 4")
    moefy.errors.ConfigError: top_k: got 5; expected 1 <= top_k <= num_experts = 4
"""

from __future__ import annotations

from collections.abc import Sequence
from difflib import get_close_matches
from typing import Any


class MoefyError(Exception):
    """Base class of every error below."""


class ConfigError(MoefyError, ValueError):
    """An option has a value outside its domain."""

    def __init__(self, option: str, *, got: object, expected: str) -> None:
        self.option = option
        super().__init__(f"{option}: got {got!r}; expected {expected}")


class UnknownOption(MoefyError, TypeError):
    """An option name that does not exist; the nearest one is suggested."""

    def __init__(self, name: str, known: Sequence[str], *, where: str = "moefy") -> None:
        super().__init__(f"{where}: unknown option {name!r}{suggest(name, known)}")


class NoFFNFound(MoefyError, ValueError):
    """Nothing was rewritten. ``candidates`` holds the refused ones, each with its reason."""

    def __init__(self, model: str, candidates: Sequence[Any] = ()) -> None:
        self.candidates = list(candidates)
        lines = [f"  {c.fqn or '(root)'}: {c.reason}" for c in self.candidates[:20]]
        if len(self.candidates) > 20:
            lines.append(f"  ... and {len(self.candidates) - 20} more")
        refused = "\n".join(["; refused candidates:", *lines]) if lines else " and no candidate"
        super().__init__(f"{model} has no feed-forward network to rewrite{refused}")


class PatternError(MoefyError, ValueError):
    """An ``include`` or ``exclude`` glob that matches no candidate; the nearest FQN is suggested."""

    def __init__(self, pattern: str, known: Sequence[str], *, option: str) -> None:
        super().__init__(f"{option}: {pattern!r} matches no candidate{suggest(pattern, known)}")


class AlreadyTransformed(MoefyError, ValueError):
    """``transform`` was called on a model that already holds moefy layers."""

    def __init__(self, fqn: str) -> None:
        super().__init__(
            f"{fqn or '(root)'} is already a Mixture-of-Experts made by moefy; call moefy.undo(model) first"
        )


class NotTransformed(MoefyError, ValueError):
    """``undo`` was called on a model that moefy did not transform."""

    def __init__(self, model: str) -> None:
        super().__init__(f"{model} holds no layer made by moefy.transform; nothing to undo")


class NoMoELayer(MoefyError, ValueError):
    """``expert_load`` was called on a model without a Mixture-of-Experts layer."""

    def __init__(self, model: str) -> None:
        super().__init__(f"{model} holds no Mixture-of-Experts layer; call moefy.transform(model) first")


class ExpertsDiverged(MoefyError, ValueError):
    """``undo`` cannot choose an expert: training changed expert 0, and none was named."""

    def __init__(self, fqn: str, num_experts: int) -> None:
        super().__init__(
            f"{fqn}: expert 0 was changed since transform; name the expert to keep: "
            f"moefy.undo(model, expert=i) with 0 <= i < {num_experts}"
        )


class ExampleInputsNeeded(MoefyError, ValueError):
    """No example inputs were given and none could be derived from the model."""

    def __init__(self, model: str, tried: Sequence[str]) -> None:
        attempts = "\n".join(f"  {t}" for t in tried)
        super().__init__(
            f"cannot derive example inputs for {model}; pass example_args=(...) or "
            f"example_kwargs={{...}} that its forward accepts. Tried:\n{attempts}"
        )


class ModelForwardError(MoefyError, RuntimeError):
    """The model's own forward failed on the example inputs. The cause is chained."""

    def __init__(self, model: str, cause: BaseException) -> None:
        super().__init__(
            f"the forward of {model} fails on the example inputs, before any rewrite: "
            f"{type(cause).__name__}: {cause}"
        )


class NameClash(MoefyError, ValueError):
    """A parameter that moefy has to add has a name that is taken."""

    def __init__(self, fqn: str, name: str, *, layer: str | None = None) -> None:
        super().__init__(
            f"{fqn or '(root)'} already has an attribute {name!r}, which moefy needs there; rename it or "
            f"exclude the layer: exclude=[{fqn if layer is None else layer!r}]"
        )


class CheckFailed(MoefyError, RuntimeError):
    """The rewritten model differs from the dense one. The model was restored."""

    def __init__(self, error: float, tolerance: float, dtype: str, worst: str) -> None:
        self.error, self.tolerance = error, tolerance
        super().__init__(
            f"the rewritten model differs from the dense one by {error:.2e} (relative norm, {dtype}, at {worst}); "
            f"expected at most {tolerance:.0e}. The model was restored. If the model is random in eval mode, or "
            "amplifies rounding so much (a copy of it in float64 then passes), pass check=False"
        )


class RoutingError(MoefyError, RuntimeError):
    """Rows between entry and exit met a tensor that they cannot be combined with, or lost their routing."""


class NonFiniteScores(MoefyError, ValueError):
    """In ``moefy.checked_mode()``, a router's scores hold NaN or infinity. ``tokens`` are the affected rows."""

    def __init__(self, fqn: str, *, tokens: Sequence[int], total: int) -> None:
        self.tokens = list(tokens)
        shown = ", ".join(str(t) for t in self.tokens[:5]) + (", ..." if len(self.tokens) > 5 else "")
        super().__init__(
            f"{fqn}: {len(self.tokens)} of {total} tokens have NaN or infinite router logits (tokens {shown}); "
            "expected finite ones. Look at the layer's input and at router.weight, or lower the learning rate"
        )


class ShapeError(MoefyError, ValueError):
    """A tensor has a shape that the op or layer cannot take."""


class DtypeError(MoefyError, TypeError):
    """A tensor has a dtype that the op or layer cannot take."""


class DeviceError(MoefyError, ValueError):
    """Tensors that must share a device do not."""


class BackendError(MoefyError, RuntimeError):
    """``torch.compile(backend="moefy")`` cannot do what its options ask for."""


class ParallelismNeeded(MoefyError, NotImplementedError):
    """A layer of ``moefy.compat`` was asked to spread over several processes, which it cannot do."""

    def __init__(self, what: str, size: int) -> None:
        super().__init__(
            f"{what}: {size} processes; the layers of moefy.compat run in one. Expert parallelism comes with "
            "moefy.parallelize, on a model built of moefy.MoE or by moefy.transform"
        )


class UsageError(MoefyError, ValueError):
    """A command line that moefy cannot act on."""


def suggest(name: str, known: Sequence[str]) -> str:
    """``"; did you mean 'x'?"`` with the nearest of ``known``, or the known names when none is near."""
    close = get_close_matches(name, list(known), n=1, cutoff=0.5)
    if close:
        return f"; did you mean {close[0]!r}?"
    shown = ", ".join(repr(k) for k in list(known)[:8])
    return f"; known: {shown}{', ...' if len(known) > 8 else ''}" if known else ""
