"""``Code``: the stable short name of every reason for which a candidate is refused. Each is written here, once.

Contract: whatever refuses a candidate names one of these, and pyright refuses any other. ``Match.refused`` takes the
codes of later rooms too.

    >>> refusal: Refusal = ("width-change", "its width changes from 8 to 12")
"""

from __future__ import annotations

from typing import Literal

Code = Literal[
    # a linear that cannot become experts (linears)
    "grouped",  # its weight holds a stack of matrices, or its 1x1 convolution has groups
    "quantized",  # its weight is not a plain floating-point tensor
    "sharded",  # its weight is a DTensor
    "computed-weight",  # its weight or bias is computed at run time
    "unregistered-weight",  # its weight is no registered parameter
    "lora",  # it carries a LoRA adapter
    # a body that holds more than element-wise ops (regions)
    "conv-between",
    "concat-between",
    "norm-between",
    "reduction-between",
    "opaque-between",
    # a region that is no FFN (refusals)
    "escape",  # an inner value is used outside the region
    "different-source",  # the entries, or the body, read different values
    "width-change",  # D_in != D_out
    "router-above",  # it is part of an existing Mixture-of-Experts
    "no-residual",  # a head, pooler, squeeze-excite block or projector
    "feature-axis",  # it mixes tokens, or its body moves the features
    # an FFN that cannot be written back
    "shared-weight",  # a weight is also used elsewhere, or tied to another module's
    "raw-parameters",  # its weights have no module of their own to replace
    "unsupported-hook",  # a hook or an overridden forward would be lost (moefy.capture.judge)
    "excluded",  # ``include`` or ``exclude`` leaves it out (moefy.rewrite.plan)
]

Refusal = tuple[Code, str]
"""The code of a refusal, and the reason in words."""
