"""The options of ``torch.compile(backend="moefy", options={...})``, checked.

``torch.compile`` hands a custom backend's options over unread, so every unknown name and value
outside its domain is an error here.

    >>> parse_options({"num_experts": 8, "inner": "aot_eager"}).moe
    MoEConfig(num_experts=8, top_k=2, ...)
    >>> parse_options({"num_expert": 8})
    moefy.errors.UnknownOption: torch.compile(backend="moefy"): unknown option 'num_expert'; did
    you mean 'num_experts'?
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Literal, get_args

from moefy.config import MoEConfig
from moefy.errors import ConfigError, UnknownOption
from moefy.passes.pipeline import check_names
from moefy.records import Selection

Inner = Literal["inductor", "aot_eager", "eager"]
WHERE = 'torch.compile(backend="moefy")'


@dataclasses.dataclass(frozen=True, kw_only=True)
class CompileOptions:
    """What the backend does with a graph.

    Attributes:
        inner: what compiles the graph after moefy's passes.
        mode: Inductor's mode: ``"default"``, ``"reduce-overhead"``, ``"max-autotune"``, ...
        disable: names of passes that are not run.
        inductor: patches of ``torch._inductor.config`` for this compilation.
        moe: set when a dense model becomes an MoE at compile time; ``None`` leaves weights alone.
        include: which FFNs, as ``moefy.transform`` takes it; FQNs count from the compiled module.
        exclude: which not.
    """

    inner: Inner = "inductor"
    mode: str | None = None
    disable: tuple[str, ...] = ()
    inductor: Mapping[str, Any] = dataclasses.field(default_factory=lambda: MappingProxyType({}))
    moe: MoEConfig | None = None
    include: Selection = None
    exclude: Selection = None

    def __post_init__(self) -> None:
        """Refuse values outside their domain."""
        if self.inner not in get_args(Inner):
            raise ConfigError("inner", got=self.inner, expected=f"one of {get_args(Inner)}")
        check_names(self.disable)
        _check_inductor(self)
        if self.moe is None and (self.include is not None or self.exclude is not None):
            raise ConfigError("include/exclude", got="num_experts=None", expected="num_experts")


OWN_OPTIONS = ("inner", "mode", "disable", "inductor", "include", "exclude", "config")


def parse_options(options: Mapping[str, Any] | None = None, mode: str | None = None) -> CompileOptions:
    """Read what ``torch.compile`` passed on.

    Args:
        options: ``CompileOptions``' fields but ``moe``, the fields of ``MoEConfig``, and ``config``,
            a whole ``MoEConfig``.
        mode: ``torch.compile(mode=...)``, the same as ``options["mode"]``.

    Raises:
        UnknownOption: for a name that does not exist; the nearest one is suggested.
        ConfigError: for a value outside its domain.
    """
    options = dict(options or {})
    for name in options:
        if name not in OWN_OPTIONS and name not in MoEConfig.field_names():
            raise UnknownOption(name, (*OWN_OPTIONS, *MoEConfig.field_names()), where=WHERE)
    own = {k: v for k, v in options.items() if k in OWN_OPTIONS and k != "config"}
    if mode is not None:
        if own.get("mode", mode) != mode:
            raise ConfigError("mode", got=own["mode"], expected=f"mode={mode!r} as given beside it")
        own["mode"] = mode
    disable = own.get("disable", ())
    own["disable"] = (disable,) if isinstance(disable, str) else tuple(disable)
    moe = {k: v for k, v in options.items() if k in MoEConfig.field_names()}
    config = options.get("config")
    resolved = MoEConfig.resolve(config, **moe) if moe or config is not None else None
    return CompileOptions(**own, moe=resolved)


def inductor_patches(options: CompileOptions) -> dict[str, Any]:
    """The ``config_patches`` for ``compile_fx``: the mode's, then the user's."""
    from torch._inductor import list_mode_options

    return {**(list_mode_options(options.mode) if options.mode else {}), **options.inductor}


def with_hooks(patches: Mapping[str, Any], hooks: Mapping[str, Any]) -> dict[str, Any]:
    """``patches`` and the hooks of the registered passes.

    Raises:
        ConfigError: the user patches a hook that passes need.
    """
    for name in hooks:
        if name in patches:
            expected = "no patch of it: registered passes run there"
            raise ConfigError(f"inductor[{name!r}]", got=patches[name], expected=expected)
    return {**patches, **hooks}


def _check_inductor(options: CompileOptions) -> None:
    if options.mode is None and not options.inductor:
        return
    if options.inner != "inductor":
        raise ConfigError("mode/inductor", got=options.inner, expected="inner='inductor' with it")
    from torch._inductor import config, list_mode_options

    modes = tuple(list_mode_options())
    if options.mode is not None and options.mode not in modes:
        raise ConfigError("mode", got=options.mode, expected=f"one of {modes}")
    known = config.get_config_copy()
    for name in options.inductor:
        if name.replace("-", "_") not in known:
            raise UnknownOption(name, tuple(known), where="torch._inductor.config")
