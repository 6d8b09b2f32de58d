"""moefy turns the feed-forward networks of a dense PyTorch model into Mixture-of-Experts, with the compiler.

    model = moefy.transform(model, num_experts=8)       # any nn.Module or fx.GraphModule
    print(moefy.report(model))
    model = torch.compile(model, backend="moefy")

Importing moefy imports neither torch nor triton nor transformers; public names load on first use. The import also makes
``backend="moefy"`` known where moefy is not installed (``moefy.compiler.entry_point``).
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from moefy.compiler import entry_point

__version__ = "0.1.0"

_PUBLIC = {
    "transform": "moefy.verbs",
    "find": "moefy.verbs",
    "report": "moefy.verbs",
    "undo": "moefy.verbs",
    "MoE": "moefy.nn",
    "MoEConfig": "moefy.config",
    "RouterSpec": "moefy.config",
    "Capacity": "moefy.config",
    "AuxLoss": "moefy.nn.losses",
    "aux_loss": "moefy.nn.losses.delivery",
    "deliver_aux_loss": "moefy.nn.losses.delivery",
    "loss_scale": "moefy.nn.losses.delivery",
    "checked_mode": "moefy.nn.checked",
    "expert_load": "moefy.reports.expert_load",
    "LoadReport": "moefy.reports.expert_load",
    "LoadHistory": "moefy.reports.load_history",
    "FFNMatch": "moefy.records",
    "LayerRecord": "moefy.records",
    "PassRecord": "moefy.records",
    "RewriteReport": "moefy.reports.rewrite",
    "errors": "moefy",
}

__all__ = [
    "AuxLoss",
    "Capacity",
    "FFNMatch",
    "LayerRecord",
    "LoadHistory",
    "LoadReport",
    "MoE",
    "MoEConfig",
    "PassRecord",
    "RewriteReport",
    "RouterSpec",
    "__version__",
    "aux_loss",
    "checked_mode",
    "deliver_aux_loss",
    "errors",
    "expert_load",
    "find",
    "loss_scale",
    "report",
    "transform",
    "undo",
]

if TYPE_CHECKING:
    from moefy import errors
    from moefy.config import Capacity, MoEConfig, RouterSpec
    from moefy.nn import MoE
    from moefy.nn.checked import checked_mode
    from moefy.nn.losses import AuxLoss
    from moefy.nn.losses.delivery import aux_loss, deliver_aux_loss, loss_scale
    from moefy.records import FFNMatch, LayerRecord, PassRecord
    from moefy.reports.expert_load import LoadReport, expert_load
    from moefy.reports.load_history import LoadHistory
    from moefy.reports.rewrite import RewriteReport
    from moefy.verbs import find, report, transform, undo


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'moefy' has no attribute {name!r}")
    if name == "errors":
        return importlib.import_module("moefy.errors")
    value = getattr(importlib.import_module(_PUBLIC[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)


entry_point.offer()
